"""Reading a unit of a data set: examples as records hold them, and what planning must know about each."""

import bisect
import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines.audit_pixels import hash_picture, shrink
from data_pipelines.building.parts import PartWriter, index_path
from data_pipelines.building.recipe import DataSet, Recipe
from data_pipelines.codec import encode_example
from data_pipelines.conflicts import ConflictReport, resolve
from data_pipelines.curate import SourceError, curate, digest_text, find_salt, hash_identifier, keep_regions, split_key
from data_pipelines.dicom_image import count_notes
from data_pipelines.images import Previews, keep_previews
from data_pipelines.limits import Limits, use_limits
from data_pipelines.schema import MODALITIES, GroundingExample
from data_pipelines.splits import digest_annotations
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.taxonomy.mapping import LabelMapping, add_absent, apply_mapping, describe_unmapped, load_mapping
from data_pipelines.taxonomy.placeholders import is_placeholder

_PUNCTUATION = re.compile(r"[^\w\s-]")


@dataclasses.dataclass(frozen=True)
class Unit:
    """Examples `start` to `stop` of a data set, by its position in the recipe."""

    data_set: int
    start: int
    stop: int

    def path(self, folder: pathlib.Path) -> pathlib.Path:
        """Returns where its part lies."""
        return folder / f"{self.data_set:04d}-{self.start:010d}.part"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What every task of the stage needs.

    Attributes:
        recipe: of the corpus.
        sources: the opened data sets, in the recipe's order.
        folders: of the parts of each data set.
        limits: of files.
    """

    recipe: Recipe
    sources: tuple[Sequence[GroundingExample], ...]
    folders: tuple[pathlib.Path, ...]
    limits: Limits


def plan_units(sizes: Sequence[int], unit_size: int, borders: Sequence[Sequence[int]] = ()) -> list[Unit]:
    """Cuts data sets of these sizes into units.

    Args:
        sizes: of the data sets.
        unit_size: examples of a unit, at most.
        borders: for each data set places, rising, where a unit ends rather than elsewhere: a volume of which two units
            have slices is read twice.
    """
    units = []
    for data_set, size in enumerate(sizes):
        places = borders[data_set] if borders else ()
        start = 0
        while start < size:
            stop = min(start + unit_size, size)
            place = bisect.bisect_right(places, stop) - 1
            if stop < size and place >= 0 and places[place] > start:
                stop = places[place]
            units.append(Unit(data_set, start, stop))
            start = stop
    return units


def is_read(unit: Unit, folder: pathlib.Path) -> bool:
    return index_path(unit.path(folder)).exists()


def fingerprint(encoded: bytes, preview: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Returns (digest, look, thumbnail) of an encoded image, of which `images.make_preview` is the preview.

    The digest is 64 bits of SHA-256 of the bytes, the look `audit_pixels.hash_picture`, the thumbnail uint8[32, 32].
    """
    digest = int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")
    thumbnail = shrink(preview)
    return digest, hash_picture(thumbnail), thumbnail


def read_unit(context: Reading, unit: Unit) -> None:
    """Writes the part of a unit.

    Raises:
        SourceError: an image cannot be used and the recipe's `on_error` is "stop", or a label maps to nothing and the
            data set's `unmapped` is "stop".
    """
    name, data_set = list(context.recipe.data_sets.items())[unit.data_set]
    reader = _UnitReader(context.recipe, name, data_set)
    source, writer = context.sources[unit.data_set], PartWriter(unit.path(context.folders[unit.data_set]))
    try:
        with use_limits(context.limits), keep_previews() as previews, count_notes() as notes:
            for index in range(unit.start, unit.stop):
                try:
                    reader.add(source[index], writer, previews)
                except SourceError as error:
                    if context.recipe.on_error == "stop":
                        raise
                    writer.skipped.append(str(error))
        reader.finish(writer, notes)
        writer.finish()
    finally:
        writer.discard()


