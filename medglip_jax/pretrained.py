"""Trained parameters from wherever they lie: a run, an exported folder, or encoders that others pretrained."""

import collections
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.text import TextTokenizer, load_tokenizer
from medglip_jax.errors import list_mismatches
from medglip_jax.inference import check_parameters, flat_shapes, parameter_shapes
from medglip_jax.interop import huggingface
from medglip_jax.interop.folder import is_folder, read_folder
from medglip_jax.model.masks import is_of_masks, without_masks
from medglip_jax.model.modality import MODALITY, copies, modality_names
from medglip_jax.model.pretraining import make_model
from medglip_jax.model.text_offsets import PROMPT
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import match_rules, shardings
from medglip_jax.paths import local_copy
from medglip_jax.training.checkpoint import TOKENIZER, load_params, locate
from medglip_jax.training.finetuning import match_paths, select_paths
from medglip_jax.training.state import TrainState


def load_arrays(path: str | os.PathLike, use_ema: bool | None = None) -> tuple[Any, ConfigDict]:
    """Reads the parameters of a run or of an exported folder as NumPy arrays; see `load_params` and `read_folder`."""
    return read_folder(path) if is_folder(path) else load_params(path, use_ema)


def load_model(
    path: str | os.PathLike,
    *,
    use_ema: bool | None = None,
    config: ConfigDict | None = None,
    mesh: Mesh | None = None,
    pretraining: bool = False,
) -> tuple[Module, Any, ConfigDict, TextTokenizer]:
    """Loads a detector: the module, its parameters, the recipe and the tokenizer.

    Args:
        path: a run's working directory (its newest checkpoint is read), WORKDIR/checkpoints/STEP, or a folder that
            `medglip export` or `medglip import` wrote.
        use_ema: load a run's averaged parameters; None does what its recipe says.
        config: a recipe to use instead of its own.
        mesh: where to put the parameters; None puts them on the default device.
        pretraining: a run of another task than grounding (`config.pretraining.task`) will do.

    Raises:
        OSError, ValueError: there is no readable checkpoint, its parameters do not fit the recipe, its tokenizer has
            more tokens than the model knows, or it was pretrained only and is to detect.
    """
    if mesh is None or is_folder(path):
        params, own = load_arrays(path, use_ema)
    else:
        params, own = load_params(path, use_ema, mesh)
    config = own if config is None else config
    if not pretraining:
        require_detector(own, path)
    model = make_model(config)
    check_parameters(params, model, config, os.fspath(path))
    if mesh is None:
        params = jax.device_put(params)
    elif is_folder(path):
        params = jax.tree.map(place, params, shardings(match_rules(resolve_rules(config), params, mesh), mesh))
    return model, params, config, tokenizer_of(path, config)


def require_detector(config: ConfigDict, path: str | os.PathLike) -> None:
    """Checks that a run has learned to detect.

    Raises:
        ValueError: its task is another than grounding.
    """
    if task := config.pretraining.task:
        raise ValueError(
            f"{os.fspath(path)} is a run of config.pretraining.task {task}, which finds no boxes: start grounding from "
            "it with config.init.model and config.init.patterns (docs/pretraining.md)"
        )


def tokenizer_of(path: str | os.PathLike, config: ConfigDict) -> TextTokenizer:
    """Returns the tokenizer that lies with a checkpoint, else that of the recipe.

    Raises:
        ValueError: it has more tokens than the model knows.
    """
    folder = epath.Path(path) if is_folder(path) else locate(path)[0] / TOKENIZER
    if folder.is_dir():
        with local_copy(folder) as local:
            tokenizer = load_tokenizer(local)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.bert.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model of {path} knows "
            f"{config.model.bert.vocab_size}: use the tokenizer that it was trained with"
        )
    return tokenizer


