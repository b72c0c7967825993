import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.building.parts import PartReader, PartWriter, index_path, load_part
from data_pipelines.building.sharding import ShardTask, split_shards, write_shard
from data_pipelines.shards import hash_file
from data_pipelines.tfrecord import index_records

KNOWN = {
    "digest": 2**63 + 1,
    "look": 5,
    "annotation": 7,
    "modality": 3,
    "held_out": True,
    "clipped": 2,
    "key": "patient \udcff",
}


def write_part(path, records):
    writer = PartWriter(path)
    for record in records:
        writer.add(record, [("left lung", "left_lung", "organ", False)], {"no area": 1}, thumbnail=np.eye(32), **KNOWN)
    writer.skipped.append("a.png: cut short")
    writer.finish()
    return load_part(path)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(0, 7))
def test_shards_take_every_record_once_and_as_many_as_fit(lengths, shard_bytes, num_shards):
    shards = split_shards(np.asarray(lengths), shard_bytes, num_shards)
    assert [i for shard in shards for i in range(shard.start, shard.stop)] == list(range(len(lengths)))
    sizes = [sum(lengths[shard]) for shard in shards]
    if num_shards:
        assert len(shards) == min(num_shards, len(lengths))
        assert max(s.stop - s.start for s in shards) - min(s.stop - s.start for s in shards) <= 1
        return
    for shard, size, following in zip(shards, sizes, [*shards[1:], None], strict=True):
        assert size <= shard_bytes or shard.stop - shard.start == 1
        assert following is None or size + lengths[following.start] > shard_bytes


def test_part_gives_back_what_was_written(tmp_path):
    part = write_part(tmp_path / "0.part", [b"first", b"second one"])
    assert len(part) == 2
    assert part.keys == ["patient \udcff"] * 2
    assert part.digests.tolist() == [2**63 + 1] * 2
    assert part.vocabulary == [("left lung", "left_lung", "organ", False)]
    assert (part.dropped[1], part.skipped) == ({"no area": 1}, ["a.png: cut short"])
    np.testing.assert_array_equal(part.thumbnails[1], np.eye(32))
    with PartReader() as reader:
        places = zip(part.offsets.tolist(), part.lengths.tolist(), strict=True)
        assert [reader.read(str(part.path), *place) for place in places] == [b"first", b"second one"]


def test_part_without_examples_can_be_loaded(tmp_path):
    part = write_part(tmp_path / "0.part", [])
    assert (len(part), part.thumbnails.shape, part.skipped) == (0, (0, 32, 32), ["a.png: cut short"])


def test_part_that_is_not_finished_is_not_there(tmp_path):
    writer = PartWriter(tmp_path / "0.part")
    writer.add(b"first", [], {}, thumbnail=np.eye(32), **KNOWN)
    writer.discard()
    assert not list(tmp_path.iterdir())
    assert not index_path(tmp_path / "0.part").exists()


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_shard_holds_its_records_in_order_and_is_marked(tmp_path, file_format):
    parts = [write_part(tmp_path / f"{i}.part", [b"%d-%d" % (i, j) for j in range(3)]) for i in range(2)]
    places = [(1, 2), (0, 1), (1, 0)]
    task = ShardTask(
        str(tmp_path / "shard"),
        file_format,
        tuple(str(part.path) for part in parts),
        np.asarray([i for i, _ in places]),
        np.asarray([parts[i].offsets[j] for i, j in places]),
        np.asarray([parts[i].lengths[j] for i, j in places]),
    )
    write_shard(None, task)
    assert f'"sha256": "{hash_file(tmp_path / "shard")}"' in task.marker.read_text()
    if file_format == "tfrecord":
        content = (tmp_path / "shard").read_bytes()
        found = [content[start : start + size] for start, size in index_records(str(tmp_path / "shard")).tolist()]
    else:
        from array_record.python.array_record_module import ArrayRecordReader

        found = list(ArrayRecordReader(str(tmp_path / "shard")).read_all())
    assert found == [b"%d-%d" % place for place in places]
    assert not list(tmp_path.glob(".shard.[0-9]*"))


def test_damaged_part_stops_the_shard_and_leaves_nothing(tmp_path):
    part = write_part(tmp_path / "0.part", [b"first"])
    content = bytearray(part.path.read_bytes())
    content[part.offsets[0]] ^= 1
    part.path.write_bytes(content)
    task = ShardTask(
        str(tmp_path / "shard"), "tfrecord", (str(part.path),), np.zeros(1, int), part.offsets, part.lengths
    )
    with pytest.raises(ValueError, match="checksum"):
        write_shard(None, task)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "0.part"]
