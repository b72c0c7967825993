"""Metrics of masks against numbers made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.sources.masks import encode_mask
from medglip_jax.evaluation.coco import GroundTruth
from medglip_jax.evaluation.masks import mask_metrics, overlap, phrase_masks, surface_distance_95
from medglip_jax.inference import Detections

SIZE = (20, 30)
PHRASES = ["organ", "lesion"]


def square(y, x, side):
    mask = np.zeros(SIZE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def truth(entries, *, spacing=(0.0, 0.0), crowd=(), image_id="a"):
    """entries: (phrase, mask or None)."""
    return GroundTruth(
        image_id=image_id,
        modality="ct",
        size=SIZE,
        boxes=np.array([[0, 0, 10, 10]] * len(entries), np.float32).reshape(-1, 4),
        phrases=tuple(phrase for phrase, _ in entries),
        iscrowd=np.array([i in crowd for i in range(len(entries))], bool),
        masks=tuple(None if mask is None else encode_mask(mask) for _, mask in entries),
        spacing_mm=spacing,
    )


def detections(entries, own=None):
    """entries: (place of the phrase, mask, score)."""
    return Detections(
        np.array([[0, 0, 10, 10]] * len(entries), np.float32).reshape(-1, 4),
        np.array([score for *_, score in entries], np.float32),
        np.array([place for place, *_ in entries], int),
        masks=tuple(encode_mask(mask) for _, mask, _ in entries),
        phrase_masks=None if own is None else {place: encode_mask(mask) for place, mask in own.items()},
    )


def test_a_mask_that_is_right_is_worth_all_and_a_shifted_one_what_it_covers():
    known = [truth([("organ", square(2, 2, 8))], spacing=(0.5, 2.0)), truth([("organ", square(2, 2, 8))])]
    found = [detections([(0, square(2, 2, 8), 0.9)]), detections([(0, square(2, 6, 8), 0.9)])]
    results = mask_metrics(known, found, PHRASES)
    assert results["images"] == 2 and results["pairs"] == 2 and results["missed"] == 0
    assert results["dice"] == pytest.approx((1 + 0.5) / 2) and results["iou"] == pytest.approx((1 + 1 / 3) / 2)
    assert results["hd95_mm"] == pytest.approx(0) and results["hd95_px"] == pytest.approx(4)
    assert results["AP50"] == pytest.approx(0.5, abs=0.01)  # the second one overlaps by a third
    assert results["per_phrase"].keys() == {"organ"} and results["per_phrase"]["organ"]["dice"] == results["dice"]


def test_spacing_is_per_axis():
    a, b = square(2, 2, 8), square(2, 4, 8)
    assert surface_distance_95(a, b, (0.5, 3.0)) == pytest.approx(6)
    assert surface_distance_95(a.T, b.T, (0.5, 3.0)) == pytest.approx(1)


def test_what_is_missed_counts_and_what_is_not_there_is_an_area():
    known = [truth([("organ", square(2, 2, 8))]), truth([])]
    found = [detections([]), detections([(1, square(0, 0, 6), 0.9), (0, square(0, 0, 3), 0.1)])]
    results = mask_metrics(known, found, PHRASES)
    assert results["dice"] == 0 and results["missed"] == 1 and results["hd95_px"] is None
    # Absent: a lesion in the first image, both in the second; boxes of low scores are no part of a phrase's mask.
    assert results["false_area"] == pytest.approx(36 / 600 / 3)


def test_images_that_cannot_be_judged_are_left_out():
    known = [truth([("organ", square(2, 2, 8)), ("lesion", None)]), truth([("organ", square(2, 2, 8))], crowd=(0,))]
    results = mask_metrics(known, [detections([])] * 2, PHRASES)
    assert results["images"] == 1 and results["pairs"] == 0 and results["dice"] is None


def test_a_phrase_has_the_union_of_its_boxes_and_its_own_mask_goes_first():
    known = [truth([("lesion", square(0, 0, 4)), ("lesion", square(10, 10, 4))])]
    boxes = [(1, square(0, 0, 4), 0.9), (1, square(10, 10, 4), 0.5)]
    assert mask_metrics(known, [detections(boxes)], PHRASES)["dice"] == pytest.approx(1)
    found = detections(boxes, own={1: square(0, 0, 4)})
    assert phrase_masks(found).keys() == {1}
    assert mask_metrics(known, [found], PHRASES)["dice"] == pytest.approx(2 / 3)


@given(st.integers(0, 999))
def test_overlap_is_that_of_the_pixels(seed):
    a, b = np.random.default_rng(seed).random((2, *SIZE)) < 0.3
    dice, iou = overlap(encode_mask(a), encode_mask(b))
    assert iou == pytest.approx((a & b).sum() / (a | b).sum()) and dice == pytest.approx(
        2 * (a & b).sum() / (a.sum() + b.sum())
    )
