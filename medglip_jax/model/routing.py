"""Parameters of their own for some examples of a batch: how layers find them, and how examples share a look-up.

A model is called with a variable collection `modality` beside its parameters, a tree of the same paths:

    scale, bias, kernel, ...    float32[E, ...], what E kinds of examples have in place of the parameter of that name
    a, b                        float32[E, in, rank] and [E, rank, out], added to a dense kernel as a product
    index                       int32[G], which of them each group of examples takes: 1 to E, or 0 for the shared one

A layer that finds an entry takes its parameters from there, one set for each group; the B examples of its input are G
groups of B / G that follow each other. Most often a group is one example. Where a look-up is large (the kernels of
whole stages), examples of one kind can share it: `plan_groups` gives each example a slot in a group of its kind, with
static shapes, and none is dropped.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medglip_jax.parallel.activations import constrain, constrain_first

Array = jax.Array

COLLECTION = "modality"
INDEX = "index"
SLOTS, PLACES = "slots", "places"  # of a part of the model that runs on slots


class Groups(NamedTuple):
    """Where the examples of a batch stand while groups of them share parameters.

    Rows of the batch lie in P parts (of a mesh) of b, and no example leaves its part.

    Attributes:
        index: int32[P * G], the kind of each group.
        slots: int32[P, S], the example in each slot, counted in its part. S = G * group; a slot that no example needs
            has the part's first one, and nobody reads what it computes.
        places: int32[P, b], the slot of each example, counted in its part.
    """

    index: Array
    slots: Array
    places: Array


def num_groups(examples: int, kinds: int, group: int) -> int:
    """Returns how many groups hold any mixture of so many kinds: no smaller number does.

    The slots, group times this, exceed the examples by at most kinds * (group - 1).
    """
    return examples if examples <= kinds else kinds + (examples - kinds) // group


def plan_groups(index: Array, kinds: int, group: int, parts: int = 1) -> Groups:
    """Gives each example a slot in a group of its kind.

    Args:
        index: int32[P * b], kinds from 0 to `kinds` - 1.
        kinds: how many there are.
        group: examples of a group.
        parts: P.
    """
    by_part = index.reshape(parts, -1)
    count = by_part.shape[1]
    groups = num_groups(count, kinds, group)

    def plan(index: Array) -> tuple[Array, Array, Array]:
        mine = jax.nn.one_hot(index, kinds, dtype=jnp.int32)  # [b, K]
        rank = jnp.take_along_axis(jnp.cumsum(mine, axis=0), index[:, None], axis=1)[:, 0] - 1
        used = -(-mine.sum(axis=0) // group)  # groups of each kind
        first = jnp.cumsum(used) - used
        places = first[index] * group + rank
        slots = jnp.zeros(groups * group, jnp.int32).at[places].set(jnp.arange(count, dtype=jnp.int32))
        return jnp.zeros(groups, jnp.int32).at[places // group].set(index), slots, places

    of_groups, slots, places = jax.vmap(plan)(by_part)
    return Groups(of_groups.reshape(-1), slots, places)


def move(x: Array, rows: Array) -> Array:
    """Takes rows of an array inside each of its P parts: x [P * n, ...], rows int32[P, m] -> [P * m, ...]."""
    parts = len(rows)
    split = constrain_first(x.reshape(parts, -1, *x.shape[1:]), "batch")
    moved = constrain_first(jax.vmap(lambda part, index: part[index])(split, rows), "batch")
    return constrain_first(moved.reshape(-1, *x.shape[1:]), "batch")


def move_by(module: nn.Module, name: str, rows: str, x: Array) -> Array:
    """Moves examples into the slots of a part of the model, or back; returns x where that part has no slots.

    Args:
        module: whose collection has the entry.
        name: of the entry.
        rows: `SLOTS` or `PLACES`.
        x: [B, ...], or [slots, ...].
    """
    route = module.variables.get(COLLECTION, {}).get(name, {})
    return move(x, route[rows]) if rows in route else x


def select(stack: Array, index: Array, shared: Array | None) -> Array:
    """Returns the parameter of each group, [G, ...].

    On a mesh the stack is brought whole to every device, as any parameter that lies in parts, and looked up there: the
    examples stay where they are.

    Args:
        stack: [E, ...].
        index: int32[G], 0 to E.
        shared: [...], for groups of index 0; None is zeros.
    """
    # Whole in all dimensions: were one split, XLA would bring the gradients of all images to every device instead.
    own = jnp.take(constrain(stack, *(None,) * stack.ndim), jnp.maximum(index - 1, 0), axis=0, mode="clip")
    known = (index > 0).reshape(-1, *(1,) * (stack.ndim - 1))
    return constrain_first(jnp.where(known, own, 0 if shared is None else shared), "batch")


def selected(module: nn.Module) -> dict[str, Array]:
    """Returns the parameters of a module that it has of its own for each group, [G, ...] by name; most often none."""
    own: Mapping[str, Any] = module.variables.get(COLLECTION, {})
    if INDEX not in own:
        return {}
    shared: Mapping[str, Any] = module.variables.get("params", {})
    stacks = {name: x for name, x in own.items() if name != INDEX and not isinstance(x, Mapping)}
    return {name: select(stack, own[INDEX], shared.get(name)) for name, stack in stacks.items()}
