"""How fast a run goes, and what it costs: rates, MFU, memory of the devices, and steps that compile again."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medglip_jax.planning.chips import CHIPS, GIB
from medglip_jax.planning.programs import forward_flops

logger = logging.getLogger(__name__)

_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event, which tells the function too

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
    """Notices that a jitted function compiles again, which costs minutes each time and means that a shape changes.

    A context manager, inside which compilations are counted.
    """

    def __init__(self, name: str, action: str):
        """Prepares to count.

        Args:
            name: of the function that is jitted.
            action: "error" or "warn": `config.training.on_recompile`.

        Raises:
            ValueError: the action is another.
        """
        if action not in ("error", "warn"):
            raise ValueError(f"config.training.on_recompile is {action!r}: expected error or warn")
        self._name, self._action = f"jit({name})", action
        self._shapes: dict[str, str] | None = None
        self._told = 1
        self.compilations = 0

    def __enter__(self) -> "RecompilationGuard":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **details: Any) -> None:
        if event == _COMPILED and details.get("fun_name") == self._name:
            self.compilations += 1

    def before(self, batch: Mapping[str, Any]) -> None:
        """Looks at a batch before the function takes it.

        Raises:
            RecompilationError: its shapes are not those of the batch before, and the action is "error".
        """
        shapes = {name: f"{x.dtype.name}{list(x.shape)}" for name, x in batch.items()}
        known, self._shapes = self._shapes, shapes
        if known is None or known == shapes:
            return
        changed = [
            f"{name} was {known.get(name, 'not there')}, is {shapes.get(name, 'not there')}"
            for name in sorted(known.keys() | shapes.keys())
            if known.get(name) != shapes.get(name)
        ]
        self._tell("will be compiled again: " + "; ".join(changed))

    def after(self) -> None:
        """Looks whether the call just made compiled.

        Raises:
            RecompilationError: it did, it was not the first time, and the action is "error".
        """
        if self.compilations > self._told:
            self._told = self.compilations
            self._tell("was compiled again with arguments of the same shapes")

    def _tell(self, what: str) -> None:
        message = f"{self._name} {what}. Each compilation takes as long as the first"
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
