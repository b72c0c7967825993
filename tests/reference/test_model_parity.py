"""The model against mmdetection's GLIP-T: every stage of the forward pass, from the same weights (float32)."""

import importlib.util

import jax
import numpy as np
import pytest

from configs.medglip_t import get_config
from medglip_jax.interop import mmdet
from medglip_jax.model.detector import GLIP, flatten_levels

TOLERANCE = 2e-5  # of the tensor's largest value


@pytest.fixture(scope="module")
def vectors(shared_dir):
    return np.load(shared_dir / "reference" / "glip_t_2blocks" / "vectors.npz")


@pytest.fixture(scope="module")
def state_dict(shared_dir):
    spec = importlib.util.spec_from_file_location("weights", shared_dir / "reference" / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    keys = shared_dir / "reference" / "glip_t_2blocks" / "keys.tsv"
    return {name: value.astype(np.float32) for name, value in weights.checkpoint(str(keys)).items()}


@pytest.fixture(scope="module")
def config():
    model = get_config().model
    model.tower.num_blocks = 2
    return model


@pytest.fixture(scope="module")
def stages(vectors, state_dict, config):
    """Our value of every tensor in the vectors, by its name there; feature maps channel-first."""
    params = mmdet.from_state_dict(state_dict, config)
    forward = jax.jit(lambda *inputs: GLIP(config).apply({"params": params}, *inputs, mutable=["intermediates"]))
    pixels = vectors["image"].transpose(0, 2, 3, 1)
    outputs, captured = forward(pixels, vectors["input_ids"], vectors["attention_mask"])
    captured = captured["intermediates"]

    values = {"text_hidden": captured["language_hidden"][0]}
    levels = {"swin": captured["backbone_levels"][0], "fpn": captured["neck_levels"][0]}
    for block in range(2):
        tower = captured[f"tower_{block}"]
        levels[f"tower_{3 * block:02d}_VLFuse_visual"] = tower["fusion_visual"][0]
        levels[f"tower_{3 * block + 2:02d}_DyConv_visual"] = tower["dyconv_levels"][0]
        values[f"tower_{3 * block:02d}_VLFuse_lang"] = tower["fusion_text"][0]
        values[f"tower_{3 * block + 1:02d}_BertEncoderLayer_lang"] = tower["text_hidden"][0]
    for name, maps in levels.items():
        values |= {f"{name}_{i}": x.transpose(0, 3, 1, 2) for i, x in enumerate(maps)}

    sizes = [x.shape[1:3] for x in levels["fpn"]]
    ends = np.cumsum([h * w for h, w in sizes])[:-1]
    for prefix, key in (("cls", "token_logits"), ("box", "box_deltas"), ("ctr", "centerness")):
        for i, part in enumerate(np.split(np.asarray(outputs[key]), ends, axis=1)):
            values[f"{prefix}_{i}"] = part if prefix == "cls" else part.reshape(2, *sizes[i], -1).transpose(0, 3, 1, 2)
    return {name: np.asarray(value) for name, value in values.items()}


def test_every_stage_agrees_with_mmdetection(stages, vectors):
    errors = {}
    for name, value in stages.items():
        expected = vectors[name]
        if value.ndim == 3:  # only the first 64 of the tokens are stored
            value = value[:, : expected.shape[1], : expected.shape[2]]
        assert value.shape == expected.shape, name
        errors[name] = float(np.abs(value - expected).max() / np.abs(expected).max())
    assert len(errors) == 48
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def test_state_dict_round_trip_is_exact(state_dict, config):
    again = mmdet.to_state_dict(mmdet.from_state_dict(state_dict, config), config)
    assert again.keys() == state_dict.keys()
    for name, value in again.items():
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, state_dict[name], err_msg=name)


def test_wrong_architecture_is_refused_with_names(state_dict, config):
    deeper = config.copy_and_resolve_references()
    deeper.tower.num_blocks = 3
    with pytest.raises(ValueError, match=r"dyhead_tower\.6"):
        mmdet.from_state_dict(state_dict, deeper)


def test_flatten_levels_puts_the_finest_level_first():
    levels = tuple(np.full((1, s, s, 2), s, np.float32) for s in (4, 2, 1))
    flat = np.asarray(flatten_levels(levels))
    assert flat[0, :, 0].tolist() == [4.0] * 16 + [2.0] * 4 + [1.0]
