"""The sigmoid loss of a batch that is split over devices: its value, its gradient, and what is never in memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medglip_jax.parallel.mesh import batch_sharding, make_mesh
from medglip_jax.training.contrastive import EQUAL_TEXTS, sigmoid_loss, text_keys

MESHES = ({"data": 8}, {"data": 2, "fsdp": 4}, {"replica": 2, "data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2})
WIDTH = 5


def mesh_of(sizes):
    return make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values()]))])


def draw(rng, rows, valid_share=0.8):
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, rows, WIDTH)))
    keys = rng.integers(0, 4, (rows, 2)).astype(np.uint32)  # some are equal, some in one of two numbers
    valid = rng.random(rows) < valid_share
    return images.astype(np.float32), texts.astype(np.float32), np.float32(1.5), np.float32(-2), keys, valid


def plain(equal_texts, images, texts, log_scale, bias, keys, valid):
    """The formula, on the whole matrix."""
    logits = jnp.exp(log_scale) * images @ texts.T + bias
    own, equal = jnp.eye(len(images), dtype=bool), (keys[:, None] == keys).all(axis=-1)
    z = jnp.where(own | (equal & (equal_texts == "positives")), 1, -1)
    weights = valid[:, None] & valid & ~(equal & ~own & (equal_texts == "ignored"))
    return -jnp.sum(weights * jax.nn.log_sigmoid(z * logits)) / jnp.maximum(valid.sum(), 1)


@functools.cache
def compiled(equal_texts, mesh):
    def on_mesh(*arrays):
        return 3 * sigmoid_loss(*arrays, equal_texts=equal_texts, mesh=mesh)

    def formula(*arrays):
        return 3 * plain(equal_texts, *arrays)

    def both(*arrays):
        slopes = [jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*arrays) for loss in (on_mesh, formula)]
        return on_mesh(*arrays), *slopes

    return jax.jit(both)


def assert_agrees(equal_texts, mesh, arrays):
    alone, (value, slopes), (wanted, gradients) = compiled(equal_texts, mesh)(*arrays)
    np.testing.assert_allclose([alone, value], [wanted, wanted], rtol=2e-6, atol=1e-6)
    for slope, gradient in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_and_gradient_on_a_mesh_are_those_of_the_formula(sizes):
    arrays = draw(np.random.default_rng(0), 16)
    assert len(np.unique(arrays[4], axis=0)) < 16 and not arrays[5].all()
    for equal_texts in EQUAL_TEXTS if sizes == MESHES[1] else EQUAL_TEXTS[:1]:
        assert_agrees(equal_texts, mesh_of(sizes), arrays)


@settings(max_examples=8)
@given(
    rows=st.sampled_from([1, 3]),
    parts=st.sampled_from([1, 3]),
    equal_texts=st.sampled_from(EQUAL_TEXTS),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_number_of_rows_and_devices(rows, parts, equal_texts, share, seed):
    mesh = mesh_of({"data": parts}) if parts > 1 else None
    assert_agrees(equal_texts, mesh, draw(np.random.default_rng(seed), rows * parts, share))


def test_no_device_ever_has_more_than_its_own_rows_squared():
    mesh, rows = mesh_of({"data": 2, "fsdp": 4}), 8 * 12
    arrays = draw(np.random.default_rng(0), rows)
    split = batch_sharding(mesh)
    placed = [jax.device_put(x, split) if np.ndim(x) else x for x in arrays]

    def loss(images, texts, log_scale, bias):
        return sigmoid_loss(images, texts, log_scale, bias, *placed[4:], equal_texts="ignored", mesh=mesh)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    program = step.lower(*placed[:4]).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\w\d+\[([\d,]+)\]", program)}
    assert (12, 12) in shapes
    assert max(np.prod(shape) for shape in shapes) <= 12 * 12 * 2  # two hashes of a text are compared
    assert "collective-permute" in program and "all-gather" not in program


def test_equal_texts_have_equal_keys_and_others_not():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 1000, (300, 12)).astype(np.int32)
    mask = (np.arange(12) < rng.integers(1, 12, (300, 1))).astype(np.int32)
    ids[150:], mask[150:] = ids[:150], mask[:150]
    ids[150:] += (1 - mask[150:]) * 7  # padding does not count
    keys = np.asarray(text_keys(ids, mask))
    np.testing.assert_array_equal(keys[:150], keys[150:])
    texts = {tuple(row[: count.sum()]) for row, count in zip(ids[:150], mask[:150], strict=True)}
    assert len(np.unique(keys, axis=0)) == len(texts)


def test_unknown_treatment_of_equal_texts_is_an_error():
    with pytest.raises(ValueError, match=r"equal_texts is 'both': there are negatives, positives, ignored"):
        sigmoid_loss(*draw(np.random.default_rng(0), 2), equal_texts="both", mesh=None)
