import dataclasses
import io
import json
import os
import pathlib
import pickle

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.records import (
    FORMATS,
    RecordsError,
    RecordsWriter,
    encode_example,
    find_shards,
    open_source,
    parse_example,
    read_examples,
    write_records,
)
from data_pipelines.schema import GRANULARITIES, MODALITIES, GroundingExample, Region
from data_pipelines.tfrecord import TFRecordWriter, index_records


def png(value: int, height: int = 5, width: int = 7) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@st.composite
def examples(draw):
    height, width = draw(st.integers(1, 2**31)), draw(st.integers(1, 2**31))
    spans = st.tuples(st.integers(0, 99), st.integers(0, 99))
    regions = st.builds(
        Region,
        box=st.lists(st.floats(width=32, allow_nan=False), min_size=4, max_size=4).map(lambda b: np.float32(b)),
        phrase=st.text(),
        label=st.text(),
        granularity=st.sampled_from(GRANULARITIES),
        parent=st.text(),
        mask=st.none() | st.binary(min_size=1).map(lambda counts: {"size": [height, width], "counts": counts}),
        iscrowd=st.booleans(),
        spans=st.lists(spans, max_size=3).map(tuple),
    )
    return draw(
        st.builds(
            GroundingExample,
            image=st.binary(),
            image_id=st.text(),
            dataset=st.text(),
            height=st.just(height),
            width=st.just(width),
            patient_id=st.text(),
            modality=st.sampled_from(MODALITIES),
            spacing_mm=st.tuples(*[st.floats(0, 100, width=32)] * 2),
            caption=st.text(),
            regions=st.lists(regions, max_size=4).map(tuple),
            absent=st.lists(st.text(), max_size=3).map(tuple),
        )
    )


def fields(example: GroundingExample) -> dict:
    """The example as plain values, which compare."""
    return dataclasses.asdict(
        dataclasses.replace(
            example, regions=tuple(dataclasses.replace(r, box=np.asarray(r.box).tolist()) for r in example.regions)
        )
    )


def some_examples(count: int) -> list[GroundingExample]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(count):
        boxes = rng.uniform(0, 5, (index % 3, 4)).astype(np.float32)
        regions = tuple(
            Region(box, f"lésion {i}", "lesion", "lesion", mask={"size": [5, 7], "counts": b"\xff01"} if i else None)
            for i, box in enumerate(boxes)
        )
        made.append(GroundingExample(png(index), f"image {index}", "set", 5, 7, modality="ct", regions=regions))
    return made


@given(examples())
def test_parsing_gives_back_what_was_encoded(example):
    parsed = parse_example(encode_example(example))
    assert fields(parsed) == fields(example)
    assert all(region.box.dtype == np.float32 for region in parsed.regions)


@given(st.binary())
def test_malformed_bytes_are_a_clear_error(content):
    with pytest.raises(RecordsError, match="malformed record"):
        parse_example(content)


@given(st.integers(0, 400))
def test_record_cut_short_is_a_clear_error(end):
    record = encode_example(some_examples(3)[2])
    with pytest.raises(RecordsError, match="malformed record"):
        parse_example(record[: min(end, len(record) - 1)])


def test_mask_of_another_size_is_not_encoded():
    region = Region(np.zeros(4, np.float32), "lung", "lung", mask={"size": [7, 5], "counts": b"0"})
    with pytest.raises(RecordsError, match=r"\[7, 5\]"):
        encode_example(dataclasses.replace(some_examples(1)[0], regions=(region,)))


@pytest.fixture(params=FORMATS)
def written(request, tmp_path):
    """Ten examples in three shards."""
    made = some_examples(10)
    found = write_records(made, tmp_path / "set", name="set", file_format=request.param, num_shards=3)
    return made, found


def test_formats_hold_the_same_records(tmp_path):
    contents = []
    for file_format in FORMATS:
        write_records(some_examples(10), tmp_path / file_format, name="set", file_format=file_format, num_shards=3)
        contents.append(open_source(find_shards(tmp_path / file_format)).__getitems__(range(10)))
    assert contents[0] == contents[1]


def test_random_access_in_any_order_and_after_pickling(written):
    _, found = written
    source = open_source(found)
    in_order = [encode_example(example) for example in read_examples(found)]
    assert len(source) == found.num_examples == 10
    for reader in (source, pickle.loads(pickle.dumps(source))):
        assert [reader[i] for i in (9, 0, 4)] == reader.__getitems__([9, 0, 4]) == [in_order[i] for i in (9, 0, 4)]
    with pytest.raises(IndexError):
        source[10]


def test_shards_fill_one_by_one_and_keep_the_order(tmp_path):
    made = some_examples(10)
    size = 3 * len(encode_example(made[-1]))
    found = write_records(made, tmp_path, name="set", file_format="tfrecord", shard_bytes=size)
    assert len(found.shards) > 2
    assert [fields(example) for example in read_examples(found)] == [fields(example) for example in made]


def test_metadata_counts_phrases(written):
    _, found = written
    assert found.metadata["phrases"]["lésion 0"] == {
        "label": "lesion",
        "granularity": "lesion",
        "count": 6,
        "modalities": ["ct"],
        "data_sets": ["set"],
    }
    assert found.metadata["labels"] == {"lesion": 9}


def test_grain_reads_both_formats(written):
    _, found = written
    if found.format == "array_record":
        source = grain.sources.ArrayRecordDataSource(list(found.shards))
        content = [source[i] for i in range(len(source))]
    else:
        content = [record for shard in found.shards for record in grain.experimental.TFRecordIterDataset(shard)]
    assert content == [encode_example(example) for example in read_examples(found)]


