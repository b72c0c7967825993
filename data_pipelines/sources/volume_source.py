"""What sources of volumes have in common: they choose slices when they are opened, and draw one when asked for it."""

import abc
import collections
import concurrent.futures
import contextvars
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines import taxonomy, volumes
from data_pipelines.curate import SourceError, make_region
from data_pipelines.schema import GroundingExample
from data_pipelines.sources.masks import outline
from data_pipelines.volumes import Grid, Labels, SliceRule, Volume

_PLAN_VERSION = 1  # of the choice of slices: a higher one leaves older plans unused
_WORKERS = 4  # threads that read labels when a source is opened; each holds those of one case

Part = tuple[str, tuple[slice, ...], np.ndarray]  # name, box in the slice, bool mask in the box
Slices = list[tuple[str, int, int]]  # plane, index, and the number of components that are too small


class Case(abc.ABC):
    """One labelled volume.

    Attributes:
        id: unique in the data set, the first part of its slices' image ids.
        patient: hash of whom it is.
    """

    id: str
    patient: str

    @abc.abstractmethod
    def list_files(self) -> list[pathlib.Path]:
        """Returns the files that decide which slices there are."""

    def describe(self) -> str:
        """Returns what else decides it, such as names of labels that are not in these files."""
        return ""

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


@dataclasses.dataclass(eq=False)
class UnusableCase(Case):
    """A case, or a file that may belong to one, that cannot be used, for the reason that its error says."""

    id: str
    error: SourceError
    patient: str = ""

    def list_files(self) -> list[pathlib.Path]:
        return []

    def read_labels(self) -> tuple[Labels, Grid]:
        raise self.error

    def read_volume(self) -> Volume:
        raise self.error


class Plans:
    """A folder of the slices that were chosen for cases, so that the next opening need not read their labels.

    A plan counts as long as the files of its case have their names, sizes and times of change, under the same rule and
    taxonomy. Its file holds planes and numbers only, and its name is a hash.
    """

    def __init__(self, folder: str | os.PathLike, rule: SliceRule):
        self._folder = pathlib.Path(folder)
        words = hashlib.sha256()
        for path in sorted(pathlib.Path(taxonomy.__file__).parent.rglob("*.yaml")):
            words.update(path.read_bytes())
        self._rule = f"{_PLAN_VERSION}/{dataclasses.asdict(rule)}/{words.hexdigest()}"

    def _place(self, case: Case) -> pathlib.Path:
        states = [
            (str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns) for path in case.list_files()
        ]
        key = json.dumps([self._rule, case.id, case.describe(), states])
        return self._folder / f"{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()[:32]}.json"

    def load(self, case: Case) -> Slices | None:
        """Returns the slices of a case, None where they are not known or their file is damaged."""
        try:
            content = json.loads(self._place(case).read_text(encoding="utf-8"))
            return [(str(plane), int(index), int(small)) for plane, index, small in content]
        except (OSError, ValueError, TypeError):
            return None

    def save(self, case: Case, slices: Slices) -> None:
        """Keeps the slices of a case; the file appears when it is complete."""
        place = self._place(case)
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=self._folder, suffix=".part")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(slices, file)
        os.replace(staging, place)


