"""The deformable convolutions against their definition, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.ops.deform_conv import Reading, deform_conv_reference, deform_convs

SIZES = ((7, 5), (4, 3), (2, 2))


def pyramid(seed: int, spread: float):
    """Three levels, a kernel each for same, finer and coarser, and readings whose taps stray by about `spread`."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    levels = [normal(2, h, w, 4) for h, w in SIZES]
    maps = [(spread * normal(2, h, w, 18), jax.nn.sigmoid(normal(2, h, w, 9))) for h, w in SIZES]
    groups = [
        (normal(3, 3, 4, 6), [Reading(i, *maps[i]) for i in range(3)]),
        (normal(3, 3, 4, 5), [Reading(i - 1, *maps[i], 2) for i in (1, 2)]),
        (normal(3, 3, 4, 6), [Reading(i + 1, *maps[i + 1]) for i in (0, 1)]),
    ]
    return levels, groups


def by_definition(levels, groups):
    return [[deform_conv_reference(levels[r.level], r, kernel) for r in readings] for kernel, readings in groups]


def total(function):
    return lambda levels, groups: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(levels, groups)))


@given(seed=st.integers(0, 2**16), spread=st.sampled_from([0.0, 0.4, 3.0, 50.0]))
def test_convolutions_match_their_definition(seed, spread):
    levels, groups = pyramid(seed, spread)
    for ours, expected in zip(
        jax.tree.leaves(jax.jit(deform_convs_static)(levels, groups)),
        jax.tree.leaves(jax.jit(reference_static)(levels, groups)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


def with_static(function):
    """Restores the static fields of the readings, which jit would trace."""

    def run(levels, groups):
        plan = [[(0, 1), (1, 1), (2, 1)], [(0, 2), (1, 2)], [(1, 1), (2, 1)]]
        return function(
            levels,
            [
                (
                    kernel,
                    [Reading(level, r.offsets, r.mask, stride) for r, (level, stride) in zip(rs, static, strict=True)],
                )
                for (kernel, rs), static in zip(groups, plan, strict=True)
            ],
        )

    return run


deform_convs_static = with_static(deform_convs)
reference_static = with_static(by_definition)


def test_gradients_match_their_definition():
    levels, groups = pyramid(0, 1.3)
    gradients = []
    for function in (deform_convs_static, reference_static):
        gradient = jax.jit(jax.grad(total(function), argnums=(0, 1), allow_int=True))(levels, groups)
        gradients.append([x for x in jax.tree.leaves(gradient) if x.dtype == jnp.float32])
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=3e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_offsets_are_a_plain_convolution(stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 8, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    h, w = -(-6 // stride), -(-8 // stride)
    reading = Reading(0, jnp.zeros((2, h, w, 18)), jnp.ones((2, h, w, 9)), stride)
    ((y,),) = deform_convs([jnp.asarray(x)], [(jnp.asarray(kernel), [reading])])
    plain = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(y, plain, atol=1e-5)
