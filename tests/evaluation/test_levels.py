"""Grounding by level, boxes of absent phrases, and agreement with the hierarchy, against cases counted by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.evaluation.coco import average_precision
from medglip_jax.evaluation.levels import (
    add_levels,
    broader_phrases,
    broader_truth,
    ground,
    label_phrases,
    measure_broader,
    measure_consistency,
    score_absent,
)
from tests.evaluation.test_coco import PHRASES, found, random_case, truth

TABLE = {
    "left lung": {"label": "left_lung", "granularity": "organ"},
    "right lung": {"label": "right_lung", "granularity": "organ"},
    "nodule": {"label": "lung_nodule", "granularity": "lesion"},
    "never shown": {"label": "of nobody", "granularity": "cell"},
}
LUNG, NODULE = [10, 10, 50, 90], [20, 20, 30, 30]


def levels_of(truths, detections, threshold=0.3, phrases=PHRASES, table=TABLE):
    results = average_precision(truths, detections, phrases)
    add_levels(results, truths, detections, phrases, table, threshold)
    return results


def test_the_best_box_of_a_phrase_is_compared_and_no_other():
    truths = [truth([LUNG, NODULE], ["left lung", "nodule"]), truth([NODULE, [60, 60, 70, 70]], ["nodule"] * 2)]
    shifted = [20, 20, 30, 45]  # IoU 0.4 with the nodule, and its centre outside
    detections = [found([LUNG, NODULE, shifted], [0.2, 0.4, 0.9], [0, 2, 2]), found([[60, 60, 70, 68]], [0.1], [2])]
    grounded = ground(truths, detections, PHRASES)
    assert grounded.image.tolist() == [0, 0, 1] and grounded.phrase.tolist() == [0, 2, 2]
    np.testing.assert_allclose(grounded.iou, [1, 0.4, 0.8])
    assert grounded.pointed.tolist() == [True, False, True]
    results = levels_of(truths, detections)
    assert (results["accuracy"], results["pointing"], results["grounded"]) == (2 / 3, 2 / 3, 3)
    lesion = results["per_level"]["lesion"]
    assert (lesion["accuracy"], lesion["grounded"], lesion["count"]) == (1 / 2, 2, 3)
    assert results["per_level"]["organ"]["accuracy"] == 1
    assert list(results["per_level"]) == ["organ", "lesion", "cell"]


def test_phrase_without_a_box_is_missed_and_one_with_a_crowd_is_not_asked():
    truths = [truth([LUNG, NODULE, LUNG], ["left lung", "nodule", "nodule"], iscrowd=[False, False, True])]
    grounded = ground(truths, [found()], PHRASES)
    assert (grounded.phrase.tolist(), grounded.iou.tolist(), grounded.pointed.tolist()) == ([0], [0.0], [False])


def test_absent_phrases_with_a_box_above_the_threshold_are_counted_by_phrase_and_by_image():
    truths = [
        dataclasses.replace(truth([LUNG], ["left lung"], modality="ct"), absent=("nodule", "never shown")),
        dataclasses.replace(truth(), absent=("nodule", "asked by nobody")),
        truth(),
    ]
    detections = [
        found([LUNG, NODULE, NODULE, NODULE], [0.9, 0.5, 0.2, 0.1], [0, 2, 3, 2]),
        found([NODULE], [0.3], [2]),
        found([NODULE], [0.9], [2]),
    ]
    absent = score_absent(truths, detections, PHRASES)
    assert (absent.image.tolist(), absent.phrase.tolist()) == ([0, 0, 1], [2, 3, 2])
    np.testing.assert_allclose(absent.score, [0.5, 0.2, 0.3], rtol=1e-6)
    results = levels_of(truths, detections, threshold=0.4)
    assert (results["false_phrases"], results["false_images"], results["absent"]) == (1 / 3, 1 / 2, 3)
    assert results["per_level"]["lesion"]["false_phrases"] == results["per_level"]["lesion"]["false_images"] == 1 / 2
    assert (results["per_level"]["cell"]["false_images"], results["per_level"]["organ"]["false_images"]) == (0, None)
    assert results["per_modality"]["ct"]["false_phrases"] == 1 / 2
    assert results["per_modality"]["ct"]["images"] == 1 and results["per_modality"]["xray"]["false_phrases"] == 0


def test_score_above_that_of_a_broader_phrase_at_the_same_place_is_a_violation():
    phrases = ["melanoma", "skin lesion", "skin"]
    labels = {"melanoma": "melanoma", "skin lesion": "skin_lesion", "skin": "skin"}
    other = [60, 60, 90, 90]
    detections = [
        found([NODULE, NODULE, other], [0.9, 0.9, 0.2], [0, 1, 0]),  # the third is below the threshold
        found([NODULE, [20, 20, 30, 28], other], [0.5, 0.8, 0.8], [0, 1, 1]),
        found([NODULE, other], [0.5, 0.8], [0, 1]),  # the broader box lies elsewhere
        found([NODULE, NODULE], [0.8, 0.5], [0, 1]),
    ]
    results = measure_consistency([truth()] * 4, detections, phrases, labels, 0.3)
    assert (results["score_violations"], results["pairs"]) == (2 / 4, 4)
    assert (results["outside"], results["inside"], results["held"]) == (None, None, 0)


def test_box_that_leaves_its_organ_is_outside_and_a_box_of_both_lungs_is_no_broader_one():
    phrases, labels = (
        ["left lung", "lung", "nodule"],
        {"left lung": "left_lung", "lung": "lung", "nodule": "lung_nodule"},
    )
    both = [0, 10, 50, 90]
    truths = [
        truth([both, LUNG], ["lung", "left lung"]),
        truth([LUNG], ["lung"], iscrowd=[True]),
    ]
    detections = [found([NODULE, [44, 0, 60, 20], LUNG], [0.9, 0.8, 0.9], [2, 2, 0]), found([NODULE], [0.9], [2])]
    results = measure_consistency(truths, detections, phrases, labels, 0.3)
    assert results["pairs"] == 0  # of a left lung, beside a box of both
    assert results["held"] == 3
    assert results["outside"] == 1 / 3 and results["inside"] == pytest.approx((1 + 6 * 10 / 320 + 1) / 3)


def test_broader_phrases_have_the_boxes_of_their_kinds():
    table = {
        "melanoma": {"label": "melanoma", "granularity": "lesion"},
        "mole": {"label": "nevus", "granularity": "lesion"},
        "cyst": {"label": "cyst", "granularity": "lesion"},
        "odd": {"label": "x", "granularity": "lesion"},
    }
    labels = label_phrases(list(table), table)
    broader = broader_phrases(labels)
    assert labels["mole"] == "nevus" and labels["odd"] == ""
    assert broader == {"skin lesion": "skin_lesion", "lesion": "lesion"}
    known = truth([LUNG, NODULE, LUNG], ["melanoma", "mole", "odd"], iscrowd=[False, True, False])
    wide = broader_truth(known, labels, {**broader, "cyst": "cyst", "tumor": "tumor"})
    rows = sorted(zip(wide.phrases, wide.boxes.tolist(), wide.iscrowd.tolist(), strict=True))
    assert [row for row in rows if row[0] != "tumor"] == [
        ("lesion", LUNG, False),
        ("lesion", NODULE, True),
        ("skin lesion", LUNG, False),
        ("skin lesion", NODULE, True),
    ]
    assert [row for row in rows if row[0] == "tumor"] == [("tumor", LUNG, True)]  # a melanoma may be one
    asked = [*table, *broader]
    detections = [found([LUNG, NODULE, LUNG], [0.9, 0.8, 0.7], [4, 4, 0])]
    results = measure_broader([known], detections, asked, labels, broader)
    assert results["per_class"]["skin lesion"]["AP"] == pytest.approx(1) and results["per_class"]["lesion"]["AP"] == 0
    assert results["AP50"] == pytest.approx(0.5) and results["phrases"] == 2


@given(st.integers(0, 2**32 - 1))
def test_groups_add_up_and_nothing_found_is_nothing_right(seed):
    truths, detections = random_case(seed, images=6)
    rng = np.random.default_rng(seed)
    truths = [
        dataclasses.replace(known, absent=tuple(p for p in PHRASES if p not in known.phrases and rng.random() < 0.7))
        for known in truths
    ]
    results = levels_of(truths, detections)
    for name, count in (("accuracy", "grounded"), ("pointing", "grounded"), ("false_phrases", "absent")):
        for groups in (results["per_level"], results["per_modality"]):
            assert sum(group[count] for group in groups.values()) == results[count]
            right = sum((group[name] or 0) * group[count] for group in groups.values())
            assert right == pytest.approx((results[name] or 0) * results[count])
            assert all((group[name] is None) == (group[count] == 0) for group in groups.values())
    perfect = [
        found(known.boxes, np.ones(len(known.phrases)), [PHRASES.index(p) for p in known.phrases]) for known in truths
    ]
    for answer, share in ((perfect, 1), ([found()] * 6, 0)):
        results = levels_of(truths, answer)
        assert results["accuracy"] in (share, None) and results["pointing"] in (share, None)
        assert results["false_phrases"] in (0, None)
        assert results["consistency"]["outside"] in (0, None)
