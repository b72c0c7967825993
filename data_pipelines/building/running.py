"""Running the tasks of a stage: in this process, in several, or on Apache Beam.

A task is `function(context, task)`. Its result is a file that it writes by itself; what it returns is dropped.
"""

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cv2

_AHEAD = 4  # tasks a process that wait for it; a corpus has more tasks than should be in memory
_KEPT_BYTES = 32 * 2**20  # of freed memory, and the size of blocks from which they are returned at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)

Function = Callable[[Any, Any], None]


class Runner(Protocol):
    """Calls `function(context, task)` once for each task, in any order; raises the error of one that fails."""

    def __call__(self, function: Function, context: Any, tasks: Sequence[Any], on_done: Callable[[], None]) -> None: ...


def run_here(function: Function, context: Any, tasks: Sequence[Any], on_done: Callable[[], None]) -> None:
    """Runs one task after the other in this process; `on_done` is called after each."""
    for task in tasks:
        function(context, task)
        on_done()


def prepare_process(keep_memory: bool = True) -> None:
    """Makes this process, one of several or the only one, compute in its own threads only, and keep freed memory.

    OpenCV's threads wait for work by turning: small pictures gain nothing from them, and cost twice the CPU time.
    glibc would return blocks above 128 kB to the system, which then clears every page anew for the next picture: 3 of
    25 ms for an image with five masks.
    """
    cv2.setNumThreads(0)
    if keep_memory:
        with contextlib.suppress(OSError, AttributeError):  # another C library
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


_worker: dict[str, Any] = {}  # what `_start` gave to this worker process


def _start(function: Function, context: Any) -> None:
    prepare_process()
    _worker.update(function=function, context=context)


def _run(task: Any) -> None:
    _worker["function"](_worker["context"], task)


class Processes:
    """Runs tasks in processes of this machine.

    The context is sent to each process once. Processes are started afresh ("spawn"), since a copy of one that has
    threads may hang.
    """

    def __init__(self, workers: int):
        self._workers = workers

    def __call__(self, function: Function, context: Any, tasks: Sequence[Any], on_done: Callable[[], None]) -> None:
        workers = min(self._workers, len(tasks))
        if workers < 2:
            run_here(function, context, tasks, on_done)
            return
        waiting = iter(tasks)
        with concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start, (function, context)
        ) as pool:
            running = {pool.submit(_run, task) for _, task in zip(range(_AHEAD * workers), waiting, strict=False)}
            try:
                while running:
                    done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        on_done()
                        running |= {pool.submit(_run, task) for task in [next(waiting, None)] if task is not None}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class Beam:
    """Runs tasks as an Apache Beam pipeline.

    The workers must see the input folders and the output folder under the same paths as this process (a file system
    that all of them mount).

    Args:
        arguments: pipeline options as on Beam's command lines, such as "--runner=FlinkRunner".
    """

    def __init__(self, arguments: Sequence[str] = ()):
        self._arguments = list(arguments)

    def __call__(self, function: Function, context: Any, tasks: Sequence[Any], on_done: Callable[[], None]) -> None:
        if not tasks:
            return
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        with beam.Pipeline(options=PipelineOptions(self._arguments)) as pipeline:
            spread = pipeline | "tasks" >> beam.Create(list(tasks)) | "spread" >> beam.Reshuffle()
            _ = spread | function.__name__ >> beam.Map(_BeamTask(function, context))
        for _ in tasks:
            on_done()


class _BeamTask:
    """Sends the context with the step, not with each task."""

    def __init__(self, function: Function, context: Any):
        self._function, self._context = function, context

    def __call__(self, task: Any) -> None:
        self._function(self._context, task)


def make_runner(workers: int = 0, beam: Sequence[str] | None = None) -> Runner:
    """Returns the runner for so many processes (0: one a core), or for Beam with these options.

    Raises:
        ValueError: a negative number of workers, or Beam is not installed.
    """
    if beam is not None:
        try:
            import apache_beam  # noqa: F401
        except ImportError:
            raise ValueError("Apache Beam is not installed: pip install 'medglip_jax[build]'") from None
        return Beam(beam)
    if workers < 0:
        raise ValueError(f"the number of workers must be 0 (one a core) or more, not {workers}")
    return Processes(workers or len(os.sched_getaffinity(0)))
