import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.detection.anchors import encode_boxes, make_anchors
from medglip_jax.detection.postprocess import detect, phrase_scores, raise_broader

CONFIG = get_config().detection
CANVAS = (64, 96)
TOKENS = 8
ANCHORS, SIZES = make_anchors(*CANVAS, CONFIG.strides, CONFIG.anchor_scale)
PHRASE_MAP = np.zeros((3, TOKENS), np.float32)
PHRASE_MAP[0, 1], PHRASE_MAP[1, 2:4], PHRASE_MAP[2, 5] = 1, 0.5, 1

run = jax.jit(functools.partial(detect, config=CONFIG, canvas=CANVAS))


def silent_outputs(batch_size=1):
    n = len(ANCHORS)
    return {
        "token_logits": np.full((batch_size, n, TOKENS), -20, np.float32),
        "box_deltas": np.zeros((batch_size, n, 4), np.float32),
        "centerness": np.full((batch_size, n), 20, np.float32),
    }


def say(outputs, image, anchor, tokens, logit, box):
    outputs["token_logits"][image, anchor, tokens] = logit
    outputs["box_deltas"][image, anchor] = encode_boxes(jnp.array(ANCHORS[anchor]), jnp.float32(box))


def sizes(batch_size=1, size=CANVAS):
    return np.tile(np.int32(size), (batch_size, 1))


def test_phrase_score_is_the_mean_of_its_tokens():
    logits = jnp.float32(np.random.default_rng(0).standard_normal((5, TOKENS)))
    p = 1 / (1 + np.exp(-np.asarray(logits)))
    scores = phrase_scores(logits, jnp.array(PHRASE_MAP))
    np.testing.assert_allclose(scores, np.stack([p[:, 1], p[:, 2:4].mean(1), p[:, 5]], axis=1), rtol=1e-6)
    assert not np.asarray(phrase_scores(logits, jnp.zeros((2, TOKENS)))).any()


def test_each_phrase_gets_its_box_best_first():
    outputs = silent_outputs()
    say(outputs, 0, 30, [2, 3], 0.0, [10, 12, 40, 44])
    say(outputs, 0, 60, [1], 3.0, [50, 20, 90, 60])
    found = run(outputs, sizes(), PHRASE_MAP, np.ones(3, bool))
    np.testing.assert_array_equal(found["phrases"][0, :3], [0, 1, -1])
    np.testing.assert_allclose(found["boxes"][0, :2], [[50, 20, 90, 60], [10, 12, 40, 44]], atol=1e-3)
    np.testing.assert_allclose(found["scores"][0, :2], np.sqrt([1 / (1 + np.exp(-3)), 0.5]), rtol=1e-5)
    assert not np.asarray(found["boxes"][0, 2:]).any() and not np.asarray(found["scores"][0, 2:]).any()
    assert found["boxes"].shape == (1, CONFIG.max_detections, 4) and found["phrases"].dtype == jnp.int32


def test_the_anchor_of_a_box_is_told_if_asked_for():
    outputs = silent_outputs()
    say(outputs, 0, 30, [2, 3], 0.0, [10, 12, 40, 44])
    say(outputs, 0, 60, [1], 3.0, [50, 20, 90, 60])
    inputs = outputs, sizes(), PHRASE_MAP, np.ones(3, bool)
    found = jax.jit(functools.partial(detect, config=CONFIG, canvas=CANVAS, with_anchors=True))(*inputs)
    assert found["anchors"][0, :3].tolist() == [60, 30, -1]
    plain = run(*inputs)
    assert found.keys() - plain.keys() == {"anchors"}
    np.testing.assert_array_equal(found["boxes"], plain["boxes"])


def test_absent_phrase_gets_no_box():
    found = run(silent_outputs(2), sizes(2), PHRASE_MAP, np.ones(3, bool))
    np.testing.assert_array_equal(found["phrases"], -1)


def test_padded_phrase_never_wins():
    outputs = silent_outputs()
    outputs["token_logits"][:] = 5
    found = run(outputs, sizes(), PHRASE_MAP, np.array([True, False, True]))
    assert set(np.unique(found["phrases"])) <= {-1, 0, 2} and (np.asarray(found["phrases"]) >= 0).any()


def test_phrase_map_may_differ_between_images():
    outputs = silent_outputs(2)
    for image in range(2):
        say(outputs, image, 30, [1], 2.0, [10, 12, 40, 44])
    maps = np.stack([PHRASE_MAP, PHRASE_MAP[[1, 2, 0]]])
    found = run(outputs, sizes(2), maps, np.array([[True] * 3, [True, True, False]]))
    assert found["phrases"][0, 0] == 0 and found["phrases"][1, 0] == -1


