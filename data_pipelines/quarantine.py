"""The records that a run could not use: each told once, listed in a file, and an end to the run when they are too many.

A line of the file is a JSON object: `records` (name of the folder), `shard` (file in it), `record` (place in the shard)
and `reason`. Like the records' names of files it says nothing about patients: image ids are left out, long quotations
cut.
"""

import json
import logging
import os
import pathlib
import re
import threading
from typing import Any

from data_pipelines.records import Records, RecordsError

_LONG_QUOTE = re.compile(r"'[^']{40,}'|\"[^\"]{40,}\"")  # a caption, not a label
_Key = tuple[str, str, int]

_log = logging.getLogger(__name__)


class TooManyCorrupt(RecordsError):
    """More records than `config.data.max_corrupt` cannot be used."""


class Quarantine:
    """Counts the corrupt records of a run over all its threads, worker processes and restarts; picklable.

    Processes of a pod write a file each, "NAME-P.jsonl" beside the "NAME.jsonl" of process 0, and count the lines of
    all that they see. So on a shared disk the limit is one of the whole run, elsewhere of each machine.
    """

    def __init__(self, path: str | os.PathLike | None, limit: int, process_index: int = 0):
        """Opens the list; its file is made with the first entry.

        Args:
            path: of process 0's file; None keeps the list in memory.
            limit: records that may be corrupt before `add` raises.
            process_index: which process this is.

        Raises:
            ValueError: `limit` is negative.
        """
        if limit < 0:
            raise ValueError(f"config.data.max_corrupt is {limit}: it must be 0 or more records")
        self.limit = limit
        self.path = pathlib.Path(path) if path is not None else None
        self._own = self.path
        if self.path is not None and process_index:
            self._own = self.path.with_name(f"{self.path.stem}-{process_index}{self.path.suffix}")
        self._known: set[_Key] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def count(self) -> int:
        """Returns how many different records have been listed, by earlier runs with the same file too."""
        with self._lock:
            return len(self._read())

    def _read(self) -> set[_Key]:
        """Adds the entries of the files to those that are known."""
        if self.path is not None:
            pattern = re.compile(rf"{re.escape(self.path.stem)}(-\d+)?{re.escape(self.path.suffix)}")
            for file in self.path.parent.glob("*"):
                if pattern.fullmatch(file.name):
                    self._known |= _entries(file)
        return self._known

    def add(self, records: Records, index: int, error: Exception, image_id: str = "") -> None:
        """Lists a record that cannot be used, once.

        Args:
            records: the split that holds it.
            index: its place in the split.
            error: what is wrong with it; its message may start with the place of the record.
            image_id: left out of the file.

        Raises:
            TooManyCorrupt: with this one there are more than the limit.
        """
        location = records.locate(index)
        message = str(error).removeprefix(f"{location}: ")
        shard, _, record = location.rpartition(", record ")
        folder = pathlib.Path(records.directory)
        key = (folder.resolve().name, os.path.basename(shard), int(record))
        with self._lock:
            if new := key not in self._read():
                self._known.add(key)
                self._append(key, _anonymous(message, folder, image_id))
            count = len(self._known)
        place = f"{location}, image {image_id!r}" if image_id else location
        if new:
            _log.warning("skipped a corrupt record: %s: %s", place, message)
        if count > self.limit:
            listed = f"{self.path} lists them" if self.path else "the log names them"
            raise TooManyCorrupt(
                f"{place}: {message}\n{count} record{'s' * (count > 1)} cannot be used and config.data.max_corrupt is "
                f"{self.limit}: {listed}; build the records again and remove the list, or raise the limit"
            )

    def _append(self, key: _Key, reason: str) -> None:
        if self._own is None:
            return
        line = json.dumps({"records": key[0], "shard": key[1], "record": key[2], "reason": reason}) + "\n"
        self._own.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._own, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write, so that lines of worker processes do not mix
        finally:
            os.close(descriptor)


def _entries(file: pathlib.Path) -> set[_Key]:
    found = set()
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # removed since it was listed
        return found
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.add((str(entry["records"]), str(entry["shard"]), int(entry["record"])))
        except (ValueError, KeyError, TypeError):  # cut short when a run was killed
            continue
    return found


def _anonymous(message: str, folder: pathlib.Path, image_id: str) -> str:
    message = message.replace(f"{folder}{os.sep}", "")
    if image_id:
        message = message.replace(repr(image_id), "'...'")
    return _LONG_QUOTE.sub("'...'", message)
