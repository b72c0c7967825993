"""Adaptive training sample selection: which anchor answers for which box (Zhang et al., arXiv 1912.02424)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from medglip_jax.detection.boxes import inclusive, iou

# An anchor's centre lies inside a box when it is farther than this from each side, in pixels.
_MIN_INSIDE = 0.01


def _nearest(distances: jax.Array, indices: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k smallest distances of each row and their indices, equal ones by rising index; both [M, C].

    A sort, where `lax.top_k` would gather all images on every device of a mesh (jax 0.10 on CPU).
    """
    distances, indices = jax.lax.sort((distances, jnp.broadcast_to(indices, distances.shape)), num_keys=2)
    return distances[:, :k], indices[:, :k]


def _nearest_cells(x: jax.Array, y: jax.Array, points: jax.Array, k: int) -> jax.Array:
    """Finds the k cells of a grid that lie nearest to each point.

    The cells wanted lie in the k nearest columns and the k nearest rows: any other cell has k cells of its own row or
    column before it. So k times k cells are compared, and not the whole grid.

    Args:
        x, y: float[columns], float[rows], centres of the columns and rows.
        points: float[M, 2].
        k: at most rows times columns.

    Returns:
        int32[M, k]: row-major numbers of the cells.
    """
    dx, columns = _nearest((points[:, :1] - x) ** 2, jnp.arange(len(x), dtype=jnp.int32), k)
    dy, rows = _nearest((points[:, 1:] - y) ** 2, jnp.arange(len(y), dtype=jnp.int32), k)
    distances = (dy[:, :, None] + dx[:, None]).reshape(len(points), -1)
    cells = (rows[:, :, None] * len(x) + columns[:, None]).reshape(len(points), -1)
    return _nearest(distances, cells, k)[1]


def assign_anchors(
    anchors: jax.Array, level_shapes: Sequence[tuple[int, int]], boxes: jax.Array, box_mask: jax.Array, topk: int
) -> jax.Array:
    """Assigns anchors to the boxes of one image as mmdetection's ATSSAssigner does; use `jax.vmap` for a batch.

    The candidates of a box are the anchors whose centres are nearest to its own, `topk` of each level (all of a level
    that has fewer). A candidate is taken when its IoU reaches the mean plus the standard deviation (unbiased) of the
    candidates' and its centre lies inside the box. An anchor that several boxes take goes to the one with the highest
    IoU. IoU is taken between inclusive corners (see `boxes`).

    No array of anchors times boxes is formed, and on a mesh nothing leaves the device that holds the image.

    Args:
        anchors: float[N, 4] half-open boxes in pixels, as `make_anchors` lays them: levels one after the other, each a
            row-major grid of centres.
        level_shapes: (rows, columns) of each level; their products sum to N.
        boxes: float[M, 4] half-open boxes in pixels.
        box_mask: bool[M], False for padding, which takes no anchor.
        topk: candidates of a box on each level.

    Returns:
        int32[N]: the anchor's box, or -1 for background.
    """
    anchors, boxes = inclusive(anchors), inclusive(boxes)
    anchor_centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    box_centers = (boxes[:, :2] + boxes[:, 2:]) / 2

    candidates, start = [], 0
    for rows, columns in level_shapes:
        grid = anchor_centers[start : start + rows * columns].reshape(rows, columns, 2)
        cells = _nearest_cells(grid[0, :, 0], grid[:, 0, 1], box_centers, min(topk, rows * columns))
        candidates.append(start + cells)
        start += rows * columns
    indices = jnp.concatenate(candidates, axis=1)  # [M, C]

    overlaps = iou(anchors[indices], boxes[:, None])  # [M, C]
    mean = jnp.mean(overlaps, axis=1, keepdims=True)
    variance = jnp.sum((overlaps - mean) ** 2, axis=1, keepdims=True) / max(indices.shape[1] - 1, 1)
    centers = anchor_centers[indices]  # [M, C, 2]
    margin = jnp.minimum(centers - boxes[:, None, :2], boxes[:, None, 2:] - centers).min(axis=-1)
    taken = (overlaps >= mean + jnp.sqrt(variance)) & (margin > _MIN_INSIDE) & box_mask[:, None]

    num_anchors, num_boxes = anchors.shape[0], boxes.shape[0]
    overlaps = jnp.where(taken, overlaps, -1)
    highest = jnp.full(num_anchors, -1, overlaps.dtype).at[indices].max(overlaps)  # [N]
    taken &= overlaps == highest[indices]
    numbers = jnp.where(taken, jnp.arange(num_boxes, dtype=jnp.int32)[:, None], num_boxes)
    # Of boxes with the same IoU the first is kept, as argmax does.
    assigned = jnp.full(num_anchors, num_boxes, jnp.int32).at[indices].min(numbers)
    return jnp.where(assigned < num_boxes, assigned, -1)
