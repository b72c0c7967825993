"""The folder that a model is passed on in: PyTorch and JAX read the same files.

config.json                 what Hugging Face's AutoModel needs, and the recipe
model.safetensors           parameters, float32, under mmdetection's names and in its layouts; a large model is
                            several files and model.safetensors.index.json
tokenizer.json ...          the tokenizer of the prompts
processor_config.json, preprocessor_config.json     how images and phrases become inputs, and outputs boxes
modeling_medglip.py, processing_medglip.py      the model in plain PyTorch (see `torch_model`)
README.md                   the model card
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from data_pipelines.prompts import make_prefix
from data_pipelines.text import TextTokenizer
from medglip_jax.configuration import CONFIG_FILE, load_config
from medglip_jax.interop import mmdet
from medglip_jax.interop.reading import read_state_dict
from medglip_jax.interop.state_dict import ImportReport, Params, Weight, from_state_dict, to_state_dict
from medglip_jax.model.pixels import PIXEL_MEAN, PIXEL_STD

WEIGHTS_FILE, INDEX_FILE, PICKLE_FILE = "model.safetensors", "model.safetensors.index.json", "model.pth"
CARD_FILE = "README.md"
MODEL_TYPE = "medglip"
MAX_SHARD = 5 * 10**9  # bytes of a file, as Hugging Face cuts them

_TWIN = pathlib.Path(__file__).with_name("torch_model")
_TWIN_FILES = ("modeling_medglip.py", "processing_medglip.py")
_AUTO_MAP = {
    "AutoConfig": "modeling_medglip.MedGLIPConfig",
    "AutoModel": "modeling_medglip.MedGLIPModel",
    "AutoProcessor": "processing_medglip.MedGLIPProcessor",
}


def is_folder(path: str | os.PathLike) -> bool:
    """Tells whether a path is a folder that `write_folder` wrote, whole or damaged."""
    try:
        fields = json.loads((epath.Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE


@contextlib.contextmanager
def replaced(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder whose files become those of `directory`, the weights last.

    What is interrupted leaves either the old files, or a folder without weights, which no reader takes for whole.

    Args:
        directory: made if missing; an older export in it is replaced, other files beside it stay.

    Raises:
        ValueError: the directory holds something else than an export.
    """
    target = pathlib.Path(directory).resolve()
    weights = (WEIGHTS_FILE, INDEX_FILE, PICKLE_FILE)
    stale = (*weights, "model.onnx", "model.onnx.data")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in weights):
        raise ValueError(f"{target} is not empty and holds no {WEIGHTS_FILE} of an export: choose another --output")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".export-") as folder:
        staging = pathlib.Path(folder)
        yield staging
        for old in [*target.glob("model*.safetensors"), *(target / name for name in stale)]:
            old.unlink(missing_ok=True)
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file.name in weights, file.name.startswith("model-"))):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / file).chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(staging / file, target / file)


