"""Masks of phrases in a volume, slice by slice: of a NIfTI file as NIfTI, of a DICOM series as DICOM-SEG or NIfTI.

Slices are looked at as training saw them (`data_pipelines.volumes`): hung as radiologists do, with square pixels, in
the window that the phrases ask for. What is found goes back to the voxels of the input, none of which moves.
"""

import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from data_pipelines import volumes
from data_pipelines.curate import SourceError
from data_pipelines.sources.dicom import read_series
from data_pipelines.sources.nifti_files import open_volume, read_values
from data_pipelines.volumes import PLANES, WINDOWS, Volume
from medglip_jax.evaluation.report import write_json
from medglip_jax.mask_outputs import decode

if TYPE_CHECKING:
    from medglip_jax.predict import MedGLIP

PLANE_CHOICES = ("auto", *PLANES)
WINDOW_CHOICES = ("auto", "percentile", *WINDOWS)
_PERCENTILES = volumes.SliceRule().percentiles
_THICK = 1.01  # slices at this many times the distance of the pixels in them are the ones that were scanned
_SUFFIXES = (".nii.gz", ".nii")
# By which a DICOM segmentation names the images that it is of.
_NAMES = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID")
# What it repeats of the patient and the study; may be empty everywhere (type 2), and is missing where it was removed.
_REPEATED = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName"),
)
# SNOMED CT's category and type of a segment; the phrase is its label.
_CODES = {
    "lesion": (("49755003", "SCT", "Morphologically Altered Structure"), ("52988006", "SCT", "Lesion")),
    "structure": (("123037004", "SCT", "Anatomical Structure"), ("91723000", "SCT", "Anatomical Structure")),
}


def choose_plane(volume: Volume) -> str:
    """Returns the plane that a volume was scanned in, where its slices are thicker than wide; else axial."""
    spacing = volume.grid.spacing
    thickest = int(np.argmax(spacing))
    return [*PLANES][thickest] if spacing[thickest] > _THICK * sorted(spacing)[1] else "axial"


def value_range(volume: Volume, phrases: Sequence[str], window: str) -> tuple[float, float]:
    """Returns the values that become black and white.

    Args:
        volume: the image.
        phrases: what is looked for.
        window: of `WINDOW_CHOICES`; "auto" is the phrases' window for CT, and the percentiles for everything else.
    """
    if window == "auto":
        window = "percentile"
        if volume.modality == "ct":
            window = volumes.choose_window([(phrase, 1.0) for phrase in phrases])
    if window == "percentile":
        return volumes.percentile_range(volume.values, _PERCENTILES)
    return volumes.window_limits(window)


def label_volume(
    model: "MedGLIP",
    volume: Volume,
    phrases: Sequence[str],
    *,
    plane: str = "auto",
    window: str = "auto",
    threshold: float = 0.3,
    batch_size: int = 8,
) -> np.ndarray:
    """Finds phrases in every slice of a plane.

    Args:
        model: with masks.
        volume: in radiological orientation.
        phrases: K of them, without repetition. Where two are found in a voxel, it is of the later one: name what holds
            before what it holds ("lung. nodule").
        plane: of `PLANE_CHOICES`; see `choose_plane`.
        window: see `value_range`.
        threshold: least score of a box whose mask is taken, where the model has masks of boxes only.
        batch_size: slices that go through the model together.

    Returns:
        uint8[head to feet, front to back, right to left], or uint16 for more than 255 phrases: k for the k-th phrase,
        from 1, and 0 for none.

    Raises:
        ValueError: the model has no masks.
    """
    kind = model.config.model.masks.kind
    if not kind:
        raise ValueError("this model has no masks: train one with config.model.masks.kind, as configs/demo_masks.py")
    plane = choose_plane(volume) if plane == "auto" else plane
    low, high = value_range(volume, phrases, window)
    values = {phrase: value for value, phrase in enumerate(phrases, 1)}
    labels = np.zeros(volume.values.shape, np.uint8 if len(phrases) < 256 else np.uint16)
    places = range(volume.values.shape[PLANES[plane]])
    for start in range(0, len(places), batch_size):
        shown = places[start : start + batch_size]
        pictures = []
        for place in shown:
            pixels = volumes.section(volume.values, plane, place)
            size, _ = volumes.square_size(pixels.shape, volume.grid.pixel_spacing(plane))
            pictures.append(volumes.apply_window(volumes.resize_pixels(pixels, size), low, high))
        predictions = model.predict(pictures, list(phrases), threshold=threshold, batch_size=batch_size)
        for place, found in zip(shown, predictions, strict=True):
            target = volumes.section(labels, plane, place)
            pairs = zip(found.phrases, found.masks or (), strict=False)
            masks = list(pairs if found.phrase_masks is None else found.phrase_masks.items())
            for phrase, mask in sorted(masks, key=lambda pair: values[pair[0]]):
                target[volumes.resize_labels(decode(mask), target.shape)] = values[phrase]
    return labels


