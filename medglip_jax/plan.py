"""Planning: whether a recipe fits a TPU pod and how fast it can be there at most, without having one.

    medglip plan --config configs/medglip_t.py --topology v5e:16x16 [--slices 2] [--batch 4] [--json plan.json]

The train step and the detection of evaluation are compiled for the topology by libtpu, on this machine's CPU. What the
compiler says of memory, and what its program does, is printed with the least time that it takes: docs/pods.md says how
that is counted.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.evaluation.report import write_json
from medglip_jax.parallel.mesh import batch_parts, make_mesh
from medglip_jax.planning.chips import GIB
from medglip_jax.planning.measurement import Measurement, fingerprint, measure
from medglip_jax.planning.programs import forward_flops, images_of_part, lower_eval, lower_train
from medglip_jax.planning.roofline import FORMULA, Roofline
from medglip_jax.planning.suggestion import POLICIES, Trial, best_trial, largest_batch
from medglip_jax.planning.topology import Topology, devices_of, parse_topology

MARGIN = 0.1  # of the memory stays free for a suggestion: the next batch comes while a step runs, and the runtime's own
_MANY_RUNS = 10_000  # of loop bodies in a step, above which they are told: a TPU starts kernels for each


class Planner:
    """Compiles the programs of a recipe for a topology; what was compiled before is taken from the JSON file."""

    def __init__(self, config: ConfigDict, topology: Topology, effort: float, file: pathlib.Path | None = None):
        """Makes the topology.

        Args:
            config: a recipe.
            topology: of the run.
            effort: of the compiler; see `measure`.
            file: results of an earlier call, or None.

        Raises:
            ValueError: libtpu is missing, the mesh does not fit the topology, or the file is no plan.
        """
        self.config, self.topology, self.effort = config, topology, effort
        self.mesh: Mesh = make_mesh(config.mesh, devices_of(topology))
        self.compiled: dict[str, Any] = {}
        if file is not None and file.exists():
            try:
                self.compiled = json.loads(file.read_text(encoding="utf-8"))["compiled"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is there and is no result of medglip plan: {error!r}; remove it") from error

    def global_batch(self, images: int) -> int:
        """Returns the images of a step, from those of a part."""
        return images * batch_parts(self.mesh)

    def measure(self, lower: Callable[[ConfigDict, Mesh, int], Any], remat: str, images: int) -> Measurement:
        """Lowers and compiles a program.

        Args:
            lower: `lower_train` or `lower_eval`.
            remat: `config.model.remat`.
            images: of a part.
        """
        config = ConfigDict(self.config.to_dict())
        config.model.remat = remat
        lowered = lower(config, self.mesh, self.global_batch(images))
        key = fingerprint(lowered, str(self.topology), self.effort)
        if key not in self.compiled:
            result = measure(lowered, self.topology.chip, self.topology.num_devices, self.effort)
            self.compiled[key] = result.to_json()
        return Measurement.from_json(self.compiled[key])

    def bound(self, measurement: Measurement, images: int, model_flops: float) -> Roofline | None:
        """Returns the least time of a program that fits, for so many images of a part and FLOPs for each."""
        if not measurement.flops:
            return None
        return measurement.roofline(
            self.topology.chip,
            self.topology.num_devices,
            images=self.global_batch(images),
            model_flops_per_image=model_flops,
        )

    def suggest(self, model_flops: float, tell: Callable[[Trial], None]) -> tuple[list[Trial], Trial | None]:
        """Tries policies of rematerialisation and batches; returns what was tried, and the best that fits."""
        limit = (1 - MARGIN) * self.topology.chip.hbm
        trials: list[Trial] = []
        for remat in POLICIES:

            def compile_with(micro_batch: int, remat: str = remat) -> Measurement:
                images = micro_batch * self.config.training.accumulation
                measurement = self.measure(lower_train, remat, images)
                trials.append(Trial(remat, images, measurement, self.bound(measurement, images, model_flops)))
                tell(trials[-1])
                return measurement

            largest_batch(compile_with, limit)
        return trials, best_trial(trials, limit)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def describe(name: str, measurement: Measurement, bound: Roofline | None, topology: Topology) -> str:
    """Returns what was found of a program, for people."""
    m, hbm = measurement, topology.chip.hbm
    verdict = "fits" if m.fits else "DOES NOT FIT"
    if bound is None:
        return (
            f"{name}: {verdict}: {_gib(m.total)} of {_gib(hbm)} a device are needed (compiled in {m.compile_s:.0f} s)"
        )
    collectives = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in m.collectives.items()) or "none"
    parts = f"compute {bound.compute * 1e3:.1f} ms, HBM {bound.memory * 1e3:.1f} ms, ICI {bound.ici * 1e3:.1f} ms"
    lines = [
        f"{name} (compiled in {m.compile_s:.0f} s)",
        f"  memory       {_gib(m.total)} of {_gib(hbm)} a device: {verdict}; arguments {_gib(m.arguments)}, "
        f"temporaries {_gib(m.temporaries)}, outputs {_gib(m.outputs)}, code {_gib(m.code)}",
        f"  a device     {m.flops / 1e12:.3f} TFLOP, {m.hbm_bytes / 1e9:.2f} GB to and from HBM",
        f"  collectives  {collectives}; sent {m.sent_ici / 1e6:.1f} MB in a slice, "
        f"{m.sent_dcn / 1e6:.1f} MB between slices",
        f"  least times  {parts}, DCN {bound.dcn * 1e3:.1f} ms",
    ]
    for label, seconds in ((f"all overlaps ({bound.bound_by})", bound.seconds), ("no overlap", bound.seconds_serial)):
        lines.append(
            f"  {label:24} step >= {seconds * 1e3:.1f} ms, MFU <= {bound.mfu(seconds):.1%}, "
            f"images/s <= {bound.images / seconds:.1f}"
        )
    for place, size, _ in m.traffic:
        lines.append(f"  of HBM {size / m.hbm_bytes:5.1%}  {size / 1e9:.2f} GB in {place or 'what the compiler adds'}")
    if m.iterations > _MANY_RUNS:
        place, runs, cycles = m.loops[0]
        share = f", {cycles / m.cycles:.0%} of the cycles that the compiler expects" if m.cycles else ""
        lines.append(
            f"  warning      {m.iterations:,} loop bodies run one after another, {runs:,} of them in {place}{share}: "
            "the starts of their kernels are not in these bounds"
        )
    if m.unknown_loops:
        lines.append(f"  warning      {m.unknown_loops} loops of unknown length are counted once")
    return "\n".join(lines)


def _bound_json(bound: Roofline | None) -> dict[str, Any] | None:
    if bound is None:
        return None
    return dataclasses.asdict(bound) | {
        "seconds": bound.seconds,
        "seconds_serial": bound.seconds_serial,
        "bound_by": bound.bound_by,
        "mfu": bound.mfu(bound.seconds),
        "mfu_serial": bound.mfu(bound.seconds_serial),
        "images_per_second": bound.images / bound.seconds,
        "images_per_second_serial": bound.images / bound.seconds_serial,
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "remat": trial.remat,
        "images_per_part": trial.images,
        "total_bytes": trial.measurement.total,
        "fits": trial.measurement.fits,
        "compile_s": trial.measurement.compile_s,
        "bound": _bound_json(trial.bound),
    }


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Compiles, prints what was found, and writes it; the exit status is 0 even where the program does not fit."""
    parser = argparse.ArgumentParser(
        prog="medglip plan",
        description="Compiles a recipe for a TPU topology on this machine: memory, FLOPs, collectives, least times.",
        epilog="Fields of the recipe are set as --config.group.field=value.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="recipe, configs/X.py")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="chips of a slice, as v5e:16x16 or v5p:4x4x8")
    add("--slices", type=int, default=1, help="slices of that shape; default: %(default)s")
    add("--batch", type=int, metavar="N", help="images of a part of the batch (a device, where none shares an image)")
    add(
        "--effort",
        type=float,
        default=0.0,
        help="of the compiler, -1 (fastest) to 0 (as in a run); default: %(default)s",
    )
    add("--no-eval", action="store_true", help="leave out the detection of evaluation (as in pretraining)")
    add("--suggest", action="store_true", help="also look for the batch and config.model.remat that fit")
    add("--json", metavar="FILE", type=pathlib.Path, help="file for the results, which is also where a plan goes on")
    options, overrides = parser.parse_known_args(argv)
    if not -1 <= options.effort <= 0:
        raise ValueError(f"--effort {options.effort}: between -1 and 0")
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch {options.batch}: at least 1")

    config = load_config(options.config, overrides)
    topology = parse_topology(options.topology, options.slices)
    planner = Planner(config, topology, options.effort, options.json)
    images = options.batch or images_of_part(config, planner.mesh)
    model_flops, parameters = forward_flops(config)
    mesh = {axis: size for axis, size in planner.mesh.shape.items() if size > 1}
    results: dict[str, Any] = {
        "config": options.config,
        "overrides": overrides,
        "topology": str(topology),
        "devices": topology.num_devices,
        "mesh": mesh,
        "sharding": config.sharding,
        "images_per_part": images,
        "effort": options.effort,
        "jax": jax.__version__,
        "parameters": parameters,
        "forward_flops_per_image": model_flops,
        "formula": FORMULA,
    }

    def save() -> None:
        if options.json:
            write_json(results | {"compiled": planner.compiled}, options.json)

    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items()) or "one device"
    print(
        f"{options.config} on {topology}: {topology.num_devices} devices, {axes}, {config.sharding}; {images} images a "
        f"part, {planner.global_batch(images)} a step"
    )
    train = planner.measure(lower_train, config.model.remat, images)
    bound = planner.bound(train, images, 3 * model_flops)
    results |= train.to_json() | {"bound": _bound_json(bound)}
    save()
    print(describe("train step", train, bound, topology))

    if not options.no_eval and not config.pretraining.task:
        detection = planner.measure(lower_eval, config.model.remat, images)
        bound = planner.bound(detection, images, model_flops)
        results["eval"] = detection.to_json() | {"bound": _bound_json(bound)}
        save()
        print(describe("detection", detection, bound, topology))

    if options.suggest:

        def tell(trial: Trial) -> None:
            save()
            name = f"remat={trial.remat}, {trial.images} images a part"
            print(describe(name, trial.measurement, trial.bound, topology))

        trials, best = planner.suggest(3 * model_flops, tell)
        results |= {"trials": [_trial_json(x) for x in trials], "suggestion": best and _trial_json(best)}
        save()
        if best is None:
            print(f"nothing that was tried leaves {MARGIN:.0%} of the memory free: split more, or a smaller canvas")
        else:
            print(
                f"suggested: --config.model.remat={best.remat} --config.data.batch_size="
                f"{planner.global_batch(best.images)} ({best.images} a part)"
            )
    print(FORMULA)
    return 0


if __name__ == "__main__":
    sys.exit(main())
