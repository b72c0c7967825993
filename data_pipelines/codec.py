"""One annotated image as the bytes of a record: tf.train.Example, without TensorFlow."""

import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_pipelines.schema import GRANULARITIES, MODALITIES, Expression, GroundingExample, Region

# The features of `GroundingExample.expressions`: records of builds before it have none of them.
_EXPRESSION_FEATURES = ("expressions/text", "expressions/kind", "expression_regions", "expression_spans")


_import_lock = threading.Lock()


class RecordsError(ValueError):
    """Records that cannot be found, read or written; the message names the file and what to do."""


def _check_names(place: str, modality: str, granularities: Iterable[str]) -> None:
    if modality not in MODALITIES:
        raise RecordsError(f"{place}: unknown modality {modality!r}; known: {', '.join(MODALITIES)}")
    if unknown := set(granularities) - set(GRANULARITIES):
        raise RecordsError(f"{place}: unknown granularity {unknown.pop()!r}; known: {', '.join(GRANULARITIES)}")


@functools.cache
def _example_class() -> Any:
    """Returns the protocol buffer tf.train.Example.

    It is imported when a record is read or written first, by one thread: two that import TensorFlow Datasets at once
    may wait for each other for ever.
    """
    with _import_lock:
        from tensorflow_datasets.proto import tf_example_generated_pb2

    return tf_example_generated_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


def import_codec() -> None:
    """Imports what the first record needs, for callers that have other threads by then, such as a progress bar's.

    TensorFlow Datasets replaces Python's import for as long as its own takes, and others then fail: relative ones.
    """
    _example_class()


def encode_example(example: GroundingExample) -> bytes:
    """Serialises an example as tf.train.Example with the features of `tfds_metadata.make_features`.

    Raises:
        RecordsError: a box is not of four numbers, a mask has not the image's size, a modality or granularity is not of
            `schema`, an expression names a region that there is not, or a text is no Unicode (a file name in another
            encoding becomes such a text).
    """
    _check_names(example.image_id, example.modality, (region.granularity for region in example.regions))
    size = [example.height, example.width]
    for region in example.regions:
        if np.shape(region.box) != (4,):
            raise RecordsError(f"{example.image_id}: a box has shape {np.shape(region.box)}, expected x0 y0 x1 y1")
        if region.mask is not None and list(region.mask["size"]) != size:
            raise RecordsError(f"{example.image_id}: a mask has size {region.mask['size']}, the image {size}")
    for expression in example.expressions:
        if unknown := [index for index in expression.regions if not 0 <= index < len(example.regions)]:
            raise RecordsError(
                f"{example.image_id}: the expression {expression.text!r} names region {unknown[0]}, and the image has "
                f"{len(example.regions)} regions, counted from 0"
            )
    regions, expressions = example.regions, example.expressions
    message = _example_class()()
    feature = message.features.feature
    texts: dict[str, list[str]] = {
        "image_id": [example.image_id],
        "dataset": [example.dataset],
        "patient_id": [example.patient_id],
        "modality": [example.modality],
        "caption": [example.caption],
        "absent": list(example.absent),
        "regions/phrase": [region.phrase for region in regions],
        "regions/label": [region.label for region in regions],
        "regions/granularity": [region.granularity for region in regions],
        "regions/parent": [region.parent for region in regions],
        "expressions/text": [expression.text for expression in expressions],
        "expressions/kind": [expression.kind for expression in expressions],
    }
    pairs = [(index, region) for index, expression in enumerate(expressions) for region in expression.regions]
    integers: dict[str, Any] = {
        "height": [example.height],
        "width": [example.width],
        "caption_spans": _flatten_spans(regions),
        "expression_regions": np.asarray(pairs, np.int64).ravel(),
        "expression_spans": _flatten_spans(expressions),
        "regions/iscrowd": [int(region.iscrowd) for region in regions],
    }
    boxes = np.asarray([region.box for region in regions], np.float32).ravel()
    # `extend` alone would leave an empty list without a kind; TFDS expects the kind.
    for name, values in texts.items():
        feature[name].bytes_list.SetInParent()
        try:
            feature[name].bytes_list.value.extend([value.encode() for value in values])
        except UnicodeEncodeError as error:
            raise RecordsError(f"{example.image_id!r}: {name} {error.object!r} cannot be written as UTF-8") from None
    for name, values in integers.items():
        feature[name].int64_list.SetInParent()
        feature[name].int64_list.value.extend(values)
    for name, values in {"spacing_mm": example.spacing_mm, "regions/box": boxes}.items():
        feature[name].float_list.SetInParent()
        feature[name].float_list.value.extend(values)
    feature["image"].bytes_list.value.append(example.image)
    feature["regions/mask"].bytes_list.SetInParent()
    feature["regions/mask"].bytes_list.value.extend(b"" if r.mask is None else r.mask["counts"] for r in regions)
    return message.SerializeToString(deterministic=True)


