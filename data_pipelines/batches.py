"""Rows to batches: made ahead by threads or processes, and a position that any number of processes can go on from."""

import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import cv2
import grain
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.quarantine import Quarantine

_BATCHES_AHEAD = 1  # stacked while the step before runs

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)


def _start_worker(parent: int, index: int, count: int) -> None:
    """Prepares a decode process of the process `parent`.

    Threads and processes of the loader share the cores already: OpenCV keeps to one. Signals to a whole group of
    processes, Ctrl-C or a preemption, are for the run, which ends its workers when it has saved; where it was killed
    and cannot, they end by themselves. It may be gone before this is called, so that its number must be given.
    """
    cv2.setNumThreads(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def make_batches(examples: grain.MapDataset, data: ConfigDict, batch_size: int) -> grain.IterDataset:
    """Batches examples that threads, or processes, make ahead; the order does not depend on how many there are."""
    cv2.setNumThreads(0)
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=data.prefetch)
    if not data.num_workers:
        made = examples.to_iter_dataset(options)
    else:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; outside absl.app.run nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(
            num_workers=data.num_workers, per_worker_buffer_size=max(1, data.prefetch // data.num_workers)
        )
        made = examples.to_iter_dataset(options).mp_prefetch(workers, functools.partial(_start_worker, os.getpid()))
    batches = made.batch(batch_size, drop_remainder=True)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD)


@dataclasses.dataclass(frozen=True)
class _Share:
    """The rows that a process reads, from the global batch that begins at `start` on: `places` of each of them."""

    rows: grain.MapDataset[dict[str, Any]]
    places: tuple[int, ...]
    start: int
    global_batch: int

    def __call__(self, index: int) -> dict[str, Any]:
        batch, place = divmod(index, len(self.places))
        row: Any = self.rows[self.start + batch * self.global_batch + self.places[place]]
        return row


class TrainBatches(grain.DatasetIterator[Batch]):
    """The endless training batches of a process; `train_loader` says what is in them.

    Its state, {"position": places of the series that all processes have taken, "series": which series}, is the same in
    every process and whatever the number of threads, workers and processes.

    Attributes:
        rows: the row of a batch at each place of the endless series.
        quarantine: the corrupt records so far.
    """

    def __init__(
        self,
        rows: grain.MapDataset[dict[str, Any]],
        data: ConfigDict,
        quarantine: Quarantine,
        *,
        series: str,
        places: Sequence[int],
        global_batch: int,
    ):
        """Starts at the beginning of the series.

        Args:
            rows, quarantine: see above.
            data: `config.data`.
            series: a name that tells the series from others.
            places: of each global batch that this process reads, in the order of its rows.
            global_batch: images in the batches of all processes together.
        """
        super().__init__()
        self.rows, self._data, self._series = rows, data, series
        self._places, self._global_batch = tuple(places), global_batch
        self._position = 0
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self.quarantine = quarantine

    def __next__(self) -> Batch:
        self._assert_not_closed()
        if self._iterator is None:
            share = _Share(self.rows, self._places, self._position, self._global_batch)
            rows = grain.MapDataset.range(sys.maxsize).map(share)
            self._iterator = iter(make_batches(rows, self._data, len(self._places)))
        batch = next(self._iterator)
        self._position += self._global_batch
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns where the next batch starts."""
        return {"position": self._position, "series": self._series}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where a state was taken, with the next batch exactly as it would have been.

        A state of another seed, of other records or of another mixture is logged: the place is the same, but not
        what stands there.

        Raises:
            ValueError: the state is not of this class.
        """
        position = state.get("position") if isinstance(state, dict) else None
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise ValueError(
                f"{state!r} is no position in the training data: an older version wrote it for a fixed number of "
                "processes; start a new run from the checkpoint's parameters (config.init.model)"
            )
        if state.get("series") != self._series:
            _log.warning(
                "seed, records or mixture are not those that the run was started with: it goes on at place %d of "
                "another series of examples",
                position,
            )
        self._stop()
        self._position = position

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def close(self) -> None:
        """Ends threads and workers."""
        self._stop()
        super().close()
