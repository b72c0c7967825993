"""Records to batches with Grain: the same batches from the same seed, resumable to the exact next one.

Training goes through one endless series of examples, the same for any number of processes: epoch after epoch, each
shuffled anew, each example augmented anew by its place in the series. Process p of n takes the places p, p + n, ..., so
that every example comes exactly once in an epoch, whatever the number of processes.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import grain
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.records import Records, RecordsError, find_shards, open_source, parse_example
from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.text import TextTokenizer, Vocabulary, load_tokenizer, sample_prompt
from data_pipelines.transforms import decode_image, flip_annotations, flip_pixels, resize_into, scale_boxes

_BATCHES_AHEAD = 1  # stacked while the step before runs

Batch = dict[str, np.ndarray]


class ExampleSource:
    """Random access to the examples of a split; picklable. Its errors name the shard and the place of the record."""

    def __init__(self, records: Records):
        """Opens the shards.

        Raises:
            RecordsError: the split is empty, or a shard is damaged.
        """
        if not records.num_examples:
            raise RecordsError(f"{records.directory}:{records.split} holds no examples")
        self.records = records
        self._source = open_source(records)

    def __len__(self) -> int:
        return self.records.num_examples

    def __getitem__(self, index: int) -> GroundingExample:
        record = self._source[index]
        try:
            example = parse_example(record)
        except RecordsError as error:
            raise RecordsError(f"{self.records.locate(index)}: {error}") from error
        # Batches hold no masks, and mirroring them costs more than all the rest.
        regions = tuple(dataclasses.replace(region, mask=None) for region in example.regions)
        return dataclasses.replace(example, regions=regions)

    def name(self, index: int, example: GroundingExample) -> str:
        """Names an example for error messages: its shard, its place there and its image."""
        return f"{self.records.locate(index)}, image {example.image_id!r}"

    def __repr__(self) -> str:
        return f"ExampleSource({self.records.directory}:{self.records.split}, {len(self)} examples)"


def _decode(example: GroundingExample) -> np.ndarray:
    image = decode_image(example.image)
    if image.shape[:2] != (example.height, example.width):
        raise ValueError(
            f"the image is {image.shape[1]} x {image.shape[0]} pixels and its record says "
            f"{example.width} x {example.height}: its boxes belong to another version of it; build the records again"
        )
    return image


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Makes an example of the training batch: reads, decodes, augments, writes the prompt, pads.

    Attributes: `source` of the examples; the others as the fields of `config.data` with these names; `max_boxes` is M
    and `max_tokens` is L.
    """

    source: ExampleSource
    canvas: tuple[int, int]
    scale_range: tuple[float, float]
    flip_probability: float
    max_boxes: int
    max_tokens: int
    max_negatives: int
    full_negatives_probability: float
    caption_probability: float
    tokenizer: TextTokenizer
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        low, high = self.scale_range
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"config.data.scale_range is {self.scale_range}: it must rise, above 0 and at most 1 (the whole canvas)"
            )

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the row of the batch that the example of this place in the split makes.

        Raises:
            ValueError: the example cannot be used; the message names its shard, its place there and its image.
        """
        example = self.source[index]
        try:
            return self._transform(example, rng)
        except ValueError as error:
            raise ValueError(f"{self.source.name(index, example)}: {error}") from error

    def _transform(self, example: GroundingExample, rng: np.random.Generator) -> dict[str, Any]:
        flip = rng.random() < self.flip_probability
        scale = rng.uniform(*self.scale_range)
        pixels, size, scales = resize_into(_decode(example), self.canvas, scale)
        if flip:
            pixels, example = flip_pixels(pixels, size), flip_annotations(example)
        prompt, regions = sample_prompt(
            example,
            rng,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
            max_negatives=self.max_negatives,
            full_negatives_probability=self.full_negatives_probability,
            caption_probability=self.caption_probability,
            vocabulary=self.vocabulary,
        )
        count = len(regions)
        if count > self.max_boxes:
            raise ValueError(
                f"it has {count} boxes and config.data.max_boxes is {self.max_boxes}: raise that to {count} or more"
            )
        boxes = np.zeros((self.max_boxes, 4), np.float32)
        positive_map = np.zeros((self.max_boxes, self.max_tokens), np.float32)
        if count:
            boxes[:count] = scale_boxes(np.stack([region.box for region in regions]), scales)
            positive_map[:count] = prompt.positive_map
        return {
            "image": pixels,
            "image_size": np.asarray(size, np.int32),
            "input_ids": prompt.input_ids,
            "attention_mask": prompt.attention_mask,
            "boxes": boxes,
            "box_mask": np.arange(self.max_boxes) < count,
            "positive_map": positive_map,
            "modality": np.int32(MODALITIES.index(example.modality)),
            "image_id": example.image_id,
        }


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Makes an example of the evaluation batch of place `index`; places after the last example are padding."""

    source: ExampleSource
    canvas: tuple[int, int]

    def __call__(self, index: int) -> dict[str, Any]:
        valid = index < len(self.source)
        if valid:
            example = self.source[index]
            image_id, modality = example.image_id, MODALITIES.index(example.modality)
            try:
                image = _decode(example)
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


