"""From images and prompts to detections: what evaluation and prediction share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.hierarchy import find_kinds
from data_pipelines.schema import MODALITIES
from medglip_jax.detection.masks import find_masks
from medglip_jax.detection.postprocess import detect
from medglip_jax.errors import list_mismatches
from medglip_jax.mask_outputs import Rle, count_pixels, encode_logits, grow_boxes
from medglip_jax.model.modality import add_modalities, classify, modality_table
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.model.text_offsets import PROMPT, apply_model
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.mesh import BATCH_AXES
from medglip_jax.parallel.presets import resolve_rules
from medglip_jax.parallel.rules import path_name

if TYPE_CHECKING:
    from data_pipelines.text import Prompt

Detector = Callable[..., dict[str, jax.Array]]

_LENGTHS = (64, 128, 256)  # tokens of the prompt buckets
_BATCH = PartitionSpec(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a model found in an image.

    Attributes:
        boxes: float[n, 4], x0 y0 x1 y1 in pixels of the original image, half-open.
        scores: float[n].
        phrases: int[n], places in the list of phrases.
        masks: n masks of the original image's size, where the model has masks of boxes, else None.
        phrase_masks: the masks that are not empty, by the place of their phrase, where the model has masks of phrases,
            else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    phrases: np.ndarray
    masks: tuple[Rle, ...] | None = None
    phrase_masks: dict[int, Rle] | None = None


def power_of_two(count: int) -> int:
    """Returns the smallest power of two that is at least `count`."""
    return 1 << (max(count, 1) - 1).bit_length()


def prompt_length(tokens: int, max_tokens: int) -> int:
    """Returns the bucket of a prompt: 64, 128, 256 or `max_tokens`, whichever is the smallest that holds it.

    Padding changes no result. Each padded token is one more query in the text direction of the fusion; in the image
    direction and in the text layers it is masked, and it belongs to no phrase.
    """
    return min([length for length in _LENGTHS if tokens <= length <= max_tokens] or [max_tokens])


def stack_prompts(
    prompts: "Sequence[Prompt]", max_tokens: int, detection: ConfigDict | None = None
) -> dict[str, np.ndarray]:
    """Pads prompts to one bucket of tokens (`prompt_length`) and of phrases (a power of two).

    Args:
        prompts: P prompts of phrases.
        max_tokens: most tokens of a bucket.
        detection: `config.detection` of a recipe; None is one without `raise_broader`.

    Returns:
        input_ids and attention_mask int32[P, L], phrase_map float32[P, K, L] and phrase_valid bool[P, K]; with
        `raise_broader` phrase_kinds int32[P, Q, 2] too, pairs of a phrase and a broader one (Q is a power of two).
    """
    length = prompt_length(max(int(prompt.attention_mask.sum()) for prompt in prompts), max_tokens)
    num_phrases = power_of_two(max(len(prompt.phrases) for prompt in prompts))
    phrase_map = np.zeros((len(prompts), num_phrases, length), np.float32)
    phrase_valid = np.zeros((len(prompts), num_phrases), bool)
    for place, prompt in enumerate(prompts):
        count = len(prompt.phrases)
        phrase_map[place, :count] = prompt.positive_map[:, :length]
        phrase_valid[place, :count] = True
    stacked = {
        "input_ids": np.stack([prompt.input_ids[:length] for prompt in prompts]),
        "attention_mask": np.stack([prompt.attention_mask[:length] for prompt in prompts]),
        "phrase_map": phrase_map,
        "phrase_valid": phrase_valid,
    }
    if detection is not None and detection.raise_broader:
        pairs = [find_kinds(prompt.phrases) for prompt in prompts]
        kinds = np.zeros((len(prompts), power_of_two(max(map(len, pairs))), 2), np.int32)  # 0, 0 changes nothing
        for row, of_prompt in zip(kinds, pairs, strict=True):
            row[: len(of_prompt)] = np.reshape(of_prompt, (-1, 2))
        stacked["phrase_kinds"] = kinds
    return stacked


def make_detector(model: Module, config: ConfigDict, mesh: Mesh | None = None) -> Detector:
    """Returns the jitted function that finds phrases in a batch of images.

    Args:
        model: the detector.
        config: a recipe; reads `data.canvas`, `detection`, `model.modality`, `model.masks.kind`, `sharding`,
            `sharding_rules` and `activation_rules`.
        mesh: from `make_mesh`; None runs on one device.

    Returns:
        detector(params, image=, image_size=, input_ids=, attention_mask=, phrase_map=, phrase_valid=) -> dict of boxes
        float32[B, D, 4] (canvas pixels, half-open), scores float32[B, D] and phrases int32[B, D] (-1 for empty places),
        best first; where the model has masks, what `find_masks` returns too. image is uint8[B, H, W, 3], image_size
        int32[B, 2]; the others, and phrase_kinds if it is there, as `stack_prompts` returns them, for one prompt an
        image (P = B) or one for all (P = 1). A model of modalities also takes modality=, int32[B], places in
        `schema.MODALITIES`; those that have no parts of their own, and all without it, take the shared ones.
    """
    height, width = config.data.canvas
    table = modality_table(config.model.modality.names, MODALITIES)

    def find(
        outputs: dict[str, jax.Array],
        image_size: jax.Array,
        phrase_map: jax.Array,
        phrase_valid: jax.Array,
        kinds: jax.Array | None,
    ) -> dict[str, jax.Array]:
        canvas, masks = (height, width), bool(config.model.masks.kind)
        found = detect(
            outputs,
            image_size,
            phrase_map,
            phrase_valid,
            config.detection,
            canvas=canvas,
            phrase_kinds=kinds,
            with_anchors=masks,
        )
        if masks:
            found |= find_masks(outputs, found.pop("anchors"), phrase_map, config.detection, canvas=canvas)
        return found

    if mesh is not None:  # images do not depend on each other, which XLA does not see through top_k
        find = jax.shard_map(find, mesh=mesh, in_specs=_BATCH, out_specs=_BATCH)

    @jax.jit
    def detector(
        params: Any,
        *,
        image: jax.Array,
        image_size: jax.Array,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        phrase_map: jax.Array,
        phrase_valid: jax.Array,
        modality: jax.Array | None = None,
        phrase_kinds: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        def spread(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (image.shape[0], *x.shape[1:]))
            return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _BATCH))

        pixels = normalize_pixels(image, image_size)
        with activations_on(mesh, config.activation_rules, resolve_rules(config)):
            parts = None if modality is None else jnp.asarray(table)[modality]
            outputs = apply_model(
                model, params, pixels, spread(input_ids), spread(attention_mask), modality=parts, train=False
            )
        kinds = None if phrase_kinds is None else spread(phrase_kinds)
        return find(dict(outputs), image_size, spread(phrase_map), spread(phrase_valid), kinds)

    return detector


def make_classifier(model: Module, config: ConfigDict) -> Callable[..., jax.Array]:
    """Returns the jitted function that tells what kind of image each one is.

    Args:
        model: the detector.
        config: a recipe; reads `model.modality`.

    Returns:
        classifier(params, image=, image_size=) -> float32[B, len(schema.MODALITIES)], probabilities, 0 for those that
        `model.modality.names` does not list; the arguments as in `make_detector`.

    Raises:
        ValueError: the model has no classifier.
    """
    settings = config.model.modality
    if not settings.classifier:
        raise ValueError("this model has no classifier of modalities (config.model.modality.classifier)")
    table = modality_table(settings.names, MODALITIES)

    @jax.jit
    def classifier(params: Any, *, image: jax.Array, image_size: jax.Array) -> jax.Array:
        logits = classify(params, config.model, normalize_pixels(image, image_size), image_size)
        of_names = jax.nn.softmax(logits)
        return jnp.where(table > 0, of_names[:, np.maximum(table - 1, 0)], 0)

    return classifier


def to_original(boxes: np.ndarray, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps boxes from the canvas back to the image that was resized into it.

    Args:
        boxes: float[n, 4] in canvas pixels, half-open.
        scale: float[2], canvas pixels per pixel of the original image: (y, x).
        size: height and width of the original image; boxes are clipped to it.

    Returns:
        float32[n, 4] in pixels of the original image, half-open.
    """
    height, width = size
    factors = np.array([scale[1], scale[0], scale[1], scale[0]], np.float64)
    return np.clip(boxes / factors, 0, np.array([width, height, width, height])).astype(np.float32)


