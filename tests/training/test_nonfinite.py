"""Steps that were not finite: skipped up to a limit, listed, and counted over restarts."""

import json
import logging

import numpy as np
import pytest

from medglip_jax.training.nonfinite import NonFiniteLoss, NonFiniteSteps
from medglip_jax.training.pending import PendingMetrics

GROUPS = ("backbone/stage_0", "head/box", "tower_0/fusion")
GOOD = {"loss": np.float32(2), "finite": np.True_, "nonfinite": np.zeros(3, np.int32)}
BAD = {"loss": np.float32("nan"), "finite": np.False_, "nonfinite": np.array([0, 4, 1])}


def lines(folder):
    return [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]


def test_as_many_steps_as_allowed_are_skipped_and_listed(tmp_path, caplog):
    steps = NonFiniteSteps(tmp_path, 2, GROUPS)
    with caplog.at_level(logging.WARNING):
        assert steps.check(0, GOOD, ["a"]) and not steps.check(1, BAD, ["b", "c"]) and not steps.check(4, BAD, ["d"])
    assert "step 2 was skipped, number 1 of at most 2" in caplog.text and "b, c" in caplog.text
    with pytest.raises(NonFiniteLoss, match=r"head/box \(4\), tower_0/fusion \(1\).*2 such steps were skipped"):
        steps.check(7, BAD, ["e"])
    assert [(line["step"], line["image_ids"]) for line in lines(tmp_path)] == [(2, ["b", "c"]), (5, ["d"]), (8, ["e"])]
    assert lines(tmp_path)[0]["nonfinite_gradients"] == {"head/box": 4, "tower_0/fusion": 1}
    assert lines(tmp_path)[0]["metrics"] == {"loss": "nan"}


def test_a_restart_counts_those_before_it_and_not_those_it_takes_again(tmp_path):
    before = NonFiniteSteps(tmp_path, 9, GROUPS)
    for step in (1, 3, 8):
        before.check(step, BAD, [])
    after = NonFiniteSteps(tmp_path, 9, GROUPS, start=5)
    assert after.count == 2
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]


def test_means_are_of_the_steps_that_count(tmp_path):
    pending = PendingMetrics(NonFiniteSteps(tmp_path, 5, GROUPS))
    for step, metrics in enumerate((GOOD, BAD, GOOD | {"loss": np.float32(4)}, BAD)):
        pending.add(step, metrics, np.array(["x"]))
    assert pending.take_means() == ({"loss": 3.0, "skipped_steps": 2}, 0.5)
    assert pending.loss == 4
    pending.add(4, BAD, np.array(["x"]))
    assert pending.take_means() == ({"skipped_steps": 1}, 1.0)


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_nonfinite is -1"):
        NonFiniteSteps(tmp_path, -1, GROUPS)
