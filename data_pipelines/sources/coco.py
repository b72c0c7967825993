"""COCO: one JSON file of images, annotations and categories; also captions with spans, as MDETR's data have them."""

import array
import collections
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_pipelines import limits
from data_pipelines.curate import SourceError, clean_name, hash_patient, make_region, name_region
from data_pipelines.images import store_image
from data_pipelines.json_lists import load_places, read_members
from data_pipelines.schema import GroundingExample, Region

_HEAD = 2**16  # characters looked at to tell whether a file is COCO
_LISTS = ("images", "annotations", "categories")


def _list_json(folder: pathlib.Path) -> list[pathlib.Path]:
    """JSON files that can be COCO, which excludes those of other kinds that lie beside images."""
    if folder.is_file():
        return [folder] if folder.suffix == ".json" else []
    paths = sorted(folder.glob("*.json")) + sorted(folder.glob("annotations/*.json"))
    return [path for path in paths if not limits.is_hidden(path.name) and _looks_like_coco(path)]


def _looks_like_coco(path: pathlib.Path) -> bool:
    head = limits.read_head(path, _HEAD)
    if not head.lstrip().startswith("{"):
        return False
    # A long list may come before the images; a file read to its end without them is something else, such as the
    # notes.json of Label Studio's YOLO export.
    return '"images"' in head or (len(head) == _HEAD and any(f'"{k}"' in head for k in ("annotations", "categories")))


class COCO(Sequence[GroundingExample]):
    """A COCO JSON file, or a folder with one in it or in its annotations/ folder, and the images that it names.

    `file_name` is looked up beside the JSON file, in the folder, and in their subfolders. Instances have `bbox`
    (x y width height), `category_id`, and optionally `segmentation` (polygons or run lengths) and `iscrowd`. Where an
    image has a `caption`, an annotation's `tokens_positive` ([[start, end], ...], half-open characters) are its
    phrase, as in MDETR's final_flickr_separateGT and final_mixed. An image's id is its file name without suffix, with
    its COCO id after it where several entries share the file; those stay in one split. `patient_id` of an image is
    hashed, and LVIS's `neg_category_ids` become `absent`. Of the JSON file only places are kept: an image's entries are
    read again when it is asked for.
    """

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality = dataset, modality
        paths = _list_json(folder)
        if len(paths) != 1:
            found = f"several: {', '.join(map(str, paths))}; give one of them as --input" if paths else "none"
            raise SourceError(
                f"{folder}: expected one COCO .json file in it or in its annotations/ folder, found {found}"
            )
        self._path = paths[0]
        parent = self._path.parent
        self._root = parent.parent if parent.name == "annotations" else parent
        limits.check_inside(self._root, self._path)
        self._read_file()
        self._folders = list(_image_folders(self._root))
        self.unused: list[str] = []

    def _read_file(self) -> None:
        """Finds where the entries of the images and their annotations lie in the file, which may have millions.

        Raises:
            SourceError: the file is no COCO.
        """
        self._names: dict[Any, str] = {}
        codes: dict[Any, int] = {}  # of image ids, which either list may name first
        places, owners = {key: array.array("q") for key in _LISTS}, {key: array.array("q") for key in _LISTS}
        stems: collections.Counter[str] = collections.Counter()
        try:
            for key, entry, start, stop in read_members(self._path, _LISTS, "annotation_bytes", ("categories",)):
                if key == "categories":
                    self._names[int(entry["id"])] = str(entry["name"])
                    continue
                if key == "images":
                    stems[_stem(entry)] += 1
                owner = entry["id" if key == "images" else "image_id"]
                owners[key].append(codes.setdefault(owner, len(codes)))
                places[key].extend((start, stop))
        except SourceError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise SourceError(
                f"{self._path}: not COCO: lists 'images' (id, file_name), 'annotations' (image_id) and "
                f"'categories' (id, name) are expected; the problem is {error!r}"
            ) from None
        images, annotated = (np.asarray(owners[key], np.int64) for key in _LISTS[:2])
        if not len(images):
            raise SourceError(f"{self._path}: names no images")
        if len(np.unique(images)) != len(images):
            raise SourceError(f"{self._path}: several images have the same id")
        if strangers := set(np.setdiff1d(annotated, images).tolist()):
            unknown = min((id_ for id_, code in codes.items() if code in strangers), key=str)
            raise SourceError(f"{self._path}: annotations of image id {unknown}, which is not in 'images'")
        order = np.argsort(annotated, kind="stable")
        self._images = np.asarray(places["images"], np.int64).reshape(-1, 2)
        self._annotations = np.asarray(places["annotations"], np.int64).reshape(-1, 2)[order]
        # Annotations of image i are those from bounds[i, 0] to bounds[i, 1].
        self._bounds = np.stack([np.searchsorted(annotated[order], images, side) for side in ("left", "right")], axis=1)
        self._shared = {stem for stem, uses in stems.items() if uses > 1}

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        # The constructor takes any file that is named, and says what is wrong with it; not every .json file is COCO.
        return any(_looks_like_coco(path) for path in _list_json(folder))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        start, stop = self._bounds[index].tolist()
        places = [self._images[index].tolist(), *self._annotations[start:stop].tolist()]
        entry, *annotations = load_places(self._path, places)
        stem = _stem(entry)
        where = f"{self._path}, image id {entry['id']}"
        size = _read_size(entry, where)
        image = store_image(self._find_image(entry.get("file_name"), where), size if all(size) else None, self._root)
        shared = stem in self._shared
        group = str(entry.get("patient_id") or (stem if shared else ""))
        caption = entry.get("caption") or ""
        if not isinstance(caption, str):
            raise SourceError(f"{where}: its caption is no text: {str(caption)[:80]}")
        return GroundingExample(
            image=image.encoded,
            image_id=f"{stem}-{entry['id']}" if shared else stem,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            patient_id=hash_patient(group, self._dataset) if group else "",
            modality=self._modality,
            caption=caption,
            regions=tuple(
                self._read_region(annotation, caption, (image.height, image.width)) for annotation in annotations
            ),
            absent=tuple(name_region(self._category(c, where))["label"] for c in entry.get("neg_category_ids", ())),
        )

    def _find_image(self, file_name: Any, where: str) -> pathlib.Path:
        if not isinstance(file_name, str) or not file_name:
            raise SourceError(f"{where}: its 'file_name' is {file_name!r}, expected a path in {self._root}")
        for position, folder in enumerate(self._folders):
            if (path := self._resolve(file_name, folder, where)).is_file():
                self._folders.insert(0, self._folders.pop(position))  # the next one is most likely there too
                return path
        raise SourceError(f"{where}: there is no {file_name} in {', '.join(map(str, self._folders))}")

    def _resolve(self, file_name: str, folder: pathlib.Path, where: str) -> pathlib.Path:
        try:
            return limits.resolve_inside(self._root, file_name, folder)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None

    def _category(self, category_id: Any, where: str) -> str:
        name = self._names.get(category_id, "") if isinstance(category_id, int | float) else ""
        if not clean_name(name):
            raise SourceError(f"{where}: 'categories' has no id {category_id!r} with a name")
        return name

    def _read_region(self, annotation: dict[str, Any], caption: str, size: tuple[int, int]) -> Region:
        where = f"{self._path}, annotation id {annotation.get('id')}"
        fields: Any = {"iscrowd": bool(annotation.get("iscrowd", 0))}
        if annotation.get("tokens_positive"):
            fields["spans"], name = _read_spans(annotation["tokens_positive"], caption, where)
            fields["phrase"] = name
        else:
            name = self._category(annotation.get("category_id"), where)
        if annotation.get("segmentation"):
            fields["mask"] = encode_segmentation(annotation["segmentation"], size, where)
        bounds = annotation.get("bbox", ())
        if not bounds and "mask" in fields:
            bounds = coco_mask.toBbox(fields["mask"]).tolist()
        try:
            x, y, width, height = map(float, bounds)
            return make_region(name, np.asarray([x, y, x + width, y + height]), **fields)
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{where}: bbox {bounds} of {name!r} is no usable [x, y, width, height] ({error})"
            ) from None


