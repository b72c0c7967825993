"""What each part of Med-GLIP is worth: plain GLIP, and one part after another on top of it, at the same budget.

    python -m benchmarks.ablations --root DIR [--seeds 3] [--steps 400] [--only plain,masks] [--folder ablation_runs]
        [--config.detection.mask_dice_weight=1 ...]

builds the mixed corpus of configs/ablation_corpus.yaml from the folders below DIR, trains configs/ablation.py with the
changes of each setting from each seed, and evaluates on the patients held out. Runs take a core each, and as many go on
at once as there are cores. What is in FOLDER already is not made again: the same command goes on. It prints means and
standard deviations over the seeds, of the metrics and of what each setting changes in them from the one before it, seed
by seed, writes them to --output, and leaves what every run found in FOLDER. Fields that are given change every recipe,
for controls. What the parts cost is measured by benchmarks/parts.py.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.machine import cpu_name
from configs.ablation import get_config
from data_pipelines.building.corpus import build_corpus
from data_pipelines.building.recipe import read_recipe
from data_pipelines.records import METADATA_FILE
from medglip_jax.configuration import ConfigError, load_config, save_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODALITIES = "xray,ct,mri,ultrasound,endoscopy,dermoscopy,fundus,microscopy"

# What each setting changes, beside what all settings before it change; what a recipe calls by these paths.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompts": {
        "data.prefix_probability": 0.5,
        "data.hard_negative_share": 0.25,
        "data.variant_probability": 0.15,
        "evaluation.modality_prefix": True,
    },
    "modality": {
        "model.modality.names": MODALITIES,
        "model.modality.embedding": True,
        "model.modality.image_parts": "patch_embed,norms,lora",
        "model.modality.lora_rank": 4,
        "model.modality.dropout": 0.1,
    },
    "hierarchy": {
        "data.parents_positive_probability": 0.25,
        "data.hierarchy.ignored": ("is_a", "may_be"),
        "data.hierarchy.max_pairs": 32,
        "data.hierarchy.containers": True,
        "data.balance_granularities": 0.5,
        "data.sibling_negative_share": 0.25,
        "detection.score_consistency_weight": 1.0,
        "detection.containment_weight": 0.5,
    },
    "masks": {
        "data.max_masks": 16,
        "model.masks.kind": "both",
        "model.masks.channels": 32,
        "model.masks.norm_groups": 8,
    },
}
# Of an evaluation, by path; what a setting does not have is left out.
METRICS = (
    *("AP50", "AP", "accuracy", "pointing", "false_phrases", "false_images"),
    *("broader/AP50", "broader/accuracy", "consistency/score_violations", "consistency/outside"),
    *("masks/dice", "masks/iou", "masks/AP50"),
)


def make_recipe(setting: str, records: pathlib.Path, seed: int, steps: int, *, alone: bool = False) -> ConfigDict:
    """Returns the recipe of a run.

    Args:
        setting: one of `SETTINGS`; those before it are in it.
        records: of the corpus.
        seed: of parameters, order and augmentation.
        steps: of the run.
        alone: only the setting's own changes, on plain GLIP.
    """
    config = get_config()
    names = list(SETTINGS)
    for name in [setting] if alone else names[: names.index(setting) + 1]:
        config.update_from_flattened_dict(SETTINGS[name])
    config.seed, config.schedule.steps, config.training.checkpoint_every = seed, steps, steps
    config.data.train, config.data.eval = f"{records}:train", f"{records}:validation"
    return config


def _look_up(results: Mapping[str, Any], path: str) -> float | None:
    value: Any = results
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def run(
    config: ConfigDict, workdir: pathlib.Path, compiled: pathlib.Path, overrides: Sequence[str] = ()
) -> dict[str, float]:
    """Trains and evaluates in a process of its own, unless that was done; returns the metrics."""
    results_file = workdir / "evaluation.json"
    if not results_file.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            recipe = pathlib.Path(folder) / "recipe.json"
            save_config(config, recipe)
            command = [sys.executable, "-m", "medglip_jax.train", "--config", str(recipe), "--workdir", str(workdir)]
            command += ["--compilation-cache", str(compiled), *overrides]
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
            with (workdir / "log.txt").open("a") as log:
                status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if status.returncode:
            raise SystemExit(f"{workdir / 'log.txt'}: the run ended with status {status.returncode}")
    results = json.loads(results_file.read_text())
    return {name: value for name in METRICS if (value := _look_up(results, name)) is not None}


def summarize(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns mean and standard deviation (of a sample) of each number that all runs have."""
    names = [name for name in runs[0] if all(name in each for each in runs)]
    return {
        name: [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
        for name in names
        for values in [[each[name] for each in runs]]
    }


def compare(
    found: Mapping[str, Mapping[int, Mapping[str, float]]], *, alone: bool
) -> dict[str, dict[str, list[float]]]:
    """Returns what each setting changes: the summaries of its differences, seed by seed, to the one it is added to.

    Args:
        found: settings to seeds to metrics, in order.
        alone: whether each is added to the first one, and not to the one before it.
    """
    names, changes = list(found), {}
    for place, name in enumerate(names[1:], 1):
        base = found[names[0 if alone else place - 1]]
        changes[name] = summarize(
            [
                {metric: run[metric] - base[seed][metric] for metric in run if metric in base[seed]}
                for seed, run in found[name].items()
            ]
        )
    return changes


def table(summaries: Mapping[str, Mapping[str, Sequence[float]]], *, sign: str = "") -> str:
    """Returns summaries in Markdown, in percent; `sign` is that of a format, "+" for changes."""
    columns = [name for name in METRICS if any(name in each for each in summaries.values())]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for setting, summary in summaries.items():
        cells = [
            f"{summary[name][0] * 100:{sign}.1f} ± {summary[name][1] * 100:.1f}" if name in summary else ""
            for name in columns
        ]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Makes the runs that are missing, prints the table and writes the summaries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", type=pathlib.Path, required=True, help="folder of the data sets of configs/ablation_corpus.yaml")
    add("--folder", type=pathlib.Path, default=pathlib.Path("ablation_runs"), help="for records and runs")
    add("--seeds", type=int, default=3, help="runs of each setting; default: %(default)s")
    add("--steps", type=int, default=400, help="of a run; default: %(default)s")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once, each on one core; default: %(default)s")
    add("--only", default="", help="settings, by commas; default: all")
    add("--alone", action="store_true", help="each part alone on plain GLIP, instead of on top of those before it")
    add("--output", type=pathlib.Path, default=None, help="JSON file for the summaries")
    options, overrides = parser.parse_known_args()
    try:
        load_config("ablation", overrides)
    except ConfigError as error:
        parser.error(str(error))
    names = options.only.split(",") if options.only else list(SETTINGS)
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--only {options.only}: there is no setting {unknown[0]!r}, there are {', '.join(SETTINGS)}")

    folder = options.folder.resolve()
    records = folder / "records"
    if not (records / METADATA_FILE).exists():
        build_corpus(read_recipe(ROOT / "configs" / "ablation_corpus.yaml"), records, root=options.root)
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    cores, lock = [*range(options.jobs)], threading.Lock()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def make(seed: int, name: str) -> None:
        label = f"{name}{'_alone' if options.alone and name != 'plain' else ''}_{options.steps}_{seed}"
        label += "".join(f"_{field.removeprefix('--config.').replace('/', '-')}" for field in overrides)
        config = make_recipe(name, records, seed, options.steps, alone=options.alone)
        with lock:
            core = cores.pop()
        if available:  # of this thread, which the processes that it starts inherit
            os.sched_setaffinity(0, {available[core % len(available)]})
        found[name][seed] = run(config, folder / label, folder / "compiled", overrides)
        with lock:
            cores.append(core)
        print(label, {key: round(value, 4) for key, value in found[name][seed].items()}, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(make, seed, name) for seed in range(options.seeds) for name in names]
        for future in as_completed(futures):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            future.result()
    summaries = {name: summarize([*runs.values()]) for name, runs in found.items()}
    changes = compare(found, alone=options.alone)
    print(table(summaries), "what each adds:", table(changes, sign="+"), sep="\n\n")
    if options.output:
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        content = {"steps": options.steps, "seeds": options.seeds, "alone": options.alone, "fields": overrides}
        content |= {"settings": summaries, "changes": changes, "runs": found}
        content |= {"machine": machine, "jax": jax.__version__}
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
