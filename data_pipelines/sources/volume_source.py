"""What sources of volumes have in common: they choose slices when they are opened, and draw one when asked for it."""

import abc
import collections
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines import volumes
from data_pipelines.curate import SourceError, box_from_mask, hash_patient, make_region
from data_pipelines.schema import GroundingExample
from data_pipelines.sources.masks import encode_mask
from data_pipelines.volumes import Grid, Labels, SliceRule, Volume


class Case(abc.ABC):
    """One labelled volume.

    Attributes:
        id: unique in the data set, the first part of its slices' image ids.
        patient: of whom it is; hashed before it is stored.
    """

    id: str
    patient: str

    @abc.abstractmethod
    def read_labels(self) -> tuple[Labels, Grid]:
        """Returns the structures, and the grid, which is the image's.

        Raises:
            SourceError: labels or the image's header cannot be read, or their grids differ.
        """

    @abc.abstractmethod
    def read_volume(self) -> Volume:
        """Returns the image.

        Raises:
            SourceError: it cannot be read.
        """


class VolumeSource(Sequence[GroundingExample]):
    """Slices of labelled volumes, chosen by a rule, in the order of cases, planes and places.

    Opening a source reads all labels, since these decide which slices there are; images are read when a slice is asked
    for, and the last one is kept. A case that cannot be read is one item, which raises. Image ids are CASE/PLANE/INDEX.
    Empty masks mean that a structure is outside the field of view; nothing is taken for absent.

    Attributes:
        unused: files without counterpart, and cases without a region that is large enough.
    """

    def __init__(self, cases: Iterable[Case], *, dataset: str, rule: SliceRule, unused: Iterable[str] = ()):
        self._dataset, self._rule = dataset, rule
        self.unused = list(unused)
        self._items: list[tuple[Case, str, int] | SourceError] = []
        self._too_small: dict[tuple[str, str, int], int] = {}
        self._current: tuple[Case, Volume, Labels, tuple[float, float]] | None = None
        for case in cases:
            try:
                slices = self._plan(case)
            except SourceError as error:
                self._items.append(error)
                continue
            self._items += slices
            if not slices:
                self.unused.append(f"{case.id}: no structure is large enough in any plane")

    def _plan(self, case: Case) -> list[tuple[Case, str, int]]:
        labels, grid = case.read_labels()
        slices = []
        for plane, index in volumes.plan_slices(labels, grid, self._rule):
            regions, too_small = self._find_regions(labels, grid, plane, index)
            if regions:
                slices.append((case, plane, index))
                self._too_small[case.id, plane, index] = too_small
        return slices

    @property
    def dropped(self) -> collections.Counter[str]:
        """Counts of what was left out of the slices, by reason."""
        return collections.Counter({"too small": sum(self._too_small.values())})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        item = self._items[index]
        if isinstance(item, SourceError):
            raise item
        case, plane, place = item
        volume, labels, value_range = self._read(case)
        regions, _ = self._find_regions(labels, volume.grid, plane, place)
        pixels = volumes.section(volume.values, plane, place)
        (height, width), millimetres = volumes.square_size(pixels.shape, volume.grid.pixel_spacing(plane))
        window = self._rule.window if volume.modality == "ct" else "percentile"
        if window == "auto":
            window = volumes.choose_window([(name, mask.sum()) for name, mask in regions], labels.site)
        low, high = value_range if window == "percentile" else volumes.window_limits(window)
        pixels = volumes.apply_window(volumes.resize_pixels(pixels, (height, width)), low, high)
        return GroundingExample(
            image=volumes.encode_png(pixels),
            image_id=f"{case.id}/{plane}/{place}",
            dataset=self._dataset,
            height=height,
            width=width,
            patient_id=hash_patient(case.patient),
            modality=volume.modality,
            spacing_mm=(millimetres, millimetres),
            regions=tuple(
                make_region(name, box_from_mask(mask), labels.site, mask=encode_mask(mask)) for name, mask in regions
            ),
        )

    def _read(self, case: Case) -> tuple[Volume, Labels, tuple[float, float]]:
        if self._current is None or self._current[0] is not case:
            self._current = None  # before the next one is read: two may not fit
            labels, _ = case.read_labels()
            volume = case.read_volume()
            value_range = volumes.percentile_range(volume.values, self._rule.percentiles)
            self._current = (case, volume, labels, value_range)
        return self._current[1:]

    def _find_regions(
        self, labels: Labels, grid: Grid, plane: str, index: int
    ) -> tuple[list[tuple[str, np.ndarray]], int]:
        """Returns (name, mask of the picture's size) of the regions in a slice, and how many were too small."""
        ndimage = volumes.import_medical("scipy.ndimage")
        regions: list[tuple[str, np.ndarray]] = []
        too_small = 0
        for layer in labels.layers:
            values = volumes.section(layer, plane, index)
            size, millimetres = volumes.square_size(values.shape, grid.pixel_spacing(plane))
            least = max(self._rule.min_area_px, self._rule.min_area_mm2 / millimetres**2)
            values = volumes.resize_labels(values, size)
            for value, box in enumerate(ndimage.find_objects(values), 1):
                if box is None:
                    continue
                name = labels.names[value]
                one_by_one = volumes.counts_components(name, labels.site)
                masks, dropped = volumes.split_components(values[box] == value, least, one_by_one)
                too_small += dropped
                for mask in masks:
                    regions.append((name, np.zeros(size, bool)))
                    regions[-1][1][box] = mask
        return regions, too_small
