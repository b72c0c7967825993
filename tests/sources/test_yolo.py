import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError
from data_pipelines.sources import load_source
from data_pipelines.sources.yolo import absolute_box

NAMES = "names:\n  0: RBC\n  1: no\n"


def write_yolo(folder, labels, images="images", texts="labels", names=NAMES, names_file="data.yaml"):
    """Writes one 20 x 10 image for each name in labels, and a text file where its text is not None."""
    for name, text in labels.items():
        for place in (images, texts):
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(folder / images / f"{name}.png")
        if text is not None:
            (folder / texts / f"{name}.txt").write_text(text)
    (folder / names_file).write_text(names)
    return folder


def read(folder):
    return load_source("auto", folder, dataset="smears", modality="microscopy")


@pytest.mark.parametrize(
    ("names", "names_file"),
    [
        (NAMES, "data.yaml"),
        ("names: [RBC, no]", "dataset.yaml"),
        ("RBC\nno\n", "classes.txt"),
        ("RBC\nno\n", "labels/classes.txt"),
    ],
)
def test_boxes_become_pixels_and_classes_names(tmp_path, names, names_file):
    (example,) = read(
        write_yolo(tmp_path, {"a": "0 0.5 0.5 0.2 0.4\n\n1 1 1 0.5 0.5\n"}, names=names, names_file=names_file)
    )
    cell, other = example.regions
    np.testing.assert_allclose(cell.box, [8, 3, 12, 7])
    np.testing.assert_allclose(other.box, [15, 7.5, 25, 12.5])
    assert (cell.phrase, cell.granularity, cell.mask) == ("red blood cell", "cell", None)
    assert other.phrase == "no"  # which YAML would read as False
    assert (example.image_id, example.dataset, example.modality) == ("a", "smears", "microscopy")
    assert (example.height, example.width) == (10, 20)


def test_polygons_become_masks(tmp_path):
    (example,) = read(write_yolo(tmp_path, {"a": "0 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8"}))
    (region,) = example.regions
    np.testing.assert_allclose(region.box, [2, 2, 10, 8])
    expected = np.zeros((10, 20), np.uint8)
    expected[2:8, 2:10] = 1
    np.testing.assert_array_equal(coco_mask.decode(region.mask), expected)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_relative_boxes_round_trip(height, width, corners):
    x0, x1 = sorted(corners[:2])
    y0, y1 = sorted(corners[2:])
    box = absolute_box((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, (height, width))
    np.testing.assert_allclose(box, np.asarray([x0, y0, x1, y1]) * [width, height, width, height], atol=1e-3)


@pytest.mark.parametrize(
    ("images", "labels"),
    [("images/train", "labels/train"), ("train/images", "train/labels")],
    ids=["inside", "outside"],
)
def test_both_folder_orders_give_the_same_ids(tmp_path, images, labels):
    source = read(write_yolo(tmp_path, {"a": "0 0.5 0.5 1 1", "b": ""}, images, labels))
    assert [(example.image_id, len(example.regions)) for example in source] == [("train/a", 1), ("train/b", 0)]


def test_missing_text_is_an_image_without_boxes_where_a_data_yaml_says_so(tmp_path):
    write_yolo(tmp_path, {"train/a": "0 0.5 0.5 1 1", "train/b": None, "test/c": None})
    source = read(tmp_path)
    assert [(example.image_id, len(example.regions)) for example in source] == [("train/a", 1), ("train/b", 0)]
    assert source.unused == [str(tmp_path / "images/test/c.png")]
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("RBC")
    source = read(tmp_path)
    assert [example.image_id for example in source] == ["train/a"]
    assert source.unused == [str(tmp_path / "images" / name) for name in ("test/c.png", "train/b.png")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 1 1", "class 2 has no name in .*data.yaml"),
        ("-1 0.5 0.5 1 1", "class -1 has no name"),
        ("0 0.5 0.5 1", "is neither 'class cx cy width height' nor"),
        ("0 0.5 0.5 1 1 0.9", "is neither"),
        ("RBC 0.5 0.5 1 1", "is neither"),
        ("0.5 0.5 0.5 1 1", "is neither"),
        ("0 10 5 4 4", "relative to the image's size"),
        ("0 nan 0.5 1 1", "relative to the image's size"),
    ],
)
def test_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, message):
    write_yolo(tmp_path, {"a": f"0 0.5 0.5 1 1\n{line}\n"})
    with pytest.raises(SourceError, match=f"a.txt, line 2: .*{message}"):
        read(tmp_path)[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [("nc: 2", "data.yaml: expected 'names'"), ("names: 3", "expected 'names'"), ("names: [", "no valid YAML")],
)
def test_bad_names_are_an_error(tmp_path, names, message):
    with pytest.raises(SourceError, match=message):
        read(write_yolo(tmp_path, {"a": ""}, names=names))


def test_missing_names_are_an_error(tmp_path):
    (write_yolo(tmp_path, {"a": ""}) / "data.yaml").unlink()
    with pytest.raises(SourceError, match=r"the classes have no names: expected data.yaml"):
        read(tmp_path)


def test_missing_image_is_an_error(tmp_path):
    (write_yolo(tmp_path, {"a": ""}) / "images/a.png").unlink()
    with pytest.raises(SourceError, match=r"a.txt: there is no image a"):
        read(tmp_path)[0]


def test_folder_without_labels_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match="expected images/ and labels/"):
        load_source("yolo", tmp_path, dataset="smears")


def test_export_of_label_studio_is_no_coco(tmp_path):
    write_yolo(tmp_path, {"a": ""}, names="RBC", names_file="classes.txt")
    (tmp_path / "notes.json").write_text('{"categories": [{"id": 0, "name": "RBC"}], "info": {}}')
    assert len(read(tmp_path)) == 1
