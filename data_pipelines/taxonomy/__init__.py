"""Medical labels: their phrases, synonyms, sides and hierarchy, read from labels.yaml."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from data_pipelines.schema import GRANULARITIES, MODALITIES

LABELS_FILE = pathlib.Path(__file__).with_name("labels.yaml")
SIDES = ("left", "right", "none")
_LISTS = ("synonyms", "modalities")  # fields that hold several texts


@dataclasses.dataclass(frozen=True)
class Label:
    """One thing that a phrase can ground.

    Attributes:
        id: stable snake_case identifier, as `Region.label` holds it.
        name: the phrase that prompts use.
        synonyms: other names of the same thing, data sets' class names among them.
        side: the patient's side: left, right or none.
        parent: id of the structure that holds it, "" at the top.
        granularity: one of `data_pipelines.schema.GRANULARITIES`.
        modalities: those of `data_pipelines.schema.MODALITIES` that show it.
        region: part of the body.
    """

    id: str
    name: str
    granularity: str
    synonyms: tuple[str, ...] = ()
    side: str = "none"
    parent: str = ""
    modalities: tuple[str, ...] = ()
    region: str = ""


def normalize_name(name: str) -> str:
    """Folds case, underscores, hyphens and runs of white space, which data sets use at will in their class names."""
    return " ".join(re.sub(r"[_\-]", " ", name).lower().split())


class Taxonomy:
    """The labels by id, with look-up by any of their names.

    Args:
        labels: the labels; their order is the order of `phrases`.

    Raises:
        ValueError: an entry contradicts another or itself; the message names it.
    """

    def __init__(self, labels: Mapping[str, Label]):
        self.labels: dict[str, Label] = dict(labels)
        self._names: dict[str, Label] = {}
        for label in self.labels.values():
            _check(label, self.labels)
            for name in {normalize_name(n) for n in (label.id, label.name, *label.synonyms)}:
                owner = self._names.setdefault(name, label)
                if owner is not label:
                    raise ValueError(f"label {label.id!r}: the name {name!r} already belongs to {owner.id!r}; keep one")
        for label in self.labels.values():
            self.parents(label.id)

    def find(self, name: str) -> Label | None:
        """Returns the label with this id, name or synonym, whatever its case, underscores and hyphens; else None."""
        return self._names.get(normalize_name(name))

    def parents(self, label: str) -> tuple[str, ...]:
        """Returns the ids of the structures that hold `label`, the nearest first.

        Raises:
            KeyError: `label` is no id of this taxonomy.
            ValueError: the label holds itself.
        """
        chain: list[str] = []
        parent = self.labels[label].parent
        while parent:
            if parent == label or parent in chain:
                raise ValueError(f"label {label!r}: its parents form a circle: {' -> '.join([label, *chain, parent])}")
            chain.append(parent)
            parent = self.labels[parent].parent
        return tuple(chain)

    def phrases(self) -> list[str]:
        """Returns every name and synonym once, in the order of the file: the words of prompts and of the tokenizer."""
        names = (name for label in self.labels.values() for name in (label.name, *label.synonyms))
        return list(dict.fromkeys(names))


def _check(label: Label, labels: Mapping[str, Label]) -> None:
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", label.id):
        raise ValueError(f"label {label.id!r}: an id is lower-case words joined by '_'")
    if label.granularity not in GRANULARITIES:
        raise ValueError(f"label {label.id!r}: granularity {label.granularity!r} is none of {', '.join(GRANULARITIES)}")
    if label.side not in SIDES:
        raise ValueError(f"label {label.id!r}: side {label.side!r} is none of {', '.join(SIDES)}")
    if label.parent and label.parent not in labels:
        raise ValueError(f"label {label.id!r}: unknown parent {label.parent!r}")
    if unknown := [m for m in label.modalities if m not in MODALITIES or m == "unknown"]:
        raise ValueError(f"label {label.id!r}: unknown modality {unknown[0]!r}; known: {', '.join(MODALITIES[1:])}")
    if not all(normalize_name(name) for name in (label.name, *label.synonyms)):
        raise ValueError(f"label {label.id!r}: a name or synonym is empty")


def parse_taxonomy(text: str) -> Taxonomy:
    """Reads a taxonomy in the format of labels.yaml.

    Raises:
        ValueError: it is no YAML, no mapping of ids to entries, an id occurs twice, an entry has an unknown or no
            needed field, or contradicts the rest; the message names the entry.
    """
    try:
        entries = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"a taxonomy must be valid YAML: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"a taxonomy is a mapping of label ids to their fields, not {type(entries).__name__}")
    return Taxonomy({str(id_): _parse_label(str(id_), entry) for id_, entry in entries.items()})


@functools.cache
def load_taxonomy() -> Taxonomy:
    """Returns the project's own taxonomy (read and validated once)."""
    return parse_taxonomy(LABELS_FILE.read_text(encoding="utf-8"))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys, which would lose a label silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key, (key_node, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise ValueError(f"{key!r} occurs twice, first in line {key_node.start_mark.line + 1}; keep one")
        return super().construct_mapping(node, deep)


def _parse_label(id_: str, entry: Any) -> Label:
    fields = {field.name for field in dataclasses.fields(Label)} - {"id"}
    if not isinstance(entry, dict):
        raise ValueError(f"label {id_!r}: expected fields ({', '.join(sorted(fields))}), found {entry!r}")
    if unknown := [field for field in entry if field not in fields]:
        raise ValueError(f"label {id_!r}: unknown field {unknown[0]!r}; known: {', '.join(sorted(fields))}")
    if "granularity" not in entry:
        raise ValueError(f"label {id_!r}: has no granularity")
    for field, value in entry.items():
        items = value if field in _LISTS else [value]
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            kind = "a list of texts" if field in _LISTS else "a text"
            raise ValueError(f"label {id_!r}: {field} must be {kind}, found {value!r}; YAML needs 'no' and '5' quoted")
    lists = {field: tuple(entry.get(field, ())) for field in _LISTS}
    return Label(**{"name": id_.replace("_", " "), **entry, **lists, "id": id_})
