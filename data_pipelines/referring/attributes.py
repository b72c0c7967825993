"""What can be measured on one mask: size, shape and outline, in its own crop."""

import dataclasses

import cv2
import numpy as np

from data_pipelines.schema import Region

_LEAST_FOR_SHAPE = 40  # pixels of a mask, under which the pixel grid decides its shape
_MOST_POINTS = 200  # of an outline that distances are measured between


@dataclasses.dataclass(frozen=True)
class Shape:
    """Measurements of a mask.

    Attributes:
        area: pixels.
        box: float64[4], the tight box of the mask, x0 y0 x1 y1 in pixels of the image, half-open.
        center: (x, y) of its centroid in pixels of the image, where the first pixel's center is 0.5.
        share: its area over the image's.
        elongation: longer over shorter axis of the ellipse with the same second moments, 0 if it is too small to say.
        solidity: its area over that of its convex hull, 0 if it is too small to say.
        length_mm: largest distance of two of its pixels in millimetres, 0 if the spacing is unknown.
        mask: bool[h, w], the mask in its box.
        filled: the same with its holes filled.
        outline: float64[n, 2], points (x, y) of its outer border, at most 200.
    """

    area: int
    box: np.ndarray
    center: tuple[float, float]
    share: float
    elongation: float
    solidity: float
    length_mm: float
    mask: np.ndarray
    filled: np.ndarray
    outline: np.ndarray


def measure_shape(region: Region, spacing_mm: tuple[float, float] = (0.0, 0.0)) -> Shape | None:
    """Measures a region's mask; None if it has none or an empty one.

    Args:
        region: with a compressed COCO run-length encoding as `mask`.
        spacing_mm: (row, column) spacing of pixels, 0 if unknown.
    """
    from pycocotools import mask as coco_mask

    if region.mask is None:
        return None
    height, width = region.mask["size"]
    x0, y0, w, h = (round(value) for value in coco_mask.toBbox(region.mask).tolist())  # pyright: ignore
    if not w or not h:
        return None
    x1, y1 = min(x0 + w, width), min(y0 + h, height)
    mask = np.ascontiguousarray(coco_mask.decode(region.mask)[y0:y1, x0:x1])  # pyright: ignore
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros_like(mask)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    points = np.concatenate(contours).reshape(-1, 2)
    hull = cv2.convexHull(points)[:, 0]
    moments = cv2.moments(mask, binaryImage=True)
    area = int(moments["m00"])
    outline = points[:: max(1, -(-len(points) // _MOST_POINTS))] + np.asarray([x0 + 0.5, y0 + 0.5])
    return Shape(
        area=area,
        box=np.asarray([x0, y0, x1, y1], np.float64),
        center=(x0 + moments["m10"] / area + 0.5, y0 + moments["m01"] / area + 0.5),
        share=area / (height * width),
        elongation=_elongation(moments) if area >= _LEAST_FOR_SHAPE else 0.0,
        solidity=area / _hull_pixels(hull) if area >= _LEAST_FOR_SHAPE else 0.0,
        length_mm=_longest(hull, spacing_mm),
        mask=mask.astype(bool),
        filled=filled.astype(bool),
        outline=outline,
    )


def _elongation(moments: dict[str, float]) -> float:
    # A pixel is a square, not a point: it has a second moment of 1/12 of its own.
    xx, yy, xy = (moments[name] / moments["m00"] for name in ("mu20", "mu02", "mu11"))
    xx, yy = xx + 1 / 12, yy + 1 / 12
    root = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    return float(np.sqrt((xx + yy + root) / max(xx + yy - root, 1e-6)))


def _hull_pixels(hull: np.ndarray) -> float:
    """Returns the pixels of a polygon through pixel centers (Pick's theorem, about)."""
    steps = np.linalg.norm(np.roll(hull, -1, axis=0) - hull, axis=1).sum()
    return float(cv2.contourArea(hull) + steps / 2 + 1)


def _longest(hull: np.ndarray, spacing_mm: tuple[float, float]) -> float:
    row, column = spacing_mm
    if not (row > 0 and column > 0):
        return 0.0
    points = hull * np.asarray([column, row])
    between = points[:, None] - points[None]
    return float(np.sqrt((between**2).sum(-1).max())) + min(row, column)


def overlap_share(inner: Shape, outer: Shape) -> float:
    """Returns the share of a mask's pixels that lie in another mask, holes of that one included."""
    x0, y0 = np.maximum(inner.box[:2], outer.box[:2]).astype(int)
    x1, y1 = np.minimum(inner.box[2:], outer.box[2:]).astype(int)
    if x1 <= x0 or y1 <= y0:
        return 0.0
    crops = []
    for shape, mask in ((inner, inner.mask), (outer, outer.filled)):
        left, top = shape.box[:2].astype(int)
        crops.append(mask[y0 - top : y1 - top, x0 - left : x1 - left])
    return float((crops[0] & crops[1]).sum() / inner.area)


def distance(one: Shape, other: Shape) -> float:
    """Returns about the smallest distance of two outlines in pixels."""
    between = one.outline[:, None] - other.outline[None]
    return float(np.sqrt((between**2).sum(-1).min()))
