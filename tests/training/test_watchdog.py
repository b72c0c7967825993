"""A process that is stuck ends, with what it was doing; one that goes on does not."""

import subprocess
import sys
import time

import pytest

from medglip_jax.training.watchdog import EXIT_HUNG, Watchdog

_STUCK = """
import ctypes, pathlib, sys, time
from medglip_jax.training.watchdog import Watchdog

def waits_for_a_host_that_is_gone():
    {sleep}(60)

with Watchdog(0.3, spare={spare}, report=lambda doing: pathlib.Path(sys.argv[1]).write_text(doing)) as watchdog:
    watchdog.beat("step 12")
    waits_for_a_host_that_is_gone()
"""


def run(tmp_path, sleep, spare):
    code = _STUCK.format(sleep=sleep, spare=spare)
    command = [sys.executable, "-c", code, str(tmp_path / "told")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_stuck_process_tells_its_stacks_and_ends(tmp_path):
    done = run(tmp_path, "time.sleep", spare=60)
    assert done.returncode == EXIT_HUNG
    assert "step 12 did not end within 0.3 seconds" in done.stderr
    assert "in waits_for_a_host_that_is_gone" in done.stderr
    assert (tmp_path / "told").read_text() == "step 12"


def test_a_process_that_does_not_run_python_ends_too(tmp_path):
    done = run(tmp_path, "ctypes.PyDLL(None).sleep", spare=0.5)  # holds the interpreter
    assert done.returncode == 1
    assert "in waits_for_a_host_that_is_gone" in done.stderr


def test_a_process_that_goes_on_is_left_alone():
    with Watchdog(1.0) as watchdog:
        for _ in range(4):
            time.sleep(0.4)
            watchdog.beat("step")
    with Watchdog(0.0) as watchdog:
        watchdog.beat("step")


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match="watchdog_seconds is -1"):
        Watchdog(-1)
