"""Where runs lie: local folders, and buckets (gs://, s3://) through etils.epath."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator

from etils import epath


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in a bucket: "gs://bucket/run"."""
    return "://" in os.fspath(path)


def full_path(path: str | os.PathLike[str]) -> epath.Path:
    """Returns a local path as an absolute one, and one in a bucket as it is.

    Raises:
        ValueError: the path is in a bucket, and what reads such buckets is not installed.
    """
    if not is_remote(path):
        return epath.Path(path).expanduser().resolve()
    found = epath.Path(path)
    try:
        found.exists()
    except ImportError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; for buckets install gcsfs (gs://) or s3fs (s3://)") from error
    return found


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file that appears complete or not at all; its folder is made if missing."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):  # objects are so by themselves
        target.write_text(text)
        return
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Adds a line to a text file, and brings it to the disk. An object in a bucket is written anew."""
    target = epath.Path(path)
    if is_remote(path):
        target.write_text((target.read_text() if target.exists() else "") + line + "\n")
        return
    with open(target, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def drop_later_lines(path: str | os.PathLike[str], step: int) -> int:
    """Keeps the lines of JSON whose "step" is at most a number; a last line that a kill cut in half goes too.

    Returns:
        How many there are then.
    """
    kept = []
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except json.JSONDecodeError:
            keep = False
        if keep:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))
    return len(kept)


def copy_folder(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies all files below a folder into another one, from or to a bucket."""
    place = epath.Path(target)
    place.mkdir(parents=True, exist_ok=True)
    for entry in epath.Path(source).iterdir():  # epath's walk forgets which bucket it is in
        if entry.is_dir():
            copy_folder(entry, place / entry.name)
        else:
            (place / entry.name).write_bytes(entry.read_bytes())


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a folder on this machine with what a folder holds: itself, or a copy for the time of the context."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_folder(path, folder)
        yield folder


@contextlib.contextmanager
def local_output(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a path on this machine for a file, or a folder, to be written, which is then at `path`."""
    if not is_remote(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        written = epath.Path(folder) / os.path.basename(os.fspath(path))
        yield os.fspath(written)
        if written.is_dir():
            copy_folder(written, path)
        elif written.exists():
            epath.Path(path).write_bytes(written.read_bytes())
