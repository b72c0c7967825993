import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.sources import detect_source, load_source

SIZE = (16, 24)
TWO = np.zeros(SIZE, np.uint8)
TWO[1:4, 2:6] = TWO[9:14, 15:21] = 255  # two components
BOXES = [[2, 1, 6, 4], [15, 9, 21, 14]]


def save(path, values=TWO, mode="L", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).save(path, **options)
    return path


def write_pairs(folder, *names, mask="masks/{}.png", values=TWO, **options):
    for name in names or ("a",):
        save(folder / f"images/{name}.png", np.full((*SIZE, 3), 7, np.uint8), "RGB")
        save(folder / mask.format(name), values, **options)
    return folder


OPTIONS = {"images": "images/{id}.png", "masks": {"polyp": "masks/{id}.png"}}


def read(folder, **options):
    return load_source("paired_masks", folder, dataset="d", modality="endoscopy", options={**OPTIONS, **options})


def boxes(example):
    return [(region.label, region.box.tolist()) for region in example.regions]


def test_mask_of_a_class_is_a_region_for_each_lesion(tmp_path):
    (example,) = read(write_pairs(tmp_path))
    assert boxes(example) == [("polyp", box) for box in BOXES]
    assert (example.image_id, example.modality, example.patient_id, example.dataset) == ("a", "endoscopy", "", "d")
    assert (example.height, example.width) == SIZE
    masks = [coco_mask.decode(region.mask) for region in example.regions]
    np.testing.assert_array_equal(masks[0] | masks[1], TWO // 255)


def test_component_or_whole_file_is_the_region_as_the_class_or_the_option_says(tmp_path):
    write_pairs(tmp_path)
    whole = [2, 1, 21, 14]
    organ = {"masks": {"colon": "masks/{id}.png"}}
    assert boxes(read(tmp_path, **organ)[0]) == [("colon", whole)]
    assert boxes(read(tmp_path, **organ, regions="component")[0]) == [("colon", box) for box in BOXES]
    assert boxes(read(tmp_path, regions="label")[0]) == [("polyp", whole)]


def test_jpeg_masks_count_from_the_threshold_on(tmp_path):
    smooth = np.asarray(Image.fromarray(TWO).resize((240, 160), Image.Resampling.BICUBIC))
    save(tmp_path / "images/a.jpg", np.zeros((160, 240), np.uint8))
    save(tmp_path / "masks/a.jpg", smooth, quality=60)
    options = {"images": "images/{id}.jpg", "masks": {"polyp": "masks/{id}.jpg"}}
    assert len(read(tmp_path, **options)[0].regions) != 2 or boxes(read(tmp_path, **options)[0])[0][1] != [
        20,
        10,
        60,
        40,
    ]
    found = boxes(read(tmp_path, **options, threshold=128)[0])
    np.testing.assert_allclose([box for _, box in found], np.asarray(BOXES) * 10, atol=1)


@given(st.integers(2, 255), st.integers(0, 255))
def test_threshold_is_the_least_value_that_counts(tmp_path_factory, threshold, value):
    folder = write_pairs(tmp_path_factory.mktemp("t"), values=np.where(TWO, np.uint8(value), np.uint8(0)))
    assert len(read(folder, threshold=threshold)[0].regions) == (2 if value >= threshold else 0)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("1", "png"), ("L", "gif"), ("P", "gif"), ("RGB", "tif"), ("RGBA", "tif")]
)
@pytest.mark.parametrize("threshold", [1, 128])
def test_masks_of_every_kind_are_what_is_not_black(tmp_path, mode, suffix, threshold):
    write_pairs(tmp_path, mask=f"masks/{{}}.{suffix}", mode=mode)
    masks = {"polyp": f"masks/{{id}}.{suffix}"}
    assert boxes(read(tmp_path, masks=masks, threshold=threshold)[0]) == [("polyp", box) for box in BOXES]


def test_mask_of_several_pictures_is_refused(tmp_path):
    write_pairs(tmp_path)
    frame = Image.fromarray(TWO)
    frame.save(tmp_path / "masks/a.gif", save_all=True, append_images=[Image.fromarray(255 - TWO)])
    with pytest.raises(SourceError, match=r"a\.gif: holds several pictures"):
        read(tmp_path, masks={"polyp": "masks/{id}.gif"})[0]


