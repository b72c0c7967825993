"""What the mask branch costs: a train step and a detection with and without it, side by side in one process.

python -m benchmarks.masks [--rounds 5] [--output FILE]

Times are of the demo's small model on this machine, in turns, the fastest of the rounds. Memory is what XLA plans for
the compiled program: its temporaries, without parameters and batch. Of GLIP-T FLOPs and parameters are counted only.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.mesh_invariance import cpu_name
from data_pipelines.mask_targets import packed_size
from medglip_jax.configuration import load_config
from medglip_jax.inference import make_detector
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.planning.programs import forward_flops, train_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
KINDS = ("", "phrases", "boxes", "both")
PHRASES = 32


def recipe(kind: str) -> ConfigDict:
    """Returns the demo's recipe with one kind of masks, for one device."""
    config = load_config("demo_masks", ["--config.mesh.data=1", "--config.data.batch_size=8"])
    config.model.masks.kind = kind
    config.data.max_masks = config.data.max_masks if kind else 0
    return config


def make_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns noise with eight boxes an image, each with a mask."""
    rng, shapes = np.random.default_rng(0), train_batch(config, config.data.batch_size, None)
    batch: dict[str, Any] = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    height, width = config.data.canvas
    batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
    batch["image_size"][:] = height, width
    batch["input_ids"] = rng.integers(5, 500, batch["input_ids"].shape, np.int32)
    batch["attention_mask"][:] = 1
    corners = rng.uniform(0, min(height, width) / 2, (*batch["boxes"].shape[:2], 2))
    batch["boxes"] = np.concatenate([corners, corners + rng.uniform(8, 60, corners.shape)], -1).astype(np.float32)
    batch["box_mask"][:, :8] = True
    batch["positive_map"][:, np.arange(8), 1 + np.arange(8)] = 1
    if config.data.max_masks:
        batch["mask_boxes"][:] = np.where(np.arange(config.data.max_masks) < 8, np.arange(config.data.max_masks), -1)
        batch["phrase_tokens"][:, np.arange(8), 1 + np.arange(8)] = True
        for name in ("masks", "phrase_masks"):
            batch[name] = rng.integers(0, 256, batch[name].shape, np.uint8)
        assert batch["masks"].shape[-2:] == packed_size((height, width))
    return batch


def prepare(kind: str) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Compiles the two programs of a kind; returns each with a function that runs it to its end."""
    config = recipe(kind)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model, optimizer = GLIP(config.model), make_optimizer(config)
    state, _ = create_state(model, config, optimizer, jax.random.key(0), mesh)
    batch = jax.device_put(make_batch(config))
    step = jax.jit(make_train_step(model, config, optimizer)).lower(state, batch).compile()
    tokens = config.data.max_tokens
    phrase_map = np.zeros((1, PHRASES, tokens), np.float32)
    phrase_map[0, np.arange(PHRASES), 1 + np.arange(PHRASES)] = 1
    prompt = {
        "input_ids": np.asarray(batch["input_ids"])[:1],
        "attention_mask": np.ones((1, tokens), np.int32),
        "phrase_map": phrase_map,
        "phrase_valid": np.ones((1, PHRASES), bool),
    }
    images = {name: batch[name] for name in ("image", "image_size")}
    jitted: Any = make_detector(model, config)
    detector = jitted.lower(state.params, **images, **prompt).compile()
    return {
        "step": (step, lambda: jax.block_until_ready(step(state, batch))),
        "detection": (detector, lambda: jax.block_until_ready(detector(state.params, **images, **prompt))),
    }


def full_size(kind: str) -> dict[str, float]:
    """Returns what GLIP-T counts in a forward pass of one image."""
    config = load_config("medglip_t")
    config.model.masks.kind = kind
    flops, parameters = forward_flops(config)
    return {"GFLOPs": round(flops / 1e9, 1), "parameters": parameters}


def main() -> int:
    """Measures every kind, prints a table and writes it with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the fastest counts, since others use the machine too")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/masks.json")
    options = parser.parse_args()
    programs = {kind: prepare(kind) for kind in KINDS}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for kind, pair in programs.items():
            for name, (_, run) in pair.items():
                started = time.perf_counter()
                run()
                seconds.setdefault((kind, name), []).append(time.perf_counter() - started)
    results: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "jax": jax.__version__},
        "rounds": options.rounds,
        "kinds": {},
    }
    for kind, pair in programs.items():
        entry: dict[str, Any] = {"glip_t": full_size(kind)}
        for name, (compiled, _) in pair.items():
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 1e6
            entry[name] = {"seconds": round(min(seconds[kind, name]), 3), "temporaries_MB": round(temporaries, 1)}
        results["kinds"][kind or "off"] = entry
        print(kind or "off", json.dumps(entry), flush=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
