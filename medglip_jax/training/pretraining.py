"""Losses of the stages before grounding (`config.pretraining.task`), and their gradients in a step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.model.lora import merge_adapters
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.pretraining import MODELS, PATCH, repeat_cells, valid_cells
from medglip_jax.training.accumulation import accumulate_gradients, split_batch
from medglip_jax.training.contrastive import sigmoid_loss, text_keys
from medglip_jax.training.finetuning import join

Array = jax.Array
Config = ConfigDict | FrozenConfigDict
Batch = Mapping[str, Array]
Losses = dict[str, Array]
Apply = Callable[..., dict[str, Array]]

# Of each task, what `config.data.text` must be.
_TEXTS = {"contrastive": ("captions",), "masked_image": ("none", "captions"), "region_caption": ("descriptions",)}
MASKED = "masked"  # key of the batch: bool[B, H / mask_patch, W / mask_patch]


def check_pretraining(config: Config) -> None:
    """Finds mistakes in `config.pretraining`, and in what does not go with its task.

    Raises:
        ValueError: a field is out of range, or one of another group does not go with the task.
    """
    pretraining, canvas = config.pretraining, tuple(config.data.canvas)
    task = pretraining.task
    if not task:
        if config.data.text != "prompts":
            raise ValueError(
                f"config.data.text is {config.data.text!r}, and grounding reads prompts: set it to prompts, or "
                "config.pretraining.task to one of its tasks"
            )
        return
    if task not in MODELS:
        raise ValueError(f"config.pretraining.task is {task!r}: there are {', '.join(MODELS)}, and '' is grounding")
    if config.data.text not in _TEXTS[task]:
        raise ValueError(
            f"config.data.text is {config.data.text!r}: config.pretraining.task {task} needs {_TEXTS[task][0]}"
        )
    for field, value in (("modality.names", config.model.modality.names), ("masks.kind", config.model.masks.kind)):
        if value:
            raise ValueError(
                f"config.model.{field} is {value!r}: it is of grounding, and config.pretraining.task {task} does not "
                "know it; set it where grounding starts from this run"
            )
    if config.finetune.mode == "prompt":
        raise ValueError(f"config.finetune.mode is prompt: there are no prompts in config.pretraining.task {task}")
    if config.training.accumulation > 1 and task != "masked_image":
        raise ValueError(
            f"config.training.accumulation is {config.training.accumulation}: in config.pretraining.task {task} each "
            "text of a batch is a negative for each of its other images, which micro-batches do not see; set it to 1, "
            "and save memory with config.model.remat, more devices or a smaller batch"
        )
    if task == "masked_image":
        patch, ratio = pretraining.mask_patch, pretraining.mask_ratio
        if patch < PATCH or patch % PATCH or any(side % patch for side in canvas):
            raise ValueError(
                f"config.pretraining.mask_patch is {patch}: it must be a multiple of {PATCH}, the backbone's patch, "
                f"that divides config.data.canvas, {canvas}"
            )
        if not 0 < ratio < 1:
            raise ValueError(f"config.pretraining.mask_ratio is {ratio}: it must be above 0 and below 1")


def draw_masks(key: Array, image_size: Array, canvas: tuple[int, int], patch: int, ratio: float) -> Array:
    """Draws which patches are masked: of each image's own, rounded, a share of `ratio`, and at least one.

    Args:
        key: random key.
        image_size: int32[B, 2], (height, width) of the image in its canvas.
        canvas: (H, W) in pixels.
        patch: pixels.
        ratio: above 0.

    Returns:
        bool[B, H / patch, W / patch]; patches that hold nothing of the image are not masked.
    """
    height, width = canvas[0] // patch, canvas[1] // patch
    inside = valid_cells(image_size, height, width, patch).reshape(len(image_size), -1)
    drawn = jnp.where(inside, jax.random.uniform(key, inside.shape), 2.0)  # what is outside comes last
    wanted = jnp.maximum(jnp.round(ratio * inside.sum(axis=1)), 1).astype(jnp.int32)
    ranks = jnp.argsort(jnp.argsort(drawn, axis=1), axis=1)
    return ((ranks < wanted[:, None]) & inside).reshape(-1, height, width)


def _painted_pixels(batch: Batch) -> Array:
    """Returns the pixels that are masked and of the image, bool[B, H, W]."""
    height, width = batch["image"].shape[1:3]
    masked = repeat_cells(batch[MASKED], height // batch[MASKED].shape[1])
    return masked & valid_cells(batch["image_size"], height, width, 1)


def _masked_image_loss(apply: Apply, batch: Batch, pixels: Array, count: Array) -> Losses:
    nothing = jnp.zeros((len(pixels), 1), jnp.int32)
    painted = apply(nothing, nothing, masked=batch[MASKED])["painted"]
    wrong = jnp.abs(painted - pixels.astype(painted.dtype))
    return {"loss": jnp.sum(wrong, where=_painted_pixels(batch)[..., None]) / jnp.maximum(3 * count, 1)}


def _alignment_loss(outputs: Batch, tokens: tuple[Array, Array], valid: Array, config: Config, mesh: Any) -> Losses:
    log_scale, bias = outputs["log_scale"], outputs["logit_bias"]
    keys = text_keys(*(x.reshape(-1, x.shape[-1]) for x in tokens))
    embeddings = outputs["image_embedding"], outputs["text_embedding"]
    equal_texts = config.pretraining.equal_texts
    loss = sigmoid_loss(*embeddings, log_scale, bias, keys, valid, equal_texts=equal_texts, mesh=mesh)
    return {"loss": loss, "logit_scale": jnp.exp(log_scale), "logit_bias": bias}


def make_gradients(
    model: Module, config: Config, mesh: Mesh | None
) -> Callable[[Any, Any, Batch, Array], tuple[Any, Losses]] | None:
    """Returns the function that computes the gradient of a task of pretraining; None where the task is grounding.

    Args:
        model: from `make_model`.
        config: a recipe; reads `pretraining`, `data.canvas`, `data.text`, `finetune` and `training.accumulation`.
        mesh: from `make_mesh`, or None.

    Returns:
        gradients(trained, fixed, batch, key) -> (gradient in `trained`, losses). The batch has image, image_size and
        the texts of `TextRule`. Losses are scalars: loss, and for contrastive and region_caption logit_scale and
        logit_bias. The numbers do not depend on the mesh, up to rounding.

    Raises:
        ValueError: see `check_pretraining`.
    """
    check_pretraining(config)
    task, accumulation = config.pretraining.task, config.training.accumulation
    if not task:
        return None

    def loss_of(trained: Any, fixed: Any, batch: Batch, key: Array, count: Array | None) -> tuple[Array, Losses]:
        params = merge_adapters(join(fixed, trained), config.finetune.lora_alpha)
        pixels = normalize_pixels(batch["image"], batch["image_size"])

        def apply(input_ids: Array, attention_mask: Array, **inputs: Array) -> dict[str, Array]:
            options: dict[str, Any] = {**inputs, "train": True, "rngs": {"dropout": key}}
            outputs: Any = model.apply({"params": params}, pixels, input_ids, attention_mask, **options)
            return outputs

        if count is not None:
            losses = _masked_image_loss(apply, batch, pixels, count)
        else:
            tokens = batch["input_ids"], batch["attention_mask"]
            regions = task == "region_caption"
            places = {"boxes": batch["boxes"]} if regions else {"image_size": batch["image_size"]}
            valid = batch["box_mask"].reshape(-1) if regions else jnp.ones(len(pixels), bool)
            losses = _alignment_loss(apply(*tokens, **places), tokens, valid, config, mesh)
        return losses["loss"], losses

    def gradients(trained: Any, fixed: Any, batch: Batch, key: Array) -> tuple[Any, Losses]:
        gradient_of = jax.grad(loss_of, has_aux=True)
        if task != "masked_image":
            return gradient_of(trained, fixed, batch, key, None)
        pretraining, canvas = config.pretraining, tuple(config.data.canvas)
        draws, key = jax.random.split(key)
        masks = draw_masks(draws, batch["image_size"], canvas, pretraining.mask_patch, pretraining.mask_ratio)
        batch = {name: batch[name] for name in ("image", "image_size")} | {MASKED: masks}
        count = jnp.sum(_painted_pixels(batch), dtype=jnp.float32)
        if accumulation == 1:
            return gradient_of(trained, fixed, batch, key, count)
        rows = split_batch(batch, accumulation, mesh)
        return accumulate_gradients(
            lambda trained, part, key: loss_of(trained, fixed, part, key, count), trained, rows, key
        )

    return gradients