def test_class_is_in_the_name_of_the_mask_or_of_the_image(tmp_path):
    save(tmp_path / "liver/a.png")
    save(tmp_path / "liver/a_mask.png")
    save(tmp_path / "spleen/b.png")
    save(tmp_path / "spleen/b_mask.png")
    options = {"images": "{class}/{id}.png", "masks": "{class}/{id}_mask.png"}
    assert [example.regions[0].label for example in read(tmp_path, **options)] == ["liver", "spleen"]
    assert [example.image_id for example in read(tmp_path, **options)] == ["liver/a", "spleen/b"]
    options["masks"] = "*/{id}_mask.png"
    assert [example.regions[0].label for example in read(tmp_path, **options)] == ["liver", "spleen"]
    options = {"images": "*/{id:?}.png", "masks": "{class}/{id}_*.png"}
    assert [example.regions[0].label for example in read(tmp_path, **options)] == ["liver", "spleen"]


def test_several_patterns_are_all_read(tmp_path):
    write_pairs(tmp_path)
    save(tmp_path / "more/a_stomach.png")
    masks = {"polyp": "masks/{id}.png", "colon": "more/{id}_stomach.png"}
    assert [region.label for region in read(tmp_path, masks=masks)[0].regions] == ["polyp", "polyp", "colon"]
    listed = ["{class:m*}/{id}.png", "more/{id}_{class}.png"]
    assert [region.label for region in read(tmp_path, masks=listed)[0].regions] == ["masks", "stomach"]


def test_empty_mask_is_an_image_without_regions_and_no_mask_is_unused(tmp_path):
    write_pairs(tmp_path, "a", "b", values=np.zeros_like(TWO))
    (tmp_path / "masks/b.png").unlink()
    source = read(tmp_path)
    assert [(example.image_id, example.regions) for example in source] == [("a", ())]
    assert source.unused == [str(tmp_path / "images/b.png")]


@pytest.mark.parametrize("values", [{1: "polyp", 2: "colon"}, {"polyp": 1, "colon": 2}, {"1": "polyp", "2": "colon"}])
def test_values_name_the_labels_of_a_mask(tmp_path, values):
    mask = np.where(TWO, np.repeat([[1] * 12 + [2] * 12], 16, 0), 0).astype(np.uint8)
    write_pairs(tmp_path, values=mask)
    assert boxes(read(tmp_path, masks="masks/{id}.png", values=values)[0]) == [
        ("polyp", BOXES[0]),
        ("colon", BOXES[1]),
    ]
    with pytest.raises(SourceError, match=r"a\.png: the option values has no label 2"):
        read(tmp_path, masks="masks/{id}.png", values={1: "polyp"})[0]


def test_colours_are_values_too(tmp_path):
    write_pairs(tmp_path, values=np.dstack([TWO, TWO * 0, TWO * 0]), mode="RGB")
    (example,) = read(tmp_path, masks="masks/{id}.png", values={"polyp": [255, 0, 0]})
    assert boxes(example) == [("polyp", box) for box in BOXES]


def test_patient_is_a_word_of_the_name(tmp_path):
    save(tmp_path / "p1/1.png")
    save(tmp_path / "p1/1_mask.png")
    options = {"images": "{patient}/{id}.png", "masks": {"polyp": "{patient}/{id}_mask.png"}}
    (example,) = read(tmp_path, **options)
    assert (example.image_id, example.patient_id) == ("p1/1", hash_patient("p1", "d"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ""}, "the options images and masks must be patterns"),
        ({"masks": {}}, "the options images and masks must be patterns"),
        ({"masks": {"polyp": 3}}, "the options images and masks must be patterns"),
        ({"masks": "masks/{id}.png"}, r"masks/a\.png: nothing says what it shows: write \{class\} into the pattern"),
        ({"regions": "both"}, "regions is component or label"),
        ({"threshold": 0}, "threshold 1 and more"),
        ({"values": {"polyp": "x"}}, "option values, label 1: expected 'name', 'id' or a colour"),
        ({"values": {1: 2}}, "option values, label 1: expected 'name'"),
        ({"value": {1: "x"}}, "did you mean 'values'"),
        ({"images": "a/{id}.png"}, r"no file is named 'a/\{id\}\.png'"),
    ],
)
def test_options_that_cannot_be_used_are_errors_that_say_what_is_expected(tmp_path, options, message):
    with pytest.raises(SourceError, match=message):
        read(write_pairs(tmp_path), **options)


def test_mask_of_another_size_is_an_error_that_names_it(tmp_path):
    write_pairs(tmp_path, values=TWO[:9])
    with pytest.raises(SourceError, match=r"a\.png: the mask is 24 x 9 pixels, its image 24 x 16"):
        read(tmp_path)[0]


def test_folder_alone_is_not_taken_for_it_and_the_error_of_the_other_layout_names_it(tmp_path):
    write_pairs(tmp_path)
    assert detect_source(tmp_path) == "masks"
    with pytest.raises(SourceError, match="the source paired_masks"):
        load_source("auto", tmp_path, dataset="d")
