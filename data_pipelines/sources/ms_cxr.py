"""MS-CXR (Boecking et al. 2022): sentences about chest radiographs with the boxes that radiologists drew for them."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, hash_patient, make_region
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources.image_folder import ImageFolder
from data_pipelines.sources.tables import list_tables, peek_keys, read_records, root_of

_COLUMNS = {"dicomid", "categoryname", "labeltext", "x", "y", "w", "h"}
_JSON_LENGTH = 2**22  # characters looked at to tell whether a file is MS-CXR's, which has about a million
_ASPECT = 0.02  # share by which the sides' scales of a resized copy may differ: it has whole pixels
# Of its eight classes the one whose name alone says less than it means on a chest radiograph.
_NAMES = {"edema": "pulmonary edema"}


@dataclasses.dataclass(frozen=True)
class _Row:
    """A box of a sentence; `size` (height, width) is of the image that the box was drawn on, 0 if unknown."""

    where: str
    image: str
    path: str
    name: str
    sentence: str
    box: tuple[float, float, float, float]  # x y width height
    size: tuple[float, float]


def _is_json(path: pathlib.Path) -> bool:
    # COCO with a sentence in every annotation; images come first, so that its beginning does not tell.
    return '"label_text"' in limits.read_head(path, _JSON_LENGTH)


def _list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """MS-CXR's files, CSV first."""
    tables = [path for path in list_tables(folder, ".csv") if peek_keys(path) >= _COLUMNS]
    return tables + [path for path in list_tables(folder, ".json") if _is_json(path)]


