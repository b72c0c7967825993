"""The optimizer with Microsoft GLIP's parameter groups (maskrcnn_benchmark/solver/build.py), and its learning rate."""

import logging
from typing import Any

import jax
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.parallel.rules import path_name
from medglip_jax.training.finetuning import check_finetune, scale_by_layer
from medglip_jax.training.second_moments import scale_by_moments

logger = logging.getLogger(__name__)

Config = ConfigDict | FrozenConfigDict

TEXT_ENCODER = "language/"  # the paths of the text encoder start with it


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps that were taken before.

    Warm-up rises linearly from `warmup_factor` to 1 over `warmup_steps` and multiplies the decay: "step" multiplies the
    rate by `step_factor` at each of `step_points` (fractions of the run), "cosine" falls to 0 from the end of the
    warm-up to the end of the run.

    Args:
        config: a recipe; reads `optimizer.learning_rate` and `schedule`.

    Raises:
        ValueError: `schedule.kind` is unknown, or a number of `schedule` out of range.
    """
    schedule = config.schedule
    steps, warmup_steps = schedule.steps, schedule.warmup_steps
    if steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"config.schedule.steps is {steps} and warmup_steps {warmup_steps}: at least 1 and 0 are needed"
        )
    if not all(0 < point <= 1 for point in schedule.step_points):
        raise ValueError(
            f"config.schedule.step_points is {tuple(schedule.step_points)}: these are fractions of the run, 0 to 1"
        )
    if warmup_steps >= steps:
        logger.warning("config.schedule: the warm-up of %d steps outlasts the run of %d", warmup_steps, steps)
    warmup = optax.linear_schedule(schedule.warmup_factor, 1.0, warmup_steps) if warmup_steps else lambda step: 1.0
    if schedule.kind == "step":
        points = {int(point * steps): schedule.step_factor for point in schedule.step_points}
        decay = optax.piecewise_constant_schedule(1.0, points)
    elif schedule.kind == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, max(steps - warmup_steps, 1))
        decay = optax.join_schedules([optax.constant_schedule(1.0), cosine], [warmup_steps])
    else:
        raise ValueError(f"config.schedule.kind is {schedule.kind!r}: expected step or cosine")
    rate = config.optimizer.learning_rate
    return lambda step: rate * warmup(step) * decay(step)


def rate_multiplier(path: str, config: Config) -> float:
    """Returns the rate of a parameter over the learning rate.

    Args:
        path: of the parameter, "language/layer_0/query/bias".
        config: `config.optimizer` of a recipe; reads `text_scale` and `bias_scale`.
    """
    scale = config.text_scale if path.startswith(TEXT_ENCODER) else 1.0
    return scale * (config.bias_scale if "bias" in path else 1.0)


def decays(path: str) -> bool:
    """Returns whether weight decay applies to a parameter: to all but biases, as there, and so to norm scales too."""
    return "bias" not in path


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns clipping by global norm, the kind of optimizer, decoupled weight decay, and the rates of the groups.

    A parameter p with gradient g moves by -rate(step) * multiplier(p) * (kind(g) + decay * p), where kind is Adam,
    Adafactor with a given rate (its updates are clipped, not scaled by the parameter), or SM3.

    Args:
        config: a recipe; reads `optimizer`, `schedule`, and `finetune.layer_decay` with `model`.

    Raises:
        ValueError: see `make_schedule`, `check_finetune` and `scale_by_moments`.
    """
    settings = config.optimizer
    check_finetune(config.finetune)
    # Off, it must leave no trace: the places of a chain are in the paths of the optimizer's state.
    by_layer = [optax.stateless(lambda updates, params: scale_by_layer(updates, config))]

    def decay_mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path_name(path)), params)

    def scale_groups(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, update: update * rate_multiplier(path_name(path), settings), updates
        )

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        scale_by_moments(settings),
        optax.add_decayed_weights(settings.weight_decay, mask=decay_mask),
        optax.stateless(scale_groups),
        optax.scale_by_learning_rate(make_schedule(config)),
        *(by_layer if config.finetune.layer_decay != 1 else []),
    )
