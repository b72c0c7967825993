"""What the parts of modalities cost: parameters and FLOPs at full size, and the time of a step of a small model.

    python -m benchmarks.modalities [--rounds 8] [--output benchmarks/results/modalities.json]

All small models take their steps in turns in one process, so that what else the machine does meets all of them alike;
of each the fastest step counts. A batch mixes all modalities and the unknown one.
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.mesh_invariance import cpu_name
from configs import demo, medglip_t
from data_pipelines.schema import MODALITIES
from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import batch_sharding, make_mesh, to_global
from medglip_jax.planning.programs import forward_flops, train_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAMES = ("ct", "mri", "xray")  # of the small model

# Fields of `config.model.modality`; the names are added.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"embedding": True},
    "patch_embed": {"image_parts": "patch_embed"},
    "norms": {"image_parts": "norms"},
    "lora": {"image_parts": "lora", "lora_rank": 8},
    "stage_3": {"image_parts": "stage_3"},
    "encoder": {"image_parts": "encoder"},
    "encoder, group 4": {"image_parts": "encoder", "group": 4},
    "classifier": {"classifier": True},
}


def recipe(base: ConfigDict, names: tuple[str, ...], fields: dict[str, Any]) -> ConfigDict:
    """Returns a recipe with some parts of modalities."""
    if fields:
        base.model.modality.update({"names": ",".join(names), **fields})
    return base


def full_size(fields: dict[str, Any]) -> dict[str, float]:
    """Returns parameters and FLOPs of GLIP-T with these parts for all eleven modalities."""
    config = recipe(medglip_t.get_config(), MODALITIES[1:], fields)
    shapes = flat_shapes(parameter_shapes(GLIP(config.model), config))
    own = sum(math.prod(shape) for path, shape in shapes.items() if path.startswith("modality/"))
    flops, parameters = forward_flops(config)
    return {"own_parameters": own, "parameters": parameters, "forward_gflops_per_image": flops / 1e9}


class Small:
    """Training of a small model with some parts, on one device."""

    def __init__(self, fields: dict[str, Any], batch_size: int):
        config = recipe(demo.get_config(), NAMES, fields)
        config.data.batch_size, config.data.canvas, config.data.max_tokens = batch_size, (64, 64), 64
        mesh = make_mesh({}, jax.devices()[:1])
        model, optimizer = GLIP(config.model), make_optimizer(config)
        self.state, placed = create_state(model, config, optimizer, jax.random.key(0), mesh)
        rng, ids = np.random.default_rng(0), [MODALITIES.index(name) for name in ("unknown", *NAMES)]
        shapes = train_batch(config, batch_size, batch_sharding(mesh)) | {"modality": None}
        arrays: dict[str, Any] = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items() if x is not None}
        arrays["image"] = rng.integers(0, 256, arrays["image"].shape, np.uint8)
        arrays["image_size"][:], arrays["attention_mask"][:, :9] = config.data.canvas, 1
        arrays["modality"] = rng.choice(ids, batch_size).astype(np.int32)
        self.batch = to_global(arrays, mesh)
        step = jax.jit(make_train_step(model, config, optimizer, mesh), out_shardings=(placed, None), donate_argnums=0)
        started = time.perf_counter()
        self.program = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - started
        self.parameters = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.seconds: list[float] = []

    def step(self) -> None:
        """Takes a step and its time."""
        started = time.perf_counter()
        self.state, metrics = self.program(self.state, self.batch)
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - started)


def main() -> int:
    """Counts, measures, prints a table and writes it with the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each model; the fastest counts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts, beside plain")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/modalities.json")
    options = parser.parse_args()

    chosen = {name: fields for name, fields in PARTS.items() if name in ("plain", *options.only)}
    counted = {name: full_size(fields) for name, fields in chosen.items()}
    models = {name: Small(fields, options.batch_size) for name, fields in chosen.items()}
    for _ in range(options.rounds):
        for model in models.values():
            model.step()
    results: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "jax": jax.__version__},
        "full_size": {"recipe": "medglip_t", "modalities": len(MODALITIES) - 1, "parts": counted},
        "small": {"recipe": "demo at 64 x 64", "modalities": len(NAMES), "batch_size": options.batch_size, "parts": {}},
    }
    plain = min(models["plain"].seconds)
    for name, model in models.items():
        fastest = min(model.seconds)
        results["small"]["parts"][name] = {
            "parameters": model.parameters,
            "step_seconds": fastest,
            "over_plain": fastest / plain,
            "all_step_seconds": model.seconds,
            "compile_seconds": model.compile_seconds,
        }
        print(
            f"{name:18} GLIP-T +{counted[name]['own_parameters']:>11,} parameters, "
            f"{counted[name]['forward_gflops_per_image']:7.1f} GFLOPs; small: {model.parameters:>9,} parameters, step "
            f"{fastest * 1e3:6.0f} ms, {fastest / plain:.2f} of plain"
        )
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
