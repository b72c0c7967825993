"""Micro-batches: the loss and the gradient of the whole batch, in less memory, with no image on another device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medglip_jax.parallel.mesh import make_mesh, to_global
from medglip_jax.planning.costs import CostModel
from medglip_jax.planning.hlo import parse
from medglip_jax.training.accumulation import accumulate_gradients, split_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import TrainState, state_shapes
from medglip_jax.training.step import make_train_step
from tests.training.small_detector import Detector

SIDE, BATCH, TOKENS = 64, 16, 8


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.data.batch_size, config.data.max_tokens = BATCH, TOKENS
    config.detection.strides, config.detection.anchor_scale = (16, 32), 1.0
    config.optimizer.clip_norm, config.sharding_rules = 1e9, ((".*", ()),)
    return config


@pytest.fixture(scope="module")
def batch():
    """Noise with 0 to 3 boxes an image: what the losses are divided by differs between the micro-batches."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 24, (BATCH, 3, 2))
    box_mask = np.arange(3) < np.minimum(np.arange(BATCH), 3)[:, None]
    tokens = np.eye(TOKENS, dtype=np.float32)[[1, 2, 4]]
    return {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8),
        "image_size": np.full((BATCH, 2), SIDE, np.int32),
        "input_ids": rng.integers(5, 60, (BATCH, TOKENS)).astype(np.int32),
        "attention_mask": np.tile(np.arange(TOKENS) < 6, (BATCH, 1)).astype(np.int32),
        "boxes": np.concatenate([corners, corners + rng.uniform(8, 36, corners.shape)], -1).astype(np.float32),
        "box_mask": box_mask,
        "positive_map": tokens * box_mask[..., None],
    }


@pytest.fixture(scope="module")
def run(config, batch):
    """Compiles a step, once, and takes it: (metrics, gradient but for a factor), and the program."""

    @functools.cache
    def take(accumulation, dtype="float32", **sizes):
        recipe = config.copy_and_resolve_references()
        recipe.training.accumulation, recipe.model.dtype, recipe.optimizer.ema = accumulation, dtype, 0.0
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])
        model, optimizer = Detector(jnp.dtype(dtype)), make_optimizer(recipe)
        arrays, rng = to_global(batch, mesh), np.random.default_rng(3)
        shapes = state_shapes(model, recipe, optimizer, jax.random.key(0)).params
        params = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.1, size=x.shape), dtype), shapes)
        state = TrainState(jnp.int32(0), params, optimizer.init(params), None, jax.random.key(1))
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
        program = jax.jit(make_train_step(model, recipe, optimizer, mesh)).lower(state, arrays).compile()
        state, metrics = program(state, arrays)
        return jax.device_get((metrics, optax.tree_utils.tree_get(state.opt_state, "mu"))), program

    return take


def assert_same(found, expected, tolerance):
    for name, value in expected[0].items():
        np.testing.assert_allclose(found[0][name], value, rtol=max(tolerance, 2e-7), err_msg=name)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_micro_batches_sum_to_the_whole_batch_in_less_memory(run):
    (expected, at_once), (found, in_parts) = run(1, data=1), run(4, data=1)
    assert expected[0]["num_positives"] > 8
    assert_same(found, expected, 1e-6)
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (at_once, in_parts)]
    assert sizes[1] < sizes[0] / 2


def test_in_float64_what_is_left_of_the_difference_is_rounding(run):
    with jax.enable_x64(True):
        expected, found = run(1, "float64", data=1)[0], run(4, "float64", data=1)[0]
    assert found[1]["box"]["kernel"].dtype == np.float64
    assert_same(found, expected, 1e-13)


def test_on_a_mesh_no_image_leaves_its_device(run):
    found, program = run(2, data=2, fsdp=4)
    assert_same(found, run(1, data=1)[0], 2e-6)
    assert set(CostModel(parse(program.as_text()), 8).total().bytes_by_kind()) == {"all-reduce"}


def test_a_micro_batch_has_its_share_of_each_part(batch):
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    rows = {"row": np.arange(BATCH)}
    split = jax.jit(lambda x: split_batch(x, 2, mesh))(to_global(rows, mesh))["row"]
    assert split.tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert split_batch(rows, 4, None)["row"].tolist() == np.arange(BATCH).reshape(4, 4).tolist()
    with pytest.raises(ValueError, match=r"16 rows \(row\).*3 micro-batches over 4 parts.*multiple of 12"):
        split_batch(rows, 3, mesh)


def test_micro_batches_draw_their_own_random_numbers():
    def loss_of(params, batch, key):
        drawn = jax.random.uniform(key)
        return drawn * params["w"] * batch["x"].sum(), {"drawn": jnp.zeros(3).at[batch["x"][0]].set(drawn)}

    key, batch = jax.random.key(5), {"x": jnp.arange(3)[:, None]}
    gradients, metrics = accumulate_gradients(loss_of, {"w": jnp.ones(())}, batch, key)
    assert len(set(metrics["drawn"].tolist())) == 3
    np.testing.assert_allclose(gradients["w"], metrics["drawn"] @ np.arange(3), rtol=1e-6)
    again = accumulate_gradients(loss_of, {"w": jnp.ones(())}, batch, jax.random.fold_in(key, 1))[1]
    assert not set(again["drawn"].tolist()) & set(metrics["drawn"].tolist())
