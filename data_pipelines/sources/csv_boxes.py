"""A CSV file, a row a box: the lists of RSNA pneumonia, VinDr-CXR and NIH ChestX-ray14, and others like them."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from data_pipelines.curate import SourceError, clean_name, hash_patient, make_region, name_region
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.image_folder import ImageFolder, stem_of
from data_pipelines.sources.tables import fold_name, list_tables, read_header, read_rows, root_of

# Names of columns as `fold_name` leaves them, the first that a header has counts.
_IMAGE = ("imageid", "imageindex", "image", "filename", "file", "imagename", "imagepath", "path", "patientid")
_LABEL = ("classname", "findinglabel", "label", "class", "labelname", "category", "finding", "celltype")
_PATIENT = ("patientid", "patient", "subjectid")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
_EXTENTS = (("x", "y", "width", "height"), ("x", "y", "w", "h"))
# What RSNA's radiologists were asked for; its other file calls the class of the boxes "Lung Opacity".
_RSNA_LABEL = "lung opacity"
_NORMAL = ("", "no finding", "no findings", "normal", "background")


@dataclasses.dataclass(frozen=True)
class _Header:
    """Places of the columns."""

    image: int
    box: tuple[int, ...]
    corners: bool  # the box is x0 y0 x1 y1, not x y width height
    label: int | None  # None: RSNA's Target instead
    target: int
    patient: int | None
    size: tuple[int, int] | None  # height and width of the image
    least: int  # number of columns that a row has at least


def _find_columns(names: Sequence[str]) -> _Header | None:
    """Returns None if these are no columns of boxes."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        # NIH's "Bbox [x,y,w,h]" comes as the four columns x, y, w, h.
        places.setdefault(fold_name(name.lower().replace("bbox [", "")), place)

    def find(candidates: Sequence[str]) -> int | None:
        return next((places[name] for name in candidates if name in places), None)

    box = next((columns for columns in (*_CORNERS, *_EXTENTS) if all(name in places for name in columns)), None)
    image, label, target = find(_IMAGE), find(_LABEL), places.get("target", 0)
    if box is None or image is None or (label is None and "target" not in places):
        return None
    corners = box in _CORNERS
    sized = corners and "width" in places and "height" in places
    patient, size = find(_PATIENT), (places["height"], places["width"]) if sized else None
    return _Header(
        image=image,
        box=tuple(places[name] for name in box),
        corners=corners,
        label=label,
        target=target,
        patient=patient,
        size=size,
        least=max(image, *(places[name] for name in box), label or 0, target, patient or 0, *(size or ())) + 1,
    )


def _list_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, _Header]]:
    """CSV files of boxes with their headers: the path itself, or those in a folder or its annotations/."""
    paths = list_tables(folder, ".csv")
    return [(path, header) for path in paths if (header := _find_columns(read_header(path)))]


