"""Sharding by rules: the path of a parameter says over which mesh axes its dimensions are split."""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A spec that is tried before another one, which is taken, and reported, where the first does not fit."""

    first: Sequence[Any]
    otherwise: Sequence[Any]


# (pattern, spec): the spec has a mesh axis, a tuple of axes, or None for each leading dimension.
Rules = Sequence[tuple[str, Sequence[Any] | Choice]]
AnyMesh = Mesh | AbstractMesh

_LISTED = 8  # parameters that a report names
# Of Adafactor: means of the squared gradient over the longest dimension, and over the next.
_MEANS = {"v_row": -1, "v_col": -2}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter lies, and why.

    Attributes:
        spec: mesh axes of each dimension. Axes of size 1 are left out, for they split nothing.
        pattern: of the rule that decided it.
        lost: what the rule asked for and the shape does not allow, a phrase for each dimension.
    """

    spec: PartitionSpec
    pattern: str
    lost: tuple[str, ...] = ()


def path_name(path: Sequence[Any]) -> str:
    """Returns a path of `jax.tree_util` as "a/b/c"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _fit(pattern: str, spec: Sequence[Any] | Choice, name: str, shape: tuple[int, ...], mesh: AnyMesh) -> Placement:
    """Returns what of a rule fits the shape."""
    if isinstance(spec, Choice):
        first = _fit(pattern, spec.first, name, shape, mesh)
        if not first.lost:
            return first
        place = _fit(pattern, spec.otherwise, name, shape, mesh)
        return dataclasses.replace(place, lost=(f"{'; '.join(first.lost)}: split otherwise", *place.lost))
    named = [axis for entry in spec for axis in _axes(entry)]
    for axis in named:
        if axis not in mesh.shape:
            raise ValueError(f"config.sharding_rules shards {name} over {axis!r}: the mesh has {', '.join(mesh.shape)}")
        if named.count(axis) > 1:
            raise ValueError(f"config.sharding_rules: the rule {pattern!r} names the mesh axis {axis!r} twice")
    kept: list[Any] = []
    lost: list[str] = []
    for dimension, entry in enumerate(spec):
        axes = tuple(axis for axis in _axes(entry) if mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        if dimension >= len(shape):
            if axes:
                lost.append(f"no dimension {dimension} for {product}")
        elif shape[dimension] % parts:
            lost.append(f"dimension {dimension} ({shape[dimension]}) is no multiple of {product}")
            kept.append(None)
        else:
            kept.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    while kept and kept[-1] is None:
        kept.pop()
    return Placement(PartitionSpec(*kept), pattern, tuple(lost))


def find_placements(rules: Rules, tree: Any, mesh: AnyMesh) -> dict[str, Placement]:
    """Finds the rule of every parameter, and what of it fits; says nothing.

    Args:
        rules: (pattern, spec) pairs; the first whose pattern `re.search` finds in the path "a/b/c" wins.
        tree: parameters, or their shapes (anything with `.shape`).
        mesh: its axes are what specs name; an AbstractMesh will do.

    Returns:
        Path to placement, in the order of the tree's leaves.

    Raises:
        ValueError: parameters that no rule matches, or a rule that is no regular expression or names an axis twice or
            one that the mesh does not have.
    """
    compiled = []
    for pattern, spec in rules:
        try:
            compiled.append((re.compile(pattern), spec))
        except re.error as error:
            raise ValueError(f"config.sharding_rules: {pattern!r} is no regular expression: {error}") from error
    found: dict[str, Placement] = {}
    unmatched: list[str] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, shape = path_name(path), tuple(leaf.shape)
        for pattern, spec in compiled:
            if pattern.search(name):
                found[name] = _fit(pattern.pattern, spec, name, shape, mesh)
                break
        else:
            unmatched.append(f"{name} {shape}")
    if unmatched:
        raise ValueError(
            f"config.sharding_rules: no pattern matches {_shorten(unmatched)}\n"
            "add rules for them; (pattern, ()) copies a parameter to every device"
        )
    return found


def match_rules(rules: Rules, tree: Any, mesh: AnyMesh) -> Any:
    """Finds the sharding of every parameter.

    Args:
        rules, tree, mesh: see `find_placements`.

    Returns:
        A tree like `tree` of PartitionSpec. Where a spec has more entries than the array has dimensions, or a dimension
        is no multiple of its mesh axes, that entry is left out; one logged warning lists all of them.

    Raises:
        ValueError: see `find_placements`.
    """
    found = find_placements(rules, tree, mesh)
    specs = jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)].spec, tree)
    shapes = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    lost = [f"{name} {shapes[name]}: {reason}" for name, place in found.items() for reason in place.lost]
    _report("sharding rules do not fit everywhere; these dimensions are not split", lost)
    return specs


def _inherit(
    path: Sequence[Any], shape: tuple[int, ...], by_name: Mapping[str, tuple[tuple[int, ...], PartitionSpec]]
) -> PartitionSpec | None:
    """Returns the sharding that an array of an optimizer state has from its parameter, if it belongs to one."""
    for start in range(len(path)):  # the longest suffix first
        owner, spec = by_name.get(path_name(path[start:]), (None, PartitionSpec()))
        if owner is None:
            continue
        if owner == shape:
            return spec
        kind = path_name(path[start - 1 : start]) if start else ""
        if kind in _MEANS and len(owner) > 1:
            mean = int(np.argsort(owner)[_MEANS[kind]])  # as optax chooses them
            if owner[:mean] + owner[mean + 1 :] == shape:
                entries = [*spec, *(None,) * (len(owner) - len(spec))]
                return PartitionSpec(*entries[:mean], *entries[mean + 1 :])
    dimension = getattr(path[-1], "idx", None) if path else None
    for start in range(len(path) - 1):
        owner, spec = by_name.get(path_name(path[start:-1]), (None, PartitionSpec()))
        if owner is not None and dimension is not None and owner[dimension : dimension + 1] == shape:
            return PartitionSpec(*spec[dimension : dimension + 1])
    return None


def follow_parameters(tree: Any, params: Any, specs: Any) -> Any:
    """Gives each array of an optimizer state the sharding of its parameter.

    An array belongs to the parameter whose whole path ends its own path, if their shapes agree (the moments of Adam at
    "1/mu/neck/kernel" to "neck/kernel"). An array that lacks one dimension of the parameter (Adafactor's "v_row" and
    "v_col") is split as the others are, and one that has a single dimension of it (SM3's "1/mu/neck/kernel/0") as that
    one is. Single numbers are replicated, and so is any other array, with a logged warning.

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
        spec = _inherit(path, tuple(leaf.shape), by_name)
        if spec is None and math.prod(leaf.shape) > 1:
            strangers.append(f"{path_name(path)} {tuple(leaf.shape)}")
        return PartitionSpec() if spec is None else spec

    result = jax.tree_util.tree_map_with_path(spec_of, tree)
    _report("these arrays of the optimizer belong to no parameter and are copied to every device", strangers)
    return result


def shardings(specs: Any, mesh: AnyMesh) -> Any:
    """Puts a tree of PartitionSpec on a mesh: the same tree of NamedSharding."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _shorten(lines: list[str]) -> str:
    more = f"\n  and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return "\n  ".join(lines[:_LISTED]) + more


def _report(message: str, lines: list[str]) -> None:
    if lines:
        logger.warning("%s:\n  %s", message, _shorten(lines))
