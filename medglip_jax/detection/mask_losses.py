"""Losses of masks: Dice and focal, for the masks of boxes and of phrases that a batch has.

What has no mask has no loss: boxes without one, and phrases of which it is not known what all of their mask is.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from medglip_jax.detection.losses import Normalizers, Targets, focal_loss
from medglip_jax.detection.masks import MASK_STRIDE, Config, box_logits, phrase_logits, unpack_masks

_SMOOTH = 1.0  # added to both sides of Dice's fraction, in pixels of the grid


class MaskTargets(NamedTuple):
    """What the mask branch is asked for, whatever the model says.

    Attributes:
        anchors: int32[B, K * A], the anchors that are taught the mask of each of the K boxes, A each.
        taught: float[B, K * A], 1 for them; 0 for places of no anchor, or of no box.
        asked: float[B, K], 1 for phrases whose mask is known.
        present: float[B, K], 1 for those whose mask is not empty.
    """

    anchors: jax.Array
    taught: jax.Array
    asked: jax.Array
    present: jax.Array


class MaskCounts(NamedTuple):
    """Scalars that the losses of masks are divided by, where they are at least 1."""

    boxes: jax.Array
    phrases: jax.Array
    present: jax.Array


def dice_loss(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns 1 minus Dice's overlap with squares in the denominator (V-Net, arXiv 1606.04797), a number a mask.

    Args:
        logits: float[..., h, w].
        targets: bool[..., h, w].
        valid: bool, broadcasts against `logits`: pixels that count.

    Returns:
        float[...] in 0 to 1; 0 for an empty target that nothing is found of.
    """
    inside = jnp.where(valid, jax.nn.sigmoid(logits), 0)
    known = jnp.where(valid, targets, False).astype(inside.dtype)
    shared = jnp.sum(inside * known, axis=(-2, -1))
    total = jnp.sum(inside**2 + known, axis=(-2, -1))
    return 1 - (2 * shared + _SMOOTH) / (total + _SMOOTH)


def mean_focal_loss(logits: jax.Array, targets: jax.Array, valid: jax.Array, config: Config) -> jax.Array:
    """Returns the mean of the focal loss over the valid pixels of each mask: float[...]; arguments as `dice_loss`."""
    losses = focal_loss(logits, targets, config.focal_alpha, config.focal_gamma)
    pixels = jnp.maximum(jnp.sum(jnp.broadcast_to(valid, logits.shape), axis=(-2, -1)), 1)
    return jnp.sum(jnp.where(valid, losses, 0), axis=(-2, -1)) / pixels


