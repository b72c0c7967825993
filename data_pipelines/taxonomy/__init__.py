"""Medical labels: their phrases, synonyms, sides, hierarchy and classes, read from the YAML files beside this one."""

import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import yaml

from data_pipelines.schema import GRANULARITIES, MODALITIES
from data_pipelines.taxonomy.variants import generate_variants

FOLDER = pathlib.Path(__file__).parent
SIDES = ("left", "right", "none")
_LISTS = ("synonyms", "class_names", "modalities", "kind_of", "may_be")  # fields that hold several texts
_CLOSE = 0.6  # difflib's ratio from which a name is near another


@dataclasses.dataclass(frozen=True)
class Label:
    """One thing that a phrase can ground.

    Attributes:
        id: stable snake_case identifier, as `Region.label` holds it.
        name: the phrase that prompts use.
        granularity: one of `data_pipelines.schema.GRANULARITIES`.
        synonyms: other phrases for the same thing, true wherever the name is.
        side: the patient's side: left, right or none.
        parent: id of the structure that holds it, "" at the top.
        modalities: those of `data_pipelines.schema.MODALITIES` that show it.
        class_names: data sets' names for it, for look-up only: no phrases, and some say less or more than the name.
        kind_of: ids of more general labels that it is one of (a liver tumor is a tumor): its box is one of theirs.
        may_be: ids of labels that it is in some images (a lung tumor may be a lung nodule).
        label_class: one of `load_classes()`, "" outside the project's own files.
        body_region: the part of the body that the class belongs to.
    """

    id: str
    name: str
    granularity: str
    synonyms: tuple[str, ...] = ()
    side: str = "none"
    parent: str = ""
    modalities: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    kind_of: tuple[str, ...] = ()
    may_be: tuple[str, ...] = ()
    label_class: str = ""
    body_region: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Name, synonyms and class names: all that the label is written as."""
        return (self.name, *self.synonyms, *self.class_names)


@functools.lru_cache(maxsize=65536)
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
            for name in {normalize_name(n) for n in (label.id, *label.names)}:
                owner = self._names.setdefault(name, label)
                if owner is not label:
                    raise ValueError(f"label {label.id!r}: the name {name!r} already belongs to {owner.id!r}; keep one")
        certain = {id_: self._walk_up(id_) for id_ in self.labels}
        self._ancestors = {id_: self._add_possible(id_, certain) for id_ in self.labels}
        self._variants = {}
        for label in self.labels.values():
            made = [v for v in generate_variants(label, self.labels) if self._take(v, label)]
            self._variants[label.id] = tuple(dict.fromkeys((label.name, *label.synonyms, *made)))

    def _take(self, variant: str, label: Label) -> bool:
        """Whether a generated phrase means this label and no other."""
        return self._names.setdefault(normalize_name(variant), label) is label

    def find(self, name: str) -> Label | None:
        """Returns the label with this id or any name or variant, whatever its case, underscores and hyphens."""
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

    def ancestors(self, label: str) -> tuple[str, ...]:
        """Returns the ids of all that is or may be true of an image that shows `label`, itself apart.

        They are the structures that hold it and the more general labels that it is one of, and theirs, the nearest
        first, and after them what it may be: none of them may be a negative of that image.

        Raises:
            KeyError: `label` is no id of this taxonomy.
        """
        return self._ancestors[label]

    def _walk_up(self, label: str) -> tuple[str, ...]:
        self.parents(label)  # its error shows the circle
        found: dict[str, None] = {}
        front = [label]
        while front:
            front = [up for id_ in front for up in (self.labels[id_].parent, *self.labels[id_].kind_of) if up]
            front = [up for up in dict.fromkeys(front) if up not in found]
            found.update(dict.fromkeys(front))
        if label in found:
            raise ValueError(f"label {label!r}: its parents and kinds form a circle")
        return tuple(found)

    def _add_possible(self, label: str, certain: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
        possible = (up for id_ in self.labels[label].may_be for up in (id_, *certain[id_]))
        return tuple(up for up in dict.fromkeys([*certain[label], *possible]) if up != label)

    def nearest(self, name: str, n: int = 3) -> list[str]:
        """Returns the ids of up to `n` labels whose names are nearest to a name, the nearest first."""
        # A label has several names that may be near: ask for more of them than labels.
        near = difflib.get_close_matches(normalize_name(name), self._names, n=4 * n, cutoff=_CLOSE)
        return list(dict.fromkeys(self._names[each].id for each in near))[:n]

    def variants(self, label: str) -> tuple[str, ...]:
        """Returns the phrases that say the same as the label's name: it, its synonyms, and made ones.

        Raises:
            KeyError: `label` is no id of this taxonomy.
        """
        return self._variants[label]

    def sample_variant(self, label: str, rng: np.random.Generator) -> str:
        """Draws one of the label's variants, each as likely as the others."""
        variants = self._variants[label]
        return variants[int(rng.integers(len(variants)))]

    def phrases(self) -> list[str]:
        """Returns every variant once, in the order of the labels: the words of prompts and of the tokenizer."""
        return list(dict.fromkeys(phrase for variants in self._variants.values() for phrase in variants))


