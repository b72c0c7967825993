import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.detection.anchors import decode_boxes, encode_boxes, make_anchors

STRIDES = (8, 16, 32, 64, 128)


def test_anchors_are_centred_squares_in_row_major_order():
    anchors, sizes = make_anchors(160, 192, STRIDES, 8.0)
    assert sizes == (20 * 24, 10 * 12, 5 * 6, 3 * 3, 2 * 2) and anchors.shape == (643, 4)
    assert anchors.dtype == np.float32
    np.testing.assert_array_equal(anchors[0], [-28, -28, 36, 36])
    np.testing.assert_array_equal(anchors[1], [-20, -28, 44, 36])
    np.testing.assert_array_equal(anchors[24], [-28, -20, 36, 44])
    np.testing.assert_array_equal(anchors[-1], [128 + 64 - 512, 128 + 64 - 512, 128 + 64 + 512, 128 + 64 + 512])


def test_canvas_that_no_stride_divides_gets_the_last_cells_too():
    assert make_anchors(100, 60, STRIDES, 8.0)[1] == (13 * 8, 7 * 4, 4 * 2, 2 * 1, 1)


def test_zero_deltas_decode_to_the_anchors():
    anchors, _ = make_anchors(64, 64, STRIDES, 8.0)
    np.testing.assert_array_equal(decode_boxes(jnp.array(anchors), jnp.zeros_like(anchors)), anchors)


@jax.jit
def round_trip(anchors, box):
    return decode_boxes(anchors, encode_boxes(anchors, box))


@given(
    x=st.floats(-50, 250, width=32),
    y=st.floats(-50, 250, width=32),
    width=st.floats(8, 400, width=32),
    height=st.floats(8, 400, width=32),
)
def test_decoding_undoes_encoding(x, y, width, height):
    anchors = jnp.array(make_anchors(64, 64, STRIDES[:3], 8.0)[0])
    box = jnp.float32([x, y, x + width, y + height])
    decoded = round_trip(anchors, box)
    np.testing.assert_allclose(decoded, np.broadcast_to(box, anchors.shape), atol=2e-3)


def test_deltas_are_weighted_and_their_stretch_is_limited():
    anchor = jnp.float32([0, 0, 10, 20])
    np.testing.assert_allclose(decode_boxes(anchor, jnp.float32([1, 0, 0, 0])), [1, 0, 11, 20], atol=1e-5)
    np.testing.assert_allclose(decode_boxes(anchor, jnp.float32([0, 0, 0, 5 * np.log(2)])), [0, -10, 10, 30], atol=1e-5)
    sides = decode_boxes(anchor, jnp.float32([0, 0, 1e4, -1e4]))
    np.testing.assert_allclose(sides[2:] - sides[:2], [10 * 62.5, 20 / 62.5], rtol=1e-4)
