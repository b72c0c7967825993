"""DICOM series with labels: a NIfTI file beside them, a DICOM segmentation, or an RT structure set."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_pipelines import volumes
from data_pipelines.curate import SourceError, find_modality, hash_patient
from data_pipelines.sources import dicom_labels, nifti
from data_pipelines.sources.dicom_labels import Geometry
from data_pipelines.sources.volume_source import Case, VolumeSource
from data_pipelines.volumes import Grid, Labels, SliceRule, Volume

SALT_VARIABLE = "MEDGLIP_PATIENT_SALT"
_MODALITIES = {"PT": "pet", "MR": "mri", "CT": "ct"}
_ANNOTATIONS = {"SEG": dicom_labels.add_segmentation, "RTSTRUCT": dicom_labels.add_structures}
_HEADER = ["SOPClassUID", "Modality", "SeriesInstanceUID", "PatientID", "NumberOfFrames", "Rows", "Columns"]
_HEADER += ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
_GREY = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
_ALIKE = {"ImageOrientationPatient": 1e-3, "PixelSpacing": 1e-3, "Rows": 0, "Columns": 0}  # how close in one series
_GAP = 0.05  # share by which the distance of neighbouring slices may differ from the others'


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a file has DICOM's mark, whatever it is called."""
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _list_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def _may_be_dicom(path: pathlib.Path) -> bool:
    """DICOM files are called *.dcm, or like instances (CT.1.2.840.113), or have no suffix at all."""
    suffix = path.suffix.lower().lstrip(".")
    return suffix in ("", "dcm", "dicom", "ima") or suffix.isdigit()


@dataclasses.dataclass(eq=False)
class Series:
    """The files of one series.

    Attributes:
        name: its UID, or its folder where files have none; never stored.
        headers: (path, header without pixels) of its images.
    """

    name: str
    headers: list[tuple[pathlib.Path, Any]]

    @property
    def folder(self) -> pathlib.Path:
        return self.headers[0][0].parent

    def arrange(self) -> tuple[list[pathlib.Path], Geometry]:
        """Sorts the slices along their normal.

        Returns:
            (files in that order, where their pixels lie).

        Raises:
            SourceError: a slice does not say where it lies, is of another kind than the others, or is missing.
        """
        for path, header in self.headers:
            if int(header.get("NumberOfFrames") or 1) > 1:
                raise SourceError(f"{path}: holds several frames, which is not supported; make it one file a slice")
            for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns"):
                if not header.get(keyword):
                    raise SourceError(f"{path}: has no {keyword}, so that its place in the volume is unknown")
        first_path, first = self.headers[0]
        for path, header in self.headers:
            for keyword, close in _ALIKE.items():
                if not np.allclose(header[keyword].value, first[keyword].value, rtol=0, atol=close):
                    raise SourceError(
                        f"{path}: its {keyword} {header[keyword].value} differs from {first[keyword].value} of "
                        f"{first_path} in the same series; put different scans into different series"
                    )
        if len(self.headers) < 2:
            raise SourceError(f"{first_path}: is the only slice of its series, which makes no volume")
        along_row, along_column = np.asarray(first.ImageOrientationPatient, float).reshape(2, 3)
        normal = np.cross(along_row, along_column)
        places = [float(normal @ np.asarray(header.ImagePositionPatient, float)) for _, header in self.headers]
        order = np.argsort(places, kind="stable")
        ordered = [self.headers[i] for i in order]
        self._check_gaps([path for path, _ in ordered], np.diff(np.asarray(places)[order]))
        start, end = (np.asarray(ordered[i][1].ImagePositionPatient, float) for i in (0, -1))
        row_spacing, column_spacing = map(float, first.PixelSpacing)
        affine = np.eye(4)
        affine[:3, 0] = (end - start) / (len(ordered) - 1)
        affine[:3, 1], affine[:3, 2] = along_column * row_spacing, along_row * column_spacing
        affine[:3, 3] = start
        affine[:2] *= -1  # DICOM's x and y grow to the patient's left and back
        shape = (len(ordered), int(first.Rows), int(first.Columns))
        return [path for path, _ in ordered], Geometry(affine, shape)

    @staticmethod
    def _check_gaps(paths: list[pathlib.Path], gaps: np.ndarray) -> None:
        usual = float(np.median(gaps))
        for before, after, gap in zip(paths, paths[1:], gaps, strict=False):
            if gap < 1e-3:
                raise SourceError(f"{before} and {after} are at the same place in one series: split it into two series")
            if abs(gap - usual) > max(_GAP * usual, 0.02):
                raise SourceError(
                    f"{before} and {after} are {gap:.4g} mm apart, other neighbours in the series {usual:.4g} mm: "
                    "slices are missing or their spacing is irregular"
                )


