"""From stored pixels to what the backbone expects."""

import jax
import jax.numpy as jnp

# Blue, green, red, on the scale 0 to 255 (Caffe's ImageNet mean, and the standard deviations that go with it).
PIXEL_MEAN = (103.53, 116.28, 123.675)
PIXEL_STD = (57.375, 57.12, 58.395)


def normalize_pixels(image: jax.Array, image_size: jax.Array) -> jax.Array:
    """Normalises RGB images to the backbone's BGR input; the padding becomes exactly 0, as in mmdetection.

    Args:
        image: uint8[B, H, W, 3], RGB, padded on the right and below.
        image_size: int32[B, 2], height and width of the image inside the canvas, in pixels.

    Returns:
        float32[B, H, W, 3].
    """
    pixels = (image[..., ::-1].astype(jnp.float32) - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)
    _, height, width, _ = image.shape
    inside_rows = jnp.arange(height) < image_size[:, :1]  # [B, H]
    inside_columns = jnp.arange(width) < image_size[:, 1:]  # [B, W]
    return jnp.where((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], pixels, 0.0)
