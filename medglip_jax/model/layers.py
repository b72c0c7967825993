"""Small pieces that several parts of the model share: initialisers, drop path, and the layers with their defaults."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

Array = jax.Array

# PyTorch's default for the weights of Linear and Conv: uniform within 1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
    """PyTorch's default for the biases of Linear and Conv: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def layer_norm(name: str, epsilon: float, dtype: jnp.dtype) -> nn.LayerNorm:
    """LayerNorm over the last axis with the two-pass variance that PyTorch computes."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def gelu(x: Array) -> Array:
    """The exact GELU, x * Phi(x)."""
    return nn.gelu(x, approximate=False)


def hard_sigmoid(x: Array) -> Array:
    """relu6(x + 3) / 6."""
    return jnp.clip(x + 3, 0, 6) / 6


def _promote_all_but_bias(
    inputs: Array, kernel: Array, bias: Array | None = None, *, dtype: jnp.dtype | None
) -> tuple[Array, Array, Array | None]:
    return *promote_dtype(inputs, kernel, dtype=dtype), bias


class Dense(nn.Dense):
    """`nn.Dense` on a plain matrix of rows: [..., K] -> [..., N], with the same parameters.

    For maps with several leading axes XLA chooses transposed layouts for the kernel's gradient on CPUs, and the
    gradient of a narrow layer takes up to four times as long as on rows. Elsewhere the reshape is free.

    The bias is added in float32, so that its gradient is summed in float32 whatever the type of the layer is.
    """

    promote_dtype: Any = _promote_all_but_bias

    def __call__(self, inputs: Array) -> Array:
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features).astype(self.dtype)


class Conv(nn.Conv):
    """`nn.Conv` whose bias is added in float32, as that of `Dense`; with the same parameters."""

    promote_dtype: Any = _promote_all_but_bias

    def __call__(self, inputs: Array) -> Array:
        return super().__call__(inputs).astype(self.dtype)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole residual of an example with probability `rate`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool, traced_rate: Array | None = None) -> Array:
        """Args: `traced_rate` stands for `rate` where blocks of several rates are one loop."""
        rate = self.rate if traced_rate is None else traced_rate
        if not train or (traced_rate is None and self.rate == 0.0):
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
