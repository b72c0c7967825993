"""Box arithmetic on arrays of half-open boxes.

A box is (x0, y0, x1, y1) in pixels with x1 - x0 its width. GLIP descends from maskrcnn-benchmark, whose boxes name the
last pixel that they contain; mmdetection kept those corners for ATSS, the GIoU loss and NMS, and measures there a width
of x1 - x0 between them, one pixel less than the box covers. `inclusive` makes that convention visible: wherever it is
called, mmdetection's numbers need it.

All functions compute in the floating type of their inputs and broadcast over leading axes, so that
`iou(a[:, None], b[None])` is the matrix of all pairs, without a [..., 4] temporary of that size.
"""

import jax
import jax.numpy as jnp

# Least area that is divided by, in square pixels (mmdetection's bbox_overlaps).
_MIN_AREA = 1e-6


def as_float(x: jax.Array) -> jax.Array:
    """Returns `x` as float32, or as float64 where it is that: no box, score or loss is computed in less."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inclusive(boxes: jax.Array) -> jax.Array:
    """Returns half-open boxes [..., 4] with their far corner moved onto the last pixel (x1 - 1, y1 - 1)."""
    return boxes - jnp.asarray((0, 0, 1, 1), boxes.dtype)


def half_open(boxes: jax.Array) -> jax.Array:
    """Undoes `inclusive`."""
    return boxes + jnp.asarray((0, 0, 1, 1), boxes.dtype)


def area(boxes: jax.Array) -> jax.Array:
    """Returns the area [...] of boxes [..., 4] in square pixels, 0 where a corner passes the other."""
    return jnp.maximum(boxes[..., 2] - boxes[..., 0], 0) * jnp.maximum(boxes[..., 3] - boxes[..., 1], 0)


def clip(boxes: jax.Array, image_size: jax.Array) -> jax.Array:
    """Moves every corner of boxes [..., N, 4] into the image.

    Args:
        boxes: [..., N, 4], pixels.
        image_size: [..., 2], height and width in pixels.

    Returns:
        [..., N, 4]; a box that lies outside has no area left.
    """
    height, width = image_size[..., None, 0], image_size[..., None, 1]
    limit = jnp.stack([width, height, width, height], axis=-1).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limit)


def _intersection_and_union(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
    height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
    intersection = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    return intersection, jnp.maximum(area(a) + area(b) - intersection, _MIN_AREA)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the intersection over union, 0 to 1, of boxes [..., 4] that broadcast; 0 for boxes without area."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / union


def giou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the generalised IoU of boxes [..., 4] that broadcast (Rezatofighi et al., arXiv 1902.09630).

    It is the IoU less the share of the smallest enclosing box that neither covers: -1 to 1, with a gradient for boxes
    that do not meet.
    """
    intersection, union = _intersection_and_union(a, b)
    width = jnp.maximum(a[..., 2], b[..., 2]) - jnp.minimum(a[..., 0], b[..., 0])
    height = jnp.maximum(a[..., 3], b[..., 3]) - jnp.minimum(a[..., 1], b[..., 1])
    enclosing = jnp.maximum(jnp.maximum(width, 0) * jnp.maximum(height, 0), _MIN_AREA)
    return intersection / union - (enclosing - union) / enclosing
