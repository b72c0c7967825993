"""Evaluation on the training mesh: every process detects in its part of the records, all of them get the results."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import Module
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.loader import eval_loader
from data_pipelines.records import find_shards, open_source, parse_example, read_examples
from data_pipelines.schema import MODALITIES
from data_pipelines.text import (
    TextTokenizer,
    build_prompt,
    build_prompts,
    load_tokenizer,
    make_prefix,
    make_vocabularies,
    order_by_body_region,
)
from data_pipelines.transforms import decode_image
from medglip_jax.drawing import SheetEntry, contact_sheet
from medglip_jax.evaluation.coco import GroundTruth, average_precision
from medglip_jax.evaluation.levels import (
    add_levels,
    broader_phrases,
    label_phrases,
    measure_broader,
    measure_consistency,
)
from medglip_jax.evaluation.masks import mask_metrics
from medglip_jax.inference import Detections, Detector, make_detector, merge, stack_prompts
from medglip_jax.mask_outputs import decode
from medglip_jax.parallel.mesh import batch_parts, describe_parts, to_global

_HOST_KEYS = ("index", "valid", "scale", "original_size")
_SHEET_SCORE = 0.3  # least score of a box on the contact sheet
_SHEET_BOXES = 12  # most boxes of a picture on it, where there are not more true ones


def local_batch_size(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the evaluation images of this process in a batch.

    Raises:
        ValueError: `data.eval_batch_size` cannot be split over the mesh.
    """
    parts = batch_parts(mesh)
    if config.data.eval_batch_size % parts:
        raise ValueError(
            f"config.data.eval_batch_size is {config.data.eval_batch_size}: it must be a multiple of {parts}, "
            f"the mesh axes {describe_parts(mesh)}"
        )
    return config.data.eval_batch_size // jax.process_count()


