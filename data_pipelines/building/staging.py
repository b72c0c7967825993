"""The folder that a build works in until its records are complete, and what lets a killed build go on in it."""

import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data_pipelines.records import METADATA_FILE, RecordsError

_RETIRED = "retired"  # older records, while new ones take their place
_PACKAGE = pathlib.Path(__file__).parents[1]


def check_output(output: pathlib.Path, overwrite: bool) -> None:
    """Raises RecordsError if a build may not write to `output`."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise RecordsError(f"{output} is not empty: choose another --output, or replace it with --overwrite")
    if not (output / METADATA_FILE).is_file():
        raise RecordsError(f"{output} holds something else than records: --overwrite replaces only records")


class Staging:
    """A folder beside the output that holds parts, and records until they are complete.

    Parts are in folders named by a digest of what decides their bytes, and so are the records: a build goes on with
    those that fit and removes the others. An error leaves the folder if there is a part in it.

    Args:
        output: where the records will be.
        digests: of each data set; None where that cannot be known, so that its parts are used once.

    Raises:
        RecordsError: another build is writing to the same output.
    """

    def __init__(self, output: pathlib.Path, digests: Sequence[str | None], plan: str):
        self._output = output
        self.folder = output.with_name(f".{output.name}.building")
        names = [digest or f"once-{place}" for place, digest in enumerate(digests)]
        self.parts = [self.folder / f"parts-{name}" for name in names]
        self.records = self.folder / f"records-{plan if None not in digests else 'once'}"
        self._lock_path = output.with_name(f".{output.name}.lock")

    def __enter__(self) -> "Staging":
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        kept = {path.name for path in (*self.parts, self.records) if "-once" not in path.name}
        retired = self.folder / _RETIRED
        if retired.exists() and not self._output.exists():  # a build was killed between its last two steps
            os.replace(retired, self._output)
        for path in self.folder.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in (*self.parts, self.records):
            path.mkdir(parents=True, exist_ok=True)
            for unfinished in path.glob(".*.[0-9]*"):  # what a killed task was writing
                unfinished.unlink()
        return self

    def _take_lock(self) -> Any:
        while True:
            lock = open(self._lock_path, "w")  # noqa: SIM115 - held until `__exit__`
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise RecordsError(f"{self._output}: another build is writing it; wait for it, or stop it") from None
            try:
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self._lock_path)):
                    return lock
            except FileNotFoundError:
                pass
            lock.close()  # a build that ended took its lock file away

    def __exit__(self, exception: type | None, *unused: Any) -> None:
        lasting = [path for path in self.parts if "-once" not in path.name]
        if exception is None or not any(True for path in lasting for _ in path.glob("*.npz")):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        self._lock.close()

    def publish(self) -> None:
        """Puts the records in the place of the output; older ones go only after that."""
        retired = self.folder / _RETIRED
        if self._output.exists():
            os.replace(self._output, retired)
        try:
            os.replace(self.records, self._output)
        except OSError:
            if retired.exists():
                os.replace(retired, self._output)
            raise


def digest_plan(content: Any, inputs: Iterable[pathlib.Path]) -> str:
    """Returns a digest of what decides a build's bytes.

    Args:
        content: of the recipe, as JSON can hold it.
        inputs: folders and files: names, sizes and times of everything in them count, not the bytes.
    """
    sha = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in sorted(_PACKAGE.rglob("*")):  # another version of the code may write other bytes
        if path.suffix in (".py", ".yaml", ".json", ".txt"):
            sha.update(path.read_bytes())
    for root in inputs:
        for name, status in _walk(root):
            sha.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()[:32]


def _walk(root: pathlib.Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields relative names and status of all files, in a fixed order."""
    if root.is_file():
        yield root.name, root.stat()
        return
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(folder, file)
            try:
                yield os.path.relpath(path, root), os.stat(path)
            except OSError:  # a link to nothing; the source says what is wrong with it
                continue
