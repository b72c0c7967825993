import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from data_pipelines.curate import (
    SALT_VARIABLE,
    SourceError,
    box_from_mask,
    clean_name,
    clip_box,
    curate,
    find_modality,
    hash_identifier,
    hash_patient,
    name_region,
    split_key,
)
from data_pipelines.schema import GroundingExample, Region

EXAMPLE = GroundingExample(image=b"", image_id="a", dataset="d", height=10, width=20)
coordinates = st.floats(-50, 50, width=32)


@given(box=st.tuples(*[coordinates] * 4), height=st.integers(1, 40), width=st.integers(1, 40))
def test_clipped_box_is_the_box_inside_the_image_or_none(box, height, width):
    clipped, fate = clip_box(np.asarray(box), height, width)
    x0, y0, x1, y1 = box
    overlap = (max(x0, 0), max(y0, 0), min(x1, width), min(y1, height))
    if x1 <= x0 or y1 <= y0:
        assert (clipped, fate) == (None, "no area")
    elif overlap[2] <= overlap[0] or overlap[3] <= overlap[1]:
        assert (clipped, fate) == (None, "outside the image")
    else:
        np.testing.assert_array_equal(clipped, np.asarray(overlap, np.float32))
        assert fate == ("kept" if overlap == box else "clipped")


def test_box_at_the_edge_has_no_negative_zero():
    box = np.asarray([-0.0, 0.0, 4, 5], np.float32)
    clipped, fate = clip_box(box, 5, 4)
    assert (np.asarray(clipped).tobytes(), fate) == (np.asarray([0, 0, 4, 5], np.float32).tobytes(), "kept")


def test_curate_counts_what_it_clips_and_drops():
    boxes = [[0, 0, 5, 5], [-2, 0, 5, 5], [15, 5, 25, 12], [3, 3, 3, 9], [20, 0, 30, 5]]
    regions = tuple(Region(np.asarray(box, np.float32), f"p{i}", "l") for i, box in enumerate(boxes))
    example, tally = curate(dataclasses.replace(EXAMPLE, regions=regions))
    assert [region.phrase for region in example.regions] == ["p0", "p1", "p2"]
    np.testing.assert_array_equal(example.regions[2].box, [15, 5, 20, 10])
    both = tally + tally
    assert both.as_dict() == {"clipped": 4, "dropped": {"no area": 2, "outside the image": 2}}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_box_that_is_not_finite_is_an_error(bad):
    region = Region(np.asarray([0, 0, bad, 5], np.float32), "lung", "lung")
    with pytest.raises(SourceError, match="image a, region 'lung'"):
        curate(dataclasses.replace(EXAMPLE, regions=(region,)))


@given(nps.arrays(bool, nps.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_box_from_mask_is_the_smallest_that_holds_it(mask):
    x0, y0, x1, y1 = box_from_mask(mask).astype(int)
    inside = mask[y0:y1, x0:x1]
    assert inside.sum() == mask.sum()
    if mask.any():
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    else:
        assert (x0, y0, x1, y1) == (0, 0, 0, 0)


@given(st.text(), st.text())
def test_split_goes_by_patient_whatever_the_data_set(image_id, patient_id):
    example = dataclasses.replace(EXAMPLE, image_id=image_id, patient_id=patient_id)
    other = dataclasses.replace(example, image_id=image_id + "x" if patient_id else image_id, dataset="other")
    assert split_key(example) == split_key(other) == (patient_id or image_id)
    assert split_key(example, "pool") == (f"pool:{patient_id}" if patient_id else image_id)


def test_patients_whose_names_are_not_utf8_have_a_hash():
    for text in ("sch\udce4del", "\ud800"):
        assert hash_patient(text, "d") == hash_patient(text, "d") != hash_patient("sch?del", "d")


def test_names_are_cleaned_as_glip_does():
    assert clean_name("lung_(left (big))  nodule_A") == "lung nodule A"


def test_known_names_become_the_labels_of_the_taxonomy():
    assert name_region("RBC") == {
        "phrase": "red blood cell",
        "label": "red_blood_cell",
        "granularity": "cell",
        "parent": "",
    }
    assert name_region("tumor")["label"] == "tumor"
    assert name_region("tumor", "lung")["label"] == "lung_tumor"
    assert name_region("Odd_thing")["phrase"] == "Odd thing"
    assert name_region("Odd_thing")["label"] == "Odd_thing"


@pytest.mark.parametrize("name", ["", "  ", "_", "(only brackets)"])
def test_name_without_words_is_an_error(name):
    with pytest.raises(SourceError, match="no words"):
        name_region(name)


@pytest.mark.parametrize(
    ("name", "modality"),
    [("CT", "ct"), ("X-Ray", "xray"), ("MRI-T1-Gd", "mri"), ("pathology", "histopathology"), ("chest", ""), ("", "")],
)
def test_modalities_by_their_usual_names(name, modality):
    assert find_modality(name) == modality


def test_patient_hash_is_stable_and_hides_the_id():
    assert hash_patient("Doe", "d") == hash_patient("Doe", "d") != hash_patient("Roe", "d")
    assert "Doe" not in hash_patient("Doe", "d") and len(hash_patient("Doe", "d")) == 16
    assert hash_patient(" ", "d") == hash_patient(None, "d") == ""


def test_patient_hash_needs_the_salt_and_is_one_in_all_data_sets_with_it(monkeypatch):
    assert hash_patient("Doe", "a") != hash_patient("Doe", "b")
    unsalted = hash_patient("Doe", "a")
    monkeypatch.setenv(SALT_VARIABLE, "secret")
    assert hash_patient("Doe", "a") == hash_patient("Doe", "b") != unsalted
    assert hash_patient("Doe", "a") == hash_identifier("patient", "Doe", "secret")  # as DICOM's PatientID
