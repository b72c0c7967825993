"""The same training steps on several meshes: how far losses, norms and parameters are from those of one device.

    python -m benchmarks.mesh_invariance [--steps 20] [--parts] [--output benchmarks/results/mesh_invariance.json]

Each mesh runs in processes of its own, on virtual CPU devices, from the same seed and phantoms, with dropout, drop path
and DropBlock on. The records come through the loader, and each process reads its share. Every mesh is run in float32
and in float64: what the first shows and the second does not is rounding. --parts turns on what benchmarks/ablations.py
adds to plain GLIP (prompts, modalities, hierarchy, masks), loops over equal blocks, and recomputed blocks.
"""

import argparse
import dataclasses
import faulthandler
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from benchmarks.ablations import SETTINGS as PARTS
from benchmarks.machine import cpu_name
from configs.demo import get_config
from data_pipelines.build import build
from data_pipelines.loader import train_loader
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.configuration import load_config, save_config
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.distributed import initialize_distributed
from medglip_jax.parallel.mesh import batch_sharding, local_rows, make_mesh, to_global
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = 40
_PATIENCE = 900  # seconds that a run may take
PARAMETERS = "parameters"  # of a result: file of all parameters after the last step

Metrics = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a run takes place: mesh axes that are not 1, preset of the parameters, processes."""

    sizes: Mapping[str, int]
    preset: str = "ddp"
    processes: int = 1

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return f"{mesh}, {self.preset}" + (f", {self.processes} processes" if self.processes > 1 else "")


ALONE = Setting({"data": 1})
SETTINGS = (
    Setting({"data": 2, "fsdp": 2, "tensor": 2}, "ddp"),
    Setting({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp"),
    Setting({"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_tp"),
    Setting({"replica": 2, "data": 2, "fsdp": 2}, "fsdp"),
    Setting({"replica": 2, "data": 2, "fsdp": 2}, "hsdp"),
    Setting({"data": 2, "sequence": 2, "tensor": 2}, "fsdp_tp"),
    Setting({"data": 2, "fsdp": 2}, "fsdp", processes=2),
    Setting({"data": 2, "tensor": 2}, "fsdp_tp", processes=2),
)


def recipe(records: pathlib.Path, *, parts: bool = False) -> ConfigDict:
    """Returns the demo's model with the dropouts, the optimizer and the prompts of the full-size recipe, small.

    Args:
        records: of the training.
        parts: with modalities, hierarchy and masks, and with loops over blocks and blocks that are recomputed.
    """
    config = get_config()
    config.data.train = str(records)
    config.data.canvas = (64, 64)
    config.data.batch_size = 8
    config.data.prefetch = 8
    config.model.swin.embed_dim, config.model.swin.depths, config.model.fpn.channels = 16, (1, 1, 1, 1), 32
    config.model.swin.drop_path, config.model.fpn.drop_block = 0.2, 0.3
    config.model.bert.dropout = config.model.tower.fusion_dropout = 0.1
    config.optimizer.learning_rate, config.optimizer.ema = 1e-4, 0.999
    config.schedule.warmup_steps, config.schedule.warmup_factor = 5, 0.1
    if parts:
        for changes in PARTS.values():
            config.update_from_flattened_dict(changes)
        config.model.swin.depths, config.model.tower.num_blocks = (1, 1, 3, 1), 2  # equal blocks to loop over
        config.model.scan, config.model.remat = True, "blocks"
    return config


def norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all arrays together."""
    return optax.tree_utils.tree_l2_norm(tree)


def run_steps(config: ConfigDict, steps: int, *, devices: Sequence[Any] | None = None) -> tuple[Metrics, Any]:
    """Trains from the recipe's seed on a mesh of it.

    Args:
        config: a recipe; `model.dtype` float64 (with `jax_enable_x64`) trains in float64 throughout.
        steps: to take.
        devices: of the mesh; None takes all.

    Returns:
        The metrics of each step with the norms of its parameters and of their average, and the parameters at the end,
        which every process has.
    """
    mesh = make_mesh(config.mesh, devices)
    model, optimizer = make_model(config), make_optimizer(config)
    state, placed = create_state(model, config, optimizer, jax.random.key(config.seed), mesh)
    train_step = make_train_step(model, config, optimizer, mesh)
    double = config.model.dtype == "float64"
    if double:
        state = jax.jit(lambda x: jax.tree.map(_to_double, x), out_shardings=placed)(state)

    def step_with_norms(state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        state, metrics = train_step(state, batch)
        return state, metrics | {"parameter_norm": norm(state.params), "ema_norm": norm(state.ema)}

    step = jax.jit(
        step_with_norms, in_shardings=(placed, batch_sharding(mesh)), out_shardings=(placed, None), donate_argnums=0
    )
    loader = train_loader(
        config.data,
        seed=config.seed,
        batch_size=config.data.batch_size // jax.process_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        places=local_rows(mesh, config.data.batch_size),
    )
    history: Metrics = []
    try:
        for _ in range(steps):
            batch = {name: _to_double(value) if double else value for name, value in next(loader).items()}
            state, metrics = step(state, to_global(batch, mesh))
            assert metrics["finite"]
            scalars = {name: x for name, x in jax.device_get(metrics).items() if name not in ("finite", "nonfinite")}
            history.append({name: float(x) for name, x in scalars.items()})
    finally:
        loader.close()
    everywhere = jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), state.params)
    return history, jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(state.params))


