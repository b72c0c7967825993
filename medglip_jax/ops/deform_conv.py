"""Modulated deformable convolution (DCNv2, arXiv 1811.11168) of 3 x 3, NHWC."""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def sampling_positions(offsets: Array, height: int, width: int, stride: int) -> Array:
    """Where each of the nine taps of each output pixel reads the input.

    Args:
        offsets: float[B, height, width, 18], (y, x) of each tap in input pixels, taps in row-major order.
        height, width: of the output.
        stride: of the convolution; its padding is 1.

    Returns:
        float[B, height, width, 9, 2], (y, x) in input pixels.
    """
    ky, kx = jnp.meshgrid(jnp.arange(3), jnp.arange(3), indexing="ij")
    taps = jnp.stack([ky.ravel(), kx.ravel()], axis=-1) - 1  # [9, 2]
    y, x = jnp.meshgrid(jnp.arange(height) * stride, jnp.arange(width) * stride, indexing="ij")
    centres = jnp.stack([y, x], axis=-1)[:, :, None]  # [h, w, 1, 2]
    return (centres + taps).astype(offsets.dtype) + offsets.reshape(*offsets.shape[:3], 9, 2)


def sample_bilinear(x: Array, positions: Array) -> Array:
    """Reads a feature map between its pixels; outside it everything is zero.

    Args:
        x: [B, H, W, C].
        positions: float[B, P, 2], (y, x) in pixels.

    Returns:
        [B, P, C].
    """
    _, height, width, channels = x.shape
    # A frame of two zeros makes every 2 x 2 patch that touches the image, or just misses it, a plain slice.
    framed = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    limits = jnp.asarray([height, width], positions.dtype)
    positions = jnp.clip(positions, -1.5, limits + 0.5)
    corner = jnp.floor(positions)
    fraction = (positions - corner).astype(x.dtype)

    dimensions = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(), start_index_map=(0, 1))

    def patches(image: Array, starts: Array) -> Array:  # [H + 4, W + 4, C], int32[P, 2] -> [P, 2, 2, C]
        return jax.lax.gather(image, starts, dimensions, (2, 2, channels), mode="promise_in_bounds")

    patch = jax.vmap(patches)(framed, corner.astype(jnp.int32) + 2)
    fy, fx = fraction[..., :1], fraction[..., 1:]  # [B, P, 1]
    top = patch[:, :, 0, 0] * (1 - fx) + patch[:, :, 0, 1] * fx
    bottom = patch[:, :, 1, 0] * (1 - fx) + patch[:, :, 1, 1] * fx
    return top * (1 - fy) + bottom * fy


def deform_conv(x: Array, offsets: Array, mask: Array, kernel: Array, stride: int = 1) -> Array:
    """A 3 x 3 convolution of padding 1 whose taps are moved by `offsets` and weighted by `mask`.

    One tap at a time, recomputed in the backward pass, so that the temporaries are those of a single tap.

    Args:
        x: [B, H, W, C].
        offsets: float[B, h, w, 18], (y, x) of each tap in input pixels, taps in row-major order.
        mask: [B, h, w, 9].
        kernel: [3, 3, C, D].
        stride: pixels of the input between pixels of the output; (h, w) is ceil((H, W) / stride).

    Returns:
        [B, h, w, D], without bias.
    """
    b, h, w, _ = offsets.shape
    positions = sampling_positions(offsets, h, w, stride).reshape(b, h * w, 9, 2)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tap(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        position, weight, matrix = inputs  # [B, hw, 2], [B, hw], [C, D]
        return total + (sample_bilinear(x, position) * weight[..., None]) @ matrix, None

    start = jnp.zeros((b, h * w, kernel.shape[-1]), x.dtype)
    taps = (
        jnp.moveaxis(positions, 2, 0),
        jnp.moveaxis(mask.reshape(b, h * w, 9), 2, 0),
        kernel.reshape(9, *kernel.shape[2:]),
    )
    return jax.lax.scan(tap, start, taps)[0].reshape(b, h, w, -1)


def deform_conv_reference(x: Array, offsets: Array, mask: Array, kernel: Array, stride: int = 1) -> Array:
    """`deform_conv` written as its definition: four clipped reads a tap, all taps at once. For tests."""
    b, height, width, _ = x.shape
    _, h, w, _ = offsets.shape
    positions = sampling_positions(offsets, h, w, stride)
    corner = jnp.floor(positions)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            yx = corner + jnp.asarray([dy, dx], corner.dtype)
            weight = jnp.prod(1 - jnp.abs(positions - yx), axis=-1)
            y, xx = yx[..., 0].astype(jnp.int32), yx[..., 1].astype(jnp.int32)
            inside = (y >= 0) & (y < height) & (xx >= 0) & (xx < width)
            read = x[jnp.arange(b)[:, None, None, None], jnp.clip(y, 0, height - 1), jnp.clip(xx, 0, width - 1)]
            total += read * jnp.where(inside, weight, 0)[..., None]  # [B, h, w, 9, C]
    return jnp.einsum("bhwkc,bhwk,kcd->bhwd", total, mask, kernel.reshape(9, *kernel.shape[2:]))
