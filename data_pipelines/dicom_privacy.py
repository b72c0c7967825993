"""What is read of DICOM files: an allow-list of attributes that identify nobody, and hashes in the place of ids.

DICOM PS3.15 Annex E, Table E.1-1 (Basic Application Level Confidentiality Profile) lists the attributes that identify
people: names, ids, dates, places, devices, UIDs, free text and private attributes. A list of what to drop is out of
date with every new edition, so this one says what to keep: how pixels are coded, where they lie, and what they show.
Everything else never leaves the parser.

Two of the kept attributes are text that people type: ROIName, which the profile empties, and SegmentLabel. They name
the structures and become phrases, in which `medglip data audit` looks for names, dates and numbers.
"""

import dataclasses
import io
import os
import threading
import zlib
from typing import Any

from data_pipelines.curate import SourceError, hash_patient
from data_pipelines.limits import check_amount, check_image_size, current_limits, read_bytes
from data_pipelines.volumes import import_medical

SALT_VARIABLE = "MEDGLIP_PATIENT_SALT"

# Keywords, by what they are for; in sequences the same ones are kept. ROIName is the only one with an action in the
# table.
_KIND = "SpecificCharacterSet SOPClassUID Modality ImageType BurnedInAnnotation RecognizableVisualFeatures"
_PIXELS = """
Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation PlanarConfiguration BitsAllocated BitsStored
HighBit PixelRepresentation PixelAspectRatio PixelPaddingValue PixelPaddingRangeLimit SmallestImagePixelValue
LargestImagePixelValue LossyImageCompression RedPaletteColorLookupTableDescriptor
GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData
GreenPaletteColorLookupTableData BluePaletteColorLookupTableData SegmentedRedPaletteColorLookupTableData
SegmentedGreenPaletteColorLookupTableData SegmentedBluePaletteColorLookupTableData
"""
_VALUES = """
RescaleSlope RescaleIntercept RescaleType ModalityLUTSequence VOILUTSequence LUTDescriptor LUTData ModalityLUTType
WindowCenter WindowWidth VOILUTFunction PresentationLUTShape PixelIntensityRelationship
PixelIntensityRelationshipSign
"""
_PLACE = """
ImagePositionPatient ImageOrientationPatient PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing
PixelSpacingCalibrationType EstimatedRadiographicMagnificationFactor DistanceSourceToDetector
DistanceSourceToPatient SliceThickness SpacingBetweenSlices PatientPosition PatientOrientation
SequenceOfUltrasoundRegions RegionSpatialFormat RegionDataType RegionLocationMinX0 RegionLocationMinY0
RegionLocationMaxX1 RegionLocationMaxY1 PhysicalUnitsXDirection PhysicalUnitsYDirection PhysicalDeltaX PhysicalDeltaY
"""
_ANATOMY = """
BodyPartExamined Laterality ImageLaterality FrameLaterality ViewPosition ViewCodeSequence AnatomicRegionSequence
CodeValue CodingSchemeDesignator CodeMeaning
"""
_ANNOTATIONS = """
SegmentationType MaximumFractionalValue SegmentSequence SegmentNumber SegmentLabel SharedFunctionalGroupsSequence
PerFrameFunctionalGroupsSequence SegmentIdentificationSequence ReferencedSegmentNumber PlanePositionSequence
PlaneOrientationSequence PixelMeasuresSequence StructureSetROISequence ROINumber ROIName ROIContourSequence
ReferencedROINumber ContourSequence ContourGeometricType ContourData
"""
ALLOWED = tuple(" ".join((_KIND, _PIXELS, _VALUES, _PLACE, _ANATOMY, _ANNOTATIONS)).split())
_PIXEL_DATA = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Read, hashed and dropped; the sequences are how annotations refer to a series.
_IDENTIFYING = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_REFERENCES = ("ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence")
_KEPT_META = ("TransferSyntaxUID", "MediaStorageSOPClassUID")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_START = 144  # of a file's meta information behind its own length: preamble, mark, and one element
_FLOAT_BITS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
_UNSTATED = "DICOM files that do not say whether text is burned in"
_BURNED_IN = "DICOM files with burned-in text, which was allowed"
_VISIBLE = "DICOM files that say that a person may be recognised (RecognizableVisualFeatures)"


class _Quiet:
    """Keeps pydicom from writing odd values, such as names and ids, to the log and to stderr.

    That is a setting of the whole process: the first reader that enters makes it, the last one that leaves takes it
    back.
    """

    def __init__(self):
        self._lock, self._readers, self._usual = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        config = import_medical("pydicom.config")
        with self._lock:
            if not self._readers:
                self._usual = config.settings.reading_validation_mode
                config.settings.reading_validation_mode = config.IGNORE
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        config = import_medical("pydicom.config")
        with self._lock:
            self._readers -= 1
            if not self._readers:
                config.settings.reading_validation_mode = self._usual


