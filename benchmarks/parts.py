"""What each part of Med-GLIP costs beside plain GLIP: of GLIP-T what is counted, of a small model time and memory.

    python -m benchmarks.parts [--rounds 8] [--only "own encoder" hierarchy] [--output benchmarks/results/parts.json]

Times are of the ablations' small model on one device: plain GLIP and the one with a part take their train steps and
detections in turns, so that what else the machine does meets both alike, and of each the fastest counts. A batch mixes
all modalities and the unknown one, and each image has eight boxes with masks. Memory is what XLA plans for the compiled
program: its temporaries, without parameters and batch. Of GLIP-T, FLOPs of a forward pass of one image and parameters
are counted, and nothing is run. What the output has already is not measured again.
"""

import argparse
import gc
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.ablations import MODALITIES, SETTINGS
from benchmarks.machine import cpu_name
from configs import ablation, medglip_t
from data_pipelines import schema
from medglip_jax.inference import flat_shapes, make_detector, parameter_shapes
from medglip_jax.model.pretraining import make_model
from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.planning.programs import forward_flops, train_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOXES = 8  # of an image
PHRASES = 32  # of a detection


def _modality(parts: str = "", **fields: Any) -> dict[str, Any]:
    changes = {"names": MODALITIES, "image_parts": parts, **fields}
    return {f"model.modality.{name}": value for name, value in changes.items()}


# What each part changes in a recipe, by path.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modality embedding": _modality(embedding=True),
    "own patch_embed": _modality("patch_embed"),
    "own norms": _modality("norms"),
    "own lora": _modality("lora", lora_rank=8),
    "own stage_3": _modality("stage_3"),
    "own encoder": _modality("encoder"),
    "own encoder, group 4": _modality("encoder", group=4),
    "modality classifier": _modality(classifier=True),
    "ablation's modality": SETTINGS["modality"],
    "hierarchy": SETTINGS["hierarchy"],
    "masks of phrases": SETTINGS["masks"] | {"model.masks.kind": "phrases"},
    "masks of boxes": SETTINGS["masks"] | {"model.masks.kind": "boxes"},
    "masks of both": SETTINGS["masks"],
    "everything": {path: value for setting in SETTINGS.values() for path, value in setting.items()},
}


def full_size(changes: dict[str, Any]) -> dict[str, float]:
    """Returns parameters and FLOPs of GLIP-T with a part, for all eleven modalities where it is of modalities."""
    config = medglip_t.get_config()
    model = {path: value for path, value in changes.items() if path.startswith("model.")}
    if "model.modality.names" in model:
        model["model.modality.names"] = ",".join(schema.MODALITIES[1:])
    config.update_from_flattened_dict(
        {
            path: value
            for path, value in model.items()
            if path not in ("model.masks.channels", "model.masks.norm_groups")
        }
    )
    flops, parameters = forward_flops(config)
    shapes = flat_shapes(parameter_shapes(make_model(config), config))
    own = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("modality/"))
    return {"parameters": parameters, "of_modalities": own, "forward_gflops_per_image": flops / 1e9}


