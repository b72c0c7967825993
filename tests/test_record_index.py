import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.record_index import IndexBuilder, RecordIndex, concatenate, index_name, read_index
from data_pipelines.records import RecordsError, find_shards, write_records
from data_pipelines.schema import MODALITIES, GroundingExample, Region


def make_example(dataset="set", modality="ct", labels=(), crowd=()) -> GroundingExample:
    box = np.asarray([0, 0, 1, 1], np.float32)
    regions = [Region(box, label, label) for label in labels] + [Region(box, x, x, iscrowd=True) for x in crowd]
    return GroundingExample(
        image=b"", image_id="i", dataset=dataset, height=2, width=2, modality=modality, regions=tuple(regions)
    )


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
examples = st.builds(make_example, names, st.sampled_from(MODALITIES), st.lists(names, max_size=4))


def build(contents) -> RecordIndex:
    builder = IndexBuilder()
    for example in contents:
        builder.add(example)
    return builder.finish()


def assert_equal(found: RecordIndex, expected: RecordIndex) -> None:
    for field in dataclasses.fields(RecordIndex):
        value, other = getattr(found, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(value, other)
        assert isinstance(other, tuple) or value.dtype == other.dtype


def described(index: RecordIndex) -> list[tuple]:
    ends = index.label_offsets
    return [
        (
            index.datasets[index.dataset[i]],
            MODALITIES[index.modality[i]],
            [index.label_names[k] for k in index.label_ids[ends[i] : ends[i + 1]]],
        )
        for i in range(len(index))
    ]


def test_index_says_data_set_modality_and_distinct_labels_without_crowds():
    contents = [make_example("a", "xray", ["x", "y", "x"]), make_example("b"), make_example("a", "ct", ["z"], ["y"])]
    assert described(build(contents)) == [("a", "xray", ["x", "y"]), ("b", "ct", []), ("a", "ct", ["z"])]


@settings(max_examples=25)
@given(st.lists(st.lists(examples, max_size=3), max_size=3))
def test_joined_indices_are_the_index_of_all_records(parts):
    assert_equal(concatenate([build(part) for part in parts]), build([x for part in parts for x in part]))


@settings(max_examples=25)
@given(st.lists(examples, max_size=4))
def test_saved_index_is_read_back_and_has_the_same_bytes_each_time(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("index")
    index = build(contents)
    index.save(folder / "a.npz")
    assert_equal(RecordIndex.load(folder / "a.npz"), index)
    build(contents).save(folder / "b.npz")
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", "b.npz"]


CONTENTS = [make_example("a", labels=["x", "y"]), make_example("b", "mri"), make_example("a", "ct", ["y"])]


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_records_without_an_index_are_read_for_it_in_the_order_of_the_shards(tmp_path, file_format):
    records = write_records(CONTENTS, tmp_path, name="set", file_format=file_format, num_shards=2)
    assert_equal(read_index(records), build([CONTENTS[0], CONTENTS[2], CONTENTS[1]]))


def test_index_beside_the_shards_is_used(tmp_path, caplog):
    records = write_records(CONTENTS, tmp_path, name="set")
    other = [make_example("other")] * 3
    build(other).save(tmp_path / index_name("set", "train"))
    assert_equal(read_index(records), build(other))
    assert not caplog.records


@pytest.mark.parametrize("wrong", [build(CONTENTS[:2]), b"no index", b""])
def test_index_that_does_not_fit_is_logged_and_not_used(tmp_path, caplog, wrong):
    records = write_records(CONTENTS, tmp_path, name="set")
    path = tmp_path / index_name("set", "train")
    wrong.save(path) if isinstance(wrong, RecordIndex) else path.write_bytes(wrong)
    with caplog.at_level(logging.WARNING):
        assert_equal(read_index(records), build(CONTENTS))
    assert str(path) in caplog.text


def test_record_that_cannot_be_read_counts_without_labels(tmp_path):
    records = write_records([make_example("a", "mri", ["x"])] * 3, tmp_path, name="set", file_format="tfrecord")
    with open(records.shards[0], "r+b") as file:
        content = file.read()
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 0xFF]))
    assert described(read_index(find_shards(str(tmp_path)))) == [
        ("a", "mri", ["x"]),
        ("set", "unknown", []),
        ("a", "mri", ["x"]),
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"dataset": np.asarray([0, 0, 2], np.int32)}, "dataset has values outside 0 to 1"),
        ({"modality": np.zeros(2, np.int8)}, "different lengths"),
        ({"label_ids": np.zeros(1, np.int32)}, "do not span"),
        ({"label_offsets": np.asarray([0, 3, 2, 3])}, "fall"),
    ],
)
def test_index_that_contradicts_itself_is_refused(tmp_path, change, complaint):
    dataclasses.replace(build(CONTENTS), **change).save(tmp_path / "x.npz")
    with pytest.raises(RecordsError, match=f"x.npz is no index of records.*{complaint}.*remove it"):
        RecordIndex.load(tmp_path / "x.npz")
