"""Findings of an audit: their kinds, and what is wrong inside one record."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.audit_privacy import find_private, mask_private
from data_pipelines.conflicts.structures import are_related, find_key, find_truths
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import Taxonomy, load_taxonomy

SEVERITIES = ("error", "warning", "info")
LISTED = 50  # records of each kind that a report names; the others are counted
DOUBLED_IOU = 0.95
_SAME_BOX = 0.5  # pixels between the corners of boxes that count as the same
_ROWS = 512  # of the matrix of overlaps at once


class Place(NamedTuple):
    """Where a record is: its split, and its index in it."""

    split: str
    index: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a finding means: how grave it is, its name on the page, and what to do about it."""

    severity: str
    title: str
    advice: str


KINDS: dict[str, Kind] = {
    "leak_patient": Kind(
        "error",
        "Patient in several splits",
        "The same patient_id of one data set is on both sides: build again and split by patient.",
    ),
    "leak_image_id": Kind(
        "error",
        "Image id in several splits",
        "The same image_id of one data set is on both sides: the same picture, or ids that are not unique.",
    ),
    "leak_duplicate": Kind(
        "error",
        "Same pixels in several splits",
        "Keep the picture on one side only; give both copies one patient_id and build again.",
    ),
    "leak_near_duplicate": Kind(
        "error",
        "Nearly the same picture in several splits",
        "Look at the pairs: a re-encoded or resized copy, or a neighbouring slice or frame of the same patient, "
        "belongs on one side only.",
    ),
    "two_labels": Kind(
        "error",
        "One box, two labels",
        "The same box (corners within half a pixel) has two labels of which neither holds the other: one is wrong, "
        "or the taxonomy lacks a parent.",
    ),
    "shown_and_absent": Kind(
        "error",
        "Shown and absent",
        "The image has a region of a label, and lists it, or what holds it, among those that are not there.",
    ),
    "side_differs": Kind(
        "error",
        "Side of phrase and label differ",
        "The phrase says left or right and the label the other side, or the phrase names a side's own label.",
    ),
    "box_outside": Kind(
        "error", "Box outside the image", "A box leaves its image or has no area: build the records again."
    ),
    "unreadable": Kind(
        "error",
        "Unreadable image",
        "The image cannot be decoded, or is not as large as its record says: build the records again.",
    ),
    "duplicate": Kind("warning", "Same pixels twice", "Copies in one split count twice in training and evaluation."),
    "near_duplicate": Kind(
        "warning",
        "Nearly the same picture twice",
        "Re-encoded or resized copies, or neighbouring slices or frames; they count almost twice.",
    ),
    "repeated_image_id": Kind(
        "warning", "Image id used twice", "Ids must be unique in a data set: evaluation joins on them."
    ),
    "doubled_box": Kind(
        "warning",
        "Box annotated twice",
        f"Two boxes of one label overlap by IoU > {DOUBLED_IOU}: one of them can only count as a miss.",
    ),
    "unknown_label": Kind(
        "warning",
        "Label unknown to the taxonomy",
        "It is used as it is, without synonyms, side and parents: map it, rename it, or add it to the taxonomy.",
    ),
    "label_not_in_train": Kind(
        "warning", "Label that train lacks", "Another split shows a label that training never sees."
    ),
    "burnt_in_text": Kind(
        "warning",
        "Perhaps writing in the picture",
        "A hint from rows of small marks, no reading of them: look whether they identify a person, and remember that "
        "a model can learn from them. Short marks and writing on a busy background are not found.",
    ),
    "private_text": Kind(
        "warning",
        "Text that may point to a person",
        "Dates, long numbers, paths, addresses or names in ids, captions and names, shown masked: look into the "
        "record, and remove or hash them before the records leave the house.",
    ),
    "plain_patient_id": Kind(
        "warning",
        "Patient id that is no hash",
        "patient_id should be 16 hexadecimal digits, as data_pipelines.curate.hash_patient makes them.",
    ),
    "unknown_phrase": Kind(
        "info", "Phrase unknown to the taxonomy", "Free words are allowed; a near candidate may be a spelling mistake."
    ),
    "search_cut_short": Kind(
        "info",
        "Search for near duplicates cut short",
        "So many pictures are alike to the hash that not all pairs were compared: there may be more near duplicates.",
    ),
}


