"""Copies and leaks: the same patient, id or picture twice, from about 40 bytes an image."""

import array
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.audit_findings import Findings, Place
from data_pipelines.audit_pixels import find_near, look_alike
from data_pipelines.audit_privacy import mask_private
from data_pipelines.schema import GroundingExample

_MEMBERS = 10  # records of a group that a finding names
_MOST_PAIRS = 20_000  # pairs of near hashes whose pixels are compared

Thumbnailer = Callable[[Place], np.ndarray]


def _digest(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(texts).encode()).digest()[:8], "big")


class Fingerprints:
    """Sixty-four bits of each image's pixels, look, id and patient; 0 stands for unknown."""

    def __init__(self) -> None:
        self._splits: list[str] = []
        self._datasets: list[str] = []
        self._split, self._dataset = array.array("H"), array.array("H")
        self._index = array.array("Q")
        self._pixels, self._look = array.array("Q"), array.array("Q")
        self._image_id, self._patient = array.array("Q"), array.array("Q")

    def add(self, place: Place, example: GroundingExample, pixels: int, look: int) -> None:
        """Keeps the fingerprints of a record: `pixels` of `digest_pixels`, `look` of `hash_picture`."""
        self._split.append(_place_in(self._splits, place.split))
        self._dataset.append(_place_in(self._datasets, example.dataset))
        self._index.append(place.index)
        self._pixels.append(pixels)
        self._look.append(look)
        self._image_id.append(_digest(example.dataset, example.image_id))
        self._patient.append(_digest(example.dataset, example.patient_id) if example.patient_id else 0)

    def _place(self, row: int) -> Place:
        return Place(self._splits[self._split[row]], self._index[row])

    def report(self, findings: Findings, thumbnail: Thumbnailer) -> None:
        """Adds leaks and duplicates to the findings.

        Args:
            findings: where to.
            thumbnail: reads the picture of a record again and makes it small.
        """
        for rows in _groups(self._patient):
            if self._crosses(rows):
                self._add(findings, "leak_patient", rows)
        for rows in _groups(self._image_id):
            self._add(findings, "leak_image_id" if self._crosses(rows) else "repeated_image_id", rows)
        for rows in _groups(self._pixels):
            self._add(findings, "leak_duplicate" if self._crosses(rows) else "duplicate", rows)
        self._report_near(findings, thumbnail)

    def _crosses(self, rows: Sequence[int]) -> bool:
        return len({self._split[row] for row in rows}) > 1

    def _add(self, findings: Findings, kind: str, rows: Sequence[int], **details: Any) -> None:
        named = sorted(rows, key=lambda row: (self._split[row], row))
        if self._crosses(rows):  # so that each side is named, however large the group
            first = {self._split[row]: row for row in reversed(named)}
            named = [*first.values(), *(row for row in named if row not in first.values())]
        findings.add(
            kind,
            [self._place(row) for row in named[:_MEMBERS]],
            members=len(rows),
            datasets=sorted({mask_private(self._datasets[self._dataset[row]]) for row in rows}),
            **details,
        )

    def _report_near(self, findings: Findings, thumbnail: Thumbnailer) -> None:
        """Compares the pixels of pictures whose hashes are near, one of each set of exact copies and split."""
        keys = np.stack([np.asarray(self._pixels), np.asarray(self._split, np.uint64)], axis=1)
        kept = np.sort(np.unique(keys, axis=0, return_index=True)[1]) if len(keys) else np.zeros(0, np.int64)
        kept = kept[np.asarray(self._pixels)[kept] != 0]
        looks = np.asarray(self._look)[kept]
        pairs, complete = find_near(looks)
        distances = np.bitwise_count(looks[pairs[:, 0]] ^ looks[pairs[:, 1]])
        order = np.argsort(distances, kind="stable")
        unchecked = max(0, len(order) - _MOST_PAIRS)
        for pair in order[:_MOST_PAIRS]:
            rows = kept[pairs[pair]].tolist()
            same = self._pixels[rows[0]] == self._pixels[rows[1]]  # reported already
            if not same and look_alike(*(thumbnail(self._place(row)) for row in rows)):
                kind = "leak_near_duplicate" if self._crosses(rows) else "near_duplicate"
                self._add(findings, kind, rows, distance=int(distances[pair]))
        if unchecked or not complete:
            findings.add("search_cut_short", count=max(unchecked, 1), unchecked_pairs=unchecked, complete=complete)


def _place_in(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)


def _groups(values: Sequence[int]) -> Iterator[list[int]]:
    """Yields the rows of each value, other than 0, that occurs more than once."""
    column = np.asarray(values, np.uint64)
    order = np.argsort(column, kind="stable")
    column = column[order]
    starts = np.flatnonzero(np.r_[True, column[1:] != column[:-1]]) if len(column) else np.zeros(0, np.int64)
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(column)], strict=False):
        if end - start > 1 and column[start]:
            yield order[start:end].tolist()
