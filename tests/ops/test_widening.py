"""Sums over many pixels in half precision: they do not stop growing, and float32 is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medglip_jax.model.layers import Conv, Dense
from medglip_jax.ops.widening import spread, take_rows

MANY = 1 << 14  # a sum of ones in bfloat16 stops at 256, or at 8,192 in parts of 32


def test_gradient_of_what_was_spread_is_exact():
    for shape, wanted in (((3,), MANY), ((1, 3), MANY), ((), 3 * MANY), ((MANY, 1), 3)):
        x = jnp.ones(shape, jnp.bfloat16)
        gradient = jax.grad(lambda x: spread(x, (MANY, 3)).astype(jnp.float32).sum())(x)
        assert gradient.dtype == jnp.bfloat16 and gradient.shape == shape
        np.testing.assert_allclose(np.asarray(gradient, np.float32), wanted, rtol=2**-8)
    single = jnp.ones(3)
    assert spread(single, (MANY, 3)) is single


def test_gradient_of_a_row_that_is_taken_often_is_exact():
    table, index = jnp.ones((4, 2), jnp.bfloat16), jnp.asarray([[1] * MANY, [2] * MANY])
    rows, gradient = jax.value_and_grad(lambda x: take_rows(x, index).astype(jnp.float32).sum())(table)
    assert float(rows) == 4 * MANY and gradient.dtype == jnp.bfloat16
    assert np.asarray(gradient, np.float32).tolist() == [[0, 0], [MANY, MANY], [MANY, MANY], [0, 0]]
    single = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(take_rows(single, index[:, :2]), single[index[:, :2]])


@pytest.mark.parametrize("layer", [Dense(2, dtype=jnp.bfloat16), Conv(2, (1, 1), dtype=jnp.bfloat16)])
def test_gradient_of_a_bias_is_exact(layer):
    x = jnp.zeros((1, 128, 128, 1), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    output, gradient = jax.value_and_grad(lambda p: (y := layer.apply(p, x)).astype(jnp.float32).sum() + 0 * y.sum())(
        params
    )
    assert layer.apply(params, x).dtype == jnp.bfloat16 and np.isfinite(output)
    assert np.asarray(gradient["params"]["bias"]).tolist() == [MANY, MANY]
