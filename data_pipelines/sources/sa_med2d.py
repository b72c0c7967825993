"""SA-Med2D-20M (arXiv 2311.11969): images/, masks/, one mask file an instance, and JSON files that pair them."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, find_modality, hash_patient, make_region
from data_pipelines.images import is_image, read_mask, store_image
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.masks import outline

_PAIRS = ("SAMed2D_v1.json", "image2label*.json", "label2image*.json")
_CLASSES = "SAMed2D_v1_class_mapping_id.json"


def _find_json(folder: pathlib.Path, *patterns: str) -> list[pathlib.Path]:
    """Files in a folder or one of its subfolders, images and masks apart: there may be millions."""
    if not folder.is_dir():
        return []
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("images", "masks"))]
    places = [place for place in places if place == folder or not limits.is_hidden(place.name)]
    found = (path for pattern in patterns for place in places for path in sorted(place.glob(pattern)))
    return [path for path in found if not limits.is_hidden(path.name)]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    content = limits.read_json(path, "annotation_bytes")
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected a mapping of file names, found a {type(content).__name__}")
    return content


def _read_pairs(path: pathlib.Path) -> dict[str, list[str]]:
    """Masks of each image, from a file of either direction."""
    pairs: dict[str, list[str]] = {}
    for key, value in _read_json(path).items():
        if isinstance(value, str):
            pairs.setdefault(value, []).append(key)
        elif isinstance(value, list) and all(isinstance(mask, str) for mask in value):
            pairs.setdefault(key, []).extend(value)
        else:
            raise SourceError(f"{path}: expected the masks of {key!r}, or its image, found {str(value)[:80]}")
    return pairs


def _find_root(path: pathlib.Path, file_name: str) -> pathlib.Path:
    """The folder that names in a JSON file are relative to: its own, or the one above."""
    return next((root for root in path.parents[:2] if (root / file_name).parent.is_dir()), path.parent)


def _parse_name(stem: str) -> tuple[str, str, str]:
    """Returns modality, data set and patient of an image, "" where its name does not say.

    Names are MODALITY_SUB--DATASET--CASE--AXIS_SLICE or, in the demo, CASE_SLICE. The slices of a case, and its MRI
    sequences, are one patient.
    """
    parts = stem.split("--")
    if len(parts) < 4:
        case = re.fullmatch(r"(.+)_\d+", stem)
        return "", "", case[1] if case else ""
    modality = find_modality("-".join(parts[0].split("_")[:2]))  # "x_ray", "mr_t1"
    return modality, parts[1], f"{parts[1]}/{'--'.join(parts[2:-1])}"


def _fold_number(number: object) -> str:
    """A class id as file names have it, "0003", or as a number: "3"."""
    text = str(number)
    return text.lstrip("0") or "0" if text.isdecimal() else text


class SAMed2D(Sequence[GroundingExample]):
    """images/, masks/ and SAMed2D_v1.json (image: its masks), or the demo's image2label*.json and label2image*.json.

    The full set names images MODALITY_SUB--DATASET--CASE--AXIS_SLICE.png and masks IMAGE--CLASS_INSTANCE.png; class ids
    of each data set are in SAMed2D_v1_class_mapping_id.json. The demo names masks IMAGE_LABEL_INSTANCE.png. A mask file
    is a region. Examples are the images in the JSON files; files that those do not name are unused.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        files = _find_json(folder, *_PAIRS)
        masks: dict[pathlib.Path, dict[str, None]] = {}  # of an image, each once
        folders: set[pathlib.Path] = set()
        for path in files:
            pairs = _read_pairs(limits.check_inside(folder, path))
            root = _find_root(path, next(iter(pairs), ""))
            folders |= {root / name for image in list(pairs)[:1] for name in (image, *pairs[image][:1])}
            for image, names in pairs.items():
                masks.setdefault(root / image, {}).update(dict.fromkeys(str(root / name) for name in names))
        if not masks:
            found = "no image in them" if files else "none of them"
            raise SourceError(f"{folder}: expected {', '.join(_PAIRS)} with pairs of images and masks, found {found}")
        self._items = [(path, list(names)) for path, names in masks.items()]
        stems: dict[str, pathlib.Path] = {}
        for path, _ in self._items:
            if stems.setdefault(path.stem, path) != path:
                raise SourceError(f"{stems[path.stem]} and {path} have the same name: it is the image's id")
        used = {str(path) for path in masks} | {name for names in masks.values() for name in names}
        self.unused = sorted(
            entry.path
            for place in {path.parent for path in folders if self._is_inside(path) and path.parent.is_dir()}
            for entry in os.scandir(place)
            if entry.path not in used and is_image(entry.name)
        )
        classes = _find_json(folder, _CLASSES)
        self._classes_file = str(classes[0] if classes else folder / _CLASSES)
        content = _read_json(limits.check_inside(folder, classes[0])) if classes else {}
        self._names = {
            (name, _fold_number(number)): label
            for name, labels in content.items()
            for label, number in (labels.items() if isinstance(labels, dict) else ())
        }

    def _check_inside(self, path: pathlib.Path) -> pathlib.Path:
        """The JSON files name the images and masks: see `limits.resolve_inside`."""
        return limits.resolve_inside(self._folder, os.path.relpath(path, self._folder))

    def _is_inside(self, path: pathlib.Path) -> bool:
        try:
            self._check_inside(path)
        except SourceError:
            return False
        return True

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return bool(_find_json(folder, *_PAIRS))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        path, masks = self._items[index]
        modality, subset, patient = _parse_name(path.stem)
        image = store_image(self._check_inside(path))
        return GroundingExample(
            image=image.encoded,
            image_id=path.stem,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(patient, self._dataset) if patient else "",
            modality=modality or self._modality,
            regions=tuple(
                self._read_mask(pathlib.Path(mask), path.stem, subset, (image.height, image.width)) for mask in masks
            ),
        )

    def _read_mask(self, path: pathlib.Path, stem: str, subset: str, size: tuple[int, int]) -> Region:
        found = re.fullmatch(re.escape(stem) + ("--" if subset else "_") + r"(.+)_\d+", path.stem)
        if not found:
            raise SourceError(f"{path}: expected a mask named {stem}{'--CLASS' if subset else '_LABEL'}_INSTANCE")
        name = self._names.get((subset, _fold_number(found[1])), "") if subset else found[1]
        if not name:
            raise SourceError(f"{path}: {self._classes_file} has no class {found[1]} of {subset}")
        mask: np.ndarray = read_mask(self._check_inside(path), size)
        try:
            return make_region(name, **outline(mask))
        except SourceError as error:
            raise SourceError(f"{path}: {error}") from None
