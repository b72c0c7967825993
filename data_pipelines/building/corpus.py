"""Building a corpus: opens the sources, runs the stages, writes the metadata, and puts the records in their place."""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from data_pipelines.archives import open_input
from data_pipelines.building.parts import Part, PartReader, PartWriter, load_part
from data_pipelines.building.planning import Rows, decide, gather, make_index, split_metadata
from data_pipelines.building.reading import Reading, add_example, is_held_out, is_read, plan_units, read_unit
from data_pipelines.building.recipe import PHANTOMS, DataSet, Recipe, RecipeError
from data_pipelines.building.running import Runner, run_here
from data_pipelines.building.sharding import ShardTask, make_tasks, split_shards, write_shard
from data_pipelines.building.staging import Staging, check_output, digest_plan
from data_pipelines.codec import import_codec, parse_example
from data_pipelines.conflicts import ConflictReport, merge
from data_pipelines.curate import SALT_VARIABLE, SourceError, digest_text, find_modality, find_salt
from data_pipelines.images import Previews
from data_pipelines.limits import Limits, current_limits
from data_pipelines.record_index import index_name
from data_pipelines.records import METADATA_FILE, RecordsError, write_json
from data_pipelines.schema import GroundingExample
from data_pipelines.sources import load_source
from data_pipelines.tfds_metadata import write_tfds_metadata

CONFLICTS_FILE = "conflicts.json"
UNIT_SIZE = 64  # examples of a part; more make a killed build lose more
Source = Sequence[GroundingExample]


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build wrote, and what it left out.

    Attributes:
        metadata: content of medglip.json.
        skipped: why images were left out, by data set. The texts name files: they are for the person who builds, and
            records do not hold them.
        unused: files without annotation or image, by data set; likewise.
    """

    metadata: dict[str, Any]
    skipped: dict[str, list[str]]
    unused: dict[str, list[str]]


def open_data_set(data_set: DataSet, name: str, root: pathlib.Path, workspace: pathlib.Path) -> Source:
    """Opens the source of a data set; an archive is unpacked into the workspace.

    Raises:
        SourceError: it cannot be read.
    """
    if data_set.source == PHANTOMS:
        return _draw_phantoms(data_set.options)
    folder = open_input(root / data_set.input, workspace)
    modality = find_modality(data_set.modality) or "unknown"
    return load_source(data_set.source, folder, dataset=name, modality=modality, options=data_set.options)


def _draw_phantoms(options: dict[str, Any]) -> Source:
    from data_pipelines.sources.phantoms import Phantoms

    known = {"count": 1000, "seed": 0, "size": 256}
    for field, value in options.items():
        if field not in known or type(value) is not int:
            raise SourceError(
                f"phantoms have the options {', '.join(known)}, which are numbers, not {field}: {value!r}"
            )
    options = known | options
    try:
        source = Phantoms(options["count"], seed=options["seed"], size=options["size"])
        next(iter(source), None)  # a size that is too small shows when one is drawn
    except ValueError as error:
        raise SourceError(str(error)) from None
    return source


def build_corpus(
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    root: str | os.PathLike = ".",
    runner: Runner = run_here,
    overwrite: bool = False,
    unit_size: int = UNIT_SIZE,
    progress: bool = True,
) -> Built:
    """Writes a corpus as records into a new directory; a build that was killed goes on when it is called again.

    The bytes depend on the recipe, the inputs and the version of this package only.

    Args:
        recipe: which data sets, splits and rules.
        output: the records directory; it appears when everything is written.
        root: folder that the recipe's inputs are relative to.
        runner: of the tasks (`running.make_runner`).
        overwrite: replace records that are there already.
        unit_size: examples that a task reads.
        progress: show a progress bar on stderr.

    Raises:
        SourceError: a source cannot be read, an image not be used, a label maps to nothing, or no image is left.
        RecordsError: the output exists, another build writes it, or a split got no images.
        RecipeError: data sets share patients, and their hashes have no salt in common.
    """
    output = pathlib.Path(output).resolve()
    check_output(output, overwrite)
    _check_pools(recipe)
    root, limits = pathlib.Path(root), current_limits()
    workspace = output.with_name(f".{output.name}.unpacked")
    sources = tuple(open_data_set(each, name, root, workspace) for name, each in recipe.data_sets.items())
    digests = [
        _digest_data_set(recipe, name, root, len(source), limits)
        for name, source in zip(recipe.data_sets, sources, strict=True)
    ]
    return _Build(recipe, sources, output, digests, limits, runner, unit_size, progress).run()


def build_source(
    source: Source,
    recipe: Recipe,
    output: str | os.PathLike,
    *,
    runner: Runner = run_here,
    overwrite: bool = False,
    progress: bool = True,
) -> Built:
    """Writes the examples of a sequence, the one data set of the recipe, as `build_corpus` does. It cannot go on after
    it was killed, since nothing tells whether the sequence is still the same."""
    output = pathlib.Path(output).resolve()
    check_output(output, overwrite)
    return _Build(recipe, (source,), output, [None], current_limits(), runner, UNIT_SIZE, progress).run()


def _check_pools(recipe: Recipe) -> None:
    """Patients of several data sets are the same only under one salt; without one each has its name for it."""
    pools: dict[str, list[str]] = {}
    for name, data_set in recipe.data_sets.items():
        pools.setdefault(data_set.patients, []).append(name)
    for pool, names in pools.items():
        if pool and len(names) > 1 and not os.environ.get(SALT_VARIABLE):
            raise RecipeError(
                f"{recipe.name}: the data sets {', '.join(names)} share the patients of {pool!r}, whose hashes only "
                f"agree with one salt; set the environment variable {SALT_VARIABLE}"
            )


def _digest_data_set(recipe: Recipe, name: str, root: pathlib.Path, size: int, limits: Limits) -> str:
    """Returns what decides the bytes of a data set's parts."""
    data_set = recipe.data_sets[name]
    mapping = pathlib.Path(data_set.mapping)
    content = {
        "name": name,
        "data_set": dataclasses.asdict(data_set),
        "mapping": mapping.read_text(encoding="utf-8") if mapping.suffix and mapping.is_file() else "",
        "rules": dataclasses.asdict(recipe.rules),
        "held_out": dataclasses.asdict(recipe.held_out),
        "referring": recipe.referring,
        "on_error": recipe.on_error,
        "limits": dataclasses.asdict(limits),
        "salt": digest_text(find_salt(name)).hex(),
        "size": size,
    }
    return digest_plan(content, [] if data_set.source == PHANTOMS else [root / data_set.input])


