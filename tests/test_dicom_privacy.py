import io
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.curate import SourceError, digest_text, find_salt, hash_identifier
from data_pipelines.dicom_privacy import ALLOWED, check_burned_in, check_pixels, keep_allowed, read_header
from data_pipelines.limits import Limits, use_limits

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

# Some of the attributes that PS3.15's Table E.1-1 removes, empties or replaces, each with a value to look for.
SECRETS = {
    "PatientName": "Doe^Jane",
    "PatientID": "MRN-4711",
    "OtherPatientIDs": "OTHER-4712",
    "PatientBirthDate": "19610203",
    "PatientAge": "061Y",
    "PatientAddress": "1 Long Street",
    "AccessionNumber": "ACC-4713",
    "StudyDate": "20200102",
    "AcquisitionDateTime": "20200102112233",
    "StudyDescription": "Study of Doe",
    "SeriesDescription": "Series of Doe",
    "ImageComments": "Comment on Doe",
    "InstitutionName": "St. Elsewhere",
    "ReferringPhysicianName": "Roe^Richard",
    "OperatorsName": "Poe^Paul",
    "DeviceSerialNumber": "SN-4714",
    "StationName": "STATION-4715",
    "ProtocolName": "Protocol of Doe",
    "StudyInstanceUID": "1.2.3.4.1",
    "SeriesInstanceUID": "1.2.3.4.2",
    "SOPInstanceUID": "1.2.3.4.3",
    "FrameOfReferenceUID": "1.2.3.4.4",
}
REPLACED = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")


def new_file(syntax=ExplicitVRLittleEndian, size=(4, 6), frames=0, **fields) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, SECRETS["SOPInstanceUID"]
    meta.TransferSyntaxUID = syntax
    meta.SourceApplicationEntityTitle = "AE-4716"
    header = FileDataset("", {}, file_meta=meta, preamble=b"preamble of Doe".ljust(128, b"\0"))
    header.SOPClassUID, header.Modality = CTImageStorage, "CT"
    for keyword, value in {**SECRETS, **fields}.items():
        setattr(header, keyword, value)
    header.Rows, header.Columns, header.SamplesPerPixel = *size, 1
    if frames:
        header.NumberOfFrames = frames
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation, header.PhotometricInterpretation = 7, 0, "MONOCHROME2"
    header.PixelData = bytes(size[0] * size[1] * max(frames, 1))
    return header


def save(path, header):
    header.save_as(path, enforce_file_format=True)
    return path


def add_private(header: Dataset) -> None:
    block = header.private_block(0x0011, "VENDOR", create=True)
    block.add_new(0x01, "LO", "private Doe")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("pixels", [False, True])
def test_nothing_that_identifies_is_left(tmp_path, syntax, pixels):
    header = new_file(syntax)
    add_private(header)
    measures = Dataset()
    measures.PixelSpacing, measures.ImageComments = [1, 2], "nested Doe"
    add_private(measures)
    frame = Dataset()
    frame.PixelMeasuresSequence, frame.FrameComments = Sequence([measures]), "nested Doe"
    header.PerFrameFunctionalGroupsSequence = Sequence([frame])
    icon = Dataset()
    icon.BitsAllocated, icon.PixelData, icon.ImageComments = 8, b"icon of Doe!", "nested Doe"
    header.IconImageSequence = Sequence([icon])
    kept, identity = read_header(save(tmp_path / "Doe.dcm", header), "salt", pixels=pixels)
    for text in (str(kept), str(kept.file_meta), str(vars(kept)), str(identity)):
        found = [secret for secret in (*SECRETS.values(), "Doe", "AE-4716", "4714") if secret in text]
        assert not found
    assert kept.PerFrameFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [1, 2]
    assert (kept.Modality, kept.Rows, kept.Columns) == ("CT", 4, 6)
    assert ("PixelData" in kept) == pixels
    if pixels:
        assert kept.pixel_array.shape == (4, 6)


def test_no_attribute_of_the_profile_is_allowed():
    known = [keyword for keyword in ALLOWED if pydicom.datadict.tag_for_keyword(keyword) is None]
    assert not known and len(set(ALLOWED)) == len(ALLOWED)
    # Of these kinds Table E.1-1 has almost all: people, ages, dates, times and UIDs.
    kinds = {keyword: pydicom.datadict.dictionary_VR(keyword) for keyword in ALLOWED}
    assert [k for k, kind in kinds.items() if kind in ("PN", "AS", "DA", "TM", "DT", "UI")] == ["SOPClassUID"]
    assert not set(SECRETS) & set(ALLOWED)


@given(st.sampled_from(sorted(pydicom.datadict.keyword_dict)))
@settings(max_examples=100)
def test_any_attribute_is_kept_only_if_it_is_allowed(keyword):
    dataset = Dataset()
    tag = pydicom.datadict.tag_for_keyword(keyword)
    dataset[tag] = pydicom.DataElement(tag, pydicom.datadict.dictionary_VR(tag)[:2], None)
    kept = {element.keyword for element in keep_allowed(dataset)}
    pixels = {"PixelData", "FloatPixelData", "DoubleFloatPixelData"}
    assert kept == ({keyword} if keyword in {*ALLOWED, *pixels} else set())


