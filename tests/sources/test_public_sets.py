"""The entries of configs/public_sets.yaml on small folders of exactly the names that the publishers give."""

import collections
import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines.building.corpus import build_corpus
from data_pipelines.building.recipe import read_recipe
from data_pipelines.records import read_examples
from data_pipelines.sources import load_source
from data_pipelines.sources.run_lengths import encode_runs
from data_pipelines.taxonomy.mapping import add_absent, apply_mapping, load_mapping

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

from tests.sources.radiographs import write_radiograph  # noqa: E402
from tests.sources.test_nifti import save as save_volume  # noqa: E402
from tests.sources.volume_body import draw_body  # noqa: E402

FILE = pathlib.Path(__file__).parents[2] / "configs/public_sets.yaml"
RECIPE = read_recipe(FILE)
SPOTS = np.zeros((40, 60), np.uint8)
SPOTS[5:15, 5:20] = SPOTS[25:35, 40:50] = 255
EMPTY = np.zeros_like(SPOTS)


def save(path, values=SPOTS, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).save(path)


def photograph(path, seed):
    blobs = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(blobs).resize((60, 40), Image.Resampling.BICUBIC).save(path)


def write_isic(folder):
    for number in range(2):
        photograph(folder / f"ISIC2018_Task1-2_Training_Input/ISIC_000000{number}.jpg", number)
        save(folder / f"ISIC2018_Task1_Training_GroundTruth/ISIC_000000{number}_segmentation.png")
        for name in ("globules", "milia_like_cyst", "negative_network", "pigment_network", "streaks"):
            mask = SPOTS if name == "pigment_network" and number else EMPTY
            save(folder / f"ISIC2018_Task2_Training_GroundTruth_v3/ISIC_000000{number}_attribute_{name}.png", mask)
    for place in folder.iterdir():
        (place / "ATTRIBUTION.txt").touch()


def write_kvasir(folder):
    for seed, name in enumerate(("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4"), 50):
        photograph(folder / f"images/{name}.jpg", seed)
        save(folder / f"masks/{name}.jpg")
    (folder / "kavsir_bboxes.json").write_text("{}")


def write_busi(folder):
    for class_, number, masks in (("benign", 1, 1), ("benign", 4, 2), ("malignant", 1, 1), ("normal", 1, 1)):
        photograph(folder / f"{class_}/{class_} ({number}).png", number)
        for place in range(masks):
            mask = EMPTY if class_ == "normal" else np.roll(SPOTS[:20].repeat(2, 0), place, 1)
            save(folder / f"{class_}/{class_} ({number})_mask{f'_{place}' if place else ''}.png", mask, "1")


def write_idrid(folder):
    parts = (("a. Training Set", 1), ("b. Testing Set", 55))
    classes = {"Microaneurysms": "MA", "Haemorrhages": "HE", "Hard Exudates": "EX", "Soft Exudates": "SE"}
    for part, number in parts:
        photograph(folder / f"1. Original Images/{part}/IDRiD_{number:02}.jpg", number)
        for place, (name, short) in enumerate([*classes.items(), ("Optic Disc", "OD")], 1):
            if short != "SE" or number == 55:
                path = f"2. All Segmentation Groundtruths/{part}/{place}. {name}/IDRiD_{number:02}_{short}.tif"
                save(folder / path, np.dstack([SPOTS, EMPTY, EMPTY]), "RGB")


def write_drive(folder):
    for number in (21, 22):
        photograph(folder / f"training/images/{number}_training.tif", number)
        save(folder / f"training/1st_manual/{number}_manual1.gif")
        save(folder / f"training/mask/{number}_training_mask.gif", EMPTY + 255)
    photograph(folder / "test/images/01_test.tif", 1)
    save(folder / "test/mask/01_test_mask.gif", EMPTY + 255)


def write_pannuke(folder):
    for fold in (1, 2, 3):
        images = np.random.default_rng(fold).integers(0, 256, (2, 32, 32, 3)).astype(float)
        masks = np.zeros((2, 32, 32, 6))
        for channel in range(5):
            masks[0, 5 * channel : 5 * channel + 4, 3:9, channel] = 10 + channel
        masks[..., 5] = masks.sum(axis=-1) == 0
        for name, values in (("images/fold{}/images", images), ("masks/fold{}/masks", masks)):
            path = folder / f"Fold {fold}" / f"{name.format(fold)}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, values)
        np.save(folder / f"Fold {fold}/images/fold{fold}/types.npy", np.asarray(["Breast", "Colon"]))


