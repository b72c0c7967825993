"""The three losses of GLIP's dense head (mmdetection's ATSSVLFusionHead, with its fine-tuning targets).

Sums run over the whole batch that the arrays hold. Under jit on a mesh that is the global batch, so that an image
weighs the same on one device and on a pod.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.anchors import decode_boxes, level_shapes, make_anchors
from medglip_jax.detection.assign import assign_anchors
from medglip_jax.detection.boxes import as_float, giou, inclusive
from medglip_jax.detection.hierarchy import hierarchy_losses


def focal_loss(logits: jax.Array, targets: jax.Array, alpha: float, gamma: float) -> jax.Array:
    """Returns the sigmoid focal loss of each logit (Lin et al., arXiv 1708.02002), finite for every finite logit.

    Args:
        logits: float[...].
        targets: bool[...], broadcasts against `logits`.
        alpha: weight of true targets; false ones get 1 - alpha.
        gamma: power of the probability of being wrong.
    """
    wrong = jnp.where(targets, -logits, logits)  # logit of the probability that the prediction is wrong
    weight = jnp.where(targets, alpha, 1 - alpha)
    return weight * jnp.exp(gamma * jax.nn.log_sigmoid(wrong)) * jax.nn.softplus(wrong)


def centerness_targets(anchors: jax.Array, boxes: jax.Array) -> jax.Array:
    """Returns how central each anchor lies in its box (Tian et al., arXiv 1904.01355): 1 in the middle, 0 at a side.

    Args:
        anchors: float[..., 4] inclusive boxes in pixels.
        boxes: float[..., 4] inclusive boxes in pixels; broadcasts against `anchors`.

    Returns:
        float[...] in 0 to 1, and 0 for a centre outside its box.
    """
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    before, after = centers - boxes[..., :2], boxes[..., 2:] - centers
    inside = jnp.all((before > 0) & (after > 0), axis=-1)
    ratios = jnp.minimum(before, after) / jnp.maximum(before, after)
    return jnp.sqrt(jnp.where(inside, ratios[..., 0] * ratios[..., 1], 0))


def _token_loss(
    token_logits: jax.Array,
    assigned: jax.Array,
    tokens: jax.Array,
    attention_mask: jax.Array,
    ignored: jax.Array | None,
    alpha: float,
    gamma: float,
) -> jax.Array:
    """Returns the sum of the focal loss over anchors and the real tokens that are not ignored for their boxes; tokens
    and ignored [B, M, L] bool, assigned [B, N]."""
    targets = jnp.take_along_axis(tokens, jnp.maximum(assigned, 0)[..., None], axis=1)  # [B, N, L]
    targets &= (assigned >= 0)[..., None]
    losses = focal_loss(token_logits, targets, alpha, gamma)
    counted = (attention_mask > 0)[:, None]
    if ignored is not None:
        of_box = jnp.take_along_axis(ignored, jnp.maximum(assigned, 0)[..., None], axis=1)  # [B, N, L]
        counted &= ~of_box | (assigned < 0)[..., None]
    return jnp.sum(losses, where=counted)


class Targets(NamedTuple):
    """What the anchors of a batch are asked for, whatever the model says.

    Attributes:
        anchors: float[N, 4], half-open boxes in pixels.
        assigned: int32[B, N], the box of each anchor, or -1 for background.
        positive: bool[B, N], those whose box has tokens.
        boxes: float[B, N, 4], the inclusive box of each anchor.
        quality: float[B, N], centerness of positive anchors; 0 for others.
    """

    anchors: jax.Array
    assigned: jax.Array
    positive: jax.Array
    boxes: jax.Array
    quality: jax.Array


class Normalizers(NamedTuple):
    """Scalars that the losses of a batch are divided by, where they are at least 1."""

    num_positives: jax.Array
    quality: jax.Array
    masks: Any = None  # see `mask_losses.MaskCounts`


def match_anchors(batch: Mapping[str, Any], config: ConfigDict | FrozenConfigDict, dtype: Any) -> Targets:
    """Assigns the anchors of a batch to its boxes.

    Args:
        batch, config: see `detection_losses`.
        dtype: to compute in, float32 or float64.
    """
    height, width = batch["image"].shape[1:3]
    anchors = jnp.asarray(make_anchors(height, width, config.strides, config.anchor_scale)[0], dtype)
    boxes = jnp.asarray(batch["boxes"], dtype)
    tokens = jnp.asarray(batch["positive_map"]) > 0  # [B, M, L]
    box_mask = jnp.asarray(batch["box_mask"])

    shapes = level_shapes(height, width, config.strides)
    assigned = jax.vmap(lambda b, m: assign_anchors(anchors, shapes, b, m, config.atss_topk))(boxes, box_mask)
    nearest = jnp.maximum(assigned, 0)  # [B, N]
    positive = (assigned >= 0) & jnp.take_along_axis(tokens.any(axis=-1), nearest, axis=1)
    targets = inclusive(jnp.take_along_axis(boxes, nearest[..., None], axis=1))  # [B, N, 4]
    quality = jnp.where(positive, centerness_targets(inclusive(anchors), targets), 0)  # [B, N]
    return Targets(anchors, assigned, positive, targets, quality)


def count_normalizers(targets: Targets) -> Normalizers:
    """Returns what the losses of the anchors of `targets` are divided by."""
    return Normalizers(jnp.sum(targets.positive, dtype=targets.quality.dtype), jnp.sum(targets.quality))


def detection_losses(
    outputs: Mapping[str, jax.Array],
    batch: Mapping[str, Any],
    config: ConfigDict | FrozenConfigDict,
    normalizers: Normalizers | None = None,
    targets: Targets | None = None,
) -> dict[str, jax.Array]:
    """Computes the training loss of a batch.

    An anchor is positive when ATSS gives it to a box that has tokens. Token targets are 1 on the tokens of that box's
    phrase (`positive_map > 0`) and 0 elsewhere; padding tokens carry no loss, nor do those that `ignore_map` marks for
    the box of an anchor. The token loss and the centerness loss
    are divided by the number of positives, the box loss by the sum of the centerness targets that weigh it, neither by
    less than 1. Anchors in the padding of the canvas are background.

    Args:
        outputs: the detector's token_logits [B, N, L], box_deltas [B, N, 4] and centerness [B, N] (logits).
        batch: image [B, H, W, 3] (its shape alone is read), attention_mask [B, L], boxes [B, M, 4] (half-open canvas
            pixels), box_mask [B, M], positive_map [B, M, L]; ignore_map bool[B, M, L] if there is one, and what
            `hierarchy_losses` reads.
        config: `config.detection` of a recipe.
        normalizers: of the batch that this one is a part of, whose losses then sum to those of the whole; None takes
            this batch for the whole.
        targets: from `match_anchors` of the batch; None makes them.

    Returns:
        Scalars of float32, or float64 where the outputs are: loss (the weighted sum), loss_token, loss_box,
        loss_centerness (each with its weight), num_positives (of this batch), and the terms of `hierarchy_losses`,
        which are in the loss.

    Raises:
        ValueError: the outputs do not have the number of anchors that the image's size gives.
    """
    token_logits, deltas, centerness = (as_float(outputs[k]) for k in ("token_logits", "box_deltas", "centerness"))
    height, width = batch["image"].shape[1:3]
    all_anchors, _ = make_anchors(height, width, config.strides, config.anchor_scale)
    if token_logits.shape[1] != len(all_anchors):
        raise ValueError(
            f"detection_losses: token_logits have {token_logits.shape[1]} anchors, but a canvas of {height}x{width} "
            f"pixels with strides {tuple(config.strides)} has {len(all_anchors)}; give the image that the model saw."
        )
    targets = targets or match_anchors(batch, config, deltas.dtype)
    positive, quality = targets.positive, targets.quality
    counted = count_normalizers(targets)
    totals = counted if normalizers is None else normalizers
    normalizer = jnp.maximum(totals.num_positives, 1)

    # Recomputed in the backward pass: nothing of size [B, N, L] is kept for it but the logits.
    token_loss = jax.checkpoint(_token_loss, static_argnums=(5, 6))
    tokens, real = jnp.asarray(batch["positive_map"]) > 0, jnp.asarray(batch["attention_mask"])
    ignored = jnp.asarray(batch["ignore_map"]) if "ignore_map" in batch else None
    loss_token = token_loss(
        token_logits, targets.assigned, tokens, real, ignored, config.focal_alpha, config.focal_gamma
    )

    predicted = decode_boxes(targets.anchors, deltas)
    overlap = giou(inclusive(predicted), targets.boxes)
    loss_box = jnp.sum(quality * (1 - overlap), where=positive)
    # Binary cross-entropy against a soft target, from the logit.
    loss_centerness = jnp.sum(jax.nn.softplus(centerness) - quality * centerness, where=positive)

    loss_token = config.token_loss_weight * loss_token / normalizer
    loss_box = config.box_loss_weight * loss_box / jnp.maximum(totals.quality, 1)
    loss_centerness = config.centerness_loss_weight * loss_centerness / normalizer
    loss = loss_token + loss_box + loss_centerness
    added = hierarchy_losses(token_logits, predicted, targets, batch, config, totals)
    for term in added.values():
        loss += term
    return {
        "loss": loss,
        "loss_token": loss_token,
        "loss_box": loss_box,
        "loss_centerness": loss_centerness,
        "num_positives": counted.num_positives,
        **added,
    }
