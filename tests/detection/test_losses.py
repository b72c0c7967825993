import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.detection.anchors import encode_boxes, level_shapes, make_anchors
from medglip_jax.detection.assign import assign_anchors
from medglip_jax.detection.losses import centerness_targets, detection_losses, focal_loss

CONFIG = get_config().detection
HEIGHT, WIDTH, TOKENS = 64, 96, 8
ANCHORS, _ = make_anchors(HEIGHT, WIDTH, CONFIG.strides, CONFIG.anchor_scale)
SHAPES = level_shapes(HEIGHT, WIDTH, CONFIG.strides)


def make_batch():
    """Image 0 has two boxes (tokens 1 and 2-3) and one padded place, image 1 has none; tokens 6 and 7 are padding."""
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0, 0], boxes[0, 1] = [8, 8, 50, 44], [40, 20, 90, 60]
    positive_map = np.zeros((2, 3, TOKENS), np.float32)
    positive_map[0, 0, 1] = 1
    positive_map[0, 1, 2:4] = 0.5
    return {
        "image": np.zeros((2, HEIGHT, WIDTH, 3), np.uint8),
        "attention_mask": np.tile((np.arange(TOKENS) < 6).astype(np.int32), (2, 1)),
        "boxes": boxes,
        "box_mask": np.array([[True, True, False], [False] * 3]),
        "positive_map": positive_map,
    }


