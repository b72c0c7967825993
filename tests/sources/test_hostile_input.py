"""One bad file among good ones, names and links that lead out of the input folder, and litter, for every source."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.limits import Limits, use_limits
from data_pipelines.sources.arrays import Arrays
from data_pipelines.sources.coco import COCO
from data_pipelines.sources.colored_masks import ColoredMasks
from data_pipelines.sources.dicom import DICOM
from data_pipelines.sources.instances import InstanceFolders
from data_pipelines.sources.labelme import LabelMe
from data_pipelines.sources.masks import MaskFolder
from data_pipelines.sources.nifti import NIfTI
from data_pipelines.sources.paired_masks import PairedMasks
from data_pipelines.sources.rle_csv import RLECSV
from data_pipelines.sources.sa_med2d import SAMed2D
from data_pipelines.sources.voc import PascalVOC
from data_pipelines.sources.yolo import YOLO
from data_pipelines.volumes import SliceRule

pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

from tests.sources.test_dicom import slice_file, write_labels, write_series
from tests.sources.test_nifti import write_case

STEMS = ("a", "b")


def save(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / name)


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def write_voc(folder):
    for stem in STEMS:
        save(folder, f"JPEGImages/{stem}.png")
        write(folder, f"Annotations/{stem}.xml", f"<annotation>{' ' * 80}</annotation>")


def write_coco(folder):
    save(folder, *(f"images/{stem}.png" for stem in STEMS))
    images = [{"id": number, "file_name": f"{stem}.png"} for number, stem in enumerate(STEMS)]
    write(folder, "all.json", json.dumps({"images": images, "annotations": [], "categories": []}))


def write_masks(folder):
    for stem in STEMS:
        save(folder, f"images/{stem}.png", f"masks/{stem}_polyp.png")


def write_yolo(folder):
    for stem in STEMS:
        save(folder, f"images/{stem}.png")
        write(folder, f"labels/{stem}.txt", "0 0.5 0.5 0.5 0.5\n")
    write(folder, "data.yaml", "names: [polyp]")


def write_labelme(folder):
    for stem in STEMS:
        save(folder, f"{stem}.png")
        write(folder, f"{stem}.json", json.dumps({"shapes": [], "imagePath": "x"}))


def write_instances(folder):
    for stem in STEMS:
        save(folder, f"{stem}/images/{stem}.png", f"{stem}/masks/1.png")
    write(folder, "class.txt", "nucleus")


def write_colored_masks(folder):
    for stem in STEMS:
        save(folder, f"images/{stem}.png", f"masks/{stem}.png")
    write(folder, "labels.json", '{"1": "polyp"}')


def write_sa_med2d(folder):
    for stem in STEMS:
        save(folder, f"images/{stem}_0.png", f"masks/{stem}_0_liver_000.png")
    pairs = {f"images/{stem}_0.png": [f"masks/{stem}_0_liver_000.png"] for stem in STEMS}
    write(folder, "SAMed2D_v1.json", json.dumps(pairs))


def write_paired_masks(folder):
    for stem in STEMS:
        save(folder, f"{stem}.png", f"{stem}_mask.png")


def write_arrays(folder):
    for stem in STEMS:
        (folder / stem).mkdir()
        np.save(folder / stem / "images.npy", np.zeros((1, 8, 8, 3), np.uint8))
        np.save(folder / stem / "masks.npy", np.eye(8)[None, ..., None])


def write_rle_csv(folder):
    for stem in STEMS:
        save(folder, f"{stem}.png")
    write(folder, "masks.csv", "ImageId,EncodedPixels\na,1 9\nb,-1\n")


def write_nifti(folder):
    for stem in STEMS:
        write_case(folder, stem)
        write(folder, f"{stem}/labels.json", json.dumps({"labels": {}}))


def write_dicom(folder):
    for stem in STEMS:
        write_series(folder / stem / "series", series=f"1.2.{ord(stem)}")
        write_labels(folder / stem)
    slice_file(folder / "a/series", 3).rename(folder / "a/series/one")


# Source, what writes its folder, and the files of the first example that may be bad.
LAYOUTS = {
    "voc": (PascalVOC, write_voc, ("JPEGImages/a.png", "Annotations/a.xml")),
    "coco": (COCO, write_coco, ("images/a.png",)),
    "masks": (MaskFolder, write_masks, ("images/a.png", "masks/a_polyp.png")),
    "yolo": (YOLO, write_yolo, ("images/a.png", "labels/a.txt")),
    "labelme": (LabelMe, write_labelme, ("a.png", "a.json")),
    "instances": (InstanceFolders, write_instances, ("a/images/a.png", "a/masks/1.png")),
    "colored_masks": (ColoredMasks, write_colored_masks, ("images/a.png", "masks/a.png")),
    "paired_masks": (PairedMasks, write_paired_masks, ("a.png", "a_mask.png")),
    "arrays": (Arrays, write_arrays, ("a/images.npy", "a/masks.npy")),
    "rle_csv": (RLECSV, write_rle_csv, ("a.png",)),
    "sa_med2d": (SAMed2D, write_sa_med2d, ("images/a_0.png", "masks/a_0_liver_000.png")),
    "nifti": (NIfTI, write_nifti, ("a/ct.nii.gz", "a/multilabel.nii.gz", "a/labels.json")),
    "dicom": (DICOM, write_dicom, ("a/series/one", "a/segmentations/liver.nii.gz")),
}
FILES = [(name, file) for name, (_, _, files) in LAYOUTS.items() for file in files]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of all layouts; tests take copies or put things back."""
    made = {}
    for name, (_, make, _) in LAYOUTS.items():
        made[name] = tmp_path_factory.mktemp(name) / "input"
        made[name].mkdir()
        make(made[name])
    return made


