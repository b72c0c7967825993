"""Records to batches with Grain: the same batches from the same seed, resumable to the exact next one.

Training goes through one endless series of examples, the same for any number of processes: epoch after epoch, each
shuffled anew, each example augmented anew by its place in the series (`mixture` says which example stands where).
A global batch is the next run of places, and its row i the i-th of them, whichever process reads it: dropout is drawn
by row, so that a run of several processes gives the numbers of one. The position in the series is all that a resumed
run needs, with as many processes or others. A record that cannot be used leaves its place to the next one of the
series.
"""

import dataclasses
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.batches import Batch, TrainBatches, make_batches
from data_pipelines.captions import TextRule
from data_pipelines.examples import ExampleSource, decode_example
from data_pipelines.few_shot import choose_few
from data_pipelines.hierarchy import HierarchyRule, find_containers, find_ignored, find_pairs
from data_pipelines.mask_targets import MaskRule
from data_pipelines.mixture import Series, sampling_order, sampling_rates
from data_pipelines.quarantine import Quarantine
from data_pipelines.record_index import concatenate, read_index, select_records
from data_pipelines.records import Records, RecordsError, find_all_shards, find_shards
from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.text import (
    PromptRule,
    PromptTooLong,
    TextTokenizer,
    Vocabulary,
    load_tokenizer,
    make_vocabularies,
    sample_prompt,
)
from data_pipelines.transforms import flip_annotations, resize_into, scale_boxes

_MOST_REPLACEMENTS = 100  # records in a row that cannot be used


