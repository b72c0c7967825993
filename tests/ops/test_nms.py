import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medglip_jax.ops.nms import nms


def plain_nms(boxes, scores, classes, valid, iou_threshold, max_output):
    """Greedy suppression in NumPy: sort, then keep what overlaps nothing kept."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if not valid[i]:
            continue
        for j in kept:
            low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i, 2:], boxes[j, 2:])
            intersection = np.prod(np.maximum(high - low, 0))
            union = np.prod(boxes[i, 2:] - boxes[i, :2]) + np.prod(boxes[j, 2:] - boxes[j, :2]) - intersection
            if classes[i] == classes[j] and intersection > iou_threshold * union:
                break
        else:
            kept.append(i)
    return np.array((kept + [-1] * max_output)[:max_output])


def random_candidates(seed, number):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 40, (number, 2))
    boxes = np.concatenate([corners, corners + rng.integers(5, 40, (number, 2))], axis=1).astype(np.float32)
    scores = rng.permutation(number).astype(np.float32) / number
    return boxes, scores, rng.integers(0, 3, number), rng.random(number) < 0.9


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.05, 0.33, 0.61]))
def test_keeps_what_the_plain_algorithm_keeps(seed, threshold):
    candidates = random_candidates(seed, 60)
    kept = jax.jit(nms, static_argnames=("iou_threshold", "max_output"))(
        *candidates, iou_threshold=threshold, max_output=20
    )
    np.testing.assert_array_equal(kept, plain_nms(*candidates, threshold, 20))


def test_more_places_than_boxes_are_left_empty():
    boxes, scores, classes, _ = random_candidates(0, 5)
    valid = np.zeros(5, bool)
    run = functools.partial(nms, iou_threshold=0.5, max_output=8)
    np.testing.assert_array_equal(run(jnp.array(boxes), jnp.array(scores), jnp.array(classes), jnp.array(valid)), -1)
    kept = np.asarray(run(jnp.array(boxes), jnp.array(scores), jnp.arange(5), jnp.ones(5, bool)))
    np.testing.assert_array_equal(kept, [*np.argsort(-scores), -1, -1, -1])


def test_overlap_at_the_threshold_is_kept():
    boxes = jnp.float32([[0, 0, 4, 4], [0, 0, 4, 2]])
    kept = nms(boxes, jnp.float32([1, 0.5]), jnp.zeros(2, int), jnp.ones(2, bool), iou_threshold=0.5, max_output=2)
    np.testing.assert_array_equal(kept, [0, 1])


@pytest.mark.parametrize("score", [0.0, 0.5])
def test_boxes_without_area_are_each_kept_once(score):
    boxes = jnp.zeros((3, 4))
    kept = nms(boxes, jnp.full(3, score), jnp.zeros(3, int), jnp.ones(3, bool), iou_threshold=0.5, max_output=5)
    np.testing.assert_array_equal(kept, [0, 1, 2, -1, -1])


def test_batch_by_vmap():
    batch = [random_candidates(seed, 30) for seed in (1, 2)]
    run = functools.partial(nms, iou_threshold=0.3, max_output=10)
    kept = jax.vmap(run)(*(jnp.stack([jnp.asarray(c[i]) for c in batch]) for i in range(4)))
    for image in range(2):
        np.testing.assert_array_equal(kept[image], plain_nms(*batch[image], 0.3, 10))
