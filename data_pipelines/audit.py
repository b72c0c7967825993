"""Audits records: what is in them, and what is wrong with them, as a JSON file and a page to look at.

    medglip data audit RECORDS --output DIR --samples 6
    python -m data_pipelines.audit RECORDS

Reads every record of every split once, and a few again for their pictures. `audit.html` holds pictures of the records:
it is as confidential as they are.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import heapq
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_pipelines.audit_conflicts import read_conflicts
from data_pipelines.audit_counts import Counts
from data_pipelines.audit_drawing import Picture, draw_picture
from data_pipelines.audit_duplicates import Fingerprints
from data_pipelines.audit_findings import Findings, Place, check_record
from data_pipelines.audit_page import render_page
from data_pipelines.audit_pixels import (
    HASH_BITS,
    HASH_DISTANCE,
    digest_pixels,
    find_writing,
    hash_picture,
    make_thumbnail,
    to_grey,
)
from data_pipelines.audit_privacy import mask_private
from data_pipelines.codec import import_codec
from data_pipelines.records import Records, RecordsError, find_shards, open_source, parse_example, read_metadata
from data_pipelines.schema import GroundingExample
from data_pipelines.splits import ZERO_SHOT
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.transforms import decode_image

_CHUNK = 64  # records that are read, and held, at once
_SHOWN = 6  # findings of a kind that the page shows in pictures
_SHOWN_WRITING = 24
_NAMED_UNKNOWN = 200  # unknown labels and phrases, the most frequent, for which near names are looked up
_PICTURED = ("two_labels", "shown_and_absent", "side_differs", "doubled_box", "box_outside")
_PAIRED = ("leak_image_id", "leak_duplicate", "leak_near_duplicate", "duplicate", "near_duplicate", "repeated_image_id")


@dataclasses.dataclass(frozen=True)
class Audit:
    """Result of an audit.

    Attributes:
        report: content of audit.json.
        samples: pictures of each modality.
        pictures: pictures of each kind of finding, grouped by finding.
    """

    report: dict[str, Any]
    samples: dict[str, list[Picture]]
    pictures: dict[str, list[list[Picture]]]


class _Reader:
    """Random access to the examples of all splits of a folder."""

    def __init__(self, directory: str | os.PathLike):
        self.metadata = read_metadata(directory)
        if not self.metadata["splits"]:
            raise RecordsError(f"{directory} has no splits: build the records again")
        self.records: dict[str, Records] = {
            split: find_shards(f"{os.fspath(directory)}:{split}") for split in self.metadata["splits"]
        }
        self._sources = {split: open_source(records) for split, records in self.records.items()}

    def __len__(self) -> int:
        return sum(records.num_examples for records in self.records.values())

    def chunks(self) -> Iterator[list[tuple[Place, GroundingExample]]]:
        for split, source in self._sources.items():
            for start in range(0, len(source), _CHUNK):
                indices = range(start, min(start + _CHUNK, len(source)))
                encoded = source.__getitems__(indices)
                places = [Place(split, index) for index in indices]
                yield [(place, self._parse(place, record)) for place, record in zip(places, encoded, strict=True)]

    def read(self, place: Place) -> GroundingExample:
        return self._parse(place, self._sources[place.split][place.index])

    def _parse(self, place: Place, record: bytes) -> GroundingExample:
        try:
            return parse_example(record)
        except RecordsError as error:
            raise RecordsError(f"{self.records[place.split].locate(place.index)}: {error}") from error

    def thumbnail(self, place: Place) -> np.ndarray:
        return make_thumbnail(decode_image(self.read(place).image))


@dataclasses.dataclass(frozen=True)
class _Look:
    """What the pixels of a record say, or why they cannot be read."""

    digest: int = 0
    hash: int = 0
    writing: tuple[list[float], ...] = ()
    letters: int = 0
    problem: str = ""


def _look_at(example: GroundingExample, writing: bool) -> _Look:
    try:
        pixels = decode_image(example.image)
    except ValueError as error:
        return _Look(problem=str(error))
    if (size := pixels.shape[:2]) != (example.height, example.width):
        stated = f"{example.width} x {example.height}"
        return _Look(problem=f"the image is {size[1]} x {size[0]} pixels, its record says {stated}")
    grey = to_grey(pixels)
    lines = find_writing(grey) if writing else []
    return _Look(
        # 0 stands for an image that was not read.
        digest_pixels(pixels) or 1,
        hash_picture(grey),
        tuple([round(value, 1) for value in line.box] for line in lines),
        sum(line.letters for line in lines),
    )


class _Samples:
    """The `count` records of each modality whose ids have the smallest hashes: the same ones at every audit."""

    def __init__(self, count: int):
        self._count = count
        self._heaps: dict[str, list[tuple[int, Place]]] = collections.defaultdict(list)

    def add(self, place: Place, example: GroundingExample) -> None:
        text = f"{place.split}\0{example.dataset}\0{example.image_id}\0{place.index}"
        rank = -int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        heapq.heappush(self._heaps[example.modality], (rank, place))
        if len(self._heaps[example.modality]) > self._count:
            heapq.heappop(self._heaps[example.modality])

    def places(self) -> dict[str, list[Place]]:
        heaps = sorted(self._heaps.items())
        return {modality: [place for _, place in sorted(heap, reverse=True)] for modality, heap in heaps if heap}


def audit(
    directory: str | os.PathLike, *, samples: int = 6, workers: int = 0, writing: bool = True, progress: bool = True
) -> Audit:
    """Reads all records of a folder and reports what is in them.

    Memory stays within a chunk of examples and about 40 bytes an image.

    Args:
        directory: the records, all splits of them.
        samples: pictures of each modality.
        workers: threads that decode images; 0 for one a core, at most 8.
        writing: look for burnt-in text, which takes most of the time.
        progress: show a progress bar on stderr.

    Raises:
        RecordsError: there are no records, or they are damaged.
    """
    reader, counts, findings, prints = _Reader(directory), Counts(), Findings(), Fingerprints()
    conflicts = read_conflicts(directory)
    chosen, written = _Samples(samples), {}
    threads = workers or min(os.cpu_count() or 1, 8)
    console = Console(stderr=True)
    import_codec()
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        Progress(console=console, disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("Auditing", total=len(reader))
        for chunk in reader.chunks():
            looks = pool.map(functools.partial(_look_at, writing=writing), [example for _, example in chunk])
            for (place, example), look in zip(chunk, looks, strict=True):
                counts.add(place.split, example)
                prints.add(place, example, look.digest, look.hash)
                for kind, details in check_record(example):
                    findings.add(kind, [place], **details)
                if look.problem:
                    findings.add("unreadable", [place], problem=look.problem)
                else:
                    chosen.add(place, example)
                if look.writing:
                    findings.add("burnt_in_text", [place], letters=look.letters, lines=list(look.writing))
                    if len(written) < _SHOWN_WRITING:
                        written[place] = np.asarray(look.writing)
            bar.advance(task, len(chunk))
    prints.report(findings, functools.lru_cache(maxsize=1024)(reader.thumbnail))
    _check_names(counts, findings)
    report = _assemble(directory, reader, counts, findings, conflicts, writing)
    return Audit(report, _draw_samples(reader, chosen), _draw_findings(reader, findings, written))


def _check_names(counts: Counts, findings: Findings) -> None:
    """Adds the labels and phrases that the taxonomy does not know, the frequent ones first, and labels train lacks."""
    taxonomy = load_taxonomy()
    labels = {name: entry["regions"].total() for name, entry in counts.labels.items()}
    for kind, key, names in (("unknown_label", "label", labels), ("unknown_phrase", "phrase", dict(counts.phrases))):
        unknown = [name for name in sorted(names, key=lambda name: (-names[name], name)) if not taxonomy.find(name)]
        for rank, name in enumerate(unknown):
            near = taxonomy.nearest(name) if rank < _NAMED_UNKNOWN else []
            findings.add(kind, **{key: name, "regions": names[name], "nearest": near})
    if "train" in counts.splits:
        for name, entry in counts.labels.items():
            # A label that zero-shot evaluation alone shows is held out on purpose.
            if not entry["regions"]["train"] and set(+entry["regions"]) != {ZERO_SHOT}:
                findings.add("label_not_in_train", label=name, regions=dict(entry["regions"]))


def _assemble(
    directory: str | os.PathLike,
    reader: _Reader,
    counts: Counts,
    findings: Findings,
    conflicts: dict[str, Any] | None,
    writing: bool,
) -> dict[str, Any]:
    curation = {split: entry.get("counts", {}) for split, entry in reader.metadata["splits"].items()}
    return {
        "records": mask_private(pathlib.Path(directory).resolve().name),
        "format": reader.metadata["format"],
        "summary": findings.summarize(),
        **counts.as_dict(),
        "curation": curation,
        "conflicts": conflicts,
        "methods": {
            "exact_duplicates": "first 64 bits of the SHA-256 of size and decoded pixels",
            "near_duplicates": {
                "hash": f"{HASH_BITS}-bit DCT hash of the grey 32 x 32 picture, then its pixels compared",
                "hamming_distance": HASH_DISTANCE,
            },
            "burnt_in_text": "rows of small thin marks (OpenCV top hat and black hat): a hint"
            if writing
            else "not looked for",
        },
        "findings": findings.as_list(),
    }


def _draw(reader: _Reader, place: Place, boxes: Any, phrases: Sequence[str], note: str = "") -> Picture | None:
    """Draws a record with these boxes; None if it cannot be decoded."""
    example = reader.read(place)
    try:
        pixels = decode_image(example.image)
    except ValueError:
        return None
    title = f"{place.split} {place.index} · {mask_private(example.image_id)}"
    return draw_picture(pixels, title, np.asarray(boxes, np.float64).reshape(-1, 4), phrases, note)


def _draw_sample(reader: _Reader, place: Place) -> Picture | None:
    example = reader.read(place)
    absent = f"absent: {', '.join(map(mask_private, example.absent))}" if example.absent else ""
    note = "; ".join(filter(None, [mask_private(example.caption), absent]))
    boxes = [region.box for region in example.regions]
    return _draw(reader, place, boxes, [mask_private(region.phrase) for region in example.regions], note)


def _draw_writing(reader: _Reader, place: Place, lines: np.ndarray) -> list[Picture]:
    """Draws a record with its rows of marks [K, 4], and the surroundings of the longest row."""
    whole = _draw(reader, place, lines + np.asarray([-2, -2, 2, 2]), ["row of marks"] * len(lines))
    pixels = decode_image(reader.read(place).image)
    x0, y0, x1, y1 = lines[np.argmax(lines[:, 2] - lines[:, 0])]
    side = max(3 * (x1 - x0), 0.2 * max(pixels.shape[:2]))
    left = int(min(max((x0 + x1 - side) / 2, 0), max(pixels.shape[1] - side, 0)))
    top = int(min(max((y0 + y1 - side) / 2, 0), max(pixels.shape[0] - side, 0)))
    part = pixels[top : top + int(side) + 1, left : left + int(side) + 1]
    return [whole, draw_picture(part, "around the longest", [], [])] if whole else []


def _draw_samples(reader: _Reader, chosen: _Samples) -> dict[str, list[Picture]]:
    return {
        modality: [picture for place in places if (picture := _draw_sample(reader, place))]
        for modality, places in chosen.places().items()
    }


def _draw_findings(
    reader: _Reader, findings: Findings, writing: dict[Place, np.ndarray]
) -> dict[str, list[list[Picture]]]:
    pictures: dict[str, list[list[Picture]]] = {}
    for kind in (*_PICTURED, *_PAIRED):
        for entry in findings.examples.get(kind, [])[:_SHOWN]:
            places = [Place(record["split"], record["index"]) for record in entry["records"]]
            if kind in _PAIRED:
                drawn = [_draw(reader, place, [], []) for place in places[:2]]
            else:
                drawn = [_draw(reader, places[0], entry["boxes"], entry["phrases"])]
            pictures.setdefault(kind, []).append([picture for picture in drawn if picture])
    pictures["burnt_in_text"] = [_draw_writing(reader, place, lines) for place, lines in writing.items()]
    return {kind: groups for kind, groups in pictures.items() if any(groups)}


def write_audit(result: Audit, output: str | os.PathLike) -> pathlib.Path:
    """Writes audit.json and audit.html into a folder, which is made if missing; returns the path of the page."""
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps(result.report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_page(result.report, result.samples, result.pictures)
    for name, text in (("audit.json", report), ("audit.html", page)):
        staging = folder / f".{name}.{os.getpid()}"
        try:
            staging.write_text(text, encoding="utf-8")
            os.replace(staging, folder / name)
        finally:
            staging.unlink(missing_ok=True)
    return folder / "audit.html"


def summarize(report: dict[str, Any]) -> str:
    """Returns the findings of a report as lines of text."""
    counts = report["counts"]
    lines = [f"{counts.get('images', 0)} images, {counts.get('regions', 0)} regions"]
    lines += [f"  {entry['severity']:8}{entry['count']:7d}  {entry['title']}" for entry in report["findings"]]
    return "\n".join(lines + ["  nothing found"] * (not report["findings"]))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="medglip data audit", description="Reports what is in records, and what is wrong with them."
    )
    add = parser.add_argument
    add("records", metavar="RECORDS", help="folder of records; all its splits are read")
    add("--output", metavar="DIR", help="folder of audit.json and audit.html; default: RECORDS/audit")
    add("--samples", type=int, default=6, metavar="N", help="pictures of each modality; default: %(default)s")
    add("--workers", type=int, default=0, metavar="N", help="threads that decode images; default: one a core")
    add("--no-writing", action="store_true", help="do not look for burnt-in text, which takes most of the time")
    add("--strict", action="store_true", help="exit status 1 if there are errors among the findings")
    options = parser.parse_args(arguments)
    if options.samples < 0 or options.workers < 0:
        parser.error("--samples and --workers must be 0 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse_arguments(arguments)
    try:
        result = audit(
            options.records, samples=options.samples, workers=options.workers, writing=not options.no_writing
        )
        page = write_audit(result, options.output or os.path.join(options.records, "audit"))
    except (RecordsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{summarize(result.report)}\nwritten to {page}")
    return int(options.strict and result.report["summary"]["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
