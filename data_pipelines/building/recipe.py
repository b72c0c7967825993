"""Recipes of corpora: which data sets, where they lie, how they are split, and by which rules.

name: mine
eval_fraction: 0.1
held_out: {modalities: [oct], labels: [polyp]}
rules: {duplicates_across: merge}
data_sets:
  bccd: {source: voc, input: bccd, modality: microscopy}
  ct: {source: nifti, input: totalsegmentator/ct, mapping: totalsegmentator_ct, options: {planes: [axial]}}
"""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

import yaml

from data_pipelines.conflicts import ConflictRules
from data_pipelines.curate import find_modality
from data_pipelines.records import FORMATS, SHARD_BYTES, RecordsError
from data_pipelines.schema import MODALITIES
from data_pipelines.sources import SOURCES
from data_pipelines.sources.options import convert
from data_pipelines.taxonomy import load_taxonomy

PHANTOMS = "phantoms"  # the source that is drawn, not read
ON_ERROR = ("stop", "skip")
UNMAPPED = ("stop", "keep", "drop")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the field and what it may hold."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One data set of a corpus.

    Attributes:
        source: name of the layout (`data_pipelines.sources.SOURCES`), "auto", or "phantoms".
        input: its folder, or archive, relative to the root that the build is given.
        modality: of images whose source does not say.
        mapping: name of a bundled mapping of labels, or a YAML file (relative to the recipe); "" looks only in the
            taxonomy.
        unmapped: what a label that maps to nothing does: "stop" the build, "keep" it under its own name, "drop" it.
        patients: name of the pool that patient ids belong to. Ids of one pool are the same patients; data sets without
            a name share one. Several of a named pool need the environment variable MEDGLIP_PATIENT_SALT.
        exhaustive: whether everything that its labels name is marked wherever an image shows it. If not, its phrases
            are no negatives in training unless an expert looked for them. None asks the source.
        private: replace image ids, which are file names, by hashes.
        options: of the source; `SliceRule`'s fields for volumes; count, seed and size for phantoms.
    """

    source: str = "auto"
    input: str = ""
    modality: str = ""
    mapping: str = ""
    unmapped: str = "stop"
    patients: str = ""
    exhaustive: bool | None = None
    private: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What zero-shot evaluation must not have seen in training: images of these go to the split "zero_shot"."""

    modalities: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A corpus.

    Attributes:
        name: letters, digits and underscores, starting with a letter.
        data_sets: by name; an image that several of them hold belongs to the first.
        format: array_record or tfrecord.
        shard_bytes: of a full shard; as many examples as fit.
        num_shards: of each split, instead; 0 for by size.
        split: name of the one split where `eval_fraction` is 0.
        eval_fraction: share of patients, or images, that go to "validation"; the others to "train".
        split_seed: of that choice.
        held_out: see `HeldOut`.
        rules: what is done about conflicts.
        referring: most regions of an image that referring expressions are made for, from masks; 0 for none.
        on_error: "stop" at an image that cannot be used, or "skip" and count it.
    """

    name: str
    data_sets: dict[str, DataSet]
    format: str = "array_record"
    shard_bytes: int = SHARD_BYTES
    num_shards: int = 0
    split: str = "train"
    eval_fraction: float = 0.0
    split_seed: int = 0
    held_out: HeldOut = HeldOut()
    rules: ConflictRules = dataclasses.field(default_factory=ConflictRules)
    referring: int = 0
    on_error: str = "stop"

    def __post_init__(self) -> None:
        for name in (self.name, self.split, *self.data_sets):
            if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
                raise RecordsError(
                    f"the name {name!r}: use letters, digits and underscores, starting with a letter; it becomes a "
                    "part of file names"
                )
        if not self.data_sets:
            raise RecipeError(f"{self.name}: data_sets is empty; name at least one")
        if self.format not in FORMATS:
            raise RecordsError(f"unknown record format {self.format!r}; known: {', '.join(FORMATS)}")
        if not 0 <= self.eval_fraction < 1:
            raise RecordsError(f"the evaluation fraction must be at least 0 and below 1, not {self.eval_fraction}")
        if self.num_shards < 0 or self.shard_bytes <= 0:
            raise RecordsError(f"num_shards={self.num_shards}, shard_bytes={self.shard_bytes}: must be positive")
        if self.referring < 0:
            raise RecipeError(f"referring is {self.referring}: it is a number of sentences, 0 or more")
        _choose("on_error", self.on_error, ON_ERROR)
        for modality in self.held_out.modalities:
            _choose("held_out.modalities", modality, MODALITIES[1:])
        for label in self.held_out.labels:
            _choose("held_out.labels", label, tuple(load_taxonomy().labels))
        for name, data_set in self.data_sets.items():
            place = f"data_sets.{name}"
            if ":" not in data_set.source:  # that names a class of the user's own
                _choose(f"{place}.source", data_set.source, ("auto", PHANTOMS, *SOURCES))
            _choose(f"{place}.unmapped", data_set.unmapped, UNMAPPED)
            if data_set.modality and not find_modality(data_set.modality):
                _choose(f"{place}.modality", data_set.modality, MODALITIES[1:])


def _choose(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        nearest = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        known = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(choices)}"
        raise RecipeError(f"{field} is {value!r}; {known}")


def read_recipe(path: pathlib.Path) -> Recipe:
    """Reads a YAML file with the fields of `Recipe`.

    Raises:
        RecipeError: it is not there, no YAML, or a field is unknown (the nearest one is named), missing or of another
            type than it should be.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: no recipe can be read ({error})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: expected the fields of a recipe, as name and data_sets, found {content!r:.80}")
    try:
        recipe = _make(Recipe, content, "")
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    beside = {
        name: dataclasses.replace(data_set, mapping=str(path.parent / data_set.mapping))
        for name, data_set in recipe.data_sets.items()
        if pathlib.PurePath(data_set.mapping).suffix
    }
    return dataclasses.replace(recipe, data_sets=recipe.data_sets | beside)


def _make(kind: type, content: Any, place: str) -> Any:
    """Makes a dataclass of a mapping, checking the types of its fields."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"{place or 'the recipe'} must be a mapping of fields, found {content!r:.80}")
    types = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in content.items():
        if name not in fields:
            nearest = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.0)[0]
            raise RecipeError(f"there is no field {place}{name}; the nearest is {place}{nearest}")
        values[name] = _convert(types[name], value, f"{place}{name}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise RecipeError(f"the field {place}{name} is missing")
    try:
        return kind(**values)
    except RecordsError:
        raise
    except ValueError as error:
        raise RecipeError(f"{place}{error}") from None


def _convert(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _make(kind, value, f"{place}.")  # type: ignore[arg-type]
    if kind == dict[str, DataSet]:
        if not isinstance(value, dict):
            raise RecipeError(f"{place} must be a mapping of names to data sets, found {value!r:.80}")
        return {str(name): _make(DataSet, fields or {}, f"{place}.{name}.") for name, fields in value.items()}
    try:
        return convert(value, kind)
    except TypeError as error:
        raise RecipeError(f"{place}: {error}") from None
