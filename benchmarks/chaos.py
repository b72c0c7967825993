"""Kills training at random moments, starts it again, and compares its losses with those of a run left alone.

    python -m benchmarks.chaos [--kills 50] [--pair-kills 5] [--output benchmarks/results/chaos.json]

A small GLIP trains on phantoms with every dropout on, and saves every few steps. `kill -9` comes at a random moment: a
fifth of the times before the first step of a start (it imports, restores, compiles), else while it steps and saves. The
same command goes on, until the run is done, and then the next run is begun, until all kills are spent. Every loss of
every run must be that of the undisturbed run, to the bit. Then the same with runs of two processes, of which one is
killed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.machine import cpu_name
from benchmarks.mesh_invariance import recipe
from data_pipelines.build import build
from data_pipelines.sources.phantoms import Phantoms
from medglip_jax.configuration import save_config
from medglip_jax.training.checkpoint import CHECKPOINTS
from medglip_jax.training.logging import METRICS_FILE

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVED_EVERY = 60, 4
_PATIENCE = 400  # seconds that a process may take to end
_POLL = 0.02  # seconds between looks at the log
_EARLY = 0.2  # share of the kills that come before the first step of a start


class TrainingProcesses:
    """One start of `medglip train` on this machine, as processes with virtual CPU devices."""

    def __init__(
        self,
        config: pathlib.Path,
        workdir: pathlib.Path,
        *,
        processes: int = 1,
        devices: int = 1,
        cache: str = "",
        overrides: Sequence[str] = (),
        module: str = "medglip_jax.train",
    ):
        """Starts them.

        Args:
            config: of the recipe.
            workdir: of the run.
            processes: how many, connected over loopback.
            devices: of each process.
            cache: folder for compiled programs; "" keeps none.
            overrides: more arguments.
            module: that is run.
        """
        command = [sys.executable, "-m", module, "--config", str(config), "--workdir", str(workdir)]
        command += overrides
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
        # Not to wait for the compiler; the programs of all starts are the same.
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
        # Threads of the runtime, by default as many as cores: devices of two processes wait for each other in
        # collectives, for ever where a waiting device holds the thread that the other one needs.
        environment["PJRT_NPROC"] = "16"
        if cache:
            environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        if processes > 1:
            with socket.socket() as listener:
                listener.bind(("localhost", 0))
                port = listener.getsockname()[1]
            environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
        self._output = [tempfile.TemporaryFile() for _ in range(processes)]  # noqa: SIM115 (closed by __exit__)
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, "JAX_PROCESS_ID": str(index)} if processes > 1 else environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for index, output in enumerate(self._output)
        ]

    def __enter__(self) -> "TrainingProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process, output in zip(self.processes, self._output, strict=True):
            process.kill()
            process.wait()
            output.close()

    def wait(self, seconds: float = _PATIENCE) -> list[int]:
        """Waits until all have ended, and returns their exit statuses."""
        end = time.monotonic() + seconds
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def read(self, index: int = 0) -> str:
        """Returns what a process has written."""
        self._output[index].seek(0)
        return self._output[index].read().decode(errors="replace")

    def finish(self) -> None:
        """Waits until all have ended.

        Raises:
            RuntimeError: one of them failed; the message has the end of what it wrote.
        """
        for index, status in enumerate(self.wait()):
            if status:
                raise RuntimeError(f"process {index} ended with {status}\n{self.read(index)[-3000:]}")


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Returns the losses of a run by step; a last line that is not whole is left out."""
    found = {}
    path = workdir / METRICS_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry:
            found[entry["step"]] = entry["loss"]
    return found


def is_saving(workdir: pathlib.Path) -> bool:
    """Returns whether a checkpoint is begun and not finished."""
    return any("tmp" in path.name for path in (workdir / CHECKPOINTS).glob("*"))


@dataclasses.dataclass
class Kill:
    """One kill: seconds after the start, newest step in the log then, whether a checkpoint was being written."""

    after: float
    step: int
    saving: bool
    others_ended: float | None = None  # seconds until the other process had ended


