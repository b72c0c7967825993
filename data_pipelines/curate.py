"""From what a source says to what records hold: names, boxes from masks, boxes inside the image, splits."""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines.schema import MODALITIES, GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy

_MODALITY_NAMES = {
    "x-ray": "xray",
    "radiograph": "xray",
    "mr": "mri",
    "us": "ultrasound",
    "endoscope": "endoscopy",
    "colonoscopy": "endoscopy",
    "dermatoscopy": "dermoscopy",
    "pathology": "histopathology",
    "histology": "histopathology",
    "microscope": "microscopy",
}
SALT_VARIABLE = "MEDGLIP_PATIENT_SALT"
_LEAST_PIXELS = 4  # of a mask: fewer are specks that annotation tools leave behind


class SourceError(ValueError):
    """A source that cannot be used as it is; the message names the file, what is wrong and what to do."""


@dataclasses.dataclass
class Tally:
    """What curation did to the regions of a split."""

    clipped: int = 0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.clipped + other.clipped, self.dropped + other.dropped)

    def as_dict(self) -> dict[str, Any]:
        return {"clipped": self.clipped, "dropped": dict(self.dropped)}


def clip_box(box: np.ndarray, height: int, width: int) -> tuple[np.ndarray | None, str]:
    """Brings a box into its image.

    Args:
        box: [4] x0 y0 x1 y1 in pixels, half-open.
        height, width: of the image.

    Returns:
        (box, what happened): float32[4] inside the image with an area and "kept" or "clipped"; or None and why it
        has to go, "no area" (as it came) or "outside the image".

    Raises:
        ValueError: a coordinate is not a finite number.
    """
    box = np.asarray(box, np.float32)
    if box.shape == (4,):
        x0, y0, x1, y1 = box.tolist()  # plain numbers: what is below takes ten times as long
        inside = 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        if inside and math.copysign(1, x0) + math.copysign(1, y0) == 2:  # no -0.0, which becomes 0.0
            return box, "kept"
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"a box is four finite numbers x0 y0 x1 y1, not {box.tolist()}")
    if not (box[2:] > box[:2]).all():
        return None, "no area"
    limit = np.asarray([width, height, width, height], np.float32)
    clipped = np.clip(box, 0, limit)
    if not (clipped[2:] > clipped[:2]).all():
        return None, "outside the image"
    return clipped, "kept" if (clipped == box).all() else "clipped"


def box_from_mask(mask: np.ndarray) -> np.ndarray:
    """Returns the tight box float32[4] (x0 y0 x1 y1, half-open) of a bool[H, W] mask; all zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return np.zeros(4, np.float32)
    return np.asarray([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def curate(example: GroundingExample) -> tuple[GroundingExample, Tally]:
    """Clips the boxes of an example to its image and drops those that cannot be used, counting both.

    Those are boxes without area in the image, and masks of fewer than 4 pixels.

    Raises:
        SourceError: a box is not finite; the message names the image.
    """
    regions, kept, tally = [], [], Tally()
    for position, region in enumerate(example.regions):
        try:
            box, fate = clip_box(region.box, example.height, example.width)
        except ValueError as error:
            raise SourceError(f"image {example.image_id}, region {region.phrase!r}: {error}") from None
        if box is not None and region.mask and coco_mask.area(region.mask) < _LEAST_PIXELS:  # type: ignore[arg-type]
            box, fate = None, f"mask under {_LEAST_PIXELS} pixels"
        if box is None:
            tally.dropped[fate] += 1
            continue
        tally.clipped += fate == "clipped"
        regions.append(region if box is region.box else dataclasses.replace(region, box=box))
        kept.append(position)
    example, _ = keep_regions(example, kept)
    return dataclasses.replace(example, regions=tuple(regions)), tally


def keep_regions(example: GroundingExample, kept: Sequence[int]) -> tuple[GroundingExample, int]:
    """Leaves out all regions but those at the positions `kept`, and the expressions that ground to one left out.

    Returns:
        (example, number of expressions left out).
    """
    if len(kept) == len(example.regions):
        return example, 0
    place = {old: new for new, old in enumerate(kept)}
    expressions = tuple(
        dataclasses.replace(expression, regions=tuple(place[old] for old in expression.regions))
        for expression in example.expressions
        if all(old in place for old in expression.regions)
    )
    regions = tuple(example.regions[old] for old in kept)
    lost = len(example.expressions) - len(expressions)
    return dataclasses.replace(example, regions=regions, expressions=expressions), lost


def clean_name(name: str) -> str:
    """Makes words of a data set's class name, as GLIP does (od_to_grounding.py): no "(...)", spaces for "_"."""
    return " ".join(re.sub(r"\(.*\)", "", name).replace("_", " ").split())


