"""Examples in groups of a kind: each is computed once, whatever the mixture, and takes the parameters of its kind."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medglip_jax.model.routing import move, num_groups, plan_groups, select

SETTINGS = [(7, 3, 2, 1), (4, 5, 3, 2), (5, 2, 4, 2), (3, 4, 1, 1)]  # examples of a part, kinds, group, parts


@hypothesis.given(setting=st.sampled_from(SETTINGS), draw=st.data())
def test_every_example_has_one_slot_in_a_group_of_its_kind(setting, draw):
    count, kinds, group, parts = setting
    index = np.array(draw.draw(st.lists(st.integers(0, kinds - 1), min_size=count * parts, max_size=count * parts)))
    plan = jax.jit(plan_groups, static_argnums=(1, 2, 3))
    groups = jax.tree.map(np.asarray, plan(index.astype(np.int32), kinds, group, parts))
    size = num_groups(count, kinds, group) * group
    assert groups.slots.shape == (parts, size) and groups.index.shape == (parts * size // group,)
    of_groups = groups.index.reshape(parts, -1)
    for part, examples in enumerate(index.reshape(parts, -1)):
        places = groups.places[part]
        assert len(set(places)) == count and places.min() >= 0 and places.max() < size
        np.testing.assert_array_equal(groups.slots[part][places], np.arange(count))
        np.testing.assert_array_equal(of_groups[part][places // group], examples)
    rows = np.arange(count * parts)
    np.testing.assert_array_equal(move(move(rows, groups.slots), groups.places), rows)


@pytest.mark.parametrize(("kinds", "group"), [(1, 3), (3, 1), (3, 2), (4, 3)])
def test_no_smaller_number_of_groups_holds_every_mixture(kinds, group):
    for examples in range(1, 8):
        counts = (c for c in itertools.product(range(examples + 1), repeat=kinds) if sum(c) == examples)
        most = max(sum(-(-count // group) for count in mixture) for mixture in counts)
        assert num_groups(examples, kinds, group) == most
        assert most * group <= examples + kinds * (group - 1)


def test_look_up_and_its_gradient_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    stack, shared, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4, 5), (4, 5), (6, 4, 5)))
    index = np.array([2, 0, 3, 3, 0, 2])

    def loop(stack, shared):
        rows = [shared if i == 0 else stack[i - 1] for i in index]
        return sum((row * w).sum() for row, w in zip(rows, weight, strict=True))

    def at_once(stack, shared):
        return (select(stack, jnp.asarray(index), shared) * weight).sum()

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        *(jax.value_and_grad(f, argnums=(0, 1))(stack, shared) for f in (at_once, loop)),
    )
    assert not np.asarray(select(stack, jnp.asarray(index), None))[1].any()


def test_a_parameter_that_is_not_finite_reaches_only_its_own_examples():
    stack = jnp.array([[1.0], [jnp.nan]])
    np.testing.assert_array_equal(select(stack, jnp.array([1, 0, 1]), jnp.array([5.0])), [[1], [5], [1]])
