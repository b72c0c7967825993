"""Where activations lie: dimensions have names in the model, and one table says over which mesh axes each is split.

The model calls `constrain` at the few places from which XLA would otherwise choose badly; outside `activations_on` it
returns its argument, so that the model stays a function of arrays that knows of no mesh. So do
`constrain_parameters`, for parameters that the model stacks, and `gather_parameters`, for those of a loop.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from medglip_jax.parallel.rules import Rules, find_placements, path_name

# batch: images. height, width: of a map. pixels: of all levels of the pyramid, one after another. tokens: of the
# prompt. channels: of a residual stream. heads: of an attention. hidden: inside an MLP.
NAMES = ("batch", "height", "width", "pixels", "tokens", "channels", "heads", "hidden")

MAP = ("batch", "height", "width", "channels")
PIXELS = ("batch", "pixels", "channels")
TEXT = ("batch", "tokens", "channels")
# Rows together: what convolutions read and write, and the pyramid where its levels are joined and taken apart. Where
# rows and a second mesh axis are split, XLA (jax 0.10.2) computes wrong gradients of these: docs/pods.md.
WHOLE_MAP = ("batch", None, None, "channels")
WHOLE_PIXELS = ("batch", None, "channels")

ActivationRules = Sequence[tuple[str, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class _Layout:
    mesh: Mesh
    table: list[tuple[str, tuple[str, ...] | None]]
    parameters: Rules | None


_layout: contextvars.ContextVar[_Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def activations_on(mesh: Mesh | None, rules: ActivationRules, parameters: Rules | None = None) -> Iterator[None]:
    """Makes `constrain` and `constrain_parameters` do something while a function is traced.

    Args:
        mesh: from `make_mesh`; None does nothing.
        rules: `config.activation_rules` of a recipe: (name, mesh axes) for each of `NAMES`. An axis splits one
            dimension of an array: the row that comes first takes it.
        parameters: sharding rules of parameters, from `resolve_rules`; None leaves stacked parameters to XLA.

    Raises:
        ValueError: a name is unknown, missing or given twice, or an axis is not the mesh's.
    """
    if mesh is None:
        yield
        return
    given = [name for name, _ in rules]
    if sorted(given) != sorted(NAMES):
        odd = sorted(set(given) - set(NAMES)) or sorted(set(NAMES) - set(given)) or sorted({*given})
        raise ValueError(
            f"config.activation_rules has rows for {', '.join(given)}: expected each of {', '.join(NAMES)} once "
            f"({', '.join(odd)})"
        )
    table: list[tuple[str, tuple[str, ...] | None]] = []
    for name, axes in rules:
        for axis in axes:
            if axis not in mesh.shape:
                raise ValueError(
                    f"config.activation_rules splits {name} over {axis!r}: the mesh has {', '.join(mesh.shape)}"
                )
        table.append((name, tuple(axis for axis in axes if mesh.shape[axis] > 1) or None))
    token = _layout.set(_Layout(mesh, table, parameters))
    try:
        yield
    finally:
        _layout.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks XLA to lay an array out by the table of `activations_on`; returns it as it is where there is none.

    Args:
        x: any array.
        names: of `NAMES`, one for each dimension; None for a dimension that is not split.

    Returns:
        The same numbers. A dimension that is no multiple of its axes is not split: XLA would pad it, and from padded
        rows it computes wrong gradients of convolutions with a stride (jax 0.10.2).
    """
    current = _layout.get()
    if current is None:
        return x
    if len(names) != x.ndim or any(name is not None and name not in NAMES for name in names):
        raise ValueError(f"constrain: {names} for an array of shape {x.shape}; names are {', '.join(NAMES)}")
    mesh = current.mesh
    spec = nn.logical_to_mesh_axes(names, current.table) or ()
    fits = []
    for size, entry in zip(x.shape, spec, strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        fits.append(None if size % math.prod(mesh.shape[axis] for axis in axes) else entry)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))


def constrain_first(x: jax.Array, name: str) -> jax.Array:
    """Asks XLA to lay the first dimension of an array out by the table of `activations_on`; the others are left to it.

    Args:
        x: any array.
        name: of `NAMES`.
    """
    current = _layout.get()
    if current is None:
        return x
    axes = dict(current.table)[name]
    if axes and x.shape[0] % math.prod(current.mesh.shape[axis] for axis in axes):
        axes = None
    spec = PartitionSpec(axes, *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(current.mesh, spec))


def parts_of(name: str) -> int:
    """Returns into how many parts the table of `activations_on` splits a dimension; 1 where there is no table."""
    current = _layout.get()
    axes = None if current is None else dict(current.table)[name]
    return 1 if current is None or not axes else math.prod(current.mesh.shape[axis] for axis in axes)


def constrain_parameters(tree: Any, path: str, *, stacked: bool = False) -> Any:
    """Asks XLA to lay parameters, and in the backward pass their gradients, out by the rules of `activations_on`.

    Args:
        tree: parameters below `path`, or arrays of their shapes; integers among them (indices) are left as they are.
        path: "tower_0"; "" for all of a model.
        stacked: whether each array holds several parameters, along a first dimension that is not split.

    Returns:
        The same numbers; the tree itself where there is no mesh or no rules.
    """

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if stacked:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return jax.lax.with_sharding_constraint(leaf, sharding)

    return _by_rule(place, tree, path, stacked=stacked)


def gather_parameters(tree: Any, path: str) -> Any:
    """Asks XLA to join parameters over the axes that split images, before they are used; gradients are split again.

    For the body of a loop, where parameters change with each turn. Left to itself, XLA there keeps them split and takes
    apart the products instead, with a part of the kernel in each: more passes over the activations in memory than the
    few bytes of the kernel are worth.

    Args:
        tree, path: see `constrain_parameters`.

    Returns:
        The same numbers; the tree itself where there is no mesh or no rules.
    """

    def place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        current = _layout.get()
        assert current is not None
        images = dict(current.table)["batch"] or ()
        kept = []
        for entry in sharding.spec:
            axes = (entry,) if isinstance(entry, str) else entry or ()
            kept.append(tuple(axis for axis in axes if axis not in images) or None)
        whole = NamedSharding(sharding.mesh, PartitionSpec(*kept))

        def forward(x: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.with_sharding_constraint(x, whole), None

        join = jax.custom_vjp(lambda x: forward(x)[0])
        join.defvjp(forward, lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, sharding),))
        return join(leaf)

    return _by_rule(place, tree, path)


def _by_rule(
    place: Callable[[jax.Array, NamedSharding], jax.Array], tree: Any, path: str, *, stacked: bool = False
) -> Any:
    """Applies `place` to all parameters of a tree, with the shardings that the rules of `activations_on` give them."""
    current = _layout.get()
    if current is None or current.parameters is None:
        return tree
    prefix = f"{path}/" if path else ""
    shapes = {
        prefix + path_name(where): jax.ShapeDtypeStruct(leaf.shape[1:] if stacked else leaf.shape, leaf.dtype)
        for where, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not jnp.issubdtype(leaf.dtype, jnp.integer)
    }
    placements, mesh = find_placements(current.parameters, shapes, current.mesh), current.mesh

    def apply(where: Sequence[Any], leaf: jax.Array) -> jax.Array:
        found = placements.get(prefix + path_name(where))
        return leaf if found is None else place(leaf, NamedSharding(mesh, found.spec))

    return jax.tree_util.tree_map_with_path(apply, tree)
