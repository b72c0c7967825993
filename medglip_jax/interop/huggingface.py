"""Pretrained encoders from Hugging Face folders: SwinModel for the backbone, BertModel for the text encoder.

Names and computation are those of transformers 5.24. Made for bert-base-uncased, Bio_ClinicalBERT and PubMedBERT, and
for Swin's patch4-window7-224 and patch4-window12-384 checkpoints.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medglip_jax.inference import flat_shapes
from medglip_jax.interop import glip
from medglip_jax.interop.reading import StateDict, check_exists, read_state_dict
from medglip_jax.interop.state_dict import ImportReport, Params, Weight, from_state_dict
from medglip_jax.model.bert import Bert
from medglip_jax.model.swin import Swin

# From Microsoft's names of the backbone to SwinModel's, which splits what the former joins as qkv.
_JOINED = "{query,key,value}"
_SWIN_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^backbone\.body\.norm(\d)\.", lambda found: f"hidden_states_norms.stage{int(found[1]) + 1}."),
        (r"^backbone\.body\.patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^backbone\.body\.patch_embed\.", "embeddings."),
        (r"^backbone\.body\.", "encoder."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.qkv\.", f".attention.self.{_JOINED}."),
        (r"\.attn\.", ".attention.self."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )
)
_OUTPUT_NORMS = "hidden_states_norms."
_BERT_ROOT = "language_backbone.body.model."
_BUFFERS = ("relative_position_index", "position_ids", "token_type_ids", "mask_token")

# What config.json may say and the model has no setting for; transformers' defaults are the same values.
_SWIN_FIXED = {
    "patch_size": 4,
    "num_channels": 3,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "use_absolute_embeddings": False,
    "layer_norm_eps": 1e-5,
}
_BERT_FIXED = {
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "layer_norm_eps": 1e-12,
}
# The settings that the recipe has too: transformers' default, and the field under config.model.
_SWIN_FIELDS = {
    "embed_dim": (96, "embed_dim"),
    "depths": ((2, 2, 6, 2), "depths"),
    "num_heads": ((3, 6, 12, 24), "num_heads"),
    "mlp_ratio": (4, "mlp_ratio"),
}
_BERT_FIELDS = {
    "vocab_size": (30522, "vocab_size"),
    "hidden_size": (768, "hidden_size"),
    "num_hidden_layers": (12, "num_layers"),
    "num_attention_heads": (12, "num_heads"),
    "intermediate_size": (3072, "intermediate_size"),
}
_MAX_POSITIONS = 512


def load_swin(folder: str | os.PathLike[str], config: ConfigDict) -> tuple[Params, ImportReport]:
    """Reads the backbone from a folder that a SwinModel was saved to, with any head or as a SwinBackbone.

    The first convolution's input channels change from RGB to the model's BGR, so that both see the same image. Where
    the window differs, the tables of relative positions are resized as Swin's authors do (bicubic, in float32).

    Args:
        folder: with config.json and the weights, .safetensors or .bin, whole or in shards.
        config: a recipe; reads `model.swin`.

    Returns:
        The sub-tree "backbone", NumPy arrays, and the report under SwinModel's names. Only a SwinBackbone has the norms
        of the three outputs; else these parameters are not in the tree, they are the only ones that the report lists as
        missing, and they stay as they were initialised.

    Raises:
        ValueError: the folder is not there, or is not a Swin's, or its sizes are not the recipe's, or its weights are
            damaged or not complete.
    """
    folder, swin = pathlib.Path(folder), config.model.swin
    settings = _read_settings(folder, "swin")
    _check(folder, _mismatches(settings, "swin", swin, _SWIN_FIELDS, _SWIN_FIXED))

    module = Swin(swin, jnp.dtype(jnp.float32))
    shapes = _shapes(lambda key: module.init(key, jnp.zeros((1, 32, 32, 3)), False))
    weights = [
        Weight(ours.removeprefix("backbone/"), _swin_name(theirs), "conv of RGB" if layout == "conv" else layout)
        for ours, theirs, layout in glip.parameter_names(config.model)
        if ours.startswith("backbone/")
    ]
    return _load(folder, "swin.", weights, shapes, _resize_table, allowed=_OUTPUT_NORMS)


def load_bert(folder: str | os.PathLike[str], config: ConfigDict) -> tuple[Params, ImportReport]:
    """Reads the text encoder from a folder that a BertModel was saved to, with any head.

    Args:
        folder: with config.json and the weights, .safetensors or .bin, whole or in shards.
        config: a recipe; reads `model.bert`. Of more positions than its `max_positions`, the first are taken.

    Returns:
        The sub-tree "language", complete, NumPy arrays, and the report under BertModel's names.

    Raises:
        ValueError: the folder is not there, or is not a BERT's, or its sizes are not the recipe's, or its weights are
            damaged or not complete.
    """
    folder, bert = pathlib.Path(folder), config.model.bert
    settings = _read_settings(folder, "bert")
    wrong = _mismatches(settings, "bert", bert, _BERT_FIELDS, _BERT_FIXED)
    positions = settings.get("max_position_embeddings", _MAX_POSITIONS)
    if positions < bert.max_positions:
        wrong.append(f"config.model.bert.max_positions is {bert.max_positions}, it has {positions}")
    _check(folder, wrong)

    module = Bert(bert, jnp.dtype(jnp.float32))
    shapes = _shapes(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool), False))
    weights = [
        Weight(ours.removeprefix("language/"), theirs.removeprefix(_BERT_ROOT), layout)
        for ours, theirs, layout in glip.parameter_names(config.model)
        if ours.startswith("language/")
    ]
    return _load(folder, "bert.", weights, shapes, _cut_positions)


def _shapes(init: Callable[[jax.Array], Any]) -> dict[str, tuple[int, ...]]:
    return flat_shapes(jax.eval_shape(init, jax.random.key(0))["params"])


def _swin_name(name: str) -> str:
    for pattern, replacement in _SWIN_RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _read_settings(folder: pathlib.Path, model_type: str) -> dict[str, Any]:
    """Reads config.json and checks whose it is."""
    check_exists(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: expected a folder that a Hugging Face model was saved to")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = settings.get("model_type", model_type) if isinstance(settings, dict) else None  # old files have none
    if found != model_type:
        raise ValueError(f"{path} describes a model of type {found!r}: expected {model_type!r}")
    return settings


def _mismatches(
    settings: Mapping[str, Any],
    group: str,
    sizes: ConfigDict,
    fields: Mapping[str, tuple[Any, str]],
    fixed: Mapping[str, Any],
) -> list[str]:
    """Returns a line for each setting of config.json that the recipe has another value for."""
    lines = []
    for key, (default, field) in fields.items():
        given = settings.get(key, default)
        given = tuple(given) if isinstance(given, list) else given
        if given != sizes[field]:
            lines.append(f"config.model.{group}.{field} is {sizes[field]}, it has {given}")
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            lines.append(f"{key} is {value} in this model, which has no setting for it; it has {settings[key]}")
    return lines


def _check(folder: pathlib.Path, mismatches: list[str]) -> None:
    if mismatches:
        lines = "\n".join(f"  {line}" for line in mismatches)
        raise ValueError(f"{folder} has other sizes than the recipe; set the recipe to its, or take another:\n{lines}")


def _load(
    folder: pathlib.Path,
    prefix: str,
    weights: list[Weight],
    shapes: Mapping[str, tuple[int, ...]],
    resize: Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray | None],
    allowed: str = "\0",
) -> tuple[Params, ImportReport]:
    """Finds the parameters in the folder's weights; only names that start with `allowed` may be missing."""
    state_dict = _with_one_naming(read_state_dict(folder), prefix)
    names = {weight.theirs for weight in weights}

    def is_ignored(name: str) -> bool:  # buffers, heads, and the norms of outputs that the model does not use
        inside = name.startswith(("embeddings.", "encoder."))
        return name not in names and (not inside or name.endswith(_BUFFERS))

    params, report = from_state_dict(state_dict, weights, shapes, ignored=is_ignored, resize=resize)
    lacking = [name for name in report.missing if not name.startswith(allowed)]
    if lacking or report.unexpected or report.misshapen:
        raise ValueError(f"{folder}: the weights are not those of its config.json: {report.describe()}")
    return params, report