def place(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array that every process has in full onto the devices of a mesh, each process on its own."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def pretrained_parameters(config: ConfigDict, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Reads what `config.init` names; nothing where it names nothing.

    Args:
        config: the recipe.
        tell: takes a report of what found its place, for each source.

    Returns:
        Part of the parameter tree, NumPy arrays; what an encoder's folder has goes before `config.init.model`. From a
        plain model or encoder, each modality of `config.model.modality` gets a copy of what it has of its own.

    Raises:
        OSError, ValueError: a source cannot be read or does not fit the recipe.
    """
    if config.init.language and not config.data.tokenizer:
        raise ValueError(
            "config.init.language names a pretrained text encoder, but config.data.tokenizer is the bundled one, whose "
            "tokens it does not know: set it to the tokenizer of the encoder, most often the same folder"
        )
    found: dict[str, Any] = {}
    if config.init.model:
        params, own = load_arrays(config.init.model)
        if PROMPT in params:
            raise ValueError(
                f"config.init.model, {config.init.model}, is a run of prompt tuning, which learned offsets and no "
                f"weights: start from what it started from ({own.init.model or 'its own initialisation'})"
            )
        found = _choose(params, own, config, tell)
    for name, load in (("backbone", huggingface.load_swin), ("language", huggingface.load_bert)):
        if folder := config.init[name]:
            part, report = load(folder, config)
            tell(f"{folder}: {report.describe()}")
            found[name] = {**found.get(name, {}), **part}
    if MODALITY not in found and (own := copies(found, config.model.modality)):
        tell(f"{len(own)} parameters of {', '.join(modality_names(config.model.modality))} start as copies")
        found |= traverse_util.unflatten_dict(own, sep="/")
    return found


def _choose(params: dict[str, Any], own: ConfigDict, config: ConfigDict, tell: Callable[[str], None]) -> dict[str, Any]:
    """Returns what a new run takes of a model: everything, or what `config.init.patterns` say."""
    source, patterns = config.init.model, tuple(config.init.patterns)
    if own.model.masks.kind and not config.model.masks.kind:
        params, _ = without_masks(params, own)
    given, wanted = flat_shapes(params), flat_shapes(parameter_shapes(make_model(config), config))
    if not patterns:
        if own.pretraining.task != config.pretraining.task:
            raise ValueError(
                f"config.init.model, {source}, is a run of the task {own.pretraining.task or 'grounding'!r}, and this "
                f"one is of {config.pretraining.task or 'grounding'!r}: say with config.init.patterns what to take, "
                "such as ('^backbone/', '^language/')"
            )
        if MODALITY not in params:  # what modalities have of their own starts from a plain model's parts
            wanted = {path: shape for path, shape in wanted.items() if not path.startswith(f"{MODALITY}/")}
        if not own.model.masks.kind:  # a plain model: the mask branch of the recipe starts from random numbers
            wanted = {path: shape for path, shape in wanted.items() if not is_of_masks(path)}
        taken, chosen = given, set(wanted)
    else:
        common = {_part(path) for path in given} & {_part(path) for path in wanted}
        taken, expected = (
            {
                path: tree[path]
                for pattern in patterns
                for path in match_paths(pattern, filter(lambda path: _part(path) in common, tree), "init.patterns")
            }
            for tree in (given, wanted)
        )
        chosen = set(expected)
    if mismatches := list_mismatches(taken, {path: wanted[path] for path in chosen}, "the recipe"):
        raise ValueError(f"config.init.model, {source}, is a model of other sizes:\n{mismatches}")
    tell(f"{source}: {len(chosen)} parameters")
    if patterns:
        tell(f"  taken: {_count_by_part(chosen)}")
        tell(f"  left there: {_count_by_part(set(given) - chosen)}")
        tell(f"  from random numbers: {_count_by_part(set(wanted) - chosen)}")
    return select_paths(params, chosen)


def _part(path: str) -> str:
    return path.split("/")[0]


def _count_by_part(paths: Iterable[str]) -> str:
    """Returns "backbone 173, neck 10": how many of some paths begin with each name."""
    counts = collections.Counter(map(_part, paths))
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts)) or "nothing"


def start_from(state: TrainState, params: dict[str, Any]) -> TrainState:
    """Returns a state at its beginning whose parameters, and their average, are `params` where these have them."""
    given: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")

    def fill(tree: Any) -> Any:
        flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
        flat = {path: place(given[path], x.sharding) if path in given else x for path, x in flat.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    return state.replace(params=fill(state.params), ema=None if state.ema is None else fill(state.ema))
