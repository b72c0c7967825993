import dataclasses
import filecmp
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_pipelines.building.corpus import build_corpus
from data_pipelines.building.recipe import DataSet, HeldOut, Recipe, RecipeError
from data_pipelines.building.running import Processes, make_runner, run_here
from data_pipelines.curate import SALT_VARIABLE, SourceError
from data_pipelines.record_index import IndexBuilder, index_name, read_index
from data_pipelines.records import RecordsError, find_shards, read_examples, read_metadata
from data_pipelines.sources.phantoms import Phantoms
from data_pipelines.sources.voc import PascalVOC
from tests.sources.radiographs import RAMP, write_radiograph

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def picture(seed: int) -> Image.Image:
    """A picture like no other: smooth blobs of noise."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(blobs).resize((48, 40), Image.Resampling.BICUBIC)


def make_voc(folder: pathlib.Path, seeds: dict[str, int], name: str = "RBC") -> pathlib.Path:
    """Images with one box each, whose names and pictures `seeds` tells."""
    for place in ("JPEGImages", "Annotations"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for number, (stem, seed) in enumerate(seeds.items()):
        picture(seed).save(folder / "JPEGImages" / f"{stem}.png")
        text = OBJECT.format(name, 2 + number % 5, 3, 30, 25)
        (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{text}</annotation>")
    return folder


@pytest.fixture
def folder(tmp_path):
    make_voc(tmp_path / "in" / "a", {f"a{i}": i for i in range(9)})
    make_voc(tmp_path / "in" / "b", {f"b{i}": i for i in range(7, 15)}, "WBC")
    return tmp_path


def recipe(**changes) -> Recipe:
    sets = {name: DataSet(source="voc", input=name, modality="microscopy") for name in "ab"}
    return Recipe(**{"name": "both", "data_sets": sets, "eval_fraction": 0.3, "num_shards": 2, **changes})


def build(folder: pathlib.Path, name: str, made: Recipe | None = None, **options) -> pathlib.Path:
    build_corpus(made or recipe(), folder / name, root=folder / "in", progress=False, **options)
    return folder / name


def assert_same(one: pathlib.Path, other: pathlib.Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def test_bytes_are_those_of_one_process(folder):
    one = build(folder, "one")
    assert_same(one, build(folder, "units", unit_size=2))
    assert_same(one, build(folder, "processes", unit_size=3, runner=Processes(2)))
    assert sorted(path.name for path in folder.iterdir()) == ["in", "one", "processes", "units"]


def test_bytes_on_beam_are_those_of_one_process(folder):
    pytest.importorskip("apache_beam", reason="Apache Beam comes with the extra build")
    assert_same(build(folder, "one"), build(folder, "beam", unit_size=3, runner=make_runner(beam=[])))


class Killed(BaseException):
    pass


def test_build_stopped_anywhere_goes_on_to_the_same_bytes(folder):
    one = build(folder, "one")
    done = []

    def stop_after_one(function, context, tasks, on_done):
        for task in tasks:
            done.append((function.__name__, repr(task)))
            function(context, task)
            raise Killed

    for _ in range(30):
        try:
            build(folder, "stopped", unit_size=4, runner=stop_after_one)
            break
        except Killed:
            assert not (folder / "stopped").exists()
    assert_same(one, folder / "stopped")
    assert len(done) == len(set(done)) == 3 + 2 + 4  # units of both sets, and shards of both splits: each once


def test_changed_data_set_is_read_again_and_the_other_is_not(folder):
    read = []

    def remember(function, context, tasks, on_done):
        read.extend(task.data_set for task in tasks if function.__name__ == "read_unit")
        run_here(function, context, tasks, on_done)
        if function.__name__ == "write_shard":
            raise Killed

    with pytest.raises(Killed):
        build(folder, "out", runner=remember)
    make_voc(folder / "in" / "b", {"new": 99}, "WBC")
    with pytest.raises(Killed):
        build(folder, "out", runner=remember)
    assert read == [0, 1, 1]
    assert_same(build(folder, "out"), build(folder, "fresh"))


def test_another_salt_starts_again(folder, monkeypatch):
    read = []

    def remember(function, context, tasks, on_done):
        read.extend(tasks)
        run_here(function, context, tasks, on_done)
        raise Killed

    for salt in ("one", "one", "other"):
        monkeypatch.setenv("MEDGLIP_PATIENT_SALT", salt)
        with pytest.raises(Killed):
            build(folder, "out", runner=remember)
        read.append(salt)
    assert [isinstance(entry, str) for entry in read] == [False, False, True, True, False, False, True]


_COMMAND = """
import sys
from data_pipelines.build import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_killed_processes_go_on_to_the_same_bytes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(_COMMAND)
    options = ["--source", "phantoms", "--count", "300", "--size", "64", "--workers", "2", "--output"]
    process = subprocess.Popen([sys.executable, script, *options, tmp_path / "out"], start_new_session=True)
    parts = tmp_path / ".out.building"
    for _ in range(600):
        if list(parts.glob("parts-*/*.npz")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(parts.glob("parts-*/*.npz")) and not (tmp_path / "out").exists()
    subprocess.run([sys.executable, script, *options, tmp_path / "out"], check=True, stdout=subprocess.DEVNULL)
    data_set = DataSet(source="phantoms", options={"count": 300, "size": 64})
    build_corpus(Recipe("phantoms", {"phantoms": data_set}), tmp_path / "one", progress=False)
    assert_same(tmp_path / "one", tmp_path / "out")


def test_copies_across_data_sets_are_merged_into_the_first(folder):
    output = build(folder, "out", recipe(eval_fraction=0.0))
    examples = {(each.dataset, each.image_id): each for each in read_examples(output)}
    assert set(examples) == {("a", f"a{i}") for i in range(9)} | {("b", f"b{i}") for i in range(9, 15)}
    assert [region.label for region in examples["a", "a7"].regions] == ["red_blood_cell", "white_blood_cell"]
    report = json.loads((output / "conflicts.json").read_text())
    assert report["counts"]["duplicates_across"] == {"merge": 2}
    assert read_metadata(output)["splits"]["train"]["labels"] == {"red_blood_cell": 9, "white_blood_cell": 8}


def test_near_copies_never_straddle_a_split(folder):
    for number in range(9):  # the same pictures once more, encoded with losses
        path = folder / "in" / "c" / "JPEGImages" / f"c{number}.jpg"
        make_voc(folder / "in" / "c", {f"c{number}": number})
        path.with_suffix(".png").unlink()
        picture(number).save(path, quality=85)
    sets = {name: DataSet(source="voc", input=name) for name in "ac"}
    output = build(folder, "out", recipe(data_sets=sets, eval_fraction=0.5))
    split_of = {e.image_id: split for split in ("train", "validation") for e in read_examples(f"{output}:{split}")}
    assert len(split_of) == 18
    assert all(split_of[f"a{i}"] == split_of[f"c{i}"] for i in range(9))
    assert len(set(split_of.values())) == 2


def test_index_and_ranges_tell_what_the_records_hold(folder):
    output = build(folder, "out")
    for split in ("train", "validation"):
        records = find_shards(f"{output}:{split}")
        builder, names = IndexBuilder(), []
        for example in read_examples(records):
            builder.add(example)
            names.append(example.dataset)
        expected, found = builder.finish(), read_index(records)
        assert (output / index_name("both", split)).exists()
        assert (found.datasets, found.label_names) == (expected.datasets, expected.label_names)
        for field in ("dataset", "modality", "label_offsets", "label_ids"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
        for name, (start, stop) in records.metadata["datasets"].items():
            assert names[start:stop] == [name] * (stop - start)


def test_held_out_label_is_in_no_other_split(folder):
    output = build(folder, "out", recipe(held_out=HeldOut(labels=("white_blood_cell",))))
    labels = {split: set(entry["labels"]) for split, entry in read_metadata(output)["splits"].items()}
    assert labels["train"] == labels["validation"] == {"red_blood_cell"}
    assert {example.image_id for example in read_examples(f"{output}:zero_shot")} == {
        "a7",  # b7 has the same picture
        "a8",
        *(f"b{i}" for i in range(9, 15)),
    }


def test_label_that_maps_to_nothing_stops_the_build_with_the_nearest(folder):
    make_voc(folder / "in" / "c", {"c": 50}, "plateletz")
    (folder / "in" / "c" / "Annotations" / "d.xml").write_text("")
    for unmapped, count in (("keep", 1), ("drop", 0)):
        sets = {"c": DataSet(source="voc", input="c", unmapped=unmapped)}
        output = build(folder, unmapped, Recipe("c", sets, on_error="skip"))
        assert read_metadata(output)["splits"]["train"]["labels"] == ({"plateletz": 1} if count else {})
    with pytest.raises(SourceError, match=r"'plateletz' \(1\): nearest labels: platelet"):
        build(folder, "stop", Recipe("c", {"c": DataSet(source="voc", input="c")}, on_error="skip"))


@pytest.mark.parametrize(("unmapped", "other", "labels"), [("stop", "RBC", ["red_blood_cell"]), ("drop", "odd", [])])
def test_name_of_no_structure_needs_no_mapping(folder, unmapped, other, labels):
    make_voc(folder / "in" / "c", {"c": 50})
    text = "".join(OBJECT.format(name, 2, 3, 30, 25) for name in ("void", "No finding", other))
    (folder / "in" / "c" / "Annotations" / "c.xml").write_text(f"<annotation>{text}</annotation>")
    output = build(folder, "out", Recipe("c", {"c": DataSet(source="voc", input="c", unmapped=unmapped)}))
    (example,) = read_examples(output)
    assert [region.label for region in example.regions] == labels
    counts = json.loads((output / "conflicts.json").read_text())["counts"]
    assert counts == {"not_annotated": {"drop": 1}, "no_finding": {"drop": 1}}


def test_notes_of_single_dicom_images_are_counted_over_all_units(folder):
    pytest.importorskip("pydicom")
    rows = [f"{name},Mass,1,R8,1,2,3,4" for name in "abc"]
    (folder / "in" / "c").mkdir()
    (folder / "in" / "c" / "a.csv").write_text(
        "\n".join(["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", *rows])
    )
    for name, said in zip("abc", (None, "NO", None), strict=True):
        write_radiograph(folder / "in" / "c" / f"{name}.dcm", RAMP + ord(name), BurnedInAnnotation=said)
    sets = {"c": DataSet(source="csv", input="c", unmapped="keep"), "a": recipe().data_sets["a"]}
    output = build(folder, "out", Recipe("both", sets), unit_size=1)
    told = {name: entry["notes"] for name, entry in read_metadata(output)["build"]["data_sets"].items()}
    assert told == {"c": {"DICOM files that do not say whether text is burned in": 2}, "a": {}}


def make_patients(folder: pathlib.Path, name: str, seed: int, patients: range) -> DataSet:
    """A COCO data set of a picture for each patient."""
    (folder / name).mkdir()
    for patient in patients:
        picture(seed + patient).save(folder / name / f"{name}{patient}.png")
    images = [{"id": p, "file_name": f"{name}{p}.png", "patient_id": f"p{p}"} for p in patients]
    (folder / name / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    return DataSet(source="coco", input=name, patients="ward")


def test_patients_of_one_pool_stay_together_with_a_salt_and_are_refused_without(folder, monkeypatch):
    sets = {name: make_patients(folder / "in", name, seed, range(12)) for name, seed in (("x", 100), ("y", 200))}
    made = Recipe("both", sets, eval_fraction=0.4)
    with pytest.raises(RecipeError, match=r"x, y share the patients of 'ward'.* MEDGLIP_PATIENT_SALT"):
        build(folder, "out", made)
    monkeypatch.setenv(SALT_VARIABLE, "secret")
    output = build(folder, "out", made)
    train, other = (
        {each.patient_id: each.dataset for each in read_examples(f"{output}:{split}")}
        for split in ("train", "validation")
    )
    assert len(train) + len(other) == 12 and train and other


def test_private_data_set_keeps_no_file_name(folder):
    sets = {"a": DataSet(source="voc", input="a", private=True)}
    output = build(folder, "out", Recipe("a", sets))
    ids = [example.image_id for example in read_examples(output)]
    assert len(set(ids)) == 9 and all(len(each) == 16 for each in ids)


def test_two_builds_of_one_output_do_not_meet(folder):
    def build_again(function, context, tasks, on_done):
        with pytest.raises(RecordsError, match="another build is writing"):
            build(folder, "out")
        run_here(function, context, tasks, on_done)

    build(folder, "out", runner=build_again)


def test_error_in_a_process_is_told_as_it_is(folder):
    (folder / "in" / "b" / "JPEGImages" / "b9.png").write_bytes(b"\x89PNG cut")
    with pytest.raises(SourceError, match=r"b9.png: the image cannot be decoded"):
        build(folder, "out", unit_size=3, runner=Processes(2))
    assert not (folder / "out").exists()


def test_phantoms_refuse_other_options(tmp_path):
    sets = {"p": DataSet(source="phantoms", options={"number": 3})}
    with pytest.raises(SourceError, match="count, seed, size"):
        build_corpus(Recipe("p", sets), tmp_path / "out", progress=False)
    assert len(Phantoms(1, size=64)) == 1


def test_metadata_tell_whose_phrases_they_are_and_who_does_not_mark_everything(folder):
    sets = {name: DataSet(source="voc", input=name, modality="microscopy") for name in "ab"}
    sets["b"] = dataclasses.replace(sets["b"], exhaustive=False)
    entry = read_metadata(build(folder, "marked", recipe(data_sets=sets, eval_fraction=0.0)))["splits"]["train"]
    assert entry["partial"] == ["b"]
    owners = {phrase: found["data_sets"] for phrase, found in entry["phrases"].items()}
    assert owners["red blood cell"] == ["a"] and "b" in owners["white blood cell"]


@pytest.mark.parametrize(("asked", "partial"), [(None, ["a"]), (True, [])])
def test_recipe_may_say_that_a_source_marks_everything(folder, monkeypatch, asked, partial):
    monkeypatch.setattr(PascalVOC, "EXHAUSTIVE", False, raising=False)
    data_set = DataSet(source="voc", input="a", modality="microscopy", exhaustive=asked)
    built = build(folder, "marked", recipe(data_sets={"a": data_set}, eval_fraction=0.0))
    assert read_metadata(built)["splits"]["train"]["partial"] == partial
