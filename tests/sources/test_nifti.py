import gzip
import io
import itertools
import json
import os
import struct

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.build import build
from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.limits import Limits, use_limits
from data_pipelines.sources import detect_source, load_source, nifti
from data_pipelines.sources.nifti import NIfTI
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.volumes import SliceRule

nibabel = pytest.importorskip("nibabel")

from tests.sources.volume_body import NAMES, SHAPE, affine_of, draw_body, facts, turn_to  # noqa: E402

TABLE = (
    "<CaretExtension><VolumeInformation Index='0'><LabelTable>"
    + "".join(f'<Label Key="{value}" Red="0"><![CDATA[{name}]]></Label>' for value, name in NAMES.items())
    + "</LabelTable></VolumeInformation></CaretExtension>"
)


def save(path, values, codes="RAS", affine=None, table="", oriented=True):
    """Writes a NIfTI file of a RAS+ array, with its axes in other directions."""
    affine = affine_of() if affine is None else affine
    if codes != "RAS":
        values, affine = turn_to(codes, values, affine)
    image = nibabel.Nifti1Image(values, affine if oriented else None)
    if table:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(0, table.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_case(folder, name="s1", image="ct", table=TABLE, codes="RAS", labels=None):
    values, truth = draw_body()
    save(folder / name / f"{image}.nii.gz", values, codes)
    save(folder / name / "multilabel.nii.gz", truth if labels is None else labels, codes, table=table)
    return folder


def write_msd(folder, description, channel="", names=("a",)):
    values, labels = draw_body()
    for name in names:
        save(folder / "imagesTr" / f"{name}{channel}.nii.gz", values)
        save(folder / "labelsTr" / f"{name}.nii.gz", labels)
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def read(folder, source="nifti", **options):
    return load_source(source, folder, dataset="volumes", **options)


def by_plane(source) -> dict[str, list]:
    examples = sorted(source, key=lambda example: example.image_id.split("/")[-2])
    groups = itertools.groupby(examples, lambda example: example.image_id.split("/")[-2])
    return {plane: list(group) for plane, group in groups}


def pixels_of(example) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(example.image)))


def centers(example, phrase) -> list[tuple[float, float]]:
    """(x, y) of the boxes of a phrase, as shares of the image's width and height."""
    boxes = [region.box for region in example.regions if region.phrase == phrase]
    return [((b[0] + b[2]) / 2 / example.width, (b[1] + b[3]) / 2 / example.height) for b in boxes]


def test_slices_of_a_case(tmp_path):
    planes = by_plane(read(write_case(tmp_path)))
    assert {plane: len(examples) for plane, examples in planes.items()} == {"axial": 10, "coronal": 7, "sagittal": 8}
    for plane, size, millimetres in (("axial", (45, 48), 2), ("coronal", (33, 32), 3), ("sagittal", (50, 45), 2)):
        example = planes[plane][3]
        assert (example.height, example.width) == size == pixels_of(example).shape
        assert example.spacing_mm == (millimetres, millimetres)
        assert (example.dataset, example.modality, example.absent) == ("volumes", "ct", ())
        assert example.image_id.startswith(f"s1/{plane}/") and example.patient_id == hash_patient("s1", "volumes")


def test_patient_is_hung_as_radiologists_do(tmp_path):
    planes = by_plane(read(write_case(tmp_path)))
    for plane in ("axial", "coronal"):
        shown = [example for example in planes[plane] if centers(example, "liver") and centers(example, "spleen")]
        assert shown
        assert all(centers(e, "liver")[0][0] < 0.5 < centers(e, "spleen")[0][0] for e in shown)
    for example in planes["axial"]:
        assert centers(example, "vertebra")[0][1] > 0.7
    for example in planes["sagittal"]:
        for x, _ in centers(example, "vertebra"):
            assert x > 0.7
    tops = [example.regions[0].box[1] for example in planes["coronal"] if centers(example, "liver")]
    assert set(tops) == {round(4 * 5 / 3)}  # four slices above the liver


@pytest.mark.parametrize("codes", ["LPS", "LAS", "RAS", "SAR", "PIL", "ASL", "IPR"])
def test_same_anatomy_gives_the_same_examples_however_it_is_stored(tmp_path, codes):
    expected = [facts(example) for example in read(write_case(tmp_path / "ras"))]
    found = [facts(example) for example in read(write_case(tmp_path / "other", codes=codes))]
    assert found == expected


