"""The exported folder, without PyTorch: what is in it, how it is replaced, and that it is read back exactly."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from data_pipelines.text import load_tokenizer
from medglip_jax.configuration import load_config
from medglip_jax.interop import folder as folder_module
from medglip_jax.interop.folder import INDEX_FILE, WEIGHTS_FILE, is_folder, read_folder, write_folder
from medglip_jax.parallel.mesh import make_mesh
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import match_rules, shardings


@pytest.fixture
def write(tiny_config, tmp_path):
    def write(params, name="model", **options):
        return write_folder(params, tiny_config, load_tokenizer(), tmp_path / name, card="# card\n", **options)

    return write


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_folder_is_read_back_bit_for_bit(write, params, tiny_params, tiny_config):
    weights = write(params)
    assert weights.name == WEIGHTS_FILE and is_folder(weights.parent)
    found, config = read_folder(weights.parent)
    assert_equal(found, tiny_params)
    assert config.model.to_dict() == tiny_config.model.to_dict()
    with safe_open(weights, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert "bbox_head.head.dyhead_tower.0.b_attn.gamma_v" in file.keys()  # noqa: SIM118


def test_sharded_parameters_give_the_same_file(write, params, tiny_params, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    mesh = make_mesh(config.mesh)
    placed = jax.device_put(tiny_params, shardings(match_rules(resolve_rules(config), tiny_params, mesh), mesh))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(placed))
    assert write(placed, "sharded").read_bytes() == write(params, "whole", consume=True).read_bytes()
    assert params == {}


def test_large_models_are_cut_into_files(write, params, tiny_params):
    index = write(params, max_shard=40_000, consume=True)
    assert index.name == INDEX_FILE
    files = sorted(index.parent.glob("model-*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(json.loads(index.read_text())["weight_map"].values())
    largest = max(x.nbytes for x in jax.tree.leaves(tiny_params))
    assert all(path.stat().st_size < max(40_000, largest) + 20_000 for path in files)
    assert_equal(read_folder(index.parent)[0], tiny_params)


def test_an_older_export_is_replaced_and_other_files_stay(write, params, tiny_params):
    index = write(params, max_shard=40_000)
    (index.parent / "notes.txt").write_text("mine")
    weights = write(jax.tree.map(lambda x: x + 1, tiny_params))
    assert not list(weights.parent.glob("model-*")) and not index.exists()
    assert (weights.parent / "notes.txt").read_text() == "mine"
    assert_equal(read_folder(weights.parent)[0], jax.tree.map(lambda x: x + 1, tiny_params))


def test_what_is_no_export_is_not_written_over(write, params, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        write(params)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_interrupted_export_leaves_no_half_of_one(write, params, monkeypatch):
    weights = write(params)
    before = weights.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(folder_module, "to_state_dict", fail)
    with pytest.raises(OSError, match="disk is full"):
        write(params)
    assert weights.read_bytes() == before
    assert not list(weights.parent.glob(".export-*"))


def test_what_belongs_to_the_trainers_machine_is_left_out(tiny_config, params, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.data.train, config.init.model = "/home/someone/patients", "/home/someone/run"
    write_folder(params, config, load_tokenizer(), tmp_path / "model", card="")
    written = "".join(path.read_text() for path in (tmp_path / "model").glob("*.json"))
    assert "someone" not in written
    assert load_config(tmp_path / "model").data.train == ""


def test_weights_of_another_recipe_are_named(write, params):
    folder = write(params).parent
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["model"]["tower"]["num_blocks"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not those of its config\.json.*missing.*\n.*dyhead_tower\.3"):
        read_folder(folder)


def test_cut_weights_are_refused(write, params):
    weights = write(params)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_folder(weights.parent)
    weights.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        read_folder(weights.parent)
