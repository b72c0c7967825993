"""TFRecord files without TensorFlow: framing, checksums, and the index that makes them random access.

A record is `uint64 length, uint32 masked crc32c of those 8 bytes, the bytes, uint32 masked crc32c of the bytes`,
little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import os
import struct

import google_crc32c
import numpy as np

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def _masked_crc(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordWriter:
    """Writes records to a new file at `path`, with the interface of ArrayRecordWriter."""

    HEADER_BYTES = _HEADER.size  # before a record
    FRAME_BYTES = _HEADER.size + _FOOTER.size  # around a record

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it, as with ArrayRecordWriter

    def write(self, record: bytes) -> None:
        length = len(record).to_bytes(8, "little")
        self._file.write(length + _FOOTER.pack(_masked_crc(length)))
        self._file.write(record)  # by itself, so that it is not copied
        self._file.write(_FOOTER.pack(_masked_crc(record)))

    def close(self) -> None:
        self._file.close()


def index_records(path: str) -> np.ndarray:
    """Finds the records of a file by walking over their headers; the records themselves are not read.

    Returns:
        int64[n, 2]: offset of each record's bytes in the file, and their number.

    Raises:
        ValueError: the file ends inside a record, or a header's checksum is wrong; the message says where.
    """
    size = os.path.getsize(path)
    entries: list[tuple[int, int]] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while offset < size:
            header = os.pread(descriptor, _HEADER.size, offset)
            if len(header) < _HEADER.size:
                raise ValueError(f"{path}: ends inside the header of record {len(entries)} (byte {offset} of {size})")
            length, crc = _HEADER.unpack(header)
            if crc != _masked_crc(header[:8]):
                raise ValueError(f"{path}: wrong checksum in the header of record {len(entries)} (byte {offset})")
            start = offset + _HEADER.size
            offset = start + length + _FOOTER.size
            if offset > size:
                raise ValueError(f"{path}: ends inside record {len(entries)} ({size} bytes, {offset} expected)")
            entries.append((start, length))
    finally:
        os.close(descriptor)
    return np.asarray(entries, np.int64).reshape(-1, 2)


def read_record(descriptor: int, offset: int, length: int) -> bytes:
    """Returns the record at an entry of `index_records`; safe to call from several threads.

    Raises:
        ValueError: the bytes do not match their checksum.
    """
    record, footer = os.pread(descriptor, length, offset), os.pread(descriptor, _FOOTER.size, offset + length)
    if len(footer) != _FOOTER.size or _FOOTER.unpack(footer)[0] != _masked_crc(record):
        raise ValueError(f"the record at byte {offset} does not match its checksum")
    return record
