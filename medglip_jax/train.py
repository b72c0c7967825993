"""Training: a recipe and a working directory in; checkpoints, metrics and an evaluation out.

    python -m medglip_jax.train --config configs/X.py --workdir DIR [--config.path.to.field=value ...]

The same command goes on where an interrupted run stopped, with the batch that would have come next. DIR then holds

    config.json             the recipe with all changes
    tokenizer/              the tokenizer of the prompts
    checkpoints/STEP/       state and position in the data
    metrics.jsonl           one line every config.training.log_every steps
    quarantine.jsonl        records that could not be used, if there are any
    tensorboard/            the same for TensorBoard, and the newest predictions
    goodput.json            where the time went: steps, loader, compilation, checkpoints, evaluation, restarts
    profile/                with --profile: a trace of some steps, for TensorBoard or Perfetto
    evaluation.json         average precision at the end, on config.data.eval
    predictions.png         predicted and true boxes of some of its images
"""

import argparse
import contextlib
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.loader import train_loader
from data_pipelines.records import find_shards
from data_pipelines.text import TextTokenizer, load_tokenizer
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.configuration import CONFIG_FILE, load_config, save_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import print_results, write_json
from medglip_jax.evaluation.run import evaluate_records, local_batch_size
from medglip_jax.inference import make_detector
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.distributed import initialize_distributed
from medglip_jax.parallel.mesh import (
    batch_parts,
    batch_sharding,
    describe_parts,
    local_rows,
    make_mesh,
    to_global,
)
from medglip_jax.pretrained import pretrained_parameters, start_from
from medglip_jax.training.checkpoint import TOKENIZER, Checkpoints
from medglip_jax.training.goodput import Goodput
from medglip_jax.training.logging import MetricsLog, ProgressBar
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.profiling import TRACED_STEPS, Trace, dump_hlo, parse_steps
from medglip_jax.training.state import TrainState, abstract_state, create_state
from medglip_jax.training.step import check_finite, make_train_step
from medglip_jax.training.telemetry import RecompilationGuard, Telemetry

EVALUATION_FILE = "evaluation.json"
SHEET_FILE = "predictions.png"
QUARANTINE_FILE = "quarantine.jsonl"


def _check(config: ConfigDict, tokenizer: TextTokenizer, mesh: Mesh) -> None:
    """Finds the mistakes in a recipe that would show late, or as an error without a name."""
    data, bert, parts = config.data, config.model.bert, batch_parts(mesh)
    if data.batch_size % parts or data.batch_size % jax.process_count():
        raise ValueError(
            f"config.data.batch_size is {data.batch_size}: it must be a multiple of {parts}, the mesh axes "
            f"{describe_parts(mesh)}, and of the {jax.process_count()} processes"
        )
    accumulation = config.training.accumulation
    if accumulation < 1 or data.batch_size % (parts * accumulation):
        raise ValueError(
            f"config.training.accumulation is {accumulation}: at least 1 is needed, and config.data.batch_size "
            f"({data.batch_size}) must be a multiple of it times {parts}, the mesh axes {describe_parts(mesh)}"
        )
    if tokenizer.vocab_size > bert.vocab_size:
        raise ValueError(
            f"config.model.bert.vocab_size is {bert.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens: "
            "raise the one, or choose another config.data.tokenizer"
        )
    if data.max_tokens > bert.max_positions:
        raise ValueError(
            f"config.data.max_tokens is {data.max_tokens}, but config.model.bert.max_positions is {bert.max_positions}"
        )
    if data.eval:
        find_shards(data.eval)  # a wrong path or batch size shows before hours of training
        local_batch_size(config, mesh)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came; a second one interrupts at once.

    Only in a run of one process: several would have to agree on the step.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if jax.process_count() > 1:
        yield lambda: False
        return
    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _PendingMetrics:
    """The metrics of steps, each taken while the next one runs, so that the devices never wait for the host."""

    def __init__(self) -> None:
        self._newest: tuple[int, dict[str, jax.Array], np.ndarray] | None = None
        self._settled: list[dict[str, float]] = []
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
        check_finite(steps_before, metrics, image_ids)
        self._settled.append({name: float(value) for name, value in metrics.items() if name != "finite"})
        self.loss = self._settled[-1]["loss"]

    def take_means(self) -> dict[str, float]:
        """Waits for the newest step and returns the mean of each metric since the last call."""
        self.settle()
        settled, self._settled = self._settled, []
        return {name: float(np.mean([metrics[name] for metrics in settled])) for name in settled[0]}


