"""What each record of a split is, without its pixels: data set, modality and labels, for sampling and for counting.

It lies beside the shards as NAME-SPLIT.index.npz; 20 bytes a record and 4 for each of its labels.
"""

import array
import dataclasses
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines.records import Records, RecordsError, open_source, parse_example, read_metadata
from data_pipelines.schema import MODALITIES, GroundingExample

_READ_AHEAD = 64  # records that a scan asks for at once
_NAMES = ("datasets", "label_names")
_TYPES = {"dataset": np.int32, "modality": np.int8, "label_offsets": np.int64, "label_ids": np.int32}

_log = logging.getLogger(__name__)


def index_name(dataset: str, split: str) -> str:
    """Returns the file name of a split's index; `dataset` as in the names of the shards."""
    return f"{dataset}-{split}.index.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class RecordIndex:
    """The N records of a split, in the order of their places.

    Attributes:
        datasets: names of the D data sets, in order of appearance.
        dataset: int32[N], places in `datasets`.
        modality: int8[N], places in `schema.MODALITIES`.
        label_names: the L labels, in order of appearance.
        label_offsets: int64[N + 1]; the labels of record i are `label_ids[label_offsets[i] : label_offsets[i + 1]]`.
        label_ids: int32[K], places in `label_names`; a record has each of its labels once, in order of appearance.
            Labels of crowd regions, which are no targets, are left out.
    """

    datasets: tuple[str, ...]
    dataset: np.ndarray
    modality: np.ndarray
    label_names: tuple[str, ...]
    label_offsets: np.ndarray
    label_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.dataset)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the index; equal content makes equal bytes, and a reader never sees half of it."""
        path = pathlib.Path(path)
        arrays = {name: getattr(self, name).astype(kind) for name, kind in _TYPES.items()}
        for name in _NAMES:  # JSON, since NumPy's strings lose trailing zeros and pad all to the longest
            arrays[name] = np.frombuffer(json.dumps(getattr(self, name)).encode(), np.uint8)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(staging, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RecordIndex":
        """Reads what `save` wrote.

        Raises:
            RecordsError: the file is damaged, or is no index.
            FileNotFoundError: there is none.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in (*_TYPES, *_NAMES)}
            datasets, label_names = (tuple(json.loads(arrays.pop(name).tobytes())) for name in _NAMES)
            index = cls(datasets=datasets, label_names=label_names, **arrays)
            index._check()
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise RecordsError(f"{path} is no index of records, or damaged ({error}): remove it") from error
        return index

    def _check(self) -> None:
        for name, kind in _TYPES.items():
            values = getattr(self, name)
            if values.dtype != kind or values.ndim != 1:
                raise ValueError(f"{name} is {values.dtype}{list(values.shape)}, expected {np.dtype(kind)}[n]")
        if len(self.modality) != len(self) or len(self.label_offsets) != len(self) + 1:
            raise ValueError("its arrays have different lengths")
        if self.label_offsets[0] != 0 or self.label_offsets[-1] != len(self.label_ids):
            raise ValueError("label_offsets do not span label_ids")
        if (np.diff(self.label_offsets) < 0).any():
            raise ValueError("label_offsets fall")
        for name, limit in (
            ("dataset", len(self.datasets)),
            ("modality", len(MODALITIES)),
            ("label_ids", len(self.label_names)),
        ):
            values = getattr(self, name)
            if values.size and not 0 <= values.min() <= values.max() < limit:
                raise ValueError(f"{name} has values outside 0 to {limit - 1}")


class IndexBuilder:
    """Collects an index, record by record; where several shards are written in turn, each needs a builder of its own,
    and `concatenate` joins them in the order of the shards."""

    def __init__(self) -> None:
        self._datasets: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._dataset, self._modality = array.array("i"), array.array("b")
        self._offsets, self._label_ids = array.array("q", [0]), array.array("i")

    def add(self, example: GroundingExample) -> None:
        """Adds the next record."""
        labels = dict.fromkeys(region.label for region in example.regions if not region.iscrowd)
        self._add(example.dataset, MODALITIES.index(example.modality), labels)

    def _add(self, dataset: str, modality: int, labels: Iterable[str]) -> None:
        self._dataset.append(self._datasets.setdefault(dataset, len(self._datasets)))
        self._modality.append(modality)
        self._label_ids.extend(self._labels.setdefault(label, len(self._labels)) for label in labels)
        self._offsets.append(len(self._label_ids))

    def finish(self) -> RecordIndex:
        """Returns the index of what was added."""
        return RecordIndex(
            datasets=tuple(self._datasets),
            dataset=np.asarray(self._dataset, np.int32),
            modality=np.asarray(self._modality, np.int8),
            label_names=tuple(self._labels),
            label_offsets=np.asarray(self._offsets, np.int64),
            label_ids=np.asarray(self._label_ids, np.int32),
        )


def concatenate(indices: Sequence[RecordIndex]) -> RecordIndex:
    """Joins indices; the result is what one builder would have made of all their records."""
    datasets: dict[str, int] = {}
    labels: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in _TYPES.items()}
    parts["label_offsets"] = [np.zeros(1, np.int64)]
    count = 0
    for index in indices:
        for known, names, ids, part in (
            (datasets, index.datasets, index.dataset, "dataset"),
            (labels, index.label_names, index.label_ids, "label_ids"),
        ):
            new_ids = np.asarray([known.setdefault(name, len(known)) for name in names], np.int32)
            parts[part].append(new_ids[ids] if len(ids) else ids)
        parts["modality"].append(index.modality)
        parts["label_offsets"].append(index.label_offsets[1:] + count)
        count += len(index.label_ids)
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return RecordIndex(datasets=tuple(datasets), label_names=tuple(labels), **joined)


def select_records(index: RecordIndex, places: np.ndarray) -> RecordIndex:
    """Returns the index of some records, int[n] places in ascending order; names of data sets and labels stay."""
    kept = np.zeros(len(index), bool)
    kept[places] = True
    counts = np.diff(index.label_offsets)
    return dataclasses.replace(
        index,
        dataset=index.dataset[kept],
        modality=index.modality[kept],
        label_offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[kept])]),
        label_ids=index.label_ids[np.repeat(kept, counts)],
    )


def read_index(records: Records) -> RecordIndex:
    """Returns the index of a split: the file beside its shards, else what one pass over the records finds.

    A file that is damaged or of another length is logged and not used. In a pass, a record that cannot be read counts
    to the data set of the folder, with an unknown modality and no labels; reading it for training reports it.
    """
    name = read_metadata(records.directory)["dataset"]
    path = pathlib.Path(records.directory) / index_name(name, records.split)
    try:
        index = RecordIndex.load(path)
        if len(index) == records.num_examples:
            return index
        _log.warning("%s has %d records, the shards %d: reading them instead", path, len(index), records.num_examples)
    except FileNotFoundError:
        pass
    except RecordsError as error:
        _log.warning("%s; reading the records instead", error)
    return _scan(records, name)


def _scan(records: Records, name: str) -> RecordIndex:
    _log.info("%s:%s has no index: reading its %d records", records.directory, records.split, records.num_examples)
    source, builder = open_source(records), IndexBuilder()
    for start in range(0, len(source), _READ_AHEAD):
        places = range(start, min(start + _READ_AHEAD, len(source)))
        try:
            contents: Iterable[bytes | None] = source.__getitems__(places)
        except RecordsError:
            contents = (None for _ in places)
        for place, content in zip(places, contents, strict=True):
            try:
                builder.add(parse_example(source[place] if content is None else content))
            except RecordsError:
                builder._add(name, 0, ())
    return builder.finish()
