"""Broadcasts and look-ups whose gradients are summed in float32, where the numbers are of half precision.

JAX sums the gradient of what was broadcast in its own type. In bfloat16 a sum stops growing at 256 times its terms: of
a bias under 65,536 pixels with a gradient of 1 each, a CPU makes 8,192.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def _is_half(x: Array) -> bool:
    return jnp.promote_types(x.dtype, jnp.float32) != x.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _spread(x: Array, source: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(x, shape)


def _spread_forward(x: Array, source: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Array, None]:
    return jnp.broadcast_to(x, shape), None


def _spread_backward(source: tuple[int, ...], shape: tuple[int, ...], _: None, gradient: Array) -> tuple[Array]:
    padded = (1,) * (len(shape) - len(source)) + source
    axes = tuple(i for i, (before, after) in enumerate(zip(padded, shape, strict=True)) if before != after)
    return (jnp.sum(gradient, axes, dtype=jnp.float32).astype(gradient.dtype).reshape(source),)


_spread.defvjp(_spread_forward, _spread_backward)


def spread(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns x broadcast to a shape; in half precision, its gradient is a sum in float32 that is rounded once.

    An x of float32 or more comes back as it is: the arithmetic that follows broadcasts it.
    """
    return _spread(x, x.shape, shape) if _is_half(x) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(table: Array, index: Array, rows: int) -> Array:
    return jnp.take(table, index, axis=0)


def _take_rows_forward(table: Array, index: Array, rows: int) -> tuple[Array, Array]:
    return jnp.take(table, index, axis=0), index


def _take_rows_backward(rows: int, index: Array, gradient: Array) -> tuple[Array, None]:
    sums = jnp.zeros((rows, gradient.shape[-1]), jnp.float32).at[index].add(gradient.astype(jnp.float32))
    return sums.astype(gradient.dtype), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def take_rows(table: Array, index: Array) -> Array:
    """Returns table[index], [..., D] of a table [V, D] and integers; in half precision the gradient of a row that is
    taken often is summed in float32.
    """
    return _take_rows(table, index, table.shape[0]) if _is_half(table) else jnp.take(table, index, axis=0)