def random_outputs(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    shapes = {
        "token_logits": (2, len(ANCHORS), TOKENS),
        "box_deltas": (2, len(ANCHORS), 4),
        "centerness": (2, len(ANCHORS)),
    }
    return {k: jnp.float32(scale * rng.standard_normal(s)) for k, s in shapes.items()}


def assign_first_image(batch):
    assign = jax.jit(assign_anchors, static_argnums=(1, 4))
    return np.asarray(assign(ANCHORS, SHAPES, batch["boxes"][0], batch["box_mask"][0], CONFIG.atss_topk))


@jax.jit
def losses_and_gradients(outputs, batch):
    def loss(outputs):
        losses = detection_losses(outputs, batch, CONFIG)
        return losses["loss"], losses

    (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(outputs)
    return losses, gradients


def test_focal_loss_equals_its_definition():
    logits = np.linspace(-6, 6, 25)
    p = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(
        focal_loss(jnp.float32(logits), jnp.ones(25, bool), 0.25, 2.0), -0.25 * (1 - p) ** 2 * np.log(p), rtol=1e-4
    )
    np.testing.assert_allclose(
        focal_loss(jnp.float32(logits), jnp.zeros(25, bool), 0.25, 2.0), -0.75 * p**2 * np.log(1 - p), rtol=1e-4
    )


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_focal_loss_is_finite_at_the_clamp_of_the_logits(target, gamma):
    for logit in (-50000.0, -100.0, 0.0, 100.0, 50000.0):
        value, gradient = jax.value_and_grad(focal_loss)(logit, target, 0.25, gamma)
        assert np.isfinite(value) and np.isfinite(gradient)


def test_centerness_is_one_in_the_middle_and_zero_outside():
    box = jnp.float32([10, 10, 30, 50])
    middle, quarter = jnp.float32([19, 29, 21, 31]), jnp.float32([14, 29, 16, 31])
    np.testing.assert_allclose(centerness_targets(middle, box), 1)
    np.testing.assert_allclose(centerness_targets(quarter, box), np.sqrt(5 / 15), rtol=1e-6)
    outside = jnp.float32([[0, 0, 4, 4], [40, 60, 44, 64], [40, 0, 44, 4]])
    np.testing.assert_array_equal(centerness_targets(outside, box), 0)


def test_losses_are_weighted_and_sum_to_the_loss():
    losses, _ = losses_and_gradients(random_outputs(), make_batch())
    np.testing.assert_allclose(losses["loss"], losses["loss_token"] + losses["loss_box"] + losses["loss_centerness"])
    assert float(losses["num_positives"]) > 1
    heavier = CONFIG.copy_and_resolve_references()
    heavier.token_loss_weight, heavier.box_loss_weight, heavier.centerness_loss_weight = 3.0, 6.0, 5.0
    again = jax.jit(functools.partial(detection_losses, config=heavier))(random_outputs(), make_batch())
    np.testing.assert_allclose(again["loss_token"], 3 * losses["loss_token"], rtol=1e-5)
    np.testing.assert_allclose(again["loss_box"], 3 * losses["loss_box"], rtol=1e-5)
    np.testing.assert_allclose(again["loss_centerness"], 5 * losses["loss_centerness"], rtol=1e-5)


def test_perfect_boxes_and_tokens_cost_nothing():
    batch = make_batch()
    assigned = assign_first_image(batch)
    outputs = {k: np.array(v) for k, v in random_outputs().items()}
    outputs["token_logits"][:] = -30
    for anchor in np.flatnonzero(assigned >= 0):
        box = batch["boxes"][0, assigned[anchor]]
        outputs["box_deltas"][0, anchor] = encode_boxes(jnp.asarray(ANCHORS[anchor]), jnp.asarray(box))
        outputs["token_logits"][0, anchor, batch["positive_map"][0, assigned[anchor]] > 0] = 30
    losses, _ = losses_and_gradients(outputs, batch)
    assert float(losses["loss_token"]) < 1e-5 and float(losses["loss_box"]) < 1e-4


def test_padding_tokens_and_background_boxes_get_no_gradient():
    batch = make_batch()
    _, gradients = losses_and_gradients(random_outputs(), batch)
    assert not np.asarray(gradients["token_logits"])[:, :, 6:].any()
    assert np.asarray(gradients["token_logits"])[:, :, :6].all()
    background = assign_first_image(batch) < 0
    for name in ("box_deltas", "centerness"):
        assert not np.asarray(gradients[name])[0, background].any()
        assert not np.asarray(gradients[name])[1].any()


def test_images_without_boxes_are_background_with_finite_gradients():
    batch = make_batch()
    batch["box_mask"] = np.zeros_like(batch["box_mask"])
    losses, gradients = losses_and_gradients(random_outputs(), batch)
    assert float(losses["num_positives"]) == 0
    assert float(losses["loss_box"]) == 0 and float(losses["loss_centerness"]) == 0
    assert float(losses["loss_token"]) > 0
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients.values())


def test_wild_outputs_and_degenerate_boxes_keep_gradients_finite():
    batch = make_batch()
    batch["boxes"][0, 2] = [30, 30, 30, 30]
    batch["box_mask"][0, 2] = True
    losses, gradients = losses_and_gradients(random_outputs(scale=1e4), batch)
    assert all(np.isfinite(np.asarray(x)).all() for x in (*losses.values(), *gradients.values()))


def test_box_without_tokens_is_not_learnt():
    batch = make_batch()
    with_tokens, _ = losses_and_gradients(random_outputs(), batch)
    # A new array: the running step may still read the old one.
    positive_map = batch["positive_map"].copy()
    positive_map[0, 1] = 0
    without, _ = losses_and_gradients(random_outputs(), {**batch, "positive_map": positive_map})
    assert 0 < float(without["num_positives"]) < float(with_tokens["num_positives"])


def test_losses_are_normalised_over_the_whole_batch():
    batch, outputs = make_batch(), random_outputs()
    doubled = {k: np.concatenate([v, v]) for k, v in batch.items()}
    one, _ = losses_and_gradients(outputs, batch)
    two, _ = losses_and_gradients({k: jnp.concatenate([v, v]) for k, v in outputs.items()}, doubled)
    assert float(two["num_positives"]) == 2 * float(one["num_positives"])
    for name in ("loss_token", "loss_box", "loss_centerness"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5)


def test_bfloat16_outputs_give_a_float32_loss():
    outputs = {k: v.astype(jnp.bfloat16) for k, v in random_outputs().items()}
    losses, _ = losses_and_gradients(outputs, make_batch())
    assert all(v.dtype == jnp.float32 for v in losses.values())


def test_image_of_another_size_is_an_error_that_says_so():
    batch = make_batch()
    batch["image"] = np.zeros((2, 128, 128, 3), np.uint8)
    with pytest.raises(ValueError, match="canvas of 128x128"):
        detection_losses(random_outputs(), batch, CONFIG)
