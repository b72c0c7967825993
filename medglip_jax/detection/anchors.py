"""One square anchor a cell, and the deltas that turn an anchor into a box."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# What a predicted delta is divided by (maskrcnn-benchmark's BoxCoder); released weights were trained with it.
_DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# A decoded side is at most this many times the anchor's, and at least its inverse (mmdetection clips both ends).
_MAX_SIDE_RATIO = 1000 / 16


def level_shapes(image_height: int, image_width: int, strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns (rows, columns) of each pyramid level: ceil(size / stride), as stride-2 convolutions leave them."""
    return tuple((math.ceil(image_height / stride), math.ceil(image_width / stride)) for stride in strides)


def make_anchors(
    image_height: int, image_width: int, strides: Sequence[int], scale: float
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Lays the anchors of all pyramid levels over a canvas.

    Args:
        image_height, image_width: canvas in pixels; `level_shapes` tells the rows and columns that it gives.
        strides: pixels between the cells of each level, finest first.
        scale: side of an anchor over its level's stride.

    Returns:
        (anchors, level_sizes): float32[N, 4] half-open boxes in pixels, each centred on its cell, levels one after the
        other and row-major within a level; and the number of anchors of each level, which sum to N.
    """
    levels = []
    for stride, (rows, columns) in zip(strides, level_shapes(image_height, image_width, strides), strict=True):
        y, x = np.meshgrid((np.arange(rows) + 0.5) * stride, (np.arange(columns) + 0.5) * stride, indexing="ij")
        half = 0.5 * scale * stride
        levels.append(np.stack([x - half, y - half, x + half, y + half], axis=-1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32), tuple(len(level) for level in levels)


def _centers_and_sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def encode_boxes(anchors: jax.Array, boxes: jax.Array) -> jax.Array:
    """Returns the deltas [..., 4] that `decode_boxes` turns into `boxes`.

    Args:
        anchors: [..., 4] half-open boxes in pixels.
        boxes: [..., 4] half-open boxes in pixels with an area; broadcasts against `anchors`.
    """
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    centers, sides = _centers_and_sides(boxes)
    deltas = jnp.concatenate([(centers - anchor_centers) / anchor_sides, jnp.log(sides / anchor_sides)], axis=-1)
    return deltas * jnp.asarray(_DELTA_WEIGHTS, deltas.dtype)


def decode_boxes(anchors: jax.Array, deltas: jax.Array) -> jax.Array:
    """Moves and stretches anchors by predicted deltas.

    Equals mmdetection's DeltaXYWHBBoxCoderForGLIP but for its corners: the -1 and +1 there turn the same box into
    inclusive corners (`boxes.inclusive` of this function's result).

    Args:
        anchors: [..., 4] half-open boxes in pixels.
        deltas: [..., 4] (dx, dy, dw, dh), centre shifts over the anchor's side and logarithms of the side ratio,
            times 10, 10, 5, 5; broadcasts against `anchors`.

    Returns:
        [..., 4] half-open boxes in pixels, not clipped to the image.
    """
    deltas = deltas / jnp.asarray(_DELTA_WEIGHTS, deltas.dtype)
    limit = math.log(_MAX_SIDE_RATIO)
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    centers = anchor_centers + deltas[..., :2] * anchor_sides
    half = anchor_sides * jnp.exp(jnp.clip(deltas[..., 2:], -limit, limit)) / 2
    return jnp.concatenate([centers - half, centers + half], axis=-1)