class Findings:
    """Counts of every kind of finding, and the first `LISTED` of each with their records."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)

    def add(self, kind: str, places: Sequence[Place] = (), count: int = 1, **details: Any) -> None:
        """Counts a finding of one of `KINDS`; `details` are further keys of its entry in the report."""
        self.counts[kind] += count
        if len(self.examples[kind]) < LISTED:
            records = [{"split": place.split, "index": place.index} for place in places]
            self.examples[kind].append({"records": records, **details})

    def summarize(self) -> dict[str, int]:
        """Returns the number of findings of each severity."""
        return {
            severity: sum(count for kind, count in self.counts.items() if KINDS[kind].severity == severity)
            for severity in SEVERITIES
        }

    def as_list(self) -> list[dict[str, Any]]:
        """Returns the report's entries, gravest first."""
        return [
            {"kind": kind, **dataclasses.asdict(KINDS[kind]), "count": self.counts[kind], "examples": examples}
            for kind in KINDS
            if (examples := self.examples.get(kind))
        ]


Found = Iterator[tuple[str, dict[str, Any]]]


def check_record(example: GroundingExample) -> Found:
    """Yields (kind, details) of all that is wrong inside one record, its pixels apart."""
    taxonomy = load_taxonomy()
    yield from _check_boxes(example)
    yield from _check_overlaps(example)
    yield from _check_absent(example)
    yield from _check_sides(example, taxonomy)
    yield from _check_privacy(example)


def _describe(*regions: Region) -> dict[str, Any]:
    return {
        "phrases": [mask_private(region.phrase) for region in regions],
        "labels": [mask_private(region.label) for region in regions],
        # JSON has no NaN.
        "boxes": [[round(v, 1) if math.isfinite(v) else None for v in region.box.tolist()] for region in regions],
    }


def _check_boxes(example: GroundingExample) -> Found:
    limit = np.asarray([example.width, example.height])
    for region in example.regions:
        low, high = region.box[:2], region.box[2:]
        if not ((low >= 0).all() and (high <= limit).all() and (high > low).all()):
            yield "box_outside", _describe(region)


def _overlapping(boxes: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yields (i, j, IoU) of the pairs i < j of boxes [K, 4] whose IoU is above `DOUBLED_IOU`."""
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    for start in range(0, len(boxes), _ROWS):
        some = boxes[start : start + _ROWS, None]  # [R, 1, 4]
        sides = np.minimum(some[..., 2:], boxes[:, 2:]) - np.maximum(some[..., :2], boxes[:, :2])
        shared = np.prod(np.maximum(sides, 0), axis=-1)  # [R, K]
        iou = shared / np.maximum(area[start : start + _ROWS, None] + area - shared, 1e-9)
        for row, column in np.argwhere(iou > DOUBLED_IOU).tolist():
            if row + start < column:
                yield row + start, column, float(iou[row, column])


def _check_overlaps(example: GroundingExample) -> Found:
    regions = [region for region in example.regions if not region.iscrowd]
    boxes = np.asarray([region.box for region in regions], np.float64).reshape(-1, 4)
    for i, j, iou in _overlapping(boxes):
        a, b = regions[i], regions[j]
        details = {**_describe(a, b), "iou": round(iou, 4)}
        if find_key(a.label) == find_key(b.label):
            yield "doubled_box", details
        elif np.abs(boxes[i] - boxes[j]).max() <= _SAME_BOX and not are_related(a, b):
            yield "two_labels", details


def _check_absent(example: GroundingExample) -> Found:
    absent = {find_key(label) for label in example.absent}
    shown = {key: region for region in example.regions for key in find_truths(region.label, region.parent)}
    for label in sorted(absent & shown.keys()):
        yield "shown_and_absent", _describe(shown[label])


def _sides(text: str) -> set[str]:
    return {side.lower() for side in re.findall(r"(?<![a-z])(?:left|right)(?![a-z])", text, re.IGNORECASE)}


def _check_sides(example: GroundingExample, taxonomy: Taxonomy) -> Found:
    for region in example.regions:
        known, named = taxonomy.find(region.label), taxonomy.find(region.phrase)
        spoken = {named.side} - {"none"} if named else _sides(region.phrase)
        if len(spoken) != 1:
            continue
        side = ({known.side} - {"none"} if known else _sides(region.label)) or set()
        # "nodule in the left lung" may be a nodule; "left lung" as a whole may not be a lung without a side.
        if side != spoken and (side or (named and known)):
            yield "side_differs", _describe(region)


def _check_privacy(example: GroundingExample) -> Found:
    texts = {"image_id": example.image_id, "dataset": example.dataset, "caption": example.caption}
    texts |= {f"region {number}": region.phrase for number, region in enumerate(example.regions)}
    for field, text in texts.items():
        for type_, mask, _, _ in find_private(text):
            yield "private_text", {"type": type_, "field": field.split()[0], "masked": mask}
    if example.patient_id and not re.fullmatch(r"[0-9a-f]{16}", example.patient_id):
        yield "plain_patient_id", {}
