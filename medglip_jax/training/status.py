"""How a run stands, in a file that a scheduler or a script can read: WORKDIR/status.json."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator

import jax
from etils import epath

from medglip_jax.errors import Preempted
from medglip_jax.evaluation.report import write_json

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"


class Status:
    """Keeps WORKDIR/status.json; only the first process writes.

    The file has `status`: "running", "resume" (it was asked to stop, and saved: start it again), "finished", "failed"
    or "hung"; `step`, of the newest sign; `reason`, in words; and `time`, in seconds since 1970. A run that was killed
    is left "running".
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Prepares to write into a run's working directory."""
        self._path = epath.Path(workdir) / STATUS_FILE
        self.step = 0

    def write(self, status: str, reason: str = "") -> None:
        """Writes the file."""
        if jax.process_index() == 0:
            write_json({"status": status, "step": self.step, "reason": reason, "time": time.time()}, self._path)

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Writes "running", and at the end of the context how that came."""
        self.write("running")
        try:
            yield
        except (Preempted, KeyboardInterrupt) as stop:
            self._last("resume", str(stop))
            raise
        except BaseException as error:
            self._last("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            raise
        self.write("finished")

    def _last(self, status: str, reason: str) -> None:
        try:
            self.write(status, reason)
        except OSError as error:  # what ended the run is to be seen, not this
            logger.warning("%s cannot be written: %s", self._path, error)
