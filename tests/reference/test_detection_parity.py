"""Losses and detections against mmdetection's, given mmdetection's own head outputs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.detection.anchors import level_shapes, make_anchors
from medglip_jax.detection.assign import assign_anchors
from medglip_jax.detection.losses import detection_losses
from medglip_jax.detection.postprocess import detect

CONFIG = get_config().detection
LEVELS, BATCH, BOXES, TOKENS, CANVAS = 5, 2, 5, 64, (160, 192)


@pytest.fixture(scope="module")
def vectors(shared_dir):
    with np.load(shared_dir / "reference" / "glip_t_2blocks" / "vectors.npz") as stored:
        wanted = ("cls_", "box_", "ctr_", "gt_", "positive_", "loss_", "pred_", "attention_")
        return {name: stored[name] for name in stored.files if name.startswith(wanted)}


@pytest.fixture(params=["float32", "float64"])
def outputs(request, vectors):
    def channels_last(name):
        levels = [vectors[f"{name}_{i}"].reshape(BATCH, -1, vectors[f"{name}_{i}"][0, 0].size) for i in range(LEVELS)]
        return np.concatenate([np.swapaxes(level, 1, 2) for level in levels], axis=1)

    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield {
            "token_logits": np.concatenate([vectors[f"cls_{i}"] for i in range(LEVELS)], axis=1).astype(request.param),
            "box_deltas": channels_last("box").astype(request.param),
            "centerness": channels_last("ctr")[..., 0].astype(request.param),
        }


@pytest.fixture
def batch(vectors):
    boxes = np.zeros((BATCH, BOXES, 4), np.float32)
    box_mask = np.zeros((BATCH, BOXES), bool)
    positive_map = np.zeros((BATCH, BOXES, TOKENS), np.float32)
    for i in range(BATCH):
        number = len(vectors[f"gt_boxes_{i}"])
        # The head was given these as they are, so they are its inclusive corners.
        boxes[i, :number] = vectors[f"gt_boxes_{i}"] + [0, 0, 1, 1]
        box_mask[i, :number] = True
        assert not vectors[f"positive_map_{i}"][:, TOKENS:].any()
        positive_map[i, :number] = vectors[f"positive_map_{i}"][:, :TOKENS]
    assert not vectors["attention_mask"][:, TOKENS:].any()
    return {
        "image": np.zeros((BATCH, *CANVAS, 3), np.uint8),
        "attention_mask": vectors["attention_mask"][:, :TOKENS],
        "boxes": boxes,
        "box_mask": box_mask,
        "positive_map": positive_map,
    }


def test_box_and_centerness_losses_equal_mmdetection(outputs, batch, vectors):
    losses = jax.jit(functools.partial(detection_losses, config=CONFIG))(outputs, batch)
    np.testing.assert_allclose(losses["loss_box"], vectors["loss_bbox"][0], rtol=2e-6)
    np.testing.assert_allclose(losses["loss_centerness"], vectors["loss_centerness"][0], rtol=2e-6)


def plain_token_loss(logits, targets, attention_mask, num_positives):
    """mmdetection's py_sigmoid_focal_loss in NumPy, which also takes targets between 0 and 1."""
    p = 1 / (1 + np.exp(-logits))
    weight = (0.25 * targets + 0.75 * (1 - targets)) * ((1 - p) * targets + p * (1 - targets)) ** 2
    losses = weight * (np.logaddexp(0, logits) - logits * targets)
    return (losses * attention_mask[:, None]).sum() / num_positives


def test_token_loss_equals_mmdetection_with_binary_targets(outputs, batch, vectors):
    """The stored loss_cls was computed from the normalised positive map, given to the head directly.

    mmdetection's detector, and Microsoft's collator, make the map binary first. So the plain loss is held to the stored
    value with the normalised targets, which checks assignment, text mask and divisor, and ours to the plain one with
    the binary targets.
    """
    losses = jax.jit(functools.partial(detection_losses, config=CONFIG))(outputs, batch)
    anchors, _ = make_anchors(*CANVAS, CONFIG.strides, CONFIG.anchor_scale)
    shapes = level_shapes(*CANVAS, CONFIG.strides)
    assign = jax.jit(jax.vmap(lambda boxes, mask: assign_anchors(jnp.asarray(anchors), shapes, boxes, mask, 9)))
    assigned = np.asarray(assign(batch["boxes"], batch["box_mask"]))
    targets = np.take_along_axis(batch["positive_map"], np.maximum(assigned, 0)[..., None], axis=1)
    targets = targets * (assigned >= 0)[..., None]
    number = (assigned >= 0).sum()
    assert float(losses["num_positives"]) == number
    plain = functools.partial(
        plain_token_loss,
        outputs["token_logits"].astype(np.float64),
        attention_mask=batch["attention_mask"],
        num_positives=number,
    )
    np.testing.assert_allclose(plain(targets), vectors["loss_cls"][0], rtol=2e-6)
    np.testing.assert_allclose(losses["loss_token"], plain((targets > 0).astype(float)), rtol=2e-6)


def test_detections_equal_mmdetection(outputs, batch, vectors):
    run = jax.jit(functools.partial(detect, config=CONFIG, canvas=CANVAS))
    sizes = np.tile(np.int32(CANVAS), (BATCH, 1))
    found = run(outputs, sizes, batch["positive_map"], batch["box_mask"])
    for i in range(BATCH):
        np.testing.assert_array_equal(found["phrases"][i], vectors[f"pred_labels_{i}"])
        np.testing.assert_allclose(found["boxes"][i], vectors[f"pred_boxes_{i}"], atol=1e-4)
        np.testing.assert_allclose(found["scores"][i], vectors[f"pred_scores_{i}"], atol=1e-6)
