"""Region-to-text retrieval: which of all descriptions in records belongs to a region."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import Module
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.captions import describe_each
from data_pipelines.examples import ExampleSource
from data_pipelines.records import find_shards
from data_pipelines.schema import GroundingExample
from data_pipelines.text import TextTokenizer
from data_pipelines.transforms import scale_boxes
from medglip_jax.evaluation.encoding import encode_records, encode_texts
from medglip_jax.evaluation.zero_shot import make_text_encoder
from medglip_jax.model.pixels import normalize_pixels
from medglip_jax.parallel.activations import activations_on
from medglip_jax.parallel.presets import resolve_rules

_AT = (1, 5)


def recall_at(scores: np.ndarray, own: np.ndarray) -> dict[str, float | None]:
    """Returns how often a region's own text is among the best k: "recall@1" and "recall@5", and "chance@" of both.

    Args:
        scores: float[N, T], of N regions and T different texts.
        own: int[N], the text of each region. Of texts that score the same, its own comes last.
    """
    if not len(own):
        return {f"{name}@{k}": None for name in ("recall", "chance") for k in _AT}
    mine = np.take_along_axis(scores, own[:, None], axis=1)
    ranks = (scores >= mine).sum(axis=1)  # 1 is the best
    recalls = {f"recall@{k}": float((ranks <= k).mean()) for k in _AT}
    return recalls | {f"chance@{k}": min(k / scores.shape[1], 1.0) for k in _AT}


def _describe(example: GroundingExample, index: int, most: int) -> list[tuple[int, str]]:
    """The descriptions that are asked for in an image: always the same ones."""
    rng = np.random.default_rng(index)
    described = describe_each(example, rng)
    return [described[i] for i in rng.permutation(len(described))[:most]]


def make_retrieval(
    model: Module, config: ConfigDict, mesh: Mesh, tokenizer: TextTokenizer
) -> Callable[..., dict[str, Any]]:
    """Returns the function that looks for the description of each region among all descriptions in records.

    Args:
        model: region_caption, from `make_model`.
        config: a recipe; reads `data` and the rules of sharding.
        mesh: from `make_mesh`.
        tokenizer: of the checkpoint.

    Returns:
        evaluate(params, records_path, between_batches=) -> what `recall_at` returns over all regions, at most
        `data.max_descriptions` an image, and inside each modality ("per_modality", against all descriptions too);
        "regions", "texts", "images", "seconds" and "images_per_second". The same on every process.

        The evaluation raises ValueError where no region of the records can be described.
    """
    most = config.data.max_descriptions

    @jax.jit
    def encode_regions(params: Any, image: jax.Array, image_size: jax.Array, boxes: jax.Array) -> jax.Array:
        nothing = jnp.ones((1, 1), jnp.int32)
        pixels = normalize_pixels(image, image_size)
        with activations_on(mesh, config.activation_rules, resolve_rules(config)):
            outputs: Any = model.apply({"params": params}, pixels, nothing, nothing, boxes=boxes)
        return outputs["image_embedding"].reshape(len(image), most, -1)

    encode = make_text_encoder(model, config, mesh)

    def evaluate(
        params: Any, records_path: str, *, between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        started = time.perf_counter()
        source = ExampleSource(find_shards(records_path))

        def add_boxes(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            boxes = np.zeros((len(batch["index"]), most, 4), np.float32)
            for row in np.flatnonzero(batch["valid"]):
                index = int(batch["index"][row])
                example = source[index]
                for place, (region, _) in enumerate(_describe(example, index, most)):
                    y, x = batch["scale"][row].tolist()
                    boxes[row, place] = scale_boxes(example.regions[region].box, (y, x))
            return {"boxes": boxes}

        found, speed = encode_records(
            lambda **arrays: encode_regions(params, **arrays),
            config,
            records_path,
            mesh,
            add=add_boxes,
            between_batches=between_batches,
        )
        regions, texts, modalities = [], [], []
        for index in range(len(source)):
            example = source[index]
            for place, (_, text) in enumerate(_describe(example, index, most)):
                regions.append(found[index, place])
                texts.append(text)
                modalities.append(example.modality)
        if not texts:
            raise ValueError(
                f"{records_path}: no region of these records can be described, so nothing can be evaluated"
            )
        different, own = np.unique(texts, return_inverse=True)
        embeddings = encode_texts(lambda *x: encode(params, *x), different.tolist(), tokenizer, config.data.max_tokens)
        scores, names = np.stack(regions) @ embeddings.T, np.asarray(modalities, str)
        per_modality = {
            modality: {**recall_at(scores[names == modality], own[names == modality]), "regions": int(count)}
            for modality, count in zip(*np.unique(names, return_counts=True), strict=True)
        }
        return recall_at(scores, own) | {
            "per_modality": {str(modality): entry for modality, entry in per_modality.items()},
            "regions": len(own),
            "texts": len(different),
            "images": len(source),
            "seconds": time.perf_counter() - started,
            "images_per_second": speed,
        }

    return evaluate
