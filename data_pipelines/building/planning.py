"""Deciding over all parts of a corpus: duplicates, groups that stay together, splits, and what the metadata say."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from data_pipelines.building.parts import ARRAYS, Entry, Part, load_part
from data_pipelines.building.recipe import Recipe
from data_pipelines.conflicts import find_keepers
from data_pipelines.record_index import RecordIndex
from data_pipelines.schema import MODALITIES
from data_pipelines.splits import assign_splits, find_duplicates, group_examples

_COLUMNS = ("part", "data_set", "offsets", "lengths", "digests", "looks", "annotations", "modalities", "held_out")
_COLUMNS += ("clipped",)
_GATHERED = {name: kind for name, kind in ARRAYS.items() if name != "thumbnails"}


@dataclasses.dataclass(eq=False)
class Rows:
    """The N examples of all parts, one after the other, as columns.

    Attributes:
        paths: of the parts.
        part: int64[N], positions in `paths`.
        data_set: int64[N], positions in the recipe.
        offsets, lengths: int64[N], bytes in the part.
        digests, looks, annotations: uint64[N].
        modalities: int8[N].
        held_out: bool[N].
        clipped: int64[N].
        starts: int64[N + 1], bounds of each example in `phrases`.
        phrases: int64[regions], positions in `vocabulary`.
        vocabulary: (phrase, label, granularity, is crowd).
        keys: patient or image of each example.
        dropped: regions left out, by row and reason.
    """

    paths: list[str]
    part: np.ndarray
    data_set: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    looks: np.ndarray
    annotations: np.ndarray
    modalities: np.ndarray
    held_out: np.ndarray
    clipped: np.ndarray
    starts: np.ndarray
    phrases: np.ndarray
    vocabulary: list[Entry]
    keys: list[str]
    dropped: dict[int, dict[str, int]]

    def __len__(self) -> int:
        return len(self.part)

    def take(self, order: np.ndarray) -> "Rows":
        """Returns the rows at int64[M] positions, in that order."""
        counts = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(counts)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        columns = {name: getattr(self, name)[order] for name in _COLUMNS}
        return dataclasses.replace(
            self,
            **columns,
            starts=starts,
            phrases=self.phrases[np.repeat(self.starts[:-1][order], counts) + within],
            keys=[self.keys[row] for row in order.tolist()],
            dropped={new: self.dropped[old] for new, old in enumerate(order.tolist()) if old in self.dropped},
        )


def gather(parts: Iterable[tuple[int, Part]]) -> Rows:
    """Joins parts, each with its data set's position in the recipe; only one of them needs to be in memory."""
    columns: dict[str, list[np.ndarray]] = {name: [np.zeros(0, kind)] for name, kind in _GATHERED.items()}
    vocabulary: dict[Entry, int] = {}
    paths, data_sets, sizes, keys, dropped = [], [], [], [], {}
    for data_set, part in parts:
        places = [vocabulary.setdefault(entry, len(vocabulary)) for entry in part.vocabulary]
        dropped |= {len(keys) + row: reasons for row, reasons in part.dropped.items()}
        keys += part.keys
        paths.append(str(part.path))
        data_sets.append(data_set)
        sizes.append(len(part))
        for name, pieces in columns.items():
            pieces.append(np.asarray(places, np.int64)[part.phrases] if name == "phrases" else getattr(part, name))
    joined = {name: np.concatenate(columns.pop(name)) for name in _GATHERED}
    return Rows(
        paths=paths,
        part=np.repeat(np.arange(len(paths)), sizes),
        data_set=np.repeat(np.asarray(data_sets, np.int64), sizes),
        starts=np.concatenate([[0], np.cumsum(joined.pop("phrase_counts"))]),
        vocabulary=list(vocabulary),
        keys=keys,
        dropped=dropped,
        **joined,
    )


@dataclasses.dataclass(frozen=True)
class Decision:
    """What becomes of the N examples of all parts.

    Attributes:
        splits: str[N]; "" for copies that are not kept by themselves.
        merged: groups of rows that become one example, which takes the place of the first.
        report: counts of duplicates, groups and splits.
    """

    splits: np.ndarray
    merged: list[list[int]]
    report: dict[str, Any]


def decide(rows: Rows, recipe: Recipe) -> Decision:
    """Finds copies, and sends what belongs together to one split."""
    thumbnails = _Thumbnails(rows)
    found = find_duplicates(rows.digests, rows.looks, thumbnails.read, rows.annotations)
    names = list(recipe.data_sets)
    keepers = find_keepers(found.exact, [names[data_set] for data_set in rows.data_set.tolist()], recipe.rules)
    groups = group_examples(rows.keys, rows.keys, found.pairs)
    assigned, report = assign_splits(
        rows.keys, groups, recipe.eval_fraction, seed=recipe.split_seed, held_out=rows.held_out
    )
    splits = np.asarray(assigned, object)
    if not recipe.eval_fraction:
        splits[splits == "train"] = recipe.split
    copies = np.flatnonzero(keepers != np.arange(len(rows)))
    splits[copies] = ""
    merged: dict[int, list[int]] = {}
    for row in copies.tolist():
        merged.setdefault(int(keepers[row]), [int(keepers[row])]).append(row)
    return Decision(splits, list(merged.values()), {"duplicates": found.as_dict(), "splits": report})