def write_nifti(labels: np.ndarray, path: pathlib.Path, like: Any, phrases: Sequence[str]) -> None:
    """Writes a label map that lies where an image lies.

    Args:
        labels: as the image is stored; k is the k-th phrase, from 1.
        path: of the file to write; the names of the values are in it, as a label table that
            `data_pipelines.sources.nifti_files.read_multilabel` and TotalSegmentator's tools read, and in a JSON file
            beside it.
        like: nibabel image; the label map has its affine, with both codes.
        phrases: names of the values.
    """
    nibabel = volumes.import_medical("nibabel")
    header = like.header.copy()
    header.set_data_dtype(labels.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # how to show the image, not its labels
    header.extensions.clear()
    entries = "".join(f'<Label Key="{k}">{escape(phrase)}</Label>' for k, phrase in enumerate(phrases, 1))
    table = f"<CaretExtension><VolumeInformation Index='0'><LabelTable>{entries}</LabelTable></VolumeInformation>"
    header.extensions.append(nibabel.nifti1.Nifti1Extension(0, f"{table}</CaretExtension>".encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(type(like)(np.ascontiguousarray(labels), like.affine, header), path)
    name = next(path.name.removesuffix(end) for end in _SUFFIXES if path.name.endswith(end))
    write_json({"labels": {str(k): phrase for k, phrase in enumerate(phrases, 1)}}, path.with_name(f"{name}.json"))


def read_references(slices: Sequence[pathlib.Path], distance: float) -> list[Any]:
    """Reads the headers that a DICOM segmentation refers to.

    Args:
        slices: the files of a series.
        distance: from one to the next in mm, taken for their thickness where they do not tell it.

    Returns:
        pydicom data sets without pixels. Class and name of an image are taken from the file's meta information where
        the data set has them empty; what a segmentation repeats is empty where it is missing.

    Raises:
        SourceError: a file does not say what it is, of which series or study, or in which frame of reference.
    """
    pydicom, headers = volumes.import_medical("pydicom"), []
    for path in slices:
        header = pydicom.dcmread(path, stop_before_pixels=True)
        for name in ("SOPClassUID", "SOPInstanceUID"):
            if not header.get(name):
                setattr(header, name, header.file_meta.get(f"MediaStorage{name}", ""))
        for name in _REPEATED:
            if name not in header:
                setattr(header, name, "")
        if not header.get("SliceThickness"):
            header.SliceThickness = round(distance, 4)
        if missing := [name for name in _NAMES if not header.get(name)]:
            raise SourceError(
                f"{path}: has no {', '.join(missing)}, by which a DICOM segmentation names its images; write the masks "
                "as .nii.gz, or give the series new ones (de-identification should replace UIDs, not empty them)"
            )
        headers.append(header)
    return headers


def write_segmentation(labels: np.ndarray, path: pathlib.Path, images: Sequence[Any], names: Sequence[str]) -> None:
    """Writes a DICOM segmentation (binary, a segment a phrase) of a series, by highdicom.

    It names the patient and the study as the series does.

    Args:
        labels: [slice, row, column], slice i is of image i; k is the k-th phrase, from 1.
        path: of the file to write.
        images: of the series, from `read_references`.
        names: of the values.
    """
    highdicom = volumes.import_medical("highdicom")
    from highdicom.seg import Segmentation, SegmentDescription

    version = importlib.metadata.version("medglip_jax")
    code = highdicom.sr.CodedConcept
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="medglip_jax",
        version=version,
        family=code("123109", "DCM", "Artificial Intelligence"),
    )
    descriptions = []
    for number, name in enumerate(names, 1):
        lesion = volumes.counts_components(name)
        category, kind = _CODES["lesion" if lesion else "structure"]
        descriptions.append(
            SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=code(*category),
                segmented_property_type=code(*kind),
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
            )
        )
    written = Segmentation(
        source_images=list(images),
        pixel_array=np.ascontiguousarray(labels),
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="medglip_jax",
        manufacturer_model_name="medglip_jax",
        software_versions=version,
        device_serial_number="0",
        series_description="Masks of phrases",
        omit_empty_frames=bool(labels.any()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    written.save_as(path)


def _new_nifti(labels: np.ndarray, affine: np.ndarray) -> Any:
    """A NIfTI image of [column, row, slice] that lies where a series does; `affine` is of [slice, row, column]."""
    nibabel = volumes.import_medical("nibabel")
    image = nibabel.Nifti1Image(labels, affine[:, [2, 1, 0, 3]])
    image.set_qform(image.affine, code="scanner")
    image.set_sform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    return image


def label_file(model: "MedGLIP", source: str, output: str, phrases: Sequence[str], **options: Any) -> dict[str, int]:
    """Finds phrases in a volume and writes where they are.

    Args:
        model: with masks.
        source: a NIfTI file, or the folder of a DICOM series.
        output: .nii.gz or .nii; of a series also .dcm, a DICOM segmentation.
        phrases, options: of `label_volume`.

    Returns:
        The number of voxels of each phrase.

    Raises:
        SourceError: the volume cannot be read, or a library that it needs is not installed.
        ValueError: the model has no masks, or `output` is of the other kind.
    """
    given, target = pathlib.Path(source), pathlib.Path(output)
    series, endings = given.is_dir(), (*_SUFFIXES, ".dcm") if given.is_dir() else _SUFFIXES
    if not target.name.endswith(endings):
        raise ValueError(f"{output}: the masks of {source} are written as {' or '.join(endings)}")
    image, references = None, []
    if series:
        slices, volume, turn = read_series(given)
        if target.suffix == ".dcm":  # what is missing is told before the work, not after it
            volumes.import_medical("highdicom")
            references = read_references(slices, volume.grid.spacing[int(turn[0][0])])
    elif given.is_file():
        image, turn, grid = open_volume(given)
        volume = Volume(volumes.reorient(read_values(image, given), turn), grid, "unknown")
    else:
        raise SourceError(f"{source}: there is no such volume; expected a NIfTI file, or the folder of a DICOM series")
    labels = label_volume(model, volume, phrases, **options)
    stored = volumes.restore(labels, turn)
    if references:
        write_segmentation(stored, target, references, phrases)
    elif image is None:
        stored = stored.T  # columns, rows and slices, as NIfTI files have them
        write_nifti(stored, target, _new_nifti(stored, volumes.restore_affine(volume.grid, turn)), phrases)
    else:
        write_nifti(stored, target, image, phrases)
    counts = np.bincount(labels.ravel(), minlength=len(phrases) + 1)[1:]
    return dict(zip(phrases, counts.tolist(), strict=True))
