"""Pixels, boxes and annotations on their way to a batch; training, evaluation and prediction use the same functions.

Boxes are x0 y0 x1 y1 in pixels, half-open, so that scaling and mirroring them are exact.
"""

import dataclasses
import functools

import cv2
import numpy as np
from numpy.typing import ArrayLike

from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.text import swap_sides, swap_sides_with_spans

_JPEG = b"\xff\xd8\xff"


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes an image file.

    Grey becomes three equal channels, transparent pixels black (as `data_pipelines.images` stores them), and a JPEG's
    EXIF orientation is applied. Damage inside a file may show in the pixels only; records have checksums against it.

    Returns:
        uint8[H, W, 3], RGB.

    Raises:
        ValueError: the bytes are no image, are cut short, or have more than 8 bits a channel.
    """
    jpeg = encoded.startswith(_JPEG)
    try:
        # Only IMREAD_UNCHANGED keeps alpha and 16 bits; only the others apply the orientation.
        flags = cv2.IMREAD_COLOR_RGB if jpeg else cv2.IMREAD_UNCHANGED
        pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error:  # no bytes at all, or an absurd size
        pixels = None
    if pixels is None:
        raise ValueError(f"not an image that can be decoded, or cut short ({len(encoded)} bytes)")
    if pixels.dtype != np.uint8:
        raise ValueError(f"the image has {pixels.dtype} pixels: map the window of interest to 8 bits first")
    if jpeg:
        return pixels
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.uint16)
        pixels = ((pixels[..., :3] * alpha + 127) // 255).astype(np.uint8)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def resize_into(
    image: np.ndarray, canvas: tuple[int, int], scale: float = 1.0, flip: bool = False
) -> tuple[np.ndarray, tuple[int, int], tuple[float, float]]:
    """Resizes an image into a canvas, keeping its aspect to the nearest pixel, with zeros to the right and below.

    Args:
        image: uint8[h, w, 3].
        canvas: (H, W) in pixels.
        scale: size relative to the largest that fits, above 0 and at most 1.
        flip: mirror the image, from left to right.

    Returns:
        (pixels, size, scales): uint8[H, W, 3]; the (height, width) that the image takes in it; and the canvas pixels
        per image pixel of both axes (y, x), which are exactly size over the image's size.

    Raises:
        ValueError: the image has no pixels, or the scale is not above 0 and at most 1.
    """
    height, width = image.shape[:2]
    if not height or not width:
        raise ValueError(f"the image has no pixels: its shape is {image.shape}")
    if not 0 < scale <= 1:
        raise ValueError(f"the scale must be above 0 and at most 1, where the image fills the canvas, not {scale}")
    factor = scale * min(canvas[0] / height, canvas[1] / width)
    size = tuple(
        min(max(round(factor * length), 1), limit) for length, limit in zip((height, width), canvas, strict=True)
    )
    pixels = np.zeros((*canvas, 3), np.uint8)
    inside = pixels[: size[0], : size[1]]  # the functions of OpenCV write there: copying takes as long as mirroring
    if size != (height, width):
        interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        image = cv2.resize(image, size[::-1], dst=None if flip else inside, interpolation=interpolation)
    if flip:
        cv2.flip(image, 1, dst=inside)
    elif size == (height, width):
        inside[:] = image
    return pixels, size, (size[0] / height, size[1] / width)


def scale_boxes(boxes: np.ndarray, scales: tuple[float, float]) -> np.ndarray:
    """Takes boxes [..., 4] to the pixels of a resized image; `scales` (y, x) as `resize_into` returns them."""
    y, x = scales
    return (np.asarray(boxes) * np.asarray([x, y, x, y])).astype(np.float32)


def flip_boxes(boxes: ArrayLike, width: float) -> np.ndarray:
    """Mirrors boxes [..., 4] in an image of this width."""
    boxes = np.asarray(boxes)
    return np.stack([width - boxes[..., 2], boxes[..., 1], width - boxes[..., 0], boxes[..., 3]], axis=-1)


def flip_mask(mask: dict) -> dict:
    """Mirrors a compressed COCO run-length encoding {"size": [h, w], "counts": bytes}."""
    from pycocotools import mask as coco_mask

    return dict(coco_mask.encode(np.asfortranarray(coco_mask.decode(mask)[:, ::-1])))  # pyright: ignore


def flip_annotations(example: GroundingExample) -> GroundingExample:
    """Returns what is known about an image after its pixels are mirrored; `image` itself stays as it is.

    In a mirrored chest the left lung looks and lies like a right one, so left and right change places in phrases,
    labels, parents, absent labels, and in the caption and the expressions with their spans, as boxes and masks do. What
    has no side keeps its name, and so do words such as "leftmost".
    """
    caption, spans = swap_sides_with_spans(example.caption, [region.spans for region in example.regions])
    boxes = flip_boxes([region.box for region in example.regions] or np.zeros((0, 4)), example.width)
    return dataclasses.replace(
        example,
        caption=caption,
        regions=tuple(map(_flip_region, example.regions, boxes, spans)),
        absent=tuple(swap_sides(label) for label in example.absent),
        expressions=tuple(_flip_expression(expression) for expression in example.expressions),
    )


def _flip_expression(expression: Expression) -> Expression:
    text, (spans,) = swap_sides_with_spans(expression.text, [expression.spans])
    return dataclasses.replace(expression, text=text, spans=spans)


def _flip_region(region: Region, box: np.ndarray, spans: tuple[tuple[int, int], ...]) -> Region:
    return Region(
        box=box,
        phrase=_swap_name(region.phrase),
        label=_swap_name(region.label),
        granularity=region.granularity,
        parent=_swap_name(region.parent),
        mask=region.mask and flip_mask(region.mask),
        iscrowd=region.iscrowd,
        spans=spans,
        source_label=region.source_label,
    )


_swap_name = functools.lru_cache(maxsize=65536)(swap_sides)  # names come again, sentences do not
