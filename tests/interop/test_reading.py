import argparse
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from medglip_jax.interop.reading import StateDict, read_state_dict, strip_prefix

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def tensors(torch, arrays=ARRAYS):
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


def assert_read(state_dict, wanted=ARRAYS):
    assert set(state_dict) == set(wanted)
    for name, x in wanted.items():
        assert state_dict[name].dtype == np.float32
        np.testing.assert_array_equal(state_dict[name], x)


def test_membership_reads_nothing():
    def fail():
        raise AssertionError("was read")

    state_dict = StateDict({"a": fail})
    assert "a" in state_dict and "b" not in state_dict and list(state_dict) == ["a"] and len(state_dict) == 1


def test_a_prefix_that_not_all_names_have_stays():
    assert set(strip_prefix({"module.a": ARRAYS["b"], "module.module.b": ARRAYS["b"]})) == {"a", "module.b"}
    assert set(strip_prefix({"module.a": ARRAYS["b"], "b": ARRAYS["b"]})) == {"module.a", "b"}


def test_safetensors_file_and_folder(tmp_path):
    save_file({f"module.{name}": x for name, x in ARRAYS.items()}, tmp_path / "model.safetensors")
    assert_read(read_state_dict(tmp_path / "model.safetensors"))
    assert_read(read_state_dict(tmp_path))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_floating_point_numbers_become_float32(tmp_path, dtype):
    save_file({name: x.astype(dtype) for name, x in ARRAYS.items()}, tmp_path / "model.safetensors")
    assert_read(read_state_dict(tmp_path))


def test_eight_bit_floats_are_refused(tmp_path, torch):
    from safetensors.torch import save_file as save_tensors

    save_tensors({"a": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="a has the type F8_E4M3"):
        read_state_dict(tmp_path)["a"]


def test_whole_numbers_stay(tmp_path):
    save_file({"position_ids": np.arange(4)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["position_ids"].dtype == np.int64


def write_shards(folder, places):
    for name in set(places.values()):
        save_file({key: ARRAYS[key] for key in ARRAYS if places[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_joined(tmp_path):
    write_shards(tmp_path, {"a.weight": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"})
    assert_read(read_state_dict(tmp_path))
    assert_read(read_state_dict(tmp_path / "model.safetensors.index.json"))


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, {"a.weight": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"})
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard model-2-of-2\.safetensors, which is not beside it"):
        read_state_dict(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(ARRAYS, tmp_path / "else.safetensors")
    places = dict.fromkeys(ARRAYS, "../else.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match="not beside it"):
        read_state_dict(folder)


def test_names_that_the_shards_lack_are_reported(tmp_path):
    write_shards(tmp_path, dict.fromkeys(ARRAYS, "model-1.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {**dict.fromkeys(ARRAYS, "model-1.safetensors"), "c": "model-1.safetensors"}})
    )
    with pytest.raises(ValueError, match="lack c, 1 names"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index"):
        read_state_dict(tmp_path)


def test_truncated_safetensors_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not complete"):
        read_state_dict(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    for name in ("model.safetensors", "model.pth"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(ValueError, match="git lfs pull"):
            read_state_dict(tmp_path / name)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no weights.*model\.safetensors.*found tf_model\.h5"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("name", ["bert-base-uncased", "microsoft/swin-tiny-patch4-window7-224"])
def test_a_hub_name_says_how_to_fetch_it(name):
    with pytest.raises(ValueError, match=f"hf download {name} --local-dir"):
        read_state_dict(name)


def test_a_missing_file_is_no_hub_name(tmp_path):
    for path in (tmp_path / "model", "weights/model.pth"):
        with pytest.raises(ValueError, match="there is no file or folder") as error:
            read_state_dict(path)
        assert "hf download" not in str(error.value)


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_unwrapped(tmp_path, torch, key, zipped):
    content = {f"module.{name}": x for name, x in tensors(torch).items()}
    content = {key: content, "meta": {"epoch": 3}} if key else content
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert_read(read_state_dict(tmp_path / "model.pth"))


def test_half_precision_in_torch_files_becomes_float32(tmp_path, torch):
    torch.save({name: x.bfloat16() for name, x in tensors(torch).items()}, tmp_path / "pytorch_model.bin")
    assert_read(read_state_dict(tmp_path))


def test_sharded_torch_files_are_joined(tmp_path, torch):
    places = {"a.weight": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    for name, x in tensors(torch).items():
        torch.save({name: x}, tmp_path / places[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_read(read_state_dict(tmp_path))


def test_the_average_is_taken_when_asked_for(tmp_path, torch):
    average = {name: x + 1 for name, x in ARRAYS.items()}
    torch.save({"model": tensors(torch), "model_ema": tensors(torch, average)}, tmp_path / "model.pth")
    assert_read(read_state_dict(tmp_path / "model.pth"))
    assert_read(read_state_dict(tmp_path / "model.pth", ema=True), average)


def test_arrays_outlive_the_file(tmp_path, torch):
    torch.save(tensors(torch), tmp_path / "model.pth")
    x = read_state_dict(tmp_path / "model.pth")["b"]
    (tmp_path / "model.pth").write_bytes(bytes(10_000))
    np.testing.assert_array_equal(x, ARRAYS["b"])


class Command:
    """An object whose unpickling runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, torch, zipped):
    mark = tmp_path / "was_run"
    content = {"model": tensors(torch), "hook": Command(mark)}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pth holds a Python object \(posix\.mkdir\).*not read"):
        read_state_dict(tmp_path / "model.pth")
    assert not mark.exists()


def test_harmless_objects_are_refused_too(tmp_path, torch):
    torch.save({"model": tensors(torch), "args": argparse.Namespace(epochs=3)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"\(argparse\.Namespace\).*keep only its weights"):
        read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_torch_files_are_named(tmp_path, torch, zipped):
    path = tmp_path / "model.pth"
    torch.save(tensors(torch), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.pth .*damaged"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
def test_files_of_another_kind_are_named(tmp_path, torch, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pth .*damaged"):
        read_state_dict(tmp_path / "model.pth")


def test_a_torch_file_without_tensors_says_what_it_holds(tmp_path, torch):
    torch.save({"epoch": 3, "net": tensors(torch)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"expected tensors by name.*found a dict of epoch, net"):
        read_state_dict(tmp_path / "model.pth")


def test_torch_is_only_imported_for_torch_files(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    code = (
        "import sys; from medglip_jax.interop.reading import read_state_dict; import medglip_jax.interop.huggingface; "
        f"read_state_dict({str(tmp_path)!r})['b']; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_without_torch_its_files_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"model\.pth needs PyTorch.*medglip_jax\[torch\]"):
        read_state_dict(tmp_path / "model.pth")
