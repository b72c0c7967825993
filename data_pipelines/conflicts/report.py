"""Counts of conflicts, and some of each kind by name, from any number of workers."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.conflicts.rules import KINDS, Conflict

_ORDER = {kind: place for place, kind in enumerate(KINDS)}
LISTED = 50  # conflicts of each kind that a report names; the others are counted


def _rank(conflict: Conflict) -> bytes:
    text = "\0".join(
        (conflict.dataset, conflict.image_id, conflict.kind, conflict.rule, *conflict.labels, conflict.detail)
    )
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()


class ConflictReport:
    """Counts of conflicts by kind, rule and data set, and `listed` of each kind.

    Those are the ones with the smallest hashes, so that the report is the same however the work was shared out and in
    whatever order the parts come together.

    Args:
        listed: conflicts of each kind to name.
    """

    def __init__(self, listed: int = LISTED):
        self.listed = listed
        self.counts: collections.Counter[tuple[str, str, str]] = collections.Counter()  # kind, rule, data set
        self._named: dict[str, list[tuple[bytes, Conflict]]] = collections.defaultdict(list)

    def add(self, conflict: Conflict) -> None:
        """Counts a conflict."""
        self.counts[conflict.kind, conflict.rule, conflict.dataset] += 1
        self._name(_rank(conflict), conflict)

    def _name(self, rank: bytes, conflict: Conflict) -> None:
        named = self._named[conflict.kind]
        if len(named) < self.listed:
            named.append((rank, conflict))
            named.sort(key=lambda entry: entry[0])
        elif named and rank < named[-1][0]:
            named[-1] = (rank, conflict)
            named.sort(key=lambda entry: entry[0])

    def __add__(self, other: "ConflictReport") -> "ConflictReport":
        both = ConflictReport(min(self.listed, other.listed))
        both.counts = self.counts + other.counts
        for part in (self, other):
            for named in part._named.values():
                for rank, conflict in named:
                    both._name(rank, conflict)
        return both

    @property
    def total(self) -> int:
        return self.counts.total()

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it.

        {"counts": {kind: {rule: n}}, "datasets": {data set: {kind: {rule: n}}}, "meanings": {kind: sentence},
        "examples": [{"kind", "rule", "dataset", "image_id", "labels", "detail"}, ...]}, kinds in the order of `KINDS`.
        """
        counts: dict[str, dict[str, int]] = {}
        datasets: dict[str, dict[str, dict[str, int]]] = {}
        for kind, rule, dataset in sorted(self.counts, key=lambda key: (_ORDER[key[0]], *key[1:])):
            count = self.counts[kind, rule, dataset]
            rules = counts.setdefault(kind, {})
            rules[rule] = rules.get(rule, 0) + count
            datasets.setdefault(dataset, {}).setdefault(kind, {})[rule] = count
        return {
            "counts": counts,
            "datasets": dict(sorted(datasets.items())),
            "meanings": {kind: KINDS[kind] for kind in counts},
            "examples": [
                {**dataclasses.asdict(conflict), "labels": list(conflict.labels)}
                for kind in counts
                for _, conflict in self._named[kind]
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], listed: int = LISTED) -> "ConflictReport":
        """Reads what `as_dict` returned; the sum of parts that were written is the sum of the parts."""
        report = cls(listed)
        for dataset, kinds in values["datasets"].items():
            for kind, rules in kinds.items():
                for rule, count in rules.items():
                    report.counts[kind, rule, dataset] = count
        for example in values["examples"]:
            conflict = Conflict(**{**example, "labels": tuple(example["labels"])})
            report._name(_rank(conflict), conflict)
        return report
