"""Sharding by rules: the path of a parameter says over which mesh axes its dimensions are split."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

# (pattern, spec): the spec has a mesh axis, a tuple of axes, or None for each leading dimension.
Rules = Sequence[tuple[str, Sequence[Any]]]

_LISTED = 8  # parameters that a report names


def path_name(path: Sequence[Any]) -> str:
    """Returns a path of `jax.tree_util` as "a/b/c"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _fit(spec: Sequence[Any], name: str, shape: tuple[int, ...], mesh: Mesh, dropped: list[str]) -> PartitionSpec:
    """Returns the spec with what does not fit the shape left out; adds a line to `dropped` for each loss."""
    kept: list[Any] = []
    for dimension, entry in enumerate(spec):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        unknown = [axis for axis in axes if axis not in mesh.shape]
        if unknown:
            raise ValueError(
                f"config.sharding_rules shards {name} over {unknown[0]!r}: the mesh has {', '.join(mesh.shape)}"
            )
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        if dimension >= len(shape):
            if parts > 1:
                dropped.append(f"{name} {shape}: no dimension {dimension} for {entry!r}")
        elif shape[dimension] % parts:
            dropped.append(f"{name} {shape}: dimension {dimension} is no multiple of {entry!r} ({parts})")
            kept.append(None)
        else:
            kept.append(entry if isinstance(entry, str) or not axes else axes)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def match_rules(rules: Rules, tree: Any, mesh: Mesh) -> Any:
    """Finds the sharding of every parameter.

    Args:
        rules: (pattern, spec) pairs; the first whose pattern `re.search` finds in the path "a/b/c" wins.
        tree: parameters, or their shapes (anything with `.shape`).
        mesh: its axes are what specs name.

    Returns:
        A tree like `tree` of PartitionSpec. Where a spec has more entries than the array has dimensions, or a dimension
        is no multiple of its mesh axes, that entry is left out; one logged warning lists all of them.

    Raises:
        ValueError: a parameter that no rule matches, or a rule that names an axis that the mesh does not have.
    """
    dropped: list[str] = []

    def spec_of(path: Sequence[Any], leaf: Any) -> PartitionSpec:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                return _fit(spec, name, tuple(leaf.shape), mesh, dropped)
        raise ValueError(f"config.sharding_rules: no pattern matches {name}; end the rules with (r'.*', ()) to copy it")

    specs = jax.tree_util.tree_map_with_path(spec_of, tree)
    _report("sharding rules do not fit everywhere; these dimensions are not split", dropped)
    return specs


def follow_parameters(tree: Any, params: Any, specs: Any) -> Any:
    """Gives each array of an optimizer state the sharding of its parameter.

    An array belongs to the parameter whose whole path ends its own path, if their shapes agree (the moments of Adam at
    "1/mu/neck/kernel" to "neck/kernel"). Scalars are replicated, and so is any other array, with a logged warning.

    Args:
        tree: an optimizer state, or its shapes.
        params: the parameters, or their shapes.
        specs: what `match_rules` returned for `params`.

    Returns:
        A tree like `tree` of PartitionSpec.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    by_name = {
        path_name(path): (tuple(leaf.shape), spec)
        for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, is_leaf=_is_spec), strict=True)
    }
    strangers: list[str] = []

    def spec_of(path: Sequence[Any], leaf: Any) -> PartitionSpec:
        shape = tuple(leaf.shape)
        for start in range(len(path)):  # the longest suffix first
            owner = by_name.get(path_name(path[start:]))
            if owner is not None and owner[0] == shape:
                return owner[1]
        if shape:
            strangers.append(f"{path_name(path)} {shape}")
        return PartitionSpec()

    result = jax.tree_util.tree_map_with_path(spec_of, tree)
    _report("these arrays of the optimizer belong to no parameter and are copied to every device", strangers)
    return result


def shardings(specs: Any, mesh: Mesh) -> Any:
    """Puts a tree of PartitionSpec on a mesh: the same tree of NamedSharding."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _report(message: str, lines: list[str]) -> None:
    if lines:
        more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
        logger.warning("%s:\n  %s%s", message, "\n  ".join(lines[:_LISTED]), more)