def test_ids_are_hashed_with_the_salt_and_kinds_differ(tmp_path):
    path = save(tmp_path / "a", new_file())
    _, identity = read_header(path, "salt")
    assert identity.patient == digest_text("salt/patient/MRN-4711").hex()[:16]
    assert identity == read_header(path, "salt")[1]
    hashes = {identity.patient, identity.study, identity.series, identity.instance}
    other = read_header(path, "pepper")[1]
    assert len(hashes | {other.patient, other.study, other.series, other.instance}) == 8
    assert hash_identifier("patient", "1", "s") != hash_identifier("series", "1", "s")
    assert hash_identifier("patient", " MRN ", "s") == hash_identifier("patient", "MRN", "s")
    assert hash_identifier("patient", None, "s") == hash_identifier("patient", "", "s") == ""


def test_salt_is_the_environments_or_the_name_of_the_data_set(monkeypatch):
    monkeypatch.delenv("MEDGLIP_PATIENT_SALT", raising=False)
    assert find_salt("scans") == "scans"
    monkeypatch.setenv("MEDGLIP_PATIENT_SALT", "secret")
    assert find_salt("scans") == "secret"


def test_odd_ids_are_not_written_to_the_log(tmp_path, caplog, recwarn):
    header = new_file()
    header["SeriesInstanceUID"] = pydicom.DataElement("SeriesInstanceUID", "UI", "Doe", validation_mode=0)
    header["PatientID"] = pydicom.DataElement("PatientID", "LO", "Doe" * 30, validation_mode=0)
    usual = pydicom.config.settings.reading_validation_mode
    _, identity = read_header(save(tmp_path / "a", header), "salt")
    assert identity.series == hash_identifier("series", "Doe", "salt")
    assert not any("Doe" in text for text in (caplog.text, *(str(warning.message) for warning in recwarn)))
    assert pydicom.config.settings.reading_validation_mode == usual


def test_series_that_an_annotation_labels_is_hashed_like_the_series(tmp_path):
    reference = Dataset()
    reference.SeriesInstanceUID = SECRETS["SeriesInstanceUID"]
    path = save(tmp_path / "a", new_file(ReferencedSeriesSequence=Sequence([reference])))
    kept, identity = read_header(path, "salt")
    assert identity.labelled_series == identity.series != ""
    assert "ReferencedSeriesSequence" not in kept


def test_damaged_files_are_errors_that_quote_nothing(tmp_path):
    whole = save(tmp_path / "a.dcm", new_file()).read_bytes()
    for content in (b"", whole[:-5], b"no DICOM, by Doe"):
        (tmp_path / "a.dcm").write_bytes(content)
        with pytest.raises(SourceError, match=r"a\.dcm: ") as error:
            read_header(tmp_path / "a.dcm", pixels=True)
        assert "Doe" not in str(error.value)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_file_with_wrong_bytes_is_read_or_refused(tmp_path_factory, data):
    stream = io.BytesIO()
    new_file().save_as(stream, enforce_file_format=True)
    content = bytearray(stream.getvalue())
    places = st.integers(128, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.dcm"
    path.write_bytes(content)
    try:
        header, _ = read_header(path, "salt", pixels=True)
        check_burned_in(header, path)
    except SourceError:
        return
    allowed = {pydicom.datadict.tag_for_keyword(keyword) for keyword in (*ALLOWED, "PixelData")}
    assert {int(tag) for tag in header.keys()} <= allowed  # noqa: SIM118


@pytest.mark.parametrize("value", ["YES", "yes "])
def test_burned_in_text_is_refused_unless_allowed(value):
    header = {"BurnedInAnnotation": value}
    with pytest.raises(
        SourceError, match=r"a\.dcm: .*BurnedInAnnotation YES.*allow it \(--limits allow_burned_in=true\)"
    ):
        check_burned_in(header, "a.dcm")
    (note,) = check_burned_in(header, "a.dcm", allow=True)
    with use_limits(Limits(allow_burned_in=True)):
        assert check_burned_in(header, "a.dcm") == (note,)
    assert "allowed" in note


def test_what_is_not_said_and_faces_are_noted():
    silent, said, face = Dataset(), Dataset(), Dataset()
    said.BurnedInAnnotation = face.BurnedInAnnotation = "NO"
    face.RecognizableVisualFeatures = "YES"
    assert [len(check_burned_in(header, "a")) for header in (silent, said, face)] == [1, 0, 1]
    assert check_burned_in(silent, "a") != check_burned_in(face, "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"Rows": 65535, "Columns": 65535}, r"pixels \(65535 x 65535\) are more .* raise the limit image_pixels"),
        ({"NumberOfFrames": 10**9}, "raise the limit volume_voxels"),
        ({"NumberOfFrames": -1}, "NumberOfFrames -1, SamplesPerPixel 1 and BitsAllocated 8 are of no image"),
        ({"SamplesPerPixel": 60000}, "SamplesPerPixel 60000 .* no image"),
        ({"Rows": 100}, "24 bytes of them where 6 x 100 pixels, 1 frames and 8 bits need 600"),
        ({"NumberOfFrames": 3}, "24 bytes of them .* need 72"),
        ({"BitsAllocated": 16}, "need 48"),
    ],
)
def test_pixels_that_are_not_what_the_header_says_are_refused(tmp_path, fields, message):
    header = new_file()
    for keyword, value in fields.items():
        setattr(header, keyword, value)
    with pytest.raises(SourceError, match=f"a.dcm: .*{message}"):
        read_header(save(tmp_path / "a.dcm", header), pixels=True)


