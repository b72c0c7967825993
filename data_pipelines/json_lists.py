"""Large JSON files that are one object with long lists in it: read member by member, so that memory stays flat.

for member in read_members(path, ("images", "annotations"), "annotation_bytes"):
    ...                                      member.key, member.value, and where it lies
values = load_places(path, [(member.start, member.stop)])      the same value again, later
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from data_pipelines import limits
from data_pipelines.curate import SourceError

_PIECE = 2**20  # bytes read at once
_NUMBER = "0123456789.eE+-"
_SPACE = re.compile(r"[ \t\n\r]*")


class Member(NamedTuple):
    """One member of a list.

    Attributes:
        key: of the list.
        value: the member.
        start, stop: bytes of the file that it is in.
    """

    key: str
    value: Any
    start: int
    stop: int


def read_members(
    path: str | os.PathLike, keys: Sequence[str], field: str, optional: Sequence[str] = ()
) -> Iterator[Member]:
    """Yields the members of the lists `keys` of a JSON object, in the order of the file; what else is in it is skipped.

    Args:
        path: of the file.
        keys: of the lists.
        field: of `limits.Limits`, in bytes of the file.
        optional: those of the keys that may be missing.

    Raises:
        SourceError: as `limits.read_json`; or the file is no object, has a key twice, or no list under one of `keys`.
    """
    seen: set[str] = set()
    try:
        with limits.open_file(path, field) as file:
            text = _Text(file)
            text.take("{")
            more = not text.take("}", optional=True)
            while more:
                key = text.read_value()[0]
                text.take(":")
                if key in seen:
                    raise SourceError(f"{path}: has {key!r} twice")
                seen.add(key)
                listed = text.take("[", optional=True)
                if not listed:
                    text.read_value()
                    if key in keys:
                        raise SourceError(f"{path}: its {key!r} is no list")
                inside = listed and not text.take("]", optional=True)
                while inside:
                    value, start, stop = text.read_value()
                    if key in keys:
                        yield Member(key, value, start, stop)
                    inside = text.take(",]") == ","
                more = text.take(",}") == ","
            text.end()
        if missing := [key for key in keys if key not in seen and key not in optional]:
            raise SourceError(f"{path}: has no list {missing[0]!r}")
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: no UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise SourceError(f"{path}: no valid JSON ({error.msg} at byte {error.pos})") from None
    except ValueError as error:  # numbers of thousands of digits
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{path}: no valid JSON ({error})") from None
    except RecursionError:
        raise SourceError(f"{path}: no usable JSON: it is nested too deeply") from None


def load_places(path: str | os.PathLike, places: Iterable[tuple[int, int]]) -> list[Any]:
    """Returns the values at places (start, stop) of `read_members`.

    Raises:
        SourceError: the file is not what it was.
    """
    values = []
    try:
        with open(path, "rb") as file:
            for start, stop in places:
                file.seek(start)
                values.append(json.loads(file.read(stop - start)))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: has changed since it was opened ({error})") from None
    return values


class _Text:
    """JSON text of which a piece is in memory.

    It is looked at as Latin-1, in which a character is a byte: what is not ASCII can only be inside of strings.
    """

    def __init__(self, file: Any):
        self._file, self._check = file, codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._base, self._at, self._ended = "", 0, 0, False
        self._read_more(_PIECE)
        if self._text.startswith("ï»¿"):  # a byte order mark
            self._at = 3

    def _read_more(self, size: int) -> None:
        content = self._file.read(size)
        self._ended = len(content) < size
        self._check.decode(content, self._ended)
        self._text = self._text[self._at :] + content.decode("latin-1")
        self._base, self._at = self._base + self._at, 0

    def _fail(self, message: str) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, "", 0)
        error.pos = self._base + self._at
        return error

    def _peek(self) -> str:
        """Returns the next character that is no space, "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more(_PIECE)

    def take(self, characters: str, optional: bool = False) -> str:
        """Goes over one of the characters and returns it; "" if another one comes and it is optional."""
        found = self._peek()
        if found and found in characters:
            self._at += 1
            return found
        if optional:
            return ""
        raise self._fail(f"Expecting {' or '.join(map(repr, characters))}")

    def read_value(self) -> tuple[Any, int, int]:
        """Goes over a value and returns (value, start, stop)."""
        self._peek()
        size = _PIECE
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if self._ended or self._text[end : end + 1] not in _NUMBER:  # "" is in it: a number may go on
                    break
            except json.JSONDecodeError as error:
                if self._ended:
                    self._at = error.pos
                    raise self._fail(error.msg) from None
            self._read_more(size)
            size *= 2
        start, self._at = self._at, end
        written = self._text[start:end]
        if not written.isascii():
            value = json.loads(written.encode("latin-1"))
        return value, self._base + start, self._base + end

    def end(self) -> None:
        """Raises JSONDecodeError if something follows."""
        if self._peek():
            raise self._fail("Extra data")
