"""What a source may ask of the machine that reads it: sizes that are refused before memory goes to them, and places.

Everything here guards the reading of files that somebody else wrote. The limits hold for what runs inside
`use_limits`; workers in other threads or processes enter it themselves, or else read with the defaults.
"""

import contextlib
import contextvars
import dataclasses
import json
import math
import os
import pathlib
import stat
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_pipelines.curate import SourceError

_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx")  # of file managers; hidden names begin with a dot


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes above which files are refused, and what is refused at any size unless it is allowed.

    Attributes:
        image_pixels: of a picture, or of a frame of a DICOM file.
        image_bytes: of an image file, as it lies on the disk.
        annotation_bytes: of a file that annotates a whole data set: a table of labels, COCO's JSON, a CSV.
        image_annotation_bytes: of a file that annotates one image: VOC's XML, LabelMe's JSON, YOLO's text.
        volume_voxels: of one channel of a volume, or of all samples of all frames of a DICOM file.
        archive_bytes: that an archive may unpack to.
        archive_ratio: unpacked bytes over the archive's own, once more than 64 MiB are unpacked.
        archive_files: files and folders in an archive.
        follow_symlinks: read files that a symbolic link fetches from outside the input folder.
        allow_burned_in: read DICOM files that say that they show identifying text (BurnedInAnnotation).
    """

    image_pixels: int = 2**28  # ours: 16,384 x 16,384, a large field of a whole slide; 768 MiB as RGB
    image_bytes: int = 2**32  # ours
    annotation_bytes: int = 2**32  # ours: that of SA-Med2D-20M's pairs is about 3 GB
    image_annotation_bytes: int = 2**28  # ours: LabelMe's hold a copy of the image
    volume_voxels: int = 2**31  # ours: 1024 x 1024 x 2048; 4 GiB of CT
    archive_bytes: int = 2**38  # ours
    archive_ratio: float = 200.0  # ours: image data sets are far below, bombs of plain deflate reach 1032
    archive_files: int = 5_000_000  # ours
    follow_symlinks: bool = False
    allow_burned_in: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"the limit {field.name} must be true or false, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"the limit {field.name} must be a number above 0, not {value!r}")
            elif isinstance(field.default, int):
                object.__setattr__(self, field.name, int(value))  # 1e9 means so many bytes


_LIMITS: contextvars.ContextVar[Limits] = contextvars.ContextVar("limits", default=Limits())  # noqa: B039
_FOLDERS: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("folders", default=None)


def current_limits() -> Limits:
    """Returns the limits that hold here: those of the innermost `use_limits`, else the defaults."""
    return _LIMITS.get()


@contextlib.contextmanager
def use_limits(limits: Limits) -> Iterator[Limits]:
    """Makes other limits hold in the body of a `with` statement, in this thread.

    Where folders lie after symbolic links are followed is looked up once in it.
    """
    token, folders = _LIMITS.set(limits), _FOLDERS.set({})
    try:
        yield limits
    finally:
        _LIMITS.reset(token)
        _FOLDERS.reset(folders)


def check_amount(amount: int | float, field: str, where: object, what: str) -> None:
    """Raises SourceError where an amount is above a limit.

    Args:
        amount: to compare.
        field: of `Limits`.
        where: the file, for the message.
        what: what there is so much of, such as "pixels (70000 x 70000)".
    """
    limit = getattr(current_limits(), field)
    if amount > limit:
        raise SourceError(
            f"{where}: {amount:,.4g} {what} are more than the {limit:,.4g} that are allowed; if the file is sound, "
            f"raise the limit {field} (--limits {field}=N)"
        )


def check_image_size(width: int, height: int, where: object) -> None:
    """Raises SourceError where an image's header asks for more pixels than `Limits.image_pixels`."""
    check_amount(width * height, "image_pixels", where, f"pixels ({width} x {height})")


def is_hidden(name: str) -> bool:
    """Whether a file name is hidden, or one that file managers leave behind (Thumbs.db, desktop.ini, __MACOSX)."""
    return name.startswith(".") or name.lower() in _LITTER


def list_files(folder: pathlib.Path, suffix: str = "") -> list[pathlib.Path]:
    """Returns what `walk_files` yields, sorted."""
    return sorted(walk_files(folder, suffix))


def walk_files(folder: pathlib.Path, suffix: str = "") -> Iterator[pathlib.Path]:
    """Yields the files in a folder and its subfolders; hidden ones and those in hidden folders do not count.

    Links to files come too, so that the reader can say why it refuses one; those to folders only where
    `follow_symlinks` allows them.

    Args:
        folder: to list; none that is missing has files.
        suffix: that the names have to end with, in lower case.
    """
    follow = current_limits().follow_symlinks
    seen = {os.path.realpath(folder)}  # links may lead in circles
    for place, folders, files in os.walk(folder, followlinks=follow):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if follow:
            folders[:] = [name for name in folders if not _was_seen(os.path.join(place, name), seen)]
        for name in files:
            if name.lower().endswith(suffix) and not is_hidden(name):
                yield pathlib.Path(place, name)


def _was_seen(path: str, seen: set[str]) -> bool:
    place = os.path.realpath(path)
    known = place in seen
    seen.add(place)
    return known


