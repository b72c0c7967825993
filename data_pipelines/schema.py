"""What passes between the rooms of the data pipeline: one annotated image, and one batch."""

import dataclasses

import numpy as np

GRANULARITIES = ("region", "organ", "substructure", "lesion", "cell")

# The position of a modality in this tuple is its id in batches and in modality embeddings: append, never reorder.
MODALITIES = (
    "unknown",
    "xray",
    "ct",
    "mri",
    "ultrasound",
    "endoscopy",
    "dermoscopy",
    "fundus",
    "histopathology",
    "microscopy",
    "oct",
    "pet",
)


@dataclasses.dataclass(frozen=True)
class Region:
    """One annotated region of an image.

    Attributes:
        box: float32[4], x0 y0 x1 y1 in pixels of the stored image, half-open (x1 - x0 is the width).
        phrase: the words that name the region in a prompt.
        label: id of the label in the taxonomy, or the source's own class name where it has none.
        granularity: one of `GRANULARITIES`.
        parent: label of the structure that holds this one, "" at the top.
        mask: compressed COCO run-length encoding of the image's size ({"size": [h, w], "counts": bytes}), or None.
        iscrowd: the region covers several instances (COCO's meaning).
        spans: character spans (start, end) of the region's words in the example's caption, half-open.
        source_label: the source's own name of the class, from which a label mapping starts; records do not hold it.
    """

    box: np.ndarray
    phrase: str
    label: str
    granularity: str = "region"
    parent: str = ""
    mask: dict | None = None
    iscrowd: bool = False
    spans: tuple[tuple[int, int], ...] = ()
    source_label: str = ""


@dataclasses.dataclass(frozen=True)
class Expression:
    """A sentence that grounds to some regions of its image, or to none.

    Attributes:
        text: the sentence.
        regions: positions in the example's regions that it grounds to; () if it must ground to nothing.
        spans: character spans (start, end) of the words that name them, half-open; () if the whole sentence does.
        kind: how it was made: "referring", "position", "negation", "absent", or "report" for the source's own.
    """

    text: str
    regions: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    kind: str = "report"


@dataclasses.dataclass(frozen=True)
class GroundingExample:
    """One image with what is known about it, as stored in records.

    Attributes:
        image: encoded PNG or JPEG bytes; decodes to uint8 of 1 or 3 channels.
        image_id: stable id, unique in its data set.
        dataset: name of the data set.
        height, width: size of the stored image in pixels.
        patient_id: hashed id that decides the split, "" where the source has none (the image id then decides).
        modality: one of `MODALITIES`.
        spacing_mm: (row, column) pixel spacing in millimetres, 0 if unknown.
        caption: a free sentence about the image, "" if there is none.
        regions: the annotated regions.
        absent: labels that an expert looked for and did not find.
        expressions: further sentences about the image, each with the regions it grounds to.
    """

    image: bytes
    image_id: str
    dataset: str
    height: int
    width: int
    patient_id: str = ""
    modality: str = "unknown"
    spacing_mm: tuple[float, float] = (0.0, 0.0)
    caption: str = ""
    regions: tuple[Region, ...] = ()
    absent: tuple[str, ...] = ()
    expressions: tuple[Expression, ...] = ()
