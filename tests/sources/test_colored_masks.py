import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, curate
from data_pipelines.sources import detect_source, load_source

# Of one label two parts, of which the second touches a third by a corner only; and a label of one part.
VALUES = np.zeros((10, 20), np.uint8)
VALUES[1:3, 1:4] = VALUES[5:7, 10:12] = VALUES[7:9, 12:14] = 1
VALUES[0:2, 15:20] = 2
RED, BLUE = [255, 0, 0], [0, 0, 255]
COLOURS = np.asarray([[0, 0, 0], RED, BLUE], np.uint8)[VALUES]


def write_colored(folder, table, mask=VALUES, table_file="labels.json", masks="masks", mask_name="a"):
    for place in ("images", masks):
        (folder / place).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 20, 3), 7, np.uint8)).save(folder / "images/a.png")
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(folder / masks / f"{mask_name}.png")
    (folder / table_file).write_text(table if isinstance(table, str) else json.dumps(table))
    return folder


def read(folder):
    return load_source("auto", folder, dataset="colon", modality="endoscopy")


def boxes(example):
    return [(region.label, region.box.tolist()) for region in example.regions]


POLYPS = [("polyp", [1, 1, 4, 3]), ("polyp", [10, 5, 14, 9])]
COLON = [("colon", [15, 0, 20, 2])]


@pytest.mark.parametrize(
    ("table_file", "table", "mask"),
    [
        ("labels.json", {"0": "background", "1": "polyp", "2": "colon"}, VALUES),
        ("labels.json", {"polyp": 1, "colon": 2}, VALUES),
        ("labels.json", [{"id": 1, "name": "polyp"}, {"id": 2, "name": "colon"}], VALUES.astype(np.uint16)),
        ("labels.json", {"polyp": RED, "colon": "#0000ff"}, COLOURS),
        ("labels.json", [{"color": RED, "name": "polyp"}, {"color": BLUE, "name": "colon"}], COLOURS),
        ("classes.csv", "id,name\n1,polyp\n2,colon\n", np.dstack([VALUES] * 3)),
        ("classes.csv", "Name, R, G, B\nvoid,0,0,0\npolyp,255,0,0\ncolon,0,0,255\n", COLOURS),
        ("label_colors.txt", "# r g b name\n255 0 0\tpolyp\n0 0 255 colon\n", COLOURS),
        ("label_colors.txt", "1 polyp\n2: colon\n", VALUES),
    ],
)
def test_tables_and_masks_of_every_kind_give_the_same_regions(tmp_path, table_file, table, mask):
    (example,) = read(write_colored(tmp_path, table, mask, table_file))
    assert boxes(example) == POLYPS + COLON
    assert (example.image_id, example.modality) == ("a", "endoscopy")


@pytest.mark.parametrize(
    ("table", "colours"), [({"1": "polyp", "2": "colon"}, False), ({"polyp": RED, "colon": BLUE}, True)]
)
def test_palette_images_have_indices_and_colours(tmp_path, table, colours):
    image = Image.fromarray(VALUES, "P")
    image.putpalette([0, 0, 0, *RED, *BLUE])
    assert boxes(read(write_colored(tmp_path, table, image))[0]) == POLYPS + COLON


def test_masks_of_the_regions_are_their_pixels(tmp_path):
    (example,) = read(write_colored(tmp_path, {"1": "polyp", "2": "colon"}))
    first, second, colon = (coco_mask.decode(region.mask).astype(bool) for region in example.regions)
    np.testing.assert_array_equal(first | second, VALUES == 1)
    np.testing.assert_array_equal(colon, VALUES == 2)


@pytest.mark.parametrize(
    ("regions", "expected"), [("component", POLYPS), ("label", [("polyp", [1, 1, 14, 9])]), (None, POLYPS)]
)
def test_table_says_whether_a_component_or_the_label_is_a_region(tmp_path, regions, expected):
    table = [{"id": 1, "name": "polyp", "regions": regions}, {"id": 2, "name": "ignore"}]
    assert boxes(read(write_colored(tmp_path, table))[0]) == expected


def test_organ_in_two_parts_is_one_region_unless_the_table_says_otherwise(tmp_path):
    assert boxes(read(write_colored(tmp_path, {"1": "colon", "2": "void"}))[0]) == [("colon", [1, 1, 14, 9])]
    csv = "id,name,regions\n1,colon,component\n2,void,\n"
    (tmp_path / "labels.json").unlink()
    assert len(read(write_colored(tmp_path, csv, table_file="classes.csv"))[0].regions) == 2


