"""Zero-shot classification: whether an image shows a phrase, by the agreement of their embeddings."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.records import find_shards
from data_pipelines.text import TextTokenizer, make_prefix
from medglip_jax.evaluation.auroc import summarize
from medglip_jax.evaluation.encoding import encode_records, encode_texts, phrases_of, read_truth
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.presets import resolve_rules

_SIDE = 32  # pixels of the image that stands in where only texts are encoded


def make_text_encoder(model: Module, config: ConfigDict, mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns the jitted function encode(params, input_ids, attention_mask), int32[T, L] -> float32[T, E].

    Args:
        model: one whose outputs have a text_embedding.
        config: a recipe; reads the rules of sharding.
        mesh: from `make_mesh`.
    """

    @jax.jit
    def encode(params: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        with activations_on(mesh, config.activation_rules, resolve_rules(config)):
            outputs: Any = model.apply({"params": params}, jnp.zeros((1, _SIDE, _SIDE, 3)), input_ids, attention_mask)
        return outputs["text_embedding"]

    return encode


def fill_template(template: str, modality: str, phrase: str) -> str:
    """Returns the text of a phrase in images of a modality.

    Args:
        template: with {phrase}, and {prefix} for the words of the modality ("CT: ").
        modality: one of `schema.MODALITIES`.
        phrase: a phrase.

    Raises:
        ValueError: the template has other fields, or no phrase.
    """
    try:
        text = template.format(prefix=make_prefix(modality), phrase=phrase)
    except (KeyError, IndexError, ValueError):
        text = ""
    if phrase not in text:
        raise ValueError(
            f"config.pretraining.template is {template!r}: expected a text with {{phrase}} in it, and {{prefix}} or not"
        )
    return text


def make_zero_shot(
    model: Module, config: ConfigDict, mesh: Mesh, tokenizer: TextTokenizer
) -> Callable[..., dict[str, Any]]:
    """Returns the function that asks for every phrase of records in every image, without boxes.

    Args:
        model: contrastive, from `make_model`.
        config: a recipe; reads `data`, `pretraining.template` and the rules of sharding.
        mesh: from `make_mesh`.
        tokenizer: of the checkpoint.

    Returns:
        evaluate(params, records_path, between_batches=) -> what `summarize` returns, with "seconds" and
        "images_per_second"; the same on every process.

    Raises:
        ValueError: see `fill_template`.
    """
    template = config.pretraining.template
    fill_template(template, "ct", "phrase")

    @jax.jit
    def encode_images(params: Any, image: jax.Array, image_size: jax.Array) -> jax.Array:
        nothing = jnp.ones((1, 1), jnp.int32)
        pixels = normalize_pixels(image, image_size)
        with activations_on(mesh, config.activation_rules, resolve_rules(config)):
            outputs: Any = model.apply({"params": params}, pixels, nothing, nothing, image_size=image_size)
        return outputs["image_embedding"]

    encode = make_text_encoder(model, config, mesh)

    def evaluate(
        params: Any, records_path: str, *, between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        started = time.perf_counter()
        phrases = phrases_of(records_path)
        images, speed = encode_records(
            lambda **arrays: encode_images(params, **arrays),
            config,
            records_path,
            mesh,
            between_batches=between_batches,
        )
        truth, modalities = read_truth(find_shards(records_path), phrases)
        scores = np.zeros(truth.shape, np.float64)
        for modality in sorted({*modalities}):
            rows = [place for place, of_image in enumerate(modalities) if of_image == modality]
            texts = [fill_template(template, modality, phrase) for phrase in phrases]
            embeddings = encode_texts(lambda *x: encode(params, *x), texts, tokenizer, config.data.max_tokens)
            scores[rows] = images[rows] @ embeddings.T
        results = summarize(scores, truth, list(phrases), modalities)
        return results | {"seconds": time.perf_counter() - started, "images_per_second": speed}

    return evaluate