def _stem(entry: dict[str, Any]) -> str:
    return os.path.splitext(str(entry.get("file_name") or ""))[0]


def _read_size(entry: dict[str, Any], where: str) -> tuple[int, int]:
    """Height and width that an image's entry gives, zeros where it does not."""
    sides = [entry.get(name) or 0 for name in ("height", "width")]
    try:
        height, width = (int(float(side)) for side in sides)
    except (TypeError, ValueError, OverflowError):
        height = width = -1
    if min(height, width) < 0:
        raise SourceError(f"{where}: its 'height' and 'width' are {sides[0]!r} and {sides[1]!r}, expected pixels")
    return height, width


def _image_folders(root: pathlib.Path) -> Iterator[pathlib.Path]:
    yield root
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not limits.is_hidden(path.name)):
        yield folder
        yield from sorted(path for path in folder.iterdir() if path.is_dir() and not limits.is_hidden(path.name))


def _read_spans(spans: Any, caption: str, where: str) -> tuple[tuple[tuple[int, int], ...], str]:
    """Returns the spans and the words that they cover, joined by a space."""
    try:
        pairs = tuple((int(start), int(end)) for start, end in spans)
    except (TypeError, ValueError):
        raise SourceError(f"{where}: tokens_positive is {spans}, expected [[start, end], ...]") from None
    words = " ".join(caption[start:end].strip() for start, end in pairs)
    if not all(0 <= start < end <= len(caption) for start, end in pairs) or not words.strip():
        raise SourceError(f"{where}: tokens_positive {spans} are no words of its image's caption {caption!r}")
    return pairs, words


def encode_segmentation(segmentation: Any, size: tuple[int, int], where: str) -> dict:
    """Returns polygons, or run lengths of either kind, as compressed COCO run lengths of an image of this size.

    Raises:
        SourceError: it is malformed, of another size, or has corners farther outside than the image is long, along
            whose edges pycocotools would reserve memory.
    """
    try:
        if isinstance(segmentation, list):
            for polygon in segmentation:
                corners = np.asarray(polygon, np.float64)
                if not (np.abs(corners - max(size) / 2) <= 1.5 * max(size)).all():
                    raise ValueError("its corners are far outside the image")
            parts = coco_mask.frPyObjects(segmentation, *size)
            encoded = parts[0] if len(parts) == 1 else coco_mask.merge(parts)
        elif tuple(segmentation["size"]) != size:  # before it is decoded
            encoded = segmentation
        elif isinstance(segmentation["counts"], list):
            encoded = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        else:
            encoded = coco_mask.encode(coco_mask.decode(segmentation))  # decoding checks it
    except Exception as error:  # pycocotools raises bare Exception and TypeError for malformed input
        raise SourceError(f"{where}: its segmentation cannot be read ({error})") from None
    if tuple(encoded["size"]) != size:
        raise SourceError(f"{where}: its mask is of size {encoded['size']}, its image {list(size)} (height, width)")
    return {"size": list(size), "counts": encoded["counts"]}