def train(
    config: ConfigDict, workdir: str | os.PathLike, *, trace_steps: tuple[int, int] | None = None
) -> dict[str, Any] | None:
    """Trains a recipe, or goes on with a run.

    Args:
        config: the recipe.
        workdir: of the run; made if needed. If it has checkpoints, the newest one is gone on with.
        trace_steps: the first and the last step, from this start, that a trace is recorded of; None records none.

    Returns:
        The evaluation at the end (see `evaluate_records`), or None without `config.data.eval`.

    Raises:
        NonFiniteLoss: the loss was infinite or no number; it names the images of the batch.
        RecompilationError: a step after the first compiled again; see `config.training.on_recompile`.
        ValueError, OSError: the recipe, the records or the checkpoint in `workdir` cannot be used.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; a checkpoint was written before.
    """
    workdir = pathlib.Path(workdir).resolve()
    goodput = Goodput(workdir)
    training, total = config.training, config.schedule.steps
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check(config, tokenizer, mesh)
    model, optimizer = GLIP(config.model), make_optimizer(config)
    detector = make_detector(model, config, mesh)

    def evaluate(state: TrainState, sheet: pathlib.Path | None = None) -> dict[str, Any]:
        params = state.ema if config.evaluation.use_ema and state.ema is not None else state.params
        return evaluate_records(
            model, params, config, config.data.eval, mesh, tokenizer=tokenizer, sheet=sheet, detector=detector
        )

    with contextlib.ExitStack() as stack:
        reading = stack.enter_context(contextlib.ExitStack())
        loader = train_loader(
            config.data,
            seed=config.seed,
            batch_size=config.data.batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            places=local_rows(mesh, config.data.batch_size),
            quarantine=workdir / QUARANTINE_FILE,
        )
        reading.callback(loader.close)
        checkpoints = stack.enter_context(Checkpoints(workdir, training.keep_checkpoints))

        rng = jax.random.key(config.seed)
        if checkpoints.latest_step is None:
            pretrained = pretrained_parameters(config, tell=print if jax.process_index() == 0 else lambda report: None)
            state, placed = create_state(model, config, optimizer, rng, mesh)
            state = start_from(state, pretrained)
        else:
            target = abstract_state(model, config, optimizer, rng, mesh)
            placed = jax.tree.map(lambda x: x.sharding, target)
            with goodput.phase("restore"):
                state = checkpoints.restore(target, loader)
        if jax.process_index() == 0:
            save_config(config, workdir / CONFIG_FILE)
            tokenizer.save(workdir / TOKENIZER)

        step_fn = jax.jit(
            make_train_step(model, config, optimizer, mesh),
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=(placed, None),
            donate_argnums=0,
        )
        start, pending = int(state.step), _PendingMetrics()
        log = stack.enter_context(
            MetricsLog(workdir, start, wandb_project=training.wandb_project, config=config.to_dict())
        )
        progress = stack.enter_context(ProgressBar(total, config.data.batch_size, start))
        stop_asked = stack.enter_context(_stop_on_signal())
        trace = stack.enter_context(Trace(workdir, trace_steps, start))
        recompilation = stack.enter_context(RecompilationGuard("train_step", training.on_recompile))
        telemetry = Telemetry(config, mesh)
        goodput.begin_steps(start)

        logged = start
        for step in range(start + 1, total + 1):
            with goodput.phase("loader"):
                batch = next(loader)
            arrays = to_global(batch, mesh)
            recompilation.before(arrays)
            trace.before(step)
            with goodput.phase("compile") if step == start + 1 else contextlib.nullcontext():
                state, metrics = step_fn(state, arrays)
            recompilation.after()
            trace.after(step, metrics)
            pending.add(step - 1, metrics, batch["image_id"])
            progress.update(step, pending.loss)

            stops = stop_asked() and step < total
            saves = step % training.checkpoint_every == 0 or step == total or stops
            if step % training.log_every == 0 or saves:
                means, seconds = pending.take_means(), goodput.take()
                log.write(step, means | telemetry.rates(step - logged, seconds) | telemetry.memory() | _costs(seconds))
                goodput.write(step)
                logged = step
            if saves:
                with goodput.phase("checkpoint"):
                    checkpoints.save(step, state, loader)
            if stops:
                raise KeyboardInterrupt(f"stopped after step {step}; the same command goes on from there")
            if config.data.eval and training.eval_every and step % training.eval_every == 0 and step < total:
                with goodput.phase("evaluation"):
                    results = evaluate(state, workdir / SHEET_FILE)
                    _log_evaluation(log, step, results, workdir / SHEET_FILE)
                progress.pause()
        if (corrupt := loader.quarantine.count()) and jax.process_index() == 0:
            print(f"{corrupt} records could not be used and were skipped: {loader.quarantine.path} lists them")
        reading.close()

        results = None
        if config.data.eval:
            with goodput.phase("evaluation"):
                results = evaluate(state, workdir / SHEET_FILE)
            if start < total:  # a finished run is evaluated again, and logged once
                _log_evaluation(log, total, results, workdir / SHEET_FILE)
            if jax.process_index() == 0:
                write_json(results, workdir / EVALUATION_FILE)
        goodput.write(total)
    return results


def _costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns what was not training since the last line, in seconds; what took none is left out."""
    names = ("start", "restore", "compile", "checkpoint", "evaluation")
    return {f"{name}_seconds": seconds[name] for name in names if seconds[name]}


def _log_evaluation(log: MetricsLog, step: int, results: Mapping[str, Any], sheet: pathlib.Path) -> None:
    log.write(step, {f"eval_{name}": _or_nan(results[name]) for name in ("AP", "AP50", "AP75")})
    log.write_image(step, "predictions", sheet)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and prints the evaluation."""
    parser = argparse.ArgumentParser(
        prog="medglip train",
        description="Trains a recipe; the same command goes on with an interrupted run.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, configs/X.py")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where checkpoints and metrics go")
    first, last = TRACED_STEPS
    parser.add_argument(
        "--profile",
        nargs="?",
        const=f"{first}:{last}",
        metavar="FIRST:LAST",
        help="record a trace of these steps, counted from this start (%(const)s), to WORKDIR/profile",
    )
    parser.add_argument("--dump-hlo", metavar="DIR", help="folder for the programs that XLA makes, as text")
    add_option(parser)
    options, overrides = parser.parse_known_args(argv)

    keep_compiled(options.compilation_cache)
    trace_steps = parse_steps(options.profile) if options.profile else None
    if options.dump_hlo:
        dump_hlo(options.dump_hlo)
    initialize_distributed()
    started = time.monotonic()
    results = train(load_config(options.config, overrides), options.workdir, trace_steps=trace_steps)
    if jax.process_index() == 0:
        if results is not None:
            print_results(results)
        print(f"done in {(time.monotonic() - started) / 60:.1f} minutes: {options.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
