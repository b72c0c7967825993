"""One optimizer step as a pure function, and what happens when its loss is not finite."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.losses import Normalizers, count_normalizers, detection_losses, match_anchors
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.training.accumulation import accumulate_gradients, split_batch
from medglip_jax.training.optimizer import make_schedule
from medglip_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


class NonFiniteLoss(ValueError):
    """The loss or the gradient of a step is infinite or not a number.

    Attributes:
        step: steps that were taken before it.
        image_ids: images of the batch that this process read.
    """

    def __init__(self, step: int, image_ids: Sequence[str], metrics: Mapping[str, Any]):
        self.step, self.image_ids = step, tuple(str(image_id) for image_id in image_ids)
        values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items() if name != "finite")
        super().__init__(
            f"the loss is not finite after {step} steps ({values}); the parameters are still those before this batch. "
            f"Its images: {', '.join(self.image_ids)}. Look at them; if they are sound, lower "
            "config.optimizer.learning_rate or set config.model.dtype to float32"
        )


def check_finite(step: int, metrics: Mapping[str, Any], image_ids: Sequence[str] | np.ndarray) -> None:
    """Waits for a step's metrics and raises if it was not finite.

    Args:
        step: steps taken before it.
        metrics: as the step returned them.
        image_ids: images of its batch.

    Raises:
        NonFiniteLoss: metrics["finite"] is false.
    """
    if not bool(metrics["finite"]):
        raise NonFiniteLoss(step, list(image_ids), metrics)


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """Returns the decay of the parameter average after `step` steps: min(decay, (1 + step) / (10 + step))."""
    return jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)


def make_train_step(
    model: Module,
    config: ConfigDict | FrozenConfigDict,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> TrainStep:
    """Returns the function of one step, for the caller to jit with the shardings of `create_state`.

    Args:
        model: the detector.
        config: a recipe; reads `detection`, `optimizer`, `schedule`, `training.accumulation`, `sharding`,
            `sharding_rules` and `activation_rules`.
        optimizer: from `make_optimizer`.
        mesh: from `make_mesh`, on which activations lie by `activation_rules`; None leaves that to XLA.

    Returns:
        step(state, batch) -> (state, metrics). The batch has image, image_size, input_ids, attention_mask, boxes,
        box_mask and positive_map; other keys are ignored. Metrics are float32 scalars: loss, loss_token, loss_box,
        loss_centerness, num_positives, grad_norm (before clipping), learning_rate; and finite, bool: whether loss and
        gradient are. Where they are not, the state comes back as it was.

        With `training.accumulation` the batch is taken in that many micro-batches. Loss and gradient are those of the
        whole batch up to rounding (DropBlock's share of kept pixels alone is counted in each micro-batch): what the
        losses are divided by depends on the boxes, not on the parameters, and is counted over the whole batch before.
    """
    schedule, ema, rules = make_schedule(config), config.optimizer.ema, resolve_rules(config)
    accumulation = config.training.accumulation

    def loss_of(
        params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array, normalizers: Normalizers | None = None
    ) -> tuple[jax.Array, Metrics]:
        outputs: Any = model.apply(
            {"params": params},
            normalize_pixels(batch["image"], batch["image_size"]),
            batch["input_ids"],
            batch["attention_mask"],
            train=True,
            rngs={"dropout": dropout},
        )
        losses = detection_losses(outputs, batch, config.detection, normalizers)
        return losses["loss"], losses

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        dropout = jax.random.fold_in(state.rng, state.step)
        with activations_on(mesh, config.activation_rules, rules):
            if accumulation == 1:
                grads, losses = jax.grad(loss_of, has_aux=True)(state.params, batch, dropout)
            else:
                dtype = jnp.promote_types(config.model.dtype, jnp.float32)  # that of the outputs
                whole = count_normalizers(match_anchors(batch, config.detection, dtype))
                rows = split_batch(batch, accumulation, mesh)
                part_of = functools.partial(loss_of, normalizers=whole)
                grads, losses = accumulate_gradients(part_of, state.params, rows, dropout)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if average is not None:
            decay = ema_decay(state.step, ema)
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
        stepped = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=average)
        state_after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        metrics = losses | {"grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state_after, metrics | {"finite": finite}

    return train_step
