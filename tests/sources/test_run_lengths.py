import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipelines.sources.run_lengths import ORDERS, RUNS, decode_runs, encode_runs

MASKS = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=7))


@given(MASKS, st.sampled_from(RUNS), st.sampled_from(ORDERS))
def test_decoding_reverses_encoding(mask, runs, order):
    np.testing.assert_array_equal(decode_runs(encode_runs(mask, runs, order), mask.shape, runs, order), mask)


@given(MASKS, st.sampled_from(ORDERS))
def test_relative_starts_count_from_the_end_before_and_absolute_ones_from_one(mask, order):
    numbers = [np.asarray(encode_runs(mask, runs, order).split(), int).reshape(-1, 2) for runs in RUNS]
    relative, absolute = numbers
    np.testing.assert_array_equal(relative[:, 1], absolute[:, 1])
    ends = absolute.sum(axis=1) - 1
    np.testing.assert_array_equal(relative[:, 0], absolute[:, 0] - 1 - np.concatenate([[0], ends])[:-1])


def test_kaggles_examples():
    """By hand, 3 rows of 4 pixels: columns run down, from 0 in SIIM-ACR's tables and from 1 in the Bowl's."""
    expected = np.asarray([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(decode_runs("1 4 5 1", (3, 4), "relative")[2], [True, False, False, False])
    assert encode_runs(expected, "absolute") == "2 4 12 1"
    assert encode_runs(expected, "relative") == "1 4 6 1"
    assert encode_runs(expected, "absolute", "rows") == "2 1 5 2 9 1 12 1"
    np.testing.assert_array_equal(decode_runs("2 4 12 1", (3, 4), "absolute"), expected)


def test_runs_may_touch_and_zero_is_a_relative_start():
    np.testing.assert_array_equal(decode_runs("0 1 0 2", (2, 2), "relative").T.ravel(), [1, 1, 1, 0])
    np.testing.assert_array_equal(decode_runs("1 1 2 2", (2, 2), "absolute").T.ravel(), [1, 1, 1, 0])


@pytest.mark.parametrize(
    ("text", "runs", "message"),
    [
        ("1 2 x", "absolute", "expected whole numbers, two a run, found '1 2 x'"),
        ("1.0 2", "absolute", "expected whole numbers"),
        (f"1 {'9' * 30}", "relative", "expected whole numbers"),
        ("1 2 3", "absolute", "has 3 numbers, expected two a run"),
        ("1 0", "absolute", "has a run of 0 pixels"),
        ("1 -2", "relative", "has a run of -2 pixels"),
        ("1 13", "relative", "has a run of 13 pixels"),
        ("-1 2", "relative", "has a run that starts at -1"),
        ("9223372036854775807 1", "relative", "has a run that starts at 9223372036854775807"),
        ("0 2", "absolute", "begin before the one before ends: are they relative?"),
        ("3 2 4 1", "absolute", "begin before the one before ends: are they relative?"),
        ("3 4 8 1", "relative", r"beyond the end of the image, 4 x 3 pixels: are they absolute\?"),
        ("12 2", "absolute", r"beyond the end of the image, 4 x 3 pixels: are they relative\?"),
    ],
)
def test_what_are_no_runs_of_the_image_is_an_error(text, runs, message):
    with pytest.raises(ValueError, match=message):
        decode_runs(text, (3, 4), runs)
