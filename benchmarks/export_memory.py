"""Measures how much memory `medglip export` takes: a run of a full-size model, exported in a process of its own.

python -m benchmarks.export_memory [--recipe medglip_l] [--format huggingface]

Prints JSON: the model's size, the peak above what the process has before it reads the checkpoint, and their ratio.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import sys
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from data_pipelines.text import load_tokenizer
from medglip_jax import export
from medglip_jax.configuration import CONFIG_FILE, load_config, save_config
from medglip_jax.inference import parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.training.checkpoint import CHECKPOINTS, TOKENIZER


def peak() -> int:
    """Returns the most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_run(workdir: pathlib.Path, recipe: str) -> int:
    """Writes a checkpoint with parameters alone, random ones; returns their size in bytes."""
    config = load_config(recipe)
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(GLIP(config.model), config)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    ocp.PyTreeCheckpointer().save(workdir / CHECKPOINTS / "1" / "state", {"params": params})
    save_config(config, workdir / CONFIG_FILE)
    load_tokenizer().save(workdir / TOKENIZER)
    return sum(x.nbytes for x in jax.tree.leaves(params))


def run(recipe: str, form: str) -> dict[str, object]:
    """Exports a random model; both steps have a process of their own, so that the peaks are theirs."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder) / "run"
        with context.Pool(1) as pool:
            size = pool.apply(write_run, (workdir, recipe))
        with context.Pool(1) as pool:
            before, after = pool.apply(_export, (str(workdir), str(pathlib.Path(folder) / "out"), form))
    return {
        "recipe": recipe,
        "format": form,
        "model_MB": round(size / 1e6),
        "before_MB": round(before / 1e6),
        "peak_MB": round(after / 1e6),
        "ratio": round((after - before) / size, 3),
    }


def _export(workdir: str, output: str, form: str) -> tuple[int, int]:
    jax.devices()  # the backend, which the export needs only for shapes
    if form != "huggingface":
        import torch  # noqa: F401
    before = peak()
    if export.main(["--checkpoint", workdir, "--output", output, "--format", form]):
        raise SystemExit("the export failed")
    return before, peak()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="medglip_l", help="recipe of the model; default: %(default)s")
    parser.add_argument("--format", default="huggingface", choices=export.FORMATS, help="default: %(default)s")
    options = parser.parse_args()
    print(json.dumps(run(options.recipe, options.format)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
