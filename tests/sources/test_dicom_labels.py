"""DICOM segmentations and structure sets."""

import pathlib

import numpy as np
import pytest

from data_pipelines.curate import SourceError

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.pixels import pack_bits  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import SegmentationStorage  # noqa: E402

from tests.sources.series_files import (  # noqa: E402
    AXIAL,
    SERIES,
    new_file,
    place,
    read,
    set_pixels,
    shown_boxes,
    to_dicom,
    write_case,
    write_series,
)
from tests.sources.volume_body import SHAPE, affine_of, draw_body, turn_to  # noqa: E402


def item(**fields) -> Dataset:
    header = Dataset()
    for keyword, value in fields.items():
        setattr(header, keyword, value)
    return header


def write_segmentation(path: pathlib.Path, codes=AXIAL, label="liver", kind="BINARY", shift=0.0) -> None:
    """Writes the liver and the tumor in it, two overlapping segments, on the slices that show them."""
    liver = draw_body()[1] == 1
    tumor = np.zeros(SHAPE, bool)
    tumor[20:24, 20:26, 6:12] = True
    header = new_file(SegmentationStorage, "SEG", "1.2.77")
    header.SegmentationType = kind
    header.ReferencedSeriesSequence = Sequence([item(SeriesInstanceUID=SERIES)])
    segments = [item(SegmentNumber=1, SegmentLabel=label), item(SegmentNumber=2, SegmentLabel="liver_tumor")]
    header.SegmentSequence = Sequence(segments)
    frames, places = [], []
    for number, mask in ((1, liver), (2, tumor)):
        stored, affine = turn_to(codes, mask)
        for index in np.flatnonzero(stored.any(axis=(1, 2))):
            measures = Dataset()
            place(measures, affine, int(index))
            position = [measures.ImagePositionPatient[0] + shift, *measures.ImagePositionPatient[1:]]
            frames.append(stored[index])
            places.append(
                item(
                    SegmentIdentificationSequence=Sequence([item(ReferencedSegmentNumber=number)]),
                    PlanePositionSequence=Sequence([item(ImagePositionPatient=position)]),
                    PlaneOrientationSequence=Sequence([measures]),
                    PixelMeasuresSequence=Sequence([measures]),
                )
            )
    pixels = np.stack(frames)
    set_pixels(header, pixels[0].astype(np.uint8))
    header.NumberOfFrames = len(frames)
    if kind == "BINARY":
        header.BitsAllocated, header.BitsStored, header.HighBit = 1, 1, 0
        header.PixelData = pack_bits(pixels.astype(np.uint8).ravel())
    else:
        header.MaximumFractionalValue = 200
        header.PixelData = np.where(pixels, 100, 99).astype(np.uint8).tobytes()
    header.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    header.PerFrameFunctionalGroupsSequence = Sequence(places)
    header.save_as(path)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
@pytest.mark.parametrize("codes", [AXIAL, "PIL"])
def test_segmentation_object(tmp_path, kind, codes):
    expected = shown_boxes(read(write_case(tmp_path / "nifti", codes)))
    write_series(tmp_path / "seg", codes)
    write_segmentation(tmp_path / "seg" / "seg.dcm", codes, kind=kind)
    found = shown_boxes(read(tmp_path / "seg"))
    livers = {key for key in found if key[1] == "liver"}
    assert len(livers) > 10 and all(found[key] == expected[key] for key in livers)
    assert sum(key[1] == "liver_tumor" for key in found) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 1.5}, "not pixel on pixel"),
        ({"label": "(x)"}, "has no words"),
        ({"codes": "IPR"}, "not pixel on pixel"),
    ],
)
def test_bad_segmentation_is_an_error(tmp_path, options, message):
    write_series(tmp_path)
    write_segmentation(tmp_path / "seg.dcm", **options)
    with pytest.raises(SourceError, match=f"seg.dcm: .*{message}"):
        read(tmp_path)[0]


def contour(corners, height: int) -> Dataset:
    """A polygon of (right, front) voxels in slice `height`."""
    points = [to_dicom(affine_of() @ (right, front, height, 1)) for right, front in corners]
    return item(ContourGeometricType="CLOSED_PLANAR", ContourData=list(np.ravel(points)))


def write_structures(path: pathlib.Path, contours, series=SERIES) -> None:
    header = new_file(modality="RTSTRUCT", series="1.2.88")
    study = Sequence([item(RTReferencedSeriesSequence=Sequence([item(SeriesInstanceUID=series)]))])
    header.ReferencedFrameOfReferenceSequence = Sequence([item(RTReferencedStudySequence=study)])
    header.StructureSetROISequence = Sequence([item(ROINumber=3, ROIName="liver")])
    header.ROIContourSequence = Sequence([item(ReferencedROINumber=3, ContourSequence=Sequence(contours))])
    header.save_as(path)


OUTLINE = [(18, 15), (28, 15), (28, 39), (18, 39)]  # the liver's outermost voxels


HOLE = [(21, 20), (25, 20), (25, 30), (21, 30)]


def test_structure_set(tmp_path):
    expected = shown_boxes(read(write_case(tmp_path / "nifti")))
    write_series(tmp_path / "rt")
    outlines = [contour(outline, height) for height in range(4, 16) for outline in (OUTLINE, HOLE)]
    write_structures(tmp_path / "rt" / "structures.dcm", outlines)
    source = read(tmp_path / "rt")
    found = shown_boxes(source)
    assert len(found) > 10 and all(found[key] == expected[key] for key in found)
    labels, _ = source._items[0][0].read_labels()
    filled = 11 * 25 - 3 * 9  # pixels that the hole's contour touches are not in the hole
    np.testing.assert_array_equal(labels.layers[0].sum(axis=(1, 2)), [0] * 4 + [filled] * 12 + [0] * 4)


@pytest.mark.parametrize(
    ("contours", "message"),
    [
        ([contour(OUTLINE, 25)], "lies in no slice"),
        ([item(ContourGeometricType="CLOSED_PLANAR", ContourData=[0.0, 0, 0, 1, 1])], "no usable RT structure set"),
        (
            [item(ContourGeometricType="CLOSED_PLANAR", ContourData=[0.0, 0, -300, 0, 9, -290, 9, 9, -280])],
            "in several",
        ),
    ],
)
def test_bad_structure_set_is_an_error(tmp_path, contours, message):
    write_series(tmp_path)
    write_structures(tmp_path / "structures.dcm", contours)
    with pytest.raises(SourceError, match=f"structures.dcm: .*{message}"):
        read(tmp_path)[0]


def test_annotation_of_another_series_is_unused(tmp_path):
    write_case(tmp_path)
    write_structures(tmp_path / "structures.dcm", [contour(OUTLINE, 8)], series="1.2.999")
    assert read(tmp_path).unused == [f"{tmp_path / 'structures.dcm'}: refers to a series that is not here"]