def write_siim(folder):
    lines = ["ImageId, EncodedPixels"]
    for number, mask in enumerate((SPOTS, EMPTY)):
        image_id = f"1.2.276.0.7230010.3.1.4.8323329.{number}"
        pixels = np.random.default_rng(number).integers(0, 4096, SPOTS.shape).astype(np.uint16)
        write_radiograph(folder / f"dicom-images-train/1.2.{number}/1.3.{number}/{image_id}.dcm", pixels)
        lines.append(f"{image_id}, {encode_runs(mask > 0, 'relative') or '-1'}")
    (folder / "train-rle.csv").write_text("\n".join(lines))
    (folder / "sample_submission.csv").write_text("ImageId,EncodedPixels\n1.2,-1\n")


def write_bowl(folder):
    lines = ["ImageId,EncodedPixels"]
    for digit in "ab":
        image_id = digit * 64
        photograph(folder / f"stage1_train/{image_id}/images/{image_id}.png", ord(digit))
        for part in (SPOTS[:20], SPOTS[20:]):
            mask = np.zeros_like(SPOTS)
            mask[: len(part)] = part
            lines.append(f"{image_id},{encode_runs(mask > 0, 'absolute')}")
    (folder / "stage1_train_labels.csv").write_text("\n".join(lines))
    (folder / "stage1_sample_submission.csv").write_text("ImageId,EncodedPixels\nx,1 1\n")


def write_brats2021(folder, cases=("BraTS2021_00000",), join="_", names=("flair", "t1", "t1ce", "t2"), enhancing=4):
    values, labels = draw_body()
    labels = np.asarray([0, 1, 2, 0, enhancing], np.uint8)[labels]
    for case in cases:
        for name in names:
            save_volume(folder / case / f"{case}{join}{name}.nii.gz", values)
        save_volume(folder / case / f"{case}{join}seg.nii.gz", labels)


def write_brats2023(folder):
    cases = ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000")
    write_brats2021(folder, cases, "-", ("t1c", "t1n", "t2f", "t2w"), 3)


def write_btcv(folder):
    values, labels = draw_body()
    for number in ("0001", "0002"):
        save_volume(folder / f"img/img{number}.nii.gz", values)
        save_volume(folder / f"label/label{number}.nii.gz", np.asarray([0, 6, 1, 8, 12], np.uint8)[labels])


def write_amos(folder):
    values, labels = draw_body()
    for part, names in (("Tr", ("amos_0001", "amos_0507")), ("Va", ("amos_0008", "amos_0517"))):
        for name in names:
            save_volume(folder / f"images{part}/{name}.nii.gz", values)
            save_volume(folder / f"labels{part}/{name}.nii.gz", np.asarray([0, 6, 1, 8, 11], np.uint8)[labels])
    classes = load_mapping("amos").classes[:16]
    text = ", ".join(f'"{value}": "{name}"' for value, name in enumerate(classes))
    (folder / "dataset.json").write_text(f'{{"name": "AMOS", "modality": {{"0": "CT"}}, "labels": {{{text}}}}}')


LESION, DISC = "skin_lesion", "optic_disc"
# Entry: what writes its folder, examples (a slice counts its case), labels with the number of regions, absent labels.
BODY = {"liver", "spleen", "aorta", "right_adrenal_gland"}
TUMOR = {"necrotic_tumor_core", "peritumoral_edema", "enhancing_tumor"}
EXPECTED = {
    "isic_lesions": (write_isic, {"ISIC_0000000", "ISIC_0000001"}, {LESION: 4}, set()),
    "isic_attributes": (write_isic, {"ISIC_0000000", "ISIC_0000001"}, {"pigment_network": 1}, set()),
    "kvasir_seg": (write_kvasir, {"cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4"}, {"polyp": 4}, set()),
    "busi": (
        write_busi,
        {"benign/benign (1)", "benign/benign (4)", "malignant/malignant (1)", "normal/normal (1)"},
        {"benign_breast_tumor": 3, "malignant_breast_tumor": 1},
        {"benign_breast_tumor", "malignant_breast_tumor"},
    ),
    "idrid": (
        write_idrid,
        {"a. Training Set/IDRiD_01", "b. Testing Set/IDRiD_55"},
        {"microaneurysm": 4, "retinal_hemorrhage": 4, "hard_exudate": 4, "cotton_wool_spot": 2, DISC: 2},
        {"cotton_wool_spot"},
    ),
    "drive": (write_drive, {"21", "22"}, {"retinal_vessel": 2}, set()),
    "pannuke": (
        write_pannuke,
        {f"{fold}/{place}" for fold in (1, 2, 3) for place in (0, 1)},
        {f"{name}_cell": 3 for name in ("neoplastic", "inflammatory", "connective_tissue", "dead", "epithelial")},
        {f"{name}_cell" for name in ("neoplastic", "inflammatory", "connective_tissue", "dead", "epithelial")},
    ),
    "siim": (
        write_siim,
        {f"1.2.276.0.7230010.3.1.4.8323329.{number}" for number in (0, 1)},
        {"pneumothorax": 1},
        {"pneumothorax"},
    ),
    "dsb2018": (write_bowl, {"a" * 64, "b" * 64}, {"nucleus": 4}, set()),
    "brats2021": (write_brats2021, {f"BraTS2021_00000/{name}" for name in ("flair", "t1", "t1ce", "t2")}, TUMOR, set()),
    "brats2023": (
        write_brats2023,
        {
            f"BraTS-GLI-{case}/{name}"
            for case in ("00000/000", "00000/001", "00002/000")
            for name in ("t1c", "t1n", "t2f", "t2w")
        },
        TUMOR,
        set(),
    ),
    "btcv": (write_btcv, {"0001", "0002"}, BODY, set()),
    "amos_ct": (write_amos, {"Tr/amos_0001", "Va/amos_0008"}, BODY, set()),
    "amos_mri": (write_amos, {"Tr/amos_0507", "Va/amos_0517"}, BODY, set()),
}