@functools.lru_cache(maxsize=65536)
def name_region(name: str, site: str = "") -> dict[str, str]:
    """Returns phrase, label, granularity and parent of a class name, as keyword arguments of `Region`.

    They are the taxonomy's where it knows the name, with or without the `site` before it ("lung" + "tumor"); else the
    phrase is the cleaned name and the label the name itself.

    Raises:
        SourceError: nothing is left of the name when it is cleaned.
    """
    words = clean_name(name)
    if not words:
        raise SourceError(f"the class name {name!r} has no words")
    taxonomy = load_taxonomy()
    label = (taxonomy.find(f"{site} {words}") if site else None) or taxonomy.find(name) or taxonomy.find(words)
    if label is None:
        return {"phrase": words, "label": name, "granularity": "region", "parent": ""}
    return {"phrase": label.name, "label": label.id, "granularity": label.granularity, "parent": label.parent}


def find_modality(name: str) -> str:
    """Returns the modality of `data_pipelines.schema.MODALITIES` that a name means ("X-Ray", "MRI-T1"), else ""."""
    words = name.strip().lower()
    for candidate in (words, words.split("-")[0]):
        found = _MODALITY_NAMES.get(candidate, candidate)
        if found in MODALITIES[1:]:
            return found
    return ""


def find_salt(dataset: str) -> str:
    """Returns the salt of the hashes: the environment variable MEDGLIP_PATIENT_SALT, or else the data set's name.

    A name is no secret: who has a list of ids can then find out which ones a data set holds.
    """
    return os.environ.get(SALT_VARIABLE) or dataset


def hash_identifier(kind: str, value: object, salt: str) -> str:
    """Returns 16 hexadecimal digits in the place of an id, "" for none.

    Args:
        kind: what the value identifies ("patient", "study", "series", "instance", "image"); equal ids of two kinds
            differ.
        value: the id; spaces around it, which DICOM pads with, do not count.
        salt: of `find_salt`.
    """
    text = str(value or "").strip(" \0")
    return digest_text(f"{salt}/{kind}/{text}").hex()[:16] if text else ""


def hash_patient(patient: object, dataset: str) -> str:
    """Returns a stable id that does not show the patient's own, "" for none, the same whatever the source read.

    The same patient has one id in all data sets only where MEDGLIP_PATIENT_SALT is set.
    """
    return hash_identifier("patient", patient, find_salt(dataset))


def digest_text(text: str) -> bytes:
    """Returns the SHA-256 of a text, of any characters."""
    # File names that are not UTF-8 come with lone surrogates, which the default would refuse.
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def split_key(example: GroundingExample, pool: str = "") -> str:
    """Returns what decides the split of an example: its patient, in a pool if that has a name, else its image id."""
    if not example.patient_id:
        return example.image_id
    return f"{pool}:{example.patient_id}" if pool else example.patient_id


def make_region(name: str, box: np.ndarray, site: str = "", **fields: Any) -> Region:
    """Makes a region of a class name and a box; `fields` are further fields of `Region`, or replace `name_region`'s.

    Raises:
        SourceError: as `name_region`.
    """
    source_label = f"{site} {clean_name(name)}" if site else name
    return Region(
        box=np.asarray(box, np.float32), **{**name_region(name, site), "source_label": source_label, **fields}
    )
