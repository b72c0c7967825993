"""The parameters of GLIP under mmdetection's names and layouts (mmdet 3.3, class GLIP with ATSSVLFusionHead)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

Params = dict[str, Any]

# How an array changes on its way to PyTorch, and back.
_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "copy": (lambda x: x, lambda x: x),
    "linear": (np.transpose, np.transpose),
    "conv": (lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0)),
    "linear as conv": (lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T),
}


def _weights(ours: str, theirs: str, layout: str, bias: bool = True) -> Iterator[tuple[str, str, str]]:
    yield f"{ours}/kernel", f"{theirs}.weight", layout
    if bias:
        yield f"{ours}/bias", f"{theirs}.bias", "copy"


def _norm(ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    yield f"{ours}/scale", f"{theirs}.weight", "copy"
    yield f"{ours}/bias", f"{theirs}.bias", "copy"


def _bert_layer(ours: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    for name in ("query", "key", "value"):
        yield from _weights(f"{ours}/{name}", f"{theirs}.attention.self.{name}", "linear")
    yield from _weights(f"{ours}/attention_output", f"{theirs}.attention.output.dense", "linear")
    yield from _norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
    yield from _weights(f"{ours}/intermediate", f"{theirs}.intermediate.dense", "linear")
    yield from _weights(f"{ours}/output", f"{theirs}.output.dense", "linear")
    yield from _norm(f"{ours}/output_norm", f"{theirs}.output.LayerNorm")


def _backbone(config: ConfigDict) -> Iterator[tuple[str, str, str]]:
    yield from _weights("backbone/patch_embed/projection", "backbone.patch_embed.projection", "conv")
    yield from _norm("backbone/patch_embed/norm", "backbone.patch_embed.norm")
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            ours, theirs = f"backbone/stage_{stage}_block_{index}", f"backbone.stages.{stage}.blocks.{index}"
            table = "relative_position_bias_table"
            yield f"{ours}/attention/{table}", f"{theirs}.attn.w_msa.{table}", "copy"
            yield from _norm(f"{ours}/norm1", f"{theirs}.norm1")
            yield from _weights(f"{ours}/attention/qkv", f"{theirs}.attn.w_msa.qkv", "linear")
            yield from _weights(f"{ours}/attention/proj", f"{theirs}.attn.w_msa.proj", "linear")
            yield from _norm(f"{ours}/norm2", f"{theirs}.norm2")
            yield from _weights(f"{ours}/fc1", f"{theirs}.ffn.layers.0.0", "linear")
            yield from _weights(f"{ours}/fc2", f"{theirs}.ffn.layers.1", "linear")
        if stage > 0:
            yield from _norm(f"backbone/norm_{stage}", f"backbone.norm{stage}")
        if stage + 1 < len(config.depths):
            ours, theirs = f"backbone/stage_{stage}_downsample", f"backbone.stages.{stage}.downsample"
            yield from _norm(f"{ours}/norm", f"{theirs}.norm")
            yield from _weights(f"{ours}/reduction", f"{theirs}.reduction", "linear", bias=False)


def _language(config: ConfigDict) -> Iterator[tuple[str, str, str]]:
    root = "language_model.language_backbone.body.model"
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        yield f"language/{name}/embedding", f"{root}.embeddings.{name}.weight", "copy"
    yield from _norm("language/embeddings_norm", f"{root}.embeddings.LayerNorm")
    for i in range(config.num_layers):
        yield from _bert_layer(f"language/layer_{i}", f"{root}.encoder.layer.{i}")


def _tower_block(index: int) -> Iterator[tuple[str, str, str]]:
    tower = "bbox_head.head.dyhead_tower"
    ours, theirs = f"tower_{index}/fusion", f"{tower}.{3 * index}.b_attn"
    for name in ("gamma_v", "gamma_l"):
        yield f"{ours}/{name}", f"{theirs}.{name}", "copy"
    for name in ("layer_norm_v", "layer_norm_l"):
        yield from _norm(f"{ours}/{name}", f"{theirs}.{name}")
    for name in ("v_proj", "l_proj", "values_v_proj", "values_l_proj", "out_v_proj", "out_l_proj"):
        yield from _weights(f"{ours}/{name}", f"{theirs}.attn.{name}", "linear")

    yield from _bert_layer(f"tower_{index}/text", f"{tower}.{3 * index + 1}")

    ours, theirs = f"tower_{index}/dyconv", f"{tower}.{3 * index + 2}"
    for i, name in enumerate(("coarser", "same", "finer")):
        yield from _weights(f"{ours}/{name}", f"{theirs}.dyconvs.{i}.conv", "conv")
        yield from _norm(f"{ours}/{name}/norm", f"{theirs}.dyconvs.{i}.bn")
    yield from _weights(f"{ours}/scale_attention", f"{theirs}.attnconv.1", "linear as conv")
    yield from _weights(f"{ours}/relu/fc0", f"{theirs}.relu.fc.0", "linear")
    yield from _weights(f"{ours}/relu/fc1", f"{theirs}.relu.fc.2", "linear")
    yield from _weights(f"{ours}/offset", f"{theirs}.offset", "conv")


def parameter_names(config: ConfigDict) -> list[tuple[str, str, str]]:
    """Every parameter of the model: its path here, its mmdetection name, and how the array changes between them.

    Args:
        config: `config.model`.
    """
    names = [*_backbone(config.swin)]
    for i in range(3):
        names += _weights(f"neck/lateral_{i}", f"neck.lateral_convs.{i}.conv", "conv")
    for i in range(5):
        names += _weights(f"neck/output_{i}", f"neck.fpn_convs.{i}.conv", "conv")
    names += _language(config.bert)
    for i in range(config.tower.num_blocks):
        names += _tower_block(i)
    head = "bbox_head.head"
    names += _weights("head/box", f"{head}.bbox_pred", "linear as conv")
    names += _weights("head/centerness", f"{head}.centerness", "linear as conv")
    names += _weights("head/text_projection", f"{head}.dot_product_projection_text", "linear")
    names += [(f"head/{name}", f"{head}.{name}", "copy") for name in ("log_scale", "bias_lang", "bias0")]
    names += [(f"head/scale_{i}", f"{head}.scales.{i}.scale", "copy") for i in range(5)]
    return names


def to_state_dict(params: Params, config: ConfigDict) -> dict[str, np.ndarray]:
    """The parameters as an mmdetection state dict of contiguous arrays.

    Args:
        params: nested dict of arrays, the model's parameters.
        config: `config.model`.

    Raises:
        ValueError: the parameters are not those of a model of this config; names the ones that differ.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    names = parameter_names(config)
    _require_same({ours for ours, _, _ in names}, set(flat), "the parameters", "config.model")
    return {theirs: _LAYOUTS[layout][0](np.asarray(flat[ours])).copy(order="C") for ours, theirs, layout in names}


def from_state_dict(state_dict: Mapping[str, np.ndarray], config: ConfigDict) -> Params:
    """The model's parameters from an mmdetection state dict; the inverse of `to_state_dict`.

    Args:
        state_dict: arrays by mmdetection name. Buffers that hold no weights (relative_position_index,
            position_ids) are ignored.
        config: `config.model`.

    Raises:
        ValueError: parameters are missing or unexpected; names them.
    """
    buffers = ("relative_position_index", "position_ids")
    given = {name: value for name, value in state_dict.items() if not name.endswith(buffers)}
    names = parameter_names(config)
    _require_same({theirs for _, theirs, _ in names}, set(given), "the state dict", "config.model")
    flat = {ours: _LAYOUTS[layout][1](np.asarray(given[theirs])) for ours, theirs, layout in names}
    return traverse_util.unflatten_dict(flat, sep="/")


def _require_same(expected: set[str], given: set[str], what: str, source: str) -> None:
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise ValueError(
            f"{what} and {source} describe different models: "
            f"{len(missing)} parameters missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
