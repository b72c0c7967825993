"""DICOM series with labels beside them."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.limits import Limits, use_limits
from data_pipelines.sources import detect_source
from data_pipelines.sources.dicom import DICOM, read_pixels

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import SegmentationStorage  # noqa: E402

from tests.sources.series_files import (  # noqa: E402
    AXIAL,
    PATIENT,
    SERIES,
    new_file,
    read,
    set_pixels,
    slice_file,
    write_case,
    write_labels,
    write_series,
)
from tests.sources.volume_body import affine_of, draw_body, facts  # noqa: E402


@pytest.mark.parametrize("codes", [AXIAL, "IPL", "SAR", "PIL", "LIP", "RSA"])
def test_series_gives_the_same_examples_as_a_nifti_file_of_the_same_anatomy(tmp_path, codes):
    folder = write_case(tmp_path / "dicom", codes)
    nifti = write_labels(tmp_path / "nifti" / "a")
    nibabel.save(nibabel.Nifti1Image(draw_body()[0], affine_of()), nifti / "ct.nii.gz")
    found = [facts(example) for example in read(folder)]
    assert len(found) == 25
    assert found == [facts(example) for example in read(nifti.parent, "nifti")]


def test_layout_is_recognized_by_content(tmp_path):
    assert detect_source(write_case(tmp_path)) == "dicom"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.dcm").write_text("no")
    assert len(read(tmp_path)) == 25
    assert not DICOM.matches(tmp_path / "other")


def test_patient_and_series_are_hashed_with_a_salt(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDGLIP_PATIENT_SALT", raising=False)
    folder = write_case(tmp_path)
    example = read(folder)[0]
    assert not any(secret in str(example) for secret in (PATIENT, SERIES, "Doe", str(tmp_path)))
    assert (read(folder)[0].image_id, read(folder)[0].patient_id) == (example.image_id, example.patient_id)
    monkeypatch.setenv("MEDGLIP_PATIENT_SALT", "secret")
    salted = read(folder)[0]
    assert salted.patient_id != example.patient_id and salted.image_id != example.image_id


def test_series_of_one_patient_share_the_patient_but_not_the_images(tmp_path):
    for name in ("1", "2"):
        write_series(tmp_path / name / "series", series=f"1.2.{name}")
        write_labels(tmp_path / name)
    source = read(tmp_path)
    assert len({example.patient_id for example in source}) == 1
    assert len({example.image_id for example in source}) == len(source) == 50


def test_labels_go_to_the_series_that_lies_there(tmp_path):
    folder = write_case(tmp_path)
    write_series(tmp_path / "thinner", series="1.2.9", values=draw_body()[0][:, :, :10])
    source = read(folder)
    assert len(source) == 25
    assert len(source.unused) == 1 and "not the series of the labels" in source.unused[0]


def test_series_without_labels_is_unused(tmp_path):
    folder = write_case(tmp_path / "labelled").parent
    write_series(tmp_path / "bare", series="1.2.9")
    source = read(folder)
    assert len(source) == 25
    assert len(source.unused) == 1 and "20 images of a series without labels" in source.unused[0]
    with pytest.raises(SourceError, match="no DICOM series with labels"):
        read(tmp_path / "bare")


def edit(path: pathlib.Path, **changes) -> None:
    header = pydicom.dcmread(path)
    for keyword, value in changes.items():
        setattr(header, keyword, value) if value is not None else delattr(header, keyword)
    header.save_as(path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: slice_file(f, 7).unlink(), r"CT\.\d+ and .*CT\.\d+ are 10 mm apart, other neighbours .* 5 mm"),
        (lambda f: edit(slice_file(f, 7), ImagePositionPatient=[48, 12, -263]), "are missing or their spacing"),
        (lambda f: edit(slice_file(f, 7), ImagePositionPatient=[48, 12, -270]), "at the same place"),
        (
            lambda f: edit(slice_file(f, 7), ImageOrientationPatient=[1, 0, 0, 0, 0, -1]),
            "ImageOrientationPatient .* differs",
        ),
        (lambda f: edit(slice_file(f, 7), PixelSpacing=[1, 1]), "PixelSpacing .* differs"),
        (lambda f: edit(slice_file(f, 7), ImagePositionPatient=None), "has no ImagePositionPatient"),
        (lambda f: edit(slice_file(f, 7), NumberOfFrames=3), "several frames"),
        (lambda f: edit(slice_file(f, 7), PixelData=None), "has no PixelData"),
        (lambda f: slice_file(f, 7).write_bytes(slice_file(f, 7).read_bytes()[:-100]), "cannot be decoded"),
        (lambda f: write_labels(f.parent, draw_body()[1][:, :-1]), "20 x 44 x 32 voxels .* image 20 x 45 x 32"),
    ],
)
def test_bad_series_are_errors_that_name_the_file(tmp_path, break_it, message):
    folder = write_case(tmp_path)
    break_it(folder / "series")
    with pytest.raises(SourceError, match=message) as error:
        read(folder)[0]
    assert str(tmp_path) in str(error.value)


def test_damaged_header_is_an_error(tmp_path):
    folder = write_case(tmp_path)
    path = slice_file(folder / "series", 3)
    path.write_bytes(path.read_bytes()[:150])
    source = read(folder)
    assert source.unused == [f"{path}: is neither an image nor an annotation of one"]
    with pytest.raises(SourceError, match="10 mm apart"):
        source[0]


def test_burned_in_text_is_refused_for_its_series_unless_allowed(tmp_path):
    for name in ("1", "2"):
        write_series(tmp_path / name / "series", series=f"1.2.{name}")
        write_labels(tmp_path / name)
    edit(slice_file(tmp_path / "1/series", 7), BurnedInAnnotation="YES")
    edit(slice_file(tmp_path / "2/series", 7), BurnedInAnnotation="NO", RecognizableVisualFeatures="YES")
    source = read(tmp_path)
    assert len(source) == 26
    with pytest.raises(SourceError, match=r"1/series/CT\.\d+: .*BurnedInAnnotation YES"):
        source[0]
    assert sorted(source.notes.values()) == [1, 38]
    with use_limits(Limits(allow_burned_in=True)):
        assert len(read(tmp_path)) == 50
        assert sorted(read(tmp_path).notes.values()) == [1, 1, 38]


def test_file_that_cannot_be_read_is_one_item_and_leaves_the_series(tmp_path):
    folder = write_case(tmp_path)
    other = folder / "bad.dcm"
    other.write_bytes(slice_file(folder / "series", 0).read_bytes())
    edit(other, SeriesInstanceUID="1.2.9")
    other.write_bytes(other.read_bytes().replace(b"2.0\\3.0", b"x.0\\3.0"))
    (folder / "empty").write_bytes(b"")
    source = read(folder)
    assert len(source) == 26
    with pytest.raises(SourceError, match=r"bad\.dcm: its place in the volume cannot be read"):
        source[25]
    assert source[24].regions


def test_annotation_that_refers_to_nothing_leaves_the_others(tmp_path):
    write_case(tmp_path)
    header = new_file(SegmentationStorage, "SEG", "1.2.77")
    header.ReferencedSeriesSequence = Sequence([Dataset()])
    header.save_as(tmp_path / "seg.dcm")
    source = read(tmp_path)
    assert len(source) == 25
    assert source.unused == [f"{tmp_path / 'seg.dcm'}: refers to a series that is not here"]


def test_series_of_too_many_voxels_is_refused(tmp_path):
    folder = write_case(tmp_path)
    with use_limits(Limits(volume_voxels=1000)), pytest.raises(SourceError, match="raise the limit volume_voxels"):
        read(folder)[0]


def test_radiographs_are_no_volumes(tmp_path):
    header = new_file(modality="DX")
    set_pixels(header, np.zeros((9, 9), np.uint8))
    header.save_as(tmp_path / "a.dcm")
    with pytest.raises(SourceError, match="no DICOM series with labels"):
        read(tmp_path)


def test_large_values_are_bright_whatever_the_photometric_interpretation(tmp_path):
    ramp = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = tmp_path / "a.dcm"

    def values(pixels, photometric, modality="MR", **fields):
        header = new_file(modality=modality)
        set_pixels(header, pixels, photometric)
        for keyword, value in fields.items():
            setattr(header, keyword, value)
        header.save_as(path)
        return read_pixels(path, (3, 4))

    np.testing.assert_array_equal(values(ramp, "MONOCHROME2", RescaleSlope=2, RescaleIntercept=-5), ramp * 2.0 - 5)
    np.testing.assert_array_equal(values(ramp, "MONOCHROME1"), -ramp.astype(float))
    np.testing.assert_array_equal(values(ramp, "MONOCHROME1", "CT"), ramp)  # Hounsfield units stay
    color = np.stack([ramp * 20, np.zeros_like(ramp), np.zeros_like(ramp)], axis=-1)
    np.testing.assert_allclose(values(color, "RGB"), ramp * 20 * 0.299)
    luma = np.stack([ramp * 20, np.full_like(ramp, 128), np.full_like(ramp, 128)], axis=-1)
    np.testing.assert_allclose(values(luma, "YBR_FULL"), ramp * 20, atol=1)
    table = np.arange(0, 2**16, 2**8, dtype=np.uint16)[::-1]
    lookup = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 16] for c in ("Red", "Green", "Blue")}
    lookup |= {f"{c}PaletteColorLookupTableData": table.tobytes() for c in ("Red", "Green", "Blue")}
    np.testing.assert_allclose(values(ramp, "PALETTE COLOR", **lookup), table[ramp])


@pytest.fixture(scope="module")
def real_series(shared_dir):
    folder = shared_dir / "data" / "totalsegmentator" / "ct_dicom"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    assert detect_source(folder) == "dicom"
    return read(folder)


def test_real_series_has_bones_under_the_labels_of_bones(real_series):
    case, *_ = real_series._items[0]
    volume, (labels, grid) = case.read_volume(), case.read_labels()
    assert (volume.grid.shape, volume.values.dtype, volume.modality) == ((20, 512, 512), np.int16, "ct")
    np.testing.assert_allclose(grid.spacing, (2, 0.9765625, 0.9765625))
    bones = [value for value, name in labels.names.items() if name.startswith(("vertebrae", "rib", "humerus"))]
    bone = np.isin(labels.layers[0], bones)
    assert bone.sum() > 10_000
    assert np.median(volume.values[bone]) > 180
    for mirrored in (bone[::-1], bone[:, ::-1], bone[:, :, ::-1]):
        assert np.median(volume.values[mirrored]) < 0.6 * np.median(volume.values[bone])


def test_real_series_is_hung_as_radiologists_do(real_series):
    assert [example.image_id.split("/", 1)[1] for example in real_series] == [f"axial/{i}" for i in (2, 7, 12, 17)]
    for example in real_series:
        pixels = np.asarray(Image.open(io.BytesIO(example.image)))
        assert pixels.shape == (example.height, example.width) == (512, 512)
        boxes = {region.label: region.box for region in example.regions}
        assert boxes["liver"][[0, 2]].mean() < 256 < boxes["spleen"][[0, 2]].mean()
        assert next(box for label, box in boxes.items() if {"humerus", "right"} <= {*label.split("_")})[0] < 100
        spine = next(box for label, box in boxes.items() if label.startswith("vertebra"))
        assert spine[1] > boxes["liver"][1] + 60


def test_real_series_keeps_no_identifiers(real_series):
    headers = real_series._items[0][0].series.headers
    assert not any(path.name in str(example) for example in real_series for path, _ in headers)
