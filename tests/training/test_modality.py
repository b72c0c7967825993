"""Modalities in a step: which parts images take, what the classifier learns, what trains, and what a run says."""

import logging

import jax
import numpy as np
import pytest

from configs.medglip_t import get_config
from data_pipelines.records import write_records
from data_pipelines.schema import MODALITIES
from data_pipelines.sources.phantoms import phantom
from medglip_jax.training.finetuning import layer_multiplier, trained_paths
from medglip_jax.training.modality import modality_index, modality_losses, report_modalities

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
