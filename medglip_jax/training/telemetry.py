"""How fast a run goes, and what it costs: rates, MFU, memory of the devices, and steps that compile again."""

import logging
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from medglip_jax.planning.chips import CHIPS, GIB
from medglip_jax.planning.programs import forward_flops

logger = logging.getLogger(__name__)

# bfloat16 FLOPs a second of a device, by a part of its `device_kind`; the first that is found in it counts. TPUs: see
# `chips`. GPUs: NVIDIA's data sheets, dense, SXM.
_PEAKS = (
    ("TPU v6", CHIPS["v6e"].flops),
    ("TPU v5 lite", CHIPS["v5e"].flops),
    ("TPU v5e", CHIPS["v5e"].flops),
    ("TPU v5", CHIPS["v5p"].flops),
    ("TPU v4", CHIPS["v4"].flops),
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the bfloat16 FLOPs per second of a kind of device, or None where that is not known (a CPU)."""
    return next((flops for name, flops in _PEAKS if name in device_kind), None)


def model_flops(config: ConfigDict) -> float:
    """Returns the FLOPs of a train step that the model itself needs: three times those of its forward pass.

    Two FLOPs for each multiplication with its addition, in matrix products and convolutions, of the global batch:
    backward is twice forward, and what rematerialisation computes again does not count. Takes the time of tracing.
    """
    return 3 * forward_flops(config)[0] * config.data.batch_size


class RecompilationError(RuntimeError):
    """A step after the first was compiled again, or is about to be."""


class RecompilationGuard:
    """Notices that the train step compiles again, which costs minutes each time and means that a shape changes."""

    def __init__(self, step_fn: Any, action: str):
        """Begins to watch.

        Args:
            step_fn: the jitted step.
            action: "error" or "warn": `config.training.on_recompile`.

        Raises:
            ValueError: the action is another.
        """
        if action not in ("error", "warn"):
            raise ValueError(f"config.training.on_recompile is {action!r}: expected error or warn")
        self._step_fn, self._action = step_fn, action
        self._known: dict[str, str] | None = None
        self._compiled = 0
        self.recompiles = 0

    def before(self, batch: Mapping[str, Any]) -> None:
        """Looks at a batch before the step takes it.

        Raises:
            RecompilationError: its shapes are not those of the batch before, and the action is "error".
        """
        shapes = {name: f"{x.dtype.name}{list(x.shape)}" for name, x in batch.items()}
        known, self._known = self._known, shapes
        if known is None or known == shapes:
            return
        names = sorted(known.keys() | shapes.keys())
        changed = [
            f"{name} was {known.get(name, 'not there')}, is {shapes.get(name, 'not there')}"
            for name in names
            if known.get(name) != shapes.get(name)
        ]
        self._tell("its batch has other shapes: " + "; ".join(changed))

    def after(self) -> None:
        """Looks whether the step just taken was compiled.

        Raises:
            RecompilationError: it was, it is not the first, and the action is "error".
        """
        compiled = self._step_fn._cache_size()
        if self._compiled and compiled > self._compiled:
            self.recompiles += compiled - self._compiled
            self._tell("it was compiled again")
        self._compiled = compiled

    def _tell(self, what: str) -> None:
        message = f"the train step: {what}. Each compilation takes as long as the first"
        if self._action == "error":
            raise RecompilationError(f"{message}; config.training.on_recompile=warn goes on all the same")
        logger.warning("%s", message)


class Telemetry:
    """Turns seconds by phase into what is logged."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        """Finds the peak of the devices; where it is known, the FLOPs of the model are counted.

        Args:
            config: the recipe; reads `training.peak_flops` (of a device; 0 is the maker's number), model and data.
            mesh: of the run.
        """
        device = mesh.devices.flat[0]
        self._batch_size, self._devices = config.data.batch_size, mesh.size
        self._local = list(mesh.local_devices)
        self._peak = config.training.peak_flops or peak_flops(device.device_kind)
        self._model_flops = model_flops(config) if self._peak else None

    def rates(self, steps: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Returns the metrics of some steps.

        Args:
            steps: how many.
            seconds: by phase, from `Goodput.take`; "step", "skipped" and "loader" are those of the steps.

        Returns:
            step_seconds, loader_seconds (of a step: waiting for the batch), images_per_second,
            images_per_second_per_device, and mfu where the peak of the devices is known: model FLOPs of a step / (its
            seconds x peak FLOPs of all devices). Empty without steps.
        """
        took = seconds["step"] + seconds["skipped"] + seconds["loader"]
        if steps < 1 or took <= 0:
            return {}
        rate = steps * self._batch_size / took
        metrics = {
            "step_seconds": took / steps,
            "loader_seconds": seconds["loader"] / steps,
            "images_per_second": rate,
            "images_per_second_per_device": rate / self._devices,
        }
        if self._peak and self._model_flops:
            metrics["mfu"] = self._model_flops / (took / steps * self._peak * self._devices)
        return metrics

    def memory(self) -> dict[str, float]:
        """Returns the memory of this process's fullest device in GiB, now and at its peak; empty where none is told."""
        stats = [device.memory_stats() or {} for device in self._local]
        metrics = {}
        for name, key in (("device_memory_gib", "bytes_in_use"), ("device_memory_peak_gib", "peak_bytes_in_use")):
            values = [found[key] for found in stats if key in found]
            if values:
                metrics[name] = max(values) / GIB
        return metrics
