"""Masks in the step around the model: micro-batches and meshes change nothing, and off there is no trace of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.mask_targets import pack
from medglip_jax.detection.masks import box_logits, count_parameters
from medglip_jax.detection.postprocess import detect
from medglip_jax.inference import make_detector, parameter_shapes
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.parallel.mesh import make_mesh, to_global
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import TrainState, state_shapes
from medglip_jax.training.step import make_train_step
from tests.training.small_detector import Detector

SIDE, BATCH, TOKENS, MOST = 64, 8, 8, 4
MASK_KEYS = ("masks", "mask_boxes", "phrase_masks", "phrase_tokens")


class MaskDetector(nn.Module):
    """A detector that compiles in a second, with the outputs of the mask branch."""

    @nn.compact
    def __call__(self, pixels, input_ids, attention_mask, train=False):
        outputs = Detector(name="boxes")(pixels, input_ids, attention_mask, train)
        x = nn.relu(nn.Conv(8, (4, 4), (4, 4), name="fine")(pixels))
        words = nn.Embed(64, 8, name="mask_words")(input_ids)
        parameters = nn.Dense(count_parameters(4, 2), name="controller")(outputs["box_deltas"])
        return {
            **outputs,
            "mask_pixels": x,
            "mask_tokens": words,
            "mask_token_bias": words.sum(axis=-1),
            "mask_maps": nn.Dense(4, name="maps")(x),
            "mask_parameters": parameters,
        }


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.data.batch_size, config.data.max_tokens = BATCH, TOKENS
    config.detection.strides, config.detection.anchor_scale = (16, 32), 1.0
    config.optimizer.clip_norm, config.optimizer.ema, config.sharding_rules = 1e9, 0.0, ((".*", ()),)
    return config


@pytest.fixture(scope="module")
def batch():
    """Noise with 0 to 3 boxes an image, some with masks: what the losses are divided by differs between images."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 24, (BATCH, 3, 2))
    box_mask = np.arange(3) < np.minimum(np.arange(BATCH), 3)[:, None]
    tokens = np.eye(TOKENS, dtype=np.float32)[[1, 2, 4]]
    grids = rng.random((2, BATCH, MOST, SIDE // 4, SIDE // 4)) < 0.3
    mask_boxes = np.where(np.arange(MOST) < rng.integers(0, 3, BATCH)[:, None], np.arange(MOST), -1)
    phrase_tokens = np.eye(TOKENS, dtype=bool)[1 : 1 + MOST] & (np.arange(MOST) < np.arange(BATCH)[:, None])[..., None]
    grids[1, ::2, 0] = False  # absent phrases
    return {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), dtype=np.uint8),
        "image_size": np.full((BATCH, 2), SIDE - 6, np.int32),
        "input_ids": rng.integers(5, 60, (BATCH, TOKENS)).astype(np.int32),
        "attention_mask": np.tile(np.arange(TOKENS) < 6, (BATCH, 1)).astype(np.int32),
        "boxes": np.concatenate([corners, corners + rng.uniform(8, 36, corners.shape)], -1).astype(np.float32),
        "box_mask": box_mask,
        "positive_map": tokens * box_mask[..., None],
        "masks": pack(grids[0]),
        "mask_boxes": mask_boxes.astype(np.int32),
        "phrase_masks": pack(grids[1]),
        "phrase_tokens": phrase_tokens,
    }


def lower(config, model, batch, *, kind="both", accumulation=1, data=1):
    recipe = config.copy_and_resolve_references()
    recipe.training.accumulation, recipe.model.masks.kind = accumulation, kind
    mesh, optimizer = make_mesh({"data": data}, jax.devices()[:data]), make_optimizer(recipe)
    shapes = state_shapes(model, recipe, optimizer, jax.random.key(0)).params
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.1, size=x.shape), jnp.float32), shapes)
    state = TrainState(jnp.int32(0), params, optimizer.init(params), None, jax.random.key(1))
    state, arrays = jax.device_put(state, jax.NamedSharding(mesh, jax.P())), to_global(batch, mesh)
    return jax.jit(make_train_step(model, recipe, optimizer, mesh)).lower(state, arrays), state, arrays


