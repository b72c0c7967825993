"""Encoding all images of records, or texts, on the training mesh."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.examples import ExampleSource
from data_pipelines.loader import eval_loader
from data_pipelines.records import Records, find_shards
from data_pipelines.text import TextTokenizer, build_caption_prompt, make_vocabularies
from medglip_jax.evaluation.auroc import image_truth
from medglip_jax.evaluation.run import local_batch_size
from medglip_jax.inference import prompt_length
from medglip_jax.parallel.mesh import to_global

Rows = Mapping[str, np.ndarray]
Encode = Callable[..., jax.Array]

_TEXTS = 64  # texts encoded at once


def encode_records(
    encode: Encode,
    config: ConfigDict,
    records_path: str,
    mesh: Mesh,
    *,
    every: int = 1,
    add: Callable[[Rows], Rows] = lambda batch: {},
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, float]:
    """Encodes every image of records, or one of `every`.

    Args:
        encode: takes image and image_size of a batch, and what `add` returns, on the mesh; returns an array [B, ...].
        config: a recipe; reads `data`.
        records_path: DIR or DIR:SPLIT.
        mesh: from `make_mesh`.
        every: 1 takes all records.
        add: from a batch of this process, more arrays for `encode`.
        between_batches: called before each batch; what it raises ends it.

    Returns:
        float[N, ...] in the records' order, on every process; and images per second, compilation included.
    """
    loader = eval_loader(
        config.data,
        path=records_path,
        batch_size=local_batch_size(config, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        every=every,
    )
    found: dict[int, np.ndarray] = {}
    started = time.perf_counter()
    for batch in loader:
        between_batches()
        images = {name: batch[name] for name in ("image", "image_size")} | dict(add(batch))
        encoded = encode(**to_global(images, mesh))
        host = to_global({name: batch[name] for name in ("index", "valid")}, mesh)
        if jax.process_count() == 1:
            rows, host = jax.device_get((encoded, host))
        else:
            rows, host = multihost_utils.process_allgather((encoded, host), tiled=True)
        for row in np.flatnonzero(host["valid"]):
            found[int(host["index"][row])] = rows[row]
    if not found:
        raise ValueError(f"{records_path} holds no images")
    return np.stack([found[index] for index in sorted(found)]), len(found) / (time.perf_counter() - started)


def encode_texts(encode: Encode, texts: Sequence[str], tokenizer: TextTokenizer, max_tokens: int) -> np.ndarray:
    """Encodes texts, cut to `max_tokens`, with one program: texts [T] -> float[T, E].

    Args:
        encode: (input_ids, attention_mask), int32[64, L] -> float[64, E].
        texts, tokenizer, max_tokens: as in a prompt.
    """
    prompts = [build_caption_prompt(text, [], tokenizer, max_tokens) for text in texts]
    length = prompt_length(max(int(prompt.attention_mask.sum()) for prompt in prompts), max_tokens)
    empty = np.zeros((-len(prompts) % _TEXTS, length), np.int32)
    ids, mask = (
        np.concatenate([np.stack([getattr(prompt, name)[:length] for prompt in prompts]), empty])
        for name in ("input_ids", "attention_mask")
    )
    parts = [jax.device_get(encode(ids[i : i + _TEXTS], mask[i : i + _TEXTS])) for i in range(0, len(ids), _TEXTS)]
    return np.concatenate(parts)[: len(texts)]


def read_truth(records: Records, phrases: Mapping[str, str], every: int = 1) -> tuple[np.ndarray, list[str]]:
    """Returns what is known of each image and each phrase, int8[N, K], and the images' modalities.

    Args:
        records: one of `every` of which is taken.
        phrases: K phrases, each with its label.
        every: see `encode_records`.
    """
    vocabularies = make_vocabularies([records.metadata])
    source = ExampleSource(records)
    truth, modalities = [], []
    for index in range(0, len(source), every):
        example = source[index]
        vocabulary = vocabularies.get(example.dataset) or vocabularies[""]
        truth.append(image_truth(example, phrases, vocabulary))
        modalities.append(example.modality)
    return np.stack(truth), modalities


def phrases_of(records_path: str) -> dict[str, str]:
    """Returns the phrases of records, each with its label.

    Raises:
        ValueError: there are none.
    """
    table: dict[str, Any] = find_shards(records_path).metadata["phrases"]
    if not table:
        raise ValueError(f"{records_path}: no image of these records has a region, so there is nothing to evaluate")
    return {phrase: table[phrase]["label"] for phrase in sorted(table)}
