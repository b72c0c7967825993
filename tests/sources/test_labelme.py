import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, curate
from data_pipelines.sources import load_source

SQUARE = [[2, 1], [6, 1], [6, 4], [2, 4]]


def shape(label="RBC", points=SQUARE, shape_type="polygon", **fields):
    return {"label": label, "points": points, "shape_type": shape_type, "group_id": None, **fields}


def write_labelme(folder, *shapes, image="a.png", **fields):
    folder.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.zeros((10, 20), np.uint8)).save(folder / image)
    content = {"version": "5.4.1", "shapes": shapes, "imagePath": image, "imageHeight": 10, "imageWidth": 20, **fields}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


def read(folder):
    return load_source("auto", folder, dataset="smears", modality="microscopy")


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((10, 20), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def test_polygon_becomes_box_and_mask(tmp_path):
    (example,) = read(write_labelme(tmp_path / "day1", shape()).parent)
    (region,) = example.regions
    np.testing.assert_array_equal(region.box, [2, 1, 6, 4])
    np.testing.assert_array_equal(coco_mask.decode(region.mask), rectangle(2, 1, 6, 4))
    assert (region.phrase, example.image_id, example.modality) == ("red blood cell", "day1/a", "microscopy")


def test_rectangle_is_a_box_whatever_the_order_of_its_corners(tmp_path):
    (region,) = read(write_labelme(tmp_path, shape(points=[[6, 1], [2, 4]], shape_type="rectangle")))[0].regions
    assert (region.box.tolist(), region.mask) == ([2, 1, 6, 4], None)


def test_circle_is_centre_and_a_point_on_it(tmp_path):
    (region,) = read(write_labelme(tmp_path, shape(points=[[10, 5], [10, 9]], shape_type="circle")))[0].regions
    np.testing.assert_array_equal(region.box, [6, 1, 14, 9])
    assert np.pi * 16 * 0.9 < coco_mask.area(region.mask) < np.pi * 16 * 1.1


def painted_mask():
    stream = io.BytesIO()
    Image.fromarray(np.ones((3, 4), bool)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_painted_mask_is_placed_between_its_corners(tmp_path):
    (region,) = read(write_labelme(tmp_path, shape(points=[[2, 1], [5, 3]], shape_type="mask", mask=painted_mask())))[
        0
    ].regions
    np.testing.assert_array_equal(region.box, [2, 1, 6, 4])
    np.testing.assert_array_equal(coco_mask.decode(region.mask), rectangle(2, 1, 6, 4))


def test_shapes_of_a_group_are_one_region(tmp_path):
    other = shape(points=[[10, 5], [14, 8]], shape_type="rectangle", group_id=1)
    spot = shape(points=[[19, 9]], shape_type="point", group_id=1)
    alone = shape(label="WBC", group_id=1)
    joined, single = read(write_labelme(tmp_path, shape(group_id=1), other, alone, spot))[0].regions
    np.testing.assert_array_equal(joined.box, [2, 1, 14, 8])
    np.testing.assert_array_equal(coco_mask.decode(joined.mask), rectangle(2, 1, 6, 4) | rectangle(10, 5, 14, 8))
    assert single.phrase == "white blood cell"


@pytest.mark.parametrize("kind", ["point", "line", "linestrip"])
def test_shapes_without_area_are_dropped_and_counted(tmp_path, kind):
    (example,) = read(write_labelme(tmp_path, shape(points=SQUARE[: 1 if kind == "point" else 2], shape_type=kind)))
    kept, tally = curate(example)
    assert (kept.regions, tally.dropped) == ((), {"no area": 1})


def test_image_is_found_by_image_path_and_without_shapes_is_an_example(tmp_path):
    write_labelme(tmp_path / "json", imagePath="..\\pictures\\b.png")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "json/a.png").rename(tmp_path / "pictures/b.png")
    (example,) = read(tmp_path)
    assert (example.image_id, example.regions) == ("json/a", ())


def test_image_without_file_is_unused(tmp_path):
    write_labelme(tmp_path)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert read(tmp_path).unused == [str(tmp_path / "b.png")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (shape(points=[[1, 1], [2, 2]]), "a 'polygon' of 2 points cannot be read"),
        (shape(points=[]), r"'points' of 'RBC' must be \[\[x, y\], ...\]"),
        (shape(points=[[1, "x"]] * 3), "'points' of 'RBC' must be"),
        (shape(shape_type="spiral"), "a 'spiral' of 4 points"),
        (shape(shape_type="mask", mask="?"), "its mask cannot be read"),
        (shape(shape_type="mask", mask="aGVsbG8="), "its mask cannot be read"),
        (shape(points=[[-5, 1], [-2, 3]], shape_type="mask", mask=painted_mask()), "leaves the image .it starts at -5"),
        (shape(label=None), "expected 'label'"),
        (shape(label="(x)"), "has no words"),
        (3, "expected 'label'"),
    ],
)
def test_bad_shape_is_an_error_that_names_it(tmp_path, entry, message):
    write_labelme(tmp_path, shape(), entry)
    with pytest.raises(SourceError, match=f"a.json, shape 2: .*{message}"):
        read(tmp_path)[0]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "a.json").write_text('{"shapes": ['), r"a.json: no valid JSON"),
        (lambda f: (f / "a.json").write_text('{"shapes": null}'), r"a.json: not LabelMe's"),
        (lambda f: (f / "a.png").unlink(), r"a.json: there is no image a\.\*"),
        (
            lambda f: write_labelme(f, imageHeight=99),
            r"a.png: the image is 20 x 10 pixels, its annotation says 20 x 99",
        ),
    ],
)
def test_bad_file_is_an_error_that_names_it(tmp_path, break_it, message):
    write_labelme(tmp_path)
    break_it(tmp_path)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)[0]


def test_folder_without_files_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SourceError, match=r"no \.json files with 'shapes'"):
        load_source("labelme", tmp_path, dataset="smears")
