"""What evaluation and prediction share: buckets, boxes back in original pixels, merging, the detector on a mesh."""

import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medglip_jax.inference import (
    check_parameters,
    make_detector,
    merge,
    parameter_shapes,
    power_of_two,
    prompt_length,
    stack_prompts,
    to_original,
)
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import make_mesh


def prompt(rng, phrases, max_tokens, tokens_each=3):
    """A prompt of random words, each phrase with `tokens_each` tokens and a separator after it."""
    ids, mask = np.zeros(max_tokens, np.int32), np.zeros(max_tokens, np.int32)
    positive_map = np.zeros((phrases, max_tokens), np.float32)
    for k in range(phrases):
        start = 1 + k * (tokens_each + 1)
        positive_map[k, start : start + tokens_each] = 1 / tokens_each
    used = 1 + phrases * (tokens_each + 1)
    ids[:used], mask[:used] = rng.integers(5, 4000, used), 1
    names = tuple(f"phrase {k}" for k in range(phrases))
    return types.SimpleNamespace(input_ids=ids, attention_mask=mask, positive_map=positive_map, phrases=names)


@pytest.fixture(scope="module")
def model_and_params(tiny_config):
    """A tiny detector with random parameters; filling their shapes takes no compilation."""
    model, rng = GLIP(tiny_config.model), np.random.default_rng(0)

    def fill(path, x):
        name = path[-1].key
        if len(x.shape) < 2:
            return np.full(x.shape, name.startswith(("scale", "gamma")), np.float32)
        return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(fill, parameter_shapes(model, tiny_config)), tiny_config


@pytest.fixture(scope="module")
def detected(model_and_params):
    """Images, a prompt, the detector on one device, and what it found."""
    model, params, config = model_and_params
    rng = np.random.default_rng(1)
    images = {
        "image": rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
        "image_size": np.array([[64, 48]] * 8, np.int32),
    }
    words = stack_prompts([prompt(rng, 2, 32)], 32)
    detector = make_detector(model, config)
    found = jax.device_get(detector(params, **images, **words))
    assert (found["phrases"] >= 0).sum() > 8 and np.ptp(found["scores"][:, 0]) > 0.001
    return images, words, detector, found


@given(st.integers(1, 10_000))
def test_power_of_two_is_the_next_one(count):
    bucket = power_of_two(count)
    assert count <= bucket < 2 * count and bucket & (bucket - 1) == 0


@pytest.mark.parametrize(("tokens", "most", "bucket"), [(3, 256, 64), (65, 256, 128), (200, 256, 256), (20, 32, 32)])
def test_prompt_length_is_the_smallest_bucket(tokens, most, bucket):
    assert prompt_length(tokens, most) == bucket


def test_stacked_prompts_keep_their_tokens_and_mark_padding():
    rng = np.random.default_rng(0)
    prompts = [prompt(rng, 3, 256), prompt(rng, 1, 256)]
    stacked = stack_prompts(prompts, 256)
    assert stacked["input_ids"].shape == (2, 64) and stacked["phrase_map"].shape == (2, 4, 64)
    np.testing.assert_array_equal(stacked["phrase_valid"], [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(stacked["phrase_map"].sum(axis=-1), stacked["phrase_valid"])
    np.testing.assert_array_equal(stacked["input_ids"][0], prompts[0].input_ids[:64])


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.floats(0.05, 4), st.floats(0.05, 4)),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_go_to_the_canvas_and_back(size, scale, fractions):
    height, width = size
    x, y = sorted(fractions[:2]), sorted(fractions[2:])
    original = np.array([[x[0] * width, y[0] * height, x[1] * width, y[1] * height]])
    on_canvas = original * np.array([scale[1], scale[0]] * 2)
    np.testing.assert_allclose(to_original(on_canvas, np.array(scale), size), original, rtol=1e-5, atol=1e-3)


def test_boxes_stay_inside_the_original_image():
    boxes = to_original(np.array([[-5.0, -5.0, 500.0, 500.0]]), np.array([2.0, 0.5]), (30, 40))
    np.testing.assert_array_equal(boxes, [[0, 0, 40, 30]])


def test_merge_takes_the_best_of_all_prompts_under_their_own_names():
    parts = [
        {
            "boxes": np.array([[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 0, 0]], np.float32),
            "scores": np.array([0.9, 0.2, 0], np.float32),
            "phrases": np.array([1, 0, -1]),
        },
        {
            "boxes": np.array([[2, 2, 6, 6], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32),
            "scores": np.array([0.5, 0, 0], np.float32),
            "phrases": np.array([0, -1, -1]),
        },
    ]
    merged = merge(parts, [[0, 2], [1]], 2, scale=np.array([2.0, 2.0]), size=(100, 100))
    np.testing.assert_array_equal(merged.phrases, [2, 1])
    np.testing.assert_allclose(merged.scores, [0.9, 0.5])
    np.testing.assert_allclose(merged.boxes, [[0, 0, 1, 1], [1, 1, 3, 3]])
    assert len(merge(parts, [[0, 2], [1]], 100, scale=np.ones(2), size=(9, 9)).scores) == 3


def test_boxes_stay_inside_the_padded_image(detected):
    *_, found = detected
    assert found["boxes"][..., 2].max() <= 48 and found["boxes"].min() >= 0


def test_a_mesh_changes_no_detection(model_and_params, detected):
    model, params, config = model_and_params
    images, words, _, alone = detected
    mesh = make_mesh({"data": 4, "fsdp": 2})
    spread = make_detector(model, config, mesh)(params, **images, **words)
    np.testing.assert_allclose(spread["scores"], alone["scores"], atol=1e-5)
    np.testing.assert_allclose(spread["boxes"], alone["boxes"], atol=1e-2)


def test_longer_padding_changes_no_detection(model_and_params, detected):
    images, words, detector, padded = detected
    cut = {**words, **{key: words[key][..., :12] for key in ("input_ids", "attention_mask", "phrase_map")}}
    exact = detector(model_and_params[1], **images, **cut)
    np.testing.assert_allclose(exact["scores"], padded["scores"], atol=1e-5)
    np.testing.assert_allclose(exact["boxes"], padded["boxes"], atol=1e-2)


def test_parameters_of_another_size_are_named(model_and_params):
    model, params, config = model_and_params
    check_parameters(params, model, config, "run")
    other = config.copy_and_resolve_references()
    other.model.fpn.channels = 32
    with pytest.raises(ValueError, match=r"(?s)run holds a model of another size.*: \(.*\) in the checkpoint, \("):
        check_parameters(params, GLIP(other.model), other, "run")


def test_missing_parameters_are_named(model_and_params):
    model, params, config = model_and_params
    some = {name: value for name, value in params.items() if name != "head"}
    with pytest.raises(ValueError, match=r"head/.*: missing in the checkpoint"):
        check_parameters(some, model, config, "run")


def test_shapes_are_those_of_the_parameters(model_and_params):
    model, params, config = model_and_params
    assert jax.tree.map(lambda x: x.shape, parameter_shapes(model, config)) == jax.tree.map(lambda x: x.shape, params)