def check_inside(root: str | os.PathLike, path: str | os.PathLike) -> pathlib.Path:
    """Returns `path`, if it lies in the folder `root` after symbolic links are followed.

    Links inside the folder are fine, and so is a `root` that is one.

    Raises:
        SourceError: a link leads out of the folder and `Limits.follow_symlinks` does not allow that.
    """
    if not current_limits().follow_symlinks:
        top, place = _follow_folder(os.fspath(root)), _follow(os.fspath(path))
        if place != top and not place.startswith(os.path.join(top, "")):
            raise SourceError(
                f"{path}: a symbolic link leads out of {root}; put the file itself there, or allow such links "
                "(--limits follow_symlinks=true)"
            )
    return path if isinstance(path, pathlib.Path) else pathlib.Path(path)


def _follow(path: str) -> str:
    """`os.path.realpath`, with what is known of the folder."""
    folder, name = os.path.split(path)
    if name in ("", os.curdir, os.pardir) or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_follow_folder(folder), name)


def _follow_folder(folder: str) -> str:
    """`os.path.realpath` of a folder, looked up once in the body of `use_limits`."""
    known = _FOLDERS.get()
    if known is None:
        return os.path.realpath(folder)
    if folder not in known:
        known[folder] = os.path.realpath(folder)
    return known[folder]


def resolve_inside(root: str | os.PathLike, name: str, base: str | os.PathLike | None = None) -> pathlib.Path:
    """Returns the path of a file that an annotation names.

    Args:
        root: the input folder, which the path must not leave.
        name: as the annotation has it, relative to `base`; ".." may go up as far as `root`.
        base: a folder in `root`, or `root` itself by default.

    Returns:
        The path, whether or not there is such a file.

    Raises:
        SourceError: the name is absolute, goes above `root`, is no name, or a symbolic link leads out of `root`.
    """
    base = root if base is None else base
    drive = pathlib.PureWindowsPath(name)
    if not name or "\0" in name or os.path.isabs(name) or drive.drive or drive.root:
        raise SourceError(f"{root}: the file name {name[:200]!r} in an annotation must be relative to the input folder")
    top = os.path.abspath(root)
    path = os.path.normpath(os.path.join(os.path.abspath(base), name))
    inside = os.path.join(top, "")
    if not path.startswith(inside):
        raise SourceError(f"{root}: the file name {name[:200]!r} in an annotation leaves the input folder")
    return check_inside(root, pathlib.Path(root, path[len(inside) :]))


@contextlib.contextmanager
def open_file(path: str | os.PathLike, field: str) -> Iterator[BinaryIO]:
    """Opens a file to read it, if it is one and no larger than a limit.

    Args:
        path: of the file.
        field: of `Limits`, in bytes.

    Raises:
        SourceError: it is no regular file (a pipe would never end), too large, or cannot be read.
        FileNotFoundError: there is none.
    """
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):
            raise SourceError(f"{path}: is no regular file")
        check_amount(state.st_size, field, path, "bytes")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_bytes(path: str | os.PathLike, field: str) -> bytes:
    """Reads a file, if it is one and no larger than a limit; arguments and errors as `open_file`."""
    with open_file(path, field) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
        if len(content) > size:  # it has grown; Python reserves all the bytes that it is asked for
            content += file.read(getattr(current_limits(), field) + 1 - len(content))
    check_amount(len(content), field, path, "bytes")
    return content


def read_text(path: str | os.PathLike, field: str = "image_annotation_bytes", errors: str = "strict") -> str:
    """Reads a file of UTF-8 text, with or without a byte order mark, as `read_bytes` does.

    Raises:
        SourceError: as `read_bytes`, or there is no such file, or it is no UTF-8.
    """
    try:
        return read_bytes(path, field).decode("utf-8-sig", errors)
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: no UTF-8 text ({error})") from None


def read_head(path: str | os.PathLike, length: int) -> str:
    """Returns the first characters of a text file, "" where there is no file that can be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return ""
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(length)
    except OSError:
        return ""


def read_json(path: str | os.PathLike, field: str = "image_annotation_bytes") -> Any:
    """Reads a JSON file.

    Args:
        path: of the file.
        field: of `Limits`, in bytes.

    Raises:
        SourceError: as `read_text`, or it is no JSON, or nested so deeply that it was made to do harm.
    """
    text = read_text(path, field)
    try:
        return json.loads(text)
    except ValueError as error:  # numbers of thousands of digits raise it as well
        raise SourceError(f"{path}: no valid JSON ({error})") from None
    except RecursionError:
        raise SourceError(f"{path}: no usable JSON: it is nested too deeply") from None


class _WithoutDoctype(ElementTree.TreeBuilder):
    """Refuses document types, in which entities are declared: they can grow without end, or name other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise SourceError("has a DOCTYPE, which can declare entities that grow without end; remove that line")


def parse_xml(content: bytes | str, where: object) -> ElementTree.Element:
    """Returns the root of an XML document.

    Raises:
        SourceError: it is not well-formed, or has a DOCTYPE.
    """
    parser = ElementTree.XMLParser(target=_WithoutDoctype())
    try:
        parser.feed(content)
        return parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # ValueError: an encoding that expat lacks
        if isinstance(error, SourceError):
            raise SourceError(f"{where}: {error}") from None
        raise SourceError(f"{where}: no well-formed XML ({error})") from None
