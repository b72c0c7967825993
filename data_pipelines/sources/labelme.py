"""LabelMe: a JSON file an image, beside it, with shapes."""

import base64
import contextlib
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines import limits
from data_pipelines.curate import SourceError, make_region
from data_pipelines.images import list_images, open_image, store_image
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.coco import encode_segmentation
from data_pipelines.sources.masks import encode_mask

_HEAD = 2**16  # characters looked at to tell whether a file is LabelMe's
_POLYGONS = ("polygon", "oriented_rectangle", "rotation")
_WITHOUT_AREA = ("point", "points", "line", "linestrip")
_CIRCLE_POINTS = 64


def _looks_like_labelme(path: pathlib.Path) -> bool:
    head = limits.read_head(path, _HEAD)
    return head.lstrip().startswith("{") and '"shapes"' in head


class LabelMe(Sequence[GroundingExample]):
    """Images with JSON files, in one folder or in subfolders, as LabelMe writes them.

    The image is the one of the same name beside the JSON file, else its `imagePath`; a copy inside it is not used.
    Polygons, circles and painted masks become regions with masks, rectangles become boxes, and shapes with the same
    label and `group_id` are one region. Points and lines have boxes without area, which curation drops and counts.
    A file without shapes is an image without boxes; an image without a file is unused.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality, self._folder = dataset, modality, folder
        found = limits.list_files(folder, ".json")
        self._paths = [path for path in found if _looks_like_labelme(path)]
        if not self._paths:
            raise SourceError(f"{folder}: no .json files with 'shapes' in it")
        self._images = list_images(folder)
        stems = {self._stem(path) for path in self._paths}
        self.unused = [str(path) for path in found if self._stem(path) not in stems]
        self.unused += [str(path) for stem, path in self._images.items() if stem not in stems]

    def _stem(self, path: pathlib.Path) -> str:
        return path.relative_to(self._folder).with_suffix("").as_posix()

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        return folder.is_dir() and any(_looks_like_labelme(path) for path in limits.walk_files(folder, ".json"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        path = self._paths[index]
        content = limits.read_json(limits.check_inside(self._folder, path))
        try:
            shapes = list(content["shapes"])
            annotated = (int(content.get("imageHeight") or 0), int(content.get("imageWidth") or 0))
            name = str(content.get("imagePath") or "").replace("\\", "/")  # LabelMe on Windows
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise SourceError(f"{path}: not LabelMe's: 'shapes' is expected; the problem is {error!r}") from None
        image = store_image(self._find_image(path, name), annotated if all(annotated) else None, self._folder)
        size = (image.height, image.width)
        return GroundingExample(
            image=image.encoded,
            image_id=self._stem(path),
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(_read_group(group, size) for group in _group(shapes, path)),
        )

    def _find_image(self, path: pathlib.Path, name: str) -> pathlib.Path:
        beside = self._images.get(self._stem(path))
        if beside is not None:
            return beside
        if name:
            try:
                image = limits.resolve_inside(self._folder, name, path.parent)
            except SourceError as error:
                raise SourceError(f"{path}: its imagePath: {error}") from None
            if image.is_file():
                return image
        raise SourceError(f"{path}: there is no image {path.stem}.* beside it nor its imagePath {name!r}")


def _group(shapes: Sequence[Any], path: pathlib.Path) -> list[list[tuple[str, dict[str, Any]]]]:
    """Shapes of one region each, with where they are in the file."""
    groups: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
    for number, shape in enumerate(shapes, 1):
        where = f"{path}, shape {number}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise SourceError(f"{where}: expected 'label', 'points' and 'shape_type', found {str(shape)[:80]}")
        group = shape.get("group_id")
        groups.setdefault(number if group is None else (shape["label"], str(group)), []).append((where, shape))
    return list(groups.values())


def _read_group(group: Sequence[tuple[str, dict[str, Any]]], size: tuple[int, int]) -> Region:
    boxes, masks, only_boxes = [], [], True
    spots = []  # boxes without area, which count only where there is nothing else
    for where, shape in group:
        points, kind = _read_points(shape, where), shape.get("shape_type") or "polygon"
        box, outline = np.concatenate([points.min(0), points.max(0)]), points
        if kind == "circle" and len(points) == 2:
            radius = math.dist(*points)
            angles = np.linspace(0, 2 * np.pi, _CIRCLE_POINTS, endpoint=False)
            outline = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            box = np.concatenate([points[0] - radius, points[0] + radius])
        elif kind == "rectangle" and len(points) in (2, 4):
            outline = box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)
        elif kind not in ("mask", *_WITHOUT_AREA) and not (kind in _POLYGONS and len(points) >= 3):
            raise SourceError(f"{where}: a {kind!r} of {len(points)} points cannot be read")
        if kind in _WITHOUT_AREA:
            spots.append(box[[0, 1, 0, 1]])
        elif kind == "mask":
            boxes.append(box + np.asarray([0, 0, 1, 1]))  # its corners are pixels, both inside
            masks.append(_paste_mask(shape, points, size, where))
        else:
            boxes.append(box)
            masks.append(encode_segmentation([outline.ravel().tolist()], size, where))
        only_boxes &= kind in ("rectangle", *_WITHOUT_AREA)
    bounds = np.asarray(boxes or spots[:1])
    bounds = np.concatenate([bounds[:, :2].min(0), bounds[:, 2:].max(0)])
    where, shape = group[0]
    mask = None if only_boxes else {"size": list(size), "counts": coco_mask.merge(masks)["counts"]}
    try:
        return make_region(shape["label"], bounds, mask=mask)
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from None


def _read_points(shape: dict[str, Any], where: str) -> np.ndarray:
    """Returns float64[P, 2], x and y, of at least one point (no points are an array of one axis)."""
    points: np.ndarray = np.zeros(0)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        points = np.asarray(shape["points"], np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise SourceError(f"{where}: 'points' of {shape['label']!r} must be [[x, y], ...]")
    return points


def _paste_mask(shape: dict[str, Any], points: np.ndarray, size: tuple[int, int], where: str) -> dict:
    """A painted mask is an image inside the JSON file, that of the box between two points."""
    try:
        image = open_image(base64.b64decode(shape["mask"], validate=True), where)
        pixels = np.asarray(image.convert("L")) > 0  # [H, W]
        x, y = points[0].round().astype(int)
        if min(x, y) < 0:  # which would count from the other side
            raise ValueError(f"it starts at {x}, {y}")
        mask = np.zeros(size, bool)
        mask[y : y + image.height, x : x + image.width] = pixels
    except (KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise SourceError(f"{where}: its mask cannot be read or leaves the image ({error})") from None
    return encode_mask(mask)
