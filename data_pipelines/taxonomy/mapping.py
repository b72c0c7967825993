"""What the class names of a data set mean: one YAML file a set, in mappings/, or a user's own.

source: URL or paper of the list of classes
classes: [every class of the set]
labels: {class: id of its label}, for those whose name the taxonomy does not know or would take for another
drop: {class: why its regions are left out}
not_annotated: [classes of places that nobody annotated]
normal: [classes of images without any of the set's findings]
exhaustive: whether an image without a region of a class does not show it: true, false (the default), or a list of
    the classes of which that is so
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines.curate import SourceError, clean_name, keep_regions
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import FOLDER, Label, Taxonomy, load_taxonomy, load_yaml, normalize_name
from data_pipelines.taxonomy.placeholders import is_placeholder

MAPPINGS = FOLDER / "mappings"
_FIELDS = {
    "source": str,
    "classes": list,
    "labels": dict,
    "drop": dict,
    "not_annotated": list,
    "normal": list,
    "exhaustive": bool | list,
}
_REMEMBERED = 65536  # class names, of which free text may have millions


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A class whose regions are left out.

    Attributes:
        reason: why, as counts of what was left out name it.
    """

    reason: str


NOT_ANNOTATED = Dropped("not annotated")
NORMAL = Dropped("no finding")


