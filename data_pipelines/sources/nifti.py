"""NIfTI volumes with labels: a folder a case (TotalSegmentator), imagesTr/ and labelsTr/ (MSD), or by patterns."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from data_pipelines import limits, volumes
from data_pipelines.curate import SourceError, find_modality, hash_patient
from data_pipelines.images import describe
from data_pipelines.sources.nifti_files import (
    MASKS,
    MULTILABEL,
    find_volume,
    has_labels,
    list_volumes,
    open_volume,
    read_description,
    read_masks,
    read_multilabel,
    read_values,
)
from data_pipelines.sources.patterns import pair_files
from data_pipelines.sources.volume_source import Case, UnusableCase, VolumeSource
from data_pipelines.volumes import Grid, Labels, SliceRule, Volume

# Names of a case's image, and what they say about it.
_IMAGE_NAMES = {"ct": "ct", "mri": "mri", "mr": "mri", "pet": "pet", "image": ""}
_MR_SEQUENCES = re.compile(r"(flair|t1|t2|adc|dwi)(w|c|ce|gd|map|-weighted)?", re.IGNORECASE)


def _find_image(folder: pathlib.Path) -> tuple[pathlib.Path, str] | None:
    """Returns the image of a case folder and the modality that its name tells, None where the folder is no case."""
    if not has_labels(folder):
        return None
    found = ((find_volume(folder, name), modality) for name, modality in _IMAGE_NAMES.items())
    return next(((path, modality) for path, modality in found if path), None)


class NIfTI(VolumeSource):
    """Slices of labelled NIfTI volumes.

    One case is CASE/ct.nii.gz (or mri, mr, pet, image) with CASE/multilabel.nii.gz or, where that is missing,
    CASE/segmentations/NAME.nii.gz; the folder itself may be a case. Names of the values are in the label file's
    extension (as TotalSegmentator writes them), or in dataset.json or labels.json of the case or the folder.

    Or imagesTr/ and labelsTr/ with dataset.json: MSD has CASE.nii.gz in both, nnU-Net CASE_0000.nii.gz in imagesTr/.
    Of several channels the first is used. "labels" maps values to names or names to values (or, in nnU-Net, to lists).

    Or, where the options `images` and `labels` are patterns (`data_pipelines.sources.patterns`), what they find: one
    label file for each image, which several images may share, as the sequences of BraTS do. {patient}, or else {id},
    tells the patient. `values` names the values, {1: liver} or in order from 0 ([background, liver]), before what the
    files say. The modality is the one that is asked for, or else what dataset.json says.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        **VolumeSource.OPTIONS,
        "images": str,
        "labels": str,
        "values": Mapping | tuple[str, ...],
    }

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        dataset: str,
        modality: str = "unknown",
        rule: SliceRule | None = None,
        plans: str = "",
        images: str = "",
        labels: str = "",
        values: Mapping[Any, Any] | tuple[str, ...] = (),
    ):
        volumes.import_medical("nibabel")
        if bool(images) != bool(labels) or (values and not images):
            raise SourceError(f"{folder}: the options images and labels go together, and values with both")
        if images:
            cases, unused = _list_pairs(folder, dataset, modality, images, labels, _read_names(values, folder))
        else:
            cases, unused = (_list_msd if _is_msd(folder) else _list_cases)(folder, dataset, modality)
        if not cases:
            raise SourceError(
                f"{folder}: no labelled NIfTI volume: expected CASE/ct.nii.gz (or mri, mr, pet, image) with "
                "multilabel.nii.gz or segmentations/ beside it, imagesTr/, labelsTr/ and dataset.json, or what the "
                "options images and labels find" + (f"; found {describe(unused)}" if unused else "")
            )
        super().__init__(cases, dataset=dataset, rule=rule or SliceRule(), unused=unused, plans=plans)

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return folder.is_dir() and (_is_msd(folder) or any(_find_image(path) for path in _case_folders(folder)))


def _is_msd(folder: pathlib.Path) -> bool:
    return (folder / "imagesTr").is_dir() and (folder / "labelsTr").is_dir()


