"""Masks from the model's grid to the pixels of an image, as COCO run lengths."""

from typing import Any, TypeAlias

import cv2
import numpy as np

from medglip_jax.detection.masks import MASK_STRIDE

Rle: TypeAlias = dict[str, Any]  # {"size": [h, w], "counts": bytes}, COCO's compressed run lengths


def grow_boxes(boxes: np.ndarray, margin: float) -> np.ndarray:
    """Returns boxes [n, 4] with `margin` of their width and height added at each side."""
    boxes = np.asarray(boxes, np.float64)
    added = margin * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    return boxes + added * [-1, -1, 1, 1]


def encode_crop(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """Encodes a mask of which a part is given; takes the time of the part, not of the image.

    Args:
        mask: bool[h, w], all that is inside.
        corner: (row, column) of its first pixel in the image.
        size: (height, width) of the image.
    """
    from pycocotools import mask as coco_mask

    padded = np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1)))  # [w, h + 2]: run lengths go down the columns
    steps = np.diff(padded, axis=1)  # [w, h + 1]
    ends = []
    for sign in (1, -1):
        columns, rows = np.nonzero(steps == sign)
        ends.append((corner[1] + columns) * size[0] + corner[0] + rows)
    starts, stops = ends
    joined = starts[1:] == stops[:-1]  # where the part is as high as the image, a run goes on in the next column
    starts, stops = starts[np.append(True, ~joined)[: len(starts)]], stops[np.append(~joined, True)[: len(stops)]]
    turns = np.stack([starts, stops], axis=1).ravel()
    counts = np.diff(turns, prepend=0, append=size[0] * size[1]).tolist()
    if counts[-1] == 0:  # as pycocotools writes them
        counts.pop()
    return dict(coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size))  # pyright: ignore


def decode(rle: Rle) -> np.ndarray:
    """Returns bool[h, w]."""
    from pycocotools import mask as coco_mask

    return coco_mask.decode(rle) > 0  # pyright: ignore[reportArgumentType]


def count_pixels(rle: Rle) -> int:
    """Returns the area of a mask."""
    from pycocotools import mask as coco_mask

    return int(coco_mask.area(rle))  # pyright: ignore[reportArgumentType]


def to_text(rle: Rle) -> Rle:
    """Returns run lengths that JSON can hold, and that pycocotools reads."""
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def encode_logits(logits: np.ndarray, scale: np.ndarray, size: tuple[int, int], limits: Any = None) -> Rle:
    """Resizes logits to an image and encodes what is above 0.

    Args:
        logits: [h, w] on the grid of every fourth canvas pixel.
        scale: (y, x), canvas pixels per pixel of the image.
        size: (height, width) of the image.
        limits: x0 y0 x1 y1 in pixels of the image: the mask ends there; None is the whole image.

    Returns:
        A mask of the image's size.
    """
    height, width = size
    y0, x0, y1, x1 = 0, 0, height, width
    if limits is not None:
        x0, y0 = (max(int(np.floor(value)), 0) for value in limits[:2])
        x1, y1 = (min(int(np.ceil(value)), most) for value, most in zip(limits[2:], (width, height), strict=True))
    per_pixel = np.asarray(scale, np.float64) / MASK_STRIDE
    rows, columns = (np.flatnonzero(np.any(logits > 0, axis=axis)) for axis in (1, 0))
    if len(rows):  # nothing is inside farther than a cell from what is above 0
        y0, x0 = (
            max(start, int((found[0] - 0.5) / share))
            for start, found, share in zip((y0, x0), (rows, columns), per_pixel, strict=True)
        )
        y1, x1 = (
            min(end, int(np.ceil((found[-1] + 1.5) / share)))
            for end, found, share in zip((y1, x1), (rows, columns), per_pixel, strict=True)
        )
    if not len(rows) or y1 <= y0 or x1 <= x0:
        return encode_crop(np.zeros((0, 0), bool), (0, 0), size)
    (y_scale, x_scale) = per_pixel
    # From the centre of each pixel of the part to its place on the grid.
    places = np.asarray(
        [[x_scale, 0, (x0 + 0.5) * x_scale - 0.5], [0, y_scale, (y0 + 0.5) * y_scale - 0.5]], np.float64
    )
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    resized = cv2.warpAffine(
        logits.astype(np.float32), places, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    return encode_crop(resized > 0, (y0, x0), size)
