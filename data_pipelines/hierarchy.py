"""How the labels of a prompt stand to each other, and what of that a training example carries beside its boxes.

Two relations must not be mixed up. A melanoma is a skin lesion: a box of the one is a box of the other. A nodule lies
in the left upper lobe: its box is no box of the lobe, but it lies in one.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.prompts import Prompt
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.vocabulary import find_broader

IS_A, MAY_BE, PART_OF = "is_a", "may_be", "part_of"
RELATIONS = (IS_A, MAY_BE, PART_OF)
_OUTSIDE = 1e-3  # pixels by which rounding may move a side
_Places = Sequence[int] | np.ndarray  # of labels in the table of relations


def known_label(*names: str) -> str:
    """Returns the id of the first of the names that the taxonomy knows, or ""."""
    return next((known.id for name in names if name and (known := load_taxonomy().find(name))), "")


def relate(label: str, other: str) -> str:
    """Returns what a box of a label is to another label, both ids of the taxonomy.

    Returns:
        "is_a": what shows the one shows the other, as it is the same label, one of its kinds, or the same structure of
        one side. "may_be": it shows the other in some images: the other is a kind of it, or the taxonomy says so of one
        of the two. "part_of": it lies in the other. "": nothing is known of the two.
    """
    table = _relation_table()
    return _NAMES[table.codes[table.place(label), table.place(other)]]


def relate_in(label: str, other: str, boxed: frozenset[str]) -> str:
    """Returns `relate` in an image with boxes of the labels `boxed`.

    A box of "lung" beside one of "left lung" holds both lungs, so that there the left lung is a part of it.
    """
    table = _relation_table()
    codes = _relate_all([table.place(label)], [table.place(other)], {table.place(name) for name in boxed})
    return _NAMES[codes[0, 0]]


_NAMES = ("", *RELATIONS)
_IS_A, _MAY_BE, _PART_OF = range(1, len(_NAMES))


@dataclasses.dataclass(frozen=True)
class _RelationTable:
    """All relations of the V labels of the taxonomy; the last row and column are of what it does not know.

    Attributes:
        places: row of each label.
        codes: int8[V + 1, V + 1], places in `_NAMES`.
        both_sides: int[V + 1], the place of the parent of a label of one side, -1 for others.
    """

    places: dict[str, int]
    codes: np.ndarray
    both_sides: np.ndarray

    def place(self, label: str) -> int:
        """Returns the row of a label."""
        return self.places.get(label, len(self.places))


@functools.cache
def _relation_table() -> _RelationTable:
    labels = load_taxonomy().labels
    places = {label: k for k, label in enumerate(labels)}
    codes = np.zeros((len(labels) + 1, len(labels) + 1), np.int8)
    both_sides = np.full(len(labels) + 1, -1)
    # The surer relations come later and stay.
    for label, entry in labels.items():
        codes[places[label], [places[up] for up in load_taxonomy().ancestors(label)]] = _PART_OF
        if entry.side != "none" and entry.parent:
            both_sides[places[label]] = places[entry.parent]
    for label, entry in labels.items():
        possible = [places[up] for name in entry.may_be for up in (name, *find_broader(name))]
        possible = [place for place in possible if place != places[label]]
        codes[places[label], possible] = codes[possible, places[label]] = _MAY_BE
    kinds = [(places[label], places[up]) for label in labels for up in find_broader(label)]
    for child, parent in kinds:
        codes[parent, child] = _MAY_BE
    for child, parent in kinds:
        codes[child, parent] = _IS_A
    known = np.arange(len(labels))
    codes[known, known] = _IS_A
    return _RelationTable(places, codes, both_sides)


def _relate_all(labels: _Places, others: _Places, boxed: Iterable[int]) -> np.ndarray:
    """Returns int8[n, m], the codes of `relate_in` of labels and others, by their places in the table."""
    table = _relation_table()
    rows, columns = np.asarray(labels, int), np.asarray(others, int)
    codes = table.codes[rows[:, None], columns]
    is_boxed = np.zeros(len(table.codes), bool)
    is_boxed[list(boxed)] = True
    is_whole = (table.both_sides[rows][:, None] == columns) & is_boxed[columns]
    codes[is_whole & (codes == _IS_A)] = _PART_OF
    return codes


@dataclasses.dataclass(frozen=True)
class HierarchyRule:
    """What a training example carries of the hierarchy; the fields of `config.data.hierarchy`.

    Attributes:
        ignored: relations ("is_a", "may_be", "part_of") of a box to a phrase of the prompt that does not mean it, whose
            tokens then carry no loss where the box is.
        max_pairs: most pairs of a phrase and a broader one in a prompt whose scores are compared; 0 compares none.
        containers: whether boxes name the box that they lie in.
    """

    ignored: tuple[str, ...]
    max_pairs: int
    containers: bool

    def __post_init__(self) -> None:
        if unknown := [name for name in self.ignored if name not in RELATIONS]:
            raise ValueError(
                f"config.data.hierarchy.ignored has {unknown[0]!r}: the relations are {', '.join(RELATIONS)}"
            )
        if self.max_pairs < 0:
            raise ValueError(f"config.data.hierarchy.max_pairs is {self.max_pairs}: it must be 0 or more")
        if self.max_pairs and IS_A not in self.ignored:
            raise ValueError(
                f"config.data.hierarchy.max_pairs is {self.max_pairs}, but {IS_A!r} is not in "
                "config.data.hierarchy.ignored: the token loss would push down the phrases that the pairs pull up"
            )

    @classmethod
    def from_config(cls, hierarchy: ConfigDict) -> "HierarchyRule":
        """Reads the fields of `config.data.hierarchy`.

        Raises:
            ValueError: one cannot be used; the message names it.
        """
        return cls(tuple(hierarchy.ignored), hierarchy.max_pairs, hierarchy.containers)

    def make_arrays(self, max_boxes: int, max_tokens: int) -> dict[str, np.ndarray]:
        """Returns the arrays that an example has for this rule, of M boxes, L tokens and P pairs; none if it is off.

        ignore_map bool[M, L], the tokens that carry no loss for the anchors of a box; child_map and parent_map
        bool[P, L], the tokens of a phrase and of one that is true wherever it is; container float32[M, 4], the box that
        a box lies in. All are zeros.
        """
        arrays: dict[str, np.ndarray] = {}
        if self.ignored:
            arrays["ignore_map"] = np.zeros((max_boxes, max_tokens), bool)
        if self.max_pairs:
            arrays["child_map"] = np.zeros((self.max_pairs, max_tokens), bool)
            arrays["parent_map"] = np.zeros((self.max_pairs, max_tokens), bool)
        if self.containers:
            arrays["container"] = np.zeros((max_boxes, 4), np.float32)
        return arrays


def _find_phrases(prompt: Prompt, regions: Sequence[Region]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the phrases of a prompt, boxed or not; of a sentence, the words of each region.

    Returns:
        int[n], their places in the table, and bool[n, L], their tokens.
    """
    known = dict(zip(prompt.phrases, _places_of(regions), strict=True))
    if not prompt.named:
        rows = {row.tobytes(): k for k, row in enumerate(prompt.positive_map)}.values()
        labels, tokens = [known[prompt.phrases[k]] for k in rows], prompt.positive_map[list(rows)] > 0
    else:
        labels = [known[name] if name in known else _place_of(name) for name, _ in prompt.named]
        ranges, columns = np.asarray([range_ for _, range_ in prompt.named]), np.arange(len(prompt.input_ids))
        tokens = (ranges[:, :1] <= columns) & (columns < ranges[:, 1:])
    return np.asarray(labels, int), tokens