def _case_folders(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    yield folder
    if not _find_image(folder):
        yield from sorted(path for path in folder.iterdir() if path.is_dir() and not limits.is_hidden(path.name))


@dataclasses.dataclass(eq=False)
class _NiftiCase(Case):
    root: pathlib.Path  # the input folder
    dataset: str
    id: str
    image: pathlib.Path
    labels: pathlib.Path  # a multilabel file, or the folder of a file a structure
    modality: str
    description: Mapping[str, Any]  # content of dataset.json
    site: str = ""
    whose: str = ""  # patient; "" for the case's id
    names: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the values, before what the files say

    @property
    def patient(self) -> str:
        return hash_patient(self.whose or self.id, self.dataset)

    def list_files(self) -> list[pathlib.Path]:
        masks = list(list_volumes(self.labels).values()) if self.labels.is_dir() else [self.labels]
        return [self.image, *masks]

    def describe(self) -> str:
        return f"{self.site}/{json.dumps(self.names or self.description.get('labels', {}), sort_keys=True)}"

    def read_labels(self) -> tuple[Labels, Grid]:
        _, _, grid = open_volume(limits.check_inside(self.root, self.image))
        if self.labels.is_dir():
            return read_masks(self.labels, grid, self.root), grid
        labels = limits.check_inside(self.root, self.labels)
        return read_multilabel(labels, grid, self.description, self.site, self.names), grid

    def read_volume(self) -> Volume:
        image, turn, grid = open_volume(limits.check_inside(self.root, self.image))
        return Volume(volumes.reorient(read_values(image, self.image), turn), grid, self.modality)


def _list_cases(folder: pathlib.Path, dataset: str, modality: str) -> tuple[list[Case], list[str]]:
    cases: list[Case] = []
    unused: list[str] = []
    shared = read_description(folder)
    for path in _case_folders(folder):
        found = _find_image(path)
        if found is None:
            unused += map(str, list_volumes(path).values())
            continue
        image, told = found
        try:
            description = read_description(limits.check_inside(folder, path)) or shared
        except SourceError as error:
            cases.append(UnusableCase(path.name, error))
            continue
        labels = find_volume(path, MULTILABEL) or path / MASKS
        modality_of_case = told or _modality_of(description) or modality
        cases.append(_NiftiCase(folder, dataset, path.name, image, labels, modality_of_case, description))
    return cases, unused


def _list_msd(folder: pathlib.Path, dataset: str, modality: str) -> tuple[list[Case], list[str]]:
    images, labels = list_volumes(folder / "imagesTr"), list_volumes(folder / "labelsTr")
    description = read_description(folder)
    site = str(description.get("name", "")).lower()
    modality = _modality_of(description) or modality
    owned = {name: next((stem for stem in (name, f"{name}_0000") if stem in images), None) for name in labels}
    unused = [str(path) for stem, path in images.items() if stem not in owned.values()]
    unused += [str(labels[name]) for name, stem in owned.items() if stem is None]
    cases: list[Case] = [
        _NiftiCase(folder, dataset, name, images[stem], labels[name], modality, description, site)
        for name, stem in owned.items()
        if stem is not None
    ]
    return cases, unused


def _list_pairs(
    folder: pathlib.Path, dataset: str, modality: str, images: str, labels: str, names: Mapping[str, Any]
) -> tuple[list[Case], list[str]]:
    pairs, unused = pair_files(folder, images, [labels])
    description = read_description(folder)
    if modality == "unknown":
        modality = _modality_of(description) or modality
    cases: list[Case] = []
    for pair in pairs:
        paths = [path for path, _, _ in pair.annotations]
        if len(paths) > 1:
            error = SourceError(f"{pair.image}: has several label files: {describe(paths)}; the pattern must find one")
            cases.append(UnusableCase(pair.image_id, error))
            continue
        whose = pair.words.get("patient") or pair.words.get("id", "")
        cases.append(
            _NiftiCase(folder, dataset, pair.image_id, pair.image, paths[0], modality, description, "", whose, names)
        )
    return cases, unused


def _read_names(values: Mapping[Any, Any] | tuple[str, ...], folder: pathlib.Path) -> dict[str, Any]:
    """Returns the names of the values as dataset.json has them, value: name."""
    entries = values.items() if isinstance(values, Mapping) else enumerate(values)
    names = {str(key): name for key, name in entries}
    if not all(key.isdecimal() and isinstance(name, str) for key, name in names.items()):
        raise SourceError(
            f"{folder}: the option values must name label values, as {{1: liver, 2: spleen}} or [background, liver, "
            f"spleen], found {str(values)[:200]}"
        )
    return names


def _modality_of(description: Mapping[str, Any]) -> str:
    """Returns the modality of the first channel in dataset.json, "" where it does not tell."""
    channels = description.get("channel_names") or description.get("modality") or {}
    first = str(channels.get("0", "")) if isinstance(channels, dict) else str(channels)
    return find_modality(first) or ("mri" if _MR_SEQUENCES.fullmatch(first.strip()) else "")
