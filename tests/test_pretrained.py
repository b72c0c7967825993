"""Runs and predictions that start from a model or an encoder that lies somewhere."""

import jax
import numpy as np
import pytest

from data_pipelines.text import load_tokenizer
from medglip_jax.inference import flat_shapes, parameter_shapes
from medglip_jax.interop import huggingface
from medglip_jax.interop.folder import write_folder
from medglip_jax.interop.state_dict import ImportReport
from medglip_jax.model.detector import GLIP
from medglip_jax.model.masks import is_of_masks
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.predict import MedGLIP
from medglip_jax.pretrained import load_model, pretrained_parameters, start_from
from medglip_jax.training.optimizer import make_optimizer
from medglip_jax.training.state import create_state


@pytest.fixture(scope="module")
def state(tiny_config):
    model = GLIP(tiny_config.model)
    return create_state(model, tiny_config, make_optimizer(tiny_config), jax.random.key(0), make_mesh(tiny_config.mesh))


@pytest.fixture(scope="module")
def folder(state, tiny_config, tmp_path_factory):
    """An exported model whose parameters are the initial ones plus 1."""
    params = jax.tree.map(lambda x: np.asarray(x) + 1, state[0].params)
    directory = tmp_path_factory.mktemp("export") / "model"
    write_folder(params, tiny_config, load_tokenizer(), directory, card="")
    return directory


def test_exported_folder_predicts_and_lies_on_any_mesh(folder, state, tiny_config):
    model = MedGLIP.from_pretrained(folder)
    assert model.tokenizer.vocab_size == load_tokenizer().vocab_size
    found = model.predict(np.zeros((50, 70, 3), np.uint8), ["left lung"], threshold=0)
    assert found.boxes.shape == (len(found), 4)

    tiny_config = tiny_config.copy_and_resolve_references()
    tiny_config.mesh.data, tiny_config.mesh.fsdp = 2, 4
    _, params, _, _ = load_model(folder, config=tiny_config, mesh=make_mesh(tiny_config.mesh))
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(params))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), params, state[0].params)


def test_run_starts_from_a_model(folder, state, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.init.model = str(folder)
    told = []
    started = start_from(state[0], pretrained_parameters(config, told.append))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 1), started.params, state[0].params)
    jax.tree.map(np.testing.assert_array_equal, started.ema, started.params)
    assert jax.tree.map(lambda x: x.sharding, started) == jax.tree.map(lambda x: x.sharding, state[0])
    assert str(folder) in told[0]
    # The step donates its state: the average must not be the parameters themselves.
    pairs = zip(jax.tree.leaves(started.params), jax.tree.leaves(started.ema), strict=True)
    assert not any(x is y for x, y in pairs)


def test_a_plain_model_starts_one_with_masks(folder, state, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.init.model, config.model.masks.kind, config.model.masks.channels = str(folder), "both", 16
    found = pretrained_parameters(config, lambda _: None)
    assert flat_shapes(found) == flat_shapes(state[0].params)
    shapes = flat_shapes(parameter_shapes(GLIP(config.model), config))
    assert {path for path in shapes if is_of_masks(path)} == shapes.keys() - flat_shapes(found).keys()


def test_encoders_go_before_the_model(folder, state, tiny_config, monkeypatch):
    config = tiny_config.copy_and_resolve_references()
    config.init.model, config.init.language, config.data.tokenizer = str(folder), "bert", "bert"
    part = {"embeddings_norm": {"bias": np.full(16, 7.0, np.float32)}}
    monkeypatch.setattr(huggingface, "load_bert", lambda folder, config: (part, ImportReport(matched=("one",))))
    told = []
    found = start_from(state[0], pretrained_parameters(config, told.append)).params
    np.testing.assert_array_equal(found["language"]["embeddings_norm"]["bias"], 7.0)
    np.testing.assert_array_equal(found["head"]["bias0"], state[0].params["head"]["bias0"] + 1)
    assert "bert: 1 parameters matched" in told[1]


def test_nothing_named_changes_nothing(state, tiny_config):
    assert pretrained_parameters(tiny_config) == {}
    jax.tree.map(np.testing.assert_array_equal, start_from(state[0], {}).params, state[0].params)


def test_model_of_other_sizes_is_told(folder, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.init.model, config.model.tower.num_blocks = str(folder), 2
    with pytest.raises(ValueError, match=r"config\.init\.model.*other sizes.*\n.*tower_1"):
        pretrained_parameters(config)


def test_text_encoder_with_the_bundled_tokenizer_is_refused(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.init.language = "bert-base-uncased"
    with pytest.raises(ValueError, match=r"config\.data\.tokenizer is the bundled one"):
        pretrained_parameters(config)
