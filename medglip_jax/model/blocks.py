"""Stacks of equal blocks: run one after another or as one loop, and what the backward pass of each keeps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medglip_jax.model.remat import NONE, POLICIES
from medglip_jax.model.routing import COLLECTION
from medglip_jax.parallel.activations import constrain_parameters, gather_parameters

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

    def build(self) -> Any:
        """Returns the module, inside its parent's compact call."""
        kind = self.kind
        if self.policy != NONE:
            kind = nn.remat(kind, static_argnums=(self.train,), policy=POLICIES[self.policy])
        return kind(**self.fields, name=self.name)

    def make_turn(self, parent: nn.Module, call: Callable[[Any, Tree, Array | None], Tree]) -> Callable[..., Tree]:
        """Returns the function of a turn of a loop: (variables, carry, rate, random keys) -> carry."""
        module = self.kind(**self.fields, parent=None)
        if self.policy == NONE:  # what the backward pass keeps of a turn: the parameters must stay split
            return lambda variables, carry, rate, rngs: nn.apply(call, module)(variables, carry, rate, rngs=rngs)

        def turn(variables: dict[str, Tree], carry: Tree, rate: Array | None, rngs: Mapping[str, Array]) -> Tree:
            whole = {name: gather_parameters(tree, _path(parent, self.name, name)) for name, tree in variables.items()}
            return nn.apply(call, module)(whole, carry, rate, rngs=rngs)

        # XLA does not merge what is recomputed with the first computation across the two loops.
        return jax.checkpoint(turn, policy=POLICIES[self.policy], prevent_cse=False)


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
        carry = call(block.build(), carry, None)
    return carry


def _path(parent: nn.Module, name: str, collection: str) -> str:
    """Returns where the parameters of a block lie in the model's."""
    return "/".join((*((COLLECTION,) if collection == COLLECTION else ()), *parent.path, name))


def _stack_variables(parent: nn.Module, names: Sequence[str]) -> dict[str, Tree]:
    """Returns what blocks have of each collection, along a first dimension."""
    stacked = {}
    for collection in ("params", COLLECTION):
        trees = [parent.variables.get(collection, {}).get(name) for name in names]
        if trees[0] is not None:
            tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
            stacked[collection] = constrain_parameters(tree, _path(parent, names[0], collection), stacked=True)
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
    turns = [alike[0].make_turn(parent, call) for alike in places]
    stacked = [_stack_variables(parent, [block.name for block in alike]) for alike in places]
    shape = (len(blocks) // period, period)
    keys = None
    if train and parent.has_rng("dropout"):
        keys = jax.random.split(parent.make_rng("dropout"), shape)
    # `blocks` may be the first of more.
    drop_path = None if rates is None else jnp.asarray(rates[: len(blocks)], jnp.float32).reshape(shape)

    def body(carry: Tree, inputs: tuple[list[Tree], Array | None, Array | None]) -> tuple[Tree, None]:
        variables, keys, drop_path = inputs
        for place, turn in enumerate(turns):
            rngs = {} if keys is None else {"dropout": keys[place]}
            rate = None if drop_path is None else drop_path[place]
            carry = turn(variables[place], carry, rate, rngs)
        return carry, None

    carry, _ = jax.lax.scan(body, carry, (stacked, keys, drop_path))
    return carry
