"""Label maps of volumes: what lies in a voxel of the input comes back in that voxel, however the input is stored."""

import itertools
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from data_pipelines import volumes
from data_pipelines.curate import SourceError
from data_pipelines.sources.dicom import read_series
from data_pipelines.sources.masks import encode_mask
from data_pipelines.sources.nifti_files import open_volume, read_multilabel
from data_pipelines.volumes import Grid, Volume
from medglip_jax.predict import Prediction
from medglip_jax.volume_masks import choose_plane, label_file, label_volume, value_range
from tests.sources.series_files import read, write_series
from tests.sources.volume_body import affine_of, draw_body, turn_to

CODES = ["".join(codes) for axes in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*axes)]


class Bright:
    """A model that finds the first phrase where a picture is bright, and the others where its upper half is."""

    def __init__(self, kind="phrases"):
        self.config = SimpleNamespace(model=SimpleNamespace(masks=SimpleNamespace(kind=kind)))
        self.sizes = set()

    def predict(self, pictures, phrases, *, threshold, batch_size):
        return [self._find(picture, phrases) for picture in pictures]

    def _find(self, picture, phrases):
        self.sizes.add(picture.shape)
        first = picture > 127
        upper = first & (np.arange(len(picture)) < len(picture) // 2)[:, None]
        masks = {phrase: encode_mask(upper if k else first) for k, phrase in enumerate(phrases)}
        if self.config.model.masks.kind == "boxes":
            return Prediction(
                np.zeros((len(phrases), 4)), np.ones(len(phrases)), list(phrases), masks=[*masks.values()]
            )
        return Prediction(np.zeros((0, 4)), np.zeros(0), [], phrase_masks=masks)


def rotation(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


@settings(max_examples=25)
@given(
    codes=st.sampled_from(CODES),
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.5, 2.9, 5.0])] * 3),
    degrees=st.sampled_from([0, 11, -19]),
    plane=st.sampled_from(["auto", "axial", "coronal", "sagittal"]),
    seed=st.integers(0, 99),
)
def test_a_label_comes_back_voxel_for_voxel(tmp_path_factory, codes, spacing, degrees, plane, seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((9, 8, 7)) < 0.4  # no two voxels of it tell each other
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation(degrees) @ np.diag(spacing), (-30, 12, 99)
    values, affine = turn_to(codes, truth.astype(np.int16) * 700 - 100, affine)
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_sform(affine, code=2)
    image.header.set_qform(affine, code=1)
    folder = tmp_path_factory.mktemp("volume")
    nibabel.save(image, folder / "image.nii.gz")
    counts = label_file(Bright(), str(folder / "image.nii.gz"), str(folder / "out.nii.gz"), ["liver"], plane=plane)
    assert counts == {"liver": truth.sum()}
    written = nibabel.load(folder / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), values > 0)
    stored = nibabel.load(folder / "image.nii.gz")
    np.testing.assert_array_equal(written.affine, stored.affine)
    for name in ("sform_code", "qform_code", "pixdim"):
        np.testing.assert_array_equal(written.header[name], stored.header[name])


@given(st.sampled_from(CODES), st.tuples(*[st.integers(1, 5)] * 3))
def test_restoring_undoes_the_turn(codes, shape):
    values = np.arange(np.prod(shape)).reshape(shape)
    stored, affine = turn_to(codes, values)
    turn, grid = volumes.to_radiological(affine, stored.shape, "here")
    turned = volumes.reorient(stored, turn)
    assert turned.shape == grid.shape
    np.testing.assert_array_equal(volumes.restore(turned, turn), stored)


@pytest.fixture
def liver(tmp_path):
    _, truth = draw_body()
    nibabel.save(
        nibabel.Nifti1Image(np.where(truth == 1, 300, -900).astype(np.int16), affine_of()), tmp_path / "ct.nii"
    )
    return tmp_path / "ct.nii", truth == 1


@pytest.mark.parametrize("kind", ["phrases", "boxes"])
def test_later_phrases_lie_over_earlier_ones_and_names_are_in_the_file(liver, kind):
    path, truth = liver
    phrases = ["liver & more", "upper half"]
    counts = label_file(Bright(kind), str(path), str(path.with_name("out.nii")), phrases)
    assert counts["upper half"] > 0 and sum(counts.values()) == truth.sum()
    _, _, grid = open_volume(path)
    labels = read_multilabel(path.with_name("out.nii"), grid, {})
    assert labels.names == {1: "liver & more", 2: "upper half"}
    assert np.bincount(labels.layers[0].ravel())[1:].tolist() == [*counts.values()]
    assert path.with_name("out.json").read_text().count("liver & more") == 1


