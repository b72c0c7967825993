"""Names, layouts and the report of what did not find its place."""

import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.interop.state_dict import LAYOUTS, Weight, from_state_dict, to_state_dict

WEIGHTS = [
    Weight("a/kernel", "one.weight", "linear"),
    Weight("a/bias", "one.bias", "copy"),
    Weight("scale", "two.scale", "copy"),
]
SHAPES = {"a/kernel": (2, 3), "a/bias": (3,), "scale": ()}
RANKS = {
    "conv": (3, 3, 4, 8),
    "conv of RGB": (4, 4, 3, 8),
    "linear": (8, 4),
    "linear as conv": (8, 4),
    "patch merging norm": (12,),
    "patch merging linear": (12, 5),
    "scalar as vector": (),
    "copy": (3, 2),
}


@pytest.fixture
def params():
    flat = {path: np.float32(np.random.default_rng(0).normal(size=shape)) for path, shape in SHAPES.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("layout", LAYOUTS)
@given(seed=st.integers(0, 100))
def test_every_layout_is_undone_exactly(layout, seed):
    x = np.random.default_rng(seed).normal(size=RANKS[layout])
    to_theirs, to_ours = LAYOUTS[layout]
    np.testing.assert_array_equal(to_ours(to_theirs(x)), x)
    assert layout == "copy" or to_theirs(x).shape != x.shape or not np.array_equal(to_theirs(x), x)


def test_round_trip_is_exact_and_complete(params):
    state_dict = dict(to_state_dict(params, WEIGHTS))
    assert {name: x.shape for name, x in state_dict.items()} == {
        "one.weight": (3, 2),
        "one.bias": (3,),
        "two.scale": (),
    }
    assert all(x.flags.c_contiguous for x in state_dict.values())
    again, report = from_state_dict(state_dict, WEIGHTS, SHAPES)
    assert report.complete and len(report.matched) == 3
    np.testing.assert_array_equal(again["a"]["kernel"], params["a"]["kernel"])
    assert again["scale"].shape == ()


def test_consumed_parameters_are_let_go(params):
    arrays = to_state_dict(params, WEIGHTS, consume=True)
    assert params == {}
    assert len(dict(arrays)) == 3


def test_parameters_of_another_model_are_named(params):
    del params["scale"]
    params["a"]["extra"] = np.zeros(2)
    with pytest.raises(ValueError, match=r"1 missing, 1 unexpected.*\n.*scale\n.*a/extra"):
        to_state_dict(params, WEIGHTS)


def test_report_tells_what_did_not_find_its_place(params):
    state_dict = dict(to_state_dict(params, WEIGHTS))
    del state_dict["two.scale"]
    state_dict |= {"one.weight": np.zeros((3, 5)), "left": np.zeros(1), "buffer": np.zeros(1)}
    found, report = from_state_dict(state_dict, WEIGHTS, SHAPES, ignored=lambda name: name == "buffer")
    assert found.keys() == {"a"} and found["a"].keys() == {"bias"}
    assert not report.complete
    assert (report.matched, report.missing, report.unexpected) == (("one.bias",), ("two.scale",), ("left",))
    assert report.misshapen == (("one.weight", (3, 5), (3, 2)),)
    assert report.ignored == ("buffer",)
    text = report.describe()
    assert "1 parameters matched, 1 missing, 1 unexpected, 1 misshapen, 0 reshaped, 1 ignored" in text
    assert "one.weight [3, 5], model [3, 2]" in text


def test_arrays_of_other_shapes_are_resized_where_that_is_known(params):
    state_dict = dict(to_state_dict(params, WEIGHTS)) | {"one.bias": np.arange(5.0), "two.scale": np.ones(1)}

    def cut(path, x, shape):
        return x[: shape[0]] if path == "a/bias" else None

    found, report = from_state_dict(state_dict, WEIGHTS, SHAPES, resize=cut)
    np.testing.assert_array_equal(found["a"]["bias"], [0, 1, 2])
    assert found["scale"].shape == ()  # a vector of one number is a scalar
    assert report.complete and report.reshaped == (("one.bias", (5,), (3,)),)