@pytest.mark.parametrize(("name", "syntax"), [("JPEG", JPEGBaseline8Bit), ("JPEG2000", JPEG2000Lossless)])
def test_compressed_frame_of_another_size_is_refused(tmp_path, name, syntax):
    stream = io.BytesIO()
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(stream, name)
    header = new_file(syntax, size=(40, 30))
    header.PixelData = encapsulate([stream.getvalue()])
    header["PixelData"].is_undefined_length = True
    kept, _ = read_header(save(tmp_path / "a.dcm", header), pixels=True)
    assert kept.Rows == 40
    kept.Rows = 20
    with pytest.raises(SourceError, match="a frame is 40 x 30 pixels, Rows and Columns say 20 x 30"):
        check_pixels(kept, "a.dcm")


def compressed(tmp_path, syntax, *frames, size=(40, 30), **elements):
    """The header of a file of encoded frames, as it is read."""
    header = new_file(syntax, size=size)
    header.NumberOfFrames = len(frames)
    for keyword, value in elements.items():
        setattr(header, keyword, value)
    header.PixelData = encapsulate(list(frames), has_bot=False)
    header["PixelData"].is_undefined_length = True
    return read_header(save(tmp_path / "a.dcm", header), pixels=True)[0]


def jpeg_ls(rows: int, columns: int, components: int = 1) -> bytes:
    """The beginning of a JPEG-LS frame, with a comment before its header."""
    comment = b"\xff\xfe\x00\x04ab"
    return b"\xff\xd8" + comment + b"\xff\xf7" + struct.pack(">HBHHB", 11, 8, rows, columns, components) + bytes(9)


def test_every_compressed_frame_is_measured_before_it_is_decoded(tmp_path):
    assert compressed(tmp_path, JPEGLSLossless, jpeg_ls(40, 30), jpeg_ls(40, 30)).Rows == 40
    with pytest.raises(SourceError, match="a frame is 65535 x 65535 pixels, Rows and Columns say 40 x 30"):
        compressed(tmp_path, JPEGLSLossless, jpeg_ls(40, 30), jpeg_ls(65535, 65535))
    with pytest.raises(SourceError, match="a frame has 200 components, SamplesPerPixel is 1"):
        compressed(tmp_path, JPEGLSLossless, jpeg_ls(40, 30, 200))
    assert compressed(tmp_path, JPEGLSLossless, b"\xff\xd8no JPEG").Rows == 40  # which the decoder says


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, HTJ2KLossless, ExplicitVRLittleEndian]
)
def test_declared_size_is_compared_with_the_limits_whatever_the_transfer_syntax(tmp_path, syntax):
    limits, colours = Limits(volume_voxels=40 * 30 * 5), {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    with (
        use_limits(limits),
        pytest.raises(SourceError, match=r"values \(2 frames of 30 x 40 pixels of 3\) .*volume_voxels"),
    ):
        compressed(tmp_path, syntax, b"frame!", b"frame!", **colours)


def test_runs_of_another_size_are_refused(tmp_path):
    zeros = struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\x00" * 10
    assert compressed(tmp_path, RLELossless, zeros).Rows == 40
    with pytest.raises(SourceError, match="a frame is 20064 bytes of RLE, its pixels need 2528 at most"):
        compressed(tmp_path, RLELossless, zeros[:64] + b"\x81\x00" * 10_000)


def test_deflated_file_is_measured_before_it_is_inflated(tmp_path):
    path = save(tmp_path / "a.dcm", new_file(DeflatedExplicitVRLittleEndian, size=(2000, 2000)))
    assert path.stat().st_size < 20_000
    assert read_header(path)[0].Rows == 2000
    with use_limits(Limits(image_bytes=3_000_000)), pytest.raises(SourceError, match=r"a\.dcm: .*bytes when inflated"):
        read_header(path)


def test_header_can_be_pickled(tmp_path):
    header, identity = read_header(save(tmp_path / "a", new_file()), "salt")
    again, same = pickle.loads(pickle.dumps((header, identity)))
    assert (again.Rows, same) == (4, identity)
