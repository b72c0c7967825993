"""How the labels of a prompt stand to each other, and what of that a training example carries beside its boxes.

Two relations must not be mixed up. A melanoma is a skin lesion: a box of the one is a box of the other. A nodule lies
in the left upper lobe: its box is no box of the lobe, but it lies in one.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.prompts import Prompt
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.vocabulary import find_broader

IS_A, MAY_BE, PART_OF = "is_a", "may_be", "part_of"
RELATIONS = (IS_A, MAY_BE, PART_OF)
_OUTSIDE = 1e-3  # pixels by which rounding may move a side


def known_label(*names: str) -> str:
    """Returns the id of the first of the names that the taxonomy knows, or ""."""
    return next((known.id for name in names if name and (known := load_taxonomy().find(name))), "")


@functools.lru_cache(maxsize=65536)
def relate(label: str, other: str) -> str:
    """Returns what a box of a label is to another label, both ids of the taxonomy.

    Returns:
        "is_a": what shows the one shows the other, as it is the same label, one of its kinds, or the same structure of
        one side. "may_be": it shows the other in some images: the other is a kind of it, or the taxonomy says so of one
        of the two. "part_of": it lies in the other. "": nothing is known of the two.
    """
    taxonomy = load_taxonomy()
    if label not in taxonomy.labels or other not in taxonomy.labels:
        return ""
    if other == label or other in find_broader(label):
        return IS_A
    if label in find_broader(other):
        return MAY_BE
    for one, two in ((label, other), (other, label)):
        if any(two == possible or two in find_broader(possible) for possible in taxonomy.labels[one].may_be):
            return MAY_BE
    return PART_OF if other in taxonomy.ancestors(label) else ""


def relate_in(label: str, other: str, boxed: frozenset[str]) -> str:
    """Returns `relate` in an image with boxes of the labels `boxed`.

    A box of "lung" beside one of "left lung" holds both lungs, so that there the left lung is a part of it.
    """
    relation = relate(label, other)
    if relation == IS_A and other != label and other in boxed:
        entry = load_taxonomy().labels[label]
        if entry.side != "none" and other == entry.parent:
            return PART_OF
    return relation


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


@dataclasses.dataclass(frozen=True)
class _Phrase:
    """A phrase of a prompt: its label ("" if the taxonomy has none) and its tokens, bool[L]."""

    label: str
    tokens: np.ndarray


def _find_phrases(prompt: Prompt, regions: Sequence[Region]) -> list[_Phrase]:
    """Returns the phrases of a prompt, boxed or not; of a sentence, the words of each region."""
    labels = {phrase: known_label(region.label, phrase) for phrase, region in zip(prompt.phrases, regions, strict=True)}
    if not prompt.named:
        rows = {row.tobytes(): k for k, row in enumerate(prompt.positive_map)}
        return [_Phrase(labels[prompt.phrases[k]], prompt.positive_map[k] > 0) for k in rows.values()]
    places = np.arange(len(prompt.input_ids))
    return [
        _Phrase(labels[name] if name in labels else known_label(name), (first <= places) & (places < last))
        for name, (first, last) in prompt.named
    ]


def _boxed_labels(regions: Sequence[Region]) -> frozenset[str]:
    return frozenset(known_label(region.label, region.phrase) for region in regions) - {""}


def _relate_region(region: Region, other: str, boxed: frozenset[str]) -> str:
    """Returns what a region is to a label: the taxonomy's word, or else that of what the record says holds it."""
    relation = relate_in(known_label(region.label, region.phrase), other, boxed)
    if not relation and (holder := known_label(region.parent)) and relate(holder, other) in (IS_A, PART_OF):
        return PART_OF
    return relation


def find_ignored(prompt: Prompt, regions: Sequence[Region], relations: Sequence[str]) -> np.ndarray:
    """Returns bool[K, L]: the tokens of a prompt that carry no loss for the anchors of each of its K regions.

    They are those of phrases to which the region stands in one of the relations, without those that mean it.
    """
    phrases, boxed = _find_phrases(prompt, regions), _boxed_labels(regions)
    ignored = np.zeros(prompt.positive_map.shape, bool)
    for row, region in zip(ignored, regions, strict=True):
        for phrase in phrases:
            if phrase.label and _relate_region(region, phrase.label, boxed) in relations:
                row |= phrase.tokens
    return ignored & (prompt.positive_map == 0)


def find_pairs(prompt: Prompt, regions: Sequence[Region], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs of a phrase of the prompt and one that is true wherever it is: bool[n, L] twice, n <= limit.

    Those whose first phrase the image shows come first, then as in the prompt.
    """
    phrases, boxed = _find_phrases(prompt, regions), _boxed_labels(regions)
    shown = (prompt.positive_map > 0).any(axis=0)
    pairs = [
        (child.tokens, parent.tokens)
        for child in sorted((p for p in phrases if p.label), key=lambda p: not (p.tokens & shown).any())
        for parent in phrases
        if parent.label not in ("", child.label) and relate_in(child.label, parent.label, boxed) == IS_A
    ][:limit]
    shape = (len(pairs), len(prompt.input_ids))
    children, parents = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(children, bool).reshape(shape), np.asarray(parents, bool).reshape(shape)


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
    labels = [known_label(region.label, region.phrase) for region in holders]
    boxed = _boxed_labels(example.regions)
    found = np.zeros((len(regions), 4), np.float32)
    if not holders:
        return found
    boxes = np.stack([region.box for region in holders]).astype(np.float64)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for row, region in zip(found, regions, strict=True):
        outside = np.concatenate([boxes[:, :2] - region.box[:2], region.box[2:] - boxes[:, 2:]], axis=1)
        inside = np.flatnonzero((outside <= _OUTSIDE).all(axis=1))
        inside = [i for i in inside.tolist() if labels[i] and _relate_region(region, labels[i], boxed) == PART_OF]
        if inside:
            row[:] = boxes[min(inside, key=lambda i: areas[i])]
    return found
