"""What the hierarchy of phrases adds to the loss: scores that rise towards broader phrases, boxes inside their organs.

Both terms are ours. They look at positive anchors alone, since nearly all others have scores of nearly zero.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.boxes import area
from medglip_jax.detection.postprocess import phrase_scores

if TYPE_CHECKING:
    from medglip_jax.detection.losses import Normalizers, Targets

_MIN_AREA = 1e-6  # square pixels that are divided by at least, as in `boxes`


def score_excess(
    token_logits: jax.Array, child_map: jax.Array, parent_map: jax.Array, is_child: jax.Array
) -> jax.Array:
    """Returns by how much the score of each phrase exceeds that of a phrase which is true wherever it is.

    Only one of the two scores has a gradient, the one that the truth says is wrong: where the anchor's box shows the
    child, the parent's score has to rise; where it does not, the child's has to fall.

    Args:
        token_logits: float[B, N, L].
        child_map, parent_map: bool[B, P, L], tokens of both phrases of each pair; a pair without tokens exceeds by 0.
        is_child: bool[B, N, P], whether the child's phrase means the box of the anchor.

    Returns:
        float[B, N, P] in 0 to 1.
    """
    child, parent = phrase_scores(token_logits, child_map), phrase_scores(token_logits, parent_map)
    rising = jax.nn.relu(jax.lax.stop_gradient(child) - parent)
    falling = jax.nn.relu(child - jax.lax.stop_gradient(parent))
    return jnp.where(is_child, rising, falling)


def _sum_excess(
    token_logits: jax.Array,
    child_map: jax.Array,
    parent_map: jax.Array,
    tokens: jax.Array,
    assigned: jax.Array,
    positive: jax.Array,
) -> jax.Array:
    """Returns the sum of `score_excess` over pairs and positive anchors; tokens bool[B, M, L] as in the token loss."""
    means = jnp.einsum("bml,bpl->bmp", tokens.astype(jnp.float32), child_map.astype(jnp.float32)) > 0
    is_child = jnp.take_along_axis(means, jnp.maximum(assigned, 0)[..., None], axis=1)  # [B, N, P]
    return jnp.sum(score_excess(token_logits, child_map, parent_map, is_child), where=positive[..., None])


def share_outside(boxes: jax.Array, containers: jax.Array) -> jax.Array:
    """Returns the share, 0 to 1, of the area of boxes [..., 4] that lies outside of other boxes [..., 4]; half-open."""
    sides = jnp.minimum(boxes[..., 2:], containers[..., 2:]) - jnp.maximum(boxes[..., :2], containers[..., :2])
    sides = jnp.maximum(sides, 0)
    return 1 - sides[..., 0] * sides[..., 1] / jnp.maximum(area(boxes), _MIN_AREA)


def hierarchy_losses(
    token_logits: jax.Array,
    predicted: jax.Array,
    targets: "Targets",
    batch: Mapping[str, Any],
    config: ConfigDict | FrozenConfigDict,
    normalizers: "Normalizers",
) -> dict[str, jax.Array]:
    """Computes the terms of the hierarchy that a recipe asks for.

    loss_consistency is the `score_excess` of all pairs of a prompt, summed over them and over positive anchors and
    divided by the number of these. loss_containment is the `share_outside` of the predicted box and the one that holds
    the true box, over positive anchors whose box has one, weighed and divided as the box loss is.

    Args:
        token_logits: float[B, N, L].
        predicted: float[B, N, 4], half-open boxes in canvas pixels.
        targets: of the anchors.
        batch: positive_map [B, M, L]; child_map, parent_map [B, P, L] and container [B, M, 4] (half-open canvas pixels,
            zeros where there is none) as the terms need them.
        config: `config.detection` of a recipe.
        normalizers: of the whole batch.

    Returns:
        Scalars by name, with their weights; none where both weights are 0.

    Raises:
        ValueError: the batch lacks what a term needs.
    """
    losses: dict[str, jax.Array] = {}
    if config.score_consistency_weight:
        child_map, parent_map = _read(batch, "score_consistency_weight", "max_pairs", "child_map", "parent_map")
        # Recomputed in the backward pass, as the token loss is.
        total = jax.checkpoint(_sum_excess)(
            token_logits,
            child_map,
            parent_map,
            jnp.asarray(batch["positive_map"]) > 0,
            targets.assigned,
            targets.positive,
        )
        losses["loss_consistency"] = config.score_consistency_weight * total / jnp.maximum(normalizers.num_positives, 1)
    if config.containment_weight:
        (containers,) = _read(batch, "containment_weight", "containers", "container")
        containers = jnp.asarray(containers, predicted.dtype)
        container = jnp.take_along_axis(containers, jnp.maximum(targets.assigned, 0)[..., None], axis=1)  # [B, N, 4]
        held = targets.positive & (area(container) > 0)
        total = jnp.sum(targets.quality * share_outside(predicted, container), where=held)
        losses["loss_containment"] = config.containment_weight * total / jnp.maximum(normalizers.quality, 1)
    return losses


def _read(batch: Mapping[str, Any], weight: str, field: str, *names: str) -> list[jax.Array]:
    if missing := [name for name in names if name not in batch]:
        raise ValueError(
            f"config.detection.{weight} is not 0, but the batch has no {missing[0]}: set config.data.hierarchy.{field}"
        )
    return [jnp.asarray(batch[name]) for name in names]