def _to_double(x: Any) -> Any:
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, np.floating) else x


def start_processes(config_file: pathlib.Path, setting: Setting, steps: int, output: pathlib.Path) -> None:
    """Runs a recipe on a mesh in processes of its own, which write `output` and, beside it, the parameters.

    Raises:
        RuntimeError: one of them failed; the message has the end of what it wrote.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    devices = int(np.prod([*setting.sizes.values()])) // setting.processes
    overrides = [f"--config.mesh.{axis}={size}" for axis, size in ({"data": 1} | dict(setting.sizes)).items()]
    command = [sys.executable, "-m", "benchmarks.mesh_invariance", "--worker", str(config_file), "--steps", str(steps)]
    command += ["--output", str(output), *overrides, f"--config.sharding={setting.preset}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    # Not to wait for the compiler.
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    # Threads of the runtime, by default as many as cores: devices of two processes wait for each other in collectives,
    # for ever where a waiting device holds the thread that the other one needs.
    environment["PJRT_NPROC"] = "16"
    running = []
    for index in range(setting.processes):
        if setting.processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(setting.processes),
                "JAX_PROCESS_ID": str(index),
            }
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    try:
        for process in running:
            written, _ = process.communicate(timeout=1800)
            if process.returncode:
                raise RuntimeError(f"{setting}: a process ended with {process.returncode}\n{written.decode()[-3000:]}")
    finally:
        for process in running:
            process.kill()


def work(config_file: str, overrides: Sequence[str], steps: int, output: pathlib.Path) -> None:
    """Is one of the processes that `start_processes` starts."""
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)  # a hung process ends with its stacks, not never
    config = load_config(config_file, overrides)
    jax.config.update("jax_enable_x64", config.model.dtype == "float64")
    initialize_distributed()
    history, params = run_steps(config, steps)
    if jax.process_index() == 0:
        flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        np.savez(output.with_suffix(".npz"), **flat)
        output.write_text(json.dumps(history))


def deviations(found: Metrics, expected: Metrics) -> dict[str, float]:
    """Returns for each metric the largest relative deviation over the steps.

    Raises:
        ValueError: the metrics or the steps are not the same ones.
    """
    if len(found) != len(expected) or found[0].keys() != expected[0].keys():
        raise ValueError(f"{len(found)} steps of {sorted(found[0])}, and {len(expected)} of {sorted(expected[0])}")
    return {
        name: max(abs(a[name] - b[name]) / max(abs(b[name]), 1e-30) for a, b in zip(found, expected, strict=True))
        for name in expected[0]
    }


def parameter_deviation(found: pathlib.Path, expected: pathlib.Path) -> float:
    """Returns the norm of the difference of all parameters over their norm."""
    with np.load(found) as ours, np.load(expected) as theirs:
        difference = sum(float(np.sum((ours[name].astype(np.float64) - theirs[name]) ** 2)) for name in theirs)
        return (difference / sum(float(np.sum(theirs[name].astype(np.float64) ** 2)) for name in theirs)) ** 0.5


def main() -> int:
    """Runs every setting in both types, prints a table and writes it with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/mesh_invariance.json")
    parser.add_argument("--parts", action="store_true", help="with modalities, hierarchy, masks, loops over blocks")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64"], choices=["float32", "float64"])
    parser.add_argument("--worker", metavar="CONFIG", help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.worker:
        work(options.worker, overrides, options.steps, options.output)
        return 0

    chosen = SETTINGS if options.only is None else [SETTINGS[i] for i in options.only]
    results: dict[str, Any] = {
        "steps": options.steps,
        "parts": options.parts,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "backend_optimization_level": 0,
        },
        "settings": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        records = pathlib.Path(folder) / "records"
        build(Phantoms(IMAGES, size=64, seed=3), records, name="phantoms", progress=False)
        for dtype in options.dtypes:
            config = recipe(records, parts=options.parts)
            config.model.dtype = dtype
            file = pathlib.Path(folder) / f"{dtype}.json"
            save_config(config, file)
            alone = pathlib.Path(folder) / f"{dtype}_alone.json"
            start_processes(file, ALONE, options.steps, alone)
            expected = json.loads(alone.read_text())
            results.setdefault("alone", {})[dtype] = expected
            print(f"{dtype}, one device: loss {expected[0]['loss']:.6f} to {expected[-1]['loss']:.6f}", flush=True)
            for number, setting in enumerate(chosen):
                output = pathlib.Path(folder) / f"{dtype}_{number}.json"
                start_processes(file, setting, options.steps, output)
                found = json.loads(output.read_text())
                result = {
                    "losses": [metrics["loss"] for metrics in found],
                    "deviations": deviations(found, expected),
                    PARAMETERS: parameter_deviation(output.with_suffix(".npz"), alone.with_suffix(".npz")),
                }
                results["settings"].setdefault(str(setting), {})[dtype] = result
                worst = max(result["deviations"], key=result["deviations"].__getitem__)
                print(
                    f"{dtype}  {setting!s:50}  loss {result['deviations']['loss']:.1e}  parameters "
                    f"{result[PARAMETERS]:.1e}  largest {result['deviations'][worst]:.1e} ({worst})",
                    flush=True,
                )
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
