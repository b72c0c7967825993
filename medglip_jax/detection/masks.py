"""From the mask branch's maps to the masks of boxes and of phrases; logits, on the grid of every fourth pixel.

A phrase's mask is a dot product: the embedding of each pixel with the mean of the embeddings of the phrase's tokens,
and a bias that depends on the text alone. A box's mask comes from a network of 1x1 convolutions whose parameters are
what the model predicts at the box's anchor (CondInst, arXiv 2003.05664, section 3): it reads a few maps that all boxes
share, and the distance of each pixel from the anchor's centre.
"""

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from medglip_jax.detection.anchors import make_anchors

Config = ConfigDict | FrozenConfigDict

MASK_STRIDE = 4  # pixels of the canvas to one of a mask
KINDS = ("", "phrases", "boxes", "both")
_QUANTUM = 16  # steps of a stored logit's unit
_AT_ONCE = 16  # boxes of an image whose masks are computed at once
_BOX_SIDES = 2.0  # sides of the anchor that are the unit of relative coordinates: about what it is asked for


def unpack_masks(packed: jax.Array, width: int) -> jax.Array:
    """Unpacks uint8[..., h, ceil(width / 8)] into bool[..., h, width]; undoes `data_pipelines.mask_targets.pack`."""
    bits = (packed[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)) & 1  # [..., bytes, 8]
    return bits.reshape(*packed.shape[:-1], -1)[..., :width] > 0


def layer_sizes(channels: int, num_layers: int) -> list[tuple[int, int]]:
    """Returns (in, out) of the layers of a box's network; the first one also reads two coordinates."""
    widths = [channels + 2, *[channels] * (num_layers - 1), 1]
    return list(itertools.pairwise(widths))


def count_parameters(channels: int, num_layers: int) -> int:
    """Returns the numbers that make a box's network: 169 for 8 channels and 3 layers."""
    return sum(inputs * outputs + outputs for inputs, outputs in layer_sizes(channels, num_layers))


def _count_layers(channels: int, count: int) -> int:
    """Returns how many layers a network of `count` numbers has."""
    num_layers = 1
    while count_parameters(channels, num_layers) < count:
        num_layers += 1
    return num_layers


def _run_networks(maps: jax.Array, parameters: jax.Array, anchors: jax.Array) -> jax.Array:
    """The masks of an image's boxes: maps [h, w, F], parameters [K, P], anchors [K, 4] -> float32[K, h, w].

    Nothing is copied for a box: the first layer is one product of the maps that boxes share with the kernels of all,
    and its coordinates, which are exact, come on top.
    """
    height, width, channels = maps.shape
    corners, side = anchors[:, :2] + anchors[:, 2:], _BOX_SIDES * (anchors[:, 2] - anchors[:, 0])
    x, y = (
        ((jnp.arange(size) + 0.5) * MASK_STRIDE - corners[:, i, None] / 2) / side[:, None]
        for i, size in enumerate((width, height))
    )  # [K, w] and [K, h]
    z, start = jnp.zeros(()), 0
    sizes = layer_sizes(channels, _count_layers(channels, parameters.shape[1]))
    for layer, (inputs, outputs) in enumerate(sizes):
        kernel = parameters[:, start : start + inputs * outputs].reshape(-1, inputs, outputs)
        bias = parameters[:, start + inputs * outputs : start + (inputs + 1) * outputs]
        start += (inputs + 1) * outputs
        product = functools.partial(jnp.einsum, preferred_element_type=bias.dtype)
        if layer == 0:
            z = product("hwi,kio->kohw", maps, kernel[:, :channels].astype(maps.dtype))
            z += x[:, None, None, :] * kernel[:, channels, :, None, None]
            z += y[:, None, :, None] * kernel[:, channels + 1, :, None, None]
        else:
            z = product("kihw,kio->kohw", jax.nn.relu(z).astype(maps.dtype), kernel.astype(maps.dtype))
        z += bias[:, :, None, None]
    return z[:, 0]


