"""Reading PyTorch weights (.safetensors, .bin, .pth; whole or in shards) without running code that they may hold."""

import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

# Where the weights of a Hugging Face folder may lie, the first that is there.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".json")
_LFS_POINTER = b"version https://git-lfs"


class StateDict(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for and not kept.

    Args:
        readers: a function for each name that returns its array.
    """

    def __init__(self, readers: Mapping[str, Callable[[], np.ndarray]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def strip_prefix(state_dict: Mapping[str, np.ndarray], prefix: str = "module.") -> Mapping[str, np.ndarray]:
    """Returns the state dict without the prefix that data parallel training puts before every name, if it is there."""
    if not all(name.startswith(prefix) for name in state_dict):
        return state_dict
    return StateDict({name.removeprefix(prefix): partial(state_dict.__getitem__, name) for name in state_dict})


def read_state_dict(path: str | os.PathLike[str], *, ema: bool = False) -> Mapping[str, np.ndarray]:
    """Opens the weights of a file or of a Hugging Face folder.

    Of a file that `torch.save` wrote it takes the dict under "state_dict" (mmdetection) or "model" (Microsoft's GLIP),
    or the file's own dict of tensors. "module." before all names is taken off.

    Args:
        path: a .safetensors file, a file that `torch.save` wrote, an index of shards (.index.json), or a folder with
            one of them under Hugging Face's names.
        ema: takes the averaged weights, "model_ema", of a file that has them.

    Returns:
        NumPy arrays by name, float32 wherever the file holds floating-point numbers. Arrays of .safetensors are read
        one at a time; those of torch files are mapped into memory, except in the format before PyTorch 1.6.

    Raises:
        ValueError: there are no weights, or they are damaged, or the file holds Python objects that could run code, or
            PyTorch is needed and not installed.
    """
    path = pathlib.Path(path)
    check_exists(path)
    if path.is_dir():
        path = _weights_of(path)
    if path.name.endswith(".index.json"):
        return strip_prefix(_read_shards(path, ema))
    return strip_prefix(_read_file(path, ema))


def check_exists(path: pathlib.Path) -> None:
    """Raises a ValueError if the path is not there, which says how to fetch a model if it looks like a hub name."""
    if path.exists():
        return
    fetch = f": to use the model {path} of the Hugging Face hub, fetch it first (hf download {path} --local-dir DIR)"
    name = not path.is_absolute() and re.fullmatch(r"([\w-]+/)?[\w.-]+", str(path)) and path.suffix not in _SUFFIXES
    raise ValueError(f"there is no file or folder {path}{fetch if name else ''}")


def _weights_of(folder: pathlib.Path) -> pathlib.Path:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder} holds no weights: expected {', '.join(_WEIGHT_FILES[:-1])} or {_WEIGHT_FILES[-1]}, "
        f"found {', '.join(files[:8]) or 'nothing'}{' and more' if len(files) > 8 else ''}"
    )


def _read_file(path: pathlib.Path, ema: bool) -> Mapping[str, np.ndarray]:
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, ema)


def _read_shards(index: pathlib.Path, ema: bool) -> Mapping[str, np.ndarray]:
    """Opens the files that an index names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of shards: expected JSON with a weight_map") from None
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for name in files:
        shard = index.parent / name
        if pathlib.PurePath(name).name != name or not shard.is_file():
            raise ValueError(f"{index} names the shard {name}, which is not beside it: fetch all files of the model")
        arrays = _read_file(shard, ema)
        readers |= {key: partial(arrays.__getitem__, key) for key in arrays}
    if missing := sorted(places.keys() - readers.keys()):
        raise ValueError(f"the shards of {index} lack {missing[0]}, {len(missing)} names in all: fetch the model again")
    return StateDict(readers)


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _read_safetensors(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not complete ({error}): fetch or export it again") from None

    def read(name: str) -> np.ndarray:
        dtype = file.get_slice(name).get_dtype()
        if dtype.startswith("F") and dtype not in ("F16", "F32", "F64"):
            raise ValueError(f"{path}: {name} has the type {dtype}; expected float32, float16 or bfloat16")
        return _as_float32(file.get_tensor(name))

    return StateDict({name: partial(read, name) for name in file.keys()})  # noqa: SIM118 (it is no mapping)


def _read_torch(path: pathlib.Path, ema: bool) -> Mapping[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} needs PyTorch to be read: install the extra `torch` (pip install 'medglip_jax[torch]')"
        ) from None

    try:  # only files in the zip format, PyTorch's since 1.6, can be mapped
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # pickle, zip and torch each have errors of their own
        raise ValueError(_explain(path, error)) from None

    tensors = _unwrap(content, ema)
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        kind = f"a dict of {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else type(content)
        raise ValueError(f"{path}: expected tensors by name, or a dict of them as state_dict or model; found {kind}")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name].detach()
        return np.array(tensor.float() if tensor.is_floating_point() else tensor)

    return StateDict({name: partial(read, name) for name in tensors})


def _unwrap(content: Any, ema: bool) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    for key in ("model_ema",) * ema + ("state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def _explain(path: pathlib.Path, error: Exception) -> str:
    """Says why `torch.load` refused a file."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path} holds a Python object ({found[1]}) beside the tensors. It is not read, because such objects can "
            "run code. If you trust the file, keep only its weights, where it was written: "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "Weights only load failed" in reason:
        return (
            f"{path} is no file of tensors alone that torch.save wrote, or it is damaged. It is not read, because a "
            "Python pickle can run code: fetch it again, or have its owner save the weights alone"
        )
    return f"{path} is damaged or not complete ({reason.split('. ')[0]}): fetch it again"
