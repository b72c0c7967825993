"""Parts: the examples of one unit of work, encoded, and beside them what planning must know about each."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipelines.codec import RecordsError
from data_pipelines.tfrecord import TFRecordWriter, read_record

Entry = tuple[str, str, str, bool]  # phrase, label, granularity, is crowd

ARRAYS = {
    "offsets": np.int64,
    "lengths": np.int64,
    "digests": np.uint64,
    "looks": np.uint64,
    "annotations": np.uint64,
    "thumbnails": np.uint8,
    "modalities": np.int8,
    "held_out": np.bool_,
    "clipped": np.int64,
    "phrase_counts": np.int64,
    "phrases": np.int64,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """What is known about the N examples of a part.

    Attributes:
        path: of the encoded examples.
        offsets, lengths: int64[N], bytes of each of them in that file.
        digests: uint64[N], of the encoded image.
        looks: uint64[N], perceptual hashes.
        annotations: uint64[N], digests of labels and boxes.
        thumbnails: uint8[N, 32, 32].
        modalities: int8[N], positions in `schema.MODALITIES`.
        held_out: bool[N].
        clipped: int64[N], boxes that were clipped.
        phrase_counts: int64[N], regions of each example.
        phrases: int64[all regions], positions in `vocabulary`.
        vocabulary: (phrase, label, granularity, is crowd) of the regions.
        keys: of each example its patient or, without one, the image.
        dropped: regions that were left out of an example, by its row and by reason.
        counts: of the whole part: "dropped", "expressions" and "unmapped", by name; "conflicts" as a report.
        skipped: why images were left out.
    """

    path: pathlib.Path
    offsets: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    looks: np.ndarray
    annotations: np.ndarray
    thumbnails: np.ndarray
    modalities: np.ndarray
    held_out: np.ndarray
    clipped: np.ndarray
    phrase_counts: np.ndarray
    phrases: np.ndarray
    vocabulary: list[Entry]
    keys: list[str]
    dropped: dict[int, dict[str, int]]
    counts: dict[str, Any]
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.lengths)


class PartWriter:
    """Writes a part; it counts as there from `finish` on.

    Args:
        path: of the encoded examples; what is known about them goes to the same name with the suffix .npz.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._staging = path.with_name(f".{path.name}.{os.getpid()}")
        self._writer = TFRecordWriter(self._staging)
        self._offset = 0
        self._rows: list[dict[str, Any]] = []
        self._offsets: list[int] = []
        self._vocabulary: dict[Entry, int] = {}
        self.dropped: dict[int, dict[str, int]] = {}
        self.skipped: list[str] = []
        self.counts: dict[str, Any] = {}

    def add(self, record: bytes, phrases: list[Entry], dropped: dict[str, int], **known: Any) -> None:
        """Adds an example with the fields of `Part` that are `known` about it, in the singular."""
        self._writer.write(record)
        self._offsets.append(self._offset + TFRecordWriter.HEADER_BYTES)
        self._offset += len(record) + TFRecordWriter.FRAME_BYTES
        if dropped:
            self.dropped[len(self._rows)] = dict(dropped)
        places = [self._vocabulary.setdefault(phrase, len(self._vocabulary)) for phrase in phrases]
        self._rows.append({**known, "length": len(record), "phrases": places})

    def finish(self) -> None:
        """Gives the part its name. It is there when its index is."""
        self._writer.close()
        os.replace(self._staging, self._path)
        rows = self._rows
        texts = {
            "vocabulary": list(self._vocabulary),
            "keys": [row["key"] for row in rows],
            "dropped": self.dropped,
            "counts": self.counts,
            "skipped": self.skipped,
        }
        columns = {
            "offsets": self._offsets,
            "lengths": [row["length"] for row in rows],
            "digests": [row["digest"] for row in rows],
            "looks": [row["look"] for row in rows],
            "annotations": [row["annotation"] for row in rows],
            "thumbnails": [row["thumbnail"] for row in rows],
            "modalities": [row["modality"] for row in rows],
            "held_out": [row["held_out"] for row in rows],
            "clipped": [row["clipped"] for row in rows],
            "phrase_counts": [len(row["phrases"]) for row in rows],
            "phrases": [place for row in rows for place in row["phrases"]],
        }
        arrays = {name: np.asarray(values, ARRAYS[name]) for name, values in columns.items()}
        # Texts may hold lone surrogates (file names of another encoding), which ASCII JSON keeps.
        arrays["texts"] = np.frombuffer(json.dumps(texts).encode("ascii"), np.uint8)
        with open(self._staging, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(self._staging, index_path(self._path))

    def discard(self) -> None:
        """Removes what was written, if `finish` was not reached."""
        self._writer.close()
        self._staging.unlink(missing_ok=True)


def index_path(path: pathlib.Path) -> pathlib.Path:
    """Returns where a part's index lies; the part is complete when it exists."""
    return path.with_suffix(".npz")


def load_part(path: pathlib.Path, pictures: bool = True) -> Part:
    """Reads the index of a part; without its thumbnails, which are most of it, if they are not wanted."""
    with np.load(index_path(path), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files if pictures or name != "thumbnails"}
    arrays.setdefault("thumbnails", np.zeros(0, np.uint8))
    texts = json.loads(arrays.pop("texts").tobytes())
    texts["vocabulary"] = [tuple(entry) for entry in texts["vocabulary"]]
    texts["dropped"] = {int(row): reasons for row, reasons in texts["dropped"].items()}
    arrays["thumbnails"] = arrays["thumbnails"].reshape(-1, 32, 32)
    return Part(path=path, **arrays, **texts)


class PartReader:
    """Reads encoded examples of several parts, the few last used of which are kept open."""

    def __init__(self, most_open: int = 16):
        self._most_open = most_open
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(self, *unused_exception: Any) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Returns an encoded example.

        Raises:
            RecordsError: its bytes do not match their checksum.
        """
        if path not in self._descriptors:
            if len(self._descriptors) >= self._most_open:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        try:
            return read_record(self._descriptors[path], offset, length)
        except ValueError as error:
            raise RecordsError(f"{path}: {error}; remove this folder and build again") from None
