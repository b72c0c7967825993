"""Export: a checkpoint as a folder that PyTorch reads.

    python -m medglip_jax.export --checkpoint DIR --output DIR

The folder holds

    model.safetensors       parameters under mmdetection's GLIP names and in its layouts, float32
    config.json             the recipe that the model was made from
    tokenizer/              the tokenizer of the prompts
"""

import argparse
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.text import TextTokenizer
from medglip_jax.configuration import CONFIG_FILE, load_config, save_config
from medglip_jax.errors import reports_errors
from medglip_jax.interop.mmdet import from_state_dict, to_state_dict
from medglip_jax.predict import load_model
from medglip_jax.training.checkpoint import TOKENIZER

WEIGHTS_FILE = "model.safetensors"


def export(params: Any, config: ConfigDict, tokenizer: TextTokenizer, directory: str | os.PathLike) -> pathlib.Path:
    """Writes a model in mmdetection's naming; the weights appear last, and complete or not at all.

    Args:
        params: the model's parameters, a nested dict of arrays.
        config: the recipe; `config.model` describes the parameters.
        tokenizer: of the prompts.
        directory: made if missing; an older export in it is replaced, other files beside it stay.

    Returns:
        The path of the weights.

    Raises:
        ValueError: the parameters are not those of `config.model`, or the folder holds something else than an export.
    """
    from safetensors.numpy import save_file

    target = pathlib.Path(directory).resolve()
    if target.is_dir() and any(target.iterdir()) and not (target / WEIGHTS_FILE).is_file():
        raise ValueError(f"{target} is not empty and holds no {WEIGHTS_FILE} of an export: choose another --output")
    state_dict = to_state_dict(params, config.model)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as folder:
        staging = pathlib.Path(folder)
        save_file(state_dict, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        save_config(config, staging / CONFIG_FILE)
        tokenizer.save(staging / TOKENIZER)
        (target / TOKENIZER).mkdir(exist_ok=True)
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file.name == WEIGHTS_FILE):  # the weights last
            os.replace(staging / file, target / file)
    return target / WEIGHTS_FILE


def read_export(directory: str | os.PathLike) -> tuple[Any, ConfigDict]:
    """Reads what `export` wrote.

    Returns:
        The parameters as a nested dict of NumPy arrays, and the recipe.

    Raises:
        ValueError: the weights are damaged, or are not those of the folder's recipe.
        OSError: a file is missing.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = pathlib.Path(directory)
    config = load_config(folder)
    try:
        state_dict: dict[str, np.ndarray] = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged ({error}): export it again") from None
    return from_state_dict(state_dict, config.model), config


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Exports a checkpoint and says where."""
    parser = argparse.ArgumentParser(
        prog="medglip export", description="Writes a checkpoint as model.safetensors in mmdetection's GLIP naming."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="working directory of a training run")
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--no-ema", action="store_true", help="export the parameters themselves instead of their running average")
    options = parser.parse_args(argv)

    _, params, config, tokenizer = load_model(options.checkpoint, use_ema=False if options.no_ema else None)
    path = export(params, config, tokenizer, options.output)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
