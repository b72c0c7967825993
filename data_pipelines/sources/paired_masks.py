"""Masks beside images by patterns of their names: public sets as they are published, one entry of a recipe each."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.curate import SourceError, clean_name, hash_patient
from data_pipelines.images import read_label_map, read_mask
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.colored_masks import REGIONS, Entry, read_regions, read_values
from data_pipelines.sources.image_folder import store_any
from data_pipelines.sources.patterns import Pair, pair_files

_CLASS, _PATIENT = "class", "patient"


class PairedMasks(Sequence[GroundingExample]):
    """Images and mask files whose names follow patterns, see `data_pipelines.sources.patterns`.

    A mask is of the class that its pattern is given for ({"polyp": "masks/{id}.jpg"}), or that {class} in its name, or
    else in the image's, says. It is what is not black, or from `threshold` on; a lesion or a cell is a region for each
    connected component, anything else one region a file, unless `regions` says component or label. With `values` a mask
    holds several labels, as those of `colored_masks` do: {1: polyp} or {polyp: [255, 0, 0]}. An empty mask is no region
    and makes its image one without boxes. Images without any mask are unused: nothing says that they were looked at.

    {patient} in the images' pattern tells the patient. The image id is the words of the image's name, joined by "/".
    No folder is taken for this layout without being asked: the patterns have to be given.
    """

    OPTIONS = {  # noqa: RUF012
        "images": str,
        "masks": str | tuple[str, ...] | Mapping,  # of class to pattern
        "values": Mapping,
        "threshold": int,
        "regions": str,
    }

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dataset: str,
        modality: str = "unknown",
        images: str = "",
        masks: str | tuple[str, ...] | Mapping[str, str] = (),
        values: Mapping[Any, Any] | None = None,
        threshold: int = 1,
        regions: str = "",
    ):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        named = dict(masks) if isinstance(masks, Mapping) else {}
        patterns = (
            list(named.values()) if isinstance(masks, Mapping) else [masks] if isinstance(masks, str) else [*masks]
        )
        if not images or not all(patterns) or not patterns or not all(isinstance(text, str) for text in patterns):
            raise SourceError(
                f"{folder}: the options images and masks must be patterns of file names, as images: images/{{id}}.jpg "
                "with masks: masks/{id}_{class}.png or masks: {polyp: masks/{id}.png}"
            )
        if regions not in REGIONS or threshold < 1:
            raise SourceError(f"{folder}: regions is component or label, and threshold 1 and more")
        self._threshold = threshold
        self._values = read_values(values, f"{folder}: the option values") if values else None
        pairs, self.unused = pair_files(folder, images, patterns)
        self._entries = [Entry(str(name), regions) for name in named] or [Entry("", regions)] * len(patterns)
        if not self._values:
            self._check_classes(pairs, patterns)
        self._pairs = pairs

    def _check_classes(self, pairs: Sequence[Pair], patterns: Sequence[str]) -> None:
        for pair in pairs:
            for path, words, number in pair.annotations:
                if not clean_name(self._class_of(pair, words, number)):
                    raise SourceError(
                        f"{path}: nothing says what it shows: write {{{_CLASS}}} into the pattern "
                        f"{patterns[number]!r}, or give it for a class, as masks: {{polyp: {patterns[number]}}}"
                    )

    def _class_of(self, pair: Pair, words: Mapping[str, str], number: int) -> str:
        return self._entries[number].name or words.get(_CLASS) or pair.words.get(_CLASS) or ""

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return False  # only the patterns tell

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        pair = self._pairs[index]
        image = store_any(pair.image, self._folder, dataset=self._dataset)
        size = (image.height, image.width)
        patient = pair.words.get(_PATIENT)
        return GroundingExample(
            image=image.encoded,
            image_id=pair.image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patient, self._dataset) if patient else image.patient_id,
            modality=image.modality or self._modality,
            spacing_mm=image.spacing_mm,
            regions=tuple(self._read_regions(pair, size)),
        )

    def _read_regions(self, pair: Pair, size: tuple[int, int]) -> Iterator[Region]:
        for path, words, number in pair.annotations:
            if self._values:
                labels, colours = self._values
                where = f"{path}: the option values"
                yield from read_regions(read_label_map(path, size, colours, self._folder), labels, colours, where)
            else:
                entry = Entry(self._class_of(pair, words, number), self._entries[number].regions)
                yield from entry.split(read_mask(path, size, self._folder, self._threshold))