def test_threshold_is_taken_before_centerness():
    outputs = silent_outputs()
    outputs["centerness"][:] = -6
    say(outputs, 0, 30, [1], 0.0, [10, 12, 40, 44])
    say(outputs, 0, 60, [1], -3.0, [50, 20, 90, 60])  # sigmoid 0.047
    found = run(outputs, sizes(), PHRASE_MAP, np.ones(3, bool))
    np.testing.assert_array_equal(found["phrases"][0, :2], [0, -1])
    np.testing.assert_allclose(found["scores"][0, 0], np.sqrt(0.5 / (1 + np.exp(6))), rtol=1e-5)


def test_duplicates_go_within_a_phrase_only():
    outputs = silent_outputs()
    for anchor, logit in ((30, 2.0), (31, 1.0), (42, 0.5)):
        say(outputs, 0, anchor, [1, 5], logit, [10, 12, 40, 44])
    found = run(outputs, sizes(), PHRASE_MAP, np.ones(3, bool))
    np.testing.assert_array_equal(found["phrases"][0, :3], [0, 2, -1])


def test_boxes_are_clipped_to_the_image_and_not_to_the_canvas():
    outputs = silent_outputs()
    say(outputs, 0, 30, [1], 2.0, [-20, -20, 200, 200])
    say(outputs, 0, 60, [2, 3], 2.0, [70, 50, 90, 62])  # in the padding
    found = run(outputs, sizes(size=(40, 60)), PHRASE_MAP, np.ones(3, bool))
    np.testing.assert_allclose(found["boxes"][0, 0], [0, 0, 60, 40], atol=1e-4)
    assert found["phrases"][0, 1] == -1


def test_broader_phrase_scores_at_least_as_its_kinds_at_every_anchor():
    scores = jnp.float32([[0.9, 0.1, 0.4, 0.0], [0.2, 0.5, 0.6, 0.0]])
    kinds = jnp.int32([[0, 1], [2, 1], [2, 3], [0, 0]])  # the last one is padding
    np.testing.assert_allclose(raise_broader(scores, kinds), [[0.9, 0.9, 0.4, 0.4], [0.2, 0.6, 0.6, 0.6]])
    np.testing.assert_array_equal(raise_broader(scores, jnp.zeros((2, 2), jnp.int32)), scores)


def test_no_more_candidates_a_level_than_asked():
    config = CONFIG.copy_and_resolve_references()
    config.pre_nms, config.max_detections, config.nms_iou = 2, 20, 1.0
    outputs = silent_outputs()
    outputs["token_logits"][..., 1] = 2
    found = detect(outputs, sizes(), jnp.array(PHRASE_MAP), jnp.ones(3, bool), config, canvas=CANVAS)
    expected = sum(min(2, size) for size in SIZES)
    assert int((found["phrases"] >= 0).sum()) == expected


def test_prompts_put_together_give_what_one_prompt_gives():
    rng = np.random.default_rng(1)
    outputs = silent_outputs()
    outputs["token_logits"][:] = rng.normal(-1, 1, outputs["token_logits"].shape)
    outputs["box_deltas"][:] = rng.normal(0, 0.5, outputs["box_deltas"].shape)
    together = run(outputs, sizes(), PHRASE_MAP, np.ones(3, bool))
    parts = [run(outputs, sizes(), PHRASE_MAP, np.arange(3) == k) for k in range(3)]
    scores = np.concatenate([p["scores"][0] for p in parts])
    order = np.argsort(-scores, kind="stable")[: CONFIG.max_detections]
    np.testing.assert_allclose(scores[order], together["scores"][0])
    np.testing.assert_allclose(np.concatenate([p["boxes"][0] for p in parts])[order], together["boxes"][0], atol=1e-4)


def test_each_device_of_a_mesh_detects_in_its_images():
    rng = np.random.default_rng(2)
    outputs = silent_outputs(2)
    outputs["token_logits"][:] = rng.normal(-1, 1, outputs["token_logits"].shape)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    images, every = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    detect_here = functools.partial(detect, config=CONFIG, canvas=CANVAS)
    in_specs = (images, images, every, every)
    sharded = jax.jit(jax.shard_map(detect_here, mesh=mesh, in_specs=in_specs, out_specs=images))
    arguments = (outputs, sizes(2), PHRASE_MAP, np.ones(3, bool))
    jax.tree.map(np.testing.assert_array_equal, sharded(*arguments), run(*arguments))


def test_wrong_canvas_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="canvas of 128x128"):
        detect(silent_outputs(), sizes(), jnp.array(PHRASE_MAP), jnp.ones(3, bool), CONFIG, canvas=(128, 128))