def test_slices_are_those_of_the_scan_with_square_pixels():
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    _, grid = volumes.to_radiological(affine, (20, 30, 6), "here")
    volume = Volume(np.zeros(grid.shape, np.int16), grid, "ct")
    assert choose_plane(volume) == "axial"
    assert choose_plane(Volume(volume.values, Grid(grid.shape, np.diag([1.0, 3.0, 1.0, 1.0]) @ grid.affine), "ct")) == (
        "axial"
    )
    model = Bright()
    label_volume(model, volume, ["liver"], plane="coronal")
    assert model.sizes == {(24, 20)}
    assert value_range(volume, ["left lung"], "auto") == volumes.window_limits("lung")
    assert value_range(volume, ["left lung"], "bone") == volumes.window_limits("bone")


def test_a_series_gives_a_segmentation_of_its_own_pixels(tmp_path):
    pytest.importorskip("highdicom")
    _, truth = draw_body()
    write_series(tmp_path / "scan", codes="SPL", values=np.where(truth == 1, 300, -900).astype(np.int16))
    study, frame = generate_uid(), generate_uid()
    for path in (tmp_path / "scan").iterdir():
        header = pydicom.dcmread(path)
        header.StudyInstanceUID, header.FrameOfReferenceUID = study, frame
        header.SOPClassUID = header.SOPInstanceUID = ""  # the file's meta information has them
        header.save_as(path)
    counts = label_file(Bright(), str(tmp_path / "scan"), str(tmp_path / "scan" / "masks.dcm"), ["liver"])
    assert counts == {"liver": (truth == 1).sum()}
    paths, volume, turn = read_series(tmp_path / "scan")
    assert len(paths) == truth.shape[2] and volume.modality == "ct"
    np.testing.assert_array_equal(volume.values > 0, volumes.reorient(volumes.restore(volume.values, turn), turn) > 0)
    source = read(tmp_path)  # the segmentation is the series' label now
    case = source._items[0][0]
    labels, _ = case.read_labels()
    assert list(labels.names.values()) == ["liver"]
    np.testing.assert_array_equal(labels.layers[0] > 0, volume.values > 0)


@pytest.mark.parametrize("codes", ["SPL", "ARS", "LIP"])
def test_a_series_gives_a_nifti_file_that_lies_where_it_does(tmp_path, codes):
    _, truth = draw_body()
    write_series(tmp_path / "scan", codes=codes, values=np.where(truth == 1, 300, -900).astype(np.int16))
    assert label_file(Bright(), str(tmp_path / "scan"), str(tmp_path / "out.nii.gz"), ["liver"])["liver"] > 0
    image, turn, grid = open_volume(tmp_path / "out.nii.gz")
    _, volume, _ = read_series(tmp_path / "scan")
    grid.check_same(volume.grid, "the series")
    np.testing.assert_array_equal(volumes.reorient(np.asarray(image.dataobj), turn) > 0, volume.values > 0)
    assert image.header["sform_code"] == image.header["qform_code"] == 1


def test_a_series_that_cannot_be_named_is_refused_before_the_work(tmp_path):
    pytest.importorskip("highdicom")
    write_series(tmp_path / "scan")
    with pytest.raises(SourceError, match=r"has no StudyInstanceUID, FrameOfReferenceUID, .*nii\.gz"):
        label_file(Bright("nothing is asked of it"), str(tmp_path / "scan"), str(tmp_path / "out.dcm"), ["liver"])


def test_mistakes_are_named(liver, tmp_path):
    path, _ = liver
    with pytest.raises(ValueError, match=r"has no masks.*kind"):
        label_file(Bright(""), str(path), str(tmp_path / "out.nii.gz"), ["liver"])
    with pytest.raises(ValueError, match=r"written as \.nii\.gz or \.nii"):
        label_file(Bright(), str(path), str(tmp_path / "out.dcm"), ["liver"])
    with pytest.raises(ValueError, match=r"written as .* or \.dcm"):
        label_file(Bright(), str(tmp_path), str(tmp_path / "out.png"), ["liver"])
    with pytest.raises(SourceError, match="there is no such volume"):
        label_file(Bright(), str(tmp_path / "none.nii"), str(tmp_path / "out.nii"), ["liver"])