def _numbers(values: Sequence[Any], where: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise SourceError(f"{where}: expected numbers x, y, w, h and the image's size, found {list(values)}")
    return numbers


def _read_csv(path: pathlib.Path) -> Iterator[_Row]:
    for where, record in read_records(path):
        x, y, w, h = _numbers([record.get(key) for key in "xywh"], where)
        size = _numbers([record.get(key) or 0 for key in ("imageheight", "imagewidth")], where)
        yield _Row(
            where,
            image=record.get("dicomid") or "",
            path=record.get("path") or "",
            name=record.get("categoryname") or "",
            sentence=record.get("labeltext") or "",
            box=(x, y, w, h),
            size=(size[0], size[1]),
        )


def _read_json(path: pathlib.Path) -> Iterator[_Row]:
    content = limits.read_json(path, "annotation_bytes")
    try:
        images = {image["id"]: image for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        for annotation in content["annotations"]:
            where = f"{path}, annotation id {annotation.get('id')}"
            image = images[annotation["image_id"]]
            x, y, w, h = _numbers(annotation["bbox"], where)
            size = _numbers([image.get("height") or 0, image.get("width") or 0], where)
            yield _Row(
                where,
                image=pathlib.PurePosixPath(image["file_name"]).stem,
                path=image.get("path") or image["file_name"],
                name=names[annotation["category_id"]],
                sentence=annotation["label_text"],
                box=(x, y, w, h),
                size=(size[0], size[1]),
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"{path}: not MS-CXR: 'images' (id, file_name, path, width, height), 'categories' (id, name) and "
            f"'annotations' (image_id, category_id, bbox, label_text) are expected; the problem is {error!r}"
        ) from None


class MSCXR(Sequence[GroundingExample]):
    """A folder with MS-CXR's CSV or JSON file, in it or in its annotations/, and the images of MIMIC-CXR-JPG.

    Columns of the CSV file are dicom_id, category_name, label_text, path, x, y, w, h, image_width, image_height; the
    JSON file is COCO's with label_text in the annotations. Where both are there, the CSV file is read. An image is
    found by its path, or by its dicom_id anywhere in the folder, as JPEG, PNG or DICOM; its id is the dicom_id, and
    its patient the p12345678 in its path.

    An image is one example. Each of its sentences is an expression that grounds, as a whole, to its boxes; boxes of
    the same class and place are one region, whose class is category_name. Boxes are scaled where the image is a
    smaller copy of the one that image_width and image_height tell of.

    MS-CXR marks chosen findings and not all that an image shows: nothing is taken for absent.

    Args:
        folder: with the files.
        dataset: its name.
        modality: of the images.
        stretched: images were resized without keeping their aspect, which is an error otherwise, as it may be a crop.
    """

    OPTIONS: ClassVar[dict[str, type]] = {"stretched": bool}
    EXHAUSTIVE = False
    SUPERSEDES = ("coco", "dicom")

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown", stretched: bool = False):
        self._dataset, self._stretched = dataset, stretched
        self._modality = "xray" if modality == "unknown" else modality
        files = _list_files(folder)
        kinds = [path.suffix.lower() for path in files]
        if len(files) == 0 or len(set(kinds)) != len(kinds):
            found = f"several: {', '.join(map(str, files))}; give one of them as --input" if files else "none"
            raise SourceError(
                f"{folder}: expected MS-CXR's CSV file (dicom_id, category_name, label_text, x, y, w, h ...) or its "
                f"JSON file, found {found}"
            )
        self._path = files[0]
        self._rows: dict[str, list[_Row]] = {}
        for row in _read_csv(self._path) if kinds[0] == ".csv" else _read_json(self._path):
            if not row.image or not row.sentence:
                raise SourceError(f"{row.where}: names no {'sentence' if row.image else 'image'}")
            self._rows.setdefault(row.image, []).append(row)
        if not self._rows:
            raise SourceError(f"{self._path}: has no rows")
        self._ids = list(self._rows)
        self._images = ImageFolder(root_of(self._path))
        self.unused = [f"{path}: says the same as {self._path}" for path in files[1:]]
        self.unused += self._images.unused(self._name(image_id) for image_id in self._ids)

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_list_files(folder))

    def _name(self, image_id: str) -> str:
        path = self._rows[image_id][0].path
        return path if path and self._images.find_all(path) else image_id

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id = self._ids[index]
        rows = self._rows[image_id]
        image = self._images.store(self._images.find(self._name(image_id), rows[0].where), dataset=self._dataset)
        regions: dict[tuple[str, tuple[float, ...]], Region] = {}
        sentences: dict[str, list[int]] = {}
        for row in rows:
            key = (row.name, row.box)
            if key not in regions:
                regions[key] = self._read_region(row, (image.height, image.width))
            grounded = sentences.setdefault(row.sentence, [])
            if (place := list(regions).index(key)) not in grounded:
                grounded.append(place)
        patient = re.search(r"(?<![^\W_])p(\d{8})(?![^\W_])", rows[0].path)
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patient[1], self._dataset) if patient else image.patient_id,
            modality=self._modality,
            spacing_mm=image.spacing_mm,
            caption=" ".join(sentences),
            regions=tuple(regions.values()),
            expressions=tuple(Expression(text, tuple(places)) for text, places in sentences.items()),
        )

    def _read_region(self, row: _Row, size: tuple[int, int]) -> Region:
        x, y, w, h = row.box
        rows, columns = (now / then if then else 1.0 for now, then in zip(size, row.size, strict=True))
        if not self._stretched and abs(rows - columns) > _ASPECT * max(rows, columns):
            raise SourceError(
                f"{row.where}: the image is {size[1]} x {size[0]} pixels, its boxes were drawn on "
                f"{row.size[1]:.0f} x {row.size[0]:.0f}, of another shape: use the original or a copy of the same "
                "shape, or, if it was resized without keeping it and not cropped, the option stretched"
            )
        box = np.asarray([x, y, x + w, y + h]) * (columns, rows, columns, rows)
        try:
            region = make_region(_NAMES.get(row.name.lower(), row.name), box)
        except SourceError as error:
            raise SourceError(f"{row.where}: {error}") from None
        return dataclasses.replace(region, source_label=row.name)
