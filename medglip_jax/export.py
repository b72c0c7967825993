"""Export: a checkpoint as files that PyTorch reads.

    python -m medglip_jax.export --checkpoint DIR --output DIR [--format huggingface|mmdet|glip] [--onnx] [--modality M]

huggingface, the default, is a folder for AutoModel.from_pretrained(DIR, trust_remote_code=True), and for every command
here that takes a --checkpoint (see `interop.folder`); its model.safetensors has mmdetection's GLIP names. mmdet is what
mmdetection itself loads: model.pth, glip_config.py and bert/. glip is model.pth in the names of Microsoft's GLIP, with
glip_config.yaml. With --verify the result is run beside the checkpoint and compared.

PyTorch has no model of modalities: of a checkpoint with parts of their own (`config.model.modality`), --modality names
the one whose plain model is written, or "shared".
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from configs.medglip_t import get_config as base_recipe
from data_pipelines.schema import MODALITIES
from data_pipelines.sources.phantoms import KINDS, phantom
from data_pipelines.text import TextTokenizer, split_phrases
from medglip_jax.errors import reports_errors
from medglip_jax.interop import glip, mmdet, pickles
from medglip_jax.interop.card import model_card
from medglip_jax.interop.folder import (
    CARD_FILE,
    MAX_SHARD,
    import_parameters,
    is_folder,
    read_folder,
    write_folder,
)
from medglip_jax.interop.onnx import ONNX_FILE, OnnxModel, write_onnx
from medglip_jax.interop.reading import read_state_dict
from medglip_jax.interop.verify import Agreement, compare_with_twin, load_twin, require_torch
from medglip_jax.model.masks import without_masks
from medglip_jax.model.modality import merge_modality
from medglip_jax.model.text_offsets import PROMPT
from medglip_jax.predict import MedGLIP
from medglip_jax.pretrained import load_arrays, require_detector, tokenizer_of
from medglip_jax.train import EVALUATION_FILE

__all__ = ["export", "read_export"]

FORMATS = ("huggingface", "mmdet", "glip")
SHARED = "shared"  # the parts of images whose modality has none of its own
_VERIFY_SIZE = 256  # pixels of the phantoms to compare on

_WRITERS = {"mmdet": pickles.write_mmdet, "glip": pickles.write_glip}

read_export = read_folder


def export(
    params: Any, config: ConfigDict, tokenizer: TextTokenizer, directory: str | os.PathLike, **options: Any
) -> pathlib.Path:
    """Writes a model as a folder for PyTorch and JAX.

    Args:
        params: the model's parameters, a nested dict of arrays, also ones that lie on several devices; a mask branch
            among them is left out.
        config: the recipe; `config.model` describes the parameters.
        tokenizer: of the prompts.
        directory: made if missing; an older export in it is replaced, other files beside it stay.
        options: see `interop.folder.write_folder`; without a `card` it writes one.

    Returns:
        The path of the weights, or of their index.

    Raises:
        ValueError: the parameters are not those of `config.model`, or the folder holds something else than an export.
    """
    params, config = without_masks(params, config)
    card = options.pop("card", None) or model_card(
        config, name=pathlib.Path(directory).resolve().name, parameters=_count(params), kind="as given"
    )
    return write_folder(params, config, tokenizer, directory, card=card, **options)


def _count(params: Any) -> int:
    return sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(params))


def verify(
    checkpoint: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    images: Sequence[str] = (),
    phrases: str = "",
    use_ema: bool | None = None,
    modality: str = "",
) -> list[Agreement]:
    """Compares an exported folder with its checkpoint, by the detections of both.

    Args:
        checkpoint: see `load_model`.
        folder: what `export` wrote of it; its model.onnx is compared too, if it has one.
        images: files to look at; without, a phantom of every modality.
        phrases: what to look for in `images`; in phantoms it is a phrase of each of them.
        use_ema, modality: as at the export.

    Returns:
        The figures of the PyTorch model, and of the ONNX model.

    Raises:
        ValueError: PyTorch is missing, an image cannot be read, or there are no phrases.
    """
    looked_at: list[Any] = list(images)
    source = "the given images"
    asked = split_phrases(phrases) if images else []
    if not images:
        source = "phantoms, one a modality"
        examples = [phantom(i, size=_VERIFY_SIZE, modality=modality) for i, modality in enumerate(KINDS)]
        looked_at = [example.image for example in examples]
        asked = split_phrases([example.regions[0].phrase for example in examples])
    model = MedGLIP.from_pretrained(checkpoint, use_ema=use_ema)
    parts = MODALITIES[0] if modality in ("", SHARED) else modality
    found = [model.predict(image, asked, threshold=0.0, modality=parts) for image in looked_at]
    twin, processor = load_twin(folder)
    agreements = [compare_with_twin(found, twin, processor, looked_at, asked, f"{source}, PyTorch")]
    if (pathlib.Path(folder) / ONNX_FILE).is_file():
        onnx = OnnxModel(folder)
        agreements.append(compare_with_twin(found, onnx, processor, looked_at, asked, f"{source}, ONNX"))
    return agreements


def load_plain(
    checkpoint: str | os.PathLike, use_ema: bool | None = None, modality: str = ""
) -> tuple[Any, ConfigDict]:
    """Reads a checkpoint as a plain GLIP, NumPy arrays; of one with parts of modalities, the model of one of them.

    Args:
        checkpoint, use_ema: see `load_arrays`.
        modality: its name, or `SHARED` for what images of unknown modality take; "" for a plain GLIP.

    Raises:
        ValueError: the checkpoint has parts of modalities and none is named, or it does not have those.
    """
    params, config = load_arrays(checkpoint, use_ema)
    names = config.model.modality.names
    if not names:
        if modality not in ("", SHARED):
            raise ValueError(f"{checkpoint} is a plain model, the same for every modality: leave out --modality")
        return params, config
    if not modality:
        raise ValueError(
            f"{checkpoint} has parts of its own for some modalities, which no format has a place for: export one plain "
            f"model for each with --modality NAME, of {names}, or {SHARED} (images of any other modality)"
        )
    params = merge_modality(params, config.model, "" if modality == SHARED else modality)
    config = config.copy_and_resolve_references()
    config.model.modality.update(base_recipe().model.modality)
    config.evaluation.modality = "" if modality == SHARED else modality
    return params, config


def verify_exactly(
    checkpoint: str | os.PathLike, path: pathlib.Path, names: str, use_ema: bool | None = None, modality: str = ""
) -> int:
    """Reads a .pth back and compares it with its checkpoint; returns the number of parameters.

    Raises:
        ValueError: they are not the same, bit for bit; names one that differs.
    """
    params, config = load_plain(checkpoint, use_ema, modality)
    found, report = import_parameters(read_state_dict(path), config, {"mmdet": mmdet, "glip": glip}[names])
    if not report.complete:
        raise ValueError(f"{path} is not what was exported: {report.describe()}")
    expected: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    given: dict[str, Any] = traverse_util.flatten_dict(found, sep="/")
    for name, x in given.items():
        if x.tobytes() != np.asarray(expected[name]).tobytes():
            raise ValueError(f"{path} is not what was exported: {name} differs")
    return len(expected)


def _results(checkpoint: str) -> dict[str, Any] | None:
    """Returns the evaluation that lies in a run's working directory, if there is one."""
    try:
        return json.loads((pathlib.Path(checkpoint) / EVALUATION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Exports a checkpoint and says where; 1 if the result was to be verified and does not agree."""
    parser = argparse.ArgumentParser(prog="medglip export", description="Writes a checkpoint for PyTorch.")
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's working directory, or an exported folder")
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--format", choices=FORMATS, default="huggingface", help="whose names and files; default: %(default)s")
    add("--onnx", action="store_true", help="add model.onnx to the folder; needs PyTorch and onnxscript")
    add("--no-ema", action="store_true", help="export the parameters themselves instead of their running average")
    add("--max-shard", type=float, default=MAX_SHARD / 1e9, metavar="GB", help="largest file; default: %(default)s")
    add(
        "--verify",
        nargs="*",
        metavar="IMAGE",
        help="compare the detections of the exported model with these, on images (with --phrases) or on phantoms, "
        "and write the figures into the model card; other formats are read back exactly; needs PyTorch",
    )
    add("--modality", default="", metavar="NAME", help=f"whose plain model to write, of those with parts; or {SHARED}")
    add("--phrases", default="", help="what to look for in the images, as 'left lung. nodule'")
    options = parser.parse_args(argv)
    if options.verify and not options.phrases:
        raise ValueError("--verify with images needs --phrases, as 'left lung. nodule'")
    if options.onnx and options.format != "huggingface":
        raise ValueError("--onnx adds a file to the format huggingface: leave out --format")
    if options.max_shard <= 0:
        raise ValueError(f"--max-shard is {options.max_shard}: it must be above 0")

    if options.verify is not None or options.onnx or options.format != "huggingface":
        require_torch()

    use_ema = False if options.no_ema else None
    params, config = load_plain(options.checkpoint, use_ema, options.modality)
    require_detector(config, options.checkpoint)
    if PROMPT in params:
        raise ValueError(
            f"{options.checkpoint} is a run of prompt tuning: its weights are those it started from "
            f"({config.init.model}), and no format has a place for the offsets that it learned"
        )
    if config.model.masks.kind:
        print("the mask branch is left out: no format has a place for it; boxes are the same without it")
        params, config = without_masks(params, config)
    tokenizer = tokenizer_of(options.checkpoint, config)
    # Of a run with an average of the parameters, it is the average that was evaluated.
    averaged = not is_folder(options.checkpoint) and config.optimizer.ema and config.evaluation.use_ema
    about = {
        "name": pathlib.Path(options.output).resolve().name,
        "parameters": _count(params),
        "kind": "running average of the run" if averaged and not options.no_ema else "parameters as they are",
        "results": None if averaged and options.no_ema else _results(options.checkpoint),
    }
    if options.format == "huggingface":
        card, shard = model_card(config, **about), int(options.max_shard * 1e9)
        path = export(params, config, tokenizer, options.output, card=card, max_shard=shard, consume=True)
        if options.onnx:
            print(f"written to {write_onnx(options.output)}")
    else:
        path = _WRITERS[options.format](params, config, tokenizer, options.output)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if options.verify is None:
        return 0
    if options.format != "huggingface":
        number = verify_exactly(options.checkpoint, path, options.format, use_ema, options.modality)
        print(f"read back: {number} parameters, bit for bit")
        return 0
    agreements = verify(
        options.checkpoint,
        options.output,
        images=options.verify,
        phrases=options.phrases,
        use_ema=use_ema,
        modality=options.modality,
    )
    for agreement in agreements:
        print(agreement.describe())
    card = model_card(config, **about, agreements=agreements)
    (pathlib.Path(options.output) / CARD_FILE).write_text(card, encoding="utf-8")
    return 0 if all(agreement.holds for agreement in agreements) else 1


if __name__ == "__main__":
    sys.exit(main())