class CSVBoxes(Sequence[GroundingExample]):
    """A folder with one CSV file of boxes, in it or in its annotations/, and the images that the file names.

    The header tells the style: RSNA (patientId, x, y, width, height, Target), VinDr-CXR (image_id, class_name,
    class_id, rad_id, x_min, y_min, x_max, y_max), NIH (Image Index, Finding Label, Bbox [x,y,w,h]), or any other with
    an image, a label and a box, which is two corners or x, y, width, height. Boxes are pixels of the image as it lies
    in the folder. Images are found by path or by name without suffix, anywhere in the folder; they may be DICOM files
    (.dcm, .dicom), as RSNA and VinDr-CXR ship them, whose spacing, patient and modality are read too. Boxes of several
    readers are all kept.

    A row without box is an image without boxes if its label is empty or means normal (a "No finding" row is that
    whatever its box), or its Target is 0. The readers of such an image saw none of the file's classes, which become
    `absent`, unless other rows of the image have boxes. Images without a row are unused. The patient is a patient
    column, or the digits before "_" in NIH's file names, or else the DICOM file's.
    """

    SUPERSEDES = ("dicom",)

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality = dataset, modality
        files = _list_files(folder)
        if len(files) != 1:
            found = f"several: {', '.join(str(p) for p, _ in files)}; give one of them as --input" if files else "none"
            raise SourceError(
                f"{folder}: expected one CSV file with columns of an image, a label and a box (x_min, y_min, x_max, "
                f"y_max or x, y, width, height), found {found}"
            )
        self._path, self._header = files[0]
        self._rows: dict[str, list[tuple[int, list[str]]]] = {}
        for line, row in read_rows(self._path):
            if len(row) <= self._header.image or not row[self._header.image]:
                raise SourceError(f"{self._path}, line {line}: names no image")
            self._rows.setdefault(stem_of(row[self._header.image]), []).append((line, row))
        if not self._rows:
            raise SourceError(f"{self._path}: has no rows")
        self._ids = list(self._rows)
        self._images = ImageFolder(root_of(self._path))
        self.unused = self._images.unused(self._ids)
        self._classes = self._list_classes()

    def _list_classes(self) -> tuple[str, ...]:
        """Labels of the rows that can have boxes, in the order of the file."""
        place = self._header.label
        rows = (row for rows in self._rows.values() for _, row in rows)
        names = {_RSNA_LABEL: None} if place is None else dict.fromkeys(row[place] for row in rows if len(row) > place)
        # A name without words is an error when its row is read.
        words = (name for name in names if name.lower() not in _NORMAL and clean_name(name))
        return tuple(dict.fromkeys(name_region(name)["label"] for name in words))

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_list_files(folder))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id = self._ids[index]
        rows = self._rows[image_id]
        header, (line, first) = self._header, rows[0]
        where = f"{self._path}, line {line}"
        path = self._images.find(image_id, where)
        regions = [self._read_row(row, f"{self._path}, line {line}") for line, row in rows]
        size = None
        if header.size:
            height, width = (self._number(first, place, where) for place in header.size)
            size = (int(height), int(width))
        image = self._images.store(path, dataset=self._dataset, annotated_size=size)
        patient = first[header.patient] if header.patient is not None else _nih_patient(image_id)
        kept = tuple(region for region in regions if region)
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patient, self._dataset) if patient else image.patient_id,
            modality=image.modality or self._modality,
            spacing_mm=image.spacing_mm,
            regions=kept,
            absent=() if kept else self._classes,
        )

    def _number(self, row: Sequence[str], place: int, where: str) -> float:
        try:
            value = float(row[place])
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SourceError(f"{where}: {row[place]!r} in column {place + 1} is no number")
        return value

    def _read_row(self, row: list[str], where: str) -> Region | None:
        header = self._header
        if len(row) < header.least:
            raise SourceError(f"{where}: has only {len(row)} columns, of which {header.least} are needed")
        empty = [not row[place] for place in header.box]
        if header.label is not None:
            name = row[header.label]
        else:
            if row[header.target] not in ("0", "1") or (row[header.target] == "0") != all(empty):
                raise SourceError(f"{where}: Target must be 1 with a box or 0 without, found {','.join(row)!r}")
            name = _RSNA_LABEL if row[header.target] == "1" else ""
        if name.lower() in _NORMAL and (name or all(empty)):
            return None
        if all(empty):
            raise SourceError(f"{where}: {name!r} has no box; leave out findings that nobody marked")
        x0, y0, x1, y1 = (self._number(row, place, where) for place in header.box)
        if not header.corners:
            x1, y1 = x0 + x1, y0 + y1
        try:
            return make_region(name, np.asarray([x0, y0, x1, y1]))
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None


def _nih_patient(image_id: str) -> str:
    """00013118 of 00013118_008."""
    found = re.fullmatch(r"(\d{8})_\d{3}", pathlib.PurePosixPath(image_id).name)
    return found[1] if found else ""
