"""Small pieces that several parts of the model share: initialisers, drop path, and the layers with their defaults."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from medglip_jax.model.routing import COLLECTION, PLACES, SLOTS, move, selected

Array = jax.Array

# PyTorch's default for the weights of Linear and Conv: uniform within 1 / sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
    """PyTorch's default for the biases of Linear and Conv: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; examples may have a scale and a bias of their own (see `routing`)."""

    def __call__(self, x: Array) -> Array:
        own = selected(self)
        if not own:
            return super().__call__(x)
        vectors = dict(self.variables["params"]) | own
        y = by_group(x, own).astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))  # [G, rows, C]
        centred = y - y.mean(axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        y = centred * (jax.lax.rsqrt(variance + self.epsilon) * _row(vectors["scale"])) + _row(vectors["bias"])
        return y.reshape(x.shape).astype(self.dtype)


def layer_norm(name: str, epsilon: float, dtype: jnp.dtype) -> LayerNorm:
    """LayerNorm over the last axis with the two-pass variance that PyTorch computes."""
    return LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def by_group(x: Array, own: Mapping[str, Array]) -> Array:
    """Returns the rows of each group that has parameters of its own: [B, ..., C] -> [G, rows, C]."""
    return x.reshape(len(next(iter(own.values()))), -1, x.shape[-1])


def _row(vector: Array) -> Array:
    """Returns [G, N] as [G, 1, N]; what all share, [N], as it is."""
    return vector[:, None] if vector.ndim > 1 else vector


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
    Examples may have a kernel, a bias or an adapter of their own (see `routing`).
    """

    promote_dtype: Any = _promote_all_but_bias

    def __call__(self, inputs: Array) -> Array:
        if own := selected(self):
            shared = self.variables["params"]
            y = multiply_by_group(by_group(inputs, own), shared["kernel"], shared.get("bias"), own, self.dtype)
            return y.reshape(*inputs.shape[:-1], self.features)
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features).astype(self.dtype)


def multiply_by_group(rows: Array, kernel: Array, bias: Array | None, own: Mapping[str, Array], dtype: Any) -> Array:
    """Computes a dense layer whose groups of rows may have parameters of their own.

    Args:
        rows: [G, R, K].
        kernel, bias: [K, N] and [N], what groups share that have none of their own.
        own: kernel [G, K, N], bias [G, N], adapters a [G, K, rank] and b [G, rank, N], or some of them.
        dtype: of the products and of the result; the bias is added in float32.

    Returns:
        [G, R, N].
    """
    rows = rows.astype(dtype)
    if "kernel" in own:
        y = jnp.einsum("grk,gkn->grn", rows, own["kernel"].astype(dtype))
    else:
        y = (rows.reshape(-1, rows.shape[-1]) @ kernel.astype(dtype)).reshape(*rows.shape[:2], -1)
    if "a" in own:
        inner = jnp.einsum("grk,gkn->grn", rows, own["a"].astype(dtype))
        y += jnp.einsum("grk,gkn->grn", inner, own["b"].astype(dtype))
    bias = own.get("bias", bias)
    return (y if bias is None else y + _row(bias)).astype(dtype)


class Conv(nn.Conv):
    """`nn.Conv` whose bias is added in float32, as that of `Dense`; with the same parameters.

    Where its steps are as long as its kernel, examples may have a kernel and a bias of their own (see `routing`).
    """

    promote_dtype: Any = _promote_all_but_bias

    def __call__(self, inputs: Array) -> Array:
        if own := selected(self):
            return self._multiply_patches(inputs, own)
        return super().__call__(inputs).astype(self.dtype)

    def _multiply_patches(self, inputs: Array, own: Mapping[str, Array]) -> Array:
        shared = self.variables["params"]
        kernel = shared["kernel"]  # [h, w, K, N]
        b, height, width, channels = inputs.shape
        h, w = kernel.shape[:2]
        patches = inputs.reshape(b, height // h, h, width // w, w, channels).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, -1, h * w * channels)  # [B, patches, h w K]
        matrices = {name: x.reshape(len(x), -1, x.shape[-1]) if name == "kernel" else x for name, x in own.items()}
        flat = kernel.reshape(-1, kernel.shape[-1])
        y = multiply_by_group(by_group(patches, own), flat, shared.get("bias"), matrices, self.dtype)
        return y.reshape(b, height // h, width // w, -1)


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole residual of an example with probability `rate`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool, traced_rate: Array | None = None) -> Array:
        """Args: `traced_rate` stands for `rate` where blocks of several rates are one loop."""
        rate = self.rate if traced_rate is None else traced_rate
        if not train or (traced_rate is None and self.rate == 0.0):
            return x
        places = self.variables.get(COLLECTION, {}).get(PLACES)  # where examples have slots
        shape = (x.shape[0] if places is None else places.size,) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
        if places is not None:  # drawn by example, so that it depends on no grouping
            keep = move(keep, self.variables[COLLECTION][SLOTS])
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
