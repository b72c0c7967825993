import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.detection import boxes as box_ops

corner = st.floats(-500, 500, width=32)
side = st.floats(0.5, 500, width=32)
any_box = st.tuples(corner, corner, side, side).map(lambda b: np.float32([b[0], b[1], b[0] + b[2], b[1] + b[3]]))
overlaps = pytest.mark.parametrize("overlap, least", [(box_ops.iou, 0), (box_ops.giou, -1)])


@overlaps
@given(a=any_box, b=any_box)
def test_overlap_is_symmetric_and_in_range(overlap, least, a, b):
    forward, backward = overlap(jnp.array(a), jnp.array(b)), overlap(jnp.array(b), jnp.array(a))
    np.testing.assert_allclose(forward, backward, atol=1e-6)
    assert least - 1e-5 <= float(forward) <= 1 + 1e-5


@overlaps
@given(a=any_box)
def test_box_overlaps_itself_fully(overlap, least, a):
    np.testing.assert_allclose(overlap(jnp.array(a), jnp.array(a)), 1, atol=1e-6)


@overlaps
@given(a=any_box, b=any_box, shift=st.integers(-300, 300))
def test_overlap_does_not_change_when_both_boxes_move(overlap, least, a, b, shift):
    np.testing.assert_allclose(
        overlap(jnp.array(a + shift), jnp.array(b + shift)), overlap(jnp.array(a), jnp.array(b)), atol=2e-3
    )


@given(a=any_box, b=any_box)
def test_giou_is_at_most_iou(a, b):
    assert float(box_ops.giou(jnp.array(a), jnp.array(b))) <= float(box_ops.iou(jnp.array(a), jnp.array(b))) + 1e-6


def test_known_overlaps():
    a, b, far = jnp.float32([0, 0, 4, 4]), jnp.float32([2, 0, 6, 4]), jnp.float32([8, 0, 12, 4])
    np.testing.assert_allclose(box_ops.iou(a, b), 8 / 24, rtol=1e-6)
    np.testing.assert_allclose(box_ops.giou(a, b), 8 / 24, rtol=1e-6)
    np.testing.assert_allclose(box_ops.iou(a, far), 0)
    np.testing.assert_allclose(box_ops.giou(a, far), -16 / 48, rtol=1e-6)


@pytest.mark.parametrize("degenerate", [[3, 3, 3, 3], [5, 5, 2, 2], [0, 0, 0, 9]])
def test_boxes_without_area_give_finite_values_and_gradients(degenerate):
    box, other = jnp.float32(degenerate), jnp.float32([0, 0, 4, 4])
    assert float(box_ops.area(box)) == 0
    for overlap in (box_ops.iou, box_ops.giou):
        for partner in (other, box):
            value, gradient = jax.value_and_grad(overlap)(box, partner)
            assert np.isfinite(value) and np.isfinite(gradient).all()


@given(a=any_box, height=st.integers(1, 200), width=st.integers(1, 200))
def test_clipped_box_lies_in_the_image_and_clips_no_further(a, height, width):
    size = jnp.array([height, width])
    clipped = box_ops.clip(jnp.array(a)[None], size)
    assert (np.asarray(clipped) >= 0).all() and (np.asarray(clipped) <= [width, height, width, height]).all()
    np.testing.assert_array_equal(box_ops.clip(clipped, size), clipped)


def test_clip_takes_one_size_an_image():
    boxes = jnp.broadcast_to(jnp.float32([-5, -5, 100, 100]), (2, 3, 4))
    clipped = box_ops.clip(boxes, jnp.array([[10, 20], [30, 40]]))
    np.testing.assert_array_equal(clipped[0, 0], [0, 0, 20, 10])
    np.testing.assert_array_equal(clipped[1, 2], [0, 0, 40, 30])


def test_matrix_of_pairs_by_broadcasting():
    a, b = jnp.float32(np.random.default_rng(0).uniform(0, 9, (3, 4))), jnp.float32([[0, 0, 4, 4], [1, 1, 9, 9]])
    matrix = box_ops.iou(a[:, None], b[None])
    assert matrix.shape == (3, 2)
    np.testing.assert_allclose(matrix[1, 0], box_ops.iou(a[1], b[0]))


def test_inclusive_and_half_open_undo_each_other():
    box = jnp.float32([2, 3, 10, 12])
    np.testing.assert_array_equal(box_ops.inclusive(box), [2, 3, 9, 11])
    np.testing.assert_array_equal(box_ops.half_open(box_ops.inclusive(box)), box)


def test_as_float_computes_in_at_least_float32():
    assert box_ops.as_float(jnp.zeros(1, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert box_ops.as_float(jnp.zeros(1, jnp.float64)).dtype == jnp.float64
