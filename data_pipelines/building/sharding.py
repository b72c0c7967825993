"""Shards: planned as places in parts, written from them in any order, each with a marker that says it is whole."""

import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipelines.building.parts import PartReader
from data_pipelines.shards import hash_file, open_shard_writer, shard_name


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard of N examples.

    Attributes:
        path: of the shard.
        format: array_record or tfrecord.
        parts: paths of the parts that its examples are in.
        part: int64[N], positions in `parts`.
        offsets, lengths: int64[N], bytes in the part.
    """

    path: str
    format: str
    parts: tuple[str, ...]
    part: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @property
    def marker(self) -> pathlib.Path:
        """File that is there when the shard is whole; it holds the shard's size and checksum."""
        path = pathlib.Path(self.path)
        return path.with_name(f".{path.name}.json")


def split_shards(lengths: np.ndarray, shard_bytes: int, num_shards: int) -> list[slice]:
    """Cuts a series of records into shards.

    Args:
        lengths: int64[N], bytes of the records, at least one.
        shard_bytes: a shard takes records as long as they fit; one that is larger has its own.
        num_shards: shards of equal numbers of records instead (fewer if there are fewer records); 0 for by size.
    """
    count = len(lengths)
    if num_shards:
        bounds = np.linspace(0, count, min(num_shards, count) + 1).round().astype(int).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]
    ends = np.cumsum(lengths)
    shards, start = [], 0
    while start < count:
        before = int(ends[start] - lengths[start])
        stop = max(int(np.searchsorted(ends, before + shard_bytes, side="right")), start + 1)
        shards.append(slice(start, stop))
        start = stop
    return shards


def write_shard(unused_context: Any, task: ShardTask) -> None:
    """Writes a shard and its marker, each under another name until it is whole."""
    path = pathlib.Path(task.path)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        writer = open_shard_writer(staging, task.format)
        try:
            with PartReader() as reader:
                for part, offset, length in zip(
                    task.part.tolist(), task.offsets.tolist(), task.lengths.tolist(), strict=True
                ):
                    writer.write(reader.read(task.parts[part], offset, length))
        finally:
            writer.close()
        content = {"bytes": staging.stat().st_size, "sha256": hash_file(staging)}
        os.replace(staging, path)
        staging.write_text(json.dumps(content), encoding="ascii")
        os.replace(staging, task.marker)
    finally:
        staging.unlink(missing_ok=True)


def make_tasks(
    folder: pathlib.Path, name: str, split: str, file_format: str, rows: Any, shards: list[slice]
) -> list[ShardTask]:
    """Makes the tasks of a split; `rows` has `paths`, `part`, `offsets` and `lengths` of its examples in order."""
    tasks = []
    for index, shard in enumerate(shards):
        used, part = np.unique(rows.part[shard], return_inverse=True)
        tasks.append(
            ShardTask(
                path=str(folder / shard_name(name, split, file_format, index, len(shards))),
                format=file_format,
                parts=tuple(rows.paths[i] for i in used.tolist()),
                part=part,
                offsets=rows.offsets[shard],
                lengths=rows.lengths[shard],
            )
        )
    return tasks
