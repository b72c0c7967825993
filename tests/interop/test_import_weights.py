"""`medglip import`: GLIP checkpoints of others become folders, whole or not at all."""

import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.text import load_tokenizer
from medglip_jax import import_weights
from medglip_jax.configuration import load_config, save_config
from medglip_jax.interop import glip, mmdet
from medglip_jax.interop.folder import read_folder
from medglip_jax.interop.state_dict import to_state_dict

torch = pytest.importorskip("torch", reason="needs PyTorch, which the extra `torch` installs")
NAMES = {"mmdet": mmdet, "glip": glip}


@pytest.fixture
def recipe(tiny_config, tmp_path):
    path = tmp_path / "recipe.json"
    save_config(tiny_config, path)
    return path


@pytest.fixture
def tokenizer(tmp_path):
    load_tokenizer().save(tmp_path / glip.BERT)
    return tmp_path / glip.BERT


def state_dict(params, config, naming):
    return dict(to_state_dict(params, NAMES[naming].parameter_names(config.model)))


def save_pickle(arrays, path, key=None):
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    torch.save({key: tensors} if key else tensors, path)
    return path


@pytest.mark.parametrize("naming, key", [("mmdet", "state_dict"), ("mmdet", None), ("glip", "model")])
def test_checkpoint_becomes_a_folder_bit_for_bit(
    naming, key, tiny_params, tiny_config, recipe, tokenizer, tmp_path, capsys
):
    arrays = state_dict(tiny_params, tiny_config, naming)
    if naming == "glip":  # as Microsoft's trainer leaves them: the prefix of data parallelism, and weights without use
        arrays = {f"module.{name}": x for name, x in arrays.items()}
        arrays["module.rpn.head.cls_logits.weight"] = np.zeros((80, 16, 1, 1), np.float32)
    file = save_pickle(arrays, tmp_path / "glip.pth", key)
    output = tmp_path / "out"
    arguments = ["--input", str(file), "--output", str(output), "--config", str(recipe)]
    assert import_weights.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{len(jax.tree.leaves(tiny_params))} parameters matched, 0 missing, 0 unexpected" in printed
    jax.tree.map(np.testing.assert_array_equal, read_folder(output)[0], tiny_params)
    assert load_tokenizer(str(output)).vocab_size == load_tokenizer().vocab_size


def test_sizes_are_told_by_the_checkpoint(tiny_params, tiny_config):
    wide = tiny_config.model.bert.num_heads  # not told by the shapes of a model this narrow
    for naming in NAMES:
        found = import_weights.infer_model(
            state_dict(tiny_params, tiny_config, naming), load_config("medglip_t").unlock(), naming
        )
        assert found.swin.to_dict() | {"drop_path": 0} == tiny_config.model.swin.to_dict() | {"drop_path": 0}
        assert found.bert.to_dict() | {"num_heads": wide} == tiny_config.model.bert.to_dict()
        assert (found.tower.num_blocks, found.tower.fusion_dim) == (1, 32)
        assert found.fpn.channels == 16


def test_partial_checkpoint_is_refused_with_the_report(tiny_params, tiny_config, recipe, tokenizer, tmp_path, capsys):
    arrays = state_dict(tiny_params, tiny_config, "mmdet")
    del arrays["bbox_head.head.bias_lang"]
    arrays["bbox_head.head.bias0"] = np.zeros(7, np.float32)
    arrays["another.weight"] = np.zeros(1, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    arguments = ["--input", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "out")]
    assert import_weights.main([*arguments, "--config", str(recipe)]) == 1
    error = capsys.readouterr().err
    for part in ("1 missing, 1 unexpected, 1 misshapen", "bias_lang", "another.weight", "bias0 [7], model [1]"):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_names_of_no_glip_are_told(tmp_path, tokenizer, capsys):
    save_file({"encoder.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    arguments = ["--input", str(tmp_path / "other.safetensors"), "--output", str(tmp_path / "out")]
    assert import_weights.main(arguments) == 1
    assert "not the names of a GLIP" in capsys.readouterr().err


class _Bomb:
    def __reduce__(self):
        return print, ("this must not run",)


def test_pickle_that_would_run_code_is_refused(tmp_path, tokenizer, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": _Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Bomb(), protocol=2))
    for name in ("bomb.pth", "bare.pth"):
        assert import_weights.main(["--input", str(tmp_path / name), "--output", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr()
        assert "must not run" not in printed.out
        assert name in printed.err and "can run code" in printed.err


def test_missing_or_wrong_tokenizer_is_told(tiny_params, tiny_config, tmp_path, capsys):
    arrays = state_dict(tiny_params, tiny_config, "mmdet")
    (tmp_path / "a").mkdir()
    file = save_pickle(arrays, tmp_path / "a" / "glip.pth")
    assert import_weights.main(["--input", str(file), "--output", str(tmp_path / "out")]) == 1
    assert "give --tokenizer" in capsys.readouterr().err