_QUIET = _Quiet()


@dataclasses.dataclass(frozen=True)
class Identity:
    """Hashes of what identifies a DICOM file, "" where it does not say.

    Attributes:
        patient: of PatientID.
        study, series, instance: of the UIDs of the study, the series and the file.
        labelled_series: of the UID of the series that a segmentation or structure set labels.
    """

    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    labelled_series: str = ""


def find_salt(dataset: str) -> str:
    """Returns the salt of the hashes: the environment variable MEDGLIP_PATIENT_SALT, or else the data set's name.

    A name is no secret: who has a list of ids can then find out which ones a data set holds.
    """
    return os.environ.get(SALT_VARIABLE) or dataset


def hash_identifier(kind: str, value: object, salt: str) -> str:
    """Returns 16 hexadecimal digits in the place of an id, "" for none.

    Args:
        kind: what the value identifies ("patient", "study", "series", "instance"); equal ids of two kinds differ.
        value: the id; spaces around it, which DICOM pads with, do not count.
        salt: of `find_salt`.
    """
    text = str(value or "").strip(" \0")
    return hash_patient(f"{salt}/{kind}/{text}") if text else ""


def read_header(path: str | os.PathLike, salt: str = "", *, pixels: bool = False) -> tuple[Any, Identity]:
    """Reads what may be known of a DICOM file, whatever it is called.

    Args:
        path: of the file.
        salt: of the hashes, see `find_salt`; "" where they are not used.
        pixels: read the pixels too; their size is checked first, see `check_pixels`.

    Returns:
        (pydicom's dataset with the attributes of `ALLOWED` only, hashes of the ids).

    Raises:
        SourceError: it cannot be read, or its pixels are too many or too few.
    """
    pydicom = import_medical("pydicom")
    tags = [*ALLOWED, *_IDENTIFYING, *_REFERENCES, *(_PIXEL_DATA if pixels else ())]
    try:
        _check_deflated(path)
        with _QUIET:
            header = pydicom.dcmread(path, stop_before_pixels=not pixels, specific_tags=tags)
            identity = identify(header, salt)
            keep_allowed(header)
    except (SourceError, MemoryError):
        raise
    except Exception as error:  # pydicom raises many kinds for damaged files; its texts can quote values
        raise SourceError(f"{path}: no readable DICOM file ({_name_kind(error)})") from None
    if pixels:
        check_pixels(header, path)
    return header, identity


def _name_kind(error: Exception) -> str:
    """What went wrong without the values that messages of pydicom quote, for these can be names or ids."""
    return type(error).__name__


def identify(header: Any, salt: str) -> Identity:
    """Returns the hashes of a dataset's ids; `keep_allowed` drops the ids themselves."""
    return Identity(
        patient=hash_identifier("patient", header.get("PatientID"), salt),
        study=hash_identifier("study", header.get("StudyInstanceUID"), salt),
        series=hash_identifier("series", header.get("SeriesInstanceUID"), salt),
        instance=hash_identifier("instance", header.get("SOPInstanceUID"), salt),
        labelled_series=hash_identifier("series", _labelled_series(header), salt),
    )


def _labelled_series(header: Any) -> Any:
    for reference in header.get("ReferencedSeriesSequence") or ():
        return reference.get("SeriesInstanceUID")
    for frame in header.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                return series.get("SeriesInstanceUID")
    return None


def keep_allowed(dataset: Any) -> Any:
    """Drops every attribute that is not in `ALLOWED`, or pixels, from a pydicom dataset, in sequences as well.

    Private attributes go, and so do the preamble, where the file was read from, and what the file's meta information
    holds beside the coding and kind of the image.

    Returns:
        The same dataset.
    """
    dictionary = import_medical("pydicom.datadict")
    allowed = {dictionary.tag_for_keyword(keyword) for keyword in (*ALLOWED, *_PIXEL_DATA)}
    # By the dictionary: files of implicit VR do not say which attributes are sequences.
    sequences = {tag for tag in allowed if dictionary.dictionary_VR(tag) == "SQ"}
    _drop(dataset, allowed, sequences)
    if getattr(dataset, "file_meta", None) is not None:
        _drop(dataset.file_meta, {dictionary.tag_for_keyword(keyword) for keyword in _KEPT_META}, set())
    for attribute, nothing in (("preamble", None), ("filename", None)):
        if getattr(dataset, attribute, None) is not None:
            setattr(dataset, attribute, nothing)
    return dataset


