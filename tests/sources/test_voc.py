import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.sources import load_source
from data_pipelines.sources.voc import half_open_box

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"
)


def write_voc(folder: pathlib.Path, objects: dict[str, list[tuple]], flat: bool = False, size=(20, 10)) -> pathlib.Path:
    """Writes one 20 x 10 image and XML file for each name; objects are (name, xmin, ymin, xmax, ymax)."""
    images, annotations = (folder, folder) if flat else (folder / "JPEGImages", folder / "Annotations")
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    for seed, (name, entries) in enumerate(objects.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (10, 20, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.jpg")
        (annotations / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
            + "".join(OBJECT.format(*entry) for entry in entries)
            + "</annotation>"
        )
    return folder


def read(folder: pathlib.Path):
    return load_source("voc", folder, dataset="smears", modality="microscopy")


@pytest.mark.parametrize("flat", [False, True])
def test_boxes_become_half_open_and_names_medical(tmp_path, flat):
    (example,) = read(write_voc(tmp_path, {"a": [("RBC", 1, 2, 5, 10), ("odd_cell (x)", 20, 10, 30, 12)]}, flat=flat))
    cell, odd = example.regions
    np.testing.assert_array_equal(cell.box, [0, 1, 5, 10])
    assert (cell.phrase, cell.label, cell.granularity) == ("red blood cell", "red_blood_cell", "cell")
    np.testing.assert_array_equal(odd.box, [19, 9, 30, 12])
    assert (odd.phrase, odd.label) == ("odd cell", "odd_cell (x)")
    assert (example.image_id, example.dataset, example.modality) == ("a", "smears", "microscopy")
    assert (example.height, example.width) == (10, 20)


def test_coinciding_corners_have_no_area():
    x0, y0, x1, y1 = half_open_box(5, 5, 5, 5)
    assert x1 <= x0 and y1 <= y0


def test_jpeg_bytes_are_kept(tmp_path):
    write_voc(tmp_path, {"a": []})
    assert read(tmp_path)[0].image == (tmp_path / "JPEGImages" / "a.jpg").read_bytes()


def test_image_without_objects_is_an_example_and_without_xml_is_unused(tmp_path):
    write_voc(tmp_path, {"a": [], "b": [("RBC", 1, 1, 5, 5)]})
    (tmp_path / "Annotations" / "b.xml").unlink()
    source = read(tmp_path)
    assert [example.regions for example in source] == [()]
    assert source.unused == [str(tmp_path / "JPEGImages" / "b.jpg")]


def test_image_is_found_by_its_filename_element(tmp_path):
    write_voc(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "other.xml")
    assert read(tmp_path)[0].image_id == "other"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "Annotations/a.xml").write_text("<annotation>"), "no well-formed XML"),
        (lambda f: (f / "Annotations/a.xml").write_text("<kml/>"), "root is <kml>"),
        (lambda f: (f / "JPEGImages/a.jpg").rename(f / "JPEGImages/z.jpg"), "no image a"),
        (lambda f: write_voc(f, {"a": []}, size=(40, 20)), "40 x 20"),
        (lambda f: write_voc(f, {"a": [("RBC", "one", 1, 2, 2)]}), "<xmin> of <bndbox> is 'one'"),
        (lambda f: write_voc(f, {"a": [("(x)", 1, 1, 2, 2)]}), "has no words"),
        (lambda f: (f / "JPEGImages/a.jpg").write_bytes((f / "JPEGImages/a.jpg").read_bytes()[:-60]), "truncated"),
    ],
)
def test_bad_input_is_an_error_that_names_the_file(tmp_path, break_it, message):
    write_voc(tmp_path, {"a": [("RBC", 1, 1, 5, 5)]})
    break_it(tmp_path)
    with pytest.raises(SourceError, match=message) as error:
        read(tmp_path)[0]
    assert "a.xml" in str(error.value) or "a.jpg" in str(error.value)


def test_folder_without_images_or_annotations_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="is empty"):
        read(tmp_path)
    (tmp_path / "a.xml").write_text("<annotation/>")
    with pytest.raises(SourceError, match="no images"):
        read(tmp_path)
