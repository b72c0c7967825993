"""DICOM series with labels: a NIfTI file beside them, a DICOM segmentation, or an RT structure set."""

import collections
import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from data_pipelines import limits, volumes
from data_pipelines.curate import SourceError, find_modality, find_salt, hash_identifier
from data_pipelines.dicom_privacy import Identity, check_burned_in, read_header
from data_pipelines.sources import dicom_labels, nifti_files
from data_pipelines.sources.dicom_labels import Geometry
from data_pipelines.sources.volume_source import Case, UnusableCase, VolumeSource
from data_pipelines.volumes import Grid, Labels, SliceRule, Volume

_MODALITIES = {"PT": "pet", "MR": "mri", "CT": "ct"}
_ANNOTATIONS = {"SEG": dicom_labels.add_segmentation, "RTSTRUCT": dicom_labels.add_structures}
_PLACES = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2, "Rows": 1, "Columns": 1}
_GREY = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
_ALIKE = {"ImageOrientationPatient": 1e-3, "PixelSpacing": 1e-3, "Rows": 0, "Columns": 0}  # how close in one series
_GAP = 0.05  # share by which the distance of neighbouring slices may differ from the others'


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a file has DICOM's mark, whatever it is called."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _may_be_dicom(path: pathlib.Path) -> bool:
    """DICOM files are called *.dcm, or like instances (CT.1.2.840.113), or have no suffix at all."""
    suffix = path.suffix.lower().lstrip(".")
    return suffix in ("", "dcm", "dicom", "ima") or suffix.isdigit()


@dataclasses.dataclass(frozen=True)
class SliceHeader:
    """Where a slice lies: numbers of its DICOM attributes, none where it lacks them.

    Attributes:
        places: keyword (ImagePositionPatient, ImageOrientationPatient, PixelSpacing, Rows, Columns) -> its numbers.
        frames: NumberOfFrames.
    """

    places: dict[str, tuple[float, ...]]
    frames: int

    @classmethod
    def of(cls, header: Any, path: pathlib.Path) -> "SliceHeader":
        """Takes them from pydicom's dataset; raises SourceError where they are no numbers, or not so many."""
        places = {}
        try:
            for keyword, count in _PLACES.items():
                value = header.get(keyword)
                places[keyword] = tuple(np.asarray(() if value is None else value, float).ravel().tolist())
                if places[keyword] and not (len(places[keyword]) == count and np.isfinite(places[keyword]).all()):
                    raise ValueError(keyword)
            return cls(places, int(header.get("NumberOfFrames") or 1))
        except Exception as error:  # pydicom decodes values only now
            raise SourceError(f"{path}: its place in the volume cannot be read ({error!r})") from None


@dataclasses.dataclass(eq=False)
class Series:
    """The files of one series.

    Attributes:
        name: hash of its UID, or of its folder where files have none.
        patient: hash of the patient.
        modality: as DICOM abbreviates it.
        headers: (path, where it lies) of its images.
        problem: why it must not be used, if so.
    """

    name: str
    patient: str
    modality: str
    headers: list[tuple[pathlib.Path, SliceHeader]] = dataclasses.field(default_factory=list)
    problem: SourceError | None = None

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
        if self.problem is not None:
            raise self.problem
        for path, header in self.headers:
            if header.frames > 1:
                raise SourceError(f"{path}: holds several frames, which is not supported; make it one file a slice")
            for keyword, value in header.places.items():
                if not value:
                    raise SourceError(f"{path}: has no {keyword}, so that its place in the volume is unknown")
        first_path, first = self.headers[0]
        for path, header in self.headers:
            for keyword, close in _ALIKE.items():
                value, usual = header.places[keyword], first.places[keyword]
                if not np.allclose(value, usual, rtol=0, atol=close):
                    raise SourceError(
                        f"{path}: its {keyword} {list(value)} differs from {list(usual)} of {first_path} in the same "
                        "series; put different scans into different series"
                    )
        if len(self.headers) < 2:
            raise SourceError(f"{first_path}: is the only slice of its series, which makes no volume")
        (rows,), (columns,) = first.places["Rows"], first.places["Columns"]
        shape = (len(self.headers), int(rows), int(columns))
        limits.check_amount(math.prod(shape), "volume_voxels", self.folder, f"voxels {shape}")
        along_row, along_column = np.reshape(first.places["ImageOrientationPatient"], (2, 3))
        normal = np.cross(along_row, along_column)
        places = [float(normal @ np.asarray(header.places["ImagePositionPatient"])) for _, header in self.headers]
        order = np.argsort(places, kind="stable")
        ordered = [self.headers[i] for i in order]
        self._check_gaps([path for path, _ in ordered], np.diff(np.asarray(places)[order]))
        start, end = (np.asarray(ordered[i][1].places["ImagePositionPatient"]) for i in (0, -1))
        row_spacing, column_spacing = first.places["PixelSpacing"]
        affine = np.eye(4)
        affine[:3, 0] = (end - start) / (len(ordered) - 1)
        affine[:3, 1], affine[:3, 2] = along_column * row_spacing, along_row * column_spacing
        affine[:3, 3] = start
        affine[:2] *= -1  # DICOM's x and y grow to the patient's left and back
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

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dataset: str,
        modality: str = "unknown",
        rule: SliceRule | None = None,
        plans: str = "",
    ):
        volumes.import_medical("pydicom")
        found = _index(folder, find_salt(dataset))
        series, annotations, unused = list(found.series.values()), found.annotations, found.others
        cases: list[_DicomCase] = []
        for each in series:
            labels = _label_folder(each.folder, folder)
            objects = [(path, kind) for path, kind, of in annotations if of == each.name]
            if labels is None and not objects:
                unused.append(f"{each.folder}: {len(each.headers)} images of a series without labels")
                continue
            told = _MODALITIES.get(each.modality) or find_modality(each.modality) or modality
            cases.append(_DicomCase(folder, each, labels, tuple(objects), told))
        cases = _keep_fitting(cases, unused)
        names = {each.name for each in series}
        unused += [f"{path}: refers to a series that is not here" for path, _, of in annotations if of not in names]
        if not cases and not found.unusable:
            raise SourceError(
                f"{folder}: no DICOM series with labels: expected a series and multilabel.nii.gz or segmentations/ in "
                f"its folder or the one above, or a DICOM SEG or RTSTRUCT; found {len(series)} series without"
            )
        super().__init__(
            [*cases, *found.unusable],
            dataset=dataset,
            rule=rule or SliceRule(),
            unused=unused,
            notes=found.notes,
            plans=plans,
        )

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        looked: set[pathlib.Path] = set()  # one file a folder tells
        for path in limits.walk_files(folder) if folder.is_dir() else ():
            if path.parent not in looked and _may_be_dicom(path):
                looked.add(path.parent)
                if is_dicom(path):
                    return True
        return False


