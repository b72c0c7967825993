"""Archives as input: a .zip or .tar unpacked once, safely, into a workspace, and used from there."""

import bz2
import contextlib
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from data_pipelines.curate import SourceError
from data_pipelines.limits import check_amount, is_hidden

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_COPY_BYTES = 2**20
_FREE_OF_RATIO = 2**26  # bytes that any archive may unpack to: small ones of black masks are packed very well
# What the two modules raise for damaged files; RuntimeError for encrypted ones.
_DAMAGED = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, ValueError)
_LONGEST_READ = 2**24
_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".tbz2": bz2.open,
    ".xz": lzma.open,
    ".txz": lzma.open,
}
_DONE = ".complete.json"
_STAGING = ".unpacking-"
_LOCK = ".lock"  # in a folder of `_STAGING`, locked as long as somebody unpacks there
_STALE_AFTER = 24 * 3600.0  # seconds without change after which a folder that has no lock is nobody's


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a path is a file with the suffix of an archive that is read."""
    return os.path.isfile(path) and os.fspath(path).lower().endswith(SUFFIXES)


def open_input(path: str | os.PathLike, workspace: str | os.PathLike) -> pathlib.Path:
    """Returns the folder to read: the path itself if it is a folder, or what an archive unpacks to.

    An archive is unpacked into a folder of the workspace whose name comes from the archive's name, size and time of
    change, and found there the next time. It appears there when it is complete; what killed processes left half
    unpacked is removed. If it holds one folder and nothing else, that is the folder to read. Permissions, owners and
    times are not taken over.

    Args:
        path: a folder, a file of a source (such as COCO's .json), or an archive (`SUFFIXES`).
        workspace: a folder for what is unpacked; it is made if need be.

    Raises:
        SourceError: the archive is damaged, encrypted, larger than `limits.Limits` allows, does not fit on the disk, or
            holds a link, a device, or a name that leads out of its folder. Nothing is left of it then.
    """
    if not is_archive(path):
        return pathlib.Path(path)
    archive, place = pathlib.Path(path), pathlib.Path(workspace)
    state = archive.stat()
    made_from = {"name": archive.name, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    digest = hashlib.sha256(json.dumps(made_from).encode(errors="surrogatepass")).hexdigest()[:16]
    target = place / f"unpacked-{digest}"
    _remove_stale(place)
    if not (target / _DONE).is_file():
        place.mkdir(parents=True, exist_ok=True)
        staging = pathlib.Path(tempfile.mkdtemp(prefix=_STAGING, dir=place))
        try:
            with _lock(staging):
                _unpack(archive, staging / "files")
                (staging / _DONE).write_text(json.dumps(made_from))
                (staging / _LOCK).unlink()
                with contextlib.suppress(OSError):  # another process was faster: then its folder is there
                    os.replace(staging, target)
        except OSError as error:
            raise SourceError(f"{archive}: cannot be unpacked into {place} ({error.strerror or error})") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if not (target / _DONE).is_file():
            raise SourceError(f"{target} is in the way of what {archive} unpacks to: remove it")
    return _only_folder(target / "files")


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Locks a folder of `_STAGING` until the body ends, or the process does."""
    # Under another name until it is locked, so that nobody takes it for one whose owner is gone.
    with open(folder / f"{_LOCK}-new", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.replace(lock.name, folder / _LOCK)
        yield


def _remove_stale(place: pathlib.Path) -> None:
    """Removes what processes that were killed left half unpacked in a workspace."""
    for folder in place.glob(f"{_STAGING}*"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.ExitStack() as held:
            try:
                lock = held.enter_context(open(folder / _LOCK))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:  # killed before it was locked, or about to be
                with contextlib.suppress(OSError):
                    if time.time() - folder.stat().st_mtime > _STALE_AFTER:
                        shutil.rmtree(folder, ignore_errors=True)
            except OSError:  # somebody unpacks there
                continue
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _only_folder(folder: pathlib.Path) -> pathlib.Path:
    names = [name for name in os.listdir(folder) if not is_hidden(name)]
    return folder / names[0] if len(names) == 1 and (folder / names[0]).is_dir() else folder


class _Budget:
    """Counts what an archive unpacks to while it is written, for headers can lie."""

    def __init__(self, archive: pathlib.Path):
        self._archive, self._size, self._bytes, self._files = archive, archive.stat().st_size, 0, 0

    def check(self, size: int) -> None:
        """Raises SourceError if so many bytes are too many."""
        check_amount(size, "archive_bytes", self._archive, "bytes when unpacked")
        if size > _FREE_OF_RATIO:
            ratio = size / max(self._size, 1)
            check_amount(ratio, "archive_ratio", self._archive, "times its own size when unpacked")

    def add_file(self) -> None:
        self._files += 1
        check_amount(self._files, "archive_files", self._archive, "files")

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        self.check(self._bytes)


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir()
    budget, seen = _Budget(archive), set()
    try:
        for name, size, content in _entries(archive, folder, budget):
            budget.add_file()
            path = _place(archive, folder, name)
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
                continue
            if path in seen:
                raise SourceError(f"{archive}: holds {name!r} twice")
            seen.add(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            written = 0
            with content, open(path, "xb") as file:
                while block := content.read(_COPY_BYTES):
                    budget.add_bytes(len(block))
                    written += len(block)
                    file.write(block)
            if written != size:
                raise SourceError(f"{archive}: {name!r} is cut short, {written} of {size} bytes")
    except SourceError:
        raise
    except _DAMAGED as error:
        raise SourceError(f"{archive}: cannot be unpacked ({error}); it is damaged or encrypted") from None
    except OSError as error:
        if error.errno is not None:  # of the disk; the decoders raise it without a number
            raise
        raise SourceError(f"{archive}: cannot be unpacked ({error}); it is damaged") from None
    if not seen:
        raise SourceError(f"{archive}: holds no files")


def _place(archive: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where an entry goes, which is never outside the folder."""
    windows = pathlib.PureWindowsPath(name)
    parts = pathlib.PurePosixPath(name).parts
    if not name or "\0" in name or windows.drive or windows.root or ".." in (*parts, *windows.parts):
        raise SourceError(f"{archive}: the name {name[:200]!r} leads out of the archive; it was made to do harm")
    return folder.joinpath(*parts)


def _entries(
    archive: pathlib.Path, folder: pathlib.Path, budget: _Budget
) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    """Yields (name, bytes, content or None for a folder) of what an archive holds."""
    reader = _zip_entries if archive.name.lower().endswith(".zip") else _tar_entries
    yield from reader(archive, folder, budget)


def _zip_entries(
    archive: pathlib.Path, folder: pathlib.Path, budget: _Budget
) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    with zipfile.ZipFile(archive) as content:
        entries = content.infolist()
        check_amount(len(entries), "archive_files", archive, "files")
        total = sum(entry.file_size for entry in entries)
        budget.check(total)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise SourceError(f"{archive}: unpacks to {total:,} bytes, {free:,} are free in {folder.parent.parent}")
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise SourceError(f"{archive}: {entry.filename!r} is a link or a device: pack the files themselves")
            yield entry.filename, entry.file_size, None if entry.is_dir() else content.open(entry)


class _Guarded:
    """A file for `tarfile`, whose headers may announce names of any length: it reads those into memory at once."""

    def __init__(self, file: IO[bytes], archive: pathlib.Path):
        self._file, self._archive = file, archive
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_READ:
            raise SourceError(f"{self._archive}: a header of {size:,} bytes; it was made to do harm")
        return self._file.read(size)


def _open_tar(file: Any) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:")


def _tar_entries(
    archive: pathlib.Path, folder: pathlib.Path, budget: _Budget
) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    opener = _OPENERS.get(archive.suffix.lower(), open)
    with opener(archive, "rb") as file, _open_tar(_Guarded(file, archive)) as content:
        for entry in content:
            if not (entry.isreg() or entry.isdir()):
                raise SourceError(f"{archive}: {entry.name!r} is a link or a device: pack the files themselves")
            budget.check(entry.size)
            tarfile.data_filter(entry, str(folder))  # Python's own opinion on names, beside `_place`
            yield entry.name, entry.size, None if entry.isdir() else content.extractfile(entry)
