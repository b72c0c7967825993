import concurrent.futures
import errno
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.records import RecordsWriter, write_records
from data_pipelines.schema import GroundingExample
from data_pipelines.tfrecord import TFRecordWriter, index_records, read_record

RECORDS = [b"left lung", b"", b"nodule"]
FRAME = 8 + 4 + 4  # bytes around a record
ENDS = [0, *np.cumsum([len(record) + FRAME for record in RECORDS]).tolist()]


def write(path, records) -> str:
    writer = TFRecordWriter(path)
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def read(path: str) -> list[bytes]:
    entries = index_records(path)
    assert entries.dtype == np.int64 and entries.shape == (len(entries), 2)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return [read_record(descriptor, *entry) for entry in entries.tolist()]
    finally:
        os.close(descriptor)


@given(records=st.lists(st.binary(max_size=300), max_size=8))
def test_records_come_back_in_their_order(tmp_path_factory, records):
    path = write(tmp_path_factory.getbasetemp() / "any.tfrecord", records)
    assert read(path) == records


def test_file_cut_short_inside_a_record_is_an_error_that_names_the_place(tmp_path):
    path = write(tmp_path / "a.tfrecord", RECORDS)
    content = (tmp_path / "a.tfrecord").read_bytes()
    assert len(content) == ENDS[-1]
    for end in sorted(set(range(len(content))) - set(ENDS)):
        (tmp_path / "a.tfrecord").write_bytes(content[:end])
        record = np.searchsorted(ENDS, end) - 1
        with pytest.raises(ValueError, match=rf"a\.tfrecord: ends inside (the header of )?record {record} \("):
            index_records(path)


@pytest.mark.parametrize("whole", range(3))
def test_file_cut_between_records_has_fewer_of_them(tmp_path, whole):
    path = write(tmp_path / "a.tfrecord", RECORDS)
    os.truncate(path, ENDS[whole])
    assert read(path) == RECORDS[:whole]


def test_any_flipped_bit_is_detected(tmp_path):
    path = write(tmp_path / "a.tfrecord", RECORDS)
    content = (tmp_path / "a.tfrecord").read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            (tmp_path / "a.tfrecord").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"wrong checksum in the header of record \d|not match its checksum"):
                read(path)


def test_damage_to_one_record_leaves_the_others_readable(tmp_path):
    path = write(tmp_path / "a.tfrecord", RECORDS)
    content = bytearray((tmp_path / "a.tfrecord").read_bytes())
    content[12] ^= 1
    (tmp_path / "a.tfrecord").write_bytes(content)
    entries = index_records(path).tolist()
    with open(path, "rb") as file:
        with pytest.raises(ValueError, match="record at byte 12 does not match its checksum"):
            read_record(file.fileno(), *entries[0])
        assert [read_record(file.fileno(), *entry) for entry in entries[1:]] == RECORDS[1:]


def test_several_threads_read_from_one_descriptor(tmp_path):
    records = [bytes([value]) * (1000 * value + 1) for value in range(40)]
    path = write(tmp_path / "a.tfrecord", records)
    entries = index_records(path).tolist() * 5
    with open(path, "rb") as file, concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda entry: read_record(file.fileno(), *entry), entries))
    assert found == records * 5


class FullDisk:
    """A file on a full disk: closing it fails like writing to it."""

    def __init__(self, path):
        path.write_bytes(b"")

    def write(self, record: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_is_the_error_that_shows_and_leaves_no_shard(tmp_path, monkeypatch):
    example = GroundingExample(b"image", "0", "set", 1, 1)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        RecordsWriter(tmp_path, name="set", file_format="tfrecord") as writer,
    ):
        writer.write(example, "validation")
        monkeypatch.setattr("data_pipelines.shards.TFRecordWriter", FullDisk)
        writer.write(example, "train")
    assert caught.value.__context__ is None
    assert not list(tmp_path.iterdir())


def test_failure_while_committing_leaves_no_shard(tmp_path, monkeypatch):
    def fail(*unused):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data_pipelines.records.write_tfds_metadata", fail)
    with pytest.raises(OSError, match="No space left"):
        write_records([GroundingExample(b"image", "0", "set", 1, 1)], tmp_path, name="set", file_format="tfrecord")
    assert not list(tmp_path.iterdir())