def _start_worker(index: int, count: int) -> None:
    """Keeps OpenCV to one thread: threads and processes of the loader share the cores already."""
    cv2.setNumThreads(0)


def _decode_ahead(examples: grain.MapDataset, data: ConfigDict, batch_size: int) -> grain.IterDataset:
    """Batches examples that threads, or processes, make ahead; the order does not depend on how many there are."""
    cv2.setNumThreads(0)
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=data.prefetch)
    if not data.num_workers:
        made = examples.to_iter_dataset(options)
    else:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads its own flags; outside absl.app.run nobody has parsed them
            flags.FLAGS.mark_as_parsed()
        workers = grain.MultiprocessingOptions(
            num_workers=data.num_workers, per_worker_buffer_size=max(1, data.prefetch // data.num_workers)
        )
        made = examples.to_iter_dataset(options).mp_prefetch(workers, _start_worker)
    batches = made.batch(batch_size, drop_remainder=True)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD)


def _check_processes(process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: it must be from 0 to {process_count - 1}")


def train_loader(
    data: ConfigDict, *, seed: int, batch_size: int, process_index: int, process_count: int
) -> grain.DatasetIterator[Batch]:
    """Opens the endless training batches of this process.

    Args:
        data: `config.data`.
        seed: of order, augmentation and prompts, 0 or more.
        batch_size: images B in a batch of this process.
        process_index, process_count: which process this is, of how many that load.

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

        `get_state()` tells where it stands and `set_state(state)` goes on there, with the next batch exactly as it
        would have been; the state fits the same number of workers and processes. Call `close()` at the end.

    Raises:
        RecordsError: `data.train` names no records, or damaged ones.
        ValueError: a field cannot be used. While iterating: an example cannot be used; the message names its shard and
            its image.
    """
    _check_processes(process_index, process_count)
    if not data.train:
        raise RecordsError("config.data.train is empty: set it to the records to train on, DIR or DIR:SPLIT")
    records = find_shards(data.train)
    source = ExampleSource(records)
    transform = TrainTransform(
        source=source,
        canvas=tuple(data.canvas),
        scale_range=tuple(data.scale_range),
        flip_probability=data.flip_probability,
        max_boxes=data.max_boxes,
        max_tokens=data.max_tokens,
        max_negatives=data.max_negatives,
        full_negatives_probability=data.full_negatives_probability,
        caption_probability=data.caption_probability,
        tokenizer=load_tokenizer(data.tokenizer),
        vocabulary=Vocabulary.from_metadata(records.metadata["phrases"]),
    )
    epoch = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    series = epoch.repeat(None, reseed_each_epoch=True).random_map(transform)
    return iter(_decode_ahead(series[process_index::process_count], data, batch_size))


class EvalLoader:
    """The evaluation batches of one process; iterating starts from the first one each time.

    Attributes:
        num_examples: examples of the whole split, over all processes.
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


def eval_loader(data: ConfigDict, *, path: str, batch_size: int, process_index: int, process_count: int) -> EvalLoader:
    """Opens one pass over records in their order; every process gets the same number of batches.

    Args:
        data: `config.data`.
        path: the records, DIR or DIR:SPLIT.
        batch_size: images B in a batch of this process.
        process_index, process_count: which process this is, of how many that load.

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
    num_batches = -(-len(source) // (process_count * batch_size))
    places = grain.MapDataset.range(num_batches * process_count * batch_size)
    rows = places[process_index::process_count].map(EvalTransform(source, tuple(data.canvas)))
    return EvalLoader(_decode_ahead(rows, data, batch_size), num_batches, len(source))
