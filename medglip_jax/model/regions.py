"""Features of boxes from the pyramid, with static shapes and without gathers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array

_FIRST_STRIDE = 8  # pixels of the finest level; each coarser one has twice as many
_CANONICAL = 224.0  # pixels, side of a box that belongs to stride 16 (FPN, arXiv 1612.03144, equation 1)
_CANONICAL_LEVEL = 1


def box_levels(boxes: Array, count: int) -> Array:
    """Returns from which of `count` levels each box takes its feature, by its size: [..., 4] -> int32[...].

    Args:
        boxes: x0 y0 x1 y1 in pixels, half-open.
        count: of levels, strides 8, 16, 32 ...
    """
    area = jnp.prod(jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)
    level = _CANONICAL_LEVEL + jnp.floor(jnp.log2(jnp.sqrt(jnp.maximum(area, 1)) / _CANONICAL + 1e-8))
    return jnp.clip(level, 0, count - 1).astype(jnp.int32)


def _axis_weights(first: Array, last: Array, size: int, stride: int, samples: int) -> Array:
    """Returns the weight of each of `size` cells in the mean of samples between two places: [...] -> [..., size]."""
    steps = (jnp.arange(samples) + 0.5) / samples
    at = (first[..., None] + steps * (last - first)[..., None]) / stride - 0.5  # in cells, 0 the middle of the first
    at = jnp.clip(at, 0, size - 1)
    hats = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(size)), 0)  # [..., samples, size]
    return hats.mean(axis=-2)


def pool_regions(levels: Sequence[Array], boxes: Array, samples: int) -> Array:
    """Returns the mean of bilinear samples of each box, spread over it evenly, on the level of its size.

    It is RoIAlign (arXiv 1703.06870) with one sample a bin, averaged over the bins. Such a mean is a product of two
    sums, one over rows and one over columns, so it is computed as two products of matrices on every level, of which
    those of the other levels are 0.

    Args:
        levels: [B, h, w, C] of strides 8, 16, 32 ...
        boxes: float32[B, R, 4], x0 y0 x1 y1 in pixels, half-open.
        samples: along each axis of a box.

    Returns:
        float32[B, R, C].
    """
    x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)  # [B, R]
    chosen = box_levels(boxes, len(levels))
    total = jnp.zeros((*boxes.shape[:2], levels[0].shape[-1]), jnp.promote_types(levels[0].dtype, jnp.float32))
    for number, features in enumerate(levels):
        stride = _FIRST_STRIDE * 2**number
        rows = _axis_weights(y0, y1, features.shape[1], stride, samples) * (chosen == number)[..., None]  # [B, R, h]
        columns = _axis_weights(x0, x1, features.shape[2], stride, samples)  # [B, R, w]
        rows, columns = rows.astype(features.dtype), columns.astype(features.dtype)
        bands = jnp.einsum("brh,bhwc->brwc", rows, features)
        total += jnp.einsum("brw,brwc->brc", columns, bands, preferred_element_type=total.dtype)
    return total
