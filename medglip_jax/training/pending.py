"""The metrics of steps, each taken while the next one runs, so that the devices never wait for the host."""

import jax
import numpy as np

from medglip_jax.training.nonfinite import NonFiniteSteps


class PendingMetrics:
    """Holds what steps returned until it is there."""

    def __init__(self, nonfinite: NonFiniteSteps):
        """Begins with nothing; `nonfinite` looks at every step."""
        self._nonfinite = nonfinite
        self._newest: tuple[int, dict[str, jax.Array], np.ndarray] | None = None
        self._settled: list[dict[str, float]] = []
        self._skipped = 0
        self.loss: float | None = None

    def add(self, steps_before: int, metrics: dict[str, jax.Array], image_ids: np.ndarray) -> None:
        """Takes what a step returned; raises `NonFiniteLoss` if the one before it was not finite."""
        self.settle()
        self._newest = (steps_before, metrics, image_ids)

    def settle(self) -> None:
        """Waits for the newest step; raises `NonFiniteLoss` if it was not finite."""
        if self._newest is None:
            return
        steps_before, metrics, image_ids = self._newest
        self._newest = None
        if not self._nonfinite.check(steps_before, metrics, image_ids):
            self._skipped += 1
            return
        scalars = {name: value for name, value in metrics.items() if name not in ("finite", "nonfinite")}
        self._settled.append({name: float(value) for name, value in scalars.items()})
        self.loss = self._settled[-1]["loss"]

    def take_means(self) -> tuple[dict[str, float], float]:
        """Waits for the newest step.

        Returns:
            The mean of each metric since the last call, with `skipped_steps` where there are some; and the share of
            the steps that were skipped.
        """
        self.settle()
        settled, self._settled = self._settled, []
        skipped, self._skipped = self._skipped, 0
        means = {name: float(np.mean([metrics[name] for metrics in settled])) for name in (settled or [{}])[0]}
        if skipped:
            means["skipped_steps"] = skipped
        return means, skipped / max(len(settled) + skipped, 1)
