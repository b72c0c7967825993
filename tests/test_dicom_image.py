import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.curate import SourceError, hash_identifier
from data_pipelines.dicom_image import store_dicom

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.pixels import apply_windowing, convert_color_space  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from tests.sources.radiographs import PATIENT, RAMP, write_radiograph  # noqa: E402

WHOLE = {"WindowCenter": 2048, "WindowWidth": 4096}


def read(path, **options):
    image = store_dicom(path, dataset="chests", **options)
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded)))
    assert pixels.shape[:2] == (image.height, image.width)
    return image, pixels


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_all_encodings_give_the_same_picture(tmp_path, syntax):
    _, pixels = read(write_radiograph(tmp_path / "a.dcm", syntax=syntax, **WHOLE))
    np.testing.assert_array_equal(pixels, np.rint(RAMP / 4095 * 255))


@settings(max_examples=25)
@given(center=st.floats(-3000, 5000), width=st.floats(2, 8000), slope=st.floats(0.5, 2), kind=st.integers(0, 2))
def test_window_is_what_pydicom_computes(tmp_path_factory, center, width, slope, kind):
    function = ("LINEAR", "LINEAR_EXACT", "SIGMOID")[kind]
    elements = {"RescaleSlope": f"{slope:.4f}", "RescaleIntercept": -1024, "VOILUTFunction": function}
    elements |= {"WindowCenter": f"{center:.3f}", "WindowWidth": f"{width:.3f}"}
    path = write_radiograph(tmp_path_factory.mktemp("window") / "a.dcm", **elements)
    header = pydicom.dcmread(path)
    factor, low = float(header.RescaleSlope), -1024
    shown = apply_windowing(RAMP * factor + low, header)
    expected = (shown - low) / (4095 * factor) * 255
    assert np.abs(read(path)[1] - expected).max() <= 0.51


def test_first_of_several_windows_counts(tmp_path):
    path = write_radiograph(tmp_path / "a.dcm", WindowCenter=[1000.5, 3000], WindowWidth=[3, 500])
    np.testing.assert_array_equal(read(path)[1] > 127, RAMP >= 1001)


def test_monochrome1_is_inverted_and_padding_is_black(tmp_path):
    path = write_radiograph(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0, **WHOLE)
    expected = np.rint(255 - RAMP / 4095 * 255)
    expected[RAMP == 0] = 0
    np.testing.assert_allclose(read(path)[1], expected, atol=1)
    assert read(path)[1][0, 0] == 0


def test_without_a_window_percentiles_without_the_padding_are_black_and_white(tmp_path):
    values = np.full((20, 20), 4095, np.uint16)
    values[5:15, 5:15] = np.arange(100).reshape(10, 10) + 1000
    padding = {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 4095}
    for elements in (padding, *({**padding, "WindowCenter": 0, "WindowWidth": width} for width in (0, -50))):
        _, pixels = read(write_radiograph(tmp_path / "a.dcm", values, **elements))
        assert (pixels[5, 5], pixels[14, 14], pixels[0, 0]) == (0, 255, 0)
        assert abs(int(pixels[10, 5]) - 128) <= 2


def test_voi_table_comes_before_the_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 12]
    table.add_new("LUTData", "US", [4095 - i for i in range(4096)])
    path = write_radiograph(tmp_path / "a.dcm", VOILUTSequence=[table], **WHOLE)
    np.testing.assert_array_equal(read(path)[1], np.rint((4095 - RAMP) / 4095 * 255))


@pytest.mark.parametrize(("pixels", "stored"), [(np.int16, 16), (np.uint8, 8)])
def test_signed_and_8_bit_values(tmp_path, pixels, stored):
    values = (np.arange(100).reshape(10, 10) - (50 if pixels is np.int16 else 0)).astype(pixels)
    path = write_radiograph(
        tmp_path / "a.dcm", values, stored=stored, WindowCenter=int(values.min()) + 50, WindowWidth=100
    )
    np.testing.assert_array_equal(read(path)[1], np.rint(np.arange(100).reshape(10, 10) / 99 * 255))