@pytest.fixture(scope="module")
def run(config, batch):
    """Takes one step: metrics, and the gradient but for a factor."""

    @functools.cache
    def take(**setting):
        lowered, state, arrays = lower(config, MaskDetector(), batch, **setting)
        state, metrics = lowered.compile()(state, arrays)
        return jax.device_get((metrics, optax.tree_utils.tree_get(state.opt_state, "mu")))

    return take


def test_masks_are_learnt_beside_boxes(run):
    metrics, gradients = run()
    assert metrics["finite"] and metrics["loss_mask_box"] > 0 and metrics["loss_mask_phrase"] > 0
    parts = [value for name, value in metrics.items() if name.startswith("loss_")]
    np.testing.assert_allclose(metrics["loss"], sum(parts), rtol=1e-6)
    assert all(np.abs(gradients[name]["kernel"]).max() > 0 for name in ("fine", "maps", "controller"))


def test_neither_micro_batches_nor_meshes_change_the_numbers(run):
    (expected, gradients), (found, others) = run(), run(accumulation=2, data=2)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_detections_have_the_masks_of_their_anchors_on_any_mesh(config, batch):
    recipe = config.copy_and_resolve_references()
    recipe.model.masks.kind, recipe.detection.score_threshold, recipe.detection.max_detections = "both", 0.0, 20
    model, rng = MaskDetector(), np.random.default_rng(3)
    shapes = parameter_shapes(model, recipe)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.1, size=x.shape), jnp.float32), shapes)
    images = {name: batch[name] for name in ("image", "image_size", "input_ids", "attention_mask")}
    phrases = {"phrase_map": np.eye(TOKENS, dtype=np.float32)[None, :4], "phrase_valid": np.ones((1, 4), bool)}
    found, spread = (
        jax.device_get(make_detector(model, recipe, mesh)(params, **images, **phrases))
        for mesh in (None, make_mesh({"data": 2}, jax.devices()[:2]))
    )
    assert found["masks"].shape == (BATCH, 20, 16, 16) and found["phrase_masks"].shape == (BATCH, 4, 16, 16)
    assert found["masks"].dtype == np.int8 and "anchors" not in found and found["masks"].any()
    for name, value in found.items():
        np.testing.assert_allclose(spread[name], value, atol=1 if value.dtype == np.int8 else 1e-4, err_msg=name)
    pixels = normalize_pixels(jnp.asarray(batch["image"]), jnp.asarray(batch["image_size"]))
    outputs = model.apply({"params": params}, pixels, batch["input_ids"], batch["attention_mask"])
    assert isinstance(outputs, dict)
    sizes, canvas = jnp.asarray(batch["image_size"]), (SIDE, SIDE)
    phrase_map, valid = jnp.asarray(phrases["phrase_map"]), jnp.ones((1, 4), bool)
    anchors = detect(outputs, sizes, phrase_map[0], valid[0], recipe.detection, canvas=canvas, with_anchors=True)[
        "anchors"
    ]
    best = box_logits(outputs, anchors[:, :1], recipe.detection, canvas=canvas)
    np.testing.assert_allclose(found["masks"][:, :1] / 16, np.clip(best, -8, 8), atol=0.15)


def test_off_the_step_is_the_same_program_whatever_the_batch_and_the_recipe_say(config, batch):
    plain = {name: value for name, value in batch.items() if name not in MASK_KEYS}
    other = config.copy_and_resolve_references()
    other.detection.mask_anchors, other.detection.mask_focal_weight, other.model.masks.channels = 5, 3.0, 7
    programs = [lower(c, Detector(), plain, kind="")[0].as_text() for c in (config, other)]
    assert programs[0] == programs[1]
