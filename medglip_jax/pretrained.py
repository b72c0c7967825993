"""Trained parameters from wherever they lie: a run, an exported folder, or encoders that others pretrained."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.text import TextTokenizer, load_tokenizer
from medglip_jax.errors import list_mismatches
from medglip_jax.inference import check_parameters, flat_shapes, parameter_shapes
from medglip_jax.interop import huggingface
from medglip_jax.interop.folder import is_folder, read_folder
from medglip_jax.model.detector import GLIP
from medglip_jax.model.masks import is_of_masks, without_masks
from medglip_jax.model.modality import MODALITY, copies, modality_names
from medglip_jax.model.text_offsets import PROMPT
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import match_rules, shardings
from medglip_jax.paths import local_copy
from medglip_jax.training.checkpoint import TOKENIZER, load_params, locate
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
) -> tuple[GLIP, Any, ConfigDict, TextTokenizer]:
    """Loads a detector: the module, its parameters, the recipe and the tokenizer.

    Args:
        path: a run's working directory (its newest checkpoint is read), WORKDIR/checkpoints/STEP, or a folder that
            `medglip export` or `medglip import` wrote.
        use_ema: load a run's averaged parameters; None does what its recipe says.
        config: a recipe to use instead of its own.
        mesh: where to put the parameters; None puts them on the default device.

    Raises:
        OSError, ValueError: there is no readable checkpoint, its parameters do not fit the recipe, or its tokenizer
            has more tokens than the model knows.
    """
    if mesh is None or is_folder(path):
        params, own = load_arrays(path, use_ema)
    else:
        params, own = load_params(path, use_ema, mesh)
    config = own if config is None else config
    model = GLIP(config.model)
    check_parameters(params, model, config, os.fspath(path))
    if mesh is None:
        params = jax.device_put(params)
    elif is_folder(path):
        params = jax.tree.map(place, params, shardings(match_rules(resolve_rules(config), params, mesh), mesh))
    return model, params, config, tokenizer_of(path, config)


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
        wanted = flat_shapes(parameter_shapes(GLIP(config.model), config))
        if MODALITY not in params:  # what modalities have of their own starts from a plain model's parts
            wanted = {path: shape for path, shape in wanted.items() if not path.startswith(f"{MODALITY}/")}
        if not own.model.masks.kind:  # a plain model: the mask branch of the recipe starts from random numbers
            wanted = {path: shape for path, shape in wanted.items() if not is_of_masks(path)}
        elif not config.model.masks.kind:
            params, _ = without_masks(params, own)
        if mismatches := list_mismatches(flat_shapes(params), wanted, "the recipe"):
            raise ValueError(f"config.init.model, {config.init.model}, is a model of other sizes:\n{mismatches}")
        tell(f"{config.init.model}: {len(wanted)} parameters")
        found = params
    for name, load in (("backbone", huggingface.load_swin), ("language", huggingface.load_bert)):
        if folder := config.init[name]:
            part, report = load(folder, config)
            tell(f"{folder}: {report.describe()}")
            found[name] = {**found.get(name, {}), **part}
    if MODALITY not in found and (own := copies(found, config.model.modality)):
        tell(f"{len(own)} parameters of {', '.join(modality_names(config.model.modality))} start as copies")
        found |= traverse_util.unflatten_dict(own, sep="/")
    return found


def start_from(state: TrainState, params: dict[str, Any]) -> TrainState:
    """Returns a state at its beginning whose parameters, and their average, are `params` where these have them."""
    given: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")

    def fill(tree: Any) -> Any:
        flat: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
        flat = {path: place(given[path], x.sharding) if path in given else x for path, x in flat.items()}
        return traverse_util.unflatten_dict(flat, sep="/")

    return state.replace(params=fill(state.params), ema=None if state.ema is None else fill(state.ema))