def _check(label: Label, labels: Mapping[str, Label]) -> None:
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", label.id):
        raise ValueError(f"label {label.id!r}: an id is lower-case words joined by '_'")
    if label.granularity not in GRANULARITIES:
        raise ValueError(f"label {label.id!r}: granularity {label.granularity!r} is none of {', '.join(GRANULARITIES)}")
    if label.side not in SIDES:
        raise ValueError(f"label {label.id!r}: side {label.side!r} is none of {', '.join(SIDES)}")
    if label.parent and label.parent not in labels:
        raise ValueError(f"label {label.id!r}: unknown parent {label.parent!r}")
    for field in ("kind_of", "may_be"):
        if unknown := [other for other in getattr(label, field) if other not in labels]:
            raise ValueError(f"label {label.id!r}: {field} names the unknown label {unknown[0]!r}")
    if unknown := [m for m in label.modalities if m not in MODALITIES or m == "unknown"]:
        raise ValueError(f"label {label.id!r}: unknown modality {unknown[0]!r}; known: {', '.join(MODALITIES[1:])}")
    if not all(normalize_name(name) for name in label.names):
        raise ValueError(f"label {label.id!r}: a name or synonym is empty")


def parse_taxonomy(text: str) -> Taxonomy:
    """Reads a taxonomy of one text, a mapping of label ids to their fields.

    An id with SIDE as a word stands for two labels: SIDE becomes left and right in all its fields.

    Raises:
        ValueError: it is no YAML, no mapping of ids to entries, an id occurs twice, an entry has an unknown or no
            needed field, or contradicts the rest; the message names the entry.
    """
    return Taxonomy(_collect(_parse_entries(load_yaml(text, "a taxonomy"))))


@functools.cache
def load_classes() -> dict[str, str]:
    """Returns the body region of each class of labels, in the order of classes.yaml (read once)."""
    regions = load_yaml((FOLDER / "classes.yaml").read_text(encoding="utf-8"), "classes.yaml")
    return {class_: region for region, classes in regions.items() for class_ in classes}


@functools.cache
def load_taxonomy() -> Taxonomy:
    """Returns the project's own taxonomy (read and validated once)."""
    classes, labels = load_classes(), []
    for region in dict.fromkeys(classes.values()):
        name = f"labels/{region}.yaml"
        for class_, entries in load_yaml((FOLDER / name).read_text(encoding="utf-8"), name).items():
            if classes.get(class_) != region:
                raise ValueError(f"{name}: {class_!r} is no class of {region!r} in classes.yaml")
            labels.extend(_parse_entries(entries, label_class=class_, body_region=region))
    return Taxonomy(_collect(labels))


def load_yaml(text: str, what: str) -> dict[str, Any]:
    """Reads a YAML mapping without repeated keys; `what` names it in errors.

    Raises:
        ValueError: it is no YAML or no mapping, or a key occurs twice.
    """
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} must be valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{what} is a mapping of names to their entries, not {type(content).__name__}")
    return content


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML keeps the last of two equal keys, which would lose a label silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node)
            if key in lines:
                raise ValueError(f"{key!r} occurs twice, first in line {lines[key]}; keep one")
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _collect(labels: Iterable[Label]) -> dict[str, Label]:
    found: dict[str, Label] = {}
    for label in labels:
        if found.setdefault(label.id, label) is not label:
            raise ValueError(f"label {label.id!r} occurs twice; keep one")
    return found


def _parse_entries(entries: Any, **defaults: str) -> list[Label]:
    if not isinstance(entries, dict):
        raise ValueError(f"labels are a mapping of label ids to their fields, not {type(entries).__name__}")
    labels = []
    for id_, entry in entries.items():
        if "SIDE" not in str(id_).split("_"):
            labels.append(_parse_label(str(id_), entry, defaults))
            continue
        for side in ("left", "right"):
            sided = _replace_side(entry, side)
            labels.append(_parse_label(str(id_).replace("SIDE", side), sided, {"side": side, **defaults}))
    return labels


def _replace_side(value: Any, side: str) -> Any:
    if isinstance(value, dict):
        return {key: _replace_side(each, side) for key, each in value.items()}
    if isinstance(value, list):
        return [_replace_side(each, side) for each in value]
    return value.replace("SIDE", side) if isinstance(value, str) else value


def _parse_label(id_: str, entry: Any, defaults: Mapping[str, str]) -> Label:
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
    return Label(**{"name": id_.replace("_", " "), **defaults, **entry, **lists, "id": id_})
