"""Feature pyramid network (arXiv 1612.03144) with two extra levels, as GLIP builds it: P3 to P7."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from medglip_jax.model.layers import Conv
from medglip_jax.model.routing import selected
from medglip_jax.parallel.activations import WHOLE_MAP, constrain

Array = jax.Array

_init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # Kaiming uniform with a = 1


def resize_nearest(x: Array, height: int, width: int) -> Array:
    """Resizes [B, H, W, C] by taking pixel floor(i * in / out), as torch.nn.functional.interpolate does."""
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


class DropBlock(nn.Module):
    """Zeroes random squares of `block` pixels in training, the same for all channels, and rescales what is left."""

    rate: float
    block: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:  # [B, H, W, C] -> the same
        if not train or self.rate == 0.0:
            return x
        seeds = jax.random.bernoulli(self.make_rng("dropout"), self.rate / self.block**2, (*x.shape[:3], 1))
        dropped = nn.max_pool(seeds.astype(x.dtype), (self.block, self.block), padding="SAME")
        keep = 1 - dropped
        return x * keep * (keep.size / jnp.maximum(keep.astype(jnp.float32).sum(), 1)).astype(x.dtype)


class FPN(nn.Module):
    """Levels of strides 8 to 128 from backbone features of strides 8, 16 and 32."""

    config: ConfigDict
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, features: tuple[Array, ...], train: bool) -> tuple[Array, ...]:
        channels = self.config.channels

        def conv(name: str, kernel: int, stride: int = 1) -> Conv:
            padding = kernel // 2
            return Conv(channels, (kernel, kernel), stride, padding, kernel_init=_init, dtype=self.dtype, name=name)

        merged = [conv(f"lateral_{i}", 1)(constrain(x, *WHOLE_MAP)) for i, x in enumerate(features)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] += resize_nearest(merged[i + 1], *merged[i].shape[1:3])
        for i in range(len(merged) - 1):
            merged[i] = DropBlock(self.config.drop_block)(merged[i], train)
        embedding = selected(self).get("embedding")  # [B, C], of each image's modality

        def embed(x: Array) -> Array:
            return x if embedding is None else (x + embedding[:, None, None]).astype(x.dtype)

        levels = [embed(conv(f"output_{i}", 3)(x)) for i, x in enumerate(merged)]
        levels.append(embed(conv(f"output_{len(levels)}", 3, 2)(levels[-1])))
        levels.append(embed(conv(f"output_{len(levels)}", 3, 2)(nn.relu(levels[-1]))))
        return tuple(constrain(x, *WHOLE_MAP) for x in levels)
