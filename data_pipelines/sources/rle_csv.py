"""A CSV file, a row a mask as run lengths: SIIM-ACR pneumothorax, the 2018 Data Science Bowl, and others of Kaggle."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

from data_pipelines import limits
from data_pipelines.curate import SourceError, clean_name, hash_patient, name_region
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.colored_masks import REGIONS, Entry
from data_pipelines.sources.image_folder import ImageFolder, stem_of
from data_pipelines.sources.run_lengths import ORDERS, RUNS, decode_runs
from data_pipelines.sources.tables import fold_name, list_tables, read_header, read_rows, root_of

# Names of columns as `fold_name` leaves them, the first that a header has counts.
_IMAGE = ("imageid", "image", "filename", "file", "imagename", "imagepath", "id")
_RUNS = ("encodedpixels", "rle")
_CLASS = ("classname", "class", "label", "labelname", "classid")
_PATIENT = ("patientid", "patient", "subjectid")
_NOTHING = ("", "-1")


@dataclasses.dataclass(frozen=True)
class _Header:
    """Places of the columns."""

    image: int
    runs: int
    label: int | None
    patient: int | None


def _find_columns(names: Sequence[str]) -> _Header | None:
    """Returns None if these are no columns of run lengths."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        places.setdefault(fold_name(name), place)

    def find(candidates: Sequence[str]) -> int | None:
        return next((places[name] for name in candidates if name in places), None)

    image, runs = find(_IMAGE), find(_RUNS)
    return None if image is None or runs is None else _Header(image, runs, find(_CLASS), find(_PATIENT))


def _list_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, _Header]]:
    """CSV files of run lengths with their headers: the path itself, or those in a folder or its annotations/."""
    paths = list_tables(folder, ".csv")
    return [(path, header) for path in paths if (header := _find_columns(read_header(path)))]


class RLECSV(Sequence[GroundingExample]):
    """A folder with a CSV file of run lengths (columns ImageId and EncodedPixels), and the images that it names.

    `runs` says how they are written, which no file tells: "relative" (SIIM-ACR) or "absolute" (the 2018 Data Science
    Bowl and most others), see `data_pipelines.sources.run_lengths`; `order` whether pixels go by columns or rows. The
    class is in a column (ClassId, class, label), or `label` names that of all rows. A row is a region; with
    `regions: component` each connected component of it is one. A row of "-1" or nothing has no region, and where all
    rows of an image are so, it shows none of the file's classes, which become `absent`. Images are found by path or
    name, anywhere in the folder, DICOM files among them; those without a row are unused. Of several such CSV files
    `table` names one.
    """

    SUPERSEDES = ("dicom",)
    OPTIONS = {"runs": str, "order": str, "label": str, "regions": str, "table": str}  # noqa: RUF012

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dataset: str,
        modality: str = "unknown",
        runs: str = "",
        order: str = "columns",
        label: str = "",
        regions: str = "label",
        table: str = "",
    ):
        self._dataset, self._modality = dataset, modality
        self._path, self._header = _find_file(folder, table)
        if runs not in RUNS or order not in ORDERS or regions not in REGIONS:
            raise SourceError(
                f"{self._path}: the option runs must say how its run lengths are written, relative (SIIM-ACR) or "
                f"absolute (most others), order columns or rows, and regions label or component; found "
                f"runs: {runs!r}, order: {order!r}, regions: {regions!r}"
            )
        if self._header.label is None and not clean_name(label):
            raise SourceError(
                f"{self._path}: has no column of classes, so that the option label must name the one of all its masks"
            )
        self._runs, self._order, self._label, self._regions = runs, order, label, regions
        self._rows: dict[str, list[tuple[int, list[str]]]] = {}
        for line, row in read_rows(self._path):
            if len(row) <= self._header.image or not row[self._header.image]:
                raise SourceError(f"{self._path}, line {line}: names no image")
            self._rows.setdefault(stem_of(row[self._header.image]), []).append((line, row))
        if not self._rows:
            raise SourceError(f"{self._path}: has no rows")
        self._ids = list(self._rows)
        self._images = ImageFolder(folder if folder.is_dir() else root_of(self._path))
        self.unused = self._images.unused(self._ids)
        names = {self._class_of(row) for rows in self._rows.values() for _, row in rows}
        self._classes = tuple(dict.fromkeys(name_region(name)["label"] for name in sorted(names) if clean_name(name)))

    def _class_of(self, row: Sequence[str]) -> str:
        place = self._header.label
        return self._label if self._label or place is None else row[place] if len(row) > place else ""

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_list_files(folder))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id = self._ids[index]
        rows = self._rows[image_id]
        line, first = rows[0]
        path = self._images.find(image_id, f"{self._path}, line {line}")
        image = self._images.store(path, dataset=self._dataset)
        size = (image.height, image.width)
        regions = tuple(each for line, row in rows for each in self._read_row(row, size, f"{self._path}, line {line}"))
        place = self._header.patient
        patient = first[place] if place is not None and len(first) > place else ""
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patient, self._dataset) if patient else image.patient_id,
            modality=image.modality or self._modality,
            spacing_mm=image.spacing_mm,
            regions=regions,
            absent=() if regions else self._classes,
        )

    def _read_row(self, row: Sequence[str], size: tuple[int, int], where: str) -> Iterator[Region]:
        text = row[self._header.runs] if len(row) > self._header.runs else ""
        if text in _NOTHING:
            return
        name = self._class_of(row)
        if not clean_name(name):
            raise SourceError(f"{where}: its mask has no class")
        try:
            mask = decode_runs(text, size, self._runs, self._order)
        except ValueError as error:
            raise SourceError(f"{where}: {error}") from None
        yield from Entry(name, self._regions).split(mask)


def _find_file(folder: pathlib.Path, table: str) -> tuple[pathlib.Path, _Header]:
    if table:
        path = limits.resolve_inside(folder, table)
        header = _find_columns(read_header(path)) if path.is_file() else None
        files = [(path, header)] if header else []
    else:
        files = _list_files(folder)
    if len(files) != 1:
        found = (
            f"several: {', '.join(str(path) for path, _ in files)}; name one as the option table" if files else "none"
        )
        raise SourceError(
            f"{folder if not table else folder / table}: expected one CSV file with the columns ImageId and "
            f"EncodedPixels, found {found}"
        )
    return files[0]
