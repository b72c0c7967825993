"""Builds records from a folder of annotated images, or from phantoms.

    python -m data_pipelines.build --source voc --input DIR --output DIR --format array_record --eval-fraction 0.2

Boxes that leave their image are clipped, boxes without area are dropped; both are counted, printed and written to the
metadata. The output appears when it is complete, and replaces older records only then.
"""

import argparse
import collections
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from data_pipelines.curate import SourceError, Tally, curate, find_modality, split_of
from data_pipelines.records import FORMATS, METADATA_FILE, SHARD_BYTES, RecordsError, RecordsWriter
from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.sources import SOURCES, load_source, supported_layouts

_LISTED = 10  # skipped and unused files that the command prints


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise RecordsError(f"{output} is not empty: choose another --output, or replace it with --overwrite")
    if not (output / METADATA_FILE).is_file():
        raise RecordsError(f"{output} holds something else than records: --overwrite replaces only records")


def _replace(staging: pathlib.Path, output: pathlib.Path) -> None:
    """Puts a finished folder in the place of `output`; an older one goes only after that."""
    retired = staging.with_name(staging.name + "-old")
    if output.exists():
        os.replace(output, retired)
    try:
        os.replace(staging, output)
    except OSError:
        if retired.exists():
            os.replace(retired, output)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def build(
    source: Sequence[GroundingExample],
    output: str | os.PathLike,
    *,
    name: str,
    file_format: str = "array_record",
    split: str = "train",
    eval_fraction: float = 0.0,
    split_seed: int = 0,
    num_shards: int = 0,
    shard_bytes: int = SHARD_BYTES,
    on_error: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the examples of a source as records into a new directory.

    Args:
        source: the examples; asking for one may raise `SourceError`.
        output: the records directory; it appears when everything is written.
        name: of the data set.
        file_format: array_record or tfrecord.
        split: name of the split where `eval_fraction` is 0.
        eval_fraction: share of patients, or images, that go to "validation"; the others to "train".
        split_seed: of that choice.
        num_shards, shard_bytes: as `records.RecordsWriter`.
        on_error: "stop" raises at the first image that cannot be used, "skip" leaves it out and lists it.
        overwrite: replace records that are there already.
        progress: show a progress bar on stderr.

    Returns:
        The content of the directory's medglip.json.

    Raises:
        SourceError: an image cannot be used, or none is left.
        RecordsError: the output exists, or a split got no images.
    """
    if not 0 <= eval_fraction < 1:
        raise RecordsError(f"the evaluation fraction must be at least 0 and below 1, not {eval_fraction}")
    output = pathlib.Path(output).resolve()
    _check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.building-{os.getpid()}")
    tallies: dict[str, Tally] = collections.defaultdict(Tally)
    skipped: list[str] = []
    try:
        with RecordsWriter(
            staging, name=name, file_format=file_format, num_shards=num_shards, shard_bytes=shard_bytes
        ) as writer:
            indices = range(len(source))
            for index in track(indices, f"Building {name}", console=Console(stderr=True), disable=not progress):
                try:
                    example, tally = curate(source[index])
                except SourceError as error:
                    if on_error == "stop":
                        raise
                    skipped.append(str(error))
                    continue
                target = split_of(example, eval_fraction, split_seed) if eval_fraction else split
                tallies[target] += tally
                writer.write(example, target)
            if not tallies:
                raise SourceError(f"{name}: no images" + (f" can be used; the first: {skipped[0]}" if skipped else ""))
            if eval_fraction and len(tallies) < 2:
                raise RecordsError(
                    f"{name}: all images fell into {next(iter(tallies))}; change --eval-fraction or --split-seed"
                )
            metadata = writer.commit(
                {target: tally.as_dict() for target, tally in tallies.items()},
                {
                    "source": type(source).__name__,
                    "eval_fraction": eval_fraction,
                    "split_seed": split_seed,
                    "skipped": skipped,
                    "unused": list(getattr(source, "unused", ())),
                    "dropped": dict(getattr(source, "dropped", {})),
                },
            )
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return metadata


def summarize(metadata: dict[str, Any]) -> str:
    """Returns the counts of a build as lines of text."""
    lines = []
    for split, entry in metadata["splits"].items():
        lines.append(f"{split}: {entry['num_examples']} images, {sum(entry['labels'].values())} regions")
        lines += [f"  {count:8d} {label}" for label, count in entry["labels"].items()]
        counts = entry["counts"]
        reasons = "".join(f"; {reason}: {count}" for reason, count in counts["dropped"].items())
        lines.append(f"  boxes clipped: {counts['clipped']}; dropped: {sum(counts['dropped'].values())}{reasons}")
    for reason, count in metadata["build"].get("dropped", {}).items():
        lines.append(f"regions dropped by the source: {count} {reason}")
    for what, text in (("skipped", "images skipped"), ("unused", "files without annotation or image")):
        entries = metadata["build"][what]
        lines.append(f"{text}: {len(entries)}")
        lines += [f"  {entry}" for entry in entries[:_LISTED]]
        lines += [f"  ... all of them are in {METADATA_FILE}"] * (len(entries) > _LISTED)
    return "\n".join(lines)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.build",
        description="Builds records from a folder of annotated images.",
        epilog=f"layouts:\n{supported_layouts()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--source", required=True, choices=["auto", *SOURCES, "phantoms"], help="layout of the input")
    add("--input", help="folder of the source (for coco also the .json file); not for phantoms")
    add("--output", required=True, help="folder to write the records to")
    add("--format", choices=FORMATS, default="array_record", help="default: %(default)s")
    add("--name", help="of the data set; default: from the input folder")
    add("--split", help="name of the one split; default: train")
    add("--eval-fraction", type=float, default=0.0, help="share of patients that go to a split validation; default: 0")
    add("--split-seed", type=int, default=0, help="of that choice; default: %(default)s")
    add("--modality", default="", help=f"of images whose source does not say: {', '.join(MODALITIES[1:])}")
    add("--shard-size", type=float, default=SHARD_BYTES / 2**20, metavar="MB", help="default: %(default)g")
    add("--num-shards", type=int, default=0, help="of each split, instead of --shard-size")
    add("--on-error", choices=["stop", "skip"], default="stop", help="at an image that cannot be used; default: stop")
    add("--overwrite", action="store_true", help="replace records that are in the output folder")
    add("--count", type=int, default=1000, help="phantoms to draw; default: %(default)s")
    add("--size", type=int, default=256, help="side of the phantoms in pixels; default: %(default)s")
    add("--seed", type=int, default=0, help="series of the phantoms; default: %(default)s")
    options = parser.parse_args(arguments)
    if (options.input is None) != (options.source == "phantoms"):
        parser.error("--input is needed, except for phantoms, which take --count, --size and --seed")
    if options.split and options.eval_fraction:
        parser.error("--eval-fraction writes the splits train and validation; leave out --split")
    if options.modality and not find_modality(options.modality):
        parser.error(f"unknown modality {options.modality!r}; known: {', '.join(MODALITIES[1:])}")
    return options


def _open(options: argparse.Namespace, name: str) -> Sequence[GroundingExample]:
    if options.source != "phantoms":
        modality = find_modality(options.modality) or "unknown"
        return load_source(options.source, options.input, dataset=name, modality=modality)
    from data_pipelines.sources.phantoms import Phantoms

    try:
        source = Phantoms(options.count, seed=options.seed, size=options.size)
        next(iter(source), None)  # a size that is too small shows when one is drawn
    except ValueError as error:
        raise SourceError(str(error)) from None
    return source


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse_arguments(arguments)
    stem = "phantoms" if options.source == "phantoms" else pathlib.Path(options.input).resolve().stem
    default = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
    name = options.name or (default if default[:1].isalpha() else f"data_{default}".rstrip("_"))
    try:
        metadata = build(
            _open(options, name),
            options.output,
            name=name,
            file_format=options.format,
            split=options.split or "train",
            eval_fraction=options.eval_fraction,
            split_seed=options.split_seed,
            num_shards=options.num_shards,
            shard_bytes=int(options.shard_size * 2**20),
            on_error=options.on_error,
            overwrite=options.overwrite,
        )
    except (SourceError, RecordsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{summarize(metadata)}\nwritten to {options.output} ({options.format})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