def _flatten_spans(holders: Sequence[Region] | Sequence[Expression]) -> np.ndarray:
    """Returns int64[3 * n]: (position of the holder, start, end) of each of the n spans."""
    spans = [(index, *span) for index, holder in enumerate(holders) for span in holder.spans]
    return np.asarray(spans, np.int64).ravel()


def _group(name: str, values: Any, width: int, count: int) -> list[list[Any]]:
    """Returns for each of `count` holders its rows of `values`, `width` numbers each, of which the holder is first."""
    groups: list[list[Any]] = [[] for _ in range(count)]
    if not values:
        return groups
    rows = np.asarray(values, np.int64)
    if rows.size % width or (rows.size and not 0 <= rows[::width].min() <= rows[::width].max() < count):
        raise RecordsError(f"malformed record: {name!r} are not rows of {width} that start with one of {count} places")
    for index, *rest in rows.reshape(-1, width).tolist():
        groups[index].append(tuple(rest))
    return groups


def parse_example(record: bytes, masks: bool = True) -> GroundingExample:
    """Reads what `encode_example` wrote; records of builds that knew no expressions have none.

    Args:
        record: the bytes.
        masks: False leaves the regions' masks out.

    Raises:
        RecordsError: the bytes are no tf.train.Example, or its features are not those of a grounding example.
    """
    from google.protobuf.message import DecodeError

    message = _example_class()()
    try:
        message.ParseFromString(record)
    except DecodeError as error:
        raise RecordsError(f"malformed record of {len(record)} bytes: no tf.train.Example ({error})") from None
    stored = message.features.feature

    def values(name: str, kind: str, count: int | None = None) -> Any:
        if name not in stored:
            raise RecordsError(f"malformed record: it has no feature {name!r}, only {sorted(stored) or 'nothing'}")
        feature = stored[name]
        found = getattr(feature, kind).value  # without values if it is of another kind
        if not found and (found_kind := feature.WhichOneof("kind")) not in (kind, None):
            raise RecordsError(f"malformed record: feature {name!r} is a {found_kind}, expected a {kind}")
        if count is not None and len(found) != count:
            raise RecordsError(f"malformed record: feature {name!r} has {len(found)} values, expected {count}")
        return found

    def texts(name: str, count: int | None = None) -> list[str]:
        try:
            return [value.decode() for value in values(name, "bytes_list", count)]
        except UnicodeDecodeError:
            raise RecordsError(f"malformed record: feature {name!r} is not UTF-8") from None

    def integer(name: str) -> int:
        return int(values(name, "int64_list", 1)[0])

    modality = texts("modality", 1)[0]
    height, width = integer("height"), integer("width")
    phrases = texts("regions/phrase")
    count = len(phrases)
    spans = _group("caption_spans", values("caption_spans", "int64_list"), 3, count)
    boxes = np.asarray(values("regions/box", "float_list", 4 * count), np.float32).reshape(-1, 4)
    labels, granularities = texts("regions/label", count), texts("regions/granularity", count)
    _check_names("malformed record", modality, granularities)
    parents, crowds = texts("regions/parent", count), values("regions/iscrowd", "int64_list", count)
    encodings = values("regions/mask", "bytes_list", count)
    row, column = values("spacing_mm", "float_list", 2)
    expressions: list[Expression] = []
    if any(name in stored for name in _EXPRESSION_FEATURES):
        sentences = texts("expressions/text")
        kinds = texts("expressions/kind", len(sentences))
        named = _group("expression_regions", values("expression_regions", "int64_list"), 2, len(sentences))
        words = _group("expression_spans", values("expression_spans", "int64_list"), 3, len(sentences))
        for text, kind, indices, span in zip(sentences, kinds, named, words, strict=True):
            places = tuple(index for (index,) in indices)
            if places and not 0 <= min(places) <= max(places) < count:
                raise RecordsError(f"malformed record: the expression {text!r} names region {places}, of {count}")
            expressions.append(Expression(text, places, tuple(span), kind))
    return GroundingExample(
        image=values("image", "bytes_list", 1)[0],
        image_id=texts("image_id", 1)[0],
        dataset=texts("dataset", 1)[0],
        height=height,
        width=width,
        patient_id=texts("patient_id", 1)[0],
        modality=modality,
        spacing_mm=(row, column),
        caption=texts("caption", 1)[0],
        regions=tuple(
            Region(
                box=boxes[i],
                phrase=phrases[i],
                label=labels[i],
                granularity=granularities[i],
                parent=parents[i],
                mask={"size": [height, width], "counts": encodings[i]} if masks and encodings[i] else None,
                iscrowd=bool(crowds[i]),
                spans=tuple(spans[i]),
            )
            for i in range(count)
        ),
        absent=tuple(texts("absent")),
        expressions=tuple(expressions),
    )
