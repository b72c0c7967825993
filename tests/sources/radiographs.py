"""Small DICOM files of one picture, as radiograph data sets ship them."""

import io
import pathlib

import numpy as np
from PIL import Image

RAMP = np.linspace(0, 4095, 30 * 40).round().astype(np.uint16).reshape(30, 40)  # 12 bits
PATIENT = "MRN-0815"


def write_radiograph(path: pathlib.Path, pixels: np.ndarray = RAMP, syntax: str = "", stored: int = 12, **elements):
    """Writes pixels [H, W] or [H, W, 3] with more elements, or without those that are None; returns the path."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import (
        DigitalXRayImageStorageForPresentation,
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        RLELossless,
        generate_uid,
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    encoded = syntax in (RLELossless, JPEG2000Lossless)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if encoded or not syntax else syntax
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    image.Modality, image.PatientID, image.PatientName = "DX", PATIENT, "Doe^Jane"
    image.SeriesInstanceUID = generate_uid()
    image.BurnedInAnnotation = "NO"
    image.Rows, image.Columns = pixels.shape[:2]
    image.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    image.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        image.PlanarConfiguration = 0
    image.BitsAllocated = 8 * pixels.itemsize
    image.BitsStored = min(stored, image.BitsAllocated)
    image.HighBit, image.PixelRepresentation = image.BitsStored - 1, int(pixels.dtype.kind == "i")
    image.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    if syntax == RLELossless:
        image.compress(RLELossless)
    elif syntax == JPEG2000Lossless:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
        image.PixelData = encapsulate([stream.getvalue()])
        image["PixelData"].is_undefined_length = True
        image.file_meta.TransferSyntaxUID = JPEG2000Lossless
    image.save_as(path, enforce_file_format=True)
    return path
