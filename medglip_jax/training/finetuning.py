"""What of a model trains: modes, frozen parameters, and rates that fall towards the input (`config.finetune`).

A parameter tree is divided by path into what trains and what is fixed. Gradients, the optimizer and the average know
the first part only.
"""

import difflib
import re
from collections.abc import Container, Iterable
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.model.lora import LORA, make_adapters
from medglip_jax.model.modality import MODALITY
from medglip_jax.model.text_offsets import PROMPT
from medglip_jax.parallel.rules import path_name
from medglip_jax.training.phrases import make_offsets

Config = ConfigDict | FrozenConfigDict
Params = Any  # nested dict of arrays, or of their shapes

# Of each mode, the paths that train: re.search of this pattern finds them.
MODES = {
    "full": r"",
    "heads": r"^(head|masks|lora)/",
    "lora": r"^lora/",
    "prompt": r"^prompt/offsets$",
    "modality": rf"^{MODALITY}/",
}


def check_finetune(finetune: Config) -> None:
    """Finds mistakes in `config.finetune` that need no model to be found.

    Raises:
        ValueError: a field is out of range, or does not go with the mode.
    """
    mode = finetune.mode
    if mode and mode not in MODES:
        nearest = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(MODES)}"
        raise ValueError(f"config.finetune.mode is {mode!r}: {hint}")
    if not 0 < finetune.layer_decay <= 1:
        raise ValueError(
            f"config.finetune.layer_decay is {finetune.layer_decay}: expected a number above 0, at most 1 (off)"
        )
    rank = finetune.lora_rank
    if rank < 0 or (mode == "lora" and not rank):
        raise ValueError(f"config.finetune.lora_rank is {rank}: expected at least {int(mode == 'lora')}, such as 8")
    if rank and mode not in ("lora", "heads"):
        raise ValueError(
            f"config.finetune.lora_rank is {rank} and config.finetune.mode is {mode!r}: adapters train in the mode "
            "lora, or heads (with the head); set the mode to one of them, or the rank to 0"
        )
    if finetune.phrases and mode != "prompt":
        raise ValueError(
            f"config.finetune.phrases is {finetune.phrases!r} and config.finetune.mode is {mode!r}: phrases have "
            "learned offsets in the mode prompt only"
        )


def add_parameters(params: Params, config: Config, rng: jax.Array) -> Params:
    """Returns a model's parameters with the adapters, or the offsets of phrases, that `config.finetune` asks for.

    Args:
        params: parameters of the model.
        config: a recipe; reads `finetune`, and for offsets what `make_offsets` reads.
        rng: random key.

    Raises:
        ValueError: a pattern is found in no path, or in that of another parameter than a dense layer's kernel; or see
            `make_offsets`.
    """
    finetune = config.finetune
    if finetune.mode == "prompt":
        return {**params, PROMPT: make_offsets(config)}
    if not finetune.lora_rank:
        return params
    paths = traverse_util.flatten_dict(params, sep="/")
    found = {
        path for pattern in finetune.lora_patterns for path in match_paths(pattern, paths, "finetune.lora_patterns")
    }
    return {**params, LORA: make_adapters(params, sorted(found), finetune.lora_rank, rng)}


def trained_paths(paths: Iterable[str], finetune: Config) -> frozenset[str]:
    """Returns the paths of the parameters that train.

    Args:
        paths: of all parameters, "head/box/kernel".
        finetune: `config.finetune`; reads `mode` and `frozen`.

    Raises:
        ValueError: a field cannot be used, a pattern of `frozen` is found in no path, or nothing is left to train.
    """
    check_finetune(finetune)
    paths = list(paths)
    mode = finetune.mode or "full"
    trained = {path for path in paths if re.search(MODES[mode], path)}
    for pattern in finetune.frozen:
        trained -= set(match_paths(pattern, paths, "finetune.frozen"))
    if not trained:
        raise ValueError(
            f"config.finetune.mode {mode} with config.finetune.frozen {tuple(finetune.frozen)} leaves nothing to train"
        )
    return frozenset(trained)


