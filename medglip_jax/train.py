"""Training: a recipe and a working directory in; checkpoints, metrics and an evaluation out.

    python -m medglip_jax.train --config configs/X.py --workdir DIR [--config.path.to.field=value ...]

The same command goes on where an interrupted run stopped, with the batch that would have come next. DIR then holds

    status.json             how the run stands: running, resume (stopped and saved), finished, failed, hung
    config.json             the recipe with all changes
    tokenizer/              the tokenizer of the prompts
    checkpoints/STEP/       state and position in the data
    metrics.jsonl           one line every config.training.log_every steps
    quarantine.jsonl        records that could not be used, if there are any
    nonfinite.jsonl         steps whose loss or gradient was not finite, if there are any
    tensorboard/            the same for TensorBoard, and the newest predictions
    goodput.json            where the time went: steps, loader, compilation, checkpoints, evaluation, restarts
    profile/                with --profile: a trace of some steps, for TensorBoard or Perfetto
    evaluation.json         average precision at the end, on config.data.eval; of pretraining see docs/pretraining.md
    predictions.png         predicted and true boxes of some of its images

DIR may be in a bucket (gs://, s3://) whose file system is installed; records that could not be used are then in the log
only. SIGTERM, on any of the processes, saves and ends the run with status 0.
"""

import argparse
import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.loader import train_loader
from data_pipelines.records import find_shards
from data_pipelines.text import TextTokenizer, load_tokenizer
from medglip_jax.compilation_cache import add_option, keep_compiled
from medglip_jax.configuration import CONFIG_FILE, load_config, save_config
from medglip_jax.errors import Preempted, reports_errors
from medglip_jax.evaluation.report import print_results, write_json
from medglip_jax.evaluation.run import evaluate_records, local_batch_size
from medglip_jax.inference import make_detector
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.distributed import initialize_distributed, wait_for_processes
from medglip_jax.parallel.mesh import (
    batch_parts,
    batch_sharding,
    describe_parts,
    local_rows,
    make_mesh,
    to_global,
)
from medglip_jax.paths import full_path, is_remote, local_output
from medglip_jax.pretrained import pretrained_parameters, start_from
from medglip_jax.tasks import find_task
from medglip_jax.training.checkpoint import TOKENIZER, Checkpoints
from medglip_jax.training.finetuning import split_trained
from medglip_jax.training.goodput import Goodput
from medglip_jax.training.logging import MetricsLog, ProgressBar
from medglip_jax.training.modality import report_modalities
from medglip_jax.training.nonfinite import NonFiniteSteps
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.pending import PendingMetrics
from medglip_jax.training.preemption import StopRequest
from medglip_jax.training.profiling import TRACED_STEPS, Trace, dump_hlo, parse_steps
from medglip_jax.training.state import TrainState, abstract_state, create_state, evaluated_parameters
from medglip_jax.training.status import Status
from medglip_jax.training.step import gradient_groups, make_train_step
from medglip_jax.training.telemetry import RecompilationGuard, Telemetry
from medglip_jax.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
SHEET_FILE = "predictions.png"
QUARANTINE_FILE = "quarantine.jsonl"
_SCORES = ("AP", "AP50", "AP75")  # of an evaluation


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
    if bool(config.model.masks.kind) != (data.max_masks > 0):
        raise ValueError(
            f"config.model.masks.kind is {config.model.masks.kind!r} and config.data.max_masks {data.max_masks}: masks "
            "are learnt where both are set, as in configs/demo_masks.py, and neither without the other"
        )
    scores = _scores_of(config)
    if (metric := config.training.best_metric) not in scores:
        raise ValueError(f"config.training.best_metric is {metric!r}: expected {', '.join(scores)}")
    if data.eval:
        find_shards(data.eval)  # a wrong path or batch size shows before hours of training
        local_batch_size(config, mesh)


def _scores_of(config: ConfigDict) -> tuple[str, ...]:
    task = find_task(config)
    return _SCORES if task is None else task.scores


class _StopInEvaluation(Exception):
    """The run was asked to stop while it evaluated."""


