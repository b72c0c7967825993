"""What is read of DICOM files: an allow-list of attributes that identify nobody, and hashes in the place of ids.

DICOM PS3.15 Annex E, Table E.1-1 (Basic Application Level Confidentiality Profile) lists the attributes that identify
people: names, ids, dates, places, devices, UIDs, free text and private attributes. A list of what to drop is out of
date with every new edition, so this one says what to keep: how pixels are coded, where they lie, and what they show.
Everything else never leaves the parser.

Two of the kept attributes are text that people type: ROIName, which the profile empties, and SegmentLabel. They name
the structures and become phrases, in which `medglip data audit` looks for names, dates and numbers.
"""

import dataclasses
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.curate import SourceError, hash_identifier
from data_pipelines.limits import check_amount, check_image_size, current_limits, read_bytes
from data_pipelines.volumes import import_medical

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
_RLE = "1.2.840.10008.1.2.5"
_RLE_HEADER = 128  # bytes, with what pads 15 segments
_MOST_RLE = 2  # bytes that a byte of pixels may take: runs of one are the worst that PackBits allows
_SAMPLES = (1, 3, 4)
_MOST_BITS = 64  # of a sample
# Markers of a JPEG frame header (SOF0 to SOF15 without DHT, JPG and DAC; SOF55 is JPEG-LS), and those without a length.
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_JPEG2000 = b"\xff\x4f\xff\x51"  # start of codestream, size
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
        SourceError: a frame has more of them than `Limits.image_pixels`, all samples of all frames are more than
            `Limits.volume_voxels`, they are fewer than announced where they are not compressed, or a compressed frame
            is of another size.
    """
    try:
        rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
        frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
        keyword = next((keyword for keyword in _PIXEL_DATA if keyword in header), None)
        bits = _FLOAT_BITS.get(keyword or "", 0) or int(header.get("BitsAllocated") or 0)
    except Exception:  # pydicom decodes values only now
        raise SourceError(f"{path}: its size (Rows, Columns, NumberOfFrames ...) is no whole number") from None
    if frames < 1 or samples not in _SAMPLES or bits > _MOST_BITS:
        raise SourceError(
            f"{path}: NumberOfFrames {frames}, SamplesPerPixel {samples} and BitsAllocated {bits} are of no image"
        )
    check_image_size(columns, rows, path)
    what = f"values ({frames} frames of {columns} x {rows} pixels of {samples})"
    check_amount(rows * columns * samples * frames, "volume_voxels", path, what)
    if keyword is None:
        return
    length = len(header[keyword].value or b"")
    syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and not syntax.is_transfer_syntax:
        raise SourceError(f"{path}: no readable DICOM file (its transfer syntax is not one)")
    if syntax is not None and syntax.is_compressed:
        declared = rows * columns * samples * -(-bits // 8)
        most = _MOST_RLE * declared + _RLE_HEADER if syntax == _RLE else None
        for frame in _list_frames(header[keyword].value, frames):
            _check_frame(frame, (rows, columns, samples), most, path)
        return
    # Subsampled colours (YBR_FULL_422) have two samples a pixel.
    samples = 2 if header.get("PhotometricInterpretation") == "YBR_FULL_422" else samples
    expected = (rows * columns * frames * samples * bits + 7) // 8
    if length < expected:
        raise SourceError(
            f"{path}: its pixels cannot be decoded: {length} bytes of them where {columns} x {rows} pixels, {frames} "
            f"frames and {bits} bits need {expected}; the file is cut short or damaged"
        )


def _list_frames(value: bytes, count: int) -> Iterator[bytes]:
    """Yields the encoded frames as far as they can be told apart; what is damaged, the decoder names."""
    encaps = import_medical("pydicom.encaps")
    try:
        yield from encaps.generate_frames(value, number_of_frames=count)
    except (ValueError, StopIteration, struct.error):
        return


def _check_frame(frame: bytes, declared: tuple[int, int, int], most: int | None, path: str | os.PathLike) -> None:
    """Compares a frame's own header, which decides what decoders allocate, with (rows, columns, samples).

    RLE has no such header and grows to 64 times its bytes: `most` is how many of them the pixels can need.
    """
    if most is not None and len(frame) > most:
        raise SourceError(f"{path}: a frame is {len(frame)} bytes of RLE, its pixels need {most} at most")
    found = None if most is not None else _read_frame_size(frame)
    if found is None:  # another codec, or damaged: the decoder says so
        return
    rows, columns, samples = declared
    if found[:2] != (rows, columns):
        raise SourceError(f"{path}: a frame is {found[0]} x {found[1]} pixels, Rows and Columns say {rows} x {columns}")
    if found[2] > samples:
        raise SourceError(f"{path}: a frame has {found[2]} components, SamplesPerPixel is {samples}")


def _read_frame_size(frame: bytes) -> tuple[int, int, int] | None:
    """Returns (rows, columns, components) of a JPEG, JPEG-LS or JPEG 2000 frame, None if it does not say."""
    if frame.startswith(b"\xff\xd8"):
        return _read_jpeg_size(frame)
    start = frame.find(_JPEG2000, 0, 2**16)  # behind the boxes of a .jp2 file, which some put into DICOM
    if start < 0 or len(frame) < start + 42:
        return None
    _, _, right, bottom, left, top, *_, components = struct.unpack_from(">HHIIIIIIIIH", frame, start + 4)
    return bottom - top, right - left, components


def _read_jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    place = 2
    while place + 10 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in _FRAME_HEADERS:
            _, _, rows, columns, components = struct.unpack_from(">HBHHB", frame, place + 2)
            return rows, columns, components
        if marker == 0xFF:  # a byte that fills
            place += 1
        elif marker in _BARE_MARKERS:
            place += 2
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None


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
