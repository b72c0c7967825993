"""Asked to stop: a signal, or the notice that a host goes away, becomes one step after which all processes save."""

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)


class StopRequest:
    """Notices SIGTERM, and Ctrl-C; a context manager, in the main thread.

    In a run of one process, both; a second one interrupts at once. In a run of several processes JAX takes SIGTERM: it
    tells all processes when one of them got it, and makes them agree on when to stop, the same for all. Ctrl-C
    interrupts such a process at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Prepares to listen; `clock` tells seconds."""
        self._clock = clock
        self._received: int | None = None
        self._since = 0.0
        self._asked = False
        self._calls = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            try:
                for number in (signal.SIGINT, signal.SIGTERM):
                    self._before[number] = signal.signal(number, self._receive)
            except ValueError:
                logger.info("not in the main thread: signals are not noticed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received, self._since = number, self._clock()

    def reached(self) -> bool:
        """Returns whether to stop now, once and for all.

        All processes must call it equally often: between steps, and between the batches of an evaluation.
        """
        if self._asked:
            return True
        self._calls += 1
        if jax.process_count() == 1:
            self._asked = self._received is not None
        else:
            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
            self._since = self._clock()
        return self._asked

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._received == signal.SIGINT

    @property
    def seconds(self) -> float:
        """Since the signal; in a run of several processes, since they agreed."""
        return self._clock() - self._since
