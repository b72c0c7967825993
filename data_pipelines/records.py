"""Records: encoded examples in ArrayRecord or TFRecord shards, written and read without TensorFlow.

A records directory is a TFDS directory (`tfds.builder_from_directory` opens it) with one file more, medglip.json:

    {"dataset": name, "format": "array_record" or "tfrecord",
     "splits": {split: {"num_examples", "shard_lengths", "shard_bytes", "labels": {label: regions},
                        "phrases": {phrase: {"label", "granularity", "count", "modalities", "data_sets"}},
                        "counts": {"clipped": n, "dropped": {reason: n}}}},
     "build": {"source", "skipped", "unused", ...}}
"""

import abc
import dataclasses
import json
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.codec import RecordsError, encode_example, parse_example
from data_pipelines.schema import GroundingExample
from data_pipelines.shards import SplitWriter, shard_name
from data_pipelines.tfds_metadata import write_tfds_metadata
from data_pipelines.tfrecord import index_records, read_record

__all__ = [
    "FORMATS",
    "METADATA_FILE",
    "Records",
    "RecordsError",
    "RecordsWriter",
    "encode_example",
    "find_shards",
    "open_source",
    "parse_example",
    "read_examples",
    "read_metadata",
    "write_records",
]
FORMATS = ("array_record", "tfrecord")
METADATA_FILE = "medglip.json"
_REBUILD = "copy it again from where it was built, or build it again"
_READ_AHEAD = 64  # records a sequential read asks for at once
SHARD_BYTES = 256 * 2**20  # of a full shard, where no number of shards is asked for


@dataclasses.dataclass(frozen=True)
class Records:
    """The shards of one split.

    Attributes:
        directory: the records directory.
        split: name of the split.
        format: array_record or tfrecord.
        shards: paths of the shards, in order.
        shard_lengths: examples in each of them.
        metadata: the split's entry of medglip.json.
    """

    directory: str
    split: str
    format: str
    shards: tuple[str, ...]
    shard_lengths: tuple[int, ...]
    metadata: dict[str, Any]

    @property
    def num_examples(self) -> int:
        return sum(self.shard_lengths)

    def locate(self, index: int) -> str:
        """Names the shard and the place in it of an example, for error messages."""
        ends = np.cumsum(self.shard_lengths)
        shard = int(np.searchsorted(ends, index, side="right"))
        return f"{self.shards[shard]}, record {index - int(ends[shard]) + self.shard_lengths[shard]}"


class RecordSource(Protocol):
    """Random access to the encoded examples of a split; picklable, and safe to read from several threads."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> bytes: ...
    def __getitems__(self, indices: Sequence[int]) -> list[bytes]: ...


def read_metadata(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of a records directory's medglip.json.

    Raises:
        RecordsError: there is none, or it is damaged.
    """
    path = pathlib.Path(directory) / METADATA_FILE
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["format"] not in FORMATS or not isinstance(metadata["splits"], dict):
            raise KeyError
    except (FileNotFoundError, NotADirectoryError):
        raise RecordsError(
            f"{directory} holds no records: there is no {METADATA_FILE} in it; "
            "build some with `python -m data_pipelines.build --source ... --input DIR --output DIR`"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise RecordsError(f"{path} is damaged: {_REBUILD}") from None
    return metadata


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON under another name until it is whole."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staging, path)


def find_shards(path: str | os.PathLike) -> Records:
    """Finds the shards of "DIR" or "DIR:SPLIT" and checks that they are all there, whole.

    Raises:
        RecordsError: no records there, no such split, several splits and none named, or a shard that is missing or
            not as long as it was when it was built; the message names it.
    """
    directory, split = os.fspath(path), ""
    if not os.path.isdir(directory) and ":" in directory:
        directory, split = directory.rsplit(":", 1)
    metadata = read_metadata(directory)
    splits = metadata["splits"]
    if not split and len(splits) != 1:
        raise RecordsError(
            f"{directory} holds the splits {', '.join(splits)}: name one, as {directory}:{next(iter(splits), 'train')}"
        )
    split = split or next(iter(splits))
    if split not in splits:
        raise RecordsError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")
    entry = splits[split]
    count = len(entry["shard_lengths"])
    shards = []
    for index, expected in enumerate(entry["shard_bytes"]):
        shard = os.path.join(directory, shard_name(metadata["dataset"], split, metadata["format"], index, count))
        if not os.path.isfile(shard):
            raise RecordsError(f"record shard {shard} is missing: {_REBUILD}")
        if (size := os.path.getsize(shard)) != expected:
            state = "cut short" if size < expected else "changed"
            raise RecordsError(f"record shard {shard} was {state}: {size} bytes, {expected} when built; {_REBUILD}")
        shards.append(shard)
    return Records(directory, split, metadata["format"], tuple(shards), tuple(entry["shard_lengths"]), entry)


def find_all_shards(train: str) -> list[Records]:
    """Finds the records of "DIR[:SPLIT],DIR[:SPLIT],...", as in `config.data.train`.

    Raises:
        RecordsError: it is empty; or see `find_shards`.
    """
    if not train.strip():
        raise RecordsError("config.data.train is empty: set it to the records to train on, DIR or DIR:SPLIT")
    if os.path.isdir(train) or os.path.isdir(train.rpartition(":")[0]):  # a comma may be part of a name
        return [find_shards(train)]
    return [find_shards(path.strip()) for path in train.split(",") if path.strip()]


class _Source(abc.ABC):
    """What both formats share: bounds, and errors that name the shard."""

    def __init__(self, records: Records):
        self._records = records

    def __len__(self) -> int:
        return self._records.num_examples

    def __getitem__(self, index: int) -> bytes:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
        positions = [operator.index(index) for index in indices]
        for position in positions:
            if not 0 <= position < len(self):
                raise IndexError(f"{self!r} has no record {position}")
        try:
            return self._read(positions)
        except (RuntimeError, ValueError, OSError) as error:
            if len(positions) > 1:  # read one by one to learn which it is
                return [self[position] for position in positions]
            raise RecordsError(f"{self._records.locate(positions[0])}: damaged ({error}); {_REBUILD}") from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records.directory}:{self._records.split}, {len(self)} records)"

    @abc.abstractmethod
    def _read(self, positions: list[int]) -> list[bytes]: ...


