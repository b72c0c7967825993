"""Pascal VOC: one XML file an image, boxes as 1-based pixels with both corners inside."""

import functools
import math
import os
import pathlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, make_region
from data_pipelines.images import list_images, store_image
from data_pipelines.schema import GroundingExample, Region

IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "")
ANNOTATION_FOLDERS = ("Annotations", "annotations", "")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _list_annotations(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """Returns the folder of the XML files, and their paths relative to it."""
    for place in (folder / name for name in ANNOTATION_FOLDERS):
        if paths := limits.list_files(place, ".xml"):
            return place, [path.relative_to(place).as_posix() for path in paths]
    return folder, []


def _number(element: ElementTree.Element, name: str, path: pathlib.Path) -> float:
    text = element.findtext(name) or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SourceError(f"{path}: <{name}> of <{element.tag}> is {text!r}, expected a number")
    return value


def half_open_box(xmin: float, ymin: float, xmax: float, ymax: float) -> np.ndarray:
    """VOC's 1-based corners, both inside the box, as float32[4] half-open: (xmin - 1, ymin - 1, xmax, ymax).

    Corners that coincide or are swapped hold no area, though the convention would make a pixel of the former:
    annotation tools write them for a stray click.
    """
    if xmax <= xmin or ymax <= ymin:
        return np.asarray([xmin - 1, ymin - 1, xmax - 1, ymax - 1], np.float32)
    return np.asarray([xmin - 1, ymin - 1, xmax, ymax], np.float32)


class PascalVOC(Sequence[GroundingExample]):
    """A folder with JPEGImages/ and Annotations/, or with images and XML files side by side.

    The image of an XML file is the one of the same name, else the one in its <filename>. The image's id is the XML
    file's path without suffix. Images without an XML file are not examples: nobody has looked at them.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        # Names rather than paths, which take four times the memory and go to every worker.
        self._place, self._annotations = _list_annotations(folder)
        if not self._annotations:
            raise SourceError(f"{folder}: no .xml files in it or in its Annotations/ folder")
        images: dict[str, pathlib.Path] = {}
        for name in IMAGE_FOLDERS:
            self._image_folder = folder / name
            if images := list_images(self._image_folder):
                break
        if not images:
            raise SourceError(f"{folder}: no images in it or in its JPEGImages/ folder")
        self._suffixes = {stem: path.suffix for stem, path in images.items()}
        annotated = {os.path.splitext(name)[0] for name in self._annotations}
        self.unused = [str(path) for stem, path in images.items() if stem not in annotated]

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return folder.is_dir() and bool(_list_annotations(folder)[1])

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        name = self._annotations[index]
        image_id, path = os.path.splitext(name)[0], self._place / name
        limits.check_inside(self._folder, path)
        try:
            content = limits.read_bytes(path, "image_annotation_bytes")
        except FileNotFoundError:
            raise SourceError(f"{path}: there is no such file") from None
        root = limits.parse_xml(content, path)
        if root.tag != "annotation":
            raise SourceError(f"{path}: its root is <{root.tag}>, expected <annotation>")
        size = root.find("size")
        annotated = (0, 0)
        if size is not None:
            annotated = (int(_number(size, "height", path)), int(_number(size, "width", path)))
        found = self._find_image(image_id, root, path)
        image = store_image(found, annotated if all(annotated) else None, self._folder)
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(_read_object(element, path) for element in root.findall("object")),
        )

    def _find_image(self, image_id: str, root: ElementTree.Element, path: pathlib.Path) -> pathlib.Path:
        file_name = (root.findtext("filename") or "").strip()
        stem = image_id if image_id in self._suffixes else self._by_name.get(pathlib.PurePath(file_name).name)
        if stem is None:
            raise SourceError(f"{path}: there is no image {image_id}.* nor {file_name!r}")
        return self._image_folder / f"{stem}{self._suffixes[stem]}"

    @functools.cached_property
    def _by_name(self) -> dict[str, str]:
        """Stems by the names of the images in whatever folder, for annotations that are called otherwise."""
        return {f"{stem.rsplit('/', 1)[-1]}{suffix}": stem for stem, suffix in self._suffixes.items()}


def _read_object(element: ElementTree.Element, path: pathlib.Path) -> Region:
    bounds = element.find("bndbox")
    if bounds is None:
        raise SourceError(f"{path}: an <object> has no <bndbox>")
    box = half_open_box(*(_number(bounds, corner, path) for corner in _CORNERS))
    try:
        return make_region(element.findtext("name") or "", box)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None