def box_logits(
    outputs: Mapping[str, jax.Array], anchors: jax.Array, config: Config, *, canvas: tuple[int, int]
) -> jax.Array:
    """Returns the masks that the model gives at some anchors.

    Args:
        outputs: of the model; reads mask_maps [B, h, w, F] and mask_parameters [B, N, P].
        anchors: int32[B, K], places of anchors; what stands for none is any of them.
        config: `config.detection` of a recipe; reads `strides` and `anchor_scale`.
        canvas: (height, width) of the images that the model saw, in pixels.

    Returns:
        float32[B, K, h, w], logits.
    """
    maps, parameters = outputs["mask_maps"], outputs["mask_parameters"]
    all_anchors = jnp.asarray(make_anchors(*canvas, config.strides, config.anchor_scale)[0], parameters.dtype)
    chosen = jnp.take_along_axis(parameters, anchors[..., None], axis=1)  # [B, K, P]

    # Recomputed in the backward pass: nothing of size [K, h, w, F] is kept for it.
    run = jax.checkpoint(_run_networks)

    def of_image(maps: jax.Array, parameters: jax.Array, anchors: jax.Array) -> jax.Array:
        count = len(parameters)
        if count <= _AT_ONCE:
            return run(maps, parameters, anchors)
        parts = [jnp.pad(x, ((0, -count % _AT_ONCE), (0, 0)), mode="edge") for x in (parameters, anchors)]
        parts = [x.reshape(-1, _AT_ONCE, x.shape[1]) for x in parts]
        logits = jax.lax.map(lambda part: run(maps, *part), parts)
        return logits.reshape(-1, *maps.shape[:2])[:count]

    return jax.vmap(of_image)(maps, chosen, all_anchors[anchors])


def phrase_logits(outputs: Mapping[str, jax.Array], phrase_map: jax.Array) -> jax.Array:
    """Returns the masks of phrases.

    Args:
        outputs: of the model; reads mask_pixels [B, h, w, D], mask_tokens [B, L, D] and mask_token_bias [B, L].
        phrase_map: [B, K, L], above 0 on the tokens of phrase k.

    Returns:
        float32[B, K, h, w], logits; those of a phrase without tokens mean nothing.
    """
    pixels, tokens, bias = (outputs[name] for name in ("mask_pixels", "mask_tokens", "mask_token_bias"))
    weights = (phrase_map > 0).astype(bias.dtype)
    weights /= jnp.maximum(weights.sum(axis=-1, keepdims=True), 1)  # [B, K, L]
    phrases = jnp.einsum("bkl,bld->bkd", weights, tokens.astype(bias.dtype)).astype(pixels.dtype)
    logits = jnp.einsum("bhwd,bkd->bkhw", pixels, phrases, preferred_element_type=bias.dtype)
    return logits + jnp.einsum("bkl,bl->bk", weights, bias)[..., None, None]


def quantize_logits(logits: jax.Array) -> jax.Array:
    """Returns logits as int8 in steps of 1 / 16, a quarter of the bytes: within 8 of 0, and of the same sign."""
    steps = jnp.clip(jnp.abs(logits) * _QUANTUM, 0, 127)
    return jnp.where(logits > 0, jnp.ceil(steps), -jnp.ceil(steps)).astype(jnp.int8)


def find_masks(
    outputs: Mapping[str, jax.Array],
    anchors: jax.Array,
    phrase_map: jax.Array,
    config: Config,
    *,
    canvas: tuple[int, int],
) -> dict[str, jax.Array]:
    """Returns the masks of detections and of phrases, of those that the model has the outputs for.

    Args:
        outputs: of the model.
        anchors: int32[B, D], of each detection, -1 for empty places.
        phrase_map: [B, K, L].
        config, canvas: see `box_logits`.

    Returns:
        masks int8[B, D, h, w] and phrase_masks int8[B, K, h, w], or one of them, from `quantize_logits`: above 0 is
        inside.
    """
    found = {}
    if "mask_parameters" in outputs:
        logits = box_logits(outputs, jnp.maximum(anchors, 0), config, canvas=canvas)
        found["masks"] = quantize_logits(logits)
    if "mask_pixels" in outputs:
        found["phrase_masks"] = quantize_logits(phrase_logits(outputs, phrase_map))
    return found


def resize_linear(x: jax.Array, height: int, width: int, ratio: float) -> jax.Array:
    """Resizes [B, h, w, C] bilinearly, edge pixels going on outside, as two small matrix products.

    Args:
        x: a map.
        height, width: of the result.
        ratio: pixels of the result to one of `x`, along both sides; the centres of pixels lie where this says, also
            where a side is no multiple of it.
    """

    def weights(size: int, target: int) -> jax.Array:
        position = np.clip((np.arange(target) + 0.5) / ratio - 0.5, 0, size - 1)
        return jnp.asarray(np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))), x.dtype)  # [target, size]

    x = jnp.einsum("bhwc,Hh->bHwc", x, weights(x.shape[1], height))
    return jnp.einsum("bhwc,Ww->bhWc", x, weights(x.shape[2], width))
