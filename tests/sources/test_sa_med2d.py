import collections
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, Tally, curate, hash_patient
from data_pipelines.sources import detect_source, load_source

IMAGE = "mr_t1--BraTS2021--BraTS2021_00218--z_0141"
PAIRS = {f"images/{IMAGE}.png": [f"masks/{IMAGE}--0003_000.png", f"masks/{IMAGE}--0003_001.png"]}
CLASSES = {"BraTS2021": {"liver": "0003"}, "ACDC": {"spleen": "0003"}}


def write_sa_med2d(folder, pairs=PAIRS, classes=CLASSES, where="SAMed2D_v1.json", size=(10, 20)):
    for image, masks in pairs.items():
        for index, name in enumerate([image, *masks]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((10, 20, 3) if name == image else size, np.uint8)
            pixels[1:3, 4 * index : 4 * index + 3] = 255
            Image.fromarray(pixels).save(folder / name)
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / where).write_text(json.dumps(pairs))
    (folder / where).with_name("SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(classes))
    return folder


def read(folder):
    return load_source("auto", folder, dataset="sa", modality="ct")


@pytest.mark.parametrize("where", ["SAMed2D_v1.json", "annotations/SAMed2D_v1.json"])
def test_names_give_modality_patient_and_class(tmp_path, where):
    (example,) = read(write_sa_med2d(tmp_path, where=where))
    assert [(region.label, region.box.tolist()) for region in example.regions] == [
        ("liver", [4, 1, 7, 3]),
        ("liver", [8, 1, 11, 3]),
    ]
    assert int(coco_mask.area(example.regions[0].mask)) == 6
    assert (example.image_id, example.modality, example.dataset) == (IMAGE, "mri", "sa")
    assert example.patient_id == hash_patient("BraTS2021/BraTS2021_00218", "sa")


@pytest.mark.parametrize("number", ["0003", "3", 3])
def test_class_ids_are_numbers_however_they_are_written(tmp_path, number):
    (example,) = read(write_sa_med2d(tmp_path, classes={"BraTS2021": {"spleen": "0030", "liver": number}}))
    assert {region.label for region in example.regions} == {"liver"}


@pytest.mark.parametrize(
    ("prefix", "modality"), [("x_ray", "xray"), ("ct_00", "ct"), ("fundus_photography", "fundus"), ("sound_00", "ct")]
)
def test_modality_is_the_names_or_else_the_given_one(tmp_path, prefix, modality):
    pairs = {f"images/{prefix}--set--case--2d_none.png": []}
    (example,) = read(write_sa_med2d(tmp_path, pairs))
    assert (example.modality, example.regions) == (modality, ())


def test_files_that_no_pair_names_are_unused(tmp_path):
    write_sa_med2d(tmp_path)
    content = (tmp_path / f"images/{IMAGE}.png").read_bytes()
    for name in ("images/other.png", "masks/other.png"):
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path).unused == [str(tmp_path / name) for name in ("images/other.png", "masks/other.png")]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: write_sa_med2d(f, classes={}), r"_mapping_id.json has no class 0003 of BraTS2021"),
        (lambda f: write_sa_med2d(f, classes={"BraTS2021": {"(x)": "0003"}}), "0003_000.png: .* has no words"),
        (lambda f: write_sa_med2d(f, size=(9, 20)), r"0003_000.png: the mask is 20 x 9 pixels, its image 20 x 10"),
        (lambda f: (f / f"images/{IMAGE}.png").unlink(), f"{IMAGE}.png: there is no such image"),
        (lambda f: (f / f"masks/{IMAGE}--0003_001.png").unlink(), r"0003_001.png: there is no such image"),
        (
            lambda f: write_sa_med2d(f, {f"images/{IMAGE}.png": ["masks/a_000.png"]}),
            r"a_000.png: expected a mask named",
        ),
        (lambda f: (f / "SAMed2D_v1.json").write_text("{"), r"SAMed2D_v1.json: no valid JSON"),
        (lambda f: (f / "SAMed2D_v1.json").write_text("[]"), r"SAMed2D_v1.json: expected a mapping"),
        (lambda f: (f / "SAMed2D_v1.json").write_text('{"a": 1}'), r"SAMed2D_v1.json: expected the masks of 'a'"),
        (lambda f: (f / "SAMed2D_v1.json").write_text("{}"), "no image in them"),
    ],
)
def test_bad_input_is_an_error_that_names_the_file(tmp_path, break_it, message):
    write_sa_med2d(tmp_path)
    break_it(tmp_path)
    with pytest.raises(SourceError, match=message):
        read(tmp_path)[0]


def test_folder_without_pairs_is_an_error(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(SourceError, match=r"expected SAMed2D_v1.json, .* found none of them"):
        load_source("sa_med2d", tmp_path, dataset="sa")


@pytest.mark.parametrize("name", ["sa_med2d_demo", "sa_med2d_demo/data_demo"])
def test_demo(shared_dir, name):
    source = read(shared_dir / "data" / name)
    labels = collections.Counter()
    for example in source:
        assert curate(example)[1] == Tally()
        labels.update(region.label for region in example.regions)
    assert (len(source), labels.total()) == (4, 30)
    assert labels["aorta"] == 3 and labels["liver"] == labels["inferior_vena_cava"] == 2
    lobe = next(r for r in source[1].regions if r.phrase == "right middle lobe")
    assert (lobe.label, lobe.parent) == ("right_middle_lobe", "right_lung")
    assert [source[i].patient_id for i in (0, 1)] == [hash_patient("amos_0006", "sa"), hash_patient("s0114", "sa")]
    assert [path.rsplit("/", 1)[1] for path in source.unused] == ["amos_0507_31.png"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bccd", "voc"),
        ("biomedparse_demo", "masks"),
        ("dsb2018", "instances"),
        ("dsb2018/stage1_train", "instances"),
        ("sa_med2d_demo", "sa_med2d"),
        ("sa_med2d_demo/data_demo", "sa_med2d"),
    ],
)
def test_each_folder_of_real_images_has_one_layout(shared_dir, name, source):
    assert detect_source(shared_dir / "data" / name) == source