class DICOM(VolumeSource):
    """Slices of labelled DICOM series, whatever the names of files and folders.

    The labels of a series are multilabel.nii.gz or segmentations/ (see `nifti.NIfTI`) in its folder or in one that
    holds it, of the same voxels in the same place; else the DICOM segmentations and RT structure sets that refer to it.
    Series without any are not examples. Image ids begin with a hash of the series' UID, patient ids are hashes of
    PatientID (without it the series is its own patient), both with a salt: the value of the environment variable
    MEDGLIP_PATIENT_SALT, which makes them hard to reverse if it is kept secret, or the name of the data set.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown", rule: SliceRule | None = None):
        volumes.import_medical("pydicom")
        salt = os.environ.get(SALT_VARIABLE) or dataset
        series, annotations, unused = _index(folder)
        cases: list[_DicomCase] = []
        for each in series:
            labels = _label_folder(each.folder, folder)
            objects = [(path, kind) for path, kind, of in annotations if of == each.name]
            if labels is None and not objects:
                unused.append(f"{each.folder}: {len(each.headers)} images of a series without labels")
                continue
            cases.append(_make_case(each, labels, objects, modality, salt))
        cases = _keep_fitting(cases, unused)
        names = {each.name for each in series}
        unused += [f"{path}: refers to a series that is not here" for path, _, of in annotations if of not in names]
        if not cases:
            raise SourceError(
                f"{folder}: no DICOM series with labels: expected a series and multilabel.nii.gz or segmentations/ in "
                f"its folder or the one above, or a DICOM SEG or RTSTRUCT; found {len(series)} series without"
            )
        super().__init__(cases, dataset=dataset, rule=rule or SliceRule(), unused=unused)

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        looked: set[pathlib.Path] = set()  # one file a folder tells
        for path in _list_files(folder) if folder.is_dir() else ():
            if path.parent not in looked and _may_be_dicom(path):
                looked.add(path.parent)
                if is_dicom(path):
                    return True
        return False


def _index(folder: pathlib.Path) -> tuple[list[Series], list[tuple[pathlib.Path, str, str]], list[str]]:
    """Reads the headers of all DICOM files in a folder.

    Returns:
        (series of images, (path, modality, UID of the series that it labels) of annotations, what else there is).

    Raises:
        SourceError: a header cannot be read.
    """
    pydicom = volumes.import_medical("pydicom")
    grouped: dict[str, list[tuple[pathlib.Path, Any]]] = collections.defaultdict(list)
    annotations, others = [], []
    for path in _list_files(folder):
        if not _may_be_dicom(path) or not is_dicom(path):
            continue
        header = _read_header(path, specific_tags=_HEADER)
        if header.get("SOPClassUID") == pydicom.uid.MediaStorageDirectoryStorage:
            continue
        kind = str(header.get("Modality") or "")
        if kind in _ANNOTATIONS:
            annotations.append((path, kind, dicom_labels.referenced_series(_read_header(path))))
        elif "Rows" in header:
            grouped[str(header.get("SeriesInstanceUID") or path.parent.relative_to(folder))].append((path, header))
        else:
            others.append(f"{path}: is neither an image nor an annotation of one")
    return [Series(name, headers) for name, headers in grouped.items()], annotations, others


def _read_header(path: pathlib.Path, **options: Any) -> Any:
    pydicom = volumes.import_medical("pydicom")
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, **options)
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise SourceError(f"{path}: no readable DICOM file ({error})") from None


def _label_folder(start: pathlib.Path, top: pathlib.Path) -> pathlib.Path | None:
    """Returns the nearest folder from `start` up to `top` with NIfTI labels."""
    for folder in (start, *start.parents):
        if nifti.has_labels(folder):
            return folder
        if folder == top:
            return None
    return None


def _make_case(
    series: Series, folder: pathlib.Path | None, objects: Iterable[tuple[pathlib.Path, str]], modality: str, salt: str
) -> "_DicomCase":
    header = series.headers[0][1]
    told = str(header.get("Modality") or "")
    patient = str(header.get("PatientID") or series.name)
    return _DicomCase(
        id=hash_patient(f"{salt}/series/{series.name}"),
        patient=f"{salt}/patient/{patient}",
        series=series,
        folder=folder,
        objects=tuple(objects),
        modality=_MODALITIES.get(told) or find_modality(told) or modality,
    )


@dataclasses.dataclass(eq=False)
class _DicomCase(Case):
    id: str
    patient: str
    series: Series
    folder: pathlib.Path | None  # of NIfTI labels
    objects: tuple[tuple[pathlib.Path, str], ...]  # DICOM annotations and their modality
    modality: str

    def read_labels(self) -> tuple[Labels, Grid]:
        _, geometry = self.series.arrange()
        turn, grid = volumes.to_radiological(geometry.affine, geometry.shape, str(self.series.folder))
        if self.folder is not None:
            return nifti.read_case_labels(self.folder, grid), grid
        labels = Labels(grid.shape)
        for path, kind in self.objects:
            _ANNOTATIONS[kind](labels, path, geometry, turn)
        return labels, grid

    def read_volume(self) -> Volume:
        paths, geometry = self.series.arrange()
        turn, grid = volumes.to_radiological(geometry.affine, geometry.shape, str(self.series.folder))
        values = np.empty(geometry.shape, np.float32)
        for place, path in enumerate(paths):
            values[place] = read_pixels(path, geometry.shape[1:])
        if (values == np.rint(values)).all() and np.abs(values).max() < 2**15:
            values = values.astype(np.int16)
        return Volume(volumes.reorient(values, turn), grid, self.modality)


def _keep_fitting(cases: list[_DicomCase], unused: list[str]) -> list[_DicomCase]:
    """Where several series share NIfTI labels, keeps those that lie in the same place; the others become `unused`."""
    shared: dict[pathlib.Path | None, list[_DicomCase]] = collections.defaultdict(list)
    for case in cases:
        shared[case.folder].append(case)
    misfits = {}
    for folder, group in shared.items():
        if folder is not None and len(group) > 1:
            problems = {case.id: problem for case in group if (problem := _find_problem(case))}
            misfits |= problems if len(problems) < len(group) else {}  # if none fits, each says why
    unused += [f"not the series of the labels: {problem}" for problem in misfits.values()]
    return [case for case in cases if case.id not in misfits]


def _find_problem(case: Case) -> str:
    try:
        case.read_labels()
    except SourceError as error:
        return str(error)
    return ""


def read_pixels(path: pathlib.Path, size: tuple[int, int]) -> np.ndarray:
    """Returns the values of a DICOM image, float[rows, columns]: rescaled (Hounsfield units of CT), colours as grey.

    Where small values are white (MONOCHROME1), values change their sign, so that large ones are white everywhere; CT
    keeps its units.

    Raises:
        SourceError: it has no pixels, or they cannot be decoded, or are of another size.
    """
    pydicom = volumes.import_medical("pydicom")
    try:
        image = pydicom.dcmread(path)
        if "PixelData" not in image:
            raise SourceError(f"{path}: has no PixelData; leave it out of the series")
        pixels = image.pixel_array  # YBR comes as RGB
        if image.PhotometricInterpretation == "PALETTE COLOR":
            pixels = pydicom.pixels.apply_color_lut(pixels, image)[..., :3]
        if pixels.ndim == 3:
            pixels = pixels @ np.asarray(_GREY)
        values = pydicom.pixels.apply_modality_lut(pixels, image)
    except SourceError:
        raise
    except Exception as error:  # decoders raise many kinds for damaged or unsupported data
        raise SourceError(f"{path}: its pixels cannot be decoded ({error})") from None
    if values.shape != size:
        raise SourceError(f"{path}: its pixels have the shape {values.shape}, its header says {size}")
    inverted = image.PhotometricInterpretation == "MONOCHROME1" and image.get("Modality") != "CT"
    return -values.astype(np.float32) if inverted else values
