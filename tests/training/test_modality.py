"""Modalities in a step: which parts images take, what the classifier learns, what trains, and what a run says."""

import logging
import math

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs.medglip_t import get_config
from data_pipelines.records import write_records
from data_pipelines.schema import MODALITIES
from data_pipelines.sources.phantoms import phantom
from medglip_jax.model.routing import select
from medglip_jax.parallel.mesh import make_mesh, to_global
from medglip_jax.training.finetuning import layer_multiplier, trained_paths
from medglip_jax.training.modality import modality_index, modality_losses, report_modalities
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state
from medglip_jax.training.step import make_train_step
from tests.training.slim import Slim, random_batch

OWN = "modality/backbone/stage_1_block_0/norm1/scale"

IDS = np.array([MODALITIES.index(name) for name in ("ct", "unknown", "mri", "xray", "ct", "ct")], np.int32)


@pytest.fixture
def config():
    config = get_config()
    config.model.modality.names, config.model.modality.image_parts = "mri,ct", "norms"
    return config


def test_images_take_the_parts_of_their_modality_or_the_shared_ones(config):
    settings = config.model.modality
    assert modality_index({"modality": IDS}, settings, jax.random.key(0)).tolist() == [2, 0, 1, 0, 2, 2]
    settings.dropout = 0.25
    many = {"modality": np.full(4000, MODALITIES.index("ct"))}
    index = np.asarray(modality_index(many, settings, jax.random.key(0)))
    assert set(index) == {0, 2} and np.mean(index == 0) == pytest.approx(0.25, abs=0.03)


def test_classifier_losses_of_micro_batches_sum_to_those_of_the_whole(config):
    settings = config.model.modality
    logits = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    logits[0] = (0, 3)

    @jax.jit
    def losses_of(logits, ids):
        return modality_losses(logits, {"modality": ids}, settings, 6 // len(ids))

    whole = losses_of(logits, IDS)
    halves = [losses_of(logits[part], IDS[part]) for part in np.split(np.arange(6), 2)]
    for name, x in whole.items():
        np.testing.assert_allclose(sum(half[name] for half in halves), x, rtol=1e-6)
    assert whole["modality_known"] == 4
    known, labels = [0, 2, 4, 5], [1, 0, 1, 1]
    correct = logits[known, labels]
    losses = np.log(np.exp(logits[known]).sum(axis=1)) - correct
    np.testing.assert_allclose(whole["loss_modality"], settings.classifier_weight * losses.sum() / 6, rtol=1e-6)
    assert whole["modality_correct"] == np.sum(logits[known].argmax(axis=1) == labels)


def test_a_mode_trains_what_modalities_have_alone(config):
    paths = ["head/box/kernel", "modality/backbone/norm_1/scale", "modality/neck/embedding"]
    config.finetune.mode = "modality"
    assert trained_paths(paths, config.finetune) == set(paths[1:])
    with pytest.raises(ValueError, match="leaves nothing to train"):
        trained_paths(paths[:1], config.finetune)


def test_own_parameters_have_the_rate_of_their_layer(config):
    config.finetune.layer_decay = 0.5
    path = "backbone/stage_1_block_0/norm1/scale"
    assert layer_multiplier(f"modality/{path}", config) == layer_multiplier(path, config) < 0.01
    assert layer_multiplier("modality/language/embedding", config) == 1


def test_a_run_says_which_images_take_the_shared_parts(config, tmp_path, caplog):
    kinds = ("ct", "ct", "xray", "ct")
    write_records([phantom(i, size=64, modality=kind) for i, kind in enumerate(kinds)], tmp_path, name="four")
    config.data.train = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        report_modalities(config)
        assert "1 of 4 training images take the shared parts" in caplog.text and ": 1 xray" in caplog.text
        assert "no training image is mri" in caplog.text
        caplog.clear()
        config.model.modality.names = "ct,xray"
        report_modalities(config)
        assert "no training image takes the shared parts" in caplog.text
        caplog.clear()
        config.model.modality.dropout = 0.1
        report_modalities(config)
        config.model.modality.names = ""
        report_modalities(config)
        assert not caplog.text


class OwnScales(Slim):
    """The stand-in model, whose images may have a scale of their own."""

    def __init__(self, config):
        super().__init__()
        self.config = config.model

    def apply(self, variables, *inputs, **options):
        params = traverse_util.flatten_dict(variables["params"], sep="/")
        own = variables["modality"]["backbone"]["stage_1_block_0"]["norm1"]
        path = "backbone/stage_1_block_0/norm1/scale"
        params[path] = select(own["scale"], own["index"], params[path])[:, None]  # [B, 1, 8]
        return super().apply({"params": traverse_util.unflatten_dict(params, sep="/")}, *inputs, **options)


def test_a_step_moves_what_the_modalities_of_its_batch_have_and_micro_batches_sum(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.model.modality.names, config.model.modality.image_parts = "mri,pet,ct", "norms"
    config.finetune.mode, config.optimizer.weight_decay, config.schedule.warmup_steps = "modality", 0.0, 0
    config.optimizer.clip_norm = 1e9
    kinds = [MODALITIES.index(name) for name in ("ct", "mri", "unknown", "xray")] * 2
    batch = random_batch(config) | {"modality": np.array(kinds, np.int32)}

    def take(accumulation, **sizes):
        recipe = config.copy_and_resolve_references()
        recipe.training.accumulation = accumulation
        mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
        model, optimizer = OwnScales(recipe), make_optimizer(recipe)
        state, placed = create_state(model, recipe, optimizer, jax.random.key(0), mesh)
        before = jax.device_get(state.params)
        step = jax.jit(make_train_step(model, recipe, optimizer, mesh), out_shardings=(placed, None))
        state, metrics = step(state, to_global(batch, mesh))
        assert set(traverse_util.flatten_dict(state.ema, sep="/")) == {OWN}
        return before, *jax.device_get((state.params, metrics, optax.tree_utils.tree_get(state.opt_state, "mu")))

    before, after, metrics, gradient = take(1, data=1)
    flat_before, flat_after = (traverse_util.flatten_dict(x, sep="/") for x in (before, after))
    assert {path for path, x in flat_after.items() if (x != flat_before[path]).any()} == {OWN}
    moved = (flat_after[OWN] != flat_before[OWN]).any(axis=1)
    assert moved.tolist() == [True, False, True]  # there is no pet in the batch
    _, _, other, of_parts = take(2, data=2, fsdp=2)
    np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(of_parts), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())