def make_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns noise for the train step: modalities in turns, boxes and masks where the recipe has them."""
    size, rng = config.data.batch_size, np.random.default_rng(0)
    shapes = train_batch(config, size, None)
    batch: dict[str, Any] = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["image"] = rng.integers(0, 256, batch["image"].shape, np.uint8)
    batch["image_size"][:] = config.data.canvas
    batch["input_ids"] = rng.integers(5, 500, batch["input_ids"].shape, np.int32)
    batch["attention_mask"][:] = 1
    corners = rng.uniform(0, min(config.data.canvas) / 2, (*batch["boxes"].shape[:2], 2))
    batch["boxes"] = np.concatenate([corners, corners + rng.uniform(8, 60, corners.shape)], -1).astype(np.float32)
    batch["box_mask"][:, :BOXES] = True
    batch["positive_map"][:, np.arange(BOXES), 1 + np.arange(BOXES)] = 1
    if "modality" in batch:
        ids = [schema.MODALITIES.index(name) for name in ("unknown", *MODALITIES.split(","))]
        batch["modality"] = np.resize(ids, size).astype(np.int32)
    if "masks" in batch:
        batch["mask_boxes"][:] = [i if i < BOXES else -1 for i in range(config.data.max_masks)]
        batch["phrase_tokens"][:, np.arange(BOXES), 1 + np.arange(BOXES)] = True
        for name in ("masks", "phrase_masks"):
            batch[name] = rng.integers(0, 256, batch[name].shape, np.uint8)
    return batch


class Small:
    """The two programs of a small model with a part, on one device."""

    def __init__(self, changes: dict[str, Any], batch_size: int):
        config = ablation.get_config()
        config.update_from_flattened_dict(changes)
        config.data.batch_size = batch_size
        mesh = make_mesh({}, jax.devices()[:1])
        model, optimizer = make_model(config), make_optimizer(config)
        self.state, placed = create_state(model, config, optimizer, jax.random.key(0), mesh)
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.batch = to_global(make_batch(config), mesh)
        self.prompt = _make_prompt(config) | {
            name: self.batch[name] for name in ("image", "image_size", "modality") if name in self.batch
        }
        shardings = {"in_shardings": (placed, batch_sharding(mesh)), "out_shardings": (placed, None)}
        step = jax.jit(make_train_step(model, config, optimizer, mesh), donate_argnums=0, **shardings)
        detector: Any = make_detector(model, config)
        self.compile_seconds, self._step = _compile(lambda: step.lower(self.state, self.batch))
        _, self._detector = _compile(lambda: detector.lower(self.state.params, **self.prompt))
        self.temporaries = {
            name: program.memory_analysis().temp_size_in_bytes / 1e6
            for name, program in (("step", self._step), ("detection", self._detector))
        }
        self.forget()

    def forget(self) -> None:
        """Begins a new list of times."""
        self.seconds: dict[str, list[float]] = {"step": [], "detection": []}

    def run(self) -> None:
        """Takes a step and a detection, and their times."""
        started = time.perf_counter()
        self.state, metrics = self._step(self.state, self.batch)
        jax.block_until_ready(metrics)
        self.seconds["step"].append(time.perf_counter() - started)
        started = time.perf_counter()
        jax.block_until_ready(self._detector(self.state.params, **self.prompt))
        self.seconds["detection"].append(time.perf_counter() - started)

    def figures(self, plain: "Small") -> dict[str, Any]:
        """Returns memory, and times beside those that plain GLIP took in the same rounds."""
        found: dict[str, Any] = {"parameters": self.parameters, "compile_seconds": self.compile_seconds}
        for kind, seconds in self.seconds.items():
            found[kind] = {"temporaries_mb": self.temporaries[kind]}
            if seconds:
                ours, theirs = min(seconds), min(plain.seconds[kind])
                found[kind] |= {"seconds": ours, "plain_seconds": theirs, "over_plain": ours / theirs}
        return found


def _make_prompt(config: ConfigDict) -> dict[str, np.ndarray]:
    tokens = config.data.max_tokens
    phrase_map = np.zeros((1, PHRASES, tokens), np.float32)
    phrase_map[0, np.arange(PHRASES), 1 + np.arange(PHRASES)] = 1
    return {
        "input_ids": np.random.default_rng(0).integers(5, 500, (1, tokens), np.int32),
        "attention_mask": np.ones((1, tokens), np.int32),
        "phrase_map": phrase_map,
        "phrase_valid": np.ones((1, PHRASES), bool),
    }


def _compile(lower: Callable[[], Any]) -> tuple[float, Any]:
    lowered = lower()
    started = time.perf_counter()
    compiled = lowered.compile()
    return time.perf_counter() - started, compiled


def main() -> int:
    """Counts, measures, prints a table and writes it with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of steps and detections; the fastest counts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=[name for name in PARTS if name != "plain"])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/parts.json")
    options = parser.parse_args()

    results: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__},
        "small": {"recipe": "ablation", "modalities": len(MODALITIES.split(",")), "batch_size": options.batch_size},
        "full_size": {"recipe": "medglip_t", "modalities": len(schema.MODALITIES) - 1},
        "rounds": options.rounds,
        "parts": {},
    }
    if options.output.exists():
        results["parts"] = json.loads(options.output.read_text(encoding="utf-8"))["parts"]
    parts = results["parts"]
    plain = Small({}, options.batch_size)
    parts["plain"] = {"full_size": full_size({}), **plain.figures(plain)}
    for name in options.only:
        if name in parts:
            continue
        model = Small(PARTS[name], options.batch_size)
        print(f"{name}: compiled in {model.compile_seconds:.0f} s", file=sys.stderr, flush=True)
        plain.forget()
        for _ in range(options.rounds):
            plain.run()
            model.run()
        parts[name] = {"full_size": full_size(PARTS[name]), **model.figures(plain)}
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        del model  # the maps of many compiled programs are more than Linux gives a process
        gc.collect()
    print("| part | GLIP-T: GFLOPs | parameters | step, of plain | MB | detection, of plain | MB | compiled in s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in [name for name in PARTS if name in parts]:
        entry = parts[name]
        cells = [f"{entry['full_size']['forward_gflops_per_image']:.1f}", f"{entry['full_size']['parameters']:,}"]
        for kind in plain.seconds:
            cells += [f"{entry[kind].get('over_plain', 1):.2f}", f"{entry[kind]['temporaries_mb']:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} | {entry['compile_seconds']:.0f} |", flush=True)
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
