"""Ends a process that is alive but stuck, so that it is started again instead of holding a pod for ever."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h: try again
_SPARE = 60.0  # seconds after which the C library ends a process that does not even run Python


class Watchdog:
    """Ends the process where nothing was heard for a set time; a context manager.

    What every thread was doing goes to the standard error, then the process exits with `EXIT_HUNG`. A process whose
    Python does not run either (a C call that holds the interpreter) ends a minute later, with the same stacks and
    status 1.
    """

    def __init__(
        self,
        seconds: float,
        *,
        report: Callable[[str], None] = lambda doing: None,
        spare: float = _SPARE,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares to watch.

        Args:
            seconds: that may pass between two calls of `beat`; 0 watches nothing.
            report: called with what the process was about, before it ends.
            spare: seconds that Python gets to end the process by itself.
            clock: seconds.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError(f"config.training.watchdog_seconds is {seconds}: it must be 0 (off) or more")
        self._seconds, self._report, self._spare, self._clock = seconds, report, spare, clock
        self._doing, self._deadline = "start", 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self.beat(self._doing)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str) -> None:
        """Tells that the process goes on.

        Args:
            doing: what it is about to do, for the message: "step 12".
        """
        if not self._seconds:
            return
        self._doing, self._deadline = doing, self._clock() + self._seconds
        faulthandler.dump_traceback_later(self._seconds + self._spare, exit=True, file=_stderr())

    def _watch(self) -> None:
        while not self._ended.wait(max(0.01, min(self._deadline - self._clock(), 1.0))):
            if self._clock() >= self._deadline:
                self._end()

    def _end(self) -> None:
        stderr = _stderr()
        print(
            f"{self._doing} did not end within {self._seconds:g} seconds (config.training.watchdog_seconds): this "
            "process ends, so that the run can be started again. What its threads were doing:",
            file=stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=stderr, all_threads=True)
        try:
            self._report(self._doing)
        finally:
            os._exit(EXIT_HUNG)


def _stderr() -> TextIO:
    return sys.__stderr__ or sys.stderr
