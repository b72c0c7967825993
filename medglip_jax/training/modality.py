"""Modalities in training: which parts each image of a batch takes, what the classifier learns, and who has no parts."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from data_pipelines.record_index import read_index
from data_pipelines.records import find_all_shards
from data_pipelines.schema import MODALITIES
from medglip_jax.model.modality import modality_table

logger = logging.getLogger(__name__)

Config = ConfigDict | FrozenConfigDict
Batch = Mapping[str, jax.Array]


def known_index(batch: Batch, settings: Config) -> jax.Array:
    """Returns the place of each image's modality in `names`, from 1 on; 0 where it is unknown or not among them.

    Args:
        batch: modality int32[B], places in `schema.MODALITIES`.
        settings: `config.model.modality`.
    """
    return jnp.asarray(modality_table(settings.names, MODALITIES))[batch["modality"]]


def modality_index(batch: Batch, settings: Config, key: jax.Array) -> jax.Array:
    """Returns the parts that each image takes in a step: its own, or for a share of them (`dropout`) the shared ones.

    Args:
        batch, settings: see `known_index`.
        key: random key.
    """
    index = known_index(batch, settings)
    if not settings.dropout:
        return index
    dropped = jax.random.bernoulli(jax.random.fold_in(key, 1), settings.dropout, index.shape)
    return jnp.where(dropped, 0, index)


def modality_losses(logits: jax.Array, batch: Batch, settings: Config, accumulation: int) -> dict[str, jax.Array]:
    """Computes the cross-entropy of the classifier, over images whose modality has a name.

    Args:
        logits: float32[B, E].
        batch, settings: see `known_index`.
        accumulation: micro-batches of this size that a global batch has.

    Returns:
        Scalars that sum over micro-batches to those of the whole: loss_modality, divided by the images of the global
        batch, known or not, and with its weight; modality_correct and modality_known, numbers of images.
    """
    index = known_index(batch, settings)
    known = index > 0
    label = jnp.maximum(index - 1, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    right = known & (jnp.argmax(logits, axis=-1) == label)
    return {
        "loss_modality": settings.classifier_weight * jnp.sum(losses, where=known) / (len(index) * accumulation),
        "modality_correct": jnp.sum(right, dtype=logits.dtype),
        "modality_known": jnp.sum(known, dtype=logits.dtype),
    }


def report_modalities(config: Any) -> None:
    """Logs which images of the training records take the shared parts, and which modalities have no image there.

    Args:
        config: a recipe; reads `data.train` and `model.modality`.

    Raises:
        ValueError: a name is no modality.
    """
    names = config.model.modality.names
    table = modality_table(names, MODALITIES)
    if not names:
        return
    numbers = sum(
        np.bincount(read_index(split).modality, minlength=len(MODALITIES))
        for split in find_all_shards(config.data.train)
    )
    counts = dict(zip(MODALITIES, np.asarray(numbers).tolist(), strict=True))
    shared = {name: count for name, count in counts.items() if count and not table[MODALITIES.index(name)]}
    if shared:
        told = ", ".join(f"{count} {name}" for name, count in shared.items())
        logger.warning(
            "%d of %d training images take the shared parts, as config.model.modality.names has no place for them: %s",
            sum(shared.values()),
            sum(counts.values()),
            told,
        )
    elif not config.model.modality.dropout:
        logger.warning(
            "no training image takes the shared parts, which stay as they are but for weight decay: images of unknown "
            "modality will not be found well; set config.model.modality.dropout, as 0.1"
        )
    if missing := [name for name, count in counts.items() if table[MODALITIES.index(name)] and not count]:
        logger.warning("no training image is %s: its parts stay as they start", " or ".join(missing))