class _Thumbnails:
    """Small pictures of examples, from the parts last used."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._load = functools.lru_cache(maxsize=8)(lambda part: load_part(pathlib.Path(rows.paths[part])).thumbnails)

    def read(self, row: int) -> np.ndarray:
        """Returns uint8[32, 32]."""
        part = int(self._rows.part[row])
        return self._load(part)[row - int(np.searchsorted(self._rows.part, part))]


def split_metadata(rows: Rows, names: list[str], partial: Collection[str] = ()) -> dict[str, Any]:
    """Returns what medglip.json says of a split besides its shards.

    Args:
        rows: the split's, in the order of its records; those of a data set follow each other.
        names: of the data sets in the recipe.
        partial: those of them that do not mark all that their labels name.
    """
    count = len(rows.vocabulary)
    owner = np.repeat(np.arange(len(rows)), np.diff(rows.starts))
    occurrences = np.bincount(rows.phrases, minlength=count)
    shown = np.zeros((count, len(MODALITIES)), bool)
    shown[rows.phrases, rows.modalities[owner]] = True
    named = np.zeros((count, len(names)), bool)
    named[rows.phrases, rows.data_set[owner]] = True
    seen, first = np.unique(rows.phrases, return_index=True)
    labels: dict[str, int] = {}
    phrases: dict[str, dict[str, Any]] = {}
    for place in seen[np.argsort(first)].tolist():  # as they come in the records
        phrase, label, granularity, _ = rows.vocabulary[place]
        labels[label] = labels.get(label, 0) + int(occurrences[place])
        entry = phrases.setdefault(
            phrase, {"label": label, "granularity": granularity, "count": 0, "modalities": [], "data_sets": []}
        )
        entry["count"] += int(occurrences[place])
        for field, values, found in (("modalities", MODALITIES, shown[place]), ("data_sets", names, named[place])):
            known = {values[index] for index in np.flatnonzero(found).tolist()} | set(entry[field])
            entry[field] = [value for value in values if value in known]
    reasons: dict[str, int] = {}
    for dropped in rows.dropped.values():
        for reason, number in dropped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    used, starts = np.unique(rows.data_set, return_index=True)
    stops = [*starts[1:].tolist(), len(rows)]
    return {
        "num_examples": len(rows),
        "labels": dict(sorted(labels.items(), key=lambda item: -item[1])),
        "phrases": dict(sorted(phrases.items(), key=lambda item: -item[1]["count"])),
        "counts": {"clipped": int(rows.clipped.sum()), "dropped": dict(sorted(reasons.items()))},
        "datasets": {
            names[data_set]: [start, stop]
            for data_set, start, stop in zip(used.tolist(), starts.tolist(), stops, strict=True)
        },
        "partial": [names[data_set] for data_set in used.tolist() if names[data_set] in partial],
    }


def make_index(rows: Rows, names: list[str]) -> RecordIndex:
    """Returns the index of a split as `record_index.IndexBuilder` makes it; arguments as `split_metadata`."""
    label_of = np.zeros(len(rows.vocabulary), np.int64)
    labels: dict[str, int] = {}
    crowd = np.asarray([entry[3] for entry in rows.vocabulary], bool)
    kept = ~crowd[rows.phrases]
    seen, first = np.unique(rows.phrases[kept], return_index=True)
    for place in seen[np.argsort(first)].tolist():
        label_of[place] = labels.setdefault(rows.vocabulary[place][1], len(labels))
    owner = np.repeat(np.arange(len(rows)), np.diff(rows.starts))[kept]
    label_ids = label_of[rows.phrases[kept]]
    _, once = np.unique(owner * max(len(labels), 1) + label_ids, return_index=True)
    once.sort()
    # In the order of the recipe, as the records are.
    data_sets, dataset = np.unique(rows.data_set, return_inverse=True)
    shown = [names[data_set] for data_set in data_sets.tolist()]
    return RecordIndex(
        datasets=tuple(shown),
        dataset=dataset.astype(np.int32),
        modality=rows.modalities.astype(np.int8),
        label_names=tuple(labels),
        label_offsets=np.concatenate([[0], np.cumsum(np.bincount(owner[once], minlength=len(rows)))]).astype(np.int64),
        label_ids=label_ids[once].astype(np.int32),
    )
