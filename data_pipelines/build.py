"""Builds records from folders of annotated images, or from phantoms.

    medglip data build --source voc --input DIR --output RECORDS --eval-fraction 0.2
    medglip data build --recipe configs/corpora/shared.yaml --root DIR --output RECORDS

The first makes records of one folder, the second a corpus of several. All cores read; a build that was killed goes on
when the same command is run again. The output appears when it is complete, and replaces older records only then.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from data_pipelines.building.corpus import Built, build_corpus, build_source
from data_pipelines.building.recipe import (
    ON_ERROR,
    PHANTOMS,
    UNMAPPED,
    DataSet,
    Recipe,
    RecipeError,
    read_recipe,
)
from data_pipelines.building.running import make_runner, prepare_process
from data_pipelines.curate import SourceError, find_modality
from data_pipelines.limits import Limits, use_limits
from data_pipelines.records import FORMATS, METADATA_FILE, SHARD_BYTES, RecordsError
from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.sources import SOURCES, supported_layouts

_LISTED = 10  # skipped and unused files that the command prints


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
    unmapped: str = "stop",
    overwrite: bool = False,
    progress: bool = True,
    workers: int = 1,
) -> dict[str, Any]:
    """Writes the examples of a source as records into a new directory.

    Args:
        source: the examples; asking for one may raise `SourceError`.
        output: the records directory; it appears when everything is written.
        name: of the data set.
        file_format: array_record or tfrecord.
        split, eval_fraction, split_seed, num_shards, shard_bytes, on_error: as `Recipe`.
        unmapped: as `DataSet`.
        overwrite: replace records that are there already.
        progress: show a progress bar on stderr.
        workers: processes; 0 for one a core. The source must then be picklable.

    Returns:
        The content of the directory's medglip.json.

    Raises:
        SourceError: an image cannot be used, a label is unknown, or no image is left.
        RecordsError: the output exists, a name or number cannot be used, or a split got no images.
    """
    recipe = Recipe(
        name=name,
        data_sets={name: DataSet(unmapped=unmapped)},
        format=file_format,
        shard_bytes=shard_bytes,
        num_shards=num_shards,
        split=split,
        eval_fraction=eval_fraction,
        split_seed=split_seed,
        on_error=on_error,
    )
    return build_source(
        source, recipe, output, runner=make_runner(workers), overwrite=overwrite, progress=progress
    ).metadata


def summarize(built: Built) -> str:
    """Returns the counts of a build as lines of text."""
    lines = []
    for split, entry in built.metadata["splits"].items():
        lines.append(f"{split}: {entry['num_examples']} images, {sum(entry['labels'].values())} regions")
        lines += [f"  {count:8d} {label}" for label, count in entry["labels"].items()]
        counts = entry["counts"]
        reasons = "".join(f"; {reason}: {count}" for reason, count in counts["dropped"].items())
        lines.append(f"  boxes clipped: {counts['clipped']}; dropped: {sum(counts['dropped'].values())}{reasons}")
    for name, data_set in built.metadata["build"]["data_sets"].items():
        for reason, count in data_set["dropped"].items():
            lines.append(f"{name}: regions dropped by the source: {count} {reason}")
        for note, count in data_set["notes"].items():
            lines.append(f"{name}: {count} files: {note}")
        for label, count in data_set.get("unmapped", {}).items():
            lines.append(f"{name}: {count} regions of {label!r}, which is not in the taxonomy")
    for what, listed in (("images skipped", built.skipped), ("files without annotation or image", built.unused)):
        entries = [entry for of_data_set in listed.values() for entry in of_data_set]
        lines.append(f"{what}: {len(entries)}")
        lines += [f"  {entry}" for entry in entries[:_LISTED]]
        lines += ["  ... --list FILE writes all of them"] * (len(entries) > _LISTED)
    return "\n".join(lines)


def _join_beam(arguments: Sequence[str]) -> list[str]:
    """Writes `--beam VALUE` as `--beam=VALUE`: argparse takes a value that begins with dashes for another option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--beam":
            joined[-1] = f"--beam={argument}"
        else:
            joined.append(argument)
    return joined


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="medglip data build",
        description="Builds records from a folder of annotated images, or a corpus from several.",
        epilog=f"layouts:\n{supported_layouts()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, help="folder to write the records to")
    add("--overwrite", action="store_true", help="replace records that are in the output folder")
    add("--workers", type=int, default=0, help="processes that read and write; default: one a core")
    add("--beam", metavar="OPTIONS", help="run on Apache Beam with these pipeline options, as '--runner=FlinkRunner'")
    add("--list", metavar="FILE", help="write which images were skipped, and which files not used, as JSON")
    add("--limits", metavar="FIELD=N,...", default="", help="raise limits of files, as image_pixels=1000000000")
    one = parser.add_argument_group("one data set")
    add = one.add_argument
    add("--source", help=f"layout of the input: auto, {', '.join(SOURCES)}, phantoms, or MODULE:CLASS of your own")
    add("--input", help="folder or archive of the source (for coco also the .json file); not for phantoms")
    add("--format", choices=FORMATS, default="array_record", help="default: %(default)s")
    add("--name", help="of the data set; default: from the input folder")
    add("--split", help="name of the one split; default: train")
    add("--eval-fraction", type=float, default=0.0, help="share of patients that go to a split validation; default: 0")
    add("--split-seed", type=int, default=0, help="of that choice; default: %(default)s")
    add("--modality", default="", help=f"of images whose source does not say: {', '.join(MODALITIES[1:])}")
    add("--mapping", default="", help="bundled mapping of the labels (see docs/data.md), or a YAML file of your own")
    add("--not-exhaustive", action="store_true", help="not all that the labels name is marked: no negatives from them")
    add("--unmapped", choices=UNMAPPED, default="stop", help="at a label that maps to nothing; default: stop")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the source, as step_mm=5; repeatable")
    add("--referring", type=int, default=0, help="regions of an image to make expressions for; default: 0")
    add("--shard-size", type=float, default=SHARD_BYTES / 2**20, metavar="MB", help="default: %(default)g")
    add("--num-shards", type=int, default=0, help="of each split, instead of --shard-size")
    add("--on-error", choices=ON_ERROR, default="stop", help="at an image that cannot be used; default: stop")
    add("--count", type=int, default=1000, help="phantoms to draw; default: %(default)s")
    add("--size", type=int, default=256, help="side of the phantoms in pixels; default: %(default)s")
    add("--seed", type=int, default=0, help="series of the phantoms; default: %(default)s")
    several = parser.add_argument_group("several data sets")
    several.add_argument("--recipe", metavar="FILE", help="YAML file of the corpus, instead of the options above")
    several.add_argument("--root", help="folder that its inputs are relative to; default: the recipe's own")
    options = parser.parse_args(_join_beam(sys.argv[1:] if arguments is None else arguments))
    if (options.source is None) == (options.recipe is None):
        parser.error("give --source for one data set, or --recipe for several")
    if options.source and (options.input is None) != (options.source == PHANTOMS):
        parser.error("--input is needed, except for phantoms, which take --count, --size and --seed")
    if options.split and options.eval_fraction:
        parser.error("--eval-fraction writes the splits train and validation; leave out --split")
    if options.modality and not find_modality(options.modality):
        parser.error(f"unknown modality {options.modality!r}; known: {', '.join(MODALITIES[1:])}")
    return options