RULE = {"rule": SliceRule(planes=("axial",), step_mm=30)}
OPTIONS = {
    "nifti": RULE,
    "dicom": RULE,
    "paired_masks": {"images": "{id}.png", "masks": {"polyp": "{id}_mask.png"}},
    "arrays": {"images": "{id}/images.npy", "masks": "{id}/masks.npy", "channels": ("polyp",)},
    "rle_csv": {"runs": "absolute", "label": "polyp"},
}


def open_source(name, folder):
    return LAYOUTS[name][0](folder, dataset="d", modality="ct", **OPTIONS.get(name, {}))


def read_all(source) -> tuple[set[str], list[str]]:
    """Image ids of what can be read, and the messages of what cannot."""
    ids, problems = set(), []
    for index in range(len(source)):
        try:
            ids.add(source[index].image_id)
        except SourceError as error:
            problems.append(str(error))
    return ids, problems


@pytest.fixture(scope="module")
def expected(folders):
    """Image ids of each layout, and those of the second example alone."""
    both, second = {}, {}
    for name, folder in folders.items():
        both[name], problems = read_all(open_source(name, folder))
        assert not problems
        ids = [example.image_id for example in open_source(name, folder)]
        second[name] = set(ids[len(ids) // 2 :])
        assert len(ids) == len(both[name]) == 2 * len(second[name])
    return both, second


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut"])
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_bad_file_loses_its_own_example_only(folders, expected, name, file, damage):
    path = folders[name] / file
    whole = path.read_bytes()
    bad = {"empty": b"", "garbage": b"\x93\xff garbage" * 9, "cut": whole[: len(whole) // 2]}[damage]
    try:
        path.write_bytes(bad)
        source = open_source(name, folders[name])
        ids, problems = read_all(source)
    finally:
        path.write_bytes(whole)
    if (name, file, damage) == ("yolo", "labels/a.txt", "empty"):
        assert ids == expected[0][name]  # an image without boxes
        return
    assert expected[1][name] <= ids < expected[0][name] | {""}
    told = [*problems, *source.unused]
    assert told and any(str(folders[name]) in text for text in told)
    assert problems or name == "labelme"


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_link_out_of_the_folder_is_refused_for_its_example_unless_allowed(folders, expected, name, file, tmp_path):
    path, outside = folders[name] / file, tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    try:
        ids, problems = read_all(open_source(name, folders[name]))
        with use_limits(Limits(follow_symlinks=True)):
            followed = read_all(open_source(name, folders[name]))
    finally:
        path.unlink()
        outside.rename(path)
    assert followed == (expected[0][name], [])
    if name == "nifti" and file.endswith(".json"):
        return  # its names are in the label file, which is read
    assert ids < expected[0][name] and expected[1][name] <= ids
    assert any("symbolic link leads out" in text for text in problems)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_link_to_nothing_loses_its_own_example_only(folders, expected, name, file, tmp_path):
    path, kept = folders[name] / file, tmp_path / "kept"
    path.rename(kept)
    path.symlink_to(folders[name] / "nothing")
    try:
        ids, _ = read_all(open_source(name, folders[name]))
    finally:
        path.unlink()
        kept.rename(path)
    assert expected[1][name] <= ids


@pytest.mark.parametrize("name", LAYOUTS)
def test_litter_changes_nothing(folders, expected, name):
    files = LAYOUTS[name][2]
    places = {folders[name], *((folders[name] / file).parent for file in files)}
    litter = [
        place / f"{mark}{end}"
        for place in places
        for mark in ("._x", ".")
        for end in (".png", ".xml", ".json", ".txt", ".nii.gz", ".dcm", "DS_Store")
    ]
    litter += [place / "Thumbs.db" for place in places]
    source = open_source(name, folders[name])
    try:
        for path in litter:
            path.write_bytes(b"\0\1 litter")
        littered = open_source(name, folders[name])
        assert LAYOUTS[name][0].matches(folders[name]) or name in ("paired_masks", "arrays")  # only options tell these
        assert read_all(littered) == (expected[0][name], [])
        assert littered.unused == source.unused
    finally:
        for path in litter:
            path.unlink()


@pytest.mark.parametrize("name", LAYOUTS)
def test_sources_can_be_pickled_when_open(folders, name):
    source = open_source(name, folders[name])
    first = source[0]
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source) and again.unused == source.unused
    assert (again[0].image, again[0].image_id) == (first.image, first.image_id)
    assert len(pickle.dumps(source)) < 100_000


@pytest.mark.parametrize("escape", ["../secret.png", "/tmp/secret.png", "x/../../secret.png"])
def test_names_in_annotations_do_not_leave_the_folder(tmp_path, escape):
    folder = tmp_path / "input"
    save(tmp_path, "secret.png")
    write_coco(folder / "coco")
    content = json.loads((folder / "coco/all.json").read_text())
    content["images"][0]["file_name"] = escape
    (folder / "coco/all.json").write_text(json.dumps(content))
    write_labelme(folder / "labelme")
    (folder / "labelme/a.png").unlink()
    write(folder, "labelme/a.json", json.dumps({"shapes": [], "imagePath": escape}))
    write_sa_med2d(folder / "sa_med2d")
    pairs = {escape: [], "images/b_0.png": [escape]}
    write(folder, "sa_med2d/SAMed2D_v1.json", json.dumps(pairs))
    for name, index in (("coco", 0), ("labelme", 0), ("sa_med2d", 0)):
        save(folder / name, "../secret.png", "../secret_neighbour.png")
        source = open_source(name, folder / name)
        with pytest.raises(SourceError, match=r"in an annotation (leaves|must be relative to) the input folder"):
            source[index]
        assert not any("secret" in text for text in source.unused)
    with pytest.raises(SourceError):
        open_source("sa_med2d", folder / "sa_med2d")[1]
    assert open_source("coco", folder / "coco")[1].image_id == "b"


def test_document_type_in_an_annotation_is_refused(tmp_path):
    write_voc(tmp_path)
    write(tmp_path, "Annotations/a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>')
    source = open_source("voc", tmp_path)
    with pytest.raises(SourceError, match=r"a\.xml: has a DOCTYPE"):
        source[0]
    assert source[1].image_id == "b"


def test_aliases_in_yaml_do_not_grow(tmp_path):
    write_yolo(tmp_path)
    lists = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    write(tmp_path, "data.yaml", f"a0: &a0 [x]\n{lists}\nnames: {{0: *a11}}")
    with pytest.raises(SourceError, match=r"data\.yaml: expected 'names'"):
        open_source("yolo", tmp_path)
