"""The mask branch: maps of stride 4 from the fused features, and what makes masks of them (see `detection.masks`)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medglip_jax.detection.masks import KINDS, MASK_STRIDE, count_parameters, resize_linear
from medglip_jax.model.layers import Conv, Dense, torch_bias_init, torch_kernel_init
from medglip_jax.parallel.activations import PIXELS, TEXT, WHOLE_MAP, WHOLE_PIXELS, constrain

Array = jax.Array

_FINEST = 3  # levels of the tower that the maps are made of: strides 8, 16 and 32
_STRIDE = 8  # of the first of them


class MaskBranch(nn.Module):
    """Pixel embeddings, phrase embeddings, and the parameters of each anchor's own network.

    The finest levels of the tower, which have read the text, are brought to stride 8 and summed, then to stride 4,
    where the backbone's first stage adds what the tower is too coarse for (as Panoptic FPN, arXiv 1901.02446, sums).

    Attributes:
        config: `config.model.masks`.
        prior_probability: of a pixel in a phrase's mask, at first.
    """

    config: ConfigDict
    prior_probability: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels: tuple[Array, ...], detail: Array, text: Array) -> dict[str, Array]:
        """Makes what masks are made of.

        Args:
            levels: [B, h, w, C] of each level of the tower, from stride 8.
            detail: [B, h4, w4, C1], the backbone's first stage, of stride 4.
            text: [B, L, D], the tower's text.

        Returns:
            For phrases mask_pixels [B, h4, w4, E], mask_tokens [B, L, E] and mask_token_bias float32[B, L]; for boxes
            mask_maps [B, h4, w4, F] and mask_parameters float32[B, N, P].
        """
        config, dtype = self.config, self.dtype
        compute = jnp.promote_types(dtype, jnp.float32)

        def dense(name: str, features: int, inputs: int) -> Dense:
            return Dense(
                features,
                kernel_init=torch_kernel_init,
                bias_init=torch_bias_init(inputs),
                dtype=dtype,
                name=name,
            )

        height, width = detail.shape[1:3]
        channels = config.channels
        rows, columns = levels[0].shape[1:3]
        summed = []
        for i, level in enumerate(levels[:_FINEST]):
            y = constrain(dense(f"lateral_{i}", channels, level.shape[-1])(level), *WHOLE_MAP)
            summed.append(resize_linear(y, rows, columns, 2**i))
        x = constrain(sum(summed[1:], summed[0]), *WHOLE_MAP)
        x = resize_linear(x, height, width, _STRIDE / MASK_STRIDE)
        x = constrain(x + dense("detail", channels, detail.shape[-1])(detail), *WHOLE_MAP)
        for i in range(config.num_convs):
            x = Conv(
                channels,
                (3, 3),
                padding=1,
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                dtype=dtype,
                name=f"conv_{i}",
            )(x)
            x = nn.GroupNorm(config.norm_groups, dtype=dtype, use_fast_variance=False, name=f"norm_{i}")(x)
            x = constrain(nn.relu(x), *WHOLE_MAP)

        outputs = {}
        if config.kind in ("phrases", "both"):
            text = constrain(text.astype(compute), *TEXT)
            embedding = text / jnp.maximum(jnp.linalg.norm(text, axis=-1, keepdims=True), 1e-12)  # as in the head
            hidden = text.shape[-1]
            prior = -math.log((1 - self.prior_probability) / self.prior_probability)
            bias = embedding @ self.param("bias_lang", nn.initializers.zeros, (hidden,))
            outputs["mask_pixels"] = dense("pixel_projection", channels, channels)(x)
            # Of entries of about 1, and a dot product of about 1 at first, whatever the widths are.
            tokens = dense("text_projection", channels, hidden)((embedding * hidden**0.5).astype(dtype))
            outputs["mask_tokens"] = tokens * channels**-0.5
            outputs["mask_token_bias"] = bias + self.param("bias0", nn.initializers.constant(prior), (1,))
        if config.kind in ("boxes", "both"):
            outputs["mask_maps"] = dense("maps", config.head_channels, channels)(x)
            controller = Dense(
                count_parameters(config.head_channels, config.head_layers),
                kernel_init=torch_kernel_init,
                bias_init=torch_bias_init(config.head_channels),  # one network for all anchors, which the kernel varies
                dtype=dtype,
                name="controller",
            )
            made = [controller(constrain(level, *WHOLE_MAP)) for level in levels]
            flat = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in made], axis=1)
            outputs["mask_parameters"] = constrain(constrain(flat, *WHOLE_PIXELS), *PIXELS).astype(compute)
        return outputs


def is_of_masks(path: str) -> bool:
    """Tells the parameters that a model has for masks alone, by their path "masks/conv_0/kernel"."""
    return path.startswith(("masks/", "backbone/norm_0/"))


def without_masks(params: Any, config: ConfigDict) -> tuple[Any, ConfigDict]:
    """Returns the plain detector in a model with masks: the same boxes, nothing else.

    Args:
        params: of the model, a nested dict of arrays.
        config: its recipe.

    Returns:
        Both as they are where there are no masks; else a shallow copy of the parameters without `masks` and
        `backbone/norm_0`, and a recipe whose `model.masks.kind` and `data.max_masks` are off.
    """
    if not config.model.masks.kind:
        return params, config
    plain = {name: part for name, part in params.items() if name != "masks"}
    plain["backbone"] = {name: part for name, part in params["backbone"].items() if name != "norm_0"}
    config = config.copy_and_resolve_references()
    config.model.masks.kind, config.data.max_masks = "", 0
    return plain, config


def check_kind(kind: str) -> None:
    """Raises ValueError where `config.model.masks.kind` is no kind."""
    if kind not in KINDS:
        raise ValueError(f"config.model.masks.kind is {kind!r}: expected {', '.join(map(repr, KINDS))}")