def test_every_entry_is_tested():
    assert EXPECTED.keys() == RECIPE.data_sets.keys()


def read_entry(name, folder):
    data_set, (write, *_) = RECIPE.data_sets[name], EXPECTED[name]
    folder.mkdir()
    write(folder)
    volumes = {"planes": ["axial"], "step_mm": 40} if data_set.source == "nifti" else {}
    return load_source(
        data_set.source, folder, dataset=name, modality=data_set.modality, options={**data_set.options, **volumes}
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_entry_reads_the_set_as_it_is_published(tmp_path, name):
    _, ids, labels, absent = EXPECTED[name]
    source = read_entry(name, tmp_path / "set")
    mapping, unmapped = load_mapping(RECIPE.data_sets[name].mapping), collections.Counter()
    examples = [add_absent(apply_mapping(example, mapping, unmapped)[0], mapping) for example in source]
    assert not unmapped
    volumes = RECIPE.data_sets[name].source == "nifti"
    assert {example.image_id.split("/axial/")[0] if volumes else example.image_id for example in examples} == ids
    found = collections.Counter(region.label for example in examples for region in example.regions)
    assert set(found) == labels if isinstance(labels, set) else found == labels
    assert {label for example in examples for label in example.absent} == absent
    assert {example.modality for example in examples} == {RECIPE.data_sets[name].modality}


def test_entry_leaves_nothing_unused_but_what_belongs_to_others(tmp_path):
    unused = {}
    for name in ("busi", "idrid", "drive", "brats2021", "btcv", "amos_ct"):
        source = read_entry(name, tmp_path / name)
        unused[name] = [str(pathlib.Path(path).relative_to(tmp_path / name)) for path in source.unused]
    others = unused.pop("amos_ct")
    assert others == ["labelsTr/amos_0507.nii.gz", "labelsVa/amos_0517.nii.gz"]
    assert not any(unused.values())


def test_patients_keep_their_visits_and_sequences(tmp_path):
    source = read_entry("brats2023", tmp_path / "set")
    patients = collections.defaultdict(set)
    for example in source:
        patients[example.image_id.split("/")[0]].add(example.patient_id)
    assert {name: len(ids) for name, ids in patients.items()} == {"BraTS-GLI-00000": 1, "BraTS-GLI-00002": 1}


def test_recipe_builds_from_folders_and_from_an_archive(tmp_path):
    sets = {name: RECIPE.data_sets[name] for name in ("isic_lesions", "isic_attributes", "kvasir_seg", "btcv")}
    for name, data_set in sets.items():
        if not (tmp_path / data_set.input).exists():
            (tmp_path / data_set.input).mkdir(parents=True)
            EXPECTED[name][0](tmp_path / data_set.input)
    archive = shutil.make_archive(str(tmp_path / "kvasir-seg"), "zip", tmp_path, "Kvasir-SEG")
    sets["kvasir_seg"] = dataclasses.replace(sets["kvasir_seg"], input=pathlib.Path(archive).name)
    recipe = dataclasses.replace(RECIPE, data_sets=sets, eval_fraction=0.0)
    build_corpus(recipe, tmp_path / "out", root=tmp_path, progress=False)
    labels = collections.Counter()
    for example in read_examples(tmp_path / "out"):
        if example.dataset != "btcv":
            labels.update((example.dataset, region.label) for region in example.regions)
    # The two tasks of ISIC show the same pictures, which are one example each.
    assert labels == {
        ("isic_lesions", "skin_lesion"): 4,
        ("isic_lesions", "pigment_network"): 1,
        ("kvasir_seg", "polyp"): 4,
    }
