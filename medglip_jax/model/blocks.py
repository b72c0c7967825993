"""Stacks of equal blocks: run one after another or as one loop, and what the backward pass of each keeps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medglip_jax.model.remat import NONE, POLICIES
from medglip_jax.model.routing import COLLECTION
from medglip_jax.parallel.activations import constrain_parameters

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Block:
    """One block of a stack.

    Attributes:
        name: of its parameters in the parent.
        kind: its class.
        fields: attributes of that class.
        train: place of the argument `train` in the class's `__call__`, where self is 0.
        policy: see `block_policies`.
    """

    name: str
    kind: type[nn.Module]
    fields: Mapping[str, Any]
    train: int
    policy: str = NONE

    def build(self, *, in_loop: bool = False, **place: Any) -> Any:
        """Returns the module; `place` is its name, or parent=None for one that belongs to no other."""
        kind = self.kind
        if self.policy != NONE:
            # XLA does not merge what is recomputed with the first computation across the two loops.
            kind = nn.remat(kind, static_argnums=(self.train,), policy=POLICIES[self.policy], prevent_cse=not in_loop)
        return kind(**self.fields, **place)


def run_blocks(
    parent: nn.Module,
    blocks: Sequence[Block],
    call: Callable[[Any, Tree, Array | None], Tree],
    carry: Tree,
    *,
    scan: bool,
    train: bool,
    period: int = 1,
    rates: Sequence[float] | None = None,
) -> Tree:
    """Runs a stack of blocks inside the parent's compact call.

    As a loop, XLA compiles a block once and not once for each. The parameters lie in the tree as they would without
    one: they are stacked on the way, which takes the memory of a second copy of them, and of their gradients. Each
    block has a random key of its own, which depends on no mesh. Initialisation, and a call that collects
    "intermediates", run the blocks one after another.

    Args:
        parent: the module that the blocks belong to.
        blocks: all of the stack, in order.
        call: (module, carry, drop path rate or None) -> carry.
        carry: what the first block reads.
        scan: whether to run them as a loop. What is left over of a period, and a single period, run one by one.
        train: whether the blocks draw random numbers.
        period: blocks until one is like the first again (2 where every other one shifts its windows).
        rates: drop path rates of the blocks, which a loop must be told; None where they are all 0.

    Raises:
        ValueError: the blocks of a loop have different policies.
    """
    repeats = len(blocks) // period
    looped = list(blocks[: repeats * period]) if scan and repeats > 1 else []
    if len({block.policy for block in looped}) > 1:
        found = ", ".join(f"{'/'.join((*parent.path, block.name))}={block.policy}" for block in looped)
        raise ValueError(
            f"config.model.scan runs these blocks as one loop, but config.model.remat gives them several policies: "
            f"{found}; give them one, or set config.model.scan to False"
        )
    if parent.is_initializing() or parent.is_mutable_collection("intermediates"):
        looped = []
    if looped:
        carry = _run_loop(parent, looped, call, carry, train=train, period=period, rates=rates)
    for block in blocks[len(looped) :]:
        carry = call(block.build(name=block.name), carry, None)
    return carry


def _stack_variables(parent: nn.Module, names: Sequence[str]) -> dict[str, Tree]:
    """Returns what blocks have of each collection, along a first dimension."""
    stacked = {}
    for collection, prefix in (("params", ()), (COLLECTION, (COLLECTION,))):
        trees = [parent.variables.get(collection, {}).get(name) for name in names]
        if trees[0] is not None:
            tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
            stacked[collection] = constrain_parameters(tree, "/".join((*prefix, *parent.path, names[0])), stacked=True)
    return stacked


def _run_loop(
    parent: nn.Module,
    blocks: Sequence[Block],
    call: Callable[[Any, Tree, Array | None], Tree],
    carry: Tree,
    *,
    train: bool,
    period: int,
    rates: Sequence[float] | None,
) -> Tree:
    places = [blocks[place::period] for place in range(period)]  # those of one place run in turn, with one module
    modules = [alike[0].build(in_loop=True, parent=None) for alike in places]
    stacked = [_stack_variables(parent, [block.name for block in alike]) for alike in places]
    shape = (len(blocks) // period, period)
    keys = None
    if train and parent.has_rng("dropout"):
        keys = jax.random.split(parent.make_rng("dropout"), shape)
    # `blocks` may be the first of more.
    drop_path = None if rates is None else jnp.asarray(rates[: len(blocks)], jnp.float32).reshape(shape)

    def body(carry: Tree, inputs: tuple[list[Tree], Array | None, Array | None]) -> tuple[Tree, None]:
        variables, keys, drop_path = inputs
        for place, module in enumerate(modules):
            rngs = {} if keys is None else {"dropout": keys[place]}
            rate = None if drop_path is None else drop_path[place]
            carry = nn.apply(call, module)(variables[place], carry, rate, rngs=rngs)
        return carry, None

    carry, _ = jax.lax.scan(body, carry, (stacked, keys, drop_path))
    return carry