@functools.lru_cache(maxsize=65536)
def _place_of(*names: str) -> int:
    """Returns the place in the table of the first of the names that the taxonomy knows."""
    return _relation_table().place(known_label(*names))


def _places_of(regions: Sequence[Region]) -> list[int]:
    return [_place_of(region.label, region.phrase) for region in regions]


def _relate_regions(regions: Sequence[Region], others: _Places, boxed: Iterable[int]) -> np.ndarray:
    """Returns int8[n, m], what regions are to labels: the taxonomy's code, or that of what holds them in the record."""
    codes = _relate_all(_places_of(regions), others, boxed)
    of_holder = _relate_all([_place_of(region.parent) for region in regions], others, ())
    codes[(codes == 0) & np.isin(of_holder, (_IS_A, _PART_OF))] = _PART_OF
    return codes


def find_ignored(prompt: Prompt, regions: Sequence[Region], relations: Sequence[str]) -> np.ndarray:
    """Returns bool[K, L]: the tokens of a prompt that carry no loss for the anchors of each of its K regions.

    They are those of phrases to which the region stands in one of the relations, without those that mean it.
    """
    labels, tokens = _find_phrases(prompt, regions)
    codes = _relate_regions(regions, labels, _places_of(regions))
    related = np.isin(codes, [_NAMES.index(name) for name in relations])  # [K, n]
    return (related.astype(np.float32) @ tokens.astype(np.float32) > 0) & (prompt.positive_map == 0)


def find_pairs(prompt: Prompt, regions: Sequence[Region], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of a phrase of the prompt and one that is true wherever it is: bool[n, L] twice, n <= limit.

    Those whose first phrase the image shows come first, then as in the prompt.
    """
    labels, tokens = _find_phrases(prompt, regions)
    codes = _relate_all(labels, labels, _places_of(regions))
    children, parents = np.nonzero((codes == _IS_A) & (labels[:, None] != labels))
    shown = np.any(tokens & (prompt.positive_map > 0).any(axis=0), axis=1)
    order = np.argsort(~np.asarray(shown)[children], kind="stable")[:limit]
    return tokens[children[order]], tokens[parents[order]]


def find_kinds(phrases: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the places of each phrase and each other one that is true wherever it is, by the taxonomy."""
    labels = [known_label(phrase) for phrase in phrases]
    return [
        (child, parent)
        for child, label in enumerate(labels)
        for parent, other in enumerate(labels)
        if other != label and relate(label, other) == IS_A
    ]


def find_containers(regions: Sequence[Region], example: GroundingExample) -> np.ndarray:
    """Returns float32[K, 4]: for each region the smallest box of the image that it is a part of and lies wholly in.

    Zeros where there is none: a mass that grows out of its organ lies in no box.
    """
    holders = [region for region in example.regions if not region.iscrowd]
    found = np.zeros((len(regions), 4), np.float32)
    if not holders or not regions:
        return found
    boxes = np.stack([region.box for region in holders]).astype(np.float64)  # [m, 4]
    inner = np.stack([region.box for region in regions]).astype(np.float64)[:, None]  # [K, 1, 4]
    outside = np.maximum(boxes[:, :2] - inner[..., :2], inner[..., 2:] - boxes[:, 2:]).max(axis=-1)
    codes = _relate_regions(regions, _places_of(holders), _places_of(example.regions))
    holds = (codes == _PART_OF) & (outside <= _OUTSIDE)  # [K, m]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    smallest = np.where(holds, areas, np.inf).argmin(axis=1)
    held = holds.any(axis=1)
    found[held] = boxes[smallest[held]]
    return found
