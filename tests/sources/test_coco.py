import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, hash_patient, split_key
from data_pipelines.sources import load_source

SIZE = (10, 20)


def write_coco(folder, images=None, annotations=(), categories=None, where="annotations/instances.json"):
    images = images if images is not None else [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}]
    (folder / "images").mkdir(exist_ok=True)
    for image in images:
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(folder / "images" / image["file_name"])
    (folder / where).parent.mkdir(exist_ok=True)
    categories = categories if categories is not None else [{"id": 7, "name": "WBC"}, {"id": 9, "name": "platelets"}]
    content = {"images": images, "annotations": list(annotations), "categories": categories}
    (folder / where).write_text(json.dumps(content))
    return folder


def annotation(**fields):
    return {"id": 3, "image_id": 1, "category_id": 7, "bbox": [1.5, 2, 3, 4], **fields}


def read(folder):
    return load_source("coco", folder, dataset="set")


@pytest.mark.parametrize("where", ["annotations/instances.json", "anything.json", "images/anything.json"])
def test_instances(tmp_path, where):
    write_coco(tmp_path, annotations=[annotation(), annotation(id=4, category_id=9, iscrowd=1)], where=where)
    (example,) = read(tmp_path / where if where.startswith("images") else tmp_path)
    cell, crowd = example.regions
    np.testing.assert_array_equal(cell.box, [1.5, 2, 4.5, 6])
    assert (cell.phrase, cell.label, cell.iscrowd) == ("white blood cell", "white_blood_cell", False)
    assert (crowd.phrase, crowd.iscrowd) == ("platelet", True)
    assert (example.image_id, example.height, example.width, example.patient_id) == ("a", 10, 20, "")


def rle(counts):
    return {"size": list(SIZE), "counts": counts}


MASK = np.zeros(SIZE, np.uint8)
MASK[2:6, 1:5] = 1


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 5, 2, 5, 6, 1, 6]],
        rle([12, 4, 6, 4, 6, 4, 6, 4, 154]),
        rle(coco_mask.encode(np.asfortranarray(MASK))["counts"].decode()),
    ],
    ids=["polygon", "runs", "compressed"],
)
def test_segmentations_become_compressed_run_lengths(tmp_path, segmentation):
    write_coco(tmp_path, annotations=[annotation(segmentation=segmentation, bbox=None)])
    (region,) = read(tmp_path)[0].regions
    assert isinstance(region.mask["counts"], bytes)
    np.testing.assert_array_equal(coco_mask.decode(region.mask), MASK)
    np.testing.assert_array_equal(region.box, [1, 2, 5, 6])


def test_captions_with_spans(tmp_path):
    caption = "A small nodule in the left lung"
    images = [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20, "caption": caption}]
    entries = [annotation(tokens_positive=[[22, 31]]), annotation(tokens_positive=[[2, 7], [8, 14]])]
    write_coco(tmp_path, images, entries, categories=[{"id": 7, "name": "object"}])
    (example,) = read(tmp_path)
    lung, nodule = example.regions
    assert (example.caption, lung.phrase, lung.label, lung.spans) == (caption, "left lung", "left_lung", ((22, 31),))
    assert (nodule.phrase, nodule.spans) == ("small nodule", ((2, 7), (8, 14)))


def test_entries_that_share_a_file_have_own_ids_and_one_split(tmp_path):
    images = [{"id": i, "file_name": "a.jpg", "caption": "a lung"} for i in range(20)]
    examples = list(read(write_coco(tmp_path, images)))
    assert len({example.image_id for example in examples}) == 20
    assert len({split_key(example) for example in examples}) == 1


def test_patient_id_is_hashed_and_negative_categories_are_absent(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg", "patient_id": "Doe", "neg_category_ids": [9]}]
    (example,) = read(write_coco(tmp_path, images))
    assert example.patient_id == hash_patient("Doe", "set")
    assert example.absent == ("platelet",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"category_id": 1}, "'categories' has no id 1"),
        ({"bbox": [1, 2, 3]}, r"no usable \[x, y, width, height\]"),
        ({"bbox": None}, r"no usable \[x, y, width, height\]"),
        ({"segmentation": {"size": [4, 4], "counts": [16]}}, r"size \[4, 4\]"),
        ({"segmentation": [[1]]}, "cannot be read"),
        ({"tokens_positive": [[0, 4]]}, "are no words"),
        ({"tokens_positive": [3]}, "expected"),
    ],
)
def test_bad_annotations_are_errors_that_name_them(tmp_path, fields, message):
    write_coco(tmp_path, annotations=[annotation(**fields)])
    with pytest.raises(SourceError, match=message) as error:
        read(tmp_path)[0]
    assert "annotation id 3" in str(error.value)


def test_missing_image_is_an_error(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(SourceError, match=r"image id 1: there is no a.jpg"):
        read(tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', "no valid JSON"),
        ('{"images": [{"file_name": "a"}], "annotations": []}', "'id'"),
        ('{"images": [3], "annotations": []}', "not COCO"),
        ("[" * 10**5, "none"),
        ('{"images": [], "annotations": []}', "names no images"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}', "image id 2, which is not"),
    ],
)
def test_bad_file_is_an_error(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "'file_name' is None"),
        ({"file_name": 3}, "'file_name' is 3"),
        ({"file_name": "a.jpg", "height": "tall", "width": 20}, "'height' and 'width' are 'tall' and 20"),
        ({"file_name": "a.jpg", "height": float("inf"), "width": 20}, "are inf and 20"),
        ({"file_name": "a.jpg", "caption": ["a"]}, "caption is no text"),
        ({"file_name": "a.jpg", "neg_category_ids": [[7]]}, r"no id \[7\]"),
    ],
)
def test_bad_entry_of_an_image_leaves_the_others(tmp_path, entry, message):
    write_coco(tmp_path, annotations=[annotation()])
    path = tmp_path / "annotations/instances.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 2, **entry})
    path.write_text(json.dumps(content))
    source = read(tmp_path)
    assert len(source[0].regions) == 1
    with pytest.raises(SourceError, match=f"image id 2.*{message}"):
        source[1]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "far outside the image"),
        ([[0, 0, float("nan"), 0, 5, 5]], "far outside the image"),
        ({"size": [65535, 65535], "counts": "04"}, r"mask is of size \[65535, 65535\]"),
    ],
)
def test_segmentation_that_would_take_all_memory_is_refused(tmp_path, segmentation, message):
    write_coco(tmp_path, annotations=[annotation(segmentation=segmentation)])
    with pytest.raises(SourceError, match=f"annotation id 3.*{message}"):
        read(tmp_path)[0]


def test_several_files_are_an_error_that_lists_them(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, where="annotations/other.json")
    with pytest.raises(SourceError, match=r"instances\.json, .*other\.json"):
        read(tmp_path)