def test_image_and_labels_may_be_stored_differently(tmp_path):
    expected = [facts(example) for example in read(write_case(tmp_path))]
    save(tmp_path / "s1" / "multilabel.nii.gz", draw_body()[1], "PIL", table=TABLE)
    assert [facts(example) for example in read(tmp_path)] == expected


def test_organs_are_whole_and_lesions_one_by_one(tmp_path):
    example = next(e for e in read(write_case(tmp_path)) if e.image_id == "s1/axial/11")
    assert sorted(region.phrase for region in example.regions) == [
        "liver",
        "liver tumor",
        "liver tumor",
        "spleen",
        "vertebra",
    ]
    for region in example.regions:
        mask = coco_mask.decode(region.mask)
        assert mask.shape == (example.height, example.width)
        rows, columns = np.nonzero(mask)
        np.testing.assert_array_equal(region.box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def test_tiny_components_are_dropped_and_counted(tmp_path):
    labels = draw_body()[1]
    labels[0, 0, 3:5] = 1
    source = read(write_case(tmp_path, labels=labels))
    assert source.dropped["too small"] > 0
    assert all(region.box[0] < 36 for e in by_plane(source)["axial"] for region in e.regions if region.label == "liver")
    list(source), list(source)
    assert source.dropped == read(tmp_path).dropped


def test_window_is_the_slices_or_the_one_asked_for(tmp_path):
    write_case(tmp_path)
    example = next(e for e in read(tmp_path) if not centers(e, "liver"))
    assert pixels_of(example).max() == pixels_of(example).astype(int)[-5].max() < 230  # bone is grey in its window
    rule = SliceRule(window="soft_tissue")
    other = next(e for e in NIfTI(tmp_path, dataset="a", rule=rule) if e.image_id == example.image_id)
    assert pixels_of(other).max() == 255


def test_other_modalities_show_the_middle_of_their_values(tmp_path):
    write_case(tmp_path, image="mri")
    shades = np.concatenate([pixels_of(example).ravel() for example in by_plane(read(tmp_path))["axial"]])
    assert (shades.min(), shades.max()) == (0, 255)
    assert {example.modality for example in read(tmp_path)} == {"mri"}


def test_folder_may_be_the_case_itself(tmp_path):
    source = read(write_case(tmp_path) / "s1")
    assert source.unused == [] and source[0].image_id.startswith("s1/axial/")


def test_masks_of_one_structure_each(tmp_path):
    expected = {example.image_id: len(example.regions) for example in read(write_case(tmp_path / "one"))}
    folder = tmp_path / "many" / "s1"
    values, labels = draw_body()
    save(folder / "ct.nii.gz", values)
    for value, name in NAMES.items():
        save(folder / "segmentations" / f"{name}.nii.gz", (labels == value).astype(np.uint8))
    save(folder / "segmentations" / "gallbladder.nii.gz", np.zeros(SHAPE, np.uint8))
    source = read(folder.parent)
    assert {example.image_id: len(example.regions) for example in source} == expected
    assert all(example.absent == () for example in source)  # an empty mask is outside the field of view


def test_overlapping_masks_both_count(tmp_path):
    values, labels = draw_body()
    save(tmp_path / "s1" / "image.nii.gz", values)
    save(tmp_path / "s1" / "segmentations" / "liver.nii.gz", np.isin(labels, (1, 4)).astype(np.uint8))
    save(tmp_path / "s1" / "segmentations" / "liver_tumor.nii.gz", (labels == 4).astype(np.float32))
    example = next(e for e in read(tmp_path, modality="ct") if e.image_id == "s1/axial/11")
    liver, *tumors = sorted(example.regions, key=lambda region: region.phrase)
    assert (liver.phrase, len(tumors), example.modality) == ("liver", 2, "ct")
    for tumor in tumors:
        assert (coco_mask.decode(tumor.mask) <= coco_mask.decode(liver.mask)).all()


@pytest.mark.parametrize(
    ("labels", "channel"),
    [
        ({"0": "background", "1": "liver", "2": "spleen", "3": "vertebrae", "4": "cancer"}, ""),
        ({"background": 0, "liver": 1, "spleen": 2, "vertebrae": 3, "cancer": 4}, "_0000"),
        ({"background": 0, "liver": [1, 4], "spleen": 2, "vertebrae": 3, "cancer": 4}, "_0000"),
    ],
    ids=["msd", "nnunet", "nnunet regions"],
)
def test_msd_and_nnunet(tmp_path, labels, channel):
    description = {"name": "Liver", "labels": labels, "channel_names": {"0": "CT"}}
    folder = write_msd(tmp_path, description, channel, names=("b", "a"))
    save(folder / "imagesTr" / "c.nii.gz", draw_body()[0])
    (folder / "imagesTr" / "._a.nii.gz").write_bytes(b"not an image")
    source = read(folder)
    assert detect_source(folder) == "nifti"
    assert [item.image_id.split("/")[0] for item in source] == ["a"] * (len(source) // 2) + ["b"] * (len(source) // 2)
    example = next(e for e in source if e.image_id == "a/axial/11")
    assert {region.label for region in example.regions} >= {"liver", "spleen", "vertebra"}
    assert example.modality == "ct"
    assert source.unused == [str(folder / "imagesTr" / "c.nii.gz")]


@pytest.mark.parametrize(
    ("channels", "modality"), [({"0": "T1w"}, "mri"), ({"0": "MRI"}, "mri"), ({"0": "noise"}, "pet")]
)
def test_modality_of_the_first_channel(tmp_path, channels, modality):
    folder = write_msd(tmp_path, {"modality": channels, "labels": {str(v): n for v, n in NAMES.items()}})
    values = np.stack([draw_body()[0], np.zeros(SHAPE, np.int16)], axis=-1)
    save(folder / "imagesTr" / "a.nii.gz", values)
    example = read(folder, modality="pet")[0]
    assert example.modality == modality and pixels_of(example).max() == 255


def test_site_of_the_data_set_makes_cancer_a_lesion(tmp_path):
    folder = write_msd(tmp_path, {"name": "Lung", "labels": {"1": "lung", "2": "x", "3": "vertebrae", "4": "cancer"}})
    example = next(e for e in read(folder) if e.image_id == "a/axial/11")
    assert [region.label for region in example.regions].count("lung_tumor") == 2


def test_unknown_voxels_of_nnunet_are_no_structure(tmp_path):
    labels = {"background": 0, "liver": 1, "spleen": 2, "vertebrae": 3, "ignore": 4}
    examples = list(read(write_msd(tmp_path, {"labels": labels, "channel_names": {"0": "CT"}}, "_0000")))
    assert {region.label for example in examples for region in example.regions} == {"liver", "spleen", "vertebra"}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def relabel(folder, labels=None, table=TABLE, affine=None, **options):
    save(
        folder / "s1/multilabel.nii.gz",
        draw_body()[1] if labels is None else labels,
        table=table,
        affine=affine,
        **options,
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: truncate(f / "s1/ct.nii.gz"), "ct.nii.gz: its voxels cannot be read"),
        (lambda f: truncate(f / "s1/multilabel.nii.gz"), "multilabel.nii.gz: .*cannot be read|no readable"),
        (lambda f: (f / "s1/ct.nii.gz").write_bytes(b"GIF89a" * 99), "ct.nii.gz: no readable NIfTI"),
        (lambda f: relabel(f, draw_body()[1][:-1]), "20 x 45 x 31 voxels .* image 20 x 45 x 32"),
        (
            lambda f: relabel(f, affine=affine_of() + np.diag([0, 0.5, 0, 0])),
            "22 mm away",
        ),
        (lambda f: relabel(f, table=""), "values 1, 2, 3, 4 have no name"),
        (lambda f: relabel(f, table=TABLE.replace('Key="2"', 'Key="7"')), "values 2 have no name"),
        (lambda f: relabel(f, table=TABLE.replace("</LabelTable>", "")), "label table .* cannot be read"),
        (lambda f: relabel(f, table=TABLE.replace("spleen", "(x)")), "has no words"),
        (lambda f: relabel(f, table=TABLE.replace("spleen", "liver")), "several values are called 'liver'"),
        (lambda f: relabel(f, draw_body()[1] + np.float32(0.5)), "whole numbers"),
        (lambda f: relabel(f, -draw_body()[1].astype(np.int16)), "whole numbers"),
        (lambda f: save(f / "s1/ct.nii.gz", draw_body()[0], oriented=False), "nothing about orientation"),
        (lambda f: save(f / "s1/ct.nii.gz", draw_body()[0][..., 0]), "has the shape"),
    ],
)
def test_bad_files_are_errors_that_name_them(tmp_path, break_it, message):
    break_it(write_case(tmp_path))
    source = read(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        source[0]
    assert str(tmp_path / "s1") in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset.json: no valid JSON"),
        ("[1]", "dataset.json: expected an object"),
        ('{"labels": ["liver"]}', "must be like"),
        ('{"labels": {"liver": "one"}}', "must be like"),
        ('{"labels": {"liver": 1}}', "values 2, 3, 4 have no name"),
    ],
)
def test_bad_names_are_errors(tmp_path, content, message):
    write_case(tmp_path, table="")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)[0]


