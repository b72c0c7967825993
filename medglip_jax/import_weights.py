"""Import: a GLIP checkpoint of mmdetection or Microsoft becomes a folder that every command takes as --checkpoint.

    python -m medglip_jax.import_weights --input glip.pth --tokenizer DIR --output FOLDER [--config medglip_l]

It reads .pth (only arrays: a file that would run code is refused), safetensors, or a folder of these. What found its
place, and what did not, is reported; a checkpoint that does not give every parameter is refused.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.text import load_tokenizer
from medglip_jax.configuration import load_config
from medglip_jax.errors import reports_errors
from medglip_jax.export import export
from medglip_jax.interop import glip, mmdet
from medglip_jax.interop.folder import import_parameters
from medglip_jax.interop.pickles import LANGUAGE
from medglip_jax.interop.reading import read_state_dict
from medglip_jax.interop.state_dict import ImportReport, Params

NAMINGS = {"mmdet": mmdet, "glip": glip}


def recognize(state_dict: Mapping[str, Any]) -> str:
    """Tells whose names a state dict has: "mmdet" or "glip".

    Raises:
        ValueError: neither's.
    """
    starts = {"mmdet": ("bbox_head.head.", "neck."), "glip": ("rpn.head.", "backbone.body.")}
    for naming, prefixes in starts.items():
        if all(any(name.startswith(prefix) for name in state_dict) for prefix in prefixes):
            return naming
    raise ValueError(
        "these are not the names of a GLIP, of mmdetection (bbox_head.head...) or Microsoft (rpn.head...): "
        f"{', '.join(list(state_dict)[:3])}, ..."
    )


def import_weights(
    path: str | pathlib.Path, config: ConfigDict | None = None, *, naming: str = "auto", ema: bool = False
) -> tuple[Params, ConfigDict, ImportReport]:
    """Reads a GLIP checkpoint of someone else.

    Args:
        path: see `read_state_dict`.
        config: the recipe that it fits; None takes configs/medglip_t.py with the sizes that the checkpoint tells.
        naming: whose names it has, a key of `NAMINGS`, or "auto".
        ema: take Microsoft's running average where the file has one.

    Returns:
        The parameters (NumPy arrays), the recipe, and the report.

    Raises:
        ValueError: the file cannot be read, or does not give every parameter of the model; holds the report.
    """
    state_dict = read_state_dict(path, ema=ema)
    naming = recognize(state_dict) if naming == "auto" else naming
    if config is None:
        config = load_config("medglip_t").unlock()
        config.model = infer_model(state_dict, config, naming)
        config.lock()
    params, report = import_parameters(state_dict, config, NAMINGS[naming])
    if not report.complete:
        raise ValueError(f"{path} does not give every parameter of the model: {report.describe()}")
    return params, config, report


def infer_model(state_dict: Mapping[str, Any], config: ConfigDict, naming: str) -> ConfigDict:
    """Returns `config.model` with the sizes of a state dict."""
    shapes = {name: np.shape(state_dict[name]) for name in state_dict}
    if naming == "glip":
        shapes = {glip.to_mmdet(name): shape for name, shape in shapes.items() if not glip.is_ignored(name)}
    return mmdet.infer_sizes(shapes, config.model)


def _tokenizer_beside(path: pathlib.Path) -> str:
    folder = path if path.is_dir() else path.parent
    for candidate in (folder, folder / LANGUAGE, folder / glip.BERT):
        if (candidate / "tokenizer.json").is_file() or (candidate / "vocab.txt").is_file():
            return str(candidate)
    raise ValueError(
        f"there is no tokenizer beside {path}: give --tokenizer, the folder of the one it was trained with "
        "(bert-base-uncased for the published GLIPs)"
    )


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Imports a checkpoint, prints the report, and says where it is."""
    parser = argparse.ArgumentParser(
        prog="medglip import",
        description="Turns a GLIP checkpoint of mmdetection or Microsoft into an exported folder.",
    )
    add = parser.add_argument
    add("--input", required=True, type=pathlib.Path, metavar="PATH", help=".pth, safetensors, or a folder of them")
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--config", metavar="FILE", help="recipe of its sizes; default: medglip_t, with the sizes of the checkpoint")
    add("--format", choices=("auto", *NAMINGS), default="auto", help="whose names; default: as they look")
    add("--tokenizer", metavar="DIR", help="folder of its tokenizer; default: the one beside the checkpoint")
    add("--ema", action="store_true", help="take Microsoft's running average of the weights where the file has it")
    options = parser.parse_args(argv)

    tokenizer = load_tokenizer(options.tokenizer or _tokenizer_beside(options.input))
    config = load_config(options.config) if options.config else None
    params, config, report = import_weights(options.input, config, naming=options.format, ema=options.ema)
    print(report.describe())
    if tokenizer.vocab_size > config.model.bert.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the checkpoint {config.model.bert.vocab_size}: it "
            "is not the one that it was trained with; give --tokenizer"
        )
    path = export(params, config, tokenizer, options.output, consume=True)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