@dataclasses.dataclass
class Undisturbed:
    """The run that nothing happens to: its losses by step, seconds before its first step and from there to the end."""

    losses: dict[int, float]
    start: float
    training: float


def leave_alone(config: pathlib.Path, workdir: pathlib.Path, **start: Any) -> Undisturbed:
    """Trains without a kill."""
    began, first = time.monotonic(), None
    with TrainingProcesses(config, workdir, **start) as started:
        while started.processes[0].poll() is None:
            time.sleep(_POLL)
            if first is None and losses(workdir):
                first = time.monotonic()
        started.finish()
    assert first is not None and len(losses(workdir)) == STEPS
    return Undisturbed(losses(workdir), first - began, time.monotonic() - first)


def wait_for_moment(
    process: subprocess.Popen[bytes], workdir: pathlib.Path, alone: Undisturbed, rng: random.Random
) -> bool:
    """Waits for a random moment; returns whether the process still runs then."""
    if rng.random() < _EARLY:
        seconds = rng.uniform(0, alone.start)
    else:
        known = losses(workdir)
        while losses(workdir) == known and process.poll() is None:
            time.sleep(_POLL)
        seconds = rng.uniform(0, alone.training / 2)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def torment(
    config: pathlib.Path, folder: pathlib.Path, kills: int, alone: Undisturbed, rng: random.Random, **start: Any
) -> tuple[list[Kill], int]:
    """Runs until all kills are spent and the last run is done; returns them, and how many runs were compared.

    Raises:
        AssertionError: a run's losses are not those of the undisturbed run.
    """
    listed: list[Kill] = []
    runs = 0
    while len(listed) < kills:
        workdir = folder / f"run_{runs}"
        done = False
        while not done:
            began = time.monotonic()
            with TrainingProcesses(config, workdir, **start) as started:
                victim = rng.choice(started.processes)
                done = len(listed) >= kills or not wait_for_moment(victim, workdir, alone, rng)
                if done:
                    started.finish()
                    break
                saving = is_saving(workdir)
                victim.kill()
                killed = time.monotonic()
                statuses = started.wait()
                assert all(statuses), f"a process ended as if nothing had happened: {statuses}"
                kill = Kill(round(killed - began, 2), max(losses(workdir), default=0), saving)
                if len(started.processes) > 1:
                    kill.others_ended = round(time.monotonic() - killed, 2)
                listed.append(kill)
                print(f"kill {len(listed)}: {kill}", flush=True)
        found = losses(workdir)
        differ = {step: (found.get(step), loss) for step, loss in alone.losses.items() if found.get(step) != loss}
        assert found.keys() == alone.losses.keys() and not differ, f"losses of {workdir.name}: {differ}"
        runs += 1
    return listed, runs


def main() -> int:
    """Runs both and writes what came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pair-kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/chaos.json")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    results: dict[str, Any] = {
        "steps": STEPS,
        "saved_every": SAVED_EVERY,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "jax": jax.__version__},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build(Phantoms(40, size=64, seed=3), folder / "records", name="phantoms", progress=False)
        config = recipe(folder / "records")
        config.schedule.steps = STEPS
        training = config.training
        training.checkpoint_every, training.log_every, training.keep_checkpoints = SAVED_EVERY, 1, 2
        file = folder / "recipe.json"
        save_config(config, file)
        for title, kills, processes in (
            ("one process", options.kills, 1),
            ("two processes", options.pair_kills, 2),
        ):
            if not kills:
                continue
            start: dict[str, Any] = {"processes": processes, "devices": 2 // processes, "cache": str(folder / "cache")}
            start["overrides"] = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
            place = folder / title.replace(" ", "_")
            leave_alone(file, place / "first", **start)  # compiles
            alone = leave_alone(file, place / "alone", **start)
            listed, runs = torment(file, place, kills, alone, rng, **start)
            results[title] = {
                "kills": [dataclasses.asdict(kill) for kill in listed],
                "runs": runs,
                "while_saving": sum(kill.saving for kill in listed),
                "losses_compared": runs * STEPS,
                "losses_that_differ": 0,
            }
            print(f"{title}: {len(listed)} kills, {runs} runs of {STEPS} steps, every loss the same", flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