def merge(
    parts: Sequence[Mapping[str, np.ndarray]],
    places: Sequence[Sequence[int]],
    limit: int,
    *,
    scale: np.ndarray,
    size: tuple[int, int],
    mask_margin: float = 0.0,
) -> Detections:
    """Joins what several prompts found in an image.

    A phrase is in one prompt only, so suppression within the phrase has happened already.

    Args:
        parts: a detector's boxes [D, 4], scores [D] and phrases [D] for each prompt, and its masks if it has any.
        places: of each prompt, the places of its phrases in the whole list.
        limit: how many detections to keep, best first.
        scale, size: of the image, as in `to_original`.
        mask_margin: `config.detection.mask_margin`.

    Returns:
        Detections in pixels of the original image.
    """
    scale = np.asarray(scale)
    kept = [np.asarray(part["phrases"]) >= 0 for part in parts]
    boxes, scores = (
        np.concatenate([np.asarray(part[name])[keep] for part, keep in zip(parts, kept, strict=True)])
        for name in ("boxes", "scores")
    )
    phrases = np.concatenate(
        [
            np.asarray(names, np.int32)[np.asarray(part["phrases"])[keep]]
            for part, names, keep in zip(parts, places, kept, strict=True)
        ]
    )
    order = np.argsort(-scores, kind="stable")[:limit]
    found = Detections(to_original(boxes[order], scale, size), scores[order], phrases[order])
    if "masks" in parts[0]:
        logits = np.concatenate([np.asarray(part["masks"])[keep] for part, keep in zip(parts, kept, strict=True)])
        limits = grow_boxes(found.boxes, mask_margin)
        masks = tuple(encode_logits(logits[i], scale, size, box) for i, box in zip(order, limits, strict=True))
        found = dataclasses.replace(found, masks=masks)
    if "phrase_masks" in parts[0]:
        by_phrase = {
            place: encode_logits(logits, scale, size)
            for part, names in zip(parts, places, strict=True)
            for place, logits in zip(names, part["phrase_masks"], strict=False)  # padded phrases come last
            if np.any(logits > 0)
        }
        by_phrase = {place: mask for place, mask in by_phrase.items() if count_pixels(mask)}
        found = dataclasses.replace(found, phrase_masks=by_phrase)
    return found


def parameter_shapes(model: Module, config: ConfigDict) -> dict[str, Any]:
    """Returns the model's parameter tree, with what modalities have of their own, as shapes; computes nothing."""
    image = jax.ShapeDtypeStruct((1, *config.data.canvas, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, config.data.max_tokens), jnp.int32)
    key = jax.random.key(0)
    plain = jax.eval_shape(model.init, key, image, tokens, tokens)["params"]
    return jax.eval_shape(lambda params: add_modalities(params, config.model, key), plain)


def flat_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a parameter tree, or of its shapes, by path."""
    return {path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


def check_parameters(params: Any, model: Module, config: ConfigDict, checkpoint: str) -> None:
    """Checks that parameters fit the model; learned offsets of phrases may be among them.

    Raises:
        ValueError: names the checkpoint and the first parameters that are missing, unknown or of another shape.
    """
    found = flat_shapes({name: part for name, part in params.items() if name != PROMPT})
    wanted = flat_shapes(parameter_shapes(model, config))
    if mismatches := list_mismatches(found, wanted, "the model"):
        raise ValueError(
            f"{checkpoint} holds a model of another size than config.model describes; leave out --config to use the "
            f"checkpoint's own, or give the one it was trained with:\n{mismatches}"
        )
