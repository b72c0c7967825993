import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError
from data_pipelines.sources import load_source
from tests.sources.test_nifti import pixels_of

OPTIONS = {
    "images": "Fold {id}/images/fold{id}/images.npy",
    "masks": "Fold {id}/masks/fold{id}/masks.npy",
    "types": "Fold {id}/images/fold{id}/types.npy",
    "channels": ["Neoplastic cells", "Dead", "Background"],
}
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 10, 3)).astype(np.float64)
MASKS = np.zeros((2, 8, 10, 3))
MASKS[0, 1:3, 1:4, 0], MASKS[0, 4:6, 5:9, 0], MASKS[0, 1:2, 8:10, 1] = 7, 12, 3
MASKS[..., 2] = 1


def write_arrays(folder, fold="1", images=IMAGES, masks=MASKS, types=("Breast", "Bile-duct")):
    for place in ("images", "masks"):
        (folder / f"Fold {fold}/{place}/fold{fold}").mkdir(parents=True, exist_ok=True)
    np.save(folder / f"Fold {fold}/images/fold{fold}/images.npy", images)
    np.save(folder / f"Fold {fold}/masks/fold{fold}/masks.npy", masks)
    if types is not None:
        np.save(folder / f"Fold {fold}/images/fold{fold}/types.npy", np.asarray(types), allow_pickle=True)
    return folder


def read(folder, **options):
    options = {key: value for key, value in {**OPTIONS, **options}.items() if value is not None}
    return load_source("arrays", folder, dataset="d", modality="histopathology", options=options)


def test_each_value_of_a_channel_is_an_instance_of_its_class(tmp_path):
    first, second = read(write_arrays(tmp_path))
    assert [(region.label, region.box.tolist()) for region in first.regions] == [
        ("neoplastic_cell", [1, 1, 4, 3]),
        ("neoplastic_cell", [5, 4, 9, 6]),
        ("dead_cell", [8, 1, 10, 2]),
    ]
    assert (first.image_id, first.caption, first.modality) == ("1/0", "Breast tissue", "histopathology")
    assert (second.image_id, second.caption, second.regions) == ("1/1", "Bile-duct tissue", ())
    np.testing.assert_array_equal(pixels_of(first), IMAGES[0])
    np.testing.assert_array_equal(coco_mask.decode(first.regions[1].mask), MASKS[0, ..., 0] == 12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, ">f8"])
def test_numbers_of_every_type_and_order_give_the_same_pictures(tmp_path, dtype):
    write_arrays(tmp_path, images=np.asfortranarray(IMAGES.astype(dtype)), masks=MASKS.astype(dtype))
    source = read(tmp_path)
    np.testing.assert_array_equal(pixels_of(source[1]), IMAGES[1])
    assert len(source[0].regions) == 3


def test_grey_images_have_no_channels(tmp_path):
    (first, _) = read(write_arrays(tmp_path, images=IMAGES[..., 0]))
    assert Image.fromarray(pixels_of(first)).mode == "L"


def test_folds_are_read_in_their_order(tmp_path):
    write_arrays(write_arrays(tmp_path, "2"), "1")
    assert [example.image_id for example in read(tmp_path)] == ["1/0", "1/1", "2/0", "2/1"]


def test_types_that_need_unpickling_are_counted_and_left_out(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    write_arrays(tmp_path, types=np.asarray([Bomb(), "x"], object))
    source = read(tmp_path)
    assert [example.caption for example in source] == ["", ""]
    assert list(source.notes.values()) == [1]
    for types in (["one"], [1.0, 2.0]):
        write_arrays(tmp_path, types=types)
        assert list(read(tmp_path).notes.values()) == [1]
    assert not read(write_arrays(tmp_path)).notes


def test_images_that_need_unpickling_are_never_read(tmp_path):
    write_arrays(tmp_path)
    np.save(tmp_path / "Fold 1/images/fold1/images.npy", np.asarray([{}], object), allow_pickle=True)
    with pytest.raises(SourceError, match=r"images\.npy: no \.npy file that can be read without unpickling"):
        read(tmp_path)[0]


def test_missing_types_and_no_types(tmp_path):
    write_arrays(tmp_path, types=None)
    assert read(tmp_path, types=None)[0].caption == ""
    with pytest.raises(SourceError, match=r"no file is named '.*types\.npy'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": MASKS[:1]}, r"masks\.npy: expected \[2, 8, 10, 3\] \(images, height.*found \[1, 8, 10, 3\]"),
        ({"masks": MASKS[..., :2]}, r"masks\.npy: expected \[2, 8, 10, 3\]"),
        ({"images": IMAGES[..., :2]}, r"images\.npy: expected images \[n, height, width, 3\], found \[2, 8, 10, 2\]"),
        ({"images": IMAGES.astype(str)}, "expected an array of numbers"),
        ({"images": IMAGES / 255}, r"images\.npy, image 0: its values go from 0 to 1, expected 0 to 255"),
        ({"images": IMAGES + 1}, "expected 0 to 255"),
        ({"images": IMAGES * np.nan}, "its values go from nan to nan"),
        ({"masks": np.where(MASKS, np.inf, 0)}, r"masks\.npy, image 0: channel 0 \(Neoplastic cells\) holds inf"),
    ],
)
def test_arrays_that_do_not_fit_are_errors_that_name_file_and_image(tmp_path, change, message):
    with np.errstate(invalid="ignore"):
        write_arrays(tmp_path, **change)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)[0]


def test_options_are_needed(tmp_path):
    with pytest.raises(SourceError, match="the options images and masks must be patterns"):
        read(write_arrays(tmp_path), channels=[])


def test_damaged_fold_is_one_item_that_raises(tmp_path):
    write_arrays(write_arrays(tmp_path, "1"), "2")
    path = tmp_path / "Fold 1/masks/fold1/masks.npy"
    path.write_bytes(path.read_bytes()[:300])
    source = read(tmp_path)
    with pytest.raises(SourceError, match=r"fold1/masks\.npy: no \.npy file"):
        source[0]
    assert [source[1].image_id, source[2].image_id] == ["2/0", "2/1"] and len(source) == 3
