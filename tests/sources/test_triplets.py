import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.schema import Expression
from data_pipelines.sources import detect_source, load_source

TEXT = "A dense area in the middle of the image"


def record(image="a.png", caption=TEXT, **fields):
    return {"image": image, "caption": caption, **fields}


def write_triplets(folder, *records, name="train.jsonl", images=("a",)):
    (folder / "images").mkdir(exist_ok=True)
    for stem in images:
        Image.new("L", (40, 20)).save(folder / "images" / f"{stem}.png")
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text, encoding="utf-8-sig")
    return folder


def read(folder, **options):
    return load_source("auto", folder, dataset="triplets", modality="ct", options=options)


@pytest.mark.parametrize("name", ["train.jsonl", "annotations.json"])
def test_description_grounds_as_a_whole_to_its_region(tmp_path, name):
    records = [record(id="x", bbox=[4, 5, 20, 15], label="Liver tumor", modality="MRI", patient_id=7)]
    (example,) = read(write_triplets(tmp_path, *records, name=name))
    assert [(r.label, r.box.tolist()) for r in example.regions] == [("liver_tumor", [4, 5, 20, 15])]
    assert example.expressions == (Expression(TEXT, (0,)),)
    assert (example.caption, example.modality, example.patient_id) == (TEXT, "mri", hash_patient("7", "triplets"))
    assert detect_source(tmp_path) == detect_source(tmp_path / name) == "triplets"


@settings(max_examples=15)
@given(st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.51, 1)] * 2))
def test_shares_and_extents_are_other_ways_to_say_the_same_box(tmp_path_factory, box):
    folder = tmp_path_factory.mktemp("boxes")
    x0, y0, x1, y1 = box
    pixels = [x0 * 40, y0 * 20, x1 * 40, y1 * 20]
    extents = [*pixels[:2], pixels[2] - pixels[0], pixels[3] - pixels[1]]
    for numbers, options in ((box, {}), (pixels, {}), (extents, {"box_format": "xywh"})):
        (example,) = read(write_triplets(folder, record(roi=numbers)), **options)
        np.testing.assert_allclose(example.regions[0].box, pixels, rtol=1e-5, atol=1e-5)


def test_described_regions_of_a_record_and_records_of_an_image_are_one_example(tmp_path):
    parts = [
        {"box": [1, 1, 9, 9], "category": "cyst", "description": "a round cyst"},
        {"box": [[1, 1, 9, 9], [20, 1, 29, 9]], "category": "cyst", "description": "two cysts"},
        {"box": [[1, 1, 9, 9], [1, 1, 9, 9]], "category": "cyst", "description": "one cyst, written twice"},
    ]
    records = [record(caption="An axial slice", regions=parts), record(caption="bright", bbox=[0, 0, 4, 4])]
    (example,) = read(write_triplets(tmp_path, *records))
    assert [(r.label, r.box.tolist()) for r in example.regions] == [
        ("cyst", [1, 1, 9, 9]),
        ("cyst", [20, 1, 29, 9]),
        ("region of interest", [0, 0, 4, 4]),
    ]
    assert example.caption == "An axial slice bright"
    assert example.expressions == (
        Expression("a round cyst", (0,)),
        Expression("two cysts", (0, 1)),
        Expression("one cyst, written twice", (0,)),
        Expression("bright", (2,)),
    )


def test_text_without_a_region_is_the_caption_and_grounds_to_nothing_that_could_be_learnt(tmp_path):
    first, second = read(
        write_triplets(tmp_path, record(bbox=[1, 1, 5, 5]), record("b.png", "A mass"), images=("a", "b"))
    )
    assert first.expressions
    assert (second.caption, second.regions, second.expressions) == ("A mass", (), ())


def test_masks_as_files_polygons_and_run_lengths(tmp_path):
    write_triplets(tmp_path)
    mask = np.zeros((20, 40), np.uint8)
    mask[5:10, 10:30] = 1
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask * 255).save(tmp_path / "masks/a_roi.png")
    encoded = coco_mask.encode(np.asfortranarray(mask))
    run_lengths = {"size": [20, 40], "counts": encoded["counts"].decode()}
    forms = ["masks/a_roi.png", run_lengths, [[10, 5, 30, 5, 30, 10, 10, 10]]]
    for form in forms:
        source = read(write_triplets(tmp_path, record(mask=form)))
        (region,) = source[0].regions
        assert region.box.tolist() == [10, 5, 30, 10]
        assert (coco_mask.decode(region.mask) == mask).all()
    assert source.unused == [str(tmp_path / "masks/a_roi.png")]
    assert read(write_triplets(tmp_path, record(mask=forms[0]))).unused == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (record(bbox=[1, 2, 3]), "line 2: a box is four finite numbers"),
        (record(bbox=[1, 2, 3, "4"]), "line 2: a box is four finite numbers"),
        (record(bbox=[1, 2, 3, float("nan")]), "line 2: a box is four finite numbers"),
        (record(mask="masks/no.png"), "line 2: there is no image masks/no"),
        (record(regions=["x"]), "line 2, region 0: expected an object"),
        (record(regions=[{"label": "cyst"}]), "line 2, region 0: has no region"),
        (record(caption=["x"], bbox=[1, 1, 5, 5]), "line 2: its description is"),
        (record(bbox=[1, 1, 5, 5], patient_id=2), "is of several patients"),
    ],
)
def test_bad_record_is_an_error_that_names_file_and_line(tmp_path, entry, message):
    source = read(write_triplets(tmp_path, record(bbox=[1, 1, 5, 5], patient_id=1), entry))
    with pytest.raises(SourceError, match=message):
        source[0]


def test_unreadable_files_are_errors(tmp_path):
    write_triplets(tmp_path, record(bbox=[1, 1, 5, 5]), {"caption": "x"})
    with pytest.raises(SourceError, match="line 2: names no image"):
        read(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(record(bbox=[1, 1, 5, 5])) + "\n[1]\n")
    with pytest.raises(SourceError, match="line 2: expected an object"):
        read(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps(record(bbox=[1, 1, 5, 5])) + "\n{\n")
    with pytest.raises(SourceError, match=r"train.jsonl, line 2: no valid JSON"):
        read(tmp_path)
    write_triplets(tmp_path, record(bbox=[1, 1, 5, 5]), name="more.json")
    with pytest.raises(SourceError, match=r"several: .*more.json"):
        read(tmp_path)
    with pytest.raises(SourceError, match="expected xyxy or xywh, found 'cxcywh'"):
        load_source("triplets", tmp_path / "more.json", dataset="triplets", options={"box_format": "cxcywh"})