class LabelMapping:
    """The labels of a data set's classes.

    Args:
        name: of the data set, "" for the plain mapping, which knows what the taxonomy knows.
        table: label or reason to drop of the classes, by their normalised names; one that ends in "*" is of all
            names that begin so and are not listed themselves, the longest beginning first.
        classes: names of all classes of the set, () if they are not known.
        exhaustive: those of the classes that an image does not show if it has no region of them.
        source: where the classes are listed.
    """

    def __init__(
        self,
        name: str = "",
        table: Mapping[str, Label | Dropped] | None = None,
        *,
        classes: Sequence[str] = (),
        exhaustive: Sequence[str] = (),
        source: str = "",
    ):
        self.name, self.classes, self.exhaustive, self.source = name, tuple(classes), tuple(exhaustive), source
        self._table = dict(table or {})
        self._starts = sorted((name[:-1] for name in self._table if name.endswith("*")), key=len, reverse=True)
        self._resolved: dict[str, Label | Dropped | None] = {}

    def resolve(self, source_label: str) -> Label | Dropped | None:
        """Returns the label of a class, or why its regions are left out, or None if nothing is known of it.

        The mapping's own table comes first, whole names before beginnings, then the taxonomy, each with the name as it
        is and without "(...)".
        """
        if source_label not in self._resolved:
            if len(self._resolved) >= _REMEMBERED:
                self._resolved.clear()
            names = [normalize_name(name) for name in (source_label, clean_name(source_label))]
            tabled = [self._table[name] for name in names if name in self._table]
            tabled += [self._table[f"{start}*"] for name in names for start in self._starts if name.startswith(start)]
            known = [label for name in names if (label := load_taxonomy().find(name))]
            self._resolved[source_label] = next(iter([*tabled, *known]), None)
        return self._resolved[source_label]

    def resolve_region(self, region: Region) -> Label | Dropped | None:
        """As `resolve`, of the source's own name of the class, else of the label that the source found for it."""
        found = self.resolve(region.source_label) if region.source_label else None
        return found if found is not None else self.resolve(region.label)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Ids of the labels that the classes of the set mean, each once, in the order of the classes."""
        return self._ids(self.classes)

    @functools.cached_property
    def absent_unless_marked(self) -> tuple[str, ...]:
        """Ids of the labels that an image does not show if it has no region of them."""
        return self._ids(self.exhaustive)

    def _ids(self, classes: Sequence[str]) -> tuple[str, ...]:
        found = (self.resolve(name) for name in classes)
        return tuple(dict.fromkeys(label.id for label in found if isinstance(label, Label)))


def list_mappings() -> list[str]:
    """Returns the names of the bundled mappings."""
    return sorted(path.stem for path in MAPPINGS.glob("*.yaml"))


def load_mapping(name_or_path: str | os.PathLike) -> LabelMapping:
    """Reads the mapping of a data set.

    Args:
        name_or_path: name of a bundled one, a YAML file, or "" for the plain one.

    Raises:
        SourceError: there is none of that name, or its file cannot be used; the message names file, entry and what
            would be right.
    """
    text = os.fspath(name_or_path)
    if not text:
        return LabelMapping()
    path = pathlib.Path(text)
    if path.suffix.lower() not in (".yaml", ".yml"):
        if text not in list_mappings():
            raise SourceError(
                f"no label mapping {text!r}: give the path of a .yaml file, or one of {', '.join(list_mappings())}"
            )
        path = MAPPINGS / f"{text}.yaml"
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), "a label mapping")
        mapping = _parse(path.stem, content, load_taxonomy())
    except OSError as error:
        raise SourceError(f"{path}: the label mapping cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise SourceError(f"{path}: {error}") from None
    unknown = collections.Counter(name for name in mapping.classes if mapping.resolve(name) is None)
    if unknown:
        raise SourceError(f"{path}: {describe_unmapped(unknown, mapping.name, mapping)}")
    return mapping


def _parse(name: str, content: Mapping, taxonomy: Taxonomy) -> LabelMapping:
    if unknown := [field for field in content if field not in _FIELDS]:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    for field, value in content.items():
        if not isinstance(value, _FIELDS[field]):
            kind = getattr(_FIELDS[field], "__name__", "true, false or a list")
            raise ValueError(f"{field}: expected {kind}, found {value!r}")
        items = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
        if bad := [item for item in items if not isinstance(item, str) or not item.strip()]:
            raise ValueError(f"{field} holds {bad[0]!r}, expected texts; YAML needs quotes around 'no' and '5'")
    entries: list[tuple[str, Label | Dropped]] = []
    for class_, id_ in content.get("labels", {}).items():
        if id_ not in taxonomy.labels:
            near = ", ".join(taxonomy.nearest(id_)) or "none"
            raise ValueError(f"labels: {class_!r} has the unknown label {id_!r}; nearest: {near}")
        entries.append((class_, taxonomy.labels[id_]))
    entries += [(class_, Dropped(reason)) for class_, reason in content.get("drop", {}).items()]
    entries += [(class_, NOT_ANNOTATED) for class_ in content.get("not_annotated", [])]
    entries += [(class_, NORMAL) for class_ in content.get("normal", [])]
    table: dict[str, Label | Dropped] = {}
    for class_, meaning in entries:
        if table.setdefault(normalize_name(class_), meaning) != meaning:
            raise ValueError(f"the class {class_!r} has two meanings; keep one")
    classes = [*content.get("classes", []), *(class_ for class_, _ in entries if not class_.endswith("*"))]
    classes = list(dict.fromkeys(classes))
    exhaustive = content.get("exhaustive", False)
    if isinstance(exhaustive, bool):
        exhaustive = classes if exhaustive else []
    if unknown := [class_ for class_ in exhaustive if class_ not in classes]:
        raise ValueError(f"exhaustive names {unknown[0]!r}, which is none of the classes")
    return LabelMapping(name, table, classes=classes, exhaustive=exhaustive, source=content.get("source", ""))


def apply_mapping(
    example: GroundingExample, mapping: LabelMapping, unmapped: collections.Counter[str]
) -> tuple[GroundingExample, collections.Counter[str]]:
    """Gives the regions and the absent labels of an example the labels of a mapping.

    A mapped region gets label, granularity and parent, and the label's name as phrase unless it has spans in the
    caption. A parent that is narrower than the label's own stays. A region of a dropped class goes, and with it the
    expressions that ground to it. A region that nothing is known of stays as it is, and so does one that the mapping
    does not list and whose name stands for no structure (void, normal), for `conflicts.resolve`. An absent label goes
    if its class is dropped, or if the image shows it or something that implies it.

    Args:
        example: as a source made it.
        mapping: the data set's.
        unmapped: counts the classes that nothing is known of, without those that stand for no structure; added to.

    Returns:
        (example, number of regions, absent labels and expressions left out, by reason).
    """
    left_out: collections.Counter[str] = collections.Counter()
    regions, kept = [], []
    for position, region in enumerate(example.regions):
        found = mapping.resolve_region(region)
        if isinstance(found, Dropped):
            left_out[found.reason] += 1
            continue
        kept.append(position)
        if found is None and not is_placeholder(region.label):
            unmapped[region.source_label or region.label] += 1
        regions.append(region if found is None else _relabel(region, found))
    kept_example, lost = keep_regions(example, kept)
    if lost:
        left_out["expression of a region left out"] += lost

    shown = _true_labels(regions)
    absent: dict[str, None] = {}
    for name in example.absent:
        found = mapping.resolve(name)
        if isinstance(found, Dropped):
            left_out[f"absent: {found.reason}"] += 1
            continue
        if found is None and not is_placeholder(name):
            unmapped[name] += 1
        label = name if found is None else found.id
        if label in shown:
            left_out["absent: shown in the image"] += 1
        else:
            absent[label] = None
    return dataclasses.replace(kept_example, regions=tuple(regions), absent=tuple(absent)), left_out


def _relabel(region: Region, label: Label) -> Region:
    taxonomy, parent = load_taxonomy(), region.parent
    narrower = parent in taxonomy.labels and label.parent in taxonomy.ancestors(parent)
    names = {
        "label": label.id,
        "granularity": label.granularity,
        "parent": parent if narrower else label.parent,
        "phrase": region.phrase if region.spans else label.name,
    }
    same = all(getattr(region, field) == name for field, name in names.items())  # most: a copy takes longer
    return region if same else dataclasses.replace(region, **names)


def _true_labels(regions: Sequence[Region]) -> set[str]:
    """Labels of regions, and what is true with them."""
    taxonomy = load_taxonomy()
    labels = {label for region in regions for label in (region.label, region.parent) if label}
    return labels.union(*(taxonomy.ancestors(label) for label in labels & taxonomy.labels.keys()))


def add_absent(example: GroundingExample, mapping: LabelMapping) -> GroundingExample:
    """Adds to an example's absent labels those that its set always marks, and that it does not show.

    Only labels that the taxonomy expects in images of its modality.
    """
    if not mapping.exhaustive:
        return example
    taxonomy, shown = load_taxonomy(), _true_labels(example.regions)
    expected = (
        label
        for label in mapping.absent_unless_marked
        if example.modality == "unknown" or example.modality in taxonomy.labels[label].modalities
    )
    absent = dict.fromkeys([*example.absent, *(label for label in expected if label not in shown)])
    return dataclasses.replace(example, absent=tuple(absent))


def describe_unmapped(unmapped: Mapping[str, int], dataset: str, mapping: LabelMapping) -> str:
    """Returns the error text for classes that nothing is known of, the frequent ones first.

    Args:
        unmapped: count of each class.
        dataset: name of the data set.
        mapping: the one that was used.
    """
    taxonomy = load_taxonomy()
    lines = []
    for name in sorted(unmapped, key=lambda name: (-unmapped[name], name)):
        near = taxonomy.nearest(clean_name(name))
        lines.append(f"  {name!r} ({unmapped[name]}): nearest labels: {', '.join(near) or 'none'}")
    used = f"the mapping {mapping.name!r}" if mapping.name else "the taxonomy (no mapping was given)"
    classes = "class" if len(lines) == 1 else "classes"
    example = min(unmapped, key=lambda name: (-unmapped[name], name), default="")
    return "\n".join(
        [
            f"data set {dataset!r} has {len(lines)} {classes} that {used} does not know:",
            *lines,
            "Write into a mapping file, and give its path as the mapping, for each of them one of",
            f"  labels: {{{example!r}: ID}}     the label that it means",
            f"  drop: {{{example!r}: REASON}}   to leave its regions out",
            f"  not_annotated: [{example!r}]  if it marks what nobody annotated",
        ]
    )
