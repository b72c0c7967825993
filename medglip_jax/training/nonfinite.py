"""What a run does with a loss or a gradient that is infinite or no number: it stops, or skips the step and counts."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from medglip_jax.paths import append_line, drop_later_lines

logger = logging.getLogger(__name__)

NONFINITE_FILE = "nonfinite.jsonl"  # in a run's working directory


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is infinite or not a number, and may not be skipped.

    Attributes:
        step: steps that were taken before it.
        image_ids: images of the batch that this process read.
    """

    def __init__(self, step: int, image_ids: Sequence[str], description: str, limit: int = 0):
        self.step, self.image_ids = step, tuple(image_ids)
        skipped = f" {limit} such steps were skipped, config.training.max_nonfinite." if limit else ""
        super().__init__(
            f"the loss is not finite after {step} steps ({description}); the parameters are still those before this "
            f"batch.{skipped} Its images: {', '.join(self.image_ids)}. Look at them; if they are sound, lower "
            "config.optimizer.learning_rate or set config.model.dtype to float32"
        )


class NonFiniteSteps:
    """Counts the steps of a run that were not finite, over its restarts, and lists them in WORKDIR/nonfinite.jsonl.

    A line has the step (from 1), the images of the batch, the losses, and for each group of parameters how many numbers
    of its gradient are not finite. Processes of a pod write a file each, "nonfinite-P.jsonl" beside that of process 0,
    with the images that they read.
    """

    def __init__(self, workdir: str | os.PathLike[str], limit: int, groups: Sequence[str], start: int = 0):
        """Reads what earlier starts left.

        Args:
            workdir: the run's working directory.
            limit: how many may be skipped; the next one is an error.
            groups: names of the groups in metrics["nonfinite"], from `gradient_groups`.
            start: the step that the run resumes from; later ones are taken again, and so are their lines.

        Raises:
            ValueError: `limit` is negative.
        """
        if limit < 0:
            raise ValueError(f"config.training.max_nonfinite is {limit}: it must be 0 or more steps")
        process = jax.process_index()
        name = NONFINITE_FILE if process == 0 else NONFINITE_FILE.replace(".", f"-{process}.")
        self.path = epath.Path(workdir) / name
        self._limit, self._groups = limit, tuple(groups)
        self.count = drop_later_lines(self.path, start) if self.path.exists() else 0

    def check(self, steps_before: int, metrics: Mapping[str, Any], image_ids: Sequence[str] | np.ndarray) -> bool:
        """Waits for a step's metrics.

        Args:
            steps_before: steps taken before it.
            metrics: as the step returned them.
            image_ids: images of its batch that this process read.

        Returns:
            Whether it was finite; if not, it is listed and counted.

        Raises:
            NonFiniteLoss: it was not, and the limit is reached.
        """
        if bool(metrics["finite"]):
            return True
        ids = [str(image_id) for image_id in image_ids]
        values = {name: float(value) for name, value in metrics.items() if name not in ("finite", "nonfinite")}
        counts = zip(self._groups, np.asarray(metrics["nonfinite"]).tolist(), strict=True)
        groups = {name: count for name, count in counts if count}
        line = {
            "step": steps_before + 1,
            "image_ids": ids,
            "metrics": {name: value if np.isfinite(value) else str(value) for name, value in values.items()},
            "nonfinite_gradients": groups,
        }
        append_line(self.path, json.dumps(line, ensure_ascii=False))
        description = ", ".join(f"{name} {value:g}" for name, value in values.items())
        if groups:
            description += f"; gradients that are not finite: {_few(groups)}"
        if self.count >= self._limit:
            raise NonFiniteLoss(steps_before, ids, description, self.count)
        self.count += 1
        logger.warning(
            "step %d was skipped, number %d of at most %d: the loss or the gradient is not finite (%s). Its images: %s",
            *(steps_before + 1, self.count, self._limit, description, ", ".join(ids)),
        )
        return False


def _few(groups: Mapping[str, int], most: int = 5) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in list(groups.items())[:most])
    return shown + (f" and {len(groups) - most} more groups" if len(groups) > most else "")
