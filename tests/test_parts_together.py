"""Modalities, hierarchy and masks in one model: what each adds is there, and nothing of the others is lost."""

import jax
import optax
import pytest

from benchmarks.ablations import SETTINGS, compare, make_recipe, summarize, table
from medglip_jax.inference import make_detector
from medglip_jax.model.detector import GLIP
from medglip_jax.planning.programs import train_batch
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import state_shapes
from medglip_jax.training.step import make_train_step

LOSSES = {"token", "box", "centerness", "consistency", "containment", "mask_box", "mask_phrase"}


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    config = make_recipe("masks", tmp_path_factory.mktemp("none"), seed=0, steps=4)
    model = tiny_config.model.copy_and_resolve_references()
    model.swin.depths = (1, 1, 1, 1)
    for name in ("swin", "fpn", "bert", "tower"):
        config.model[name].update(model[name])
    config.model.masks.channels, config.model.masks.norm_groups = 8, 2
    config.model.modality.classifier = True
    config.data.canvas, config.data.max_tokens, config.data.max_boxes = (64, 64), 32, 16
    return config


@pytest.mark.parametrize("mode", ["", "heads"])
def test_a_step_has_the_losses_of_all_parts(config, mode):
    config = config.copy_and_resolve_references()
    config.finetune.mode, config.finetune.lora_rank = mode, 2 if mode else 0  # with adapters, and without
    model, optimizer = GLIP(config.model), make_optimizer(config)
    state = state_shapes(model, config, optimizer, jax.random.key(0))
    assert {"modality", "masks", "head", "tower_0", "backbone"} <= state.params.keys()
    after, metrics = jax.eval_shape(make_train_step(model, config, optimizer), state, train_batch(config, 4, None))
    assert {f"loss_{name}" for name in LOSSES} | {"loss_modality", "modality_accuracy"} <= metrics.keys()
    taught = optax.tree_utils.tree_get(state.opt_state, "mu")
    assert taught.keys() == ({"head", "masks", "lora"} if mode else state.params.keys())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_a_detection_has_boxes_and_masks_of_each_modality(config):
    model = GLIP(config.model)
    params = state_shapes(model, config, make_optimizer(config), jax.random.key(0)).params
    batch = train_batch(config, 4, None)
    prompt = {
        "phrase_map": jax.ShapeDtypeStruct((4, 2, 32), float),
        "phrase_valid": jax.ShapeDtypeStruct((4, 2), bool),
        "phrase_kinds": jax.ShapeDtypeStruct((4, 1, 2), int),
    }
    given = {name: batch[name] for name in ("image", "image_size", "input_ids", "attention_mask", "modality")}
    found = jax.eval_shape(make_detector(model, config), params, **given, **prompt)
    assert {"boxes", "scores", "phrases"} < found.keys() and any("mask" in name for name in found)


def test_every_setting_of_the_ablations_is_a_recipe(tmp_path):
    plain = make_recipe("plain", tmp_path, seed=0, steps=4)
    for setting in SETTINGS:
        recipe = make_recipe(setting, tmp_path, seed=0, steps=4)
        assert (recipe.to_json_best_effort() == plain.to_json_best_effort()) == (setting == "plain")


def test_what_a_setting_changes_is_taken_seed_by_seed():
    found = {
        "plain": {0: {"AP50": 0.1}, 1: {"AP50": 0.3}},
        "prompts": {1: {"AP50": 0.35}, 0: {"AP50": 0.15}},
        "masks": {0: {"AP50": 0.2, "masks/dice": 0.5}, 1: {"AP50": 0.3, "masks/dice": 0.7}},
    }
    changes = compare(found, alone=False)
    assert changes["prompts"]["AP50"] == pytest.approx([0.05, 0.0]) and changes["masks"].keys() == {"AP50"}
    assert compare(found, alone=True)["masks"]["AP50"] == pytest.approx([0.05, 0.05 * 2**0.5])
    assert "| prompts | +5.0 ± 0.0 |" in table(changes, sign="+")
    assert "60.0 ± 14.1" in table({"masks": summarize([*found["masks"].values()])})
