import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as nps
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, box_from_mask
from data_pipelines.sources import load_source
from data_pipelines.sources.masks import outline


def write_masks(folder, image: str, masks: dict[str, np.ndarray], size=(8, 12)):
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.full((*size, 4), 255, np.uint8)).save(folder / "images" / f"{image}.png")
    for phrase, mask in masks.items():
        rgba = np.zeros((*mask.shape, 4), np.uint8)
        rgba[mask, 2], rgba[..., 3] = 1, 255  # barely blue; opaque everywhere
        Image.fromarray(rgba).save(folder / "masks" / f"{image}_{phrase}.png")
    return folder


def rectangle(y0, x0, y1, x1, size=(8, 12)):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def read(folder):
    return load_source("masks", folder, dataset="masks", modality="ct")


def test_a_mask_file_is_a_region_with_tight_box_and_mask(tmp_path):
    mask = rectangle(1, 2, 4, 3) | rectangle(6, 9, 8, 12)
    (example,) = read(write_masks(tmp_path, "07_X-Ray_chest", {"left+lung": mask}))
    (region,) = example.regions
    np.testing.assert_array_equal(region.box, [2, 1, 12, 8])
    np.testing.assert_array_equal(coco_mask.decode(region.mask), mask)
    assert (region.phrase, region.label, region.parent) == ("left lung", "left_lung", "lung")
    assert (example.modality, example.image_id) == ("xray", "07_X-Ray_chest")


def test_site_in_the_name_tells_which_tumor_it_is(tmp_path):
    (example,) = read(write_masks(tmp_path, "02_CT_lung", {"tumor": rectangle(1, 1, 3, 3)}))
    assert example.regions[0].label == "lung_tumor"


def test_longest_image_name_owns_the_mask(tmp_path):
    write_masks(tmp_path, "a", {})
    write_masks(tmp_path, "a_left", {"lung": rectangle(1, 1, 3, 3)})
    source = read(tmp_path)
    assert [(example.image_id, example.modality, len(example.regions)) for example in source] == [("a_left", "ct", 1)]
    assert source.unused == [str(tmp_path / "images" / "a.png")]


def test_empty_mask_gives_a_box_without_area(tmp_path):
    (example,) = read(write_masks(tmp_path, "a", {"lung": rectangle(0, 0, 0, 0)}))
    np.testing.assert_array_equal(example.regions[0].box, [0, 0, 0, 0])


def test_mask_of_another_size_is_an_error(tmp_path):
    write_masks(tmp_path, "a", {"lung": rectangle(0, 0, 1, 1, size=(9, 12))})
    with pytest.raises(SourceError, match=r"a_lung.png: the mask is 12 x 9 pixels, its image 12 x 8"):
        read(tmp_path)[0]


def test_masks_that_belong_to_no_image_are_an_error(tmp_path):
    write_masks(tmp_path, "a", {"lung": rectangle(0, 0, 1, 1)})
    (tmp_path / "images" / "a.png").rename(tmp_path / "images" / "b.png")
    with pytest.raises(SourceError, match="no mask belongs to an image"):
        read(tmp_path)


def test_folder_without_masks_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match="images/ and masks/"):
        read(tmp_path)


@given(nps.arrays(bool, nps.array_shapes(min_dims=2, max_dims=2, max_side=8)))
def test_outline_has_the_box_and_the_runs_of_the_mask(mask):
    found = outline(mask)
    np.testing.assert_array_equal(found["box"], box_from_mask(mask))
    assert found["box"].dtype == np.float32
    np.testing.assert_array_equal(coco_mask.decode(found["mask"]), mask)
