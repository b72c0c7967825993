"""What a run says while it runs: metrics in files, progress on the terminal."""

import collections
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from etils import epath
from PIL import Image

from medglip_jax.paths import append_line, drop_later_lines, is_remote

METRICS_FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # folder in a run's working directory
WANDB_FILE = "wandb_run.txt"  # file there: the id of the run at Weights & Biases, to go on with


class MetricsLog:
    """Writes scalars to WORKDIR/metrics.jsonl, one line a call, and to WORKDIR/tensorboard.

    If asked, Weights & Biases gets the same. Only the first process writes; in the others every method does nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start_step: int = 0,
        *,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the files for more lines.

        Args:
            workdir: the run's working directory; it is made if needed.
            start_step: the step that the run resumes from. Lines of later steps, which the interrupted run wrote after
                its last checkpoint, are taken out, so that every step is there once.
            wandb_project: project at Weights & Biases, which then gets the same; "" sends nothing anywhere.
            config: the recipe, for it.

        Raises:
            ValueError: a project is named, and wandb is not installed.
        """
        self._file = self._writer = self._wandb = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # imports torch, where there is one

        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / METRICS_FILE
        if self._file.exists():
            drop_later_lines(self._file, start_step)
        purge_step = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step)
        if wandb_project:
            self._wandb = _open_wandb(wandb_project, folder, config or {})

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, and brings them to the disk.

        Args:
            step: steps taken.
            metrics: scalars by name. In the JSON lines a value that is not finite is null.
        """
        if self._file is None or self._writer is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_line(self._file, json.dumps({"step": int(step), "time": round(time.time(), 3), **finite}))
        for name, value in values.items():
            self._writer.add_scalar(name, value, int(step))
        self._writer.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def write_image(self, step: int, name: str, path: str | os.PathLike[str]) -> None:
        """Shows a picture in TensorBoard, and at Weights & Biases.

        Args:
            step: steps taken.
            name: of the picture.
            path: of its file.
        """
        if self._writer is None:
            return
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(name, pixels, int(step), dataformats="HWC")
        self._writer.flush()
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({name: wandb.Image(pixels)}, step=int(step))

    def close(self) -> None:
        """Closes the files."""
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(project: str, folder: epath.Path, config: Mapping[str, Any]) -> Any:
    """Begins a run at Weights & Biases, or goes on with the one of this folder."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"config.training.wandb_project is {project!r}, but wandb is not installed: pip install wandb"
        ) from None
    path = folder / WANDB_FILE
    known = path.read_text(encoding="utf-8").strip() if path.exists() else None
    directory = None if is_remote(folder) else str(folder)
    run = wandb.init(project=project, dir=directory, id=known, resume="allow", config=dict(config))
    path.write_text(f"{run.id}\n", encoding="utf-8")
    return run


class ProgressBar:
    """Shows step, loss, images a second and the time left; a context manager.

    On a terminal it is a bar. Elsewhere, as in the logs of a job, it is a plain line every few seconds. Only the first
    process shows anything.
    """

    def __init__(
        self,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        *,
        line_seconds: float = 10.0,
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts to count.

        Args:
            total_steps: of the run.
            batch_size: images in a global batch.
            start_step: steps taken before.
            line_seconds: seconds between lines where there is no terminal.
            console: where to show it; None is the standard error.
            clock: seconds.
        """
        self.total_steps, self.batch_size, self.step = total_steps, batch_size, start_step
        self._loss: float | None = None
        self._clock, self._line_seconds = clock, line_seconds
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=50)
        self._shown = -math.inf
        self._console = console or rich.console.Console(stderr=True)
        self._visible = jax.process_index() == 0
        self._bar = None
        if self._visible and self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(None),
                rich.progress.TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self.describe(), total=total_steps, completed=start_step)

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def images_per_second(self) -> float | None:
        """Over the last 50 updates; None before there are two. The first step, which compiles, does not count."""
        if len(self._recent) < 2:
            return None
        (begin, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) * self.batch_size / (end - begin) if end > begin else None

    def update(self, step: int, loss: float | None = None) -> None:
        """Shows a step.

        Args:
            step: steps taken.
            loss: the newest one known; None keeps showing the one before.
        """
        self.step, self._loss = step, self._loss if loss is None else float(loss)
        now = self._clock()
        self._recent.append((now, step))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self.describe())
        elif self._visible and (now - self._shown >= self._line_seconds or step >= self.total_steps):
            self._shown = now
            self._console.print(self.describe(), highlight=False, soft_wrap=True)

    def pause(self) -> None:
        """Forgets the speed so far: call it after an evaluation, whose time is not training's."""
        self._recent.clear()

    def describe(self) -> str:
        """Returns the line that is shown."""
        parts = [f"step {self.step}/{self.total_steps}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        speed = self.images_per_second
        if speed:
            left = (self.total_steps - self.step) * self.batch_size / speed
            parts += [f"{speed:.1f} images/s", f"ETA {datetime.timedelta(seconds=round(left))}"]
        return "  ".join(parts)
