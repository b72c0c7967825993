"""GLIP (arXiv 2112.03857): an image and a prompt in, dense token logits and boxes out."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medglip_jax.model.bert import Bert, BertLayer
from medglip_jax.model.blocks import Block, run_blocks
from medglip_jax.model.dyhead import DyConv
from medglip_jax.model.fpn import FPN
from medglip_jax.model.fusion import VLFuse
from medglip_jax.model.layers import Dense, torch_bias_init, torch_kernel_init
from medglip_jax.model.masks import MaskBranch, check_kind
from medglip_jax.model.remat import block_policies
from medglip_jax.model.swin import Swin
from medglip_jax.ops.widening import spread
from medglip_jax.parallel.activations import PIXELS, TEXT, WHOLE_MAP, WHOLE_PIXELS, constrain

Array = jax.Array

_LIMIT = 50000.0
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def flatten_levels(levels: tuple[Array, ...]) -> Array:
    """Joins [B, h, w, C] of all levels to [B, N, C], finest level first, row by row."""
    rows = [constrain(x, *WHOLE_MAP).reshape(x.shape[0], -1, x.shape[-1]) for x in levels]
    return constrain(constrain(jnp.concatenate(rows, axis=1), *WHOLE_PIXELS), *PIXELS)


def unflatten_levels(x: Array, like: tuple[Array, ...]) -> tuple[Array, ...]:
    """The inverse of `flatten_levels`, with the level sizes of `like`."""
    ends = [sum(y.shape[1] * y.shape[2] for y in like[: i + 1]) for i in range(len(like) - 1)]
    parts = jnp.split(constrain(x, *WHOLE_PIXELS), ends, axis=1)
    return tuple(constrain(part.reshape(y.shape), *WHOLE_MAP) for part, y in zip(parts, like, strict=True))


class TowerBlock(nn.Module):
    """Fusion, then a text layer, then the dynamic convolutions."""

    config: ConfigDict
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, levels: tuple[Array, ...], text: Array, mask: Array, train: bool
    ) -> tuple[tuple[Array, ...], Array]:
        visual, text = VLFuse(self.config.tower, self.dtype, name="fusion")(flatten_levels(levels), text, mask, train)
        levels = unflatten_levels(visual, levels)
        self.sow("intermediates", "fusion_visual", levels)
        self.sow("intermediates", "fusion_text", text)
        text = BertLayer(self.config.bert, self.dtype, in_tower=True, name="text")(text, mask, train)
        self.sow("intermediates", "text_hidden", text)
        levels = DyConv(self.config.tower, self.dtype, name="dyconv")(levels)
        self.sow("intermediates", "dyconv_levels", levels)
        return levels, text


class Head(nn.Module):
    """Box deltas, centerness and the agreement of every pixel with every token."""

    prior_probability: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels: tuple[Array, ...], text: Array) -> dict[str, Array]:
        channels, hidden = levels[0].shape[-1], text.shape[-1]
        small = nn.initializers.normal(0.01)
        compute = jnp.promote_types(self.dtype, jnp.float32)
        pixels = flatten_levels(levels)  # [B, N, C]

        box = Dense(4, kernel_init=small, dtype=self.dtype, name="box")
        scaled = [
            box(x).astype(compute) * self.param(f"scale_{i}", nn.initializers.ones, ()) for i, x in enumerate(levels)
        ]
        centerness = Dense(1, kernel_init=small, dtype=self.dtype, name="centerness")(pixels)

        text = constrain(text.astype(compute), *TEXT)
        embedding = text / jnp.maximum(jnp.linalg.norm(text, axis=-1, keepdims=True), 1e-12)  # [B, L, D]
        tokens = Dense(  # [B, L, C]
            channels,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(hidden),
            dtype=self.dtype,
            name="text_projection",
        )((embedding / 2).astype(self.dtype))
        prior = -math.log((1 - self.prior_probability) / self.prior_probability)
        log_scale = self.param("log_scale", nn.initializers.zeros, (1,))
        bias = embedding @ self.param("bias_lang", nn.initializers.zeros, (hidden,))
        bias += self.param("bias0", nn.initializers.constant(prior), (1,))  # [B, L]
        logits = jnp.einsum("bnc,blc->bnl", pixels, tokens, preferred_element_type=compute)
        logits = constrain(logits / jnp.exp(log_scale) + bias[:, None], "batch", "pixels", "tokens")
        return {
            "token_logits": jnp.clip(logits, -_LIMIT, _LIMIT),
            "box_deltas": flatten_levels(tuple(scaled)),
            "centerness": centerness[..., 0].astype(compute),
        }


def block_paths(config: ConfigDict) -> list[str]:
    """Returns what the parameter paths of each block start with, for `config.model` of a recipe."""
    stages = enumerate(config.swin.depths)
    return [
        *(f"backbone/stage_{stage}_block_{i}" for stage, depth in stages for i in range(depth)),
        *(f"language/layer_{i}" for i in range(config.bert.num_layers)),
        *(f"tower_{i}" for i in range(config.tower.num_blocks)),
    ]


def _below(prefix: str, policies: Mapping[str, str]) -> dict[str, str]:
    return {path.removeprefix(prefix): policy for path, policy in policies.items() if path.startswith(prefix)}


class GLIP(nn.Module):
    """The whole detector; sizes and compute type come from `config.model` (see configs/medglip_t.py).

    Parameter paths are an interface: sharding rules, learning-rate groups and interop match on them.
    """

    config: ConfigDict

    @nn.compact
    def __call__(
        self,
        pixels: Array,
        input_ids: Array,
        attention_mask: Array,
        train: bool = False,
        text_offset: Array | None = None,
    ) -> dict[str, Array]:
        """Scores every anchor against every token.

        Args:
            pixels: float[B, H, W, 3], as `normalize_pixels` returns them.
            input_ids: int32[B, L].
            attention_mask: int32[B, L], 1 for real tokens.
            train: turns on dropout, drop path and DropBlock (random stream "dropout").
            text_offset: float32[B, L or 1, D], added to the text encoder's output (see `text_offsets`).

        Returns:
            token_logits float32[B, N, L], box_deltas float32[B, N, 4], centerness float32[B, N]. N counts the anchors
            of all levels, finest first, row by row; a level of stride s has ceil(H / s) rows and ceil(W / s) columns.
            With `config.masks.kind` also what `MaskBranch` returns.
        """
        config = self.config
        if config.dtype not in _DTYPES:
            raise ValueError(f"config.model.dtype is {config.dtype!r}: expected one of {', '.join(_DTYPES)}")
        dtype, scan = _DTYPES[config.dtype], config.scan
        policies = block_policies(config.remat, block_paths(config))
        mask = attention_mask.astype(bool)

        check_kind(config.masks.kind)
        first = 0 if config.masks.kind else 1  # the finest stage is for masks alone
        features = Swin(config.swin, dtype, _below("backbone/", policies), scan, first, name="backbone")(
            pixels.astype(dtype), train
        )
        detail, features = features[: 1 - first], features[1 - first :]
        self.sow("intermediates", "backbone_levels", features)
        levels = FPN(config.fpn, dtype, name="neck")(features, train)
        self.sow("intermediates", "neck_levels", levels)
        text = Bert(config.bert, dtype, _below("language/", policies), scan, name="language")(input_ids, mask, train)
        self.sow("intermediates", "language_hidden", text)
        if text_offset is not None:
            text = constrain(text + spread(text_offset.astype(text.dtype), text.shape), *TEXT)

        fields = {"config": config, "dtype": dtype}
        names = [f"tower_{i}" for i in range(config.tower.num_blocks)]
        blocks = [Block(name, TowerBlock, fields, train=4, policy=policies[name]) for name in names]
        levels, text = run_blocks(
            self, blocks, lambda block, streams, _: block(*streams, mask, train), (levels, text), scan=scan, train=train
        )
        outputs = Head(config.prior_probability, dtype, name="head")(levels, text)
        if config.masks.kind:
            outputs |= MaskBranch(config.masks, config.prior_probability, dtype, name="masks")(levels, detail[0], text)
        return outputs
