"""Looking into a run: a trace of some steps for TensorBoard or Perfetto, and the programs that XLA made of them."""

import logging
import os
import pathlib
import re
import shutil
import tempfile
from types import TracebackType
from typing import Any

import jax
from etils import epath

from medglip_jax.paths import copy_folder, is_remote

logger = logging.getLogger(__name__)

TRACE = "profile"  # folder in a run's working directory
TRACED_STEPS = (10, 15)


def parse_steps(text: str) -> tuple[int, int]:
    """Reads "10:15", the first and the last step of a trace.

    Raises:
        ValueError: it is not written so, or the last one comes before the first.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found.group(1)) <= int(found.group(2)):
        raise ValueError(f"--profile {text}: expected the first and the last step, as in 10:15")
    return int(found.group(1)), int(found.group(2))


def dump_hlo(folder: str | os.PathLike[str]) -> None:
    """Makes XLA write every program that it compiles from now on into a folder: before and after it, as text.

    Call it before anything else touches a device.
    """
    path = pathlib.Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={path} --xla_dump_hlo_as_text".strip()


class Trace:
    """Records a trace of some steps of this start of a run; a context manager that ends with a trace written.

    Every process writes its own devices, WORKDIR/profile/plugins/profile/TIME/HOST.*.
    """

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None, start: int = 0):
        """Prepares to record.

        Args:
            workdir: the run's working directory.
            steps: the first and the last one, counted from this start, so that compilation is not among them from the
                second on; None records nothing.
            start: steps taken before.
        """
        self._target = epath.Path(workdir) / TRACE
        self._folder = str(self._target)  # a profiler writes to this machine only
        if is_remote(workdir):
            self._folder = tempfile.mkdtemp(prefix="medglip_trace_")
        self._first, self._last = (start + steps[0], start + steps[1]) if steps else (0, 0)
        self._running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Begins to record, if this step is the first to be.

        Args:
            step: about to be taken, from 1.
        """
        if self._first and step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """Ends the recording, if this step was the last.

        Args:
            step: taken just now.
            result: of the step, which is waited for.
        """
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._folder != str(self._target):
                copy_folder(self._folder, self._target)
                shutil.rmtree(self._folder)
            logger.info("trace of steps %d to %d: %s", self._first, self._last, self._target)
