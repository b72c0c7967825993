"""One mask an image whose values or colours are labels, and a table that names them."""

import collections
import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import limits
from data_pipelines.curate import SourceError, clean_name, make_region
from data_pipelines.images import describe, is_image, list_images, read_label_map, store_image
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.masks import outline
from data_pipelines.volumes import counts_components, split_components

TABLES = ("labels.json", "classes.csv", "label_colors.txt")
_MASK_FOLDERS = ("masks", "labels", "annotations")
_ENDINGS = ("", "_mask", "_masks", "_label", "_labels", "_seg", "_segmentation", "_L")  # after the image's name
BACKGROUND = ("", "background", "void", "unlabeled", "unlabelled", "ignore")
REGIONS = ("", "component", "label")
_LINE = re.compile(r"(\d+)(?:[\s,]+(\d+)[\s,]+(\d+))?[\s,:]+(\D.*)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A label of the table; `regions` says whether each connected component or the whole label is one region."""

    name: str
    regions: str = ""

    def split(self, mask: np.ndarray) -> Iterator[Region]:
        """Yields the regions of a bool[H, W] mask of the label; background has none."""
        if self.name.lower() in BACKGROUND:
            return
        one_by_one = self.regions == "component" or (not self.regions and counts_components(self.name))
        for part in split_components(mask, one_by_one=one_by_one)[0]:
            yield make_region(self.name, **outline(part))


def _find_table(folder: pathlib.Path) -> pathlib.Path | None:
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def _find_masks(folder: pathlib.Path) -> pathlib.Path | None:
    """The first of the mask folders that holds an image."""
    for name in _MASK_FOLDERS:
        if any(is_image(path.name) for path in limits.walk_files(folder / name)):
            return folder / name
    return None


def _value_field(value: Any) -> str:
    return "id" if isinstance(value, int) else "color"


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return _object_rows(limits.read_json(path, "annotation_bytes"), str(path))


def _object_rows(content: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(content, dict):
        content = [
            {"name": value, "id": key} if key.isdecimal() else {"name": key, _value_field(value): value}
            for key, value in content.items()
        ]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise SourceError(f"{path}: expected a list of labels, each with 'name' and 'id' or 'color'")
    for number, row in enumerate(content, 1):
        color = row.get("color")
        if isinstance(color, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", color):
            color = list(bytes.fromhex(color[1:]))
        color = color if isinstance(color, list) and len(color) == 3 else [None] * 3
        yield f"{path}, label {number}", {**row, **dict(zip("rgb", color, strict=True))}


def _csv_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = limits.read_text(path, "annotation_bytes")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", restval="")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        for row in reader:
            yield f"{path}, line {reader.line_num}", {key: value.strip() for key, value in row.items() if key}
    except csv.Error as error:
        raise SourceError(f"{path}: no readable CSV in UTF-8 ({error})") from None


def _text_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(limits.read_text(path, "annotation_bytes", "replace").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found = _LINE.fullmatch(line.strip())
            if not found:
                raise SourceError(f"{path}, line {number}: expected 'r g b name' or 'id name', found {line.strip()!r}")
            first, g, b, name = found.groups()
            yield f"{path}, line {number}", {"name": name, **({"r": first, "g": g, "b": b} if g else {"id": first})}


_READERS = {".json": _json_rows, ".csv": _csv_rows, ".txt": _text_rows}


def read_table(path: pathlib.Path) -> tuple[dict[int, Entry], bool]:
    """Reads a table of labels.

    Returns:
        (labels, colours): the labels by value, as `read_label_map` gives it, and whether it is a colour.

    Raises:
        SourceError: a label has no name or no value, or one that another has; the message names the line.
    """
    return _read_rows(_READERS[path.suffix](path), str(path))


def read_values(values: Mapping[Any, Any], where: str) -> tuple[dict[int, Entry], bool]:
    """As `read_table`, of a mapping in a recipe: {1: polyp}, {polyp: 1} or {polyp: [255, 0, 0]}."""
    content = {str(key): list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return _read_rows(_object_rows(content, where), where)


def _read_rows(rows: Iterable[tuple[str, dict[str, Any]]], path: str) -> tuple[dict[int, Entry], bool]:
    ids: dict[int, Entry] = {}
    colours: dict[int, Entry] = {}
    for where, row in rows:
        name, regions = row.get("name"), row.get("regions") or ""
        rgb = [row.get(channel) for channel in "rgb"]
        try:
            if None in rgb or "" in rgb:
                table, value = ids, int(row["id"])
            else:
                table, (r, g, b) = colours, map(int, rgb)  # type: ignore[arg-type]
                value = r * 65536 + g * 256 + b if all(0 <= c <= 255 for c in (r, g, b)) else -1
        except (KeyError, TypeError, ValueError):
            value, table = -1, ids
        if value < 0 or not isinstance(name, str) or regions not in REGIONS:
            raise SourceError(
                f"{where}: expected 'name', 'id' or a colour (r, g, b from 0 to 255), and optionally 'regions': "
                f"component or label; found {row}"
            )
        if value in table:
            raise SourceError(f"{where}: {name!r} and {table[value].name!r} have the same value")
        if name.strip().lower() not in BACKGROUND and not clean_name(name):
            raise SourceError(f"{where}: the class name {name!r} has no words")
        table[value] = Entry(name.strip(), regions)
    if bool(ids) == bool(colours):
        raise SourceError(f"{path}: " + ("has both ids and colours: keep one" if ids else "names no labels"))
    return ids or colours, bool(colours)


def read_regions(values: np.ndarray, labels: Mapping[int, Entry], colours: bool, where: str) -> Iterator[Region]:
    """Yields the regions of a mask of several labels, in the order of the table.

    Args:
        values: int64[H, W] of `read_label_map`.
        labels, colours: of `read_table`.
        where: mask and table, for messages.

    Raises:
        SourceError: the mask has a value, other than 0, that the table lacks.
    """
    present = np.unique(values).tolist()
    for value in present:
        if value and value not in labels:
            shown = [value >> 16, value >> 8 & 255, value & 255] if colours else value
            raise SourceError(f"{where} has no label {shown}; masks must not be JPEG or resized smoothly")
    for value, entry in labels.items():
        if value in present:
            yield from entry.split(values == value)


class ColoredMasks(Sequence[GroundingExample]):
    """images/NAME.png with masks/NAME.png (or labels/, annotations/; NAME_mask.png), and a table of labels.

    The table is the first of these in the folder:
        labels.json: [{"name": "polyp", "id": 1, "regions": "component"}, {"name": ..., "color": [255, 0, 0]}, ...], or
            in short {"1": "polyp"}, {"polyp": 1} or {"polyp": [255, 0, 0]}; a colour may be "#ff0000".
        classes.csv: the columns name and id, or name, r, g, b; optionally regions.
        label_colors.txt: lines "255 0 0 polyp" or "1 polyp".
    With ids, masks are grey images or palette images (then the index counts); with colours, RGB. 0 or black, and names
    such as background, void and ignore, are no regions; any other value that the table lacks is an error. A region is a
    connected component (8 neighbours) of a lesion or cell, and the whole label of anything else, unless `regions` says
    component or label; regions come in the table's order. Components of a few pixels come too: curation drops and
    counts those. Images without a mask are unused.
    """

    SUPERSEDES = ("triplets",)  # whose lists of records a table of labels may look like

    def __init__(self, folder: pathlib.Path, *, dataset: str, modality: str = "unknown"):
        self._dataset, self._modality = dataset, modality
        table, mask_folder = _find_table(folder), _find_masks(folder)
        if not (folder / "images").is_dir() or mask_folder is None:
            raise SourceError(f"{folder}: expected images/ and masks/ (or labels/, annotations/) with images in them")
        if table is None:
            raise SourceError(f"{folder}: the labels have no names: expected {', '.join(TABLES)}")
        self._folder = folder
        self._table, (self._labels, self._colours) = table, read_table(limits.check_inside(folder, table))
        images, masks = list_images(folder / "images"), list_images(mask_folder)
        self._items: list[tuple[str, pathlib.Path | None, pathlib.Path]] = []  # image id, image, mask
        for stem, path in masks.items():
            owner = next((stem.removesuffix(e) for e in _ENDINGS if stem.removesuffix(e) in images), stem)
            self._items.append((owner, images.get(owner), path))
        self._uses = collections.Counter(owner for owner, _, _ in self._items)
        self.unused = [str(path) for stem, path in images.items() if stem not in self._uses]

    @staticmethod
    def matches(folder: pathlib.Path) -> bool:
        if not (folder / "images").is_dir() or _find_table(folder) is None:
            return False
        return _find_masks(folder) is not None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> GroundingExample:  # type: ignore[override]
        image_id, path, mask = self._items[index]
        if path is None:
            raise SourceError(f"{mask}: there is no image {image_id}.* in images/")
        if self._uses[image_id] > 1:
            doubles = (mask for owner, _, mask in self._items if owner == image_id)
            raise SourceError(f"{path}: has several masks: {describe(doubles)}; keep one")
        image = store_image(path, root=self._folder)
        values = read_label_map(mask, (image.height, image.width), self._colours, self._folder)
        return GroundingExample(
            image=image.encoded,
            image_id=image_id,
            dataset=self._dataset,
            height=image.height,
            width=image.width,
            modality=self._modality,
            regions=tuple(read_regions(values, self._labels, self._colours, f"{mask}: {self._table}")),
        )
