"""How far the outlines of regions overlap, and one outline made of several. Masks are compared without decoding."""

from collections.abc import Iterable, Sequence

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines.schema import Region

_ROWS = 512  # of the matrix of overlaps at once
_CUT_OUT = 0.01  # share of a mask below which another one excludes it


def measure_boxes(regions: Sequence[Region]) -> np.ndarray:
    """Returns float64[K, 4]: the boxes of the masks, half-open, or of the regions that have none."""
    boxes = np.asarray([region.box for region in regions], np.float64).reshape(-1, 4)
    masked = [k for k, region in enumerate(regions) if region.mask]
    if masked:
        corners = coco_mask.toBbox([regions[k].mask for k in masked])  # type: ignore[arg-type]  # x y width height
        boxes[masked] = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1)
    return boxes


def _measure_areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def _count_pixels(masks: Sequence[dict]) -> np.ndarray:
    # pycocotools 2.0.11 fails on more than 255 masks at once under NumPy 2.
    parts = [coco_mask.area(list(masks[k : k + 255])) for k in range(0, len(masks), 255)]  # type: ignore[arg-type]
    return np.concatenate(parts).astype(np.float64)


def _share_boxes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Areas that boxes [R, 4] and [C, 4] have in common, float64[R, C]."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return np.prod(np.maximum(sides, 0), axis=-1)


def find_overlaps(
    regions: Sequence[Region], boxes: np.ndarray, groups: np.ndarray, least: float, least_across: float
) -> list[tuple[int, int, float]]:
    """Returns (i, j, IoU) of the pairs i < j whose IoU is large enough.

    It is the masks' where both have one, else the boxes'. Masks are compared only where boxes and areas allow it.

    Args:
        regions: K of them.
        boxes: float64[K, 4], their `measure_boxes`.
        groups: int[K].
        least: IoU of pairs of one group.
        least_across: IoU of pairs of two groups.
    """
    if len(regions) < 2:
        return []
    box_areas = _measure_areas(boxes)
    areas = box_areas.copy()
    masked = np.asarray([region.mask is not None for region in regions])
    if masked.any():
        areas[masked] = _count_pixels([region.mask for region in regions if region.mask])
    found = []
    for start in range(0, len(regions), _ROWS):
        rows = slice(start, start + _ROWS)
        shared = _share_boxes(boxes[rows], boxes)
        by_boxes = shared / np.maximum(box_areas[rows, None] + box_areas - shared, 1e-9)
        # Masks cannot share more than their boxes do, nor more than the smaller of them.
        most = np.minimum(shared, np.minimum(areas[rows, None], areas))
        bound = most / np.maximum(areas[rows, None] + areas - most, 1e-9)
        both = masked[rows, None] & masked
        needed = np.where(groups[rows, None] == groups, least, least_across)
        for row, column in np.argwhere(np.where(both, bound, by_boxes) >= needed).tolist():
            i, j = row + start, column
            if i >= j:
                continue
            iou = by_boxes[row, column]
            if both[row, column]:
                iou = coco_mask.iou([regions[i].mask], [regions[j].mask], [0])[0, 0]  # type: ignore[arg-type]
            if iou >= needed[row, column]:
                found.append((i, j, float(iou)))
    return found


def measure_inside(
    inner: Sequence[Region], outer: Sequence[Region], boxes: np.ndarray, outer_boxes: np.ndarray
) -> np.ndarray:
    """Returns float64[len(inner)]: the share of each inner outline that the outer ones cover together, at most 1.

    It is the masks' where all have one, else the boxes' (`measure_boxes` of both). Label maps cut the inner structure
    out of the outer one: where the masks have nothing in common the boxes count.
    """
    shares = np.zeros(len(inner))  # by masks
    masked = [k for k, region in enumerate(inner) if region.mask]
    if masked and all(region.mask for region in outer):
        # COCO's measure for crowds: what is shared over the area of the first.
        overlaps = coco_mask.iou(
            [inner[k].mask for k in masked],  # type: ignore[arg-type]
            [region.mask for region in outer],  # type: ignore[arg-type]
            [1] * len(outer),
        )
        shares[masked] = np.asarray(overlaps).reshape(len(masked), len(outer)).sum(axis=1)
    apart = shares < _CUT_OUT
    if apart.any():
        by_boxes = _share_boxes(boxes, outer_boxes).sum(axis=1) / np.maximum(_measure_areas(boxes), 1e-9)
        shares[apart] = by_boxes[apart]
    return np.minimum(shares, 1)


def join_pairs(pairs: Iterable[tuple[int, int, float]]) -> list[list[int]]:
    """Returns the sets of positions that hang together by pairs (i, j, IoU), each sorted, by their first."""
    leader: dict[int, int] = {}

    def find(k: int) -> int:
        while leader.setdefault(k, k) != k:
            leader[k] = k = leader[leader[k]]
        return k

    for i, j, _ in pairs:
        first, second = sorted((find(i), find(j)))
        leader[second] = first
    sets: dict[int, list[int]] = {}
    for k in sorted(leader):
        sets.setdefault(find(k), []).append(k)
    return list(sets.values())


def combine(regions: Sequence[Region], rule: str) -> tuple[np.ndarray, dict | None] | None:
    """Makes one outline of several.

    Args:
        regions: of one structure.
        rule: "union", "intersection" or "majority", of the masks if there are any, else of the boxes.

    Returns:
        (box float32[4], mask or None), or None where nothing is left.
    """
    masks = [region.mask for region in regions if region.mask]
    if not masks:
        boxes = np.stack([region.box for region in regions]).astype(np.float32)
        low, high = {
            "union": (boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)),
            "intersection": (boxes[:, :2].max(axis=0), boxes[:, 2:].min(axis=0)),
            "majority": (np.median(boxes[:, :2], axis=0), np.median(boxes[:, 2:], axis=0)),
        }[rule]
        return (np.concatenate([low, high]).astype(np.float32), None) if (high > low).all() else None
    if rule == "majority" and len(masks) > 1:
        votes = sum(coco_mask.decode(mask).astype(np.int32) for mask in masks)  # type: ignore[arg-type]
        mask = coco_mask.encode(np.asfortranarray(2 * votes > len(masks), np.uint8))
    else:
        mask = coco_mask.merge(masks, rule == "intersection")  # type: ignore[arg-type]
    if not coco_mask.area(mask):
        return None
    x, y, width, height = coco_mask.toBbox(mask)
    return np.asarray([x, y, x + width, y + height], np.float32), dict(mask)
