"""YOLO: a text file an image, a line an object, coordinates relative to the image (Ultralytics' folders)."""

import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import yaml

from data_pipelines import limits
from data_pipelines.curate import SourceError, clean_name, make_region
from data_pipelines.images import list_images, store_image
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.coco import encode_segmentation

_YAML_FILES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
_CLASSES = "classes.txt"


def absolute_box(cx: float, cy: float, width: float, height: float, size: tuple[int, int]) -> np.ndarray:
    """A relative centre and size as float32[4] x0 y0 x1 y1 in pixels of an image of `size` (height, width)."""
    corners = np.asarray([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2])
    return (corners * [size[1], size[0], size[1], size[0]]).astype(np.float32)


def _parts(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path, pathlib.Path]]:
    """Prefix of the image ids, images/ and labels/: of the folder itself and of its train/, valid/ ..."""
    if not folder.is_dir():
        return
    for part in (
        folder,
        *sorted(path for path in folder.iterdir() if path.is_dir() and not limits.is_hidden(path.name)),
    ):
        if (part / "images").is_dir() and (part / "labels").is_dir():
            yield "" if part == folder else f"{part.name}/", part / "images", part / "labels"


def _label_files(labels: pathlib.Path) -> Iterator[pathlib.Path]:
    return (path for path in limits.walk_files(labels, ".txt") if path.name != _CLASSES)


def _read_names(folder: pathlib.Path, labels: Sequence[pathlib.Path]) -> tuple[pathlib.Path, dict[int, str]]:
    """Returns the file that names the classes and the names by class id."""
    for path in (folder / name for name in _YAML_FILES):
        if path.is_file():
            return path, _read_yaml_names(limits.check_inside(folder, path))
    for path in (parent / _CLASSES for parent in (folder, *labels)):
        if path.is_file():
            return path, dict(enumerate(line.strip() for line in _read_lines(folder, path)))
    raise SourceError(f"{folder}: the classes have no names: expected data.yaml with 'names', or {_CLASSES}")


def _read_lines(root: pathlib.Path, path: pathlib.Path) -> list[str]:
    return limits.read_text(limits.check_inside(root, path)).rstrip().splitlines()


def _read_yaml_names(path: pathlib.Path) -> dict[int, str]:
    try:
        content = yaml.load(limits.read_text(path), Loader=yaml.BaseLoader)  # the class "no" is a name, not False
        names = content["names"]
        pairs = list(names.items() if isinstance(names, dict) else enumerate(names))
        # As text, lists of aliases of lists of aliases would be endless.
        if isinstance(names, str) or not all(isinstance(name, str) for _, name in pairs):
            raise TypeError("names that are no text")
        return {int(key): name for key, name in pairs}
    except yaml.YAMLError as error:
        raise SourceError(f"{path}: no valid YAML ({error})") from None
    except RecursionError:
        raise SourceError(f"{path}: no usable YAML: it is nested too deeply") from None
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{path}: expected 'names', a list of class names or a mapping of class ids to them; found {error!r}"
        ) from None


class YOLO(Sequence[GroundingExample]):
    """images/ and labels/ with the same subfolders, or folders such as train/ and valid/ that each have the two.

    A line of a text file is "class cx cy width height" or, for segmentation, "class x1 y1 x2 y2 x3 y3 ...", relative to
    the image's size. Class names come from data.yaml, dataset.yaml or classes.txt. Images are those in the folders,
    whatever paths a data.yaml names. An empty text file is an image without boxes. So is a missing one where there is a
    data.yaml, as Ultralytics documents it, if the folder of labels has others; else the image is unused, for nothing
    says that somebody looked at it.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        parts = list(_parts(folder))
        if not parts:
            raise SourceError(f"{folder}: expected images/ and labels/, or train/images/ and train/labels/ ...")
        self._names_file, self._names = _read_names(folder, [labels for _, _, labels in parts])
        self._items: list[tuple[str, pathlib.Path | None, pathlib.Path]] = []  # image id, image, text file
        self.unused: list[str] = []
        for prefix, image_folder, label_folder in parts:
            images = list_images(image_folder)
            labels = {
                path.relative_to(label_folder).with_suffix("").as_posix(): path for path in _label_files(label_folder)
            }
            annotated = {path.parent for path in labels.values()} if self._names_file.name in _YAML_FILES else set()
            for stem in sorted({*images, *labels}):
                label = labels.get(stem, label_folder / f"{stem}.txt")
                if stem in labels or label.parent in annotated:
                    self._items.append((prefix + stem, images.get(stem), label))
                else:
                    self.unused.append(str(images[stem]))
        if not self._items:
            raise SourceError(f"{folder}: no .txt files in labels/")

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return any(True for _, _, labels in _parts(folder) for _ in _label_files(labels))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id, path, labels = self._items[index]
        if path is None:
            raise SourceError(f"{labels}: there is no image {image_id}.* in images/")
        image = store_image(path, root=self._folder)
        lines = _read_lines(self._folder, labels) if os.path.lexists(labels) else []
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(
                self._read_line(line.split(), (image.height, image.width), f"{labels}, line {number}")
                for number, line in enumerate(lines, 1)
                if line.strip()
            ),
        )

    def _read_line(self, words: list[str], size: tuple[int, int], where: str) -> Region:
        try:
            label, *values = map(float, words)
        except ValueError:
            label, values = math.nan, []
        polygon = len(values) >= 6 and len(values) % 2 == 0
        if not label.is_integer() or not (polygon or len(values) == 4):
            raise SourceError(
                f"{where}: {' '.join(words)[:80]!r} is neither 'class cx cy width height' nor "
                "'class x1 y1 x2 y2 x3 y3 ...'"
            )
        if not all(-1 <= value <= 2 for value in values):
            raise SourceError(f"{where}: coordinates are relative to the image's size, from 0 to 1; found {values[:8]}")
        name = self._names.get(int(label), "")
        if not clean_name(name):
            raise SourceError(f"{where}: class {int(label)} has no name in {self._names_file}")
        if not polygon:
            return make_region(name, absolute_box(*values, size=size))
        points = np.reshape(values, (-1, 2)) * [size[1], size[0]]  # [P, 2] x y
        mask = encode_segmentation([points.ravel().tolist()], size, where)
        return make_region(name, np.concatenate([points.min(0), points.max(0)]), mask=mask)