def _with_one_naming(state_dict: Mapping[str, np.ndarray], prefix: str) -> Mapping[str, np.ndarray]:
    """Takes off the prefix that models with a head have, renames TensorFlow's gamma and beta, and joins Swin's qkv."""
    read = state_dict.__getitem__
    sources = {}
    for name in state_dict:
        modern = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name.removeprefix(prefix))
        sources[re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", modern)] = name
    readers: dict[str, Callable[[], np.ndarray]] = {name: partial(read, source) for name, source in sources.items()}
    if prefix == "swin.":
        for name in sources:
            parts = [name.replace(".self.query.", f".self.{part}.") for part in ("query", "key", "value")]
            if ".self.query." in name and all(part in sources for part in parts):
                readers[name.replace(".query.", f".{_JOINED}.")] = partial(_join, [readers.pop(part) for part in parts])
    return StateDict(readers)


def _join(readers: list[Callable[[], np.ndarray]]) -> np.ndarray:
    return np.concatenate([read() for read in readers])


def _resize_table(path: str, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Resizes a table of relative positions, [(2 w - 1)**2, heads], to another window's.

    OpenCV's cubic kernel (a = -0.75, half-pixel centres, repeated edges) is PyTorch's bicubic.
    """
    side, new_side = math.isqrt(len(table)), math.isqrt(shape[0])
    if not path.endswith("relative_position_bias_table") or table.shape[1] != shape[1] or side**2 != len(table):
        return None
    grid = table.astype(np.float32).reshape(side, side, -1)
    return cv2.resize(grid, (new_side, new_side), interpolation=cv2.INTER_CUBIC).reshape(shape)


def _cut_positions(path: str, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Takes the first rows of a table of positions that has more than the model."""
    is_longer = len(table) > shape[0] and table.shape[1:] == shape[1:]
    return table[: shape[0]] if path == "position_embeddings/embedding" and is_longer else None
