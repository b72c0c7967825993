import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, Tally, curate
from data_pipelines.sources import load_source

BOWL_ID = "0" * 63 + "a"


def write_instances(folder, name="a", count=2, size=(10, 20)):
    """Writes one RGBA image of 20 x 10 with `count` masks of 2 x 3 pixels, whose size is `size`."""
    for part in ("images", "masks"):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 20, 4), 255, np.uint8)).save(folder / name / "images" / f"{name}.png")
    for index in range(count):
        mask = np.zeros(size, np.uint8)
        mask[1:3, 4 * index : 4 * index + 3] = 255
        Image.fromarray(mask).save(folder / name / "masks" / f"{index}.png")
    return folder


def read(folder):
    return load_source("auto", folder, dataset="nuclei", modality="microscopy")


def test_a_mask_file_is_a_region(tmp_path):
    write_instances(tmp_path)
    (tmp_path / "class.txt").write_text("WBC\n")
    (example,) = read(tmp_path)
    assert [region.box.tolist() for region in example.regions] == [[0, 1, 3, 3], [4, 1, 7, 3]]
    assert {(region.phrase, region.granularity) for region in example.regions} == {("white blood cell", "cell")}
    assert [int(coco_mask.area(region.mask)) for region in example.regions] == [6, 6]
    assert (example.image_id, example.modality) == ("a", "microscopy")


def test_folders_named_as_the_bowls_hold_nuclei(tmp_path):
    (example,) = read(write_instances(tmp_path / "stage1_train", BOWL_ID).parent)
    assert example.image_id == f"stage1_train/{BOWL_ID}"
    assert {region.label for region in example.regions} == {"nucleus"}


def test_other_folders_need_a_class(tmp_path):
    with pytest.raises(SourceError, match=r"its instances have no class: write it into .*class.txt"):
        read(write_instances(tmp_path))[0]


def test_class_of_several_lines_is_an_error(tmp_path):
    (write_instances(tmp_path) / "a/class.txt").write_text("WBC\nRBC")
    with pytest.raises(SourceError, match=r"class.txt: expected one line"):
        read(tmp_path)[0]


def test_image_without_instances_is_an_example_and_without_folder_of_masks_is_unused(tmp_path):
    write_instances(tmp_path, BOWL_ID, count=0)
    (write_instances(tmp_path, "b", count=0) / "b/masks").rmdir()
    source = read(tmp_path)
    assert [example.regions for example in source] == [()]
    assert source.unused == [str(tmp_path / "b/images/b.png")]


def test_mask_of_another_size_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"0.png: the mask is 20 x 9 pixels, its image 20 x 10"):
        read(write_instances(tmp_path, BOWL_ID, size=(9, 20)))[0]


def test_folder_with_no_image_is_an_error(tmp_path):
    (write_instances(tmp_path, BOWL_ID) / BOWL_ID / "images" / f"{BOWL_ID}.png").unlink()
    with pytest.raises(SourceError, match="images: expected one image, found 0"):
        load_source("instances", tmp_path, dataset="nuclei")[0]


def test_folder_without_masks_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(SourceError, match="expected folders with images/ and masks/ in each"):
        load_source("instances", tmp_path, dataset="nuclei")


def test_data_science_bowl(shared_dir):
    source = read(shared_dir / "data/dsb2018")
    counts = []
    for example in source:
        assert curate(example)[1] == Tally()
        assert {region.label for region in example.regions} == {"nucleus"}
        counts.append(len(example.regions))
    assert (len(counts), sum(counts), min(counts), max(counts)) == (120, 2423, 6, 39)
    assert source.unused == []