@dataclasses.dataclass
class _Index:
    """What the DICOM files in a folder are.

    Attributes:
        series: of images, by the hash of their UID.
        annotations: (path, modality, hash of the UID of the series that it labels).
        others: files that are neither.
        unusable: files that cannot be read, or must not be: nobody knows to which series they belong.
        notes: of `check_burned_in`, one a file and reason.
    """

    series: dict[str, Series] = dataclasses.field(default_factory=dict)
    annotations: list[tuple[pathlib.Path, str, str]] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    unusable: list[UnusableCase] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def _index(folder: pathlib.Path, salt: str) -> _Index:
    """Reads the headers of all DICOM files in a folder."""
    index = _Index()
    for path in limits.list_files(folder):
        try:
            if _may_be_dicom(path) and is_dicom(limits.check_inside(folder, path)):
                _add_file(index, path, folder, salt)
        except SourceError as error:
            index.unusable.append(UnusableCase(path.name, error))
    return index


def _add_file(index: _Index, path: pathlib.Path, folder: pathlib.Path, salt: str) -> None:
    pydicom = volumes.import_medical("pydicom")
    header, identity = read_header(path, salt)
    if header.get("SOPClassUID") == pydicom.uid.MediaStorageDirectoryStorage:
        return
    kind = str(header.get("Modality") or "")
    if kind in _ANNOTATIONS:
        index.annotations.append((path, kind, identity.labelled_series))
    elif "Rows" in header:
        name = identity.series or hash_identifier("series", path.parent.relative_to(folder), salt)
        place = SliceHeader.of(header, path)
        series = index.series.setdefault(name, Series(name, _patient_of(identity, name, salt), kind))
        series.headers.append((path, place))
        try:
            index.notes += check_burned_in(header, path)
        except SourceError as error:
            series.problem = series.problem or error
    else:
        index.others.append(f"{path}: is neither an image nor an annotation of one")


def _patient_of(identity: Identity, series: str, salt: str) -> str:
    """A series of no known patient is its own."""
    return identity.patient or hash_identifier("patient", series, salt)


def _label_folder(start: pathlib.Path, top: pathlib.Path) -> pathlib.Path | None:
    """Returns the nearest folder from `start` up to `top` with NIfTI labels."""
    for folder in (start, *start.parents):
        if nifti_files.has_labels(folder):
            return folder
        if folder == top:
            return None
    return None


@dataclasses.dataclass(eq=False)
class _DicomCase(Case):
    root: pathlib.Path  # the input folder
    series: Series
    folder: pathlib.Path | None  # of NIfTI labels
    objects: tuple[tuple[pathlib.Path, str], ...]  # DICOM annotations and their modality
    modality: str

    @property
    def id(self) -> str:
        return self.series.name

    @property
    def patient(self) -> str:
        return self.series.patient

    def list_files(self) -> list[pathlib.Path]:
        labels = nifti_files.list_case_labels(self.folder) if self.folder else [path for path, _ in self.objects]
        return [*(path for path, _ in self.series.headers), *labels]

    def describe(self) -> str:
        return str(self.series.problem or "") + str(nifti_files.read_description(self.folder) if self.folder else "")

    def read_labels(self) -> tuple[Labels, Grid]:
        _, geometry = self.series.arrange()
        turn, grid = volumes.to_radiological(geometry.affine, geometry.shape, str(self.series.folder))
        if self.folder is not None:
            return nifti_files.read_case_labels(self.folder, grid, self.root), grid
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


def read_series(folder: pathlib.Path) -> tuple[list[pathlib.Path], Volume, np.ndarray]:
    """Reads the one series of images in a folder.

    Returns:
        (files from slice to slice, the volume in radiological orientation, how it was turned: `volumes.restore` gives
        back [file, row, column]).

    Raises:
        SourceError: there is none, there are several, or it cannot be read or must not be (see `Series.arrange`).
    """
    found = _index(folder, "")
    if found.unusable:
        raise found.unusable[0].error
    if len(found.series) != 1:
        raise SourceError(f"{folder}: holds {len(found.series)} series of DICOM images, expected one; name its folder")
    (series,) = found.series.values()
    told = _MODALITIES.get(series.modality) or find_modality(series.modality) or "unknown"
    paths, geometry = series.arrange()
    turn, _ = volumes.to_radiological(geometry.affine, geometry.shape, str(folder))
    return paths, _DicomCase(folder, series, None, (), told).read_volume(), turn


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
        image, _ = read_header(path, pixels=True)
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