def _parse_option(text: str) -> tuple[str, Any]:
    """Reads NAME=VALUE; the value is JSON if it can be read so, "a,b" a list, anything else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--option {text!r}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value.split(",") if "," in value else value


def _make_recipe(options: argparse.Namespace) -> tuple[Recipe, pathlib.Path]:
    """Returns the recipe that the command asks for, and the folder that its inputs are relative to."""
    if options.recipe:
        path = pathlib.Path(options.recipe)
        return read_recipe(path), pathlib.Path(options.root) if options.root else path.parent
    phantoms = options.source == PHANTOMS
    stem = PHANTOMS if phantoms else pathlib.Path(options.input).resolve().name.split(".")[0]
    default = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
    name = options.name or (default if default[:1].isalpha() else f"data_{default}".rstrip("_"))
    chosen = {"count": options.count, "size": options.size, "seed": options.seed} if phantoms else {}
    data_set = DataSet(
        source=options.source,
        input=options.input or "",
        modality=options.modality,
        mapping=options.mapping,
        unmapped=options.unmapped,
        exhaustive=False if options.not_exhaustive else None,
        options={**chosen, **dict(map(_parse_option, options.option))},
    )
    recipe = Recipe(
        name=name,
        data_sets={name: data_set},
        format=options.format,
        shard_bytes=int(options.shard_size * 2**20),
        num_shards=options.num_shards,
        split=options.split or "train",
        eval_fraction=options.eval_fraction,
        split_seed=options.split_seed,
        referring=options.referring,
        on_error=options.on_error,
    )
    return recipe, pathlib.Path()


def _parse_limits(text: str) -> Limits:
    values = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in Limits.__dataclass_fields__:
            raise RecipeError(f"there is no limit {name!r}; there are {', '.join(Limits.__dataclass_fields__)}")
        try:
            values[name] = json.loads(value.lower())
        except json.JSONDecodeError:
            raise RecipeError(f"the limit {item!r}: expected NAME=NUMBER, or NAME=true") from None
    return Limits(**values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse_arguments(arguments)
    prepare_process(keep_memory=options.workers == 1)  # with more it hardly sees a picture
    try:
        recipe, root = _make_recipe(options)
        runner = make_runner(options.workers, None if options.beam is None else shlex.split(options.beam))
        with use_limits(_parse_limits(options.limits)):
            built = build_corpus(recipe, options.output, root=root, runner=runner, overwrite=options.overwrite)
    except (SourceError, RecordsError, RecipeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.list:
        listed = {"skipped": built.skipped, "unused": built.unused}
        pathlib.Path(options.list).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    print(f"{summarize(built)}\nwritten to {options.output} ({recipe.format}, {METADATA_FILE})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