def match_paths(pattern: str, paths: Iterable[str], field: str) -> list[str]:
    """Returns the paths in which `re.search` finds a pattern of a field of the recipe, "finetune.frozen".

    Raises:
        ValueError: it is no regular expression, or is found in none; names the paths nearest to it.
    """
    paths = list(paths)
    try:
        found = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise ValueError(f"config.{field}: {pattern!r} is no regular expression: {error}") from error
    if not found:
        plain = re.sub(r"[\^$\\]", "", pattern)
        starts = {path[: len(plain)]: path for path in paths}  # a pattern is most often the beginning of a path
        nearest = difflib.get_close_matches(plain, starts, n=3, cutoff=0.0)
        raise ValueError(
            f"config.{field}: {pattern!r} is found in the path of no parameter; the nearest are "
            f"{', '.join(starts[start] for start in nearest)}"
        )
    return found


def split_trained(params: Params, finetune: Config) -> tuple[Params, Params]:
    """Divides a parameter tree into what trains and what is fixed; `join` puts them together again.

    Args:
        params: nested dict of arrays, or of their shapes.
        finetune: `config.finetune`.

    Returns:
        Two nested dicts without each other's paths.

    Raises:
        ValueError: see `trained_paths`.
    """
    paths = frozenset(traverse_util.flatten_dict(params, sep="/"))
    trained = trained_paths(paths, finetune)
    return select_paths(params, trained), select_paths(params, paths - trained)


def select_paths(params: Params, paths: Container[str]) -> Params:
    """Returns the part of a nested dict whose paths are given."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: x for path, x in flat.items() if path in paths}, sep="/")


def join(params: Params, part: Params) -> Params:
    """Returns a parameter tree with the arrays that `part` has in place of its own, and those that it lacked."""
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    flat |= traverse_util.flatten_dict(part, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")


def layer_depth(path: str, model: Config) -> tuple[int, int] | None:
    """Returns at which depth of its encoder a parameter stands, and how many layers that encoder has.

    Depth 0 is what makes the first features: `patch_embed` of the backbone, all embeddings of the text encoder with
    their norm. Swin's blocks are counted through all stages from 1, and a downsampling has the depth of the block
    before it (as in mmpretrain's SwinTransformer.get_layer_depth); BERT's layer i has depth i + 1.

    Args:
        path: of the parameter.
        model: `config.model`.

    Returns:
        (depth, layers); None for what comes after the layers of an encoder: the backbone's output norms (`norm_1` to
        `norm_3`), the pyramid (`neck`), the tower with its text layers, and the head.
    """
    encoder, _, rest = path.partition("/")
    depths = model.swin.depths
    if encoder == "backbone":
        if rest.startswith("patch_embed/"):
            return 0, sum(depths)
        if found := re.match(r"stage_(\d+)_(?:block_(\d+)|downsample)/", rest):
            stage, block = int(found[1]), found[2]
            return sum(depths[:stage]) + (depths[stage] if block is None else int(block) + 1), sum(depths)
    if encoder == "language":
        found = re.match(r"layer_(\d+)/", rest)
        return int(found[1]) + 1 if found else 0, model.bert.num_layers
    return None


def layer_multiplier(path: str, config: Config) -> float:
    """Returns `layer_decay` to the power of (layers + 1 - depth), as in BEiT (arXiv 2106.08254): 1 after the encoders.

    An adapter has the rate of its layer, and so have a modality's own parameters of the backbone.

    Args:
        path: of the parameter.
        config: a recipe; reads `finetune.layer_decay` and `model`.
    """
    shared = path.removeprefix(f"{LORA}/")
    if shared.startswith(f"{MODALITY}/backbone/"):
        shared = shared.removeprefix(f"{MODALITY}/")
    place = layer_depth(shared, config.model)
    return 1.0 if place is None else float(config.finetune.layer_decay ** (place[1] + 1 - place[0]))


def scale_by_layer(updates: Any, config: Config) -> Any:
    """Multiplies each parameter's update by its `layer_multiplier`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, update: update * layer_multiplier(path_name(path), config), updates
    )