def test_specks_are_dropped_and_counted_by_curation(tmp_path):
    mask = VALUES.copy()
    mask[9, 0:3] = 1
    (example,) = read(write_colored(tmp_path, {"1": "polyp", "2": "colon"}, mask))
    kept, tally = curate(example)
    assert len(example.regions) == 4
    assert boxes(kept) == POLYPS + COLON
    assert tally.dropped == {"mask under 4 pixels": 1}


@pytest.mark.parametrize(
    ("masks", "name"), [("labels", "a"), ("annotations", "a"), ("masks", "a_mask"), ("masks", "a_L")]
)
def test_masks_are_found_in_other_folders_and_with_endings(tmp_path, masks, name):
    assert len(read(write_colored(tmp_path, {"1": "polyp", "2": "void"}, masks=masks, mask_name=name))[0].regions) == 2


def test_empty_mask_is_an_image_without_regions_and_no_mask_is_unused(tmp_path):
    write_colored(tmp_path, {"1": "polyp"}, np.zeros_like(VALUES))
    (tmp_path / "images/b.png").write_bytes((tmp_path / "images/a.png").read_bytes())
    source = read(tmp_path)
    assert [example.regions for example in source] == [()]
    assert source.unused == [str(tmp_path / "images/b.png")]


@pytest.mark.parametrize(
    ("table", "mask", "message"),
    [
        ({"1": "polyp"}, VALUES, r"a.png: .*labels.json has no label 2"),
        ({"polyp": RED}, COLOURS, r"a.png: .*labels.json has no label \[0, 0, 255\]"),
        ({"1": "polyp"}, COLOURS, r"a.png: the mask has colours, its table of labels numbers"),
        ({"1": "polyp"}, VALUES[:9], r"a.png: the mask is 20 x 9 pixels, its image 20 x 10"),
    ],
)
def test_bad_mask_is_an_error_that_names_it(tmp_path, table, mask, message):
    with pytest.raises(SourceError, match=message):
        read(write_colored(tmp_path, table, mask))[0]


@pytest.mark.parametrize(
    ("table_file", "table", "message"),
    [
        ("labels.json", "[", r"labels.json: no valid JSON"),
        ("labels.json", "3", "expected a list of labels"),
        ("labels.json", "{}", "names no labels"),
        ("labels.json", [{"name": "polyp"}], "label 1: expected 'name', 'id' or a colour"),
        ("labels.json", [{"id": 1}], "label 1: expected 'name'"),
        ("labels.json", [{"id": 1, "name": "polyp", "regions": "all"}], "'regions': component or label"),
        ("labels.json", [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "'b' and 'a' have the same value"),
        ("labels.json", {"1": "a", "b": RED}, "has both ids and colours"),
        ("labels.json", {"polyp": [256, 0, 0]}, "label 1: expected"),
        ("labels.json", {"1": "(x)"}, "label 1: the class name '.x.' has no words"),
        ("classes.csv", "id,name\n1,polyp\nx,colon", "classes.csv, line 3: expected"),
        ("label_colors.txt", "1 polyp\npolyp 2", "label_colors.txt, line 2: expected 'r g b name' or 'id name'"),
    ],
)
def test_bad_table_is_an_error_that_names_the_place(tmp_path, table_file, table, message):
    with pytest.raises(SourceError, match=message):
        read(write_colored(tmp_path, table, table_file=table_file))


def test_missing_image_and_two_masks_of_one_image_are_errors(tmp_path):
    write_colored(tmp_path, {"1": "polyp"})
    (tmp_path / "images/a.png").rename(tmp_path / "images/b.png")
    with pytest.raises(SourceError, match=r"a.png: there is no image a"):
        read(tmp_path)[0]
    write_colored(tmp_path, {"1": "polyp"}, mask_name="a_mask")
    with pytest.raises(SourceError, match=r"has several masks: .*a\.png, .*a_mask\.png"):
        read(tmp_path)[0]


def test_missing_table_and_empty_folders_are_errors(tmp_path):
    write_colored(tmp_path, {"1": "polyp"})
    (tmp_path / "labels.json").unlink()
    with pytest.raises(SourceError, match=r"the labels have no names: expected labels.json"):
        load_source("colored_masks", tmp_path, dataset="colon")
    (tmp_path / "masks/a.png").unlink()
    with pytest.raises(SourceError, match="expected images/ and masks/"):
        load_source("colored_masks", tmp_path, dataset="colon")


def test_without_a_table_the_folder_is_one_of_masks_with_phrases(tmp_path):
    write_colored(tmp_path, {"1": "polyp"}, mask_name="a_polyp")
    assert detect_source(tmp_path) == "colored_masks"
    (tmp_path / "labels.json").unlink()
    assert detect_source(tmp_path) == "masks"