def test_tfds_opens_the_directory_and_sees_the_same(written):
    import tensorflow_datasets as tfds

    _, found = written
    builder = tfds.builder_from_directory(found.directory)
    assert builder.info.splits["train"].num_examples == 10
    if found.format == "tfrecord":
        return  # TFDS itself reads those with TensorFlow only
    for example, seen in zip(read_examples(found), builder.as_data_source(split="train"), strict=True):
        assert seen["image_id"].decode() == example.image_id
        assert seen["image"].shape == (5, 7, 3)
        assert [phrase.decode() for phrase in seen["regions"]["phrase"]] == [r.phrase for r in example.regions]
        boxes = np.reshape(seen["regions"]["box"], (-1, 4))
        np.testing.assert_array_equal(boxes, np.reshape([r.box for r in example.regions], (-1, 4)))


def forget_sizes(found):
    """Makes the metadata agree with the files' sizes, so that only reading shows the damage."""
    path = pathlib.Path(found.directory) / "medglip.json"
    metadata = json.loads(path.read_text())
    metadata["splits"]["train"]["shard_bytes"] = [os.path.getsize(shard) for shard in found.shards]
    path.write_text(json.dumps(metadata))


def test_shard_cut_in_half_is_an_error_that_names_it(written):
    _, found = written
    with open(found.shards[1], "r+b") as file:
        file.truncate(os.path.getsize(found.shards[1]) // 2)
    with pytest.raises(RecordsError, match=r"00001-of-00003 was cut short"):
        find_shards(found.directory)
    forget_sizes(found)
    with pytest.raises(RecordsError, match=r"00001-of-00003"):
        open_source(find_shards(found.directory))


def test_damaged_record_is_an_error_that_names_its_shard(written):
    made, found = written
    shard = pathlib.Path(found.shards[1])
    content = bytearray(shard.read_bytes())
    content[200] ^= 1  # inside the first record
    shard.write_bytes(content)
    source = open_source(find_shards(found.directory))
    with pytest.raises(RecordsError, match=r"00001-of-00003, record 0: damaged"):
        source.__getitems__(range(10))
    assert parse_example(source[0]).image_id == made[0].image_id


def test_malformed_record_is_named_when_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.shards.encode_example", lambda example: b"\x07garbage")
    write_records(some_examples(1), tmp_path, name="set")
    with pytest.raises(RecordsError, match=r"00000-of-00001, record 0: malformed"):
        list(read_examples(tmp_path))


def test_missing_shard_is_an_error_that_names_it(written):
    _, found = written
    os.unlink(found.shards[2])
    with pytest.raises(RecordsError, match=r"00002-of-00003 is missing"):
        find_shards(found.directory)


def test_splits_are_named_where_there_are_several(written):
    made, found = written
    write_records(made[:2], found.directory, name="set", split="validation", file_format=found.format)
    with pytest.raises(RecordsError, match="the splits train, validation: name one"):
        find_shards(found.directory)
    with pytest.raises(RecordsError, match="no split 'test'"):
        find_shards(f"{found.directory}:test")
    assert find_shards(f"{found.directory}:validation").num_examples == 2
    assert find_shards(f"{found.directory}:train") == found


def test_no_records_and_damaged_metadata_are_clear_errors(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecordsError, match="holds no records"):
            find_shards(path)
    (tmp_path / "medglip.json").write_text('{"dataset"')
    with pytest.raises(RecordsError, match="is damaged"):
        find_shards(tmp_path)


def test_existing_split_and_other_data_set_are_refused(written):
    made, found = written
    before = sorted(os.listdir(found.directory))
    with pytest.raises(RecordsError, match="already has a split 'train'"):
        write_records(made, found.directory, name="set", file_format=found.format)
    with pytest.raises(RecordsError, match=r"not (tfrecord|array_record) of 'other'"):
        write_records(made, found.directory, name="other", file_format=found.format, split="more")
    assert sorted(os.listdir(found.directory)) == before


def test_failure_on_the_way_leaves_no_files(tmp_path):
    def failing():
        yield from some_examples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(failing(), tmp_path, name="set")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecordsError, match="no examples"):
        write_records([], tmp_path, name="set")


@pytest.mark.parametrize(
    "options",
    [{"name": "no dash-es"}, {"name": ""}, {"name": "set", "file_format": "csv"}, {"name": "s", "num_shards": -1}],
)
def test_unusable_names_and_formats_are_refused(tmp_path, options):
    with pytest.raises(RecordsError):
        RecordsWriter(tmp_path, **options)


def test_tfrecord_header_with_a_wrong_checksum_is_an_error(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes((3).to_bytes(8, "little") + bytes(4 + 3 + 4))
    with pytest.raises(ValueError, match="wrong checksum in the header of record 0"):
        index_records(str(path))


def test_tfrecord_bytes_are_those_that_tensorflow_writes(tmp_path):
    writer = TFRecordWriter(tmp_path / "a.tfrecord")
    writer.write(b"medglip")
    writer.write(b"")
    writer.close()
    written_by_tensorflow = "0700000000000000bbd79f116d6564676c6970ede82608000000000000000029039807d8ea82a2"
    assert (tmp_path / "a.tfrecord").read_bytes().hex() == written_by_tensorflow
    assert index_records(str(tmp_path / "a.tfrecord")).tolist() == [[12, 7], [35, 0]]