def _load(parts: Iterable[tuple[int, pathlib.Path]]) -> Iterator[tuple[int, Part]]:
    """Loads parts one by one; together they would take as much memory as the rows made of them."""
    for data_set, path in parts:
        yield data_set, load_part(path, pictures=False)


class _Build:
    """One build; its methods are the stages in their order."""

    def __init__(
        self,
        recipe: Recipe,
        sources: tuple[Source, ...],
        output: pathlib.Path,
        digests: Sequence[str | None],
        limits: Limits,
        runner: Runner,
        unit_size: int,
        progress: bool,
    ):
        self._recipe, self._sources, self._output, self._limits = recipe, sources, output, limits
        self._names = list(recipe.data_sets)
        plan = digest_plan({"recipe": dataclasses.asdict(recipe), "digests": digests, "unit_size": unit_size}, [])
        self._staging = Staging(output, [digest and f"{digest}-{unit_size}" for digest in digests], plan)
        self._runner, self._unit_size = runner, unit_size
        self._progress = Progress(console=Console(stderr=True), disable=not progress)

    def run(self) -> Built:
        import_codec()
        with self._staging:
            with self._progress:
                rows = self._read()
                splits = self._decide(rows)
                written = self._write(splits)
            metadata = self._finish(splits, written)
        return Built(
            metadata,
            dict(self._skipped),
            {
                name: unused
                for name, source in zip(self._names, self._sources, strict=True)
                if (unused := [str(path) for path in getattr(source, "unused", ())])
            },
        )

    def _run_tasks(self, title: str, function: Any, context: Any, tasks: Sequence[Any], done: int) -> None:
        bar = self._progress.add_task(title, total=len(tasks) + done, completed=done)
        self._runner(function, context, tasks, lambda: self._progress.advance(bar))

    def _read(self) -> Rows:
        """Reads what has not been read before; returns all examples."""
        borders = [getattr(source, "starts", ()) for source in self._sources]
        units = plan_units([len(source) for source in self._sources], self._unit_size, borders)
        missing = [unit for unit in units if not is_read(unit, self._staging.parts[unit.data_set])]
        context = Reading(self._recipe, self._sources, tuple(self._staging.parts), self._limits)
        self._run_tasks(f"Reading {self._recipe.name}", read_unit, context, missing, len(units) - len(missing))
        self._skipped: dict[str, list[str]] = collections.defaultdict(list)
        self._totals: dict[str, dict[str, collections.Counter[str]]] = {
            name: collections.defaultdict(collections.Counter) for name in self._names
        }
        for name, source in zip(self._names, self._sources, strict=True):
            self._totals[name]["notes"].update(getattr(source, "notes", {}))
        self._conflicts = ConflictReport()
        self._parts = [(unit.data_set, unit.path(self._staging.parts[unit.data_set])) for unit in units]
        return gather(map(self._count, _load(self._parts)))

    def _count(self, entry: tuple[int, Part]) -> tuple[int, Part]:
        """Adds what a part counted to the totals."""
        data_set, part = entry
        name = self._names[data_set]
        if part.skipped:
            self._skipped[name] += part.skipped
        for kind in ("unmapped", "expressions", "notes"):
            self._totals[name][kind].update(part.counts[kind])
        self._conflicts += ConflictReport.from_dict(part.counts["conflicts"])
        return entry

    def _decide(self, rows: Rows) -> dict[str, Rows]:
        """Returns the examples of each split in the order of their records; images that are one are merged."""
        if not len(rows):
            reasons = [reason for skipped in self._skipped.values() for reason in skipped]
            first = f" can be used; the first: {reasons[0]}" if reasons else ""
            raise SourceError(f"{self._recipe.name}: no images{first}")
        decision = decide(rows, self._recipe)
        self._decided = decision.report
        order = np.flatnonzero(decision.splits != "")
        if decision.merged:
            parts, replaced = self._merge(rows, decision.merged)
            order = np.asarray([replaced.get(row, row) for row in order.tolist()], np.int64)
            splits = decision.splits[decision.splits != ""]
            rows = gather(_load(parts)).take(order)
        else:
            rows, splits = rows.take(order), decision.splits[order]
        found = {split: rows.take(np.flatnonzero(splits == split)) for split in np.unique(splits).tolist()}
        if self._recipe.eval_fraction and not {"train", "validation"} <= set(found):
            raise RecordsError(
                f"{self._recipe.name}: all images fell into {', '.join(found)}; change --eval-fraction or --split-seed"
            )
        return found

    def _merge(self, rows: Rows, groups: list[list[int]]) -> tuple[list[tuple[int, pathlib.Path]], dict[int, int]]:
        """Makes one example of each group of rows; returns all parts, and the row that takes the place of another."""
        folder = self._staging.folder / "parts-merged"
        folder.mkdir(exist_ok=True)
        by_data_set: dict[int, list[list[int]]] = collections.defaultdict(list)
        for group in sorted(groups):
            by_data_set[int(rows.data_set[group[0]])].append(group)
        parts, replaced, total = list(self._parts), {}, len(rows)
        with PartReader() as reader:
            for data_set, members in sorted(by_data_set.items()):
                path = folder / f"{data_set:04d}.part"
                writer = PartWriter(path)
                try:
                    for group in members:
                        self._merge_group(rows, group, reader, writer)
                        replaced[group[0]] = total
                        total += 1
                    writer.finish()
                finally:
                    writer.discard()
                parts.append((data_set, path))
        return parts, replaced

    def _merge_group(self, rows: Rows, group: list[int], reader: PartReader, writer: PartWriter) -> None:
        examples, dropped = [], collections.Counter[str]()
        for row in group:
            record = reader.read(rows.paths[rows.part[row]], int(rows.offsets[row]), int(rows.lengths[row]))
            examples.append(parse_example(record))
            dropped.update(rows.dropped.get(row, {}))
        example, conflicts = merge(examples, self._recipe.rules)
        for conflict in conflicts:
            self._conflicts.add(conflict)
        add_example(
            writer,
            example,
            Previews().find(example.image, f"image {example.image_id}"),
            self._recipe.data_sets[self._names[rows.data_set[group[0]]]].patients,
            is_held_out(example, self._recipe),
            dropped,
            int(rows.clipped[group].sum()),
        )

    def _write(self, splits: dict[str, Rows]) -> dict[str, list[ShardTask]]:
        """Writes the shards that are missing; returns all of them."""
        recipe, tasks = self._recipe, {}
        for split, rows in splits.items():
            shards = split_shards(rows.lengths, recipe.shard_bytes, recipe.num_shards)
            tasks[split] = make_tasks(self._staging.records, recipe.name, split, recipe.format, rows, shards)
        every = [task for of_split in tasks.values() for task in of_split]
        missing = [task for task in every if not task.marker.exists()]
        self._run_tasks(f"Writing {recipe.name}", write_shard, None, missing, len(every) - len(missing))
        return tasks

    def _finish(self, splits: dict[str, Rows], tasks: dict[str, list[ShardTask]]) -> dict[str, Any]:
        """Writes what lies beside the shards, and publishes the records."""
        recipe, folder = self._recipe, self._staging.records
        entries = {}
        for split, rows in sorted(splits.items()):
            markers = [json.loads(task.marker.read_text(encoding="ascii")) for task in tasks[split]]
            entries[split] = {
                **split_metadata(rows, self._names, self._find_partial()),
                "shard_lengths": [len(task.part) for task in tasks[split]],
                "shard_bytes": [marker["bytes"] for marker in markers],
                "shard_sha256": [marker["sha256"] for marker in markers],
            }
            make_index(rows, self._names).save(folder / index_name(recipe.name, split))
        write_json(folder / CONFLICTS_FILE, self._conflicts.as_dict())
        write_tfds_metadata(
            folder,
            recipe.name,
            recipe.format,
            {split: (entry["shard_lengths"], sum(entry["shard_bytes"])) for split, entry in entries.items()},
        )
        metadata = {"dataset": recipe.name, "format": recipe.format, "splits": entries, "build": self._describe()}
        write_json(folder / METADATA_FILE, metadata)
        for task in (task for of_split in tasks.values() for task in of_split):
            task.marker.unlink(missing_ok=True)
        self._staging.publish()
        return metadata

    def _find_partial(self) -> tuple[str, ...]:
        """Returns the data sets that do not mark all that their labels name."""
        sources = zip(self._recipe.data_sets.items(), self._sources, strict=True)
        told = {
            name: (data_set.exhaustive, getattr(source, "EXHAUSTIVE", True)) for (name, data_set), source in sources
        }
        return tuple(name for name, (asked, known) in told.items() if not (known if asked is None else asked))

    def _describe(self) -> dict[str, Any]:
        """Returns what the metadata say of the build; no names of files."""
        recipe = self._recipe
        data_sets = {}
        for name, source in zip(self._names, self._sources, strict=True):
            data_sets[name] = {
                "source": type(source).__name__,
                "images": len(source),
                "skipped": len(self._skipped[name]),
                "unused": len(getattr(source, "unused", ())),
                "dropped": dict(getattr(source, "dropped", {})),
                **{kind: dict(sorted(counts.items())) for kind, counts in sorted(self._totals[name].items())},
            }
        return {
            "eval_fraction": recipe.eval_fraction,
            "split_seed": recipe.split_seed,
            "held_out": dataclasses.asdict(recipe.held_out),
            "rules": dataclasses.asdict(recipe.rules),
            **self._decided,
            "data_sets": data_sets,
        }
