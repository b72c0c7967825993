"""Tables of annotations: CSV files, and JSON lists or lines of records."""

import csv
import io
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines import limits
from data_pipelines.curate import SourceError

_HEAD = 2**20  # characters in which the first record of a JSON file must end to be recognized


def fold_name(name: str) -> str:
    """Returns the name of a column or key without case and punctuation: "Image Index" is "imageindex"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_header(path: pathlib.Path) -> list[str]:
    """Returns the names of a CSV file's columns as they stand in it, none if it is no table; reads its beginning."""
    try:
        return next(csv.reader(io.StringIO(limits.read_head(path, _HEAD), newline="")), [])
    except csv.Error:  # a cell of megabytes
        return []


def read_rows(path: pathlib.Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV file after its header, with their line numbers; empty ones are left out.

    Raises:
        SourceError: it is no CSV in UTF-8, or too large (see `limits.read_text`).
    """
    reader = csv.reader(io.StringIO(limits.read_text(path, "annotation_bytes"), newline=""))
    try:
        next(reader, None)
        for row in reader:
            if any(row):
                yield reader.line_num, [cell.strip() for cell in row]
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: no readable CSV ({error})") from None


def _fold(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise SourceError(f"{where}: expected an object of keys and values, found {str(record)[:80]}")
    return {fold_name(key): value for key, value in record.items()}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: no valid JSON ({error})") from None


def read_records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file and line or place, record) of a .csv, .jsonl or .json file.

    The keys of records are folded (`fold_name`). A .json file is one list of objects.

    Raises:
        SourceError: the file is none of these, or too large, or a row has more cells than the header.
    """
    if path.suffix.lower() == ".csv":
        names = [fold_name(name) for name in read_header(path)]
        for line, row in read_rows(path):
            if len(row) > len(names):
                raise SourceError(
                    f"{path}, line {line}: has {len(row)} cells, the header {len(names)}; quote text with commas"
                )
            yield f"{path}, line {line}", dict(zip(names, row, strict=False))
        return
    if path.suffix.lower() == ".jsonl":
        for line, text in enumerate(limits.read_text(path, "annotation_bytes").split("\n"), 1):
            if text.strip():
                where = f"{path}, line {line}"
                yield where, _fold(_parse(text, where), where)
        return
    content = limits.read_json(path, "annotation_bytes")
    if not isinstance(content, list):
        raise SourceError(f"{path}: expected a list of records, found a {type(content).__name__}")
    for place, record in enumerate(content):
        yield f"{path}, record {place}", _fold(record, f"{path}, record {place}")


def peek_keys(path: pathlib.Path) -> set[str]:
    """Returns the folded keys of a file's first record, none if it is no table of records; reads only its beginning."""
    if path.suffix.lower() == ".csv":
        return {fold_name(name) for name in read_header(path)}
    head = limits.read_head(path, _HEAD).lstrip()
    if path.suffix.lower() == ".json":
        if not head.startswith("["):
            return set()
        head = head[1:].lstrip()
    try:
        record, _ = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return set()
    return {fold_name(key) for key in record} if isinstance(record, dict) else set()


def list_tables(folder: pathlib.Path, *suffixes: str) -> list[pathlib.Path]:
    """Returns the files with these suffixes: the path itself, or those in a folder or its annotations/, sorted."""
    if folder.is_file():
        return [folder] if folder.suffix.lower() in suffixes else []
    places = (folder, folder / "annotations")
    return [
        path
        for place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.suffix.lower() in suffixes and path.is_file() and not limits.is_hidden(path.name)
    ]


def root_of(table: pathlib.Path) -> pathlib.Path:
    """Returns the folder in which the images of a table are looked for: its own, or the one above annotations/.

    Raises:
        SourceError: the table is a symbolic link that leads out of it (see `limits.check_inside`).
    """
    root = table.parent.parent if table.parent.name == "annotations" else table.parent
    limits.check_inside(root, table)
    return root


def pick(record: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Returns the value of the first of these keys that a record has and that is not empty, else None."""
    return next((record[name] for name in names if record.get(name) not in (None, "", [])), None)
