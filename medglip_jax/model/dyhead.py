"""The dynamic head's convolution block (arXiv 2106.08322), as in GLIP's tower."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medglip_jax.model.layers import Conv, Dense, hard_sigmoid, torch_bias_init, torch_kernel_init
from medglip_jax.ops.deform_conv import Reading, deform_convs
from medglip_jax.ops.widening import spread
from medglip_jax.parallel.activations import WHOLE_MAP, constrain

Array = jax.Array


def resize_align_corners(x: Array, height: int, width: int) -> Array:
    """Bilinear resize of [B, H, W, C] that maps corner pixels onto corner pixels, as two small matrix products."""

    def weights(size: int, target: int) -> Array:
        position = np.linspace(0, size - 1, target)
        return jnp.asarray(np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))), x.dtype)  # [target, size]

    x = jnp.einsum("bhwc,Hh->bHwc", x, weights(x.shape[1], height))
    return jnp.einsum("bhwc,Ww->bhWc", x, weights(x.shape[2], width))


def crop_as_flat_buffer(maps: Array, height: int, width: int) -> Array:
    """Reads [B, H, W, C] as the CUDA kernel does when it takes it for a smaller map: [B, height, width, C].

    The kernel walks the channel-first buffer with the strides of the output (microsoft/GLIP#62); released weights
    were trained with it.
    """
    b, _, _, c = maps.shape
    flat = maps.transpose(0, 3, 1, 2).reshape(b, -1)[:, : c * height * width]
    return flat.reshape(b, c, height, width).transpose(0, 2, 3, 1)


class DeformConvNorm(nn.Module):
    """What a deformable convolution owns: its kernel and bias, and the GroupNorm after it."""

    features: int
    groups: int
    dtype: jnp.dtype

    def setup(self) -> None:
        shape = (3, 3, self.features, self.features)
        self.kernel = self.param("kernel", torch_kernel_init, shape)
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
        self.norm = nn.GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False)

    def __call__(self, convolved: Array) -> Array:  # [B, h, w, C] -> the same
        return self.norm((convolved + self.bias).astype(self.dtype))


class DynamicReLU(nn.Module):
    """The larger of two lines a channel, whose slopes and offsets depend on the image (arXiv 2003.10027)."""

    dtype: jnp.dtype
    reduction: int = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> the same
        c = x.shape[-1]
        hidden = c // self.reduction

        def dense(name: str, features: int, fan_in: int) -> Dense:
            init = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(fan_in)}
            return Dense(features, dtype=self.dtype, name=name, **init)

        pooled = x.mean(axis=(1, 2))
        y = dense("fc1", 4 * c, hidden)(nn.relu(dense("fc0", hidden, c)(pooled)))
        lines = jnp.split(hard_sigmoid(y)[:, None, None] - 0.5, 4, axis=-1)
        a1, b1, a2, b2 = (spread(line, x.shape) for line in lines)
        return jnp.maximum(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2)


class DyConv(nn.Module):
    """Mixes each pyramid level with its neighbours by deformable convolutions that share one offset map.

    For the coarser neighbour the level's offset map is larger than the output. `config.legacy_offsets` reads it as
    released weights were trained to; otherwise the map is resized to the neighbour's size.
    """

    config: ConfigDict
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, levels: tuple[Array, ...]) -> tuple[Array, ...]:
        channels = levels[0].shape[-1]
        fan_in = 9 * channels
        convs = {
            name: DeformConvNorm(channels, self.config.norm_groups, self.dtype, name=name)
            for name in ("coarser", "same", "finer")
        }
        offset_conv = Conv(
            27,
            (3, 3),
            padding=1,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(fan_in),
            dtype=self.dtype,
            name="offset",
        )
        attention = Dense(1, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype, name="scale_attention")
        activation = DynamicReLU(self.dtype, name="relu")
        # Positions on a map of a hundred pixels and more need more than bfloat16's eight bits.
        position_dtype = jnp.promote_types(self.dtype, jnp.float32)

        readings: dict[str, list[Reading]] = {"coarser": [], "same": [], "finer": []}
        levels = tuple(constrain(x, *WHOLE_MAP) for x in levels)
        for i, x in enumerate(levels):
            maps = offset_conv(x).astype(position_dtype)
            offsets, mask = maps[..., :18], nn.sigmoid(maps[..., 18:])
            readings["same"].append(Reading(i, offsets, mask.astype(self.dtype)))
            if i > 0:
                readings["finer"].append(Reading(i - 1, offsets, mask.astype(self.dtype), stride=2))
            if i + 1 < len(levels):
                size = levels[i + 1].shape[1:3]
                fit = crop_as_flat_buffer if self.config.legacy_offsets else resize_align_corners
                readings["coarser"].append(Reading(i + 1, fit(offsets, *size), fit(mask, *size).astype(self.dtype)))
        # Whole before the loop over bands begins, which would gather its pieces once for each band.
        kernels = [constrain(conv.kernel.astype(self.dtype), None, None, None, "channels") for conv in convs.values()]
        groups = list(zip(kernels, readings.values(), strict=True))
        convolved = dict(zip(convs, deform_convs(levels, groups), strict=True))

        def weigh(y: Array) -> Array:
            return y * spread(hard_sigmoid(nn.relu(attention(y.mean(axis=(1, 2)))))[:, None, None], y.shape)

        outputs = []
        for i, x in enumerate(levels):
            inputs = [convs["same"](convolved["same"][i])]
            if i > 0:
                inputs.append(convs["finer"](convolved["finer"][i - 1]))
            if i + 1 < len(levels):
                inputs.append(resize_align_corners(convs["coarser"](convolved["coarser"][i]), *x.shape[1:3]))
            weighted = [weigh(y) for y in inputs]
            outputs.append(constrain(activation(sum(weighted[1:], weighted[0]) / len(weighted)), *WHOLE_MAP))
        return tuple(outputs)
