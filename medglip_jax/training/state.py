"""Everything that a training run carries from step to step, and where it lies on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.linen import Module
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.model.lora import LORA, merge_adapters
from medglip_jax.model.modality import add_modalities
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import AnyMesh, Rules, follow_parameters, match_rules, shardings
from medglip_jax.training.finetuning import add_parameters, join, split_trained

_DUMMY_SIDE = 64  # pixels; no parameter depends on the size of the image


class TrainState(flax.struct.PyTreeNode):
    """The state of a run.

    Attributes:
        step: int32[], optimizer steps taken.
        params: parameters of the model, of its modalities (`model.modality`), of its adapters (`model.lora`) and
            offsets (`model.text_offsets`).
        opt_state: of the optimizer, for the parameters that train (`finetuning.split_trained`).
        ema: running average of the parameters that train, or None.
        rng: random key of dropout; the step folds its number into it, so it never changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    rng: jax.Array


def evaluated_parameters(state: TrainState, config: ConfigDict | FrozenConfigDict) -> Any:
    """Returns the model's parameters to evaluate with: averages, if there are and the recipe wants them, and merged."""
    averaged = config.evaluation.use_ema and state.ema is not None
    params = join(state.params, state.ema) if averaged else state.params
    return jax.jit(merge_adapters, static_argnums=1)(params, config.finetune.lora_alpha) if LORA in params else params


def state_specs(shapes: TrainState, params: Any) -> TrainState:
    """Returns how each array of a state is split: the optimizer's moments and the average as their parameters.

    Args:
        shapes: a state, or its shapes.
        params: the parameters' tree of PartitionSpec, from `match_rules`.
    """
    return TrainState(
        step=PartitionSpec(),  # pyright: ignore[reportArgumentType]
        params=params,
        opt_state=follow_parameters(shapes.opt_state, shapes.params, params),
        ema=None if shapes.ema is None else follow_parameters(shapes.ema, shapes.params, params),
        rng=PartitionSpec(),  # pyright: ignore[reportArgumentType]
    )


def state_shardings(shapes: TrainState, rules: Rules, mesh: AnyMesh) -> TrainState:
    """Returns the sharding of each array of a state; see `state_specs`.

    Args:
        shapes: a state, or its shapes.
        rules: see `match_rules`.
        mesh: from `make_mesh`.
    """
    return shardings(state_specs(shapes, match_rules(rules, shapes.params, mesh)), mesh)


def _initialize(
    model: Module, config: ConfigDict | FrozenConfigDict, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    params_rng, dropout_rng = jax.random.split(rng)
    pixels = jnp.zeros((1, _DUMMY_SIDE, _DUMMY_SIDE, 3))
    tokens = jnp.ones((1, config.data.max_tokens), jnp.int32)
    params = model.init(params_rng, pixels, tokens, tokens)["params"]
    params = add_modalities(params, config.model, jax.random.fold_in(params_rng, 1))
    params = add_parameters(params, config, jax.random.fold_in(params_rng, 0))
    trained, _ = split_trained(params, config.finetune)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trained),
        ema=trained if config.optimizer.ema else None,
        rng=dropout_rng,
    )


def state_shapes(
    model: Module, config: ConfigDict | FrozenConfigDict, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
    """Returns the shapes and types of the state that `create_state` would make; computes nothing."""
    return jax.eval_shape(lambda key: _initialize(model, config, optimizer, key), rng)


def abstract_state(
    model: Module,
    config: ConfigDict | FrozenConfigDict,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    mesh: Mesh,
) -> TrainState:
    """Returns the state that `create_state` would make, as ShapeDtypeStruct with shardings; takes no memory.

    It is what `Checkpoints.restore` restores into.
    """
    shapes = state_shapes(model, config, optimizer, rng)
    placed = state_shardings(shapes, resolve_rules(config), mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def create_state(
    model: Module,
    config: ConfigDict | FrozenConfigDict,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    mesh: Mesh,
) -> tuple[TrainState, TrainState]:
    """Initialises a run, each array on its own part of the mesh from the start.

    The numbers do not depend on the mesh.

    Args:
        model: called as model.init(key, pixels float[1, H, W, 3], input_ids int32[1, L], attention_mask int32[1, L]).
        config: a recipe; reads `data.max_tokens`, `optimizer.ema`, `finetune`, `sharding` and `sharding_rules`.
        optimizer: from `make_optimizer`.
        rng: random key.
        mesh: from `make_mesh`.

    Returns:
        The state, and the sharding of each of its arrays: in_shardings and out_shardings of the jitted step.

    Raises:
        ValueError: see `match_rules` and `trained_paths`.
    """
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(model, config, optimizer, rng, mesh))
    state = jax.jit(lambda key: _initialize(model, config, optimizer, key), out_shardings=placed)(rng)
    return state, placed
