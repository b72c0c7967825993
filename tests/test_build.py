import json
import os

import numpy as np
import pytest
from PIL import Image

from data_pipelines import build as build_module
from data_pipelines.build import build, main
from data_pipelines.building import running, staging
from data_pipelines.curate import SourceError
from data_pipelines.records import FORMATS, RecordsError, find_shards, read_examples, read_metadata
from data_pipelines.sources import detect_source

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
OBJECTS = [("RBC", 1, 1, 5, 5), ("RBC", 15, 5, 25, 12), ("WBC", 30, 1, 40, 5), ("WBC", 4, 4, 4, 4)]


@pytest.fixture
def smears(tmp_path):
    """Ten images of 20 x 10 with a box that is fine, one that leaves, one outside and one without area."""
    folder = tmp_path / "Blood smears"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 256, (10, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{index}.jpg")
        text = "".join(OBJECT.format(*entry) for entry in OBJECTS)
        (folder / "Annotations" / f"{index}.xml").write_text(f"<annotation>{text}</annotation>")
    return folder


def run(folder, output, *options):
    return main(["--source", "voc", "--input", str(folder), "--output", str(output), *options])


@pytest.mark.parametrize("file_format", FORMATS)
def test_build_writes_records_and_counts(smears, tmp_path, capsys, file_format):
    output = tmp_path / "out" / "records"
    assert run(smears, output, "--format", file_format, "--modality", "microscopy", "--num-shards", "2") == 0
    found = find_shards(output)
    assert (found.format, len(found.shards), found.num_examples) == (file_format, 2, 10)
    assert found.metadata["counts"] == {"clipped": 10, "dropped": {"outside the image": 10, "no area": 10}}
    assert found.metadata["labels"] == {"red_blood_cell": 20}
    printed = capsys.readouterr().out
    for line in (
        "train: 10 images, 20 regions",
        "20 red_blood_cell",
        "boxes clipped: 10; dropped: 20; no area: 10; outside the image: 10",
        "skipped: 0",
    ):
        assert line in printed
    for example in read_examples(found):
        assert (example.dataset, example.modality) == ("blood_smears", "microscopy")
        np.testing.assert_array_equal(example.regions[1].box, [14, 4, 20, 10])
    assert os.listdir(output.parent) == ["records"]


def test_evaluation_fraction_makes_two_splits_that_stay(smears, tmp_path):
    assert run(smears, tmp_path / "a", "--eval-fraction", "0.4") == 0
    assert run(smears, tmp_path / "b", "--eval-fraction", "0.4", "--name", "other", "--format", "tfrecord") == 0
    ids = {
        (folder, split): {example.image_id for example in read_examples(f"{tmp_path / folder}:{split}")}
        for folder in "ab"
        for split in ("train", "validation")
    }
    assert ids["a", "validation"] == ids["b", "validation"]
    assert ids["a", "train"] | ids["a", "validation"] == {str(i) for i in range(10)}
    assert not ids["a", "train"] & ids["a", "validation"]


def cut_image(smears):
    path = smears / "JPEGImages" / "3.jpg"
    path.write_bytes(path.read_bytes()[:-60])


def test_truncated_image_stops_the_build_and_leaves_nothing(smears, tmp_path, capsys):
    cut_image(smears)
    assert run(smears, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: " in error and "3.jpg: the image cannot be decoded" in error and "Traceback" not in error
    assert os.listdir(tmp_path) == ["Blood smears"]


def test_truncated_image_can_be_skipped_and_is_listed(smears, tmp_path, capsys):
    cut_image(smears)
    assert run(smears, tmp_path / "out", "--on-error", "skip", "--list", str(tmp_path / "list.json")) == 0
    metadata = read_metadata(tmp_path / "out")
    assert metadata["splits"]["train"]["num_examples"] == 9
    assert metadata["build"]["data_sets"]["blood_smears"]["skipped"] == 1
    assert "images skipped: 1\n" in capsys.readouterr().out
    (skipped,) = json.loads((tmp_path / "list.json").read_text())["skipped"]["blood_smears"]
    assert "3.jpg: the image cannot be decoded" in skipped


def test_records_name_no_files(smears, tmp_path):
    cut_image(smears)
    (smears / "JPEGImages" / "unused.jpg").write_bytes((smears / "JPEGImages" / "1.jpg").read_bytes())
    assert run(smears, tmp_path / "out", "--on-error", "skip") == 0
    for path in (tmp_path / "out").iterdir():
        assert b"3.jpg" not in path.read_bytes()
        assert b"JPEGImages" not in path.read_bytes()


def test_output_is_replaced_only_when_asked_and_only_when_complete(smears, tmp_path, capsys):
    output = tmp_path / "out"
    assert run(smears, output) == 0
    assert run(smears, output) == 1
    assert "--overwrite" in capsys.readouterr().err
    first = [example.image_id for example in read_examples(output)]
    cut_image(smears)
    assert run(smears, output, "--overwrite") == 1
    assert [example.image_id for example in read_examples(output)] == first
    assert run(smears, output, "--overwrite", "--on-error", "skip", "--format", "tfrecord") == 0
    assert find_shards(output).num_examples == 9
    assert sorted(os.listdir(tmp_path)) == ["Blood smears", "out"]


def test_failed_rename_restores_the_older_records(smears, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert run(smears, output) == 0
    replace = os.replace

    def failing(source, target):
        if target == output.resolve() and source.name.startswith("records-"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", failing)
    assert run(smears, output, "--overwrite") == 1
    assert find_shards(output).num_examples == 10
    monkeypatch.undo()
    assert run(smears, output, "--overwrite") == 0  # goes on where it stopped
    assert sorted(os.listdir(tmp_path)) == ["Blood smears", "out"]


def test_something_else_is_never_overwritten(smears, tmp_path, capsys):
    assert run(smears, smears, "--overwrite") == 1
    assert "holds something else" in capsys.readouterr().err
    assert (smears / "JPEGImages" / "0.jpg").exists()


def test_beam_takes_options_as_a_shell_passes_them(smears, tmp_path, monkeypatch):
    asked = []

    def make_runner(workers, beam):
        asked.append(beam)
        return running.run_here

    monkeypatch.setattr(build_module, "make_runner", make_runner)
    assert run(smears, tmp_path / "one", "--beam", "--runner=DirectRunner") == 0
    assert run(smears, tmp_path / "two", "--beam", "--runner=FlinkRunner --parallelism=2", "--num-shards", "1") == 0
    assert asked == [["--runner=DirectRunner"], ["--runner=FlinkRunner", "--parallelism=2"]]


@pytest.mark.parametrize("source", ["auto", "voc", "coco", "masks"])
def test_empty_and_missing_folders_are_clear_errors(tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "is empty"), ("missing", "there is no such folder")):
        assert main(["--source", source, "--input", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err


def test_layout_is_found_out(smears, tmp_path):
    assert detect_source(smears) == "voc"
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.xml").write_text("<annotation/>")
    assert detect_source(flat) == "voc"
    (flat / "b.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(SourceError, match="as voc or as coco"):
        detect_source(flat)
    (flat / "a.xml").unlink()
    assert detect_source(flat) == "coco"
    (flat / "b.json").write_text('{"version": 1}')
    with pytest.raises(SourceError, match=r"(?s)Supported are:.*Pascal VOC.*COCO.*masks/"):
        detect_source(flat)


def test_phantoms_are_a_source(tmp_path):
    options = ["--source", "phantoms", "--count", "4", "--size", "64", "--seed", "3", "--output", str(tmp_path / "out")]
    assert main(options) == 0
    assert [(e.height, e.dataset) for e in read_examples(tmp_path / "out")] == [(64, "phantoms")] * 4


def test_phantoms_that_are_too_small_are_a_clear_error(tmp_path, capsys):
    assert main(["--source", "phantoms", "--size", "8", "--output", str(tmp_path / "out")]) == 1
    assert "at least 64 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--source", "voc"],
        ["--source", "phantoms", "--input", "x"],
        ["--source", "voc", "--input", "x", "--modality", "sound"],
        ["--source", "voc", "--input", "x", "--split", "train", "--eval-fraction", "0.2"],
    ],
)
def test_wrong_options_are_refused(tmp_path, options):
    with pytest.raises(SystemExit) as error:
        main([*options, "--output", str(tmp_path / "out")])
    assert error.value.code == 2


def test_split_without_images_is_an_error(tmp_path):
    from data_pipelines.sources.phantoms import Phantoms

    with pytest.raises(RecordsError, match="all images fell into train"):
        build(Phantoms(1, size=64), tmp_path / "out", name="p", eval_fraction=0.01, progress=False)
    with pytest.raises(SourceError, match="no images"):
        build([], tmp_path / "out", name="p", progress=False)
    assert not list(tmp_path.iterdir())


def test_real_blood_smears(shared_dir, tmp_path):
    assert run(shared_dir / "data" / "bccd", tmp_path / "out", "--eval-fraction", "0.2") == 0
    splits = read_metadata(tmp_path / "out")["splits"]
    assert sum(split["num_examples"] for split in splits.values()) == 278
    labels = [split["labels"] for split in splits.values()]
    assert sum(sum(counts.values()) for counts in labels) == 3695
    assert set(labels[0]) == {"red_blood_cell", "white_blood_cell", "platelet"}
    assert sum(split["counts"]["dropped"].get("no area", 0) for split in splits.values()) == 2


def test_coco_made_of_mask_images_gives_the_same_regions(shared_dir, tmp_path):
    from data_pipelines.sources import load_source

    folder = shared_dir / "data" / "biomedparse_demo"
    source = load_source("masks", folder, dataset="masks")
    images, annotations, names = [], [], {}
    masked = [source[index] for index in (0, 2, 7)]
    for example in masked:
        (tmp_path / "coco" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / "images" / f"{example.image_id}.png").write_bytes(example.image)
        images.append({"id": len(images) + 1, "file_name": f"{example.image_id}.png"})
        for region in example.regions:
            x0, y0, x1, y1 = region.box.tolist()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": len(images),
                    "category_id": names.setdefault(region.label, len(names)),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": {"size": region.mask["size"], "counts": region.mask["counts"].decode()},
                }
            )
    categories = [{"id": number, "name": name} for name, number in names.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco" / "all.json").write_text(json.dumps(content))
    assert main(["--source", "auto", "--input", str(tmp_path / "coco"), "--output", str(tmp_path / "out")]) == 0
    for ours, theirs in zip(read_examples(tmp_path / "out"), masked, strict=True):
        assert (ours.image_id, ours.image) == (theirs.image_id, theirs.image)
        for one, other in zip(ours.regions, theirs.regions, strict=True):
            np.testing.assert_array_equal(one.box, other.box)
            assert (one.phrase, one.label, one.mask) == (other.phrase, other.label, other.mask)
