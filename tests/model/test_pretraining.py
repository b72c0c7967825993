"""Models of pretraining: the paths that grounding takes, pooling, regions, and what masks reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.model.pretraining import MODELS, make_model, normalize, pool_map
from medglip_jax.model.regions import box_levels, pool_regions
from medglip_jax.model.swin import Swin
from medglip_jax.parallel.mesh import abstract_mesh
from medglip_jax.parallel.presets import PRESETS, resolve_rules
from medglip_jax.parallel.rules import find_placements

OWN = {
    "contrastive": {"image_projection", "text_projection", "log_scale", "logit_bias"},
    "masked_image": {"mask_token", "pixel_decoder"},
    "region_caption": {"region_projection", "text_projection", "log_scale", "logit_bias"},
}
SHARED = {
    "contrastive": {"backbone", "language"},
    "masked_image": {"backbone"},
    "region_caption": {"backbone", "neck", "language"},
}


def recipe(tiny_config, task):
    config = tiny_config.copy_and_resolve_references()
    config.pretraining.task, config.pretraining.embed_dim = task, 16
    return config


@pytest.fixture(scope="module")
def glip(tiny_config):
    return flat_shapes(parameter_shapes(GLIP(tiny_config.model), tiny_config))


@pytest.fixture(scope="module")
def shapes_of(tiny_config):
    """Returns a task's parameters as shapes, traced once."""

    @functools.cache
    def trace(task):
        config = recipe(tiny_config, task)
        return parameter_shapes(make_model(config), config)

    return trace


def test_without_a_task_the_model_is_glip(tiny_config):
    assert type(make_model(tiny_config)) is GLIP


@pytest.mark.parametrize("task", MODELS)
def test_encoders_have_the_paths_and_shapes_that_they_have_in_glip(shapes_of, glip, task):
    found = flat_shapes(shapes_of(task))
    own = {path.split("/")[0] for path in found if path.split("/")[0] in OWN[task]}
    assert own == OWN[task]
    shared = {path: shape for path, shape in found.items() if path.split("/")[0] not in own}
    assert shared == {path: shape for path, shape in glip.items() if path.split("/")[0] in SHARED[task]}


@pytest.mark.parametrize("task", MODELS)
def test_every_preset_places_every_parameter(tiny_config, shapes_of, task):
    shapes, config = shapes_of(task), recipe(tiny_config, task)
    mesh = abstract_mesh({"fsdp": 4, "tensor": 2}, 8)
    for name in PRESETS:
        config.sharding = name
        placed = find_placements(resolve_rules(config), shapes, mesh)
        lost = {path for path, place in placed.items() if place.lost and path.split("/")[0] in OWN[task]}
        assert not lost, name
        kernels = [path for path in placed if path.endswith("_projection/kernel") or path.startswith("pixel_decoder/k")]
        assert kernels and (name == "ddp" or all(any(placed[path].spec) for path in kernels))


def test_unknown_task_is_an_error(tiny_config):
    with pytest.raises(ValueError, match=r"task is 'clip': there are contrastive, masked_image, region_caption"):
        make_model(recipe(tiny_config, "clip"))


def test_padding_of_the_canvas_is_not_pooled():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    sizes = np.array([[33, 128], [96, 31]], np.int32)
    found = pool_map(jnp.asarray(features), jnp.asarray(sizes))
    np.testing.assert_allclose(found[0], features[0, :2].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found[1], features[1, :, :1].mean(axis=(0, 1)), rtol=1e-5)


def test_text_without_tokens_has_a_finite_gradient():
    slope = jax.grad(lambda x: normalize(x)[0] @ jnp.arange(3.0))(jnp.zeros((1, 3)))
    assert np.isfinite(slope).all()


def bilinear(features, y, x):
    """The value at a place in cells, 0 0 the middle of the first; the borders go on outside."""
    h, w = features.shape[:2]
    y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
    dy, dx = y - y0, x - x0
    top = features[y0, x0] * (1 - dx) + features[y0, x1] * dx
    return top * (1 - dy) + (features[y1, x0] * (1 - dx) + features[y1, x1] * dx) * dy


_pool = jax.jit(pool_regions, static_argnums=2)


@settings(max_examples=20)
@given(st.tuples(*[st.floats(0, 100, width=32)] * 2), st.tuples(*[st.floats(1, 300, width=32)] * 2), st.integers(0, 9))
def test_region_is_the_mean_of_bilinear_samples_of_its_level(corner, sides, seed):
    rng = np.random.default_rng(seed)
    levels = [rng.normal(size=(1, size, size + 1, 2)).astype(np.float32) for size in (16, 8, 4)]
    box = np.float32([*corner, corner[0] + sides[0], corner[1] + sides[1]])
    number = int(box_levels(jnp.asarray(box), 3))
    samples = (np.arange(3) + 0.5) / 3
    places = [(x0 + samples * (x1 - x0)) / (8 * 2**number) - 0.5 for x0, x1 in (box[0::2], box[1::2])]
    wanted = np.mean([bilinear(levels[number][0], y, x) for y in places[1] for x in places[0]], axis=0)
    found = _pool(levels, box[None, None], 3)
    np.testing.assert_allclose(found[0, 0], wanted, rtol=1e-3, atol=1e-4)


def test_larger_boxes_belong_to_coarser_levels():
    sides = np.float32([10, 111, 113, 223, 225, 449, 5000])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=-1)
    assert box_levels(jnp.asarray(boxes), 3).tolist() == [0, 0, 0, 0, 1, 2, 2]


def test_what_is_masked_does_not_reach_the_backbone(tiny_config):
    swin = Swin(tiny_config.model.swin, jnp.float32)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: swin.init(key, pixels, False), jax.random.key(0))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    masked = np.zeros((2, 8, 8), bool)
    masked[:, 2:5, 1:3] = True
    other = pixels.copy()
    other[:, 8:20, 4:12] = 7
    token = np.ones(tiny_config.model.swin.embed_dim, np.float32)
    run = jax.jit(lambda pixels, masked, token: swin.apply(variables, pixels, False, masked, token)[-1])
    np.testing.assert_array_equal(run(pixels, masked, token), run(other, masked, token))
    assert not np.allclose(run(pixels, ~masked, token), run(other, ~masked, token))
    assert not np.allclose(run(pixels, masked, token), run(pixels, masked, 2 * token))
