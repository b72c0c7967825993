"""Volumes to pictures: radiological orientation, which slices to show, square pixels, windows, components.

Arrays of volumes have the axes [head to feet, front to back, right to left] of the patient, so that a slice needs no
turning to be seen as radiologists hang it:

    axial     values[i]        rows front to back: anterior up; columns right to left: the patient's right on the left
    coronal   values[:, i]     rows head to feet: head up; columns right to left: the patient's right on the left
    sagittal  values[:, :, i]  rows head to feet: head up; columns front to back: anterior on the left

Slices are counted from the head, the front and the patient's right. Left and right in labels stay the patient's.
Affines are NIfTI's (RAS+): from voxel indices to mm, which grow to the patient's right, front and head.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from data_pipelines.curate import SourceError, name_region
from data_pipelines.images import encode_png as encode_png
from data_pipelines.taxonomy import load_taxonomy, normalize_name

PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}  # the axis that counts their slices

# CT windows: level and width in Hounsfield units, as in Radiopaedia's "Windowing (CT)" (lungs, abdominal soft tissue,
# bone, brain).
WINDOWS = {"lung": (-600, 1500), "soft_tissue": (50, 400), "bone": (400, 1800), "brain": (40, 80)}

# Words in the names of a structure, of its holders and its kinds that call for another window than soft tissue's.
_WINDOW_WORDS = {
    "lung": {"lung", "lungs"},
    "brain": {"brain", "cerebrum", "cerebellum", "intracranial"},
    "bone": {"vertebra", "vertebrae", "rib", "ribs", "femur", "hip", "skull", "clavicle", "clavicula", "scapula"}
    | {"humerus", "sternum", "sacrum", "bone", "bones", "fracture", "mandible", "tibia", "fibula", "patella"},
}
_PERCENTILE_VOXELS = 2**21  # a regular sample of about this many gives the percentiles of a volume
_SAME_MM = 0.1  # corners of one grid may lie this far apart in two files, which round their affines


@dataclasses.dataclass(frozen=True)
class SliceRule:
    """Which slices of a volume become pictures, and which structures in them regions.

    Every structure asks for slices; every slice that one asks for shows all structures that are large enough in it, so
    that nothing visible goes unnamed. A structure that lies between the slices of the grid asks for its largest one.

    Attributes:
        planes: of `PLANES`.
        step_mm: distance of the slices of the grid, in mm.
        max_slices: at most so many slices of a plane are asked for by one structure (lesion: by one component), spread
            evenly over it.
        min_area_px, min_area_mm2: components below either are dropped, in pixels of the picture and mm2.
        max_stretch: planes whose pixels are longer than wide by more than this are left out: slices 4 mm thick of
            0.5 mm pixels are sharp in one plane only.
        min_side_mm: planes whose pictures are narrower than this are left out.
        window: of CT: "auto" (by the structures in the slice), "percentile", or one of `WINDOWS`. Other modalities have
            no units: theirs is always the percentile window.
        percentiles: of the volume's values, that become black and white.
    """

    planes: tuple[str, ...] = ("axial", "coronal", "sagittal")  # ours
    step_mm: float = 10.0  # ours: neighbours are then different pictures
    max_slices: int = 8  # ours
    min_area_px: int = 9  # ours: 3 x 3 pixels, about the least that a stride of 8 can find after enlargement
    min_area_mm2: float = 10.0  # ours: a disc of 3.6 mm
    max_stretch: float = 3.0  # ours
    min_side_mm: float = 50.0  # ours
    window: str = "auto"
    percentiles: tuple[float, float] = (0.5, 99.5)  # nnU-Net's and MedSAM's clipping

    def __post_init__(self):
        if not self.planes or not set(self.planes) <= set(PLANES):
            raise ValueError(f"planes must be some of {', '.join(PLANES)}, not {', '.join(self.planes) or 'none'}")
        if self.window not in ("auto", "percentile", *WINDOWS):
            raise ValueError(f"unknown window {self.window!r}; known: auto, percentile, {', '.join(WINDOWS)}")
        if min(self.step_mm, self.max_slices, self.min_area_px, self.max_stretch) <= 0:
            raise ValueError("step_mm, max_slices, min_area_px and max_stretch must be above 0")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must rise within 0 to 100, not {self.percentiles}")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume in radiological orientation lie.

    Attributes:
        shape: voxels from head to feet, front to back, right to left.
        affine: float64[4, 4], from voxel indices to mm in RAS+.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of neighbouring voxels along each axis in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def pixel_spacing(self, plane: str) -> tuple[float, float]:
        """(row, column) distance of the voxels in a plane in mm."""
        row, column = np.delete(self.spacing, PLANES[plane])
        return float(row), float(column)

    def check_same(self, other: "Grid", where: str) -> None:
        """Raises SourceError where the voxels of another grid, read from `where`, lie elsewhere."""
        if self.shape != other.shape:
            raise SourceError(
                f"{where}: the labels have {_times(other.shape)} voxels (head to feet, front to back, right to left), "
                f"their image {_times(self.shape)}"
            )
        corners = np.asarray([*itertools.product(*((0, n - 1) for n in self.shape))])  # [8, 3]
        distance = np.linalg.norm(_locate(corners, self.affine) - _locate(corners, other.affine), axis=1).max()
        if not distance <= _SAME_MM:
            raise SourceError(
                f"{where}: the labels lie up to {distance:.4g} mm away from their image, since the affines of the "
                "two differ; resample the labels to the image"
            )


@dataclasses.dataclass(frozen=True)
class Volume:
    """An image in radiological orientation.

    Attributes:
        values: int16 or float32 [head to feet, front to back, right to left]; Hounsfield units for CT.
        grid: where the voxels lie, with their spacing in mm.
        modality: one of `data_pipelines.schema.MODALITIES`.
    """

    values: np.ndarray
    grid: Grid
    modality: str


class Labels:
    """The structures of a volume, in radiological orientation.

    Attributes:
        layers: uint16[head to feet, front to back, right to left] each; a voxel is of one structure in a layer, so
            that structures which overlap are in different ones. 0 is none.
        names: of the values in the layers, as the data set has them.
        site: part of the body that the data set is about, which helps to find their labels ("cancer" of a "lung").
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        layers: Iterable[np.ndarray] = (),
        names: Mapping[int, str] | None = None,
        site: str = "",
    ):
        self._shape = shape
        self.layers = list(layers)
        self.names = dict(names or {})
        self.site = site

    def add(self, name: str, mask: np.ndarray) -> None:
        """Adds a structure given by a bool mask; an empty one changes nothing."""
        if not mask.any():
            return
        value = max(self.names, default=0) + 1
        self.names[value] = name
        layer = next((layer for layer in self.layers if not layer[mask].any()), None)
        if layer is None:
            layer = np.zeros(self._shape, np.uint16)
            self.layers.append(layer)
        layer[mask] = value