def valid_pixels(image_size: jax.Array, height: int, width: int) -> jax.Array:
    """Returns bool[B, height, width]: the pixels of the grid whose centres are in the image, not in its padding."""
    rows = (jnp.arange(height) + 0.5) * MASK_STRIDE < image_size[:, :1]
    columns = (jnp.arange(width) + 0.5) * MASK_STRIDE < image_size[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def choose_anchors(
    mask_boxes: jax.Array, assigned: jax.Array, quality: jax.Array, per_box: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses the most central anchors of each box that has a mask.

    Args:
        mask_boxes: int32[B, K], boxes; -1 for none.
        assigned: int32[B, N], the box of each anchor, -1 for background.
        quality: float[B, N], how central it lies, 0 or more.
        per_box: A, most anchors of a box.

    Returns:
        (anchors, found): int32[B, K * A] and bool[B, K * A], False where a box has no further anchor. Of equally
        central ones the first.
    """
    own = (assigned[:, None] == mask_boxes[..., None]) & (mask_boxes >= 0)[..., None]  # [B, K, N]
    left = jnp.where(own, quality[:, None], -1)
    anchors, found = [], []
    for _ in range(per_box):  # a few passes; `top_k` would gather all images on every device of a mesh
        best = jnp.argmax(left, axis=-1)  # [B, K]
        anchors.append(best)
        found.append(jnp.take_along_axis(left, best[..., None], axis=-1)[..., 0] >= 0)
        left = jnp.where(jnp.arange(left.shape[-1]) == best[..., None], -1, left)
    shape = (mask_boxes.shape[0], -1)
    return jnp.stack(anchors, axis=-1).reshape(shape), jnp.stack(found, axis=-1).reshape(shape)


def match_masks(batch: Mapping[str, Any], matched: Targets, config: Config) -> MaskTargets:
    """Finds which anchors and which phrases are taught a mask.

    Args:
        batch: mask_boxes, phrase_masks and phrase_tokens, see `data_pipelines.loader.train_loader`.
        matched: from `match_anchors` of it.
        config: `config.detection` of a recipe.
    """
    assigned = jnp.where(matched.positive, matched.assigned, -1)
    quality = matched.quality
    anchors, found = choose_anchors(jnp.asarray(batch["mask_boxes"]), assigned, quality, config.mask_anchors)
    asked = jnp.any(jnp.asarray(batch["phrase_tokens"]), axis=-1)
    present = asked & jnp.any(jnp.asarray(batch["phrase_masks"]) > 0, axis=(-2, -1))
    return MaskTargets(anchors, *(x.astype(quality.dtype) for x in (found, asked, present)))


def count_masks(targets: MaskTargets) -> MaskCounts:
    """Returns what the losses of masks are divided by."""
    return MaskCounts(jnp.sum(targets.taught), jnp.sum(targets.asked), jnp.sum(targets.present))


def add_mask_losses(
    losses: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.Array],
    batch: Mapping[str, Any],
    matched: Targets,
    config: Config,
    normalizers: Normalizers | None = None,
) -> dict[str, jax.Array]:
    """Adds the losses of the masks of a batch, weighted, to those of its boxes.

    The mask of a box is taught at its most central anchors; both losses are divided by the number of these. That of a
    phrase has the focal loss where it is known to be empty too, divided by the number of phrases; Dice only where it is
    not, divided by the number of these. Pixels in the padding of the canvas carry no loss.

    Args:
        losses: from `detection_losses`.
        outputs: of the model: the masks that it has outputs for have a loss.
        batch: image and image_size, and see `match_masks`; masks [B, K, h, ceil(w / 8)].
        matched: from `match_anchors` of this batch.
        config: `config.detection` of a recipe.
        normalizers: of the batch that this one is a part of, see `detection_losses`.

    Returns:
        The scalars of `losses`, with loss_mask_box and loss_mask_phrase, or one of them, which are in `loss` too.
    """
    canvas = batch["image"].shape[1:3]
    targets = match_masks(batch, matched, config)
    counts = count_masks(targets) if normalizers is None else normalizers.masks
    added: dict[str, jax.Array] = {}
    if "mask_parameters" in outputs:
        width = outputs["mask_maps"].shape[2]
        logits = box_logits(outputs, targets.anchors, config, canvas=canvas)  # [B, K * A, h, w]
        valid = valid_pixels(jnp.asarray(batch["image_size"]), *logits.shape[-2:])[:, None]
        known = jnp.repeat(unpack_masks(jnp.asarray(batch["masks"]), width), config.mask_anchors, axis=1)
        dice = jnp.sum(targets.taught * dice_loss(logits, known, valid))
        focal = jnp.sum(targets.taught * mean_focal_loss(logits, known, valid, config))
        total = config.mask_dice_weight * dice + config.mask_focal_weight * focal
        added["loss_mask_box"] = total / jnp.maximum(counts.boxes, 1)
    if "mask_pixels" in outputs:
        logits = phrase_logits(outputs, jnp.asarray(batch["phrase_tokens"]))
        valid = valid_pixels(jnp.asarray(batch["image_size"]), *logits.shape[-2:])[:, None]
        known = unpack_masks(jnp.asarray(batch["phrase_masks"]), logits.shape[-1])
        dice = jnp.sum(targets.present * dice_loss(logits, known, valid))
        focal = jnp.sum(targets.asked * mean_focal_loss(logits, known, valid, config))
        dice /= jnp.maximum(counts.present, 1)
        added["loss_mask_phrase"] = config.mask_dice_weight * dice + config.mask_focal_weight * focal / jnp.maximum(
            counts.phrases, 1
        )
    return {**losses, **added, "loss": sum(added.values(), losses["loss"])}
