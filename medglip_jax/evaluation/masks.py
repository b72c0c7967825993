"""How well masks agree with the known ones: average precision, overlap, and the distance of their surfaces.

Masks of images of which some region has none cannot be judged, and these images are left out. Overlaps are
pycocotools', average precision is hotcoco's, and distances are those of DeepMind's surface-distance.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from medglip_jax.evaluation.coco import GroundTruth, average_precision
from medglip_jax.inference import Detections
from medglip_jax.mask_outputs import Rle, count_pixels, decode

_UNION_SCORE = 0.3  # least score of a box whose mask is part of its phrase's, where phrases have no masks of their own
_PERCENT = 95  # of the surface's elements, as in the medical segmentation decathlon


def join_masks(masks: Sequence[Rle]) -> Rle:
    """Returns the union of masks of one size."""
    return dict(coco_mask.merge(list(masks), intersect=False))  # pyright: ignore[reportArgumentType]


def phrase_masks(found: Detections) -> dict[int, Rle]:
    """Returns the mask of each phrase that has one: its own, or else that of its boxes of at least a score of 0.3."""
    if found.phrase_masks is not None:
        return found.phrase_masks
    assert found.masks is not None
    groups: dict[int, list[Rle]] = defaultdict(list)
    for mask, phrase, score in zip(found.masks, found.phrases, found.scores, strict=True):
        if score >= _UNION_SCORE:
            groups[int(phrase)].append(mask)
    return {phrase: joined for phrase, masks in groups.items() if count_pixels(joined := join_masks(masks))}


def overlap(a: Rle, b: Rle) -> tuple[float, float]:
    """Returns (Dice, IoU) of two masks, not both empty."""
    iou = float(np.asarray(coco_mask.iou([a], [b], [0]))[0, 0])  # pyright: ignore[reportArgumentType]
    return 2 * iou / (1 + iou), iou


def surface_distance_95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    """Returns the 95 % Hausdorff distance of two masks, bool[h, w], neither empty, in the unit of `spacing` (y, x)."""
    from surface_distance import metrics  # 0.1 fails under NumPy 2 where a mask is empty, and only there

    rows, columns = (np.flatnonzero((a | b).any(axis=axis)) for axis in (1, 0))
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    distances = metrics.compute_surface_distances(a[part], b[part], spacing)
    return float(metrics.compute_robust_hausdorff(distances, _PERCENT))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def mask_metrics(
    truth: Sequence[GroundTruth], detections: Sequence[Detections], phrases: Sequence[str]
) -> dict[str, Any]:
    """Returns what masks are worth.

    Args:
        truth: one entry an image, with masks.
        detections: one entry an image, in the same order, with masks.
        phrases: what was asked for; a detection names its phrase by the place in this list.

    Returns:
        {"images": that could be judged, "AP", "AP50", "AP75": of the masks of boxes (see `average_precision`), where
        the model has any, "dice", "iou": means over all pairs of image and phrase shown in it, 0 where nothing was
        found, "hd95_mm", "hd95_px": mean 95 % Hausdorff distance over the pairs that have both masks, in images of
        known and of unknown spacing, "missed": pairs of which nothing was found, "pairs", "false_area": mean share of
        the image that is found for a phrase not shown in it, "per_phrase": {phrase: the same of it, without AP}}.
        Numbers that nothing defines are None. A phrase's mask is the union of those of its boxes; images where one of
        these is a crowd do not count for it.
    """
    kept = [i for i, known in enumerate(truth) if known.masks is not None and all(known.masks)]
    scores: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in phrases}
    for known, found in ((truth[i], detections[i]) for i in kept):
        _add_scores(scores, known, phrase_masks(found), phrases)
    results: dict[str, Any] = {"images": len(kept)}
    if kept and detections[kept[0]].masks is not None:
        found = average_precision([truth[i] for i in kept], [detections[i] for i in kept], phrases, masks=True)
        results |= {name: found[name] for name in ("AP", "AP50", "AP75")}
    everything: dict[str, list[float]] = defaultdict(list)
    for lists in scores.values():
        for name, values in lists.items():
            everything[name] += values
    results |= _summarize(everything)
    return results | {"per_phrase": {name: _summarize(lists) for name, lists in scores.items() if lists["dice"]}}


def _summarize(lists: dict[str, list[float]]) -> dict[str, Any]:
    names = ("dice", "iou", "hd95_mm", "hd95_px", "false_area")
    return {name: _mean(lists[name]) for name in names} | {"missed": sum(lists["missed"]), "pairs": len(lists["dice"])}


def _add_scores(
    scores: dict[str, dict[str, list[float]]], known: GroundTruth, found: dict[int, Rle], phrases: Sequence[str]
) -> None:
    groups: dict[str, list[int]] = defaultdict(list)
    for place, phrase in enumerate(known.phrases):
        groups[phrase].append(place)
    spacing = known.spacing_mm if min(known.spacing_mm) > 0 else (1.0, 1.0)
    distance = "hd95_mm" if min(known.spacing_mm) > 0 else "hd95_px"
    assert known.masks is not None
    for place, phrase in enumerate(phrases):
        lists, mask = scores[phrase], found.get(place)
        if phrase not in groups:
            area = 0 if mask is None else count_pixels(mask)
            lists["false_area"].append(area / (known.size[0] * known.size[1]))
            continue
        if any(known.iscrowd[i] for i in groups[phrase]):
            continue
        true = join_masks([rle for i in groups[phrase] if (rle := known.masks[i])])
        dice, iou = overlap(true, mask) if mask is not None else (0.0, 0.0)
        lists["dice"].append(dice)
        lists["iou"].append(iou)
        lists["missed"].append(mask is None)
        if mask is not None:
            lists[distance].append(surface_distance_95(decode(true), decode(mask), spacing))