def test_colours_are_rgb(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    np.testing.assert_array_equal(read(write_radiograph(tmp_path / "a.dcm", colours))[1], colours)
    other = convert_color_space(colours, "RGB", "YBR_FULL")
    path = write_radiograph(tmp_path / "b.dcm", other, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(read(path)[1], colours, atol=3)


def test_palette_is_looked_up(tmp_path):
    elements: dict = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, values in zip(("Red", "Green", "Blue"), ([0, 255], [0, 16], [9, 0]), strict=True):
        elements[f"{channel}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        elements[f"{channel}PaletteColorLookupTableData"] = np.asarray(values, np.uint16).__lshift__(8).tobytes()
    path = write_radiograph(tmp_path / "a.dcm", np.asarray([[0, 1]], np.uint8), stored=8, **elements)
    assert read(path)[1].tolist() == [[[0, 0, 9], [255, 16, 0]]]


def test_header_gives_spacing_modality_and_a_salted_patient(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGLIP_PATIENT_SALT", "secret")
    image, _ = read(write_radiograph(tmp_path / "a.dcm", ImagerPixelSpacing=[0.2, 0.1]))
    assert (image.spacing_mm, image.modality) == ((0.2, 0.1), "xray")
    assert image.patient_id == hash_identifier("patient", PATIENT, "secret")
    assert PATIENT not in repr(image) and "Doe" not in repr(image)
    path = write_radiograph(tmp_path / "b.dcm", ImagerPixelSpacing=[0.2, 0.1], PixelSpacing=[0.3, 0.3], Modality="US")
    assert (read(path)[0].spacing_mm, read(path)[0].modality) == ((0.3, 0.3), "ultrasound")
    bare, _ = read(write_radiograph(tmp_path / "c.dcm", PatientID=None, SeriesInstanceUID=None, Modality="OT"))
    assert (bare.spacing_mm, bare.patient_id, bare.modality) == ((0.0, 0.0), "", "")


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2}, "holds 2 frames"),
        ({"PixelData": None}, "has no PixelData"),
        ({"BurnedInAnnotation": "YES"}, "burned into its pixels"),
        ({"PixelData": RAMP.tobytes()[:100]}, "its pixels cannot be decoded"),
        ({"PhotometricInterpretation": None}, "its pixels cannot be decoded"),
    ],
)
def test_unusable_file_is_an_error_that_names_it(tmp_path, elements, message):
    path = write_radiograph(tmp_path / "a.dcm", **elements)
    with pytest.raises(SourceError, match=f"a.dcm: .*{message}"):
        store_dicom(path, dataset="chests")


def test_images_of_a_study_without_patient_share_the_hash_of_the_study(tmp_path):
    paths = [write_radiograph(tmp_path / name, PatientID=None, StudyInstanceUID="1.2.3") for name in ("a.dcm", "b.dcm")]
    first, second = (read(path)[0].patient_id for path in paths)
    assert first == second == hash_identifier("study", "1.2.3", "chests")


def test_other_size_missing_and_damaged_files_are_errors(tmp_path):
    path = write_radiograph(tmp_path / "a.dcm")
    with pytest.raises(SourceError, match=r"the image is 40 x 30 pixels, its annotation says 60 x 50"):
        store_dicom(path, dataset="chests", annotated_size=(50, 60))
    path.write_bytes(b"no DICOM")
    for name in ("a.dcm", "b.dcm"):
        with pytest.raises(SourceError, match=f"{name}: "):
            store_dicom(tmp_path / name, dataset="chests")


def test_real_slices_in_jpeg_2000(shared_dir):
    path = min((shared_dir / "data/totalsegmentator/ct_dicom/series").iterdir())
    image, pixels = read(path)
    assert (image.modality, image.height, image.width) == ("ct", 512, 512)
    assert min(image.spacing_mm) > 0.3 and pixels.std() > 20
