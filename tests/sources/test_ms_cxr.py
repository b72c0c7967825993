import csv
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.schema import Expression
from data_pipelines.sources import detect_source, load_source

COLUMNS = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height"]
PATH = "files/p10/p10000032/s50414267/{}.jpg"
SIZE = (100, 80)  # width and height that boxes were drawn on


def row(image="a1-b2", name="Pneumothorax", text="Small left apical pneumothorax", box=(10, 20, 30, 40), size=SIZE):
    return dict(zip(COLUMNS, (image, name, text, PATH.format(image), *box, *size), strict=True))


def write_images(folder: pathlib.Path, ids, size=SIZE, path=PATH):
    for image_id in filter(None, ids):
        file = folder / path.format(image_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size).save(file)


def write_ms_cxr(folder: pathlib.Path, *rows, size=SIZE, path=PATH, name="MS_CXR_Local_Alignment_v1.1.0.csv"):
    write_images(folder, {entry["dicom_id"] for entry in rows}, size, path)
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def as_json(*rows) -> dict:
    """MS-CXR's other file of the same content."""
    names, images = sorted({r["category_name"] for r in rows}), sorted({r["dicom_id"] for r in rows})
    return {
        "images": [
            {"id": i, "file_name": f"{each}.jpg", "path": PATH.format(each), "width": SIZE[0], "height": SIZE[1]}
            for i, each in enumerate(images)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {
                "id": i,
                "image_id": images.index(r["dicom_id"]),
                "category_id": names.index(r["category_name"]),
                "bbox": [r[key] for key in "xywh"],
                "label_text": r["label_text"],
            }
            for i, r in enumerate(rows)
        ],
    }


def read(folder, **options):
    return load_source("auto", folder, dataset="cxr", options=options)


THREE_BOXES = (
    row(),
    row(name="Edema", text="Mild edema, bilateral", box=(0, 0, 20, 20)),
    row(name="Edema", text="Mild edema, bilateral", box=(50, 0, 20, 20)),
    row(name="Edema", text="Edema on the left", box=(50, 0, 20, 20)),
)


def test_sentences_of_an_image_share_its_regions(tmp_path):
    (example,) = read(write_ms_cxr(tmp_path, *THREE_BOXES))
    assert [(r.label, r.source_label, r.box.tolist()) for r in example.regions] == [
        ("pneumothorax", "Pneumothorax", [10, 20, 40, 60]),
        ("pulmonary_edema", "Edema", [0, 0, 20, 20]),
        ("pulmonary_edema", "Edema", [50, 0, 70, 20]),
    ]
    assert example.expressions == (
        Expression("Small left apical pneumothorax", (0,)),
        Expression("Mild edema, bilateral", (1, 2)),
        Expression("Edema on the left", (2,)),
    )
    assert example.caption == "Small left apical pneumothorax Mild edema, bilateral Edema on the left"
    assert (example.image_id, example.patient_id) == ("a1-b2", hash_patient("10000032", "cxr"))
    assert (example.modality, example.absent) == ("xray", ())


def test_json_file_gives_the_same_examples(tmp_path):
    rows = (*THREE_BOXES, row("c3"))
    expected = [example.expressions for example in read(write_ms_cxr(tmp_path, *rows))]
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.json").write_text(json.dumps(as_json(*rows)))
    both = read(tmp_path)
    assert both.unused and "says the same" in both.unused[0]
    (tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv").unlink()
    assert detect_source(tmp_path) == "ms_cxr"
    assert [example.expressions for example in both] == expected
    assert [example.expressions for example in read(tmp_path)] == expected


@settings(max_examples=15)
@given(scale=st.floats(0.2, 2), box=st.tuples(*[st.integers(1, 40)] * 4))
def test_boxes_follow_a_resized_copy(tmp_path_factory, scale, box):
    size = (round(SIZE[0] * scale), round(SIZE[1] * scale))
    folder = tmp_path_factory.mktemp("scaled")
    (example,) = read(write_ms_cxr(folder, row(box=box), size=size), stretched=True)
    x, y, w, h = box
    share = example.regions[0].box / (size[0], size[1], size[0], size[1])
    np.testing.assert_allclose(share * (*SIZE, *SIZE), [x, y, x + w, y + h], rtol=1e-4)


def test_copy_of_another_shape_is_an_error_unless_it_is_said_to_be_stretched(tmp_path):
    folder = write_ms_cxr(tmp_path, row(), size=(50, 50))
    with pytest.raises(SourceError, match=r"line 2: the image is 50 x 50 pixels, its boxes were drawn on 100 x 80"):
        read(folder)[0]
    np.testing.assert_allclose(read(folder, stretched=True)[0].regions[0].box, [5, 12.5, 20, 37.5])


def test_image_is_found_by_its_id_where_its_path_is_another(tmp_path):
    source = read(write_ms_cxr(tmp_path, row(), row("c3"), path="resized/{}.png"))
    assert [example.image_id for example in source] == ["a1-b2", "c3"]
    assert source.unused == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": "left"}, "line 2: expected numbers x, y, w, h"),
        ({"x": "nan"}, "line 2: expected numbers x, y, w, h"),
        ({"label_text": ""}, "line 2: names no sentence"),
        ({"dicom_id": ""}, "line 2: names no image"),
        ({"category_name": ""}, "line 2: the class name '' has no words"),
    ],
)
def test_bad_row_is_an_error_that_names_file_and_line(tmp_path, change, message):
    folder = write_ms_cxr(tmp_path, {**row(), **change})
    with pytest.raises(SourceError, match=message):
        read(folder)[0]


def test_json_of_another_kind_and_missing_image_are_errors(tmp_path):
    content = as_json(row())
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match="annotation id 0: there is no image a1-b2"):
        read(tmp_path)[0]
    del content["annotations"][0]["bbox"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"not MS-CXR: .*'bbox'"):
        read(tmp_path)
    (tmp_path / "a.json").write_text('{"label_text')
    with pytest.raises(SourceError, match="expected MS-CXR's"):
        load_source("ms_cxr", tmp_path, dataset="cxr")


def test_two_files_of_a_kind_are_an_error(tmp_path):
    write_ms_cxr(tmp_path, row())
    write_ms_cxr(tmp_path, row(), name="other.csv")
    with pytest.raises(SourceError, match="several: "):
        read(tmp_path)
    assert len(read(tmp_path / "other.csv")) == 1
