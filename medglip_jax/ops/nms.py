"""Greedy non-maximum suppression with static shapes."""

import jax
import jax.numpy as jnp

from medglip_jax.detection.boxes import iou


def nms(
    boxes: jax.Array, scores: jax.Array, classes: jax.Array, valid: jax.Array, *, iou_threshold: float, max_output: int
) -> jax.Array:
    """Keeps the best boxes, each unless it overlaps a better kept one of its class.

    Exact: box by box it takes the best score that is left and strikes out what overlaps it, which is the greedy
    algorithm stopped after `max_output` boxes. That costs max_output passes over N boxes instead of N times N overlaps,
    and no sort. Works under jit; use `jax.vmap` for a batch.

    Args:
        boxes: float[N, 4], x0 y0 x1 y1; overlap is `iou` of these corners as they are.
        scores: float[N], finite.
        classes: int[N]; boxes of different classes never touch each other.
        valid: bool[N], False for boxes that do not take part.
        iou_threshold: a box goes when its IoU with a kept one is above this.
        max_output: D, the most boxes to keep.

    Returns:
        int32[D]: indices of the kept boxes, best first (of equal scores the lower index), -1 in the empty places.
    """

    def keep_best(left: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        best = jnp.argmax(left)
        found = left[best] > -jnp.inf
        # The best one itself is struck out by its index: a box without area does not overlap itself.
        gone = (classes == classes[best]) & (iou(boxes, boxes[best]) > iou_threshold)
        gone |= jnp.arange(left.shape[0]) == best
        return jnp.where(gone, -jnp.inf, left), jnp.where(found, best.astype(jnp.int32), -1)

    _, kept = jax.lax.scan(keep_best, jnp.where(valid, scores, -jnp.inf), length=max_output)
    return kept
