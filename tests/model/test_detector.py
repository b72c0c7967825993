"""The whole model at a tiny size: shapes, masks, precision, rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medglip_jax.model.detector import GLIP, flatten_levels
from medglip_jax.model.dyhead import crop_as_flat_buffer, resize_align_corners
from medglip_jax.model.pixels import PIXEL_MEAN, PIXEL_STD, normalize_pixels


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 40, 64, 3)).astype(np.float32)
    ids = rng.integers(5, 50, size=(2, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([[12], [7]])).astype(np.int32)
    return pixels, ids, mask


@pytest.fixture(scope="module")
def params(tiny_config, inputs):
    return jax.jit(GLIP(tiny_config.model).init)(jax.random.key(0), *inputs)["params"]


def test_output_shapes_follow_the_pyramid(tiny_config, params, inputs):
    outputs = jax.jit(GLIP(tiny_config.model).apply)({"params": params}, *inputs)
    anchors = sum(-(-40 // s) * -(-64 // s) for s in tiny_config.detection.strides)
    assert {key: value.shape for key, value in outputs.items()} == {
        "token_logits": (2, anchors, 12),
        "box_deltas": (2, anchors, 4),
        "centerness": (2, anchors),
    }
    assert all(value.dtype == jnp.float32 for value in outputs.values())


def test_padded_tokens_do_not_reach_real_ones(tiny_config, params, inputs):
    pixels, ids, mask = inputs
    other = np.where(mask, ids, 3)
    apply = jax.jit(GLIP(tiny_config.model).apply)
    first, second = (apply({"params": params}, pixels, x, mask) for x in (ids, other))
    np.testing.assert_allclose(first["box_deltas"], second["box_deltas"], atol=1e-6)
    np.testing.assert_allclose(first["token_logits"][1, :, :7], second["token_logits"][1, :, :7], atol=1e-5)


def test_text_offset_is_added_to_the_features_of_the_text(tiny_config, params, inputs):
    base = jax.jit(GLIP(tiny_config.model).apply)({"params": params}, *inputs)
    shifted = jax.jit(lambda offset: GLIP(tiny_config.model).apply({"params": params}, *inputs, text_offset=offset))
    offset = np.zeros((2, 12, tiny_config.model.bert.hidden_size), np.float32)
    same = jax.device_get(shifted(offset.copy()))  # JAX may read the array later
    offset[0, 3] = np.random.default_rng(1).normal(size=offset.shape[-1])
    moved = shifted(offset)
    for name, x in base.items():
        np.testing.assert_allclose(same[name], x, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(moved[name][1], same[name][1])  # the other image
    change = np.abs(moved["token_logits"] - same["token_logits"])[0].max(axis=0)
    assert change.argmax() == 3 and change[3] > 1e-3


@pytest.fixture(scope="module")
def loss_and_gradient(tiny_config, params, inputs):
    """A function of compute type and rematerialisation, with dropout on; each is computed once."""

    @functools.cache
    def compute(dtype, remat):
        config = tiny_config.model.copy_and_resolve_references()
        config.dtype, config.remat = dtype, remat

        def loss(p):
            outputs = GLIP(config).apply({"params": p}, *inputs, train=True, rngs={"dropout": jax.random.key(1)})
            return sum(jnp.mean(jnp.square(x)) for x in outputs.values())

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    return compute


def test_rematerialisation_changes_no_gradient(loss_and_gradient):
    gradients = (jax.tree.leaves(loss_and_gradient("float32", remat)[1]) for remat in ("none", "blocks"))
    for plain, remat in zip(*gradients, strict=True):
        np.testing.assert_allclose(plain, remat, atol=1e-5 * (1 + np.abs(plain).max()))


def test_bfloat16_is_near_float32(loss_and_gradient):
    """Its eight bits are 0.4 %: the loss is within 1 % and the gradient, as a vector, within 10 %."""
    (exact, expected), (value, found) = (loss_and_gradient(dtype, "none") for dtype in ("float32", "bfloat16"))
    assert float(value) == pytest.approx(float(exact), rel=0.01)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    difference = optax.global_norm(jax.tree.map(jnp.subtract, found, expected))
    assert float(difference) < 0.1 * float(optax.global_norm(expected))


def test_unknown_dtype_is_refused(tiny_config, inputs):
    config = tiny_config.model.copy_and_resolve_references()
    config.dtype = "float8"
    with pytest.raises(ValueError, match=r"config\.model\.dtype"):
        GLIP(config).init(jax.random.key(0), *inputs)


def test_normalised_pixels_are_bgr_and_zero_in_the_padding():
    image = np.zeros((1, 4, 6, 3), np.uint8)
    image[0, :2, :3] = (255, 0, 0)  # red
    pixels = np.asarray(normalize_pixels(image, np.array([[2, 3]], np.int32)))
    np.testing.assert_allclose(pixels[0, 0, 0, 2], (255 - PIXEL_MEAN[2]) / PIXEL_STD[2], rtol=1e-6)
    np.testing.assert_allclose(pixels[0, 0, 0, 0], -PIXEL_MEAN[0] / PIXEL_STD[0], rtol=1e-6)
    assert (pixels[0, 2:] == 0).all() and (pixels[0, :, 3:] == 0).all()


def test_flat_crop_walks_the_channel_first_buffer():
    maps = np.arange(2 * 3 * 4 * 5).reshape(2, 5, 3, 4).transpose(0, 2, 3, 1)  # channel-first memory counts up
    cropped = np.asarray(crop_as_flat_buffer(jnp.asarray(maps), 2, 2)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(cropped[0].ravel(), np.arange(20))


def test_resize_maps_corners_onto_corners():
    x = jnp.asarray([[[[0.0], [1.0]], [[2.0], [3.0]]]])  # [1, 2, 2, 1]
    y = np.asarray(resize_align_corners(x, 3, 5))[0, :, :, 0]
    np.testing.assert_allclose(y[0], np.linspace(0, 1, 5))
    np.testing.assert_allclose(y[:, 0], np.linspace(0, 2, 3))
    np.testing.assert_allclose(np.asarray(resize_align_corners(x[:, :1, :1], 2, 2)), 0)


def test_flatten_levels_puts_the_finest_level_first():
    levels = tuple(np.full((1, s, s, 2), s, np.float32) for s in (4, 2, 1))
    flat = np.asarray(flatten_levels(levels))
    assert flat[0, :, 0].tolist() == [4.0] * 16 + [2.0] * 4 + [1.0]