def _drop(dataset: Any, allowed: set[int], sequences: set[int]) -> None:
    tags = list(dataset.keys())  # without their values, which a loop over a dataset would decode
    for tag in tags:
        if tag not in allowed:
            del dataset[tag]
        elif tag in sequences:
            for item in dataset[tag].value or ():
                _drop(item, allowed, sequences)


def check_burned_in(header: Any, path: str | os.PathLike, allow: bool = False) -> tuple[str, ...]:
    """Refuses a file that says that text which identifies somebody is in its pixels (BurnedInAnnotation YES).

    Args:
        header: pydicom's dataset.
        path: of the file, for the message.
        allow: read it all the same, as `Limits.allow_burned_in` says for all files.

    Returns:
        What is worth a count: that the file says nothing about text, has some that is allowed, or that a person may be
        recognised in it, each as a line that is the same for all files. Most old files say nothing.

    Raises:
        SourceError: there is such text and it is not allowed.
    """
    burned_in = str(header.get("BurnedInAnnotation") or "").strip().upper()
    notes = []
    if burned_in == "YES":
        if not (allow or current_limits().allow_burned_in):
            raise SourceError(
                f"{path}: says that identifying text is burned into its pixels (BurnedInAnnotation YES); paint it over "
                "and set the attribute to NO, or, if such text may be in the records, allow it (--limits "
                "allow_burned_in=true)"
            )
        notes.append(_BURNED_IN)
    elif burned_in != "NO":
        notes.append(_UNSTATED)
    if str(header.get("RecognizableVisualFeatures") or "").strip().upper() == "YES":
        notes.append(_VISIBLE)
    return tuple(notes)


def check_pixels(header: Any, path: str | os.PathLike) -> None:
    """Checks that the pixels of a DICOM file are what its header says, before they are decoded.

    Raises:
        SourceError: a frame has more of them than `Limits.image_pixels`, all frames more than `Limits.volume_voxels`,
            they are fewer than announced where they are not compressed, or a compressed frame is of another size.
    """
    try:
        rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
        frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
        keyword = next((keyword for keyword in _PIXEL_DATA if keyword in header), None)
        bits = _FLOAT_BITS.get(keyword or "", 0) or int(header.get("BitsAllocated") or 0)
    except Exception:  # pydicom decodes values only now
        raise SourceError(f"{path}: its size (Rows, Columns, NumberOfFrames ...) is no whole number") from None
    check_image_size(columns, rows, path)
    check_amount(rows * columns * frames, "volume_voxels", path, f"pixels ({frames} frames of {columns} x {rows})")
    if keyword is None:
        return
    length = len(header[keyword].value or b"")
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and not syntax.is_transfer_syntax:
        raise SourceError(f"{path}: no readable DICOM file (its transfer syntax is not one)")
    if syntax is not None and syntax.is_compressed:
        _check_frame(header[keyword].value, (rows, columns), path)
        return
    # Subsampled colours (YBR_FULL_422) have two samples a pixel.
    samples = 2 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else samples
    expected = (rows * columns * frames * samples * bits + 7) // 8
    if length < expected:
        raise SourceError(
            f"{path}: its pixels cannot be decoded: {length} bytes of them where {columns} x {rows} pixels, {frames} "
            f"frames and {bits} bits need {expected}; the file is cut short or damaged"
        )


def _check_frame(value: bytes, size: tuple[int, int], path: str | os.PathLike) -> None:
    """Looks at the first frame, if it is a JPEG that Pillow knows: its own header decides what decoders allocate."""
    from PIL import Image

    encaps = import_medical("pydicom.encaps")
    try:
        frame = next(encaps.generate_frames(value, number_of_frames=1))
        with Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise SourceError(
            f"{path}: its pixels claim to be far more than Rows x Columns, {size[0]} x {size[1]}"
        ) from None
    except (OSError, SyntaxError, ValueError, StopIteration):
        return  # another codec, or damaged: the decoder says so
    if (height, width) != size:
        raise SourceError(f"{path}: a frame is {height} x {width} pixels, Rows and Columns say {size[0]} x {size[1]}")


def _check_deflated(path: str | os.PathLike) -> None:
    """A file of the deflated transfer syntax is inflated at once and in full: counts the bytes first."""
    with open(path, "rb") as file:
        head = file.read(1024)  # its meta information, which is never deflated
    if head[128:132] != b"DICM" or _DEFLATED not in head:
        return
    pydicom = import_medical("pydicom")
    group_length = pydicom.filereader.read_file_meta_info(path).get("FileMetaInformationGroupLength", 0)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    rest, total = read_bytes(path, "image_bytes")[_META_START + int(group_length) :], 0
    while rest and not inflate.eof:
        total += len(inflate.decompress(rest, 2**20))
        rest = inflate.unconsumed_tail
        check_amount(total, "image_bytes", path, "bytes when inflated")