class RecipeError(ValueError):
    """An example that is sound, but that the recipe has no room for: no reason to skip it."""


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Makes an example of the training batch: reads, decodes, augments, writes the prompt, pads.

    Attributes: `source` of the examples; `series` of their places in it; `quarantine` for those that cannot be used;
    `prompts` draws the prompts of L = `prompts.max_tokens` tokens; `hierarchy` says what comes beside them;
    `vocabularies` by data set, "" for all others; the others as the fields of `config.data` with these names;
    `max_boxes` is M; `masks` says which masks a row has, None for none at all; `texts` writes other texts instead of
    prompts, or is None.
    """

    source: ExampleSource
    series: Series
    quarantine: Quarantine
    canvas: tuple[int, int]
    scale_range: tuple[float, float]
    flip_probability: float
    max_boxes: int
    prompts: PromptRule
    hierarchy: HierarchyRule
    tokenizer: TextTokenizer
    vocabularies: Mapping[str, Vocabulary]
    masks: MaskRule | None = None
    texts: TextRule | None = None

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"config.data.scale_range is {self.scale_range}: it must rise, above 0 and at most 1 (the whole canvas)"
            )

    def __call__(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the row of the batch at a place of the series, or of the next one whose record can be used.

        Raises:
            ValueError: the recipe has no room for an example, or too many records are corrupt; the message names the
                shard, the place there and the image.
        """
        last: Exception | None = None
        for candidate in range(place, place + _MOST_REPLACEMENTS):
            index = self.series[candidate]
            image_id = ""
            try:
                example = self.source[index]
                image_id = example.image_id
                return self._transform(example, rng)
            except (RecipeError, PromptTooLong) as error:
                raise ValueError(f"{self.source.name(index, example)}: {error}") from error
            except ValueError as error:
                number, position = self.source.split(index)
                self.quarantine.add(self.source.records[number], position, error, image_id)
                last = error
        raise RecordsError(f"none of {_MOST_REPLACEMENTS} records in a row can be used; the last: {last}") from last

    def _transform(self, example: GroundingExample, rng: np.random.Generator) -> dict[str, Any]:
        flip = rng.random() < self.flip_probability
        scale = rng.uniform(*self.scale_range)
        pixels, size, scales = resize_into(decode_example(example), self.canvas, scale, flip)
        # Mirroring run lengths costs more than all the rest: masks are set aside, and mirrored as pixels.
        masks = [region.mask for region in example.regions]
        if self.masks:
            example = dataclasses.replace(
                example, regions=tuple(dataclasses.replace(region, mask=None) for region in example.regions)
            )
        if flip:
            example = flip_annotations(example)
        if self.texts is not None:
            return {
                "image": pixels,
                "image_size": np.asarray(size, np.int32),
                **self.texts(example, rng, self.tokenizer, scales),
                "modality": np.int32(MODALITIES.index(example.modality)),
                "image_id": example.image_id,
            }
        prompt, regions = sample_prompt(
            example,
            rng,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabularies.get(example.dataset) or self.vocabularies[""],
            rule=self.prompts,
        )
        count = len(regions)
        if count > self.max_boxes:
            raise RecipeError(
                f"it has {count} boxes and config.data.max_boxes is {self.max_boxes}: raise that to {count} or more"
            )
        added = self.hierarchy.make_arrays(self.max_boxes, self.prompts.max_tokens)
        if "ignore_map" in added:
            added["ignore_map"][:count] = find_ignored(prompt, regions, self.hierarchy.ignored)
        if "child_map" in added:
            for name, found in zip(
                ("child_map", "parent_map"), find_pairs(prompt, regions, self.hierarchy.max_pairs), strict=True
            ):
                added[name][: len(found)] = found
        if "container" in added:
            added["container"][:count] = scale_boxes(find_containers(regions, example), scales)
        boxes = np.zeros((self.max_boxes, 4), np.float32)
        positive_map = np.zeros((self.max_boxes, self.prompts.max_tokens), np.float32)
        if count:
            boxes[:count] = scale_boxes(np.stack([region.box for region in regions]), scales)
            positive_map[:count] = prompt.positive_map
        row = {
            "image": pixels,
            "image_size": np.asarray(size, np.int32),
            "input_ids": prompt.input_ids,
            "attention_mask": prompt.attention_mask,
            "boxes": boxes,
            "box_mask": np.arange(self.max_boxes) < count,
            "positive_map": positive_map,
            "modality": np.int32(MODALITIES.index(example.modality)),
            "image_id": example.image_id,
            **added,
        }
        if self.masks:
            place = {id(region): i for i, region in enumerate(example.regions)}
            row |= self.masks.make(
                regions,
                [masks[place[id(region)]] for region in regions],
                prompt,
                rng,
                size=size,
                flip=flip,
                annotated=not masks or any(mask is not None for mask in masks),
                crowds=any(region.iscrowd for region in example.regions),
                ignored=added.get("ignore_map"),
            )
        return row


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Makes an example of the evaluation batch of place `index`; places after the last example are padding.

    Attributes: `source` of the examples; `canvas` as in `config.data`; one of `every` examples has a place.
    """

    source: ExampleSource
    canvas: tuple[int, int]
    every: int = 1

    def __call__(self, index: int) -> dict[str, Any]:
        index *= self.every
        valid = index < len(self.source)
        if valid:
            example = self.source[index]
            image_id, modality = example.image_id, MODALITIES.index(example.modality)
            try:
                image = decode_example(example)
                pixels, size, scales = resize_into(image, self.canvas)
            except ValueError as error:
                raise ValueError(f"{self.source.name(index, example)}: {error}") from error
            original = image.shape[:2]
        else:
            image_id, modality, index = "", 0, -1
            pixels = np.zeros((*self.canvas, 3), np.uint8)
            size = original = self.canvas
            scales = (1.0, 1.0)
        return {
            "image": pixels,
            "image_size": np.asarray(size, np.int32),
            "modality": np.int32(modality),
            "image_id": image_id,
            "scale": np.asarray(scales, np.float32),
            "original_size": np.asarray(original, np.int32),
            "valid": np.bool_(valid),
            "index": np.int32(index),
        }


def _check_processes(process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: it must be from 0 to {process_count - 1}")


def _make_series(records: Sequence[Records], data: ConfigDict, seed: int) -> tuple[Series, str]:
    """Returns the series of records, and a name that tells it from others."""
    number = sum(split.num_examples for split in records)
    name = zlib.crc32(f"{seed} {[(split.split, split.shard_lengths) for split in records]}".encode())
    balanced = data.balance_modalities or data.balance_granularities or data.balance_labels
    mixed = data.mixture_weights or balanced or data.repeat_threshold
    if not mixed and not data.few_shot:
        return Series(number, seed), f"{name:08x}"
    index = concatenate([read_index(split) for split in records])
    chosen = choose_few(index, data.few_shot, data.few_shot_seed) if data.few_shot else np.arange(number)
    rates = np.zeros(number)
    rates[chosen] = sampling_rates(
        select_records(index, chosen),
        weights=data.mixture_weights,
        balance_modalities=data.balance_modalities,
        balance_granularities=data.balance_granularities,
        balance_labels=data.balance_labels,
        repeat_threshold=data.repeat_threshold,
    )
    order = sampling_order(index, seed, by_level=data.balance_granularities > 0)
    return Series(number, seed, rates, order), f"{zlib.crc32(rates.tobytes(), name):08x}"


def train_loader(
    data: ConfigDict,
    *,
    seed: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    places: Sequence[int] | None = None,
    quarantine: str | os.PathLike | None = None,
) -> TrainBatches:
    """Opens the endless training batches of this process.

    Args:
        data: `config.data`.
        seed: of order, augmentation and prompts, 0 or more.
        batch_size: images B in a batch of this process.
        process_index, process_count: which process this is, of how many that load.
        places: rows of the global batch that this process reads, ascending, B of them: those that its devices hold,
            see `parallel.mesh.local_rows`. None is the process_index-th run of B, as where devices stand in the mesh
            in the order of their processes.
        quarantine: file for the list of corrupt records where `data.quarantine` is ""; None lists them in the log only.

    Returns:
        An iterator of dicts with M = data.max_boxes and L = data.max_tokens:

            image           uint8[B, H, W, 3], RGB, zeros right of and below the image
            image_size      int32[B, 2], (height, width) of the image in it
            input_ids       int32[B, L]
            attention_mask  int32[B, L]
            boxes           float32[B, M, 4], x0 y0 x1 y1 in pixels of `image`, half-open
            box_mask        bool[B, M]
            positive_map    float32[B, M, L], rows of boxes sum to 1
            modality        int32[B], positions in `schema.MODALITIES`
            image_id        str[B]

        and, where `data.hierarchy` asks for them, what `HierarchyRule.make_arrays` describes, with a leading B.
        and, where K = data.max_masks is not 0, masks on a grid of h x w cells of 4 x 4 pixels of `image` (see
        `mask_targets`), eight columns a byte:

            masks           uint8[B, K, h, ceil(w / 8)], of boxes that have one, a random choice if more than K
            mask_boxes      int32[B, K], their places in `boxes`, -1 behind the last one
            phrase_masks    uint8[B, K, h, ceil(w / 8)], of phrases, empty for absent ones
            phrase_tokens   bool[B, K, L], their tokens, none behind the last one

        Where `data.text` is not "prompts", `TextRule` says what they have in place of input_ids to positive_map.

        `get_state()` tells where it stands and `set_state(state)` goes on there, with the next batch exactly as it
        would have been; with another number of processes and the same global batch, with the same examples in the
        batches of all processes together. Call `close()` at the end.

    Raises:
        RecordsError: `data.train` names no records, or damaged ones. While iterating: more records are corrupt than
            `data.max_corrupt`.
        ValueError: a field cannot be used. While iterating: the recipe has no room for an example; the message names
            its shard and its image.
    """
    _check_processes(process_index, process_count)
    if places is None:
        places = range(process_index * batch_size, (process_index + 1) * batch_size)
    if len(places) != batch_size or not all(0 <= place < process_count * batch_size for place in places):
        raise ValueError(
            f"places {list(places)}: process {process_index} of {process_count} reads {batch_size} rows of a global "
            f"batch of {process_count * batch_size}"
        )
    records = find_all_shards(data.train)
    source = ExampleSource(*records, masks=data.max_masks > 0)
    series, name = _make_series(records, data, seed)
    listed = Quarantine(data.quarantine or quarantine, data.max_corrupt, process_index)
    transform = TrainTransform(
        source=source,
        series=series,
        quarantine=listed,
        canvas=tuple(data.canvas),
        scale_range=tuple(data.scale_range),
        flip_probability=data.flip_probability,
        max_boxes=data.max_boxes,
        prompts=PromptRule.from_config(data),
        hierarchy=HierarchyRule.from_config(data.hierarchy),
        tokenizer=load_tokenizer(data.tokenizer),
        vocabularies=make_vocabularies([split.metadata for split in records]),
        masks=MaskRule(data.max_masks, tuple(data.canvas)) if data.max_masks else None,
        texts=TextRule.from_config(data),
    )
    return TrainBatches(
        grain.MapDataset.range(sys.maxsize).seed(seed).random_map(transform),
        data,
        listed,
        series=name,
        places=places,
        global_batch=process_count * batch_size,
    )


class EvalLoader:
    """The evaluation batches of one process; iterating starts from the first one each time.

    Attributes:
        num_examples: examples that it takes of the whole split, over all processes.
    """

    def __init__(self, batches: grain.IterDataset[Batch], num_batches: int, num_examples: int):
        self._batches, self._num_batches, self.num_examples = batches, num_batches, num_examples

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self._batches)
        try:
            yield from iterator
        finally:
            iterator.close()


def eval_loader(
    data: ConfigDict, *, path: str, batch_size: int, process_index: int, process_count: int, every: int = 1
) -> EvalLoader:
    """Opens one pass over records in their order; every process gets the same number of batches.

    Args:
        data: `config.data`.
        path: the records, DIR or DIR:SPLIT.
        batch_size: images B in a batch of this process.
        process_index, process_count: which process this is, of how many that load.
        every: 1 takes all records, n one of n.

    Returns:
        An iterable, with a length, of dicts:

            image          uint8[B, H, W, 3], RGB, as large as fits the canvas, zeros right of and below the image
            image_size     int32[B, 2], (height, width) of the image in it
            modality       int32[B], positions in `schema.MODALITIES`
            image_id       str[B]
            scale          float32[B, 2], canvas pixels per original pixel, (y, x)
            original_size  int32[B, 2], (height, width)
            valid          bool[B], False where the row only fills the last batch
            index          int32[B], place of the record in the split, -1 where not valid

    Raises:
        RecordsError: `path` names no records, or damaged ones.
        ValueError: while iterating, an image cannot be decoded; the message names its shard and the image.
    """
    _check_processes(process_index, process_count)
    source = ExampleSource(find_shards(path))
    num_examples = -(-len(source) // every)
    num_batches = -(-num_examples // (process_count * batch_size))
    places = grain.MapDataset.range(num_batches * process_count * batch_size)
    rows = places[process_index::process_count].map(EvalTransform(source, tuple(data.canvas), every))
    return EvalLoader(make_batches(rows, data, batch_size), num_batches, num_examples)
