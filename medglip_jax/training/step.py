"""One optimizer step as a pure function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.losses import Normalizers, count_normalizers, detection_losses, match_anchors
from medglip_jax.detection.mask_losses import add_mask_losses, count_masks, match_masks
from medglip_jax.model.lora import merge_adapters
from medglip_jax.model.modality import classify
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.text_offsets import apply_model
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import path_name
from medglip_jax.training.accumulation import accumulate_gradients, split_batch
from medglip_jax.training.finetuning import join, split_trained
from medglip_jax.training.modality import modality_index, modality_losses
from medglip_jax.training.optimizer import make_schedule
from medglip_jax.training.pretraining import make_gradients
from medglip_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


def gradient_groups(params: Any) -> tuple[str, ...]:
    """Returns the names of the groups that gradients are told by where they are not finite.

    A group is what shares the first two names of its path: "backbone/stage_0_block_1", "tower_2/fusion".
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(sorted({_group(path) for path in paths}))


def _group(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _count_nonfinite(grads: Any) -> jax.Array:
    """Returns how many numbers of each group are not finite, int32[groups]."""
    counts = dict.fromkeys(gradient_groups(grads), jnp.zeros((), jnp.int32))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        counts[_group(path_name(path))] += jnp.sum(~jnp.isfinite(grad), dtype=jnp.int32)
    return jnp.stack(list(counts.values()))


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
        model: from `make_model`.
        config: a recipe; reads `detection`, `model.masks.kind`, `finetune`, `optimizer`, `schedule`,
            `training.accumulation`, `sharding`, `sharding_rules`, `activation_rules`, and `model.modality` with what
            `classify` reads.
        optimizer: from `make_optimizer`.
        mesh: from `make_mesh`, on which activations lie by `activation_rules`; None leaves that to XLA.

    Returns:
        step(state, batch) -> (state, metrics). The batch has image, image_size, input_ids, attention_mask, boxes,
        box_mask, positive_map, modality where that has names, what else `detection_losses` reads, and where the model
        has masks (`model.masks.kind`) what `match_masks` reads; other keys are ignored. Metrics are float32 scalars:
        those of `detection_losses` (and of masks, see `add_mask_losses`), grad_norm (before clipping, of what trains),
        learning_rate, with a classifier loss_modality and modality_accuracy; and finite, bool: whether loss and
        gradient are; and nonfinite, int32[groups]: how many numbers of the gradient are not, by
        `gradient_groups`. Where they are not, the state comes back as it was, except that the step counts.

        With `training.accumulation` the batch is taken in that many micro-batches. Loss and gradient are those of the
        whole batch up to rounding (DropBlock's share of kept pixels alone is counted in each micro-batch): what the
        losses are divided by depends on the boxes, not on the parameters, and is counted over the whole batch before.

        With `pretraining.task` batch and losses are those of `make_gradients`.
    """
    schedule, ema, rules = make_schedule(config), config.optimizer.ema, resolve_rules(config)
    accumulation, modality = config.training.accumulation, config.model.modality
    dtype = jnp.promote_types(config.model.dtype, jnp.float32)  # that of the outputs
    pretraining = make_gradients(model, config, mesh)

    def loss_of(
        trained: Any,
        fixed: Any,
        batch: Mapping[str, jax.Array],
        dropout: jax.Array,
        normalizers: Normalizers | None = None,
    ) -> tuple[jax.Array, Metrics]:
        params = merge_adapters(join(fixed, trained), config.finetune.lora_alpha)
        pixels = normalize_pixels(batch["image"], batch["image_size"])
        index = modality_index(batch, modality, dropout) if modality.names else None
        outputs = apply_model(
            model,
            params,
            pixels,
            batch["input_ids"],
            batch["attention_mask"],
            modality=index,
            train=True,
            rngs={"dropout": dropout},
        )
        targets = match_anchors(batch, config.detection, dtype) if config.model.masks.kind else None
        losses = detection_losses(outputs, batch, config.detection, normalizers, targets)
        if targets is not None:
            losses = add_mask_losses(losses, outputs, batch, targets, config.detection, normalizers)
        if modality.classifier:
            logits = classify(params, config.model, pixels, batch["image_size"])
            losses |= modality_losses(logits, batch, modality, accumulation)
            losses["loss"] += losses["loss_modality"]
        return losses["loss"], losses

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        dropout = jax.random.fold_in(state.rng, state.step)
        trained, fixed = split_trained(state.params, config.finetune)
        with activations_on(mesh, config.activation_rules, rules):
            if pretraining is not None:
                grads, losses = pretraining(trained, fixed, batch, dropout)
            elif accumulation == 1:
                grads, losses = jax.grad(loss_of, has_aux=True)(trained, fixed, batch, dropout)
            else:
                targets = match_anchors(batch, config.detection, dtype)
                whole = count_normalizers(targets)
                if config.model.masks.kind:
                    whole = whole._replace(masks=count_masks(match_masks(batch, targets, config.detection)))
                rows = split_batch(batch, accumulation, mesh)
                grads, losses = accumulate_gradients(
                    lambda trained, part, key: loss_of(trained, fixed, part, key, whole), trained, rows, dropout
                )
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        average = state.ema
        if average is not None:
            decay = ema_decay(state.step, ema)
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, trained)
        params = join(fixed, trained)
        stepped = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=average)
        kept = state.replace(step=state.step + 1)
        state_after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, kept)
        # Only a gradient that is not finite is looked at again.
        nonfinite = jax.lax.cond(
            finite, lambda _: jnp.zeros(len(gradient_groups(grads)), jnp.int32), _count_nonfinite, grads
        )
        if modality.classifier:
            correct, known = losses.pop("modality_correct"), losses.pop("modality_known")
            losses["modality_accuracy"] = correct / jnp.maximum(known, 1)
        metrics = losses | {"grad_norm": grad_norm, "learning_rate": schedule(state.step)}
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return state_after, metrics | {"finite": finite, "nonfinite": nonfinite}

    return train_step