class _ArrayRecordSource(_Source):
    def __init__(self, records: Records):
        super().__init__(records)
        from array_record.python import array_record_data_source
        from array_record.python.array_record_module import ArrayRecordReader  # pyright: ignore[reportAttributeAccessIssue]

        for shard, expected in zip(records.shards, records.shard_lengths, strict=True):
            reader = ArrayRecordReader(shard)
            found = reader.num_records() if reader.ok() else 0  # a reader of a damaged file is open, but not ok
            if found != expected:
                raise RecordsError(f"record shard {shard} is damaged: {found} records, expected {expected}; {_REBUILD}")
            reader.close()
        self._source = array_record_data_source.ArrayRecordDataSource(list(records.shards))

    def _read(self, positions: list[int]) -> list[bytes]:
        if len(positions) == 1:  # its batched reads start threads
            return [self._source[positions[0]]]
        return list(self._source.__getitems__(positions))


class _TFRecordSource(_Source):
    def __init__(self, records: Records):
        super().__init__(records)
        indices = []
        for shard, expected in zip(records.shards, records.shard_lengths, strict=True):
            try:
                indices.append(index_records(shard))
            except ValueError as error:
                raise RecordsError(f"record shard {error}; {_REBUILD}") from None
            if len(indices[-1]) != expected:
                raise RecordsError(f"record shard {shard} has {len(indices[-1])} records, not {expected}; {_REBUILD}")
        self._entries = np.concatenate(indices)  # int64[N, 2]: offset and length
        self._ends = np.cumsum(records.shard_lengths)
        self._descriptors = self._open()

    def _open(self) -> list[int]:
        return [os.open(shard, os.O_RDONLY) for shard in self._records.shards]

    def _read(self, positions: list[int]) -> list[bytes]:
        shards = np.searchsorted(self._ends, positions, side="right")
        return [
            read_record(self._descriptors[shard], *self._entries[position].tolist())
            for shard, position in zip(shards, positions, strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._descriptors = self._open()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors") or ():
            os.close(descriptor)


def open_source(records: Records) -> RecordSource:
    """Opens a split for random access: `len`, `source[i]` and `source.__getitems__([i, ...])` give encoded examples.

    TFRecord has no index, so opening one walks over the headers of its records once.

    Raises:
        RecordsError: a shard is damaged; the message names it. Reading a damaged record raises it too.
    """
    return (_ArrayRecordSource if records.format == "array_record" else _TFRecordSource)(records)


def read_examples(path: str | os.PathLike | Records) -> Iterator[GroundingExample]:
    """Yields the examples of "DIR" or "DIR:SPLIT" in the order of the shards.

    Raises:
        RecordsError: as `find_shards` and `open_source`; a malformed record is named by its shard and place.
    """
    records = path if isinstance(path, Records) else find_shards(path)
    source = open_source(records)
    for start in range(0, len(source), _READ_AHEAD):
        indices = range(start, min(start + _READ_AHEAD, len(source)))
        for index, record in zip(indices, source.__getitems__(indices), strict=True):
            try:
                yield parse_example(record)
            except RecordsError as error:
                raise RecordsError(f"{records.locate(index)}: {error}") from error


class RecordsWriter:
    """Writes splits into a directory; nothing counts until `commit`, and leaving the `with` without it leaves no file.

    Args:
        directory: made if missing; if it holds records already, the new splits join them.
        name: of the data set: letters, digits and underscores, starting with a letter.
        file_format: array_record or tfrecord.
        num_shards: examples go to this many shards of a split in turn; 0 fills shards of `shard_bytes` one by one.
        shard_bytes: bytes of a full shard where `num_shards` is 0.

    Raises:
        RecordsError: a name or format is not usable, or does not match the records that are there already.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        name: str,
        file_format: str = "array_record",
        num_shards: int = 0,
        shard_bytes: int = SHARD_BYTES,
    ):
        if file_format not in FORMATS:
            raise RecordsError(f"unknown record format {file_format!r}; known: {', '.join(FORMATS)}")
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise RecordsError(f"data set name {name!r}: use letters, digits and underscores, starting with a letter")
        if num_shards < 0 or shard_bytes <= 0:
            raise RecordsError(f"num_shards={num_shards}, shard_bytes={shard_bytes}: must be positive")
        self._directory = pathlib.Path(directory)
        self._format, self._num_shards, self._shard_bytes = file_format, num_shards, shard_bytes
        self._metadata: dict[str, Any] = {"dataset": name, "format": file_format, "splits": {}}
        if (self._directory / METADATA_FILE).exists():
            self._metadata = read_metadata(self._directory)
            there = self._metadata["dataset"], self._metadata["format"]
            if there != (name, file_format):
                raise RecordsError(
                    f"{directory} holds {there[1]} records of {there[0]!r}, not {file_format} of {name!r}"
                )
        self._directory.mkdir(parents=True, exist_ok=True)
        self._splits: dict[str, SplitWriter] = {}

    def __enter__(self) -> "RecordsWriter":
        return self

    def __exit__(self, *unused_exception: Any) -> None:
        for writer in self._splits.values():
            writer.discard()

    def write(self, example: GroundingExample, split: str) -> None:
        """Adds an example to a split.

        Raises:
            RecordsError: the split is there already, or its name is not usable.
        """
        if split not in self._splits:
            if split in self._metadata["splits"]:
                raise RecordsError(f"{self._directory} already has a split {split!r}: choose another name or directory")
            if not re.fullmatch(r"\w+", split, re.ASCII):
                raise RecordsError(f"split name {split!r}: use letters, digits and underscores")
            prefix = self._directory / f".{self._metadata['dataset']}-{split}"
            self._splits[split] = SplitWriter(prefix, self._format, self._num_shards, self._shard_bytes)
        self._splits[split].write(example)

    def commit(self) -> dict[str, Any]:
        """Gives the shards their names and writes the metadata; returns the content of medglip.json."""
        entries = self._metadata["splits"]
        for split, writer in sorted(self._splits.items()):
            entries[split] = writer.finish(self._metadata["dataset"], split)
        write_tfds_metadata(
            self._directory,
            self._metadata["dataset"],
            self._format,
            {split: (entry["shard_lengths"], sum(entry["shard_bytes"])) for split, entry in entries.items()},
        )
        write_json(self._directory / METADATA_FILE, self._metadata)
        self._splits = {}
        return self._metadata


def write_records(
    examples: Iterable[GroundingExample],
    directory: str | os.PathLike,
    *,
    name: str,
    split: str = "train",
    file_format: str = "array_record",
    num_shards: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Records:
    """Writes examples as one split of a records directory; an error on the way leaves what was there untouched.

    Args: as `RecordsWriter`; with the default `num_shards` the order of the examples is kept.

    Raises:
        RecordsError: there are no examples, or as `RecordsWriter`.
    """
    with RecordsWriter(
        directory, name=name, file_format=file_format, num_shards=num_shards, shard_bytes=shard_bytes
    ) as writer:
        empty = True
        for example in examples:
            writer.write(example, split)
            empty = False
        if empty:
            raise RecordsError(f"no examples to write as {name} {split} into {directory}")
        writer.commit()
    return find_shards(f"{os.fspath(directory)}:{split}")
