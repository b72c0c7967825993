"""Reading NIfTI files: volumes, labels, and the names of their values."""

import collections
import gzip
import math
import pathlib
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from data_pipelines import limits, volumes
from data_pipelines.curate import SourceError, clean_name
from data_pipelines.images import describe
from data_pipelines.volumes import Grid, Labels

_SUFFIXES = (".nii.gz", ".nii")
MULTILABEL, MASKS = "multilabel", "segmentations"
_NAME_FILES = ("dataset.json", "labels.json")
_IGNORED = "ignore"  # nnU-Net's name of voxels that nobody annotated
_LONGEST_HEADER = 2**24  # bytes, extensions included; label tables have some thousands
_AT_ONCE = 2**28  # bytes of voxels, or of a file, that are unpacked at once
_GZIP = zlib.MAX_WBITS + 16  # zlib's name of the format
_DEFLATE = 1032  # bytes that gzip makes of one, at most (zlib's "Technical Details")


def find_volume(folder: pathlib.Path, stem: str) -> pathlib.Path | None:
    """Returns STEM.nii.gz or STEM.nii in a folder, None where there is neither."""
    return next((path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).is_file()), None)


def list_volumes(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the NIfTI files in a folder by name without suffix, sorted. Hidden ones do not count."""
    paths = (path for path in sorted(folder.glob("*.nii*")) if not limits.is_hidden(path.name))
    return {path.name.removesuffix(end): path for path in paths for end in _SUFFIXES if path.name.endswith(end)}


def has_labels(folder: pathlib.Path) -> bool:
    """Whether a folder has multilabel.nii.gz, or one file a structure in segmentations/."""
    return find_volume(folder, MULTILABEL) is not None or (folder / MASKS).is_dir()


def read_description(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the content of dataset.json or labels.json in a folder, {} where there is neither.

    Raises:
        SourceError: it is no JSON object.
    """
    path = next((folder / name for name in _NAME_FILES if (folder / name).is_file()), None)
    if path is None:
        return {}
    content = limits.read_json(path, "annotation_bytes")
    if not isinstance(content, dict):
        raise SourceError(f"{path}: expected an object with 'labels' in it, found a {type(content).__name__}")
    return content if "labels" in content else {"labels": content}


def open_volume(path: pathlib.Path) -> tuple[Any, np.ndarray, Grid]:
    """Reads the header of a NIfTI file.

    Returns:
        (nibabel image, how to turn it, its grid when turned), see `volumes.to_radiological`.

    Raises:
        SourceError: it is damaged, no volume, larger than `Limits.volume_voxels`, or than what its file can hold, or
            does not say how it lies in the patient.
    """
    nibabel = volumes.import_medical("nibabel")
    try:
        _check_header_length(path)
        image = nibabel.load(path)
        shape = tuple(map(int, image.shape))
        itemsize = image.get_data_dtype().itemsize
    except SourceError:
        raise
    except Exception as error:  # nibabel raises many kinds for damaged headers
        raise SourceError(f"{path}: no readable NIfTI file ({error})") from None
    if len(shape) < 3 or min(shape) < 1 or any(n != 1 for n in shape[4:]):
        raise SourceError(f"{path}: has the shape {shape}, not that of a volume (x, y, z) or (x, y, z, channel)")
    limits.check_amount(math.prod(shape[:3]), "volume_voxels", path, f"voxels {shape}")
    announced, stored = math.prod(shape) * itemsize, path.stat().st_size
    if announced > stored * (_DEFLATE if path.suffix == ".gz" else 1):
        raise SourceError(
            f"{path}: its header announces {announced:,} bytes of voxels, which a file of {stored:,} bytes cannot "
            "hold; the file is cut short or damaged"
        )
    if not (int(image.header["sform_code"]) or int(image.header["qform_code"])):
        raise SourceError(
            f"{path}: its header says nothing about orientation (sform and qform code 0), so that left and right "
            "cannot be told apart; set one of them"
        )
    turn, grid = volumes.to_radiological(image.affine, shape[:3], str(path))
    return image, turn, grid


def _check_header_length(path: pathlib.Path) -> None:
    """nibabel reads all that lies before the voxels at once, and a compressed file may announce any length."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        head = file.read(176)
    for order in "<>":
        if len(head) == 176 and struct.unpack_from(f"{order}i", head)[0] == 540:  # NIfTI-2
            offset = struct.unpack_from(f"{order}q", head, 168)[0]
        elif len(head) == 176 and struct.unpack_from(f"{order}i", head)[0] == 348:
            offset = struct.unpack_from(f"{order}f", head, 108)[0]
        else:
            continue
        if not offset <= _LONGEST_HEADER:
            raise SourceError(f"{path}: its voxels begin at byte {offset:.4g}, no header is so long; it is damaged")


def read_values(image: Any, path: pathlib.Path) -> np.ndarray:
    """Returns int16 or float32 [x, y, z] as stored; of several channels the first."""
    if image.get_data_dtype().kind not in "iuf":
        raise SourceError(f"{path}: its voxels are of type {image.get_data_dtype()}, expected numbers")
    try:
        values = _unpack(image, path)
        if values is None:
            values = np.asanyarray(image.dataobj[(..., *(0,) * (len(image.shape) - 3))])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise SourceError(f"{path}: its voxels cannot be read ({error}); the file is cut short or damaged") from None
    return values if values.dtype in (np.int16, np.uint8, np.float32) else values.astype(np.float32)


def _unpack(image: Any, path: pathlib.Path) -> np.ndarray | None:
    """Unpacks the voxels of a gzip file at once, in two thirds of the time that nibabel takes in steps of 8 kB.

    Returns:
        [x, y, z] as `read_values`, read-only; or None for nibabel to read: they are scaled, too large to be there twice
        for a moment, or there are fewer than announced (or more in a second gzip stream).
    """
    voxels, shape = image.dataobj, image.shape[:3]
    length = math.prod(shape) * voxels.dtype.itemsize
    if path.suffix != ".gz" or (voxels.slope, voxels.inter) != (1, 0) or max(length, path.stat().st_size) > _AT_ONCE:
        return None
    unpacked = zlib.decompressobj(_GZIP).decompress(path.read_bytes(), voxels.offset + length)
    if len(unpacked) < voxels.offset + length:
        return None
    return np.frombuffer(unpacked, voxels.dtype, math.prod(shape), voxels.offset).reshape(shape, order="F")


def read_multilabel(
    path: pathlib.Path,
    grid: Grid,
    description: Mapping[str, Any],
    site: str = "",
    names: Mapping[str, Any] | None = None,
) -> Labels:
    """Reads a file of one value a structure.

    Args:
        path: NIfTI file; names in its extension go before those in `description`.
        grid: of the image.
        description: content of dataset.json, whose "labels" name the values.
        site: as in `Labels`.
        names: of the values, if they are told otherwise; then neither extension nor description counts.

    Raises:
        SourceError: it cannot be read, lies elsewhere than the image, or has values that are not whole or have no name.
    """
    image, turn, found = open_volume(path)
    grid.check_same(found, str(path))
    values = volumes.reorient(read_values(image, path), turn)
    with np.errstate(invalid="ignore"):
        layer = values.astype(np.uint16)
    if not np.can_cast(values.dtype, np.uint16) and (layer != values).any():
        raise SourceError(f"{path}: labels must be whole numbers from 0 to 65535")
    in_file = {} if names else _names_in_extension(image, path)
    groups = {name: (value,) for value, name in in_file.items()}
    groups = groups or _names_in_json({"labels": names} if names else description, path)
    # A tenth of the time of np.bincount.
    present = np.flatnonzero(cv2.calcHist([layer.reshape(-1, layer.shape[2])], [0], None, [2**16], [0, 2**16]))
    if nameless := sorted({int(v) for v in present if v} - {v for group in groups.values() for v in group}):
        raise SourceError(
            f"{path}: the values {describe(nameless, 8)} have no name: give it in the file's extension (label table), "
            'in dataset.json beside it: {"labels": {"liver": 1}}, or as the option values: {1: liver}'
        )
    for value in groups.pop(_IGNORED, ()):
        layer[layer == value] = 0
    if any(len(group) > 1 for group in groups.values()):
        labels = Labels(grid.shape, site=site)
        for name, group in groups.items():
            labels.add(name, np.isin(layer, group))
        return labels
    return Labels(grid.shape, [layer], {group[0]: name for name, group in groups.items()}, site)


def read_masks(folder: pathlib.Path, grid: Grid, root: pathlib.Path) -> Labels:
    """Reads NAME.nii.gz of one structure each: what is above 0 belongs to it, empty ones are not in the field of view.

    Args:
        folder: of the files.
        grid: of the image.
        root: the input folder, see `limits.check_inside`.

    Raises:
        SourceError: there are none, one cannot be read, or lies elsewhere than the image.
    """
    labels = Labels(grid.shape)
    files = list_volumes(folder)
    if not files:
        raise SourceError(f"{folder}: has no NIfTI files, one a structure, in it")
    for name, path in files.items():
        _check_name(name, path)
        image, turn, found = open_volume(limits.check_inside(root, path))
        grid.check_same(found, str(path))
        labels.add(name, volumes.reorient(read_values(image, path), turn) > 0)
    return labels


def list_case_labels(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that `read_case_labels` reads."""
    path = find_volume(folder, MULTILABEL)
    return [path] if path else list(list_volumes(folder / MASKS).values())


def read_case_labels(folder: pathlib.Path, grid: Grid, root: pathlib.Path) -> Labels:
    """Reads multilabel.nii.gz of a folder, or the files in its segmentations/; see `read_multilabel`, `read_masks`."""
    path = find_volume(folder, MULTILABEL)
    if path is None:
        return read_masks(folder / MASKS, grid, root)
    return read_multilabel(limits.check_inside(root, path), grid, read_description(folder))


def _names_in_extension(image: Any, path: pathlib.Path) -> dict[int, str]:
    """Returns value -> name of the label table (Caret's XML) in a NIfTI extension, {} where there is none."""
    for extension in image.header.extensions:
        content = extension.get_content()
        text = (content if isinstance(content, bytes) else str(content).encode()).strip(b"\0 \r\n\t")
        if b"<LabelTable>" not in text:
            continue
        try:
            table = limits.parse_xml(text, path.name).iter("Label")
            names = {int(entry.attrib["Key"]): (entry.text or "").strip() for entry in table}
        except (KeyError, ValueError) as error:
            raise SourceError(f"{path}: the label table in its extension cannot be read ({error})") from None
        return _check_names({value: name for value, name in names.items() if value}, path)
    return {}


def _names_in_json(description: Mapping[str, Any], path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> values of dataset.json: {"1": "liver"} as in MSD, {"liver": 1 or [1, 2]} as in nnU-Net."""
    groups: dict[str, tuple[int, ...]] = {}
    entries = description.get("labels", {})
    try:
        for key, entry in entries.items():
            number = key.lstrip("-").isdigit()
            name, values = (str(entry), [key]) if number else (key, entry if isinstance(entry, list) else [entry])
            groups[name] = groups.get(name, ()) + tuple(int(value) for value in values)
    except (AttributeError, TypeError, ValueError):
        raise SourceError(
            f'{path}: the "labels" of its dataset.json must be like {{"liver": 1}} or {{"1": "liver"}}, '
            f"not {str(entries)[:200]}"
        ) from None
    groups = {name: values for name, values in groups.items() if any(values)}
    for name in groups:
        _check_name(name, path)
    return groups


def _check_names(names: dict[int, str], path: pathlib.Path) -> dict[int, str]:
    for name in names.values():
        _check_name(name, path)
    if double := [name for name, count in collections.Counter(names.values()).items() if count > 1]:
        raise SourceError(f"{path}: several values are called {double[0]!r}")
    return names


def _check_name(name: str, path: pathlib.Path) -> None:
    if not clean_name(name):
        raise SourceError(f"{path}: the structure name {name!r} has no words")
