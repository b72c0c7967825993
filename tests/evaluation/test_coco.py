"""Average precision: the numbers of pycocotools, normal images, crowds, phrases without ground truth."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.evaluation.coco import Detections, GroundTruth, average_precision, coco_dataset, coco_results

PHRASES = ("left lung", "right lung", "nodule", "never shown")


def truth(boxes=(), phrases=(), *, modality="xray", iscrowd=None, name="a"):
    crowd = np.zeros(len(phrases), bool) if iscrowd is None else np.array(iscrowd)
    return GroundTruth(name, modality, (100, 120), np.array(boxes, np.float32).reshape(-1, 4), tuple(phrases), crowd)


def found(boxes=(), scores=(), phrases=()):
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(phrases, int))


def random_case(seed, images=12):
    """Images with some right, some shifted and some invented detections; some images show nothing."""
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for image in range(images):
        count = rng.integers(0, 5)
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(4, 40, (count, 2))], axis=1).astype(np.float32)
        phrases = rng.integers(0, 3, count)
        truths.append(
            truth(
                boxes,
                [PHRASES[i] for i in phrases],
                modality="ct" if image % 3 else "mri",
                iscrowd=rng.random(count) < 0.1,
                name=str(image),
            )
        )
        extra = rng.integers(0, 4)
        corners = rng.uniform(0, 60, (extra, 2))
        invented = np.concatenate([corners, corners + rng.uniform(4, 40, (extra, 2))], axis=1)
        moved = boxes + rng.normal(0, 3, boxes.shape)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        detections.append(
            found(
                np.concatenate([moved, invented]),
                rng.random(count + extra).round(1),
                np.concatenate([phrases, rng.integers(0, 4, extra)]),
            )
        )
    return truths, detections


def by_pycocotools(truths, detections):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = coco_dataset(truths, PHRASES)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(coco_results(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_pycocotools(seed):
    truths, detections = random_case(seed)
    ours, theirs = average_precision(truths, detections, PHRASES), by_pycocotools(truths, detections)
    np.testing.assert_allclose([ours["AP"], ours["AP50"], ours["AP75"]], theirs.stats[:3], rtol=1e-12)
    for place, phrase in enumerate(PHRASES[:3]):
        precision = theirs.eval["precision"][:, :, place, 0, 2]
        assert ours["per_class"][phrase]["AP"] == pytest.approx(precision.mean(), rel=1e-12)
        assert ours["per_class"][phrase]["AP50"] == pytest.approx(precision[0].mean(), rel=1e-12)


def test_a_modality_is_scored_as_if_it_were_alone():
    truths, detections = random_case(2)
    result = average_precision(truths, detections, PHRASES)["per_modality"]
    for modality in ("ct", "mri"):
        kept = [i for i, known in enumerate(truths) if known.modality == modality]
        alone = by_pycocotools([truths[i] for i in kept], [detections[i] for i in kept])
        assert result[modality]["AP"] == pytest.approx(alone.stats[0], rel=1e-12)
        assert result[modality]["AP50"] == pytest.approx(alone.stats[1], rel=1e-12)
        assert result[modality]["images"] == len(kept)


@given(st.integers(0, 2**32 - 1))
def test_the_truth_found_again_scores_one(seed):
    truths, _ = random_case(seed, images=4)
    detections = [
        found(known.boxes, np.ones(len(known.phrases)), [PHRASES.index(p) for p in known.phrases]) for known in truths
    ]
    result = average_precision(truths, detections, PHRASES)
    if any((~known.iscrowd).any() for known in truths):
        assert result["AP"] == pytest.approx(1) and result["AP75"] == pytest.approx(1)
    else:
        assert result["AP"] is None


def test_a_false_box_on_a_normal_image_costs():
    box = [10, 10, 30, 30]
    truths = [truth([box], ["nodule"]), truth(name="normal")]
    right = found([box], [0.5], [2])
    assert average_precision(truths, [right, found()], PHRASES)["AP50"] == pytest.approx(1)
    assert average_precision(truths, [right, found([box], [0.9], [2])], PHRASES)["AP50"] == pytest.approx(0.5)


def test_a_phrase_that_no_image_shows_has_no_score_and_no_weight():
    box = [10, 10, 30, 30]
    result = average_precision([truth([box], ["nodule"])], [found([box, box], [0.5, 0.9], [2, 3])], PHRASES)
    assert result["AP"] == pytest.approx(1)
    assert result["per_class"]["never shown"] == {"AP": None, "AP50": None, "count": 0}


def test_a_detection_in_a_crowd_is_neither_right_nor_wrong():
    truths = [truth([[0, 0, 50, 50], [60, 60, 90, 90]], ["nodule"] * 2, iscrowd=[True, False])]
    detections = [found([[5, 5, 20, 20], [60, 60, 90, 90]], [0.9, 0.5], [2, 2])]
    result = average_precision(truths, detections, PHRASES)
    assert result["AP"] == pytest.approx(1) and result["per_class"]["nodule"]["count"] == 1


def test_nothing_known_and_nothing_found_has_no_score():
    result = average_precision([truth()], [found()], PHRASES)
    assert (result["AP"], result["AP50"], result["AP75"], result["images"]) == (None, None, None, 1)
    assert result["per_modality"]["xray"] == {"AP": None, "AP50": None, "images": 1}


def test_a_phrase_outside_the_list_names_the_image():
    with pytest.raises(ValueError, match="image scan7 shows 'cyst'"):
        average_precision([truth([[0, 0, 5, 5]], ["cyst"], name="scan7")], [found()], PHRASES)


def test_images_and_detections_must_be_as_many():
    with pytest.raises(ValueError, match="2 images but the detections of 1"):
        average_precision([truth(), truth()], [found()], PHRASES)