def claim(path, shape=None, offset=None):
    """Writes another size, or beginning of the voxels, into the header of a NIfTI-1 file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = bytearray(file.read())
    if shape:
        struct.pack_into("<8h", content, 40, 3, *shape, 1, 1, 1, 1)
    if offset:
        struct.pack_into("<f", content, 108, offset)
    with opener(path, "wb") as file:
        file.write(content)


@pytest.mark.parametrize(
    ("claims", "limits", "message"),
    [
        ({"shape": (32767, 32767, 32767)}, {}, "voxels .* raise the limit volume_voxels"),
        ({"shape": (1200, 1200, 1200)}, {}, "announces 3,456,000,000 bytes of voxels, which a file of .* cannot hold"),
        ({"offset": 1e12}, {}, "voxels begin at byte 1e.12"),
        ({"offset": float("nan")}, {}, "voxels begin at byte nan"),
        ({}, {"volume_voxels": 32 * 45 * 20 - 1}, "raise the limit volume_voxels"),
    ],
)
@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii"])
def test_header_that_claims_too_much_is_refused_before_memory_goes_to_it(tmp_path, name, claims, limits, message):
    write_case(tmp_path)
    (tmp_path / "s1/ct.nii.gz").unlink()
    claim(save(tmp_path / "s1" / name, draw_body()[0]), **claims)
    with use_limits(Limits(**limits)), pytest.raises(SourceError, match=f"{name}: .*{message}"):
        read(tmp_path)[0]


def test_entities_in_a_label_table_are_refused(tmp_path):
    write_case(tmp_path, table='<!DOCTYPE a [<!ENTITY b "c">]>' + TABLE)
    with pytest.raises(SourceError, match=r"multilabel.nii.gz: the label table .* has a DOCTYPE"):
        read(tmp_path)[0]


def test_bad_table_of_a_case_leaves_the_other_cases(tmp_path):
    write_case(write_case(tmp_path, "s1"), "s2")
    (tmp_path / "s1/labels.json").write_text("[")
    source = read(tmp_path)
    with pytest.raises(SourceError, match=r"s1/labels.json: no valid JSON"):
        source[0]
    assert {source[i].image_id.split("/")[0] for i in range(1, len(source))} == {"s2"}


def test_plans_spare_the_labels_until_something_changes(tmp_path, monkeypatch):
    write_case(write_case(tmp_path / "in", "s1"), "s2")

    def open_source(**rule):
        return NIfTI(tmp_path / "in", dataset="d", rule=SliceRule(**rule), plans=str(tmp_path / "plans"))

    def reads(**rule) -> int:
        count = []
        usual = nifti.read_multilabel
        with monkeypatch.context() as patch:
            patch.setattr(nifti, "read_multilabel", lambda *a: count.append(1) or usual(*a))
            open_source(**rule)
        return len(count)

    first = open_source()
    assert reads() == 0
    again = open_source()
    assert [e.image_id for e in again] == [e.image_id for e in first] == [e.image_id for e in read(tmp_path / "in")]
    assert (again.dropped, again.unused) == (first.dropped, first.unused)
    assert reads(planes=("axial",)) == 2
    os.utime(tmp_path / "in/s2/multilabel.nii.gz", ns=(1, 1))
    assert reads() == 1
    for path in (tmp_path / "plans").iterdir():
        assert "s1" not in path.name + path.read_text()
        path.write_text("[[1]]")
    assert reads() == 2


def test_a_damaged_case_is_one_item_and_leaves_the_others(tmp_path):
    write_case(write_case(tmp_path, "s1"), "s2")
    truncate(tmp_path / "s1" / "multilabel.nii.gz")
    metadata = build(read(tmp_path), tmp_path / "records", name="volumes", on_error="skip", progress=False)
    told = metadata["build"]["data_sets"]["volumes"]
    assert told["skipped"] == 1
    assert metadata["splits"]["train"]["num_examples"] == len(read(tmp_path)) - 1
    assert "too small" in told["dropped"]


def test_case_without_large_structures_is_unused(tmp_path):
    source = read(write_case(write_case(tmp_path, "s1", labels=np.zeros(SHAPE, np.uint8)), "s2"))
    assert source.unused == ["s1: no structure is large enough in any plane"]


def test_slices_that_show_only_specks_are_left_out(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[::4, ::4, :10] = labels[1::4, ::4, :10] = 1  # 2 pixels each
    labels[18:29, 15:40, 12:18] = 1
    source = NIfTI(write_case(tmp_path, labels=labels), dataset="a", rule=SliceRule(planes=("axial",)))
    assert [example.image_id for example in source] == [f"s1/axial/{index}" for index in (3, 5, 7)]


def test_cases_keep_their_own_labels(tmp_path):
    write_case(tmp_path / "both", "s1")
    write_case(tmp_path / "both", "s2", labels=np.where(draw_body()[1] == 2, 1, 0).astype(np.uint8))
    write_case(tmp_path / "one", "s2", labels=np.where(draw_body()[1] == 2, 1, 0).astype(np.uint8))
    second = [facts(example) for example in read(tmp_path / "both") if example.image_id.startswith("s2/")]
    assert second == [facts(example) for example in read(tmp_path / "one")]


def test_folder_without_labels_is_an_error(tmp_path):
    save(tmp_path / "s1" / "ct.nii.gz", draw_body()[0])
    assert not NIfTI.matches(tmp_path)
    with pytest.raises(SourceError, match=r"no labelled NIfTI volume: .*found .*ct.nii.gz"):
        read(tmp_path)


def test_order_and_content_are_the_same_each_time(tmp_path):
    for name in ("s10", "s2", "s1"):
        write_case(tmp_path, name)
    source = read(tmp_path)
    first = [facts(example) for example in source]
    assert [facts(example) for example in read(tmp_path)] == first
    assert [facts(source[index]) for index in range(len(source) - 1, -1, -1)][::-1] == first
    assert len({example.image_id for example in source}) == len(first)
    assert len({example.patient_id for example in source}) == 3


@pytest.mark.parametrize(("case", "modality"), [("ct", "ct"), ("mr", "mri")])
def test_real_abdomen(shared_dir, case, modality):
    folder = shared_dir / "data" / "totalsegmentator" / case
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    assert detect_source(folder) == "nifti"
    source = read(folder)
    planes = by_plane(source)
    assert set(planes) == {"axial", "coronal", "sagittal"} and source.unused == []
    for plane in ("axial", "coronal"):
        for phrase, side in (
            ("liver", -1),
            ("gallbladder", -1),
            ("right kidney", -1),
            ("spleen", 1),
            ("left kidney", 1),
        ):
            shown = [place for example in planes[plane] for place in centers(example, phrase)]
            assert shown and (np.mean([x for x, _ in shown]) - 0.5) * side > 0.05, (plane, phrase)
    spine = [r for e in planes["axial"] for r in e.regions if "vertebra" in r.phrase]
    heights = [(r.box[1] + r.box[3]) / 2 / planes["axial"][0].height for r in spine]
    assert heights and min(heights) > 0.55
    for example in planes["sagittal"]:
        assert all(x > 0.5 for name in ("left back muscle", "right back muscle") for x, _ in centers(example, name))
    labels = load_taxonomy().labels
    regions = [region for example in source for region in example.regions]
    assert {example.modality for example in source} == {modality}
    assert sum(region.label in labels for region in regions) > 0.7 * len(regions)
    assert len({(e.image_id, r.label) for e in source for r in e.regions}) == len(regions)  # organs are whole


def test_real_lungs_are_on_the_other_side_and_dark(shared_dir):
    folder = shared_dir / "data" / "totalsegmentator" / "ct"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    top = by_plane(read(folder))["axial"][0]
    for phrase, side in (("left lower lobe", 1), ("right lower lobe", -1)):
        (region,) = (region for region in top.regions if region.phrase == phrase)
        ((x, _),) = centers(top, phrase)
        assert (x - 0.5) * side > 0
        assert np.median(pixels_of(top)[coco_mask.decode(region.mask).astype(bool)]) == 0
