"""Where the time of a run goes: every second in one phase, over restarts."""

import json

import pytest

from medglip_jax.training.goodput import Goodput


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def read(path):
    return json.loads((path / "goodput.json").read_text())


def test_every_second_is_in_one_phase(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, clock=clock, now=clock)
    clock.wait(5)
    with goodput.phase("restore"):
        clock.wait(3)
    goodput.begin_steps(0)
    with goodput.phase("evaluation"):
        clock.wait(2)
        with goodput.phase("loader"):
            clock.wait(1)
        clock.wait(4)
    clock.wait(10)
    goodput.write(7)
    result = read(tmp_path)
    spent = {name: seconds for name, seconds in result["seconds"].items() if seconds}
    assert spent == {"start": 5, "restore": 3, "evaluation": 6, "loader": 1, "step": 10}
    assert result["goodput"] == pytest.approx(10 / 25)


def test_taken_seconds_are_those_since_the_last_time(tmp_path):
    clock = Clock()
    goodput = Goodput(tmp_path, clock=clock, now=clock)
    goodput.begin_steps(0)
    clock.wait(4)
    assert goodput.take()["step"] == 4
    clock.wait(1)
    taken = goodput.take(skipped=0.25)
    assert (taken["step"], taken["skipped"]) == (0.75, 0.25)
    assert goodput.take(skipped=0.25)["step"] == 0


def test_a_restart_adds_what_was_lost(tmp_path):
    clock = Clock()
    first = Goodput(tmp_path, clock=clock, now=clock)
    first.begin_steps(0)
    clock.wait(40)
    first.write(20)  # killed here; the newest checkpoint is of step 15
    clock.wait(60)
    second = Goodput(tmp_path, clock=clock, now=clock)
    second.begin_steps(15)
    clock.wait(20)
    second.write(25)
    result = read(tmp_path)
    assert result["seconds"]["down"] == 60
    assert result["seconds"]["redone"] == pytest.approx(10)  # five steps of two seconds
    assert result["goodput"] == pytest.approx((60 - 10) / 120)
    assert [(start["first_step"], start["last_step"]) for start in result["starts"]] == [(0, 20), (15, 25)]


@pytest.mark.parametrize("text", ["", '{"starts": [{"began": 1}]}', "[]", '{"starts": 3}'])
def test_a_damaged_file_ends_no_run(tmp_path, text, caplog):
    (tmp_path / "goodput.json").write_text(text)
    goodput = Goodput(tmp_path)
    goodput.begin_steps(0)
    goodput.write(1)
    assert "cannot be read" in caplog.text
    assert len(read(tmp_path)["starts"]) == 1
