"""Masks from the branch's maps, their losses, and which anchors learn them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.medglip_t import get_config
from data_pipelines import mask_targets
from medglip_jax.detection import masks
from medglip_jax.detection.anchors import make_anchors
from medglip_jax.detection.losses import Targets
from medglip_jax.detection.mask_losses import (
    add_mask_losses,
    choose_anchors,
    count_masks,
    dice_loss,
    match_masks,
    valid_pixels,
)

CONFIG = get_config().detection
CANVAS, TOKENS, CHANNELS, LAYERS = (64, 96), 8, 3, 2
GRID = mask_targets.grid_size(CANVAS)
ANCHORS, _ = make_anchors(*CANVAS, CONFIG.strides, CONFIG.anchor_scale)


@pytest.mark.parametrize("width", [1, 8, 13])
def test_packed_masks_come_back(width):
    mask = np.random.default_rng(width).random((2, 3, width)) < 0.5
    np.testing.assert_array_equal(masks.unpack_masks(jnp.asarray(mask_targets.pack(mask)), width), mask)


def test_the_grid_of_the_loader_is_that_of_the_model():
    assert masks.MASK_STRIDE == mask_targets.MASK_STRIDE
    assert masks.count_parameters(8, 3) == 169  # CondInst, section 3.2


def random_outputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "mask_maps": (2, *GRID, CHANNELS),
        "mask_parameters": (2, len(ANCHORS), masks.count_parameters(CHANNELS, LAYERS)),
        "mask_pixels": (2, *GRID, 5),
        "mask_tokens": (2, TOKENS, 5),
        "mask_token_bias": (2, TOKENS),
    }
    return {name: jnp.float32(rng.standard_normal(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("count", [2, 20])
def test_a_box_has_the_network_of_its_anchor(count):
    outputs = random_outputs()
    chosen = np.random.default_rng(1).integers(len(ANCHORS), size=(2, count)).astype(np.int32)
    found = jax.jit(lambda outputs: masks.box_logits(outputs, chosen, CONFIG, canvas=CANVAS))(outputs)
    assert found.shape == (2, count, *GRID)
    image, place, row, column = 1, count - 1, 5, 17
    anchor, p = ANCHORS[chosen[image, place]], np.asarray(outputs["mask_parameters"])[image, chosen[image, place]]
    side, center = anchor[2] - anchor[0], (anchor[:2] + anchor[2:]) / 2
    offset = (np.array([column, row]) * 4 + 2 - center) / (2 * side)
    x = np.concatenate([np.asarray(outputs["mask_maps"])[image, row, column], offset])  # [F + 2]
    hidden = np.maximum(x @ p[: 5 * 3].reshape(5, 3) + p[15:18], 0)
    np.testing.assert_allclose(found[image, place, row, column], hidden @ p[18:21] + p[21], rtol=1e-4)


def test_a_phrase_is_the_mean_of_its_tokens():
    outputs = random_outputs()
    phrase_map = np.zeros((2, 3, TOKENS), np.float32)
    phrase_map[0, 0, 1], phrase_map[0, 1, 2:5] = 1, 1 / 3
    found = masks.phrase_logits(outputs, phrase_map)
    pixels, tokens, bias = (np.asarray(outputs[name]) for name in ("mask_pixels", "mask_tokens", "mask_token_bias"))
    np.testing.assert_allclose(found[0, 0], pixels[0] @ tokens[0, 1] + bias[0, 1], rtol=1e-4, atol=1e-5)
    expected = pixels[0] @ tokens[0, 2:5].mean(axis=0) + bias[0, 2:5].mean()
    np.testing.assert_allclose(found[0, 1], expected, rtol=1e-4, atol=1e-5)


@given(st.floats(-50, 50))
def test_stored_logits_keep_their_side_and_their_place(logit):
    stored = int(masks.quantize_logits(jnp.float32(logit)))
    assert (stored > 0) == (np.float32(logit) > 0) and abs(stored / 16 - np.clip(logit, -127 / 16, 127 / 16)) <= 1 / 16


def test_resizing_puts_the_centres_of_pixels_where_they_are():
    ramp = jnp.arange(5.0)[None, :, None, None] * 8 + 4 + jnp.zeros((1, 1, 3, 1))  # rows of stride 8: their centres
    fine = masks.resize_linear(ramp, 9, 6, 2)[0, :, 0, 0]
    np.testing.assert_allclose(fine[1:-1], np.arange(9)[1:-1] * 4 + 2)  # the first and the last lie outside the centres
    assert fine[0] == 4 and fine[-1] == 34


def test_dice_is_the_overlap_and_padding_does_not_count():
    known = np.zeros((4, 6), bool)
    known[:2, :3] = True
    certain = jnp.where(jnp.asarray(known), 50.0, -50.0)
    valid = np.ones((4, 6), bool)
    assert dice_loss(certain, known, valid) < 1e-6
    np.testing.assert_allclose(dice_loss(-certain, known, valid), 1 - 1 / (24 + 1), rtol=1e-6)
    assert dice_loss(jnp.full((4, 6), -50.0), np.zeros((4, 6), bool), valid) < 1e-6
    valid[:, 3:] = False
    wrong_outside = jnp.where(jnp.arange(6) < 3, certain, 50.0)
    assert dice_loss(wrong_outside, known, valid) < 1e-6
    assert jax.grad(lambda x: dice_loss(x, known, valid))(jnp.zeros((4, 6)))[:, 3:].any() == False  # noqa: E712


def test_pixels_whose_centres_are_in_the_image_count():
    valid = valid_pixels(jnp.array([[64, 96], [61, 7], [62, 6]]), *GRID)
    assert valid.sum(axis=(1, 2)).tolist() == [16 * 24, 15 * 2, 15 * 1]


_choose = jax.jit(choose_anchors, static_argnums=3)


@given(
    per_box=st.integers(1, 2),
    assigned=st.lists(st.integers(-1, 2), min_size=8, max_size=8),
    boxes=st.lists(st.integers(-1, 2), min_size=3, max_size=3),
    seed=st.integers(0, 9),
)
def test_the_most_central_anchors_of_a_box_learn_its_mask(per_box, assigned, boxes, seed):
    quality = np.random.default_rng(seed).integers(0, 4, len(assigned)) / 4  # equal ones, and some of 0
    inputs = (np.int32([boxes]), np.int32([assigned]), np.float32([quality]))
    anchors, found = jax.device_get(_choose(*inputs, per_box))
    for k, box in enumerate(boxes):
        own = sorted((i for i, a in enumerate(assigned) if a == box >= 0), key=lambda i: (-quality[i], i))[:per_box]
        place = slice(k * per_box, (k + 1) * per_box)
        assert anchors[0, place][found[0, place]].tolist() == own


def make_batch():
    """Image 0: two boxes with masks and one without; phrases known, absent and none. Image 1 has boxes only."""
    rng = np.random.default_rng(4)
    mask_boxes, phrase_tokens = np.full((2, 3), -1, np.int32), np.zeros((2, 3, TOKENS), bool)
    mask_boxes[0, :2] = 2, 0
    phrase_tokens[0, 0, 1], phrase_tokens[0, 1, 2:4] = True, True
    grids, phrases = rng.random((2, 3, *GRID)) < 0.4, rng.random((2, 3, *GRID)) < 0.4
    phrases[0, 1] = False
    return {
        "image": np.zeros((2, *CANVAS, 3), np.uint8),
        "image_size": np.array([CANVAS, (40, 50)], np.int32),
        "masks": mask_targets.pack(grids),
        "mask_boxes": mask_boxes,
        "phrase_masks": mask_targets.pack(phrases),
        "phrase_tokens": phrase_tokens,
    }


def make_targets():
    rng = np.random.default_rng(5)
    assigned = jnp.int32(rng.integers(-1, 3, (2, len(ANCHORS))))
    quality = jnp.float32(rng.random(assigned.shape))
    return Targets(jnp.asarray(ANCHORS), assigned, assigned >= 0, jnp.zeros((2, len(ANCHORS), 4)), quality)


@jax.jit
def losses_and_gradients(outputs, batch):
    def loss(outputs):
        losses = add_mask_losses({"loss": jnp.float32(1)}, outputs, batch, make_targets(), CONFIG)
        return losses["loss"], losses

    (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(outputs)
    return losses, gradients


def test_counts_are_of_what_is_taught():
    counts = count_masks(match_masks(make_batch(), make_targets(), CONFIG))
    assert [float(x) for x in counts] == [2 * CONFIG.mask_anchors, 2, 1]


def test_what_has_no_mask_has_no_gradient():
    losses, gradients = losses_and_gradients(random_outputs(), make_batch())
    np.testing.assert_allclose(losses["loss"], 1 + losses["loss_mask_box"] + losses["loss_mask_phrase"], rtol=1e-6)
    assert all(np.isfinite(x).all() for x in gradients.values())
    for name, gradient in gradients.items():
        assert np.abs(gradient[0]).sum() > 0 and not gradient[1].any(), name
    assert np.flatnonzero(np.abs(gradients["mask_tokens"][0]).sum(axis=-1)).tolist() == [1, 2, 3]
    assert np.count_nonzero(np.abs(gradients["mask_parameters"][0]).sum(axis=-1)) == 2 * CONFIG.mask_anchors


def test_masks_that_are_right_cost_nothing():
    batch = make_batch()
    grid = masks.unpack_masks(jnp.asarray(batch["phrase_masks"]), GRID[1])[0, 0]
    outputs = random_outputs()
    outputs["mask_pixels"] = outputs["mask_pixels"].at[0].set(0).at[0, ..., 0].set(jnp.where(grid, 50.0, -50.0))
    outputs["mask_tokens"] = jnp.zeros_like(outputs["mask_tokens"]).at[:, 1, 0].set(1.0)
    outputs["mask_token_bias"] = jnp.zeros((2, TOKENS)).at[:, 2:4].set(-50.0)
    losses, _ = losses_and_gradients(outputs, batch)
    assert float(losses["loss_mask_phrase"]) < 1e-5 < float(losses["loss_mask_box"])


def test_batches_without_masks_cost_nothing():
    batch = make_batch()
    batch["mask_boxes"], batch["phrase_tokens"] = np.full((2, 3), -1, np.int32), np.zeros((2, 3, TOKENS), bool)
    losses, gradients = losses_and_gradients(random_outputs(), batch)
    assert losses["loss"] == 1 and not any(np.asarray(x).any() for x in gradients.values())
