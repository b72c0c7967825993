"""Voxels are the same however they are unpacked."""

import gzip

import numpy as np
import pytest

from data_pipelines.sources import nifti_files

nibabel = pytest.importorskip("nibabel")

VALUES = np.random.default_rng(0).integers(-900, 900, (5, 6, 7, 2)).astype(np.int16)


def save(path, values=VALUES, scale=None):
    image = nibabel.Nifti1Image(values, np.eye(4))
    if scale:
        image.header.set_slope_inter(*scale)
    nibabel.save(image, path)
    return path


def cut_in_two(path):
    """The same bytes as two gzip streams, one after the other."""
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    return path


@pytest.mark.parametrize(
    ("make", "at_once"),
    [
        (lambda f: save(f / "a.nii.gz", VALUES[..., 0]), True),
        (lambda f: save(f / "a.nii.gz"), True),
        (lambda f: save(f / "a.nii.gz", VALUES.astype(">f4")), True),
        (lambda f: save(f / "a.nii.gz", VALUES.astype(np.uint8)), True),
        (lambda f: save(f / "a.nii.gz", scale=(0.5, 3)), False),
        (lambda f: save(f / "a.nii"), False),
        (lambda f: cut_in_two(save(f / "a.nii.gz")), False),
    ],
)
def test_voxels_are_those_that_nibabel_reads(tmp_path, make, at_once):
    path = make(tmp_path)
    image, _, _ = nifti_files.open_volume(path)
    found, expected = nifti_files.read_values(image, path), np.asanyarray(image.dataobj)
    expected = expected[..., 0] if expected.ndim == 4 else expected
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == (expected.dtype if expected.dtype in (np.int16, np.uint8) else np.float32)
    assert (nifti_files._unpack(image, path) is not None) == at_once


def test_large_volumes_are_not_there_twice(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz")
    image, _, _ = nifti_files.open_volume(path)
    monkeypatch.setattr(nifti_files, "_AT_ONCE", VALUES[..., 0].nbytes - 1)
    assert nifti_files._unpack(image, path) is None