def _gather(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Brings arrays that are spread over all processes to each of them."""
    return jax.device_get(batch) if jax.process_count() == 1 else multihost_utils.process_allgather(batch, tiled=True)


def _detect_batches(
    detector: Detector,
    params: Any,
    config: ConfigDict,
    records_path: str,
    mesh: Mesh,
    prompts: Sequence[dict[str, np.ndarray]],
) -> Iterator[tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]]:
    """Yields each batch's host arrays and its detections by every prompt; one batch runs ahead on the devices."""
    loader = eval_loader(
        config.data,
        path=records_path,
        batch_size=local_batch_size(config, mesh),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    waiting = None
    keys = ("image", "image_size", *(["modality"] if config.model.modality.names else []))
    for batch in loader:
        images = to_global({key: batch[key] for key in keys}, mesh)
        asked = prompts
        if config.evaluation.modality_prefix:
            asked = [to_global({key: x[batch["modality"]] for key, x in prompt.items()}, mesh) for prompt in prompts]
        found = [detector(params, **images, **prompt) for prompt in asked]
        host = to_global({key: batch[key] for key in _HOST_KEYS}, mesh) if jax.process_count() > 1 else batch
        host = {key: host[key] for key in _HOST_KEYS}
        if waiting is not None:
            yield _gather(waiting[0]), [_gather(part) for part in waiting[1]]
        waiting = host, found
    if waiting is not None:
        yield _gather(waiting[0]), [_gather(part) for part in waiting[1]]


def make_prompts(
    phrases: Sequence[str],
    prefixes: Sequence[str],
    tokenizer: TextTokenizer,
    max_tokens: int,
    detection: ConfigDict | None = None,
) -> tuple[list[dict[str, np.ndarray]], list[list[int]]]:
    """Spreads phrases over prompts, the same for each prefix.

    Args:
        phrases, prefixes: what to ask for, and the words before it.
        tokenizer, max_tokens: of the prompts.
        detection: `config.detection`, for `stack_prompts`.

    Returns:
        Of each prompt its arrays, as `stack_prompts` returns them, with a row for each prefix, all prompts in one shape
        (one compilation); and the indices of its phrases.
    """
    longest = max(prefixes, key=tokenizer.count)
    chunks = build_prompts(phrases, tokenizer, max_tokens, longest)
    rows = [
        build_prompt([phrases[k] for k in indices], tokenizer, max_tokens, prefix)
        for _, indices in chunks
        for prefix in prefixes
    ]
    stacked, count = stack_prompts(rows, max_tokens, detection), len(prefixes)
    prompts = [{key: x[i * count : (i + 1) * count] for key, x in stacked.items()} for i in range(len(chunks))]
    return prompts, [indices for _, indices in chunks]


def detect_records(
    model: Module,
    params: Any,
    config: ConfigDict,
    records_path: str,
    mesh: Mesh,
    *,
    tokenizer: TextTokenizer,
    phrases: Sequence[str],
    detector: Detector | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[list[Detections], float]:
    """Asks for all phrases in every image.

    Phrases that do not fit one prompt go into several, and an image is seen once with each: the fusion mixes text into
    the image's features, and what comes before it, the backbone, is computed again.

    Args:
        model, params: the detector and its parameters, on the mesh.
        config: a recipe; reads `data`, `detection`, `model.modality` and `evaluation.modality_prefix`.
        records_path: DIR or DIR:SPLIT.
        mesh: from `make_mesh`.
        tokenizer: of the checkpoint.
        phrases: what to ask for.
        detector: of the model, from `make_detector`; None makes one, and compiles it.
        between_batches: called before each batch; what it raises ends the detection.

    Returns:
        The detections of every image in the records' order, on every process: of each at most
        `detection.max_detections`, best first; and images per second, of the batches after the first if there are any
        (the first one compiles).
    """
    order = order_by_body_region(phrases)  # what may be confused stands in one prompt, as in training
    prefixes = [make_prefix(name) for name in MODALITIES] if config.evaluation.modality_prefix else [""]
    prompts, chunks = make_prompts(
        [phrases[k] for k in order], prefixes, tokenizer, config.data.max_tokens, config.detection
    )
    places = [[order[k] for k in indices] for indices in chunks]

    by_index: dict[int, Detections] = {}
    started = time.perf_counter()
    first = None  # images of the first batch, and when it was done
    detector = detector or make_detector(model, config, mesh)
    between_batches()
    for host, parts in _detect_batches(detector, params, config, records_path, mesh, prompts):
        between_batches()
        for row in np.flatnonzero(host["valid"]):
            by_index[int(host["index"][row])] = merge(
                [{key: value[row] for key, value in part.items()} for part in parts],
                places,
                config.detection.max_detections,
                scale=host["scale"][row],
                size=tuple(host["original_size"][row]),
                mask_margin=config.detection.mask_margin,
            )
        first = first or (len(by_index), time.perf_counter())
    ended = time.perf_counter()
    if first is None:
        raise ValueError(f"{records_path} holds no images to evaluate on")
    timed = (len(by_index) - first[0], ended - first[1])
    images, seconds = timed if timed[0] else (len(by_index), ended - started)
    return [by_index[index] for index in sorted(by_index)], images / seconds


def evaluate_records(
    model: Module,
    params: Any,
    config: ConfigDict,
    records_path: str,
    mesh: Mesh,
    *,
    tokenizer: TextTokenizer | None = None,
    sheet: str | os.PathLike | None = None,
    sheet_images: int = 12,
    detector: Detector | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures average precision and grounding on records, asking for every phrase of their metadata in every image.

    Args:
        model, params: the detector and its parameters, on the mesh.
        config: a recipe; reads `data`, `detection` and `evaluation`.
        records_path: DIR or DIR:SPLIT.
        mesh: from `make_mesh`.
        tokenizer: of the checkpoint; None loads `data.tokenizer`.
        sheet: image file for a contact sheet of predicted and true boxes; None draws none.
        sheet_images: images on it, see `choose_shown`.
        detector, between_batches: as in `detect_records`.

    Returns:
        What `average_precision` returns, with what `add_levels` adds. With `evaluation.broader_phrases` also "broader",
        of `measure_broader` and of a second pass, and "consistency" is of that one. Where the model has masks, what
        `mask_metrics` returns, as "masks". With "seconds" of the whole evaluation and "images_per_second" of detection;
        the same on every process. All of it goes into JSON.

    Raises:
        ValueError: the records hold no phrases or no images, the batch size does not fit the mesh, or the contact sheet
            cannot be written under that name.
        RecordsError: a shard is missing or damaged.
    """
    started = time.perf_counter()
    records = find_shards(records_path)
    phrases = sorted(records.metadata["phrases"])
    if not phrases:
        raise ValueError(f"{records_path}: no image of these records has a region, so there is nothing to evaluate")
    if sheet:
        _check_sheet(sheet, sheet_images)
    tokenizer = tokenizer or load_tokenizer(config.data.tokenizer)

    def detect(asked: Sequence[str]) -> tuple[list[Detections], float]:
        return detect_records(
            model,
            params,
            config,
            records_path,
            mesh,
            tokenizer=tokenizer,
            phrases=asked,
            detector=detector,
            between_batches=between_batches,
        )

    detections, speed = detect(phrases)
    labels = label_phrases(phrases, records.metadata["phrases"])
    broader = broader_phrases(labels) if config.evaluation.broader_phrases else {}
    asked = list(dict.fromkeys([*phrases, *broader]))
    # Broader phrases are asked beside the others, and apart from the pass whose numbers are compared.
    wide = detect(asked)[0] if broader else detections
    results = None
    if jax.process_index() == 0:  # only one reads the truth
        truth = []
        masks, vocabularies = bool(config.model.masks.kind), make_vocabularies([records.metadata])
        for example in read_examples(records):
            vocabulary = vocabularies.get(example.dataset) or vocabularies[""]
            truth.append(GroundTruth.of(example, vocabulary.find_absent(example), masks=masks))
        if sheet:
            shown = choose_shown([image.modality for image in truth], sheet_images)
            pixels = [decode_image(parse_example(record).image) for record in open_source(records).__getitems__(shown)]
            entries = [
                _sheet_entry(image, truth[index], detections[index], phrases)
                for image, index in zip(pixels, shown, strict=True)
            ]
            contact_sheet(entries, sheet)
        results = average_precision(truth, detections, phrases)
        threshold = config.evaluation.score_threshold
        add_levels(results, truth, detections, phrases, records.metadata["phrases"], threshold)
        if broader:
            results["broader"] = measure_broader(truth, wide, asked, labels, broader)
            results["consistency"] = measure_consistency(truth, wide, asked, labels | broader, threshold)
        if masks:
            results["masks"] = mask_metrics(truth, detections, phrases)
        results |= {"seconds": time.perf_counter() - started, "images_per_second": speed}
    return _broadcast(results)


def _check_sheet(path: str | os.PathLike, images: int) -> None:
    """Finds mistakes that would else show when the detections are there, and lose them."""
    if images < 1:
        raise ValueError(f"sheet_images is {images}: a contact sheet needs at least one image")
    if pathlib.Path(path).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{os.fspath(path)}: a contact sheet is an image file; let its name end in .png")


def choose_shown(modalities: Sequence[str], count: int) -> list[int]:
    """Chooses images that show a set: as many of each modality as of any other, where it has them.

    Args:
        modalities: of each image.
        count: of images to choose.

    Returns:
        Indices without repetition, modality by modality in the order in which they first come, spread over the images
        of each; all of them where there are no more than `count`.
    """
    groups: dict[str, list[int]] = {}
    for index, modality in enumerate(modalities):
        groups.setdefault(modality, []).append(index)
    # The first image of each, the second of each, and so on, until there are enough.
    places = sorted((place, rank) for rank, group in enumerate(groups.values()) for place in range(len(group)))
    quotas = np.bincount([rank for _, rank in places[:count]], minlength=len(groups))
    return [
        group[place]
        for group, quota in zip(groups.values(), quotas, strict=True)
        for place in np.linspace(0, len(group) - 1, quota).astype(int)
    ]


def _sheet_entry(image: np.ndarray, truth: GroundTruth, detections: Detections, phrases: Sequence[str]) -> SheetEntry:
    kept = np.flatnonzero(detections.scores >= _SHEET_SCORE)[: max(_SHEET_BOXES, len(truth.boxes))]
    masks = detections.masks or [None] * len(detections.scores)
    return SheetEntry(
        image=image,
        title=f"{truth.modality} · {truth.image_id}",
        boxes=detections.boxes[kept],
        labels=[phrases[int(i)] for i in detections.phrases[kept]],
        scores=detections.scores[kept],
        true_boxes=truth.boxes,
        true_labels=truth.phrases,
        masks=[(phrases[int(detections.phrases[i])], decode(mask)) for i in kept if (mask := masks[i])],
    )


def _broadcast(results: dict[str, Any] | None) -> dict[str, Any]:
    """Gives the first process's results to all."""
    if jax.process_count() > 1:
        text = np.frombuffer(json.dumps(results).encode(), np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.array(text.size)))
        padded = np.resize(text, length)
        results = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    assert results is not None
    return results
