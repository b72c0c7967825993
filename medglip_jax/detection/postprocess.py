"""From dense outputs to the boxes of each phrase (mmdetection's ATSSVLFusionHead, with static shapes)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.anchors import decode_boxes, make_anchors
from medglip_jax.detection.boxes import as_float, clip, half_open, inclusive
from medglip_jax.ops.nms import nms


def phrase_scores(token_logits: jax.Array, phrase_map: jax.Array) -> jax.Array:
    """Returns each anchor's score for each phrase: the mean of the sigmoid over the phrase's tokens.

    Args:
        token_logits: float[..., N, L].
        phrase_map: [..., K, L], above 0 on the tokens of phrase k.

    Returns:
        float[..., N, K] in 0 to 1; 0 for a phrase without tokens.
    """
    tokens = (phrase_map > 0).astype(token_logits.dtype)
    weights = tokens / jnp.maximum(tokens.sum(axis=-1, keepdims=True), 1)
    return jnp.einsum("...nl,...kl->...nk", jax.nn.sigmoid(token_logits), weights, precision=jax.lax.Precision.HIGHEST)


def raise_broader(scores: jax.Array, kinds: jax.Array) -> jax.Array:
    """Returns scores in which that of a broader phrase is at least that of each of its kinds, at the same anchor.

    Args:
        scores: float[N, K].
        kinds: int32[Q, 2], phrase and broader phrase of each pair; kinds of kinds are pairs of their own.
    """
    return scores.at[:, kinds[:, 1]].max(scores[:, kinds[:, 0]])


def _detect_one(
    scores: jax.Array,
    deltas: jax.Array,
    centerness: jax.Array,
    image_size: jax.Array,
    *,
    anchors: jax.Array,
    level_sizes: tuple[int, ...],
    config: ConfigDict | FrozenConfigDict,
    with_anchors: bool,
) -> dict[str, jax.Array]:
    """Detects in one image; scores [N, K] are 0 for padded phrases, deltas [N, 4], centerness [N] (logits)."""
    num_phrases = scores.shape[1]
    top_scores, top_pairs, start = [], [], 0
    for size in level_sizes:
        flat = scores[start : start + size].reshape(-1)
        best, pairs = jax.lax.top_k(flat, min(config.pre_nms, flat.shape[0]))
        top_scores.append(best)
        top_pairs.append(start * num_phrases + pairs)
        start += size
    phrase_score, pairs = jnp.concatenate(top_scores), jnp.concatenate(top_pairs)  # [C]
    anchor, phrase = pairs // num_phrases, pairs % num_phrases

    corners = inclusive(decode_boxes(anchors[anchor], deltas[anchor]))
    corners = clip(corners, image_size - 1)  # to the last pixel
    score = jnp.sqrt(phrase_score * jax.nn.sigmoid(centerness[anchor]))
    valid = (phrase_score > config.score_threshold) & jnp.all(corners[:, 2:] > corners[:, :2], axis=-1)
    kept = nms(corners, score, phrase, valid, iou_threshold=config.nms_iou, max_output=config.max_detections)

    empty = kept < 0
    found = {"anchors": jnp.where(empty, -1, anchor[kept].astype(jnp.int32))} if with_anchors else {}
    return found | {
        "boxes": jnp.where(empty[:, None], 0, half_open(corners)[kept]),
        "scores": jnp.where(empty, 0, score[kept]),
        "phrases": jnp.where(empty, -1, phrase[kept].astype(jnp.int32)),
    }


def detect(
    outputs: Mapping[str, jax.Array],
    image_size: jax.Array,
    phrase_map: jax.Array,
    phrase_valid: jax.Array,
    config: ConfigDict | FrozenConfigDict,
    *,
    canvas: tuple[int, int],
    phrase_kinds: jax.Array | None = None,
    with_anchors: bool = False,
) -> dict[str, jax.Array]:
    """Finds the boxes of each phrase in each image of a batch; static shapes, for use inside jit.

    On each level the best `pre_nms` pairs of anchor and phrase whose phrase score exceeds `score_threshold` are
    candidates. Their score is then sqrt(phrase score * centerness). Decoded corners, inclusive (see `boxes`), are
    clipped to the first and last pixel of the image; those that coincide in x or y go; NMS runs within each phrase on
    these corners. What is left gets 1 added to its far corner, which makes it half-open: exactly the boxes that
    mmdetection returns.

    On a mesh, call this inside `jax.shard_map` over the batch: images do not depend on each other, but XLA would gather
    all of them for `top_k` (jax 0.10 on CPU).

    A phrase that is asked in one of several prompts needs no more than this: the detections of the prompts, put
    together and cut to the `max_detections` best, are those of one prompt with all the phrases.

    Args:
        outputs: the detector's token_logits [B, N, L], box_deltas [B, N, 4] and centerness [B, N] (logits).
        image_size: int[B, 2], height and width in canvas pixels of what is not padding.
        phrase_map: [K, L] or [B, K, L], above 0 on the tokens of phrase k; K is at least 1.
        phrase_valid: bool[K] or [B, K], False for padding, which is never detected.
        config: `config.detection` of a recipe.
        canvas: height and width in pixels of the images that the model saw (static).
        phrase_kinds: int32[B, Q, 2], pairs for `raise_broader`; None leaves the scores as they are.
        with_anchors: return the anchor of each detection too.

    Returns:
        boxes [B, D, 4] (half-open canvas pixels inside image_size), scores [B, D] and phrases int32[B, D] (row of
        phrase_map), best first, D = max_detections; empty places hold zeros and phrase -1. Boxes and scores are
        float32, or float64 where the outputs are. If asked for, anchors int32[B, D], -1 for empty places.

    Raises:
        ValueError: the outputs do not have the number of anchors that the canvas gives.
    """
    token_logits, deltas, centerness = (as_float(outputs[k]) for k in ("token_logits", "box_deltas", "centerness"))
    all_anchors, level_sizes = make_anchors(*canvas, config.strides, config.anchor_scale)
    batch_size, num_anchors, num_tokens = token_logits.shape
    if num_anchors != len(all_anchors):
        raise ValueError(
            f"detect: token_logits have {num_anchors} anchors, but a canvas of {canvas[0]}x{canvas[1]} pixels with "
            f"strides {tuple(config.strides)} has {len(all_anchors)}; give the canvas that the model saw."
        )
    num_phrases = phrase_map.shape[-2]
    phrase_map = jnp.broadcast_to(phrase_map, (batch_size, num_phrases, num_tokens))
    phrase_valid = jnp.broadcast_to(phrase_valid, (batch_size, num_phrases))
    scores = phrase_scores(token_logits, phrase_map) * phrase_valid[:, None]
    if phrase_kinds is not None:
        scores = jax.vmap(raise_broader)(scores, phrase_kinds)
    anchors = jnp.asarray(all_anchors, deltas.dtype)
    detect_one = functools.partial(
        _detect_one, anchors=anchors, level_sizes=level_sizes, config=config, with_anchors=with_anchors
    )
    return jax.vmap(detect_one)(scores, deltas, centerness, jnp.asarray(image_size))
