"""Rates, MFU, memory and recompilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.planning.programs import forward_flops
from medglip_jax.training import telemetry
from medglip_jax.training.telemetry import RecompilationError, RecompilationGuard, Telemetry, peak_flops


def test_rates_follow_from_the_seconds_of_the_steps(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.data.batch_size = 16
    rates = Telemetry(config, make_mesh({"data": 8})).rates(
        4, {"step": 6.0, "skipped": 0.0, "loader": 2.0, "evaluation": 100.0}
    )
    assert rates == {
        "step_seconds": 2.0,
        "loader_seconds": 0.5,
        "images_per_second": 8.0,
        "images_per_second_per_device": 1.0,
    }


def test_nothing_is_said_without_steps(tiny_config):
    seconds = {"step": 0.0, "skipped": 0.0, "loader": 0.0}
    assert Telemetry(tiny_config, make_mesh({"data": 8})).rates(0, seconds) == {}


def test_mfu_is_three_forward_passes_over_the_peak(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.data.batch_size, config.training.peak_flops = 8, 1e12
    rates = Telemetry(config, make_mesh({"data": 8})).rates(2, {"step": 1.0, "skipped": 0.0, "loader": 0.0})
    assert rates["mfu"] == pytest.approx(3 * forward_flops(config)[0] * 8 / (0.5 * 8e12))


def test_peaks_are_found_by_the_name_of_the_device():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None


def test_memory_is_that_of_the_fullest_device(tiny_config):
    class Device:
        device_kind = "cpu"

        def __init__(self, stats):
            self._stats = stats

        def memory_stats(self):
            return self._stats

    measured = Telemetry(tiny_config, make_mesh({"data": 8}))
    assert measured.memory() == {}  # the CPU tells none
    measured._local = [Device(None), Device({"bytes_in_use": 1 << 30}), Device({"bytes_in_use": 3 << 30})]
    assert measured.memory() == {"device_memory_gib": 3.0}


def batch(size):
    return {"image": np.zeros((size, 2), np.uint8), "boxes": np.zeros((2, 4), np.float32)}


def test_another_shape_is_told_before_it_compiles(caplog):
    guard = RecompilationGuard("step", "error")
    guard.before(batch(2))
    guard.before(batch(2))
    with pytest.raises(RecompilationError, match=r"image was uint8\[2, 2\], is uint8\[3, 2\].*on_recompile=warn"):
        guard.before(batch(3))
    guard = RecompilationGuard("step", "warn")
    guard.before(batch(2))
    guard.before(batch(3))
    assert "image was" in caplog.text and "boxes was" not in caplog.text


def test_a_second_compilation_is_an_error():
    @jax.jit
    def guarded_step(x):
        return x + 1

    with RecompilationGuard("guarded_step", "error") as guard:
        for x in (jnp.zeros(2), np.ones(2, np.float32)):  # another kind of argument, and the same program
            guarded_step(x)
            jax.jit(lambda y: y * 2)(x)  # compiles too, and is another function
            guard.after()
        guarded_step(jnp.zeros(3))
        with pytest.raises(RecompilationError, match=r"jit\(guarded_step\) was compiled again"):
            guard.after()
    guarded_step(jnp.zeros(4))
    assert guard.compilations == 2


def test_unknown_action_is_named():
    with pytest.raises(ValueError, match="on_recompile is 'stop': expected error or warn"):
        RecompilationGuard("step", "stop")


def test_no_flops_are_counted_where_the_peak_is_unknown(tiny_config, monkeypatch):
    monkeypatch.setattr(telemetry, "forward_flops", lambda config: pytest.fail("traced for nothing"))
    Telemetry(tiny_config, make_mesh({"data": 8}))
