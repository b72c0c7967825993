"""Small DICOM series of a drawn body."""

import pathlib

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from data_pipelines.sources import load_source
from tests.sources.volume_body import NAMES, affine_of, draw_body, turn_to

SERIES, PATIENT = "1.2.3.4.5", "MRN-4711"
AXIAL = "SPL"  # where slices, rows and columns grow to


def to_dicom(point: np.ndarray) -> list[float]:
    return (np.asarray(point)[:3] * (-1, -1, 1)).tolist()


def place(header: Dataset, affine: np.ndarray, index: int) -> None:
    rows, columns = affine[:3, 1], affine[:3, 2]
    header.ImagePositionPatient = to_dicom(affine @ (index, 0, 0, 1))
    header.ImageOrientationPatient = to_dicom(columns / np.linalg.norm(columns)) + to_dicom(rows / np.linalg.norm(rows))
    header.PixelSpacing = [float(np.linalg.norm(rows)), float(np.linalg.norm(columns))]


def new_file(kind=CTImageStorage, modality="CT", series=SERIES) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    header.Modality, header.SeriesInstanceUID, header.PatientID = modality, series, PATIENT
    header.PatientName = "Doe^Jane"
    return header


def set_pixels(header: Dataset, pixels: np.ndarray, photometric="MONOCHROME2") -> None:
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.PhotometricInterpretation = photometric
    header.BitsAllocated = header.BitsStored = 8 * pixels.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, 0
    header.PixelData = pixels.tobytes()


def write_series(folder: pathlib.Path, codes: str = AXIAL, series=SERIES, values=None, modality="CT") -> pathlib.Path:
    """Writes one file a slice; names do not follow the order of the slices. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stored, affine = turn_to(codes, draw_body()[0] if values is None else values)
    names = np.random.default_rng(1).permutation(len(stored))
    for index, image in enumerate(stored):
        header = new_file(modality=modality, series=series)
        place(header, affine, index)
        header.RescaleSlope, header.RescaleIntercept = 1, -1024
        set_pixels(header, (image + 1024).astype(np.uint16))
        header.save_as(folder / f"CT.{names[index]:03d}")
    return folder


def slice_file(folder: pathlib.Path, index: int) -> pathlib.Path:
    """The file of slice `index` of an axial series."""
    places = {path: pydicom.dcmread(path).ImagePositionPatient[2] for path in folder.glob("CT.*")}
    return sorted(places, key=places.__getitem__)[index]


def write_labels(folder: pathlib.Path, labels=None) -> pathlib.Path:
    (folder / "segmentations").mkdir(parents=True, exist_ok=True)
    labels = draw_body()[1] if labels is None else labels
    for value, name in NAMES.items():
        image = nibabel.Nifti1Image((labels == value).astype(np.uint8), affine_of())
        nibabel.save(image, folder / "segmentations" / f"{name}.nii.gz")
    return folder


def write_case(folder: pathlib.Path, codes: str = AXIAL) -> pathlib.Path:
    write_series(folder / "series", codes)
    return write_labels(folder)


def read(folder, source="dicom"):
    return load_source(source, folder, dataset="scans")


def shown_boxes(source) -> dict[tuple[str, str], list]:
    return {(e.image_id, region.label): region.box.tolist() for e in source for region in e.regions}
