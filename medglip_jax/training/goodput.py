"""Where the time of a run goes: into steps, or into what keeps its devices from them, over all starts of the run."""

import contextlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from medglip_jax.evaluation.report import write_json

logger = logging.getLogger(__name__)

GOODPUT_FILE = "goodput.json"

# What the time of a run is divided into. "step" is the only one that trains.
PHASES = (
    "start",  # from the start of the process's training to its first step, without the next two
    "restore",  # reading a checkpoint
    "compile",  # the first step: tracing, compiling, running
    "loader",  # waiting for a batch
    "step",
    "skipped",  # steps whose loss or gradient was not finite
    "checkpoint",  # until training may go on; writing goes on in the background
    "evaluation",
)


class Goodput:
    """Counts seconds by phase and keeps them in WORKDIR/goodput.json, with those of earlier starts.

    The file has `goodput`, the share of all time since the first start that went into steps that count; `seconds`, by
    phase, and `redone` (steps since the last checkpoint, which a restart takes again: part of "step") and `down` (from
    the last sign of one start to the next); and `starts`, each with its steps and phases. Only the first process
    writes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ):
        """Reads what earlier starts left, and begins with the phase "start".

        Args:
            workdir: the run's working directory.
            clock: seconds, for durations.
            now: seconds since 1970, for the time between starts.
        """
        self._path = epath.Path(workdir) / GOODPUT_FILE
        self._clock, self._now = clock, now
        self._earlier = _read(self._path)
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._taken = dict(self._seconds)
        self._phases = ["start"]
        self._since = clock()
        self._start: dict[str, Any] = {"began": now(), "first_step": None, "last_step": None}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside to a phase; phases may be inside each other, and each second counts once."""
        self._settle()
        self._phases.append(name)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()

    def begin_steps(self, step: int) -> None:
        """Ends the phase "start": what follows, and is no other phase, is of steps.

        Args:
            step: steps taken before.
        """
        self._settle()
        self._phases[0] = "step"
        self._start["first_step"] = self._start["last_step"] = step

    def take(self, skipped: float = 0.0) -> dict[str, float]:
        """Returns the seconds of each phase since the last call.

        Args:
            skipped: share of the steps since then that were not finite, whose time does not count as training.
        """
        self._settle()
        moved = skipped * (self._seconds["step"] - self._taken["step"])
        self._seconds["step"] -= moved
        self._seconds["skipped"] += moved
        new = {name: seconds - self._taken[name] for name, seconds in self._seconds.items()}
        self._taken = dict(self._seconds)
        return new

    def write(self, step: int) -> None:
        """Writes the file; see the class.

        Args:
            step: steps taken.
        """
        self._settle()
        self._start["last_step"] = step
        if jax.process_index() == 0:
            write_json(self.report(), self._path)

    def report(self) -> dict[str, Any]:
        """Returns what goes into the file."""
        current = self._start | {"last_sign": self._now(), "seconds": dict(self._seconds)}
        starts = [*self._earlier, current]
        seconds: dict[str, float] = dict.fromkeys((*PHASES, "redone", "down"), 0.0)
        for start in starts:
            for name, spent in start["seconds"].items():
                seconds[name] += spent
        for before, after in itertools.pairwise(starts):
            seconds["down"] += max(0.0, after["began"] - before["last_sign"])
            if after["first_step"] is not None and before["last_step"] is not None:
                lost = max(0, before["last_step"] - after["first_step"])
                taken = before["last_step"] - before["first_step"]
                seconds["redone"] += before["seconds"]["step"] * min(1.0, lost / max(taken, 1))
        total = math.fsum(seconds.values()) - seconds["redone"]
        return {
            "goodput": (seconds["step"] - seconds["redone"]) / total if total else 0.0,
            "seconds": seconds,
            "starts": starts,
        }

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._phases[-1]] += now - self._since
        self._since = now


def _read(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the earlier starts; a file that cannot be read is told and begun anew, since no run ends for its sake."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        for start in starts:
            if not {"began", "last_sign", "first_step", "last_step"} <= start.keys():
                raise KeyError("a start lacks a field")
            start["seconds"] = {name: float(start["seconds"][name]) for name in PHASES}
        return starts
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s): the time of earlier starts is not counted", path, error)
        return []
