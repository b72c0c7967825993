"""Prompt tuning (GLIP, arXiv 2112.03857, section 4.2): learned offsets of the text features of some phrases.

The parameters of such a run have a subtree `prompt`:

    offsets     float32[K, T, D], added to the text encoder's output at token t of phrase k
    tokens      int32[K, T], the tokens of the phrases, -1 behind the last one; they say where a phrase stands
    boundaries  int32[n], tokens between which a phrase stands: "." and ":", and the first and last one of a prompt

Microsoft's code has an offset for each place of one fixed prompt instead (`tunable_linear`); here they go where their
phrase goes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from medglip_jax.model.modality import MODALITY, modality_variables, text_embedding, without_modalities

Array = jax.Array

PROMPT = "prompt"  # the subtree


def place_offsets(prompt: Any, input_ids: Array) -> Array:
    """Puts the offset of each token of each phrase where the phrase stands in a prompt; others get 0.

    A phrase stands where all of its tokens follow each other between two boundaries: not inside another phrase, and not
    inside a sentence.

    Args:
        prompt: the subtree.
        input_ids: int32[B, L].

    Returns:
        float32[B, L, D].
    """
    offsets, tokens, boundaries = prompt["offsets"], prompt["tokens"], prompt["boundaries"]
    length, most = input_ids.shape[1], tokens.shape[1]
    padded = jnp.pad(input_ids, ((0, 0), (1, most + 1)), constant_values=-1)  # what stands at -1 to L + T
    edge = jnp.isin(padded, boundaries)
    ends = jnp.sum(tokens >= 0, axis=1)  # [K]
    found = edge[:, :length, None]  # [B, L, K]: whether phrase k starts at l
    for t in range(most):
        found = found & ((tokens[:, t] < 0) | (padded[:, 1 + t : 1 + t + length, None] == tokens[:, t]))
    for end in range(1, most + 1):
        found = found & ((ends != end) | edge[:, 1 + end : 1 + end + length, None])
    placed = jnp.zeros((*input_ids.shape, offsets.shape[-1]), offsets.dtype)
    for t in range(most):
        starts = jnp.pad(found & (ends > t), ((0, 0), (t, 0), (0, 0)))[:, :length]  # token t of phrase k is at l
        placed += jnp.einsum("blk,kd->bld", starts.astype(offsets.dtype), offsets[:, t], precision="highest")
    return placed


def apply_model(
    model: Any,
    params: Any,
    pixels: Array,
    input_ids: Array,
    attention_mask: Array,
    *,
    modality: Array | None = None,
    **options: Any,
) -> dict[str, Array]:
    """Calls a detector, with the offsets of its phrases and the parts of its modalities if the parameters have any.

    Args:
        model: the detector; see `GLIP.__call__`.
        params: of the model, and the subtrees `prompt` and `modality` or not.
        pixels, input_ids, attention_mask: of the call.
        modality: int32[B], the parts that each image takes (see `model.modality`); None, or 0, takes the shared ones.
        options: of `model.apply`.
    """
    if PROMPT in params:
        options["text_offset"] = place_offsets(params[PROMPT], input_ids)
        params = {name: part for name, part in params.items() if name != PROMPT}
    variables = {"params": params}
    if MODALITY in params:
        own, params = params[MODALITY], without_modalities(params)
        variables = {"params": params}
        if modality is not None:
            variables[MODALITY] = modality_variables(own, model.config, modality)
            offsets = [options.get("text_offset"), text_embedding(own, modality)]
            if any(offset is not None for offset in offsets):
                options["text_offset"] = sum(offset for offset in offsets if offset is not None)
    outputs: Any = model.apply(variables, pixels, input_ids, attention_mask, **options)
    return outputs
