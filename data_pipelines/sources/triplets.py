"""Triplets of image, region and description, as MedTrinity-25M (Xie et al. 2024) is made of."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines.curate import SourceError, find_modality, hash_patient, make_region
from data_pipelines.images import read_mask
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources.coco import encode_segmentation
from data_pipelines.sources.image_folder import ImageFolder, stem_of
from data_pipelines.sources.masks import outline
from data_pipelines.sources.tables import list_tables, peek_keys, pick, read_records, root_of

# Keys as `fold_name` leaves them; the first that a record has counts.
_IMAGE = ("image", "filename", "imagepath", "imagename", "img", "id")
_TEXT = ("description", "caption", "text")
_REGION = ("bbox", "box", "boxes", "roi", "mask", "segmentation")
_REGIONS = ("regions", "rois")
_NAME = ("label", "category", "class", "disease", "lesion")
_PATIENT = ("patientid", "patient", "subjectid")
_UNNAMED = "region of interest"
_FORMATS = ("xyxy", "xywh")

Size = tuple[int, int]


def _list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    tables = [(path, peek_keys(path)) for path in list_tables(folder, ".json", ".jsonl")]
    regions = {*_REGION, *_REGIONS}
    return [path for path, keys in tables if keys & {*_IMAGE} and keys & regions and keys & {*_TEXT, *_REGIONS}]


class Triplets(Sequence[GroundingExample]):
    """A folder with one .json list or .jsonl file of records, in it or in its annotations/, and the images they name.

    Keys of a record, of which the first in a list counts; case, "_" and "-" do not matter, and other keys are not read:

        image, file_name, image_path, image_name, img, id    the image: a path or a name in the folder
        description, caption, text                           what is said of its regions, or of the image
        bbox, box, boxes, roi, mask, segmentation            its region or regions
        regions, rois                                        a list of objects with the three kinds of keys around this
        label, category, class, disease, lesion              the region's class; "region of interest" without one
        modality; patient_id, patient, subject_id

    A region is four numbers, or a list of such; the name of a mask file; or polygons or run lengths of COCO. Numbers
    are x0 y0 x1 y1, or x y width height with the option box_format "xywh"; if none is above 1, they are shares of the
    image's width and height. A description is an expression that grounds, as a whole, to its record's or its object's
    regions. A text of a record that has only described `regions`, or no region, is the image's caption and no
    expression: what it names was not boxed. Records of one image are one example.

    Parquet files are not read: write them out as images and .jsonl.
    """

    OPTIONS: ClassVar[dict[str, type]] = {"box_format": str}
    EXHAUSTIVE = False
    SUPERSEDES = ("dicom", "masks")

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown", box_format: str = "xyxy"):
        if box_format not in _FORMATS:
            raise SourceError(f"option box_format: expected {' or '.join(_FORMATS)}, found {box_format!r}")
        self._dataset, self._modality, self._extents = dataset, modality, box_format == "xywh"
        files = _list_files(folder)
        if len(files) != 1:
            found = f"several: {', '.join(map(str, files))}; give one of them as --input" if files else "none"
            raise SourceError(
                f"{folder}: expected one .json list or .jsonl file of records with an image, a description and a "
                f"region (bbox, roi, mask or regions), found {found}"
            )
        self._path = files[0]
        self._records: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for where, record in read_records(self._path):
            name = pick(record, _IMAGE)
            if not isinstance(name, str):
                raise SourceError(f"{where}: names no image; expected one of the keys {', '.join(_IMAGE)}")
            self._records.setdefault(stem_of(name), []).append((where, record))
        self._ids = list(self._records)
        self._images = ImageFolder(root_of(self._path))
        self.unused = self._images.unused([*self._ids, *self._mask_files()])

    def _mask_files(self) -> Iterator[str]:
        for records in self._records.values():
            for _, record in records:
                for each in (record, *_as_list(pick(record, _REGIONS))):
                    if isinstance(each, dict):
                        yield from (region for region in _split(pick(each, _REGION)) if isinstance(region, str))

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_list_files(folder))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id = self._ids[index]
        records = self._records[image_id]
        image = self._images.store(self._images.find(image_id, records[0][0]), dataset=self._dataset)
        size = (image.height, image.width)
        regions: list[Region] = []
        expressions: list[Expression] = []
        captions: dict[str, None] = {}
        for where, record in records:
            text = _read_text(record, where)
            parts = [(where, record)] if pick(record, _REGION) is not None else []
            for number, part in enumerate(_as_list(pick(record, _REGIONS))):
                if not isinstance(part, dict):
                    raise SourceError(f"{where}, region {number}: expected an object, found {str(part)[:80]}")
                parts.append((f"{where}, region {number}", part))
            captions.update({text: None} if text else {})
            for place, part in parts:
                made = [self._read_region(part, region, size, place) for region in _split(pick(part, _REGION))]
                if not made:
                    raise SourceError(f"{place}: has no region; expected one of the keys {', '.join(_REGION)}")
                positions = tuple(_add(regions, region) for region in made)
                if said := _read_text(part, place):
                    expressions.append(Expression(said, tuple(dict.fromkeys(positions))))
        patients = {str(patient) for _, record in records if (patient := pick(record, _PATIENT)) is not None}
        if len(patients) > 1:
            raise SourceError(f"{records[0][0]}: image {image_id} is of several patients in {self._path}")
        told = find_modality(str(pick(records[0][1], ("modality",)) or ""))
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patients.pop(), self._dataset) if patients else image.patient_id,
            modality=told or image.modality or self._modality,
            spacing_mm=image.spacing_mm,
            caption=" ".join(captions),
            regions=tuple(regions),
            expressions=tuple(dict.fromkeys(expressions)),
        )

    def _read_region(self, part: Mapping[str, Any], region: Any, size: Size, where: str) -> Region:
        name = str(pick(part, _NAME) or _UNNAMED)
        fields: dict[str, Any] = {}
        if isinstance(region, str):
            fields = outline(read_mask(self._images.find(region, where), size, self._images.root))
            box = fields.pop("box")
        elif isinstance(region, dict) or isinstance(region[0], list):
            fields["mask"] = encode_segmentation(region, size, where)
            x, y, width, height = coco_mask.toBbox(fields["mask"]).tolist()  # type: ignore[arg-type]
            box = np.asarray([x, y, x + width, y + height])
        else:
            box = self._read_box(region, size, where)
        try:
            return make_region(name, box, **fields)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None

    def _read_box(self, numbers: Sequence[Any], size: Size, where: str) -> np.ndarray:
        if len(numbers) != 4 or not all(_is_number(number) for number in numbers):
            raise SourceError(f"{where}: a box is four finite numbers, found {str(numbers)[:80]}")
        box = np.asarray(numbers, np.float64)
        if self._extents:
            box[2:] += box[:2]
        if (np.asarray(numbers) <= 1).all():
            box *= (size[1], size[0], size[1], size[0])
        return box


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _split(regions: Any) -> list[Any]:
    """One region or a list of them as a list; lists of more or fewer than four numbers in a list are polygons."""
    if not isinstance(regions, list):
        return [] if regions is None else [regions]
    lists = [region for region in regions if isinstance(region, list)]
    if lists and len(lists) == len(regions):
        return regions if all(len(region) == 4 for region in lists) else [regions]
    return regions if regions and all(isinstance(region, str | dict) for region in regions) else [regions]


def _read_text(record: Mapping[str, Any], where: str) -> str:
    text = pick(record, _TEXT)
    if text is not None and not isinstance(text, str):
        raise SourceError(f"{where}: its description is {str(text)[:80]}, expected text")
    return (text or "").strip()


def _add(regions: list[Region], region: Region) -> int:
    """Returns the place of a region, which is added if it is not there yet."""
    for place, known in enumerate(regions):
        if known.label == region.label and known.mask == region.mask and (known.box == region.box).all():
            return place
    regions.append(region)
    return len(regions) - 1
