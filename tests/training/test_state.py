"""What a run carries, and where it lies on a mesh of eight CPU devices."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import match_rules
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import abstract_state, create_state


def mesh_of(data, fsdp, tensor):
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def raw(x):
    """An array whose bits NumPy can compare: of a random key, its words."""
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


@pytest.fixture(scope="module")
def parts(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.swin.depths = (1, 1, 1, 1)  # as in test_step.py, which then finds the compiled start in the cache
    return GLIP(config.model), config, make_optimizer(config), jax.random.key(3)


@pytest.fixture(scope="module")
def sharded(parts):
    mesh = mesh_of(2, 2, 2)
    return (*create_state(*parts, mesh), mesh)


def test_sharded_start_has_the_numbers_of_the_unsharded_one(parts, sharded):
    alone, _ = create_state(*parts, mesh_of(1, 1, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(raw(a), raw(b), rtol=1e-6, atol=1e-8), alone, sharded[0])
    assert int(alone.step) == 0
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), alone.params, alone.ema)


def test_moments_and_average_lie_with_their_parameter(parts, sharded):
    state, _, mesh = sharded
    specs = match_rules(resolve_rules(parts[1]), state.params, mesh)
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    for tree in (state.params, state.ema, *moments):
        jax.tree.map(
            lambda x, spec: None if x.sharding == NamedSharding(mesh, spec) else pytest.fail(str(x)), tree, specs
        )
        kernel = tree["tower_0"]["text"]["query"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 8)} and kernel.shape == (16, 16)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(state) if x.ndim == 0)


def test_abstract_state_is_the_created_one_without_its_numbers(parts, sharded):
    state, placed, mesh = sharded
    abstract = abstract_state(*parts, mesh)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), (abstract, state))
    assert described[0] == described[1]
    assert jax.tree.map(lambda x: x.sharding, state) == placed


def test_without_an_average_the_state_has_none(parts):
    model, config, optimizer, rng = parts
    config = config.copy_and_resolve_references()
    config.optimizer.ema = 0.0
    assert abstract_state(model, config, optimizer, rng, mesh_of(1, 1, 1)).ema is None