class _UnitReader:
    """From a source's examples of one data set to what a part holds of them."""

    def __init__(self, recipe: Recipe, name: str, data_set: DataSet):
        self._recipe, self._name, self._data_set = recipe, name, data_set
        self._mapping: LabelMapping = load_mapping(data_set.mapping)
        self._unmapped: collections.Counter[str] = collections.Counter()
        self._expressions: collections.Counter[str] = collections.Counter()
        self._conflicts = ConflictReport()

    def add(self, example: GroundingExample, writer: PartWriter, previews: Previews) -> None:
        if self._data_set.private:
            example = dataclasses.replace(example, image_id=self._hide(example.image_id))
        example, tally = curate(example)
        example, unmapped, dropped = map_labels(example, self._mapping, self._data_set.unmapped)
        example = add_absent(example, self._mapping)
        self._unmapped += unmapped
        example, conflicts = resolve(example, self._recipe.rules)
        for conflict in conflicts:
            self._conflicts.add(conflict)
        if self._recipe.referring:
            example = self._refer(example)
        held_out = is_held_out(example, self._recipe)
        if not held_out:
            example = _hide_held_out(example, self._recipe)
        preview = previews.find(example.image, f"image {example.image_id}")
        add_example(writer, example, preview, self._data_set.patients, held_out, tally.dropped + dropped, tally.clipped)

    def _hide(self, image_id: str) -> str:
        return hash_identifier("image", f"{self._name}/{image_id}", find_salt(self._name))

    def _refer(self, example: GroundingExample) -> GroundingExample:
        """Adds sentences about the regions, the same for an image at every build."""
        from data_pipelines.referring import ReferRule, refer

        seed = digest_text(f"{self._name}/{example.image_id}")
        rng = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        expressions, dropped = refer(example, rng, ReferRule(regions=self._recipe.referring))
        self._expressions.update(dropped)
        self._expressions["kept"] += len(expressions)
        return dataclasses.replace(example, expressions=(*example.expressions, *expressions))

    def finish(self, writer: PartWriter, notes: collections.Counter[str]) -> None:
        if self._unmapped and self._data_set.unmapped == "stop":
            raise SourceError(describe_unmapped(self._unmapped, self._name, self._mapping))
        writer.counts = {
            "unmapped": dict(sorted(self._unmapped.items())),
            "expressions": dict(sorted(self._expressions.items())),
            "notes": dict(sorted(notes.items())),
            "conflicts": self._conflicts.as_dict(),
        }


def add_example(
    writer: PartWriter,
    example: GroundingExample,
    preview: np.ndarray,
    pool: str,
    held_out: bool,
    dropped: collections.Counter[str],
    clipped: int,
) -> None:
    """Adds an example, of whose image `images.make_preview` is the preview, to a part."""
    digest, look, thumbnail = fingerprint(example.image, preview)
    try:
        record = encode_example(example)
    except ValueError as error:
        raise SourceError(f"image {example.image_id}: {error}") from None
    writer.add(
        record,
        [(region.phrase, region.label, region.granularity, region.iscrowd) for region in example.regions],
        dict(dropped),
        digest=digest,
        look=look,
        annotation=digest_annotations(example),
        thumbnail=thumbnail,
        modality=MODALITIES.index(example.modality),
        held_out=held_out,
        clipped=clipped,
        key=split_key(example, pool),
    )


def map_labels(
    example: GroundingExample, mapping: LabelMapping, unmapped: str
) -> tuple[GroundingExample, collections.Counter[str], collections.Counter[str]]:
    """Takes the regions of an example to the taxonomy.

    Returns:
        (example, labels that map to nothing, regions dropped by reason); with `unmapped` "drop" the former are among
        the latter.
    """
    unknown: collections.Counter[str] = collections.Counter()
    example, dropped = apply_mapping(example, mapping, unknown)
    if unknown and unmapped == "drop":
        regions = enumerate(example.regions)
        known = [i for i, each in regions if mapping.resolve_region(each) or is_placeholder(each.label)]
        dropped["label that maps to nothing"] += len(example.regions) - len(known)
        example, _ = keep_regions(example, known)
    return example, unknown, dropped


def is_held_out(example: GroundingExample, recipe: Recipe) -> bool:
    """Whether an example shows what the recipe holds out: one of the modalities, or of the labels or what they hold."""
    held = recipe.held_out
    if example.modality in held.modalities:
        return True
    taxonomy = load_taxonomy()
    return bool(held.labels) and any(
        {region.label, *taxonomy.ancestors(region.label)} & set(held.labels)
        for region in example.regions
        if region.label in taxonomy.labels
    )


def _hide_held_out(example: GroundingExample, recipe: Recipe) -> GroundingExample:
    """Takes out what would tell training of labels that are held out: their absence, and sentences that name them."""
    labels = recipe.held_out.labels
    if not labels:
        return example
    taxonomy = load_taxonomy()
    hidden = {label for label in taxonomy.labels if {label, *taxonomy.ancestors(label)} & set(labels)}
    names = {normalize_name(name) for label in hidden for name in taxonomy.labels[label].names}
    return dataclasses.replace(
        example,
        absent=tuple(label for label in example.absent if label not in hidden),
        expressions=tuple(e for e in example.expressions if not _names_any(e.text, names)),
    )


def _names_any(text: str, names: Iterable[str]) -> bool:
    words = f" {normalize_name(_PUNCTUATION.sub(' ', text))} "
    return any(f" {name} " in words for name in names)
