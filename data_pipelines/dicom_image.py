"""Single DICOM images, such as radiographs: one file, one picture, as radiologists see it.

pydicom and its plugins decode; what is here chooses what becomes black and white (PS3.3 C.11.2.1).
"""

import collections
import contextlib
import contextvars
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines import volumes
from data_pipelines.curate import SourceError, find_modality, find_salt
from data_pipelines.dicom_privacy import check_burned_in, read_header
from data_pipelines.images import StoredImage

DICOM_SUFFIXES = (".dcm", ".dicom")
PERCENTILES = (0.5, 99.5)  # that become black and white where the file has no window; as those of volumes
_MODALITIES = {"CR": "xray", "DX": "xray", "MG": "xray", "RF": "xray", "XA": "xray", "RG": "xray", "PX": "xray"}
_MODALITIES |= {"IO": "xray", "PT": "pet", "ES": "endoscopy", "OP": "fundus", "OPT": "oct", "SM": "histopathology"}
_MODALITIES |= {"GM": "microscopy", "DMS": "dermoscopy"}
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing")  # the first is of the patient, the second of the detector


@dataclasses.dataclass(frozen=True)
class DicomImage(StoredImage):
    """An image with what its DICOM header says about it.

    Attributes:
        spacing_mm: (row, column) distance of pixels in mm, 0 if unknown.
        patient_id: salted hash of PatientID, or else of the study or series, "" without any.
        modality: one of `data_pipelines.schema.MODALITIES`, "" if unknown.
        notes: what is worth a count, see `data_pipelines.dicom_privacy.check_burned_in`.
    """

    spacing_mm: tuple[float, float] = (0.0, 0.0)
    patient_id: str = ""
    modality: str = ""
    notes: tuple[str, ...] = ()


_NOTES: contextvars.ContextVar[collections.Counter[str] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def count_notes() -> Iterator[collections.Counter[str]]:
    """Counts the notes of the files that `store_dicom` reads in the body of a `with` statement, in this thread."""
    counts = collections.Counter[str]()
    token = _NOTES.set(counts)
    try:
        yield counts
    finally:
        _NOTES.reset(token)


def store_dicom(path: pathlib.Path, *, dataset: str, annotated_size: tuple[int, int] | None = None) -> DicomImage:
    """Reads a DICOM file of one picture.

    Grey values go through the modality LUT or the rescale, then through the file's VOI LUT or else its first window;
    without either, the 0.5 to 99.5 percentile, padding left out, becomes black to white. All bits are kept until then.
    MONOCHROME1 is inverted, padding is black. Colours become RGB, their upper 8 bits.

    Args:
        path: the file.
        dataset: salt of the patient's hash where the environment variable MEDGLIP_PATIENT_SALT has none.
        annotated_size: (height, width) that the annotation was made on, if it says so.

    Returns:
        uint8[H, W] or uint8[H, W, 3] as PNG, with spacing, patient and modality.

    Raises:
        SourceError: the file is damaged or no DICOM, has several frames or no pixels, cannot be decoded, has another
            size, or says that a patient's data are burnt into the picture.
    """
    pydicom = volumes.import_medical("pydicom")
    image, identity = read_header(path, find_salt(dataset), pixels=True)
    if int(image.get("NumberOfFrames") or 1) > 1:
        raise SourceError(f"{path}: holds {image.NumberOfFrames} frames; make it one file a picture")
    if "PixelData" not in image:
        raise SourceError(f"{path}: has no PixelData, so it is no picture; leave it out")
    notes = check_burned_in(image, path)
    try:
        picture = _render(image, pydicom)
    except Exception as error:  # decoders raise many kinds for damaged or unsupported data
        raise SourceError(f"{path}: its pixels cannot be decoded ({error})") from None
    height, width = picture.shape[:2]
    if annotated_size and annotated_size != (height, width):
        raise SourceError(
            f"{path}: the image is {width} x {height} pixels, its annotation says "
            f"{annotated_size[1]} x {annotated_size[0]}; the boxes belong to another version of it"
        )
    if (counts := _NOTES.get()) is not None:
        counts.update(notes)
    return DicomImage(
        volumes.encode_png(picture),
        height,
        width,
        spacing_mm=_read_spacing(image),
        patient_id=identity.patient or identity.study or identity.series,
        modality=_read_modality(image),
        notes=notes,
    )


def _read_modality(header: Any) -> str:
    told = str(header.get("Modality") or "")
    return _MODALITIES.get(told) or find_modality(told)


def _read_spacing(image: Any) -> tuple[float, float]:
    for keyword in _SPACINGS:
        if image.get(keyword):
            row, column = map(float, image[keyword].value)
            if min(row, column) > 0:
                return row, column
    return 0.0, 0.0


def _render(image: Any, pydicom: Any) -> np.ndarray:
    """Returns uint8[H, W] or uint8[H, W, 3]."""
    pixels = image.pixel_array  # YBR comes as RGB
    if image.PhotometricInterpretation == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, image)[..., :3]
        return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize > 1 else pixels
    if pixels.ndim == 3:
        return (pixels >> max(int(image.BitsStored) - 8, 0)).astype(np.uint8)
    padding = _find_padding(image, pixels)
    values = pydicom.pixels.apply_modality_lut(pixels, image)
    picture = _apply_voi(image, values, padding, pydicom)
    if image.PhotometricInterpretation == "MONOCHROME1":
        picture = 255 - picture
    picture[padding] = 0
    return picture


def _find_padding(image: Any, pixels: np.ndarray) -> np.ndarray:
    """Returns bool[H, W]: what lies around the picture, as stored values say (PS3.3 C.7.5.1.1.2)."""
    value = image.get("PixelPaddingValue")
    if value is None:
        return np.zeros(pixels.shape, bool)
    limit = image.get("PixelPaddingRangeLimit")
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (pixels >= low) & (pixels <= high)


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__getitem__") else value)


def _apply_voi(image: Any, values: np.ndarray, padding: np.ndarray, pydicom: Any) -> np.ndarray:
    """Returns uint8[H, W] of the values after the modality LUT."""
    if image.get("VOILUTSequence"):
        bits = int(image.VOILUTSequence[0].LUTDescriptor[2])
        shown = pydicom.pixels.apply_voi(values, image, index=0)
        return volumes.apply_window(shown, 0, 2**bits - 1)
    if image.get("WindowWidth") and _first(image.WindowWidth) > 0:
        center, width = _first(image.WindowCenter), _first(image.WindowWidth)
        function = str(image.get("VOILUTFunction") or "LINEAR")
        if function == "SIGMOID":
            shown = 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -50, 50)))
            return volumes.apply_window(shown, 0, 1)
        if function == "LINEAR":  # of whole numbers: both ends of the window are shown
            center, width = center - 0.5, width - 1
        return volumes.apply_window(values, center - width / 2, center + width / 2)
    seen = values[~padding]
    low, high = np.percentile(seen, PERCENTILES) if seen.size else (0.0, 0.0)
    return volumes.apply_window(values, float(low), float(high))
