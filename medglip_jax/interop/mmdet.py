"""The parameters of GLIP under mmdetection's names and layouts (mmdet 3.3, class GLIP with ATSSVLFusionHead)."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from medglip_jax.interop.state_dict import Weight, linear, norm

LANGUAGE = "language_model.language_backbone.body.model"  # the text encoder, with Hugging Face's names under it
_TOWER = "bbox_head.head.dyhead_tower"


def _bert_layer(ours: str, theirs: str) -> Iterator[Weight]:
    for name in ("query", "key", "value"):
        yield from linear(f"{ours}/{name}", f"{theirs}.attention.self.{name}", "linear")
    yield from linear(f"{ours}/attention_output", f"{theirs}.attention.output.dense", "linear")
    yield from norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm")
    yield from linear(f"{ours}/intermediate", f"{theirs}.intermediate.dense", "linear")
    yield from linear(f"{ours}/output", f"{theirs}.output.dense", "linear")
    yield from norm(f"{ours}/output_norm", f"{theirs}.output.LayerNorm")


def _backbone(config: ConfigDict) -> Iterator[Weight]:
    yield from linear("backbone/patch_embed/projection", "backbone.patch_embed.projection", "conv")
    yield from norm("backbone/patch_embed/norm", "backbone.patch_embed.norm")
    for stage, depth in enumerate(config.depths):
        for index in range(depth):
            ours, theirs = f"backbone/stage_{stage}_block_{index}", f"backbone.stages.{stage}.blocks.{index}"
            table = "relative_position_bias_table"
            yield Weight(f"{ours}/attention/{table}", f"{theirs}.attn.w_msa.{table}", "copy")
            yield from norm(f"{ours}/norm1", f"{theirs}.norm1")
            yield from linear(f"{ours}/attention/qkv", f"{theirs}.attn.w_msa.qkv", "linear")
            yield from linear(f"{ours}/attention/proj", f"{theirs}.attn.w_msa.proj", "linear")
            yield from norm(f"{ours}/norm2", f"{theirs}.norm2")
            yield from linear(f"{ours}/fc1", f"{theirs}.ffn.layers.0.0", "linear")
            yield from linear(f"{ours}/fc2", f"{theirs}.ffn.layers.1", "linear")
        if stage > 0:
            yield from norm(f"backbone/norm_{stage}", f"backbone.norm{stage}")
        if stage + 1 < len(config.depths):
            ours, theirs = f"backbone/stage_{stage}_downsample", f"backbone.stages.{stage}.downsample"
            yield from norm(f"{ours}/norm", f"{theirs}.norm")
            yield from linear(f"{ours}/reduction", f"{theirs}.reduction", "linear", bias=False)


def _language(config: ConfigDict) -> Iterator[Weight]:
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        yield Weight(f"language/{name}/embedding", f"{LANGUAGE}.embeddings.{name}.weight", "copy")
    yield from norm("language/embeddings_norm", f"{LANGUAGE}.embeddings.LayerNorm")
    for i in range(config.num_layers):
        yield from _bert_layer(f"language/layer_{i}", f"{LANGUAGE}.encoder.layer.{i}")


def _tower_block(index: int) -> Iterator[Weight]:
    ours, theirs = f"tower_{index}/fusion", f"{_TOWER}.{3 * index}.b_attn"
    for name in ("gamma_v", "gamma_l"):
        yield Weight(f"{ours}/{name}", f"{theirs}.{name}", "copy")
    for name in ("layer_norm_v", "layer_norm_l"):
        yield from norm(f"{ours}/{name}", f"{theirs}.{name}")
    for name in ("v_proj", "l_proj", "values_v_proj", "values_l_proj", "out_v_proj", "out_l_proj"):
        yield from linear(f"{ours}/{name}", f"{theirs}.attn.{name}", "linear")

    yield from _bert_layer(f"tower_{index}/text", f"{_TOWER}.{3 * index + 1}")

    ours, theirs = f"tower_{index}/dyconv", f"{_TOWER}.{3 * index + 2}"
    for i, name in enumerate(("coarser", "same", "finer")):
        yield from linear(f"{ours}/{name}", f"{theirs}.dyconvs.{i}.conv", "conv")
        yield from norm(f"{ours}/{name}/norm", f"{theirs}.dyconvs.{i}.bn")
    yield from linear(f"{ours}/scale_attention", f"{theirs}.attnconv.1", "linear as conv")
    yield from linear(f"{ours}/relu/fc0", f"{theirs}.relu.fc.0", "linear")
    yield from linear(f"{ours}/relu/fc1", f"{theirs}.relu.fc.2", "linear")
    yield from linear(f"{ours}/offset", f"{theirs}.offset", "conv")


def parameter_names(config: ConfigDict) -> list[Weight]:
    """Returns every parameter of the model with its mmdetection name and how the array changes between them.

    Args:
        config: `config.model`.
    """
    names = [*_backbone(config.swin)]
    for i in range(3):
        names += linear(f"neck/lateral_{i}", f"neck.lateral_convs.{i}.conv", "conv")
    for i in range(5):
        names += linear(f"neck/output_{i}", f"neck.fpn_convs.{i}.conv", "conv")
    names += _language(config.bert)
    for i in range(config.tower.num_blocks):
        names += _tower_block(i)
    head = "bbox_head.head"
    names += linear("head/box", f"{head}.bbox_pred", "linear as conv")
    names += linear("head/centerness", f"{head}.centerness", "linear as conv")
    names += linear("head/text_projection", f"{head}.dot_product_projection_text", "linear")
    names += [Weight(f"head/{name}", f"{head}.{name}", "copy") for name in ("log_scale", "bias_lang", "bias0")]
    names += [Weight(f"head/scale_{i}", f"{head}.scales.{i}.scale", "copy") for i in range(5)]
    return names


def is_ignored(name: str) -> bool:
    """Tells the buffers of an mmdetection state dict that hold no weights."""
    return name.endswith(("relative_position_index", "position_ids"))


def infer_sizes(shapes: Mapping[str, Sequence[int]], config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config.model` with the sizes that the shapes of a state dict tell.

    They do not tell the heads of the fusion, nor the groups of the norms in the dynamic convolutions: these stay as
    `config` has them. Attention heads of BERT are 64 wide, as in every published one, unless its width is smaller.

    Args:
        shapes: shape of each array, by mmdetection name.
        config: `config.model` of a recipe.

    Raises:
        ValueError: it is not the state dict of an mmdetection GLIP; names what it lacks.
    """

    def shape(name: str) -> Sequence[int]:
        if name not in shapes:
            raise ValueError(f"this is no state dict of mmdetection's GLIP: it has no {name}")
        return shapes[name]

    def count(pattern: str) -> int:
        """How many indices there are in the place of the group."""
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    config = config.copy_and_resolve_references().unlock()
    swin, bert, tower = config.swin, config.bert, config.tower
    table = "attn.w_msa.relative_position_bias_table"
    swin.embed_dim = shape("backbone.patch_embed.projection.weight")[0]
    swin.depths = tuple(
        count(rf"backbone\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(count(r"backbone\.stages\.(\d+)\."))
    )
    swin.num_heads = tuple(shape(f"backbone.stages.{i}.blocks.0.{table}")[1] for i in range(len(swin.depths)))
    swin.window = (math.isqrt(shape(f"backbone.stages.0.blocks.0.{table}")[0]) + 1) // 2
    swin.mlp_ratio = shape("backbone.stages.0.blocks.0.ffn.layers.0.0.weight")[0] // swin.embed_dim
    config.fpn.channels = shape("neck.lateral_convs.0.conv.weight")[0]
    bert.vocab_size, bert.hidden_size = shape(f"{LANGUAGE}.embeddings.word_embeddings.weight")
    bert.max_positions = shape(f"{LANGUAGE}.embeddings.position_embeddings.weight")[0]
    bert.num_layers = count(rf"{re.escape(LANGUAGE)}\.encoder\.layer\.(\d+)\.")
    bert.intermediate_size = shape(f"{LANGUAGE}.encoder.layer.0.intermediate.dense.weight")[0]
    bert.num_heads = max(bert.hidden_size // 64, 1)
    tower.num_blocks = count(rf"{re.escape(_TOWER)}\.(\d+)\.b_attn\.")
    tower.fusion_dim = shape(f"{_TOWER}.0.b_attn.attn.v_proj.weight")[0]
    return config.lock()
