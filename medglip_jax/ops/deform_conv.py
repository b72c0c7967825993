"""Modulated deformable convolutions (DCNv2, arXiv 1811.11168) of 3 x 3 over the levels of a feature pyramid, NHWC."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medglip_jax.ops.widening import spread

Array = jax.Array

_FRAME = 2  # rows and columns of zeros around a level: a 2 x 2 read that touches it, or just misses it, stays inside


class Reading(NamedTuple):
    """One convolution of one level.

    Attributes:
        level: index of the level that is read, [B, H, W, C].
        offsets: float[B, h, w, 18], (y, x) by which each tap moves, in pixels of that level; taps in row-major order.
        mask: [B, h, w, 9], the weight of each tap.
        stride: pixels of the level between pixels of the output; the padding is 1.
    """

    level: int
    offsets: Array
    mask: Array
    stride: int = 1


def sampling_positions(offsets: Array, stride: int) -> Array:
    """Where the taps of each output pixel read: float[B, h, w, 9, 2], (y, x), from offsets [B, h, w, 18]."""
    b, h, w, _ = offsets.shape
    taps = np.stack(np.divmod(np.arange(9), 3), axis=-1) - 1  # [9, 2]
    centres = np.stack(np.meshgrid(np.arange(h) * stride, np.arange(w) * stride, indexing="ij"), axis=-1)  # [h, w, 2]
    return jnp.asarray(centres[:, :, None] + taps, offsets.dtype) + offsets.reshape(b, h, w, 9, 2)


def deform_convs(levels: Sequence[Array], groups: Sequence[tuple[Array, Sequence[Reading]]]) -> list[list[Array]]:
    """Deformable convolutions of a pyramid, all of them in one loop over the nine taps.

    The levels lie in one buffer, so that a tap is one gather for every reading together, and one matrix product for
    each kernel. Each tap is recomputed in the backward pass: the temporaries are those of a single tap. Compared with
    a loop for every reading, a train step compiles four times faster on a CPU (13 loops of a tower block become one).

    Args:
        levels: maps [B, H, W, C] of one C and dtype.
        groups: pairs of a kernel [3, 3, C, D] and the readings that it serves.

    Returns:
        For each group, for each reading, [B, h, w, D], without bias.
    """
    batch, channels = levels[0].shape[0], levels[0].shape[-1]
    frame = ((0, 0), (_FRAME, _FRAME), (_FRAME, _FRAME), (0, 0))
    buffer = jnp.concatenate([jnp.pad(x, frame).reshape(batch, -1, channels) for x in levels], axis=1)  # [B, T, C]
    lengths = [(x.shape[1] + 2 * _FRAME) * (x.shape[2] + 2 * _FRAME) for x in levels]
    starts = np.cumsum([0, *lengths])

    corners, rows, fractions, masks = [], [], [], []
    for _, readings in groups:
        for reading in readings:
            height, width = levels[reading.level].shape[1:3]
            positions = sampling_positions(reading.offsets, reading.stride).reshape(batch, -1, 9, 2)  # [B, p, 9, 2]
            # Further out everything is zero; the frame is reached half a pixel earlier than its last full patch.
            positions = jnp.clip(positions, -1.5, jnp.asarray([height + 0.5, width + 0.5], positions.dtype))
            corner = jnp.floor(positions)
            row, column = jnp.moveaxis(corner.astype(jnp.int32) + _FRAME, -1, 0)
            row_length = width + 2 * _FRAME
            corners.append(int(starts[reading.level]) + row * row_length + column)
            rows.append(np.full((positions.shape[1], 1), row_length, np.int32))
            fractions.append((positions - corner).astype(buffer.dtype))
            masks.append(reading.mask.reshape(batch, -1, 9))

    def by_tap(parts: list[Array]) -> Array:  # [B, p, 9, ...] of all readings -> [9, B, P, ...]
        return jnp.moveaxis(jnp.concatenate(parts, axis=1), 2, 0)

    corner = by_tap(corners)
    next_row = jnp.asarray(np.concatenate(rows)[:, 0])  # [P]
    kernels = [kernel.reshape(9, channels, -1) for kernel, _ in groups]
    sizes = [sum(reading.offsets.shape[1] * reading.offsets.shape[2] for reading in readings) for _, readings in groups]
    group_ends = np.cumsum(sizes)[:-1]

    # One pixel at a time: of a patch of pixels, the backward pass would be a scatter that a TPU runs patch by patch.
    def read(pixels: Array, index: Array) -> Array:  # [T, C], int32[P] -> [P, C]
        return pixels.at[index].get(mode="promise_in_bounds")

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tap(totals: list[Array], inputs: tuple[Array, Array, Array, list[Array]]) -> tuple[list[Array], None]:
        index, fraction, weight, matrices = inputs  # [B, P], [B, P, 2], [B, P], each [C, D]
        patch = jnp.concatenate([index, index + 1, index + next_row, index + next_row + 1], axis=1)
        values = jax.vmap(read)(buffer, patch)
        top_left, top_right, bottom_left, bottom_right = jnp.split(values, 4, axis=1)  # [B, P, C]
        fy, fx = spread(fraction[..., :1], top_left.shape), spread(fraction[..., 1:], top_left.shape)
        left = top_left * (1 - fy) + bottom_left * fy
        right = top_right * (1 - fy) + bottom_right * fy
        value = (left * (1 - fx) + right * fx) * spread(weight[..., None], left.shape)
        parts = jnp.split(value, group_ends, axis=1)
        return [total + part @ matrix for total, part, matrix in zip(totals, parts, matrices, strict=True)], None

    totals = [
        jnp.zeros((batch, size, kernel.shape[-1]), buffer.dtype) for size, kernel in zip(sizes, kernels, strict=True)
    ]
    totals, _ = jax.lax.scan(tap, totals, (corner, by_tap(fractions), by_tap(masks), kernels))

    outputs = []
    for total, (_, readings) in zip(totals, groups, strict=True):
        shapes = [reading.offsets.shape[1:3] for reading in readings]
        parts = jnp.split(total, np.cumsum([h * w for h, w in shapes])[:-1], axis=1)
        outputs.append([part.reshape(batch, h, w, -1) for part, (h, w) in zip(parts, shapes, strict=True)])
    return outputs


def deform_conv_reference(x: Array, reading: Reading, kernel: Array) -> Array:
    """One convolution of `deform_convs` written as its definition: four clipped reads a tap, all taps at once.

    Args:
        x: [B, H, W, C], the level that is read.
        reading: its `level` is not used.
        kernel: [3, 3, C, D].

    Returns:
        [B, h, w, D], without bias.
    """
    b, height, width, _ = x.shape
    positions = sampling_positions(reading.offsets, reading.stride)  # [B, h, w, 9, 2]
    corner = jnp.floor(positions)
    values = jnp.zeros((*positions.shape[:-1], x.shape[-1]), x.dtype)
    for corner_offset in np.ndindex(2, 2):
        yx = corner + jnp.asarray(corner_offset, corner.dtype)
        weight = jnp.prod(1 - jnp.abs(positions - yx), axis=-1)
        row, column = jnp.moveaxis(yx.astype(jnp.int32), -1, 0)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        images = jnp.arange(b)[:, None, None, None]
        read = x[images, jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
        values += read * jnp.where(inside, weight, 0)[..., None]
    return jnp.einsum("bhwkc,bhwk,kcd->bhwd", values, reading.mask, kernel.reshape(9, *kernel.shape[2:]))