def save_weights(
    params: Params, weights: Sequence[Weight], directory: pathlib.Path, *, max_shard: int = MAX_SHARD, consume: bool
) -> pathlib.Path:
    """Writes parameters as safetensors, in one file or in several with an index.

    Args:
        params: nested dict of arrays, also ones that lie on several devices.
        weights: the names to write them under.
        directory: exists.
        max_shard: most bytes of a file; a larger array has a file of its own.
        consume: empty `params` on the way, so that no more than one file's arrays are in memory twice. With one file
            each array is let go as its copy is made: the peak is the model and its largest array.

    Returns:
        The path of the weights, or of the index.

    Raises:
        ValueError: the parameters are not those that `weights` names.
    """
    from safetensors.numpy import save_file

    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    sizes = {path: int(np.prod(np.shape(x))) * x.dtype.itemsize for path, x in flat.items()}
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        size = sizes.get(weight.ours, 0)
        if shards[-1] and filled + size > max_shard:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    del flat
    arrays = to_state_dict(params, weights, consume=consume)
    if len(shards) == 1:
        save_file(dict(arrays), directory / WEIGHTS_FILE, metadata={"format": "pt"})
        return directory / WEIGHTS_FILE
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(next(arrays) for _ in shard), directory / name, metadata={"format": "pt"})
        places |= {weight.theirs: name for weight in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return directory / INDEX_FILE


def public_recipe(config: ConfigDict) -> dict[str, Any]:
    """Returns the recipe without what belongs to the machine it was trained on: the paths of its data."""
    fields = config.to_dict()
    fields["data"] |= {"train": "", "eval": "", "tokenizer": ""}
    fields["init"] |= {name: type(value)() for name, value in fields["init"].items()}
    return fields


def processor_files(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Returns what Hugging Face's processors read: the settings of ours, and how pixels become inputs, by file name."""
    common = {"processor_class": "MedGLIPProcessor", "auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]}}
    evaluation = config.evaluation
    settings = {
        "prefix": make_prefix(evaluation.modality) if evaluation.modality_prefix else "",
        "canvas": list(config.data.canvas),
        "max_tokens": config.data.max_tokens,
        "detection": config.detection.to_dict(),
    }
    pixels = {
        "size": {"height": config.data.canvas[0], "width": config.data.canvas[1]},
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "rescale_factor": 1.0,
        "channel_order": "BGR",
        "do_pad": True,
    }
    return {"processor_config.json": common | settings, "preprocessor_config.json": common | pixels}


def write_folder(
    params: Params,
    config: ConfigDict,
    tokenizer: TextTokenizer,
    directory: str | os.PathLike,
    *,
    card: str,
    max_shard: int = MAX_SHARD,
    consume: bool = False,
) -> pathlib.Path:
    """Writes a model as a folder; the weights appear last, and complete or not at all.

    Args:
        params: the model's parameters, a nested dict of arrays.
        config: the recipe; `config.model` describes the parameters.
        tokenizer: of the prompts.
        directory: see `replaced`.
        card: text of the model card.
        max_shard, consume: see `save_weights`.

    Returns:
        The path of the weights, or of their index.

    Raises:
        ValueError: the parameters are not those of `config.model`, or of a model with parts of modalities; or the
            folder holds something else than an export.
    """
    if config.model.modality.names:
        raise ValueError(
            f"a model with parts of modalities ({config.model.modality.names}) has no place in PyTorch's: write the "
            "plain model of one of them, as medglip export --modality NAME does (model.modality.merge_modality)"
        )
    fields = {
        "model_type": MODEL_TYPE,
        "architectures": ["MedGLIPModel"],
        "auto_map": _AUTO_MAP,
        "dtype": "float32",
        "recipe": public_recipe(config),
    }
    with replaced(directory) as staging:
        weights = save_weights(
            params, mmdet.parameter_names(config.model), staging, max_shard=max_shard, consume=consume
        )
        (staging / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(staging)
        _name_tokenizer(staging / "tokenizer_config.json")
        for name, settings in processor_files(config).items():
            (staging / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in _TWIN_FILES:
            shutil.copyfile(_TWIN / name, staging / name)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
    return pathlib.Path(directory).resolve() / weights.name


def _name_tokenizer(file: pathlib.Path) -> None:
    """Has transformers read tokenizer.json as it is; it would build a BertTokenizer anew, from the vocabulary alone."""
    fields = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_folder(directory: str | os.PathLike) -> tuple[Params, ConfigDict]:
    """Reads what `write_folder` wrote.

    Returns:
        The parameters as a nested dict of NumPy arrays, and the recipe.

    Raises:
        ValueError: the weights are damaged, or are not those of the folder's recipe.
        OSError: a file is missing.
    """
    config = load_config(directory)
    params, report = import_parameters(read_state_dict(directory), config, mmdet)
    if not report.complete:
        raise ValueError(f"{directory}: the weights are not those of its {CONFIG_FILE}: {report.describe()}")
    return params, config


def import_parameters(state_dict: Any, config: ConfigDict, naming: Any) -> tuple[Params, ImportReport]:
    """Finds the parameters of `config.model` in a state dict.

    Args:
        state_dict: arrays by name.
        config: a recipe.
        naming: the module of the names, `interop.mmdet` or `interop.glip`.

    Returns:
        See `from_state_dict`.
    """
    from medglip_jax.inference import flat_shapes, parameter_shapes
    from medglip_jax.model.detector import GLIP

    shapes = flat_shapes(parameter_shapes(GLIP(config.model), config))
    return from_state_dict(state_dict, naming.parameter_names(config.model), shapes, ignored=naming.is_ignored)