def import_medical(module: str) -> Any:
    """Imports a module that only volumes need.

    Raises:
        SourceError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SourceError(f"volumes need {error.name or module}: pip install 'medglip_jax[medical]'") from None


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _locate(indices: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """[n, 3] voxel indices -> [n, 3] mm."""
    return indices @ affine[:3, :3].T + affine[:3, 3]


def to_radiological(affine: np.ndarray, shape: Sequence[int], where: str) -> tuple[np.ndarray, Grid]:
    """Finds how to bring a volume into radiological orientation, as nibabel.as_closest_canonical does for RAS+.

    Oblique volumes go to the nearest axes and are not resampled.

    Args:
        affine: float[4, 4] from voxel indices to mm in RAS+ (DICOM's x and y change sign).
        shape: of the volume as stored.
        where: the file, for messages.

    Returns:
        (turn, grid): what `reorient` takes, and the grid of its result.

    Raises:
        SourceError: the affine maps an axis to nothing or is not finite.
    """
    orientations = import_medical("nibabel.orientations")
    affine = np.asarray(affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise SourceError(f"{where}: its affine {affine.round(4).tolist()} places no volume")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt("IPL"))
    turned = np.empty(3, int)
    turned[turn[:, 0].astype(int)] = shape
    size = (int(turned[0]), int(turned[1]), int(turned[2]))
    return turn, Grid(size, affine @ orientations.inv_ornt_aff(turn, shape))


def reorient(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Returns a view of `values` with axes [head to feet, front to back, right to left]; see `to_radiological`."""
    return import_medical("nibabel.orientations").apply_orientation(values, turn)


def restore(values: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Undoes `reorient`: returns a view with the axes of the volume as it is stored."""
    inverse = np.empty_like(turn)
    for axis, (target, flip) in enumerate(turn):
        inverse[int(target)] = axis, flip
    return import_medical("nibabel.orientations").apply_orientation(values, inverse)


def restore_affine(grid: Grid, turn: np.ndarray) -> np.ndarray:
    """Returns float64[4, 4], from indices of the volume as it is stored to mm in RAS+; see `restore`."""
    stored = [grid.shape[int(axis)] for axis, _ in turn]
    return grid.affine @ np.linalg.inv(import_medical("nibabel.orientations").inv_ornt_aff(turn, stored))


def section(values: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Returns slice `index` of a plane of a volume in radiological orientation, [rows, columns] as it is to be seen."""
    return values[(slice(None),) * PLANES[plane] + (index,)]  # np.take would copy the volume


def plan_slices(labels: Labels, grid: Grid, rule: SliceRule) -> list[tuple[str, int]]:
    """Returns the slices (plane, index) that the structures ask for (see `SliceRule`), plane by plane, rising."""
    chosen: dict[str, set[int]] = {plane: set() for plane in rule.planes if _shows_enough(plane, grid, rule)}
    for box, mask in _structures(labels):
        counts = _count_in_slices(mask)
        for plane, indices in chosen.items():
            axis, (row, column) = PLANES[plane], grid.pixel_spacing(plane)
            areas = np.zeros(grid.shape[axis], int)
            areas[box[axis]] = counts[axis]
            step = max(1, round(rule.step_mm / grid.spacing[axis]))
            least = max(rule.min_area_px * min(row, column) ** 2, rule.min_area_mm2) / (row * column)
            indices.update(_choose(areas, step, least, rule.max_slices))
    return [(plane, index) for plane, indices in chosen.items() for index in sorted(indices)]


def _count_in_slices(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels of a bool mask [A, B, C] in each slice along each axis: int[A], int[B], int[C]."""
    voxels = np.ascontiguousarray(mask).view(np.uint8).reshape(-1, mask.shape[2])  # [A * B, C]
    # A tenth of the time of np.count_nonzero along axes.
    rows, last = (cv2.reduce(voxels, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S) for axis in (1, 0))
    rows = rows.reshape(mask.shape[:2])
    return rows.sum(axis=1), rows.sum(axis=0), last.ravel()


def _shows_enough(plane: str, grid: Grid, rule: SliceRule) -> bool:
    spacing = grid.pixel_spacing(plane)
    sides = np.delete(np.multiply(grid.shape, grid.spacing), PLANES[plane])
    return max(spacing) <= rule.max_stretch * min(spacing) and min(sides) >= rule.min_side_mm


def _choose(areas: np.ndarray, step: int, least: float, count: int) -> list[int]:
    """Slices that one structure asks for, given its area in each."""
    shown = [index for index in range(step // 2, len(areas), step) if areas[index] >= least]
    if not shown and areas.max() >= least:
        return [int(areas.argmax())]
    if len(shown) <= count:
        return shown
    return [shown[i] for i in ((np.arange(count) + 0.5) * len(shown) / count).astype(int)]


def _structures(labels: Labels) -> Iterable[tuple[tuple[slice, ...], np.ndarray]]:
    """Yields (box, mask in it) of every structure, or of its components where these count one by one."""
    ndimage = import_medical("scipy.ndimage")
    for layer in labels.layers:
        for value, box in enumerate(ndimage.find_objects(layer), 1):
            if box is None:
                continue
            mask = layer[box] == value
            if not counts_components(labels.names[value], labels.site):
                yield box, mask
                continue
            components, _ = ndimage.label(mask, np.ones((3, 3, 3)))
            for number, inner in enumerate(ndimage.find_objects(components), 1):
                moved = tuple(slice(o.start + i.start, o.start + i.stop) for o, i in zip(box, inner, strict=True))
                yield moved, components[inner] == number


def counts_components(name: str, site: str = "") -> bool:
    """Whether each component of a structure is a region of its own: lesions and cells are, organs are not."""
    return name_region(name, site)["granularity"] in ("lesion", "cell")


def square_size(shape: tuple[int, int], spacing: tuple[float, float]) -> tuple[tuple[int, int], float]:
    """Returns ((rows, columns), mm) of a slice with square pixels: the coarser axis gets as many as the finer has."""
    fine = min(spacing)
    rows, columns = (
        n if mm < 1.01 * fine else max(1, round(n * mm / fine)) for n, mm in zip(shape, spacing, strict=True)
    )
    return (rows, columns), fine


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[rows, columns] -> float32 of another size, linear between the centres of pixels."""
    return cv2.resize(np.ascontiguousarray(pixels, np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)


def resize_labels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[rows, columns] -> another size, each pixel from the one that its centre lies in."""
    for axis, (n, m) in enumerate(zip(size, pixels.shape, strict=True)):
        if n != m:
            pixels = pixels.take(((np.arange(n) + 0.5) * m / n).astype(int), axis=axis)
    return pixels


def split_components(mask: np.ndarray, least: float = 0, one_by_one: bool = True) -> tuple[list[np.ndarray], int]:
    """Separates the components (8-connected) of a mask, in the order of their first rows.

    Args:
        mask: bool[H, W].
        least: area in pixels below which a component is dropped.
        one_by_one: whether every component counts, or all of them are one structure.

    Returns:
        (masks bool[H, W], number of components dropped).
    """
    count, numbers, statistics, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    kept = statistics[:, cv2.CC_STAT_AREA] >= least
    kept[0] = False  # the background
    dropped = count - 1 - int(kept.sum())
    if one_by_one:
        return [numbers == number for number in np.flatnonzero(kept)], dropped
    if not kept.any():
        return [], dropped
    return [kept[np.asarray(numbers, np.intp)] if dropped else mask], dropped


def choose_window(areas: Iterable[tuple[str, float]], site: str = "") -> str:
    """Returns the CT window of `WINDOWS` for a slice: that of its lesions, else of what covers most of it.

    Args:
        areas: (name, area) of the structures in it.
        site: as in `Labels`.
    """
    everything = list(areas)
    votes: dict[str, float] = {}
    for name, area in [pair for pair in everything if counts_components(pair[0], site)] or everything:
        kind = _window_of(name, site)
        votes[kind] = votes.get(kind, 0.0) + area
    return max(votes, key=votes.__getitem__) if votes else "soft_tissue"


def _window_of(name: str, site: str) -> str:
    taxonomy, label = load_taxonomy(), name_region(name, site)["label"]
    names = [label, *taxonomy.ancestors(label)] if label in taxonomy.labels else [label]
    words = {word for each in names for word in normalize_name(each).split()}
    return next((window for window, known in _WINDOW_WORDS.items() if words & known), "soft_tissue")


def percentile_range(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Returns two percentiles of a volume's finite values, from a regular sample of its voxels."""
    step = max(1, int(np.ceil((values.size / _PERCENTILE_VOXELS) ** (1 / values.ndim))))
    sample = values[(slice(step // 2, None, step),) * values.ndim]
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, percentiles) if sample.size else (0.0, 0.0)
    return float(low), float(high)


def apply_window(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Maps low to 0 and high to 255, values outside to the nearer of them and NaN to 0; returns uint8."""
    share = (np.asarray(pixels, np.float32) - low) / max(high - low, 1e-6)
    np.fmin(np.fmax(share, 0, out=share), 1, out=share)  # of a number and NaN these take the number
    share *= 255
    return np.rint(share, out=share).astype(np.uint8)


def window_limits(window: str) -> tuple[float, float]:
    """Returns the values that a window of `WINDOWS` shows black and white."""
    level, width = WINDOWS[window]
    return level - width / 2, level + width / 2
