"""Structures from DICOM objects: segmentations (masks) and RT structure sets (contours)."""

import collections
import dataclasses
import pathlib
from typing import Any

import cv2
import numpy as np

from data_pipelines import volumes
from data_pipelines.curate import SourceError, clean_name
from data_pipelines.dicom_privacy import read_header
from data_pipelines.volumes import Labels

_SHIFT = 6  # bits after the point in OpenCV's contour coordinates
_OFF_GRID = 0.25  # voxels that a frame may lie beside the image's


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the pixels of a series lie.

    Attributes:
        affine: float64[4, 4], from (slice, row, column) to mm in RAS+.
        shape: (slices, rows, columns).
    """

    affine: np.ndarray
    shape: tuple[int, int, int]

    def locate(self, points: np.ndarray) -> np.ndarray:
        """[n, 3] mm as DICOM has them (left, back, head) -> float[n, 3] slice, row, column."""
        inverse = np.linalg.inv(self.affine)
        return (np.asarray(points, float) * (-1, -1, 1)) @ inverse[:3, :3].T + inverse[:3, 3]


def _check_name(name: str, path: pathlib.Path) -> str:
    if not clean_name(name):
        raise SourceError(f"{path}: the structure name {name!r} has no words")
    return name


def add_segmentation(labels: Labels, path: pathlib.Path, geometry: Geometry, turn: np.ndarray) -> None:
    """Adds the segments of a DICOM segmentation (binary, or fractional from one half on).

    Args:
        labels: in radiological orientation.
        path: of the segmentation.
        geometry: of the series.
        turn: from the series to radiological orientation, see `volumes.reorient`.

    Raises:
        SourceError: it cannot be read, or its frames are not on slices of the series, pixel on pixel.
    """
    segmentation, _ = read_header(path, pixels=True)
    try:
        kind = segmentation.SegmentationType
        if kind not in ("BINARY", "FRACTIONAL"):
            raise SourceError(f"{path}: is a segmentation of type {kind}; BINARY and FRACTIONAL are supported")
        half = 0.5 * float(segmentation.MaximumFractionalValue) if kind == "FRACTIONAL" else 0.5
        names = {int(s.SegmentNumber): _check_name(str(s.SegmentLabel), path) for s in segmentation.SegmentSequence}
        frames = segmentation.pixel_array.reshape(-1, segmentation.Rows, segmentation.Columns)
        shared = segmentation.SharedFunctionalGroupsSequence[0]
        masks: dict[int, np.ndarray] = {}
        for frame, place in zip(frames, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
            number = int(_group(shared, place, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            mask = masks.setdefault(number, np.zeros(geometry.shape, bool))
            mask[_find_slice(shared, place, frame.shape, geometry, path)] |= frame >= half
        for number in sorted(masks):
            labels.add(names[number], volumes.reorient(masks[number], turn))
    except SourceError:
        raise
    except Exception as error:  # missing attributes, undecodable pixels
        raise SourceError(f"{path}: no usable DICOM segmentation ({error!r})") from None


def _group(shared: Any, frame: Any, keyword: str) -> Any:
    return (frame.get(keyword) or shared[keyword].value)[0]


def _find_slice(shared: Any, frame: Any, size: tuple[int, ...], geometry: Geometry, path: pathlib.Path) -> int:
    """Returns the slice of the series that a frame lies on."""
    position = np.asarray(_group(shared, frame, "PlanePositionSequence").ImagePositionPatient, float)
    directions = np.asarray(_group(shared, frame, "PlaneOrientationSequence").ImageOrientationPatient, float)
    rows, columns = map(float, _group(shared, frame, "PixelMeasuresSequence").PixelSpacing)
    along_row, along_column = directions.reshape(2, 3)
    far = position + along_row * columns * (size[1] - 1) + along_column * rows * (size[0] - 1)
    (place, *start), (_, *end) = geometry.locate(np.stack([position, far]))
    wanted = (0, 0, size[0] - 1, size[1] - 1, round(place))
    if size != geometry.shape[1:] or np.abs(np.subtract((*start, *end, place), wanted)).max() > _OFF_GRID:
        raise SourceError(f"{path}: a frame at {position.tolist()} is not pixel on pixel on a slice of its series")
    if not 0 <= round(place) < geometry.shape[0]:
        raise SourceError(f"{path}: a frame at {position.tolist()} lies outside its series")
    return round(place)


def add_structures(labels: Labels, path: pathlib.Path, geometry: Geometry, turn: np.ndarray) -> None:
    """Adds the closed contours of an RT structure set, filled; where contours overlap in a slice, they cut holes.

    Pixels that a contour touches belong to it. Arguments and errors are those of `add_segmentation`.
    """
    structures, _ = read_header(path)
    try:
        names = {int(roi.ROINumber): str(roi.ROIName) for roi in structures.StructureSetROISequence}
        for roi in structures.get("ROIContourSequence", ()):
            mask = np.zeros(geometry.shape, np.uint8)
            for place, polygons in _polygons(roi, geometry, path).items():
                cv2.fillPoly(mask[place], polygons, (1,), shift=_SHIFT)
            name = _check_name(names[int(roi.ReferencedROINumber)], path)
            labels.add(name, volumes.reorient(mask.astype(bool), turn))
    except SourceError:
        raise
    except Exception as error:  # missing attributes, wrong numbers of coordinates
        raise SourceError(f"{path}: no usable RT structure set ({error!r})") from None


def _polygons(roi: Any, geometry: Geometry, path: pathlib.Path) -> dict[int, list[np.ndarray]]:
    """Returns slice -> polygons, int32[n, 2] (column, row) with `_SHIFT` bits after the point."""
    polygons = collections.defaultdict(list)
    for contour in roi.get("ContourSequence", ()):
        if not str(contour.ContourGeometricType).startswith("CLOSED"):
            continue  # points and open lines have no area
        points = geometry.locate(np.asarray(contour.ContourData, float).reshape(-1, 3))
        places = np.unique(np.rint(points[:, 0]).astype(int))
        if len(places) > 1 or not 0 <= places[0] < geometry.shape[0]:
            raise SourceError(f"{path}: a contour lies in no slice, or in several, of its series ({places.tolist()})")
        corners = np.rint(points[:, [2, 1]] * 2**_SHIFT).astype(np.int32)
        polygons[int(places[0])].append(corners)
    return polygons