def train(
    config: ConfigDict, workdir: str | os.PathLike, *, trace_steps: tuple[int, int] | None = None
) -> dict[str, Any] | None:
    """Trains a recipe, or goes on with a run.

    Args:
        config: the recipe.
        workdir: of the run, local or in a bucket; made if needed. If it has checkpoints, the newest is gone on with.
        trace_steps: the first and the last step, from this start, that a trace is recorded of; None records none.

    Returns:
        The evaluation at the end (see `evaluate_records`, or `Task.make_evaluate`), or None without `config.data.eval`.

    Raises:
        NonFiniteLoss: the loss was infinite or no number more than `config.training.max_nonfinite` times; it names the
            images of the batch.
        RecompilationError: a step after the first compiled again; see `config.training.on_recompile`.
        ValueError, OSError: the recipe, the records or the checkpoint in `workdir` cannot be used.
        Preempted: SIGTERM came; a checkpoint was written before.
        KeyboardInterrupt: Ctrl-C came; a checkpoint was written before.
    """
    workdir = full_path(workdir)
    status = Status(workdir)
    with status.follow():
        return _train(config, workdir, status, trace_steps)


def _train(
    config: ConfigDict, workdir: epath.Path, status: Status, trace_steps: tuple[int, int] | None
) -> dict[str, Any] | None:
    goodput = Goodput(workdir)
    training, total = config.training, config.schedule.steps
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check(config, tokenizer, mesh)
    if jax.process_index() == 0:
        report_modalities(config)
    model, optimizer = make_model(config), make_optimizer(config)
    task = find_task(config)  # None: grounding
    if task is None:
        detector = make_detector(model, config, mesh)
    else:
        evaluate_task = task.make_evaluate(model, config, mesh, tokenizer)

    def evaluate(state: TrainState) -> dict[str, Any]:
        params = evaluated_parameters(state, config)

        def between_batches() -> None:
            watchdog.beat(f"evaluation after step {status.step}")
            if stop.reached():
                raise _StopInEvaluation

        if task is not None:
            with goodput.phase("evaluation"):
                return evaluate_task(params, config.data.eval, between_batches=between_batches)
        with goodput.phase("evaluation"), local_output(workdir / SHEET_FILE) as sheet:
            return evaluate_records(
                model,
                params,
                config,
                config.data.eval,
                mesh,
                tokenizer=tokenizer,
                sheet=sheet,
                detector=detector,
                between_batches=between_batches,
            )

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(
            Watchdog(training.watchdog_seconds, report=lambda doing: status.write("hung", doing))
        )
        reading = stack.enter_context(contextlib.ExitStack())
        loader = train_loader(
            config.data,
            seed=config.seed,
            batch_size=config.data.batch_size // jax.process_count(),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            places=local_rows(mesh, config.data.batch_size),
            quarantine=None if is_remote(workdir) else workdir / QUARANTINE_FILE,
        )
        reading.callback(loader.close)
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir, training.keep_checkpoints, keep_every=training.keep_every, keep_best=training.keep_best
            )
        )

        rng = jax.random.key(config.seed)
        if checkpoints.latest_step is None:
            pretrained = pretrained_parameters(config, tell=print if jax.process_index() == 0 else lambda report: None)
            state, placed = create_state(model, config, optimizer, rng, mesh)
            state = start_from(state, pretrained)
        else:
            target = abstract_state(model, config, optimizer, rng, mesh)
            placed = jax.tree.map(lambda x: x.sharding, target)
            watchdog.beat("restoring a checkpoint")
            with goodput.phase("restore"):
                state = checkpoints.restore(target, loader)
        if jax.process_index() == 0:
            save_config(config, workdir / CONFIG_FILE)
            with local_output(workdir / TOKENIZER) as folder:
                tokenizer.save(folder)

        step_fn = jax.jit(
            make_train_step(model, config, optimizer, mesh),
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=(placed, None),
            donate_argnums=0,
        )
        start = status.step = int(state.step)
        groups = gradient_groups(split_trained(state.params, config.finetune)[0])
        nonfinite = NonFiniteSteps(workdir, training.max_nonfinite, groups, start)
        pending = PendingMetrics(nonfinite)
        log = stack.enter_context(
            MetricsLog(workdir, start, wandb_project=training.wandb_project, config=config.to_dict())
        )
        progress = stack.enter_context(ProgressBar(total, config.data.batch_size, start))
        trace = stack.enter_context(Trace(workdir, trace_steps, start))
        recompilation = stack.enter_context(RecompilationGuard("train_step", training.on_recompile))
        telemetry = Telemetry(config, mesh)
        goodput.begin_steps(start)

        def end_early(step: int) -> NoReturn:
            """Saves, if that step is not saved yet, and ends the run as it was asked to."""
            watchdog.beat(f"saving step {step}")
            pending.settle()  # a step that is not finite is not saved
            status.step = step
            if step > start:
                checkpoints.save(step, state, loader)
            checkpoints.close()
            logger.warning("saved step %d, %.1f seconds after the signal", step, stop.seconds)
            raise KeyboardInterrupt(str(Preempted(step))) if stop.interrupted else Preempted(step)

        if stop.reached() and start < total:
            end_early(start)
        logged = start
        for step in range(start + 1, total + 1):
            watchdog.beat(f"step {step}")
            with goodput.phase("loader"):
                batch = next(loader)
            arrays = to_global(batch, mesh)
            recompilation.before(arrays)
            trace.before(step)
            if step == start + 1:
                with goodput.phase("compile"):
                    step_fn.lower(state, arrays).compile()  # what the call below then finds
                    wait_for_processes("compiled")
            state, metrics = step_fn(state, arrays)
            recompilation.after()
            trace.after(step, metrics)
            pending.add(step - 1, metrics, batch["image_id"])
            progress.update(step, pending.loss)

            stops = stop.reached() and step < total
            evaluates = bool(config.data.eval and training.eval_every and step % training.eval_every == 0)
            saves = step % training.checkpoint_every == 0 or step == total or stops
            saves |= evaluates and training.keep_best > 0
            if step % training.log_every == 0 or saves:
                means, skipped = pending.take_means()
                seconds = goodput.take(skipped)
                log.write(step, means | telemetry.rates(step - logged, seconds) | telemetry.memory() | _costs(seconds))
                goodput.write(step)
                logged = status.step = step
            if saves and not stops:
                with goodput.phase("checkpoint"):
                    checkpoints.save(step, state, loader)
                status.write("running")
            if stops:
                end_early(step)
            if evaluates and step < total:
                status.step = step
                try:
                    results = evaluate(state)
                except _StopInEvaluation:
                    end_early(step)
                checkpoints.score(step, results[training.best_metric])
                _log_evaluation(log, step, results, _scores_of(config), workdir / SHEET_FILE)
                progress.pause()
        if (corrupt := loader.quarantine.count()) and jax.process_index() == 0:
            print(f"{corrupt} records could not be used and were skipped: {loader.quarantine.path} lists them")
        reading.close()

        results = None
        status.step = total
        if config.data.eval:
            try:
                results = evaluate(state)
            except _StopInEvaluation:
                end_early(total)
            checkpoints.score(total, results[training.best_metric])
            if start < total:  # a finished run is evaluated again, and logged once
                _log_evaluation(log, total, results, _scores_of(config), workdir / SHEET_FILE)
            if jax.process_index() == 0:
                write_json(results, workdir / EVALUATION_FILE)
        goodput.write(total)
    return results


def _costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns what was not training since the last line, in seconds; what took none is left out."""
    names = ("start", "restore", "compile", "checkpoint", "evaluation")
    return {f"{name}_seconds": seconds[name] for name in names if seconds[name]}


def _log_evaluation(
    log: MetricsLog, step: int, results: Mapping[str, Any], scores: tuple[str, ...], sheet: epath.Path
) -> None:
    log.write(step, {f"eval_{name}": _or_nan(results[name]) for name in scores})
    if scores == _SCORES:
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
    config = load_config(options.config, overrides)
    results = train(config, options.workdir, trace_steps=trace_steps)
    if jax.process_index() == 0:
        if results is not None:
            task = find_task(config)
            (print_results if task is None else task.print_results)(results)
        print(f"done in {(time.monotonic() - started) / 60:.1f} minutes: {options.workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