class VolumeSource(Sequence[GroundingExample]):
    """Slices of labelled volumes, chosen by a rule, in the order of cases, planes and places.

    Opening a source reads all labels, since these decide which slices there are, unless `plans` knows them; images are
    read when a slice is asked for, and the last one is kept. A source that is open can be pickled: it takes the choice
    of slices along, not the last image. A case that cannot be read is one item, which raises. Image ids are
    CASE/PLANE/INDEX. Empty masks mean that a structure is outside the field of view; nothing is taken for absent.

    Attributes:
        unused: files without counterpart, and cases without a region that is large enough.
        notes: what is worth knowing about the files, with the number of files that it is true of.
        starts: place of the first slice of each case.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"plans": str}

    def __init__(
        self,
        cases: Iterable[Case],
        *,
        dataset: str,
        rule: SliceRule,
        unused: Iterable[str] = (),
        notes: Iterable[str] = (),
        plans: str | os.PathLike = "",
    ):
        """Chooses the slices.

        Args:
            cases: the volumes.
            dataset: name of the data set.
            rule: that chooses slices.
            unused: files without counterpart.
            notes: one for each file that it is true of.
            plans: a folder for the choice of slices, which makes the next opening fast; "" for none.
        """
        self._dataset, self._rule = dataset, rule
        self.unused = list(unused)
        self.notes = collections.Counter(notes)
        self._items: list[tuple[Case, str, int] | SourceError] = []
        self.starts: list[int] = []
        self._too_small = 0
        self._current: tuple[Case, Volume, Labels, tuple[float, float]] | None = None
        cases = list(cases)
        for case, slices in zip(cases, self._plan_all(cases, plans), strict=True):
            self.starts.append(len(self._items))
            if isinstance(slices, SourceError):
                self._items.append(slices)
                continue
            self._items += [(case, plane, index) for plane, index, _ in slices]
            self._too_small += sum(small for _, _, small in slices)
            if not slices:
                self.unused.append(f"{case.id}: no structure is large enough in any plane")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current": None}

    def _plan_all(self, cases: Sequence[Case], folder: str | os.PathLike) -> Iterable[Slices | SourceError]:
        plans = Plans(folder, self._rule) if folder else None
        volumes.import_medical("scipy.ndimage")  # once, not in every thread
        workers = min(_WORKERS, os.cpu_count() or 1, max(1, len(cases)))
        # Workers see the limits that hold here: they do not follow threads by themselves.
        contexts = [contextvars.copy_context() for _ in cases]
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda context, case: context.run(self._plan, case, plans), contexts, cases)

    def _plan(self, case: Case, plans: Plans | None) -> Slices | SourceError:
        try:
            known = plans.load(case) if plans else None
            if known is not None:
                return known
            labels, grid = case.read_labels()
            slices = []
            for plane, index in volumes.plan_slices(labels, grid, self._rule):
                parts, too_small = self._find_parts(labels, grid, plane, index)
                if parts:
                    slices.append((plane, index, too_small))
        except SourceError as error:
            return error
        if plans:
            plans.save(case, slices)
        return slices

    @property
    def dropped(self) -> collections.Counter[str]:
        """Counts of what was left out of the slices, by reason."""
        return collections.Counter({"too small": self._too_small})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        item = self._items[index]
        if isinstance(item, SourceError):
            raise item
        case, plane, place = item
        volume, labels, value_range = self._read(case)
        parts, _ = self._find_parts(labels, volume.grid, plane, place)
        pixels = volumes.section(volume.values, plane, place)
        (height, width), millimetres = volumes.square_size(pixels.shape, volume.grid.pixel_spacing(plane))
        window = self._rule.window if volume.modality == "ct" else "percentile"
        if window == "auto":
            window = volumes.choose_window(
                [(name, float(np.count_nonzero(mask))) for name, _, mask in parts], labels.site
            )
        low, high = value_range if window == "percentile" else volumes.window_limits(window)
        pixels = volumes.apply_window(volumes.resize_pixels(pixels, (height, width)), low, high)
        return GroundingExample(
            image=volumes.encode_png(pixels),
            image_id=f"{case.id}/{plane}/{place}",
            dataset=self._dataset,
            height=height,
            width=width,
            patient_id=case.patient,
            modality=volume.modality,
            spacing_mm=(millimetres, millimetres),
            regions=tuple(
                make_region(name, site=labels.site, **outline(_place(mask, box, (height, width))))
                for name, box, mask in parts
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

    def _find_parts(self, labels: Labels, grid: Grid, plane: str, index: int) -> tuple[list[Part], int]:
        """Returns the regions in a slice, and how many were too small."""
        ndimage = volumes.import_medical("scipy.ndimage")
        parts: list[Part] = []
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
                parts += ((name, box, mask) for mask in masks)
        return parts, too_small


def _place(mask: np.ndarray, box: tuple[slice, ...], size: tuple[int, int]) -> np.ndarray:
    """Returns bool[size] with a mask in a box of it, column after column as run lengths are made."""
    placed = np.zeros(size, bool, order="F")
    placed[box] = mask
    return placed
