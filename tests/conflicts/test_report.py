"""Counts of conflicts from any number of workers."""

import itertools
import json

import hypothesis
import hypothesis.strategies as st

from data_pipelines.conflicts import Conflict, ConflictReport


def _conflicts(count):
    kinds = itertools.cycle(["two_labels", "same_structure"])
    return [Conflict(next(kinds), "keep_both", f"d{k % 3}", f"image {k}", ("a", "b"), "x") for k in range(count)]


@hypothesis.given(st.lists(st.integers(0, 2), min_size=30, max_size=30), st.permutations(range(3)))
@hypothesis.settings(max_examples=10)
def test_a_report_is_the_same_however_the_work_was_shared(workers, order):
    whole, parts = ConflictReport(listed=4), [ConflictReport(listed=4) for _ in range(3)]
    for conflict, worker in zip(_conflicts(30), workers, strict=True):
        whole.add(conflict)
        parts[worker].add(conflict)
    written = [ConflictReport.from_dict(json.loads(json.dumps(parts[k].as_dict())), listed=4) for k in order]
    assert (written[0] + written[1] + written[2]).as_dict() == whole.as_dict()


def test_a_report_counts_all_and_lists_some():
    report = ConflictReport(listed=3)
    for conflict in _conflicts(20):
        report.add(conflict)
    content = report.as_dict()
    assert content["counts"] == {"same_structure": {"keep_both": 10}, "two_labels": {"keep_both": 10}}
    assert content["datasets"]["d0"] == {"same_structure": {"keep_both": 3}, "two_labels": {"keep_both": 4}}
    assert [example["kind"] for example in content["examples"]] == ["same_structure"] * 3 + ["two_labels"] * 3
    assert report.total == 20
