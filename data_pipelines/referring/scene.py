"""An image's masks as something to make claims about: which predicates are true of which region.

Truth is 1, 0 or 0.5 as in `data_pipelines.positions`: between true and false lies a margin in which nothing is said.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.positions import FALSE, PARTS, TRUE, UNDECIDED, decide_parts
from data_pipelines.referring.attributes import Shape, distance, measure_shape, overlap_share
from data_pipelines.schema import GroundingExample
from data_pipelines.sentences import Noun, find_nouns
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.vocabulary import find_broader

# (true from here, false from there) of a measurement; rising or falling.
_SIZES = {"small": (0.06, 0.08), "large": (0.25, 0.2)}  # root of the mask's area over the image's
_ROUND, _ELONGATED, _IRREGULAR = (1.3, 1.6), (2.2, 1.7), (0.75, 0.88)  # axes' ratio; the same; solidity
_SOLID = (0.92, 0.82)  # solidity of what is called round
_RANK_RATIO = 1.25  # of two areas, or distances, from which the larger is surely larger
_NEAR = 2.0  # pixels that are added to distances before they are compared
_LENGTH = (0.1, 0.3)  # of the length that a query says
_THIRD = 0.05  # of the holder's height, both ways from a border of thirds
_INSIDE = (0.9, 0.1)  # share of a mask in another
_APART = 0.02  # of the image's side, from which masks do not touch; also what may overlap in "left of"
_TOUCH = 2.0  # pixels between the outlines of masks that touch
_BESIDE = 0.3  # share of the smaller extent that "left of" and "above" must have in common
THIRDS = ("upper", "middle", "lower")
DIRECTIONS = ("left of", "right of", "above", "below")
RANKS = ("largest", "smallest")
COMPARING = ("rank", "nearest")  # kinds of predicates that compare regions with each other
_DESCRIBED = ("lesion", "cell", "region")  # granularities whose size and shape are told


@dataclasses.dataclass(frozen=True)
class Predicate:
    """Something that is true of a region or not.

    Attributes:
        kind: part, size, shape, rank, length, third, relation or nearest.
        value: of that kind: "upper left", "small", "round", "largest", "12" (mm), "lower", "inside".
        other: position of the region that a third, relation or nearest is about, -1 for the other kinds.
    """

    kind: str
    value: str
    other: int = -1


class Scene:
    """The measured masks of an image.

    Attributes:
        example: the image.
        shapes: measurements of each region with a mask that is no crowd, by its position in the regions.
        labels: ids of the regions' labels, or the source's names of those that the taxonomy does not know.
        nouns: `sentences.find_nouns` of the regions.
        landmarks: positions of the regions with a mask that alone have their noun, which others can be told from.
    """

    def __init__(self, example: GroundingExample):
        self.example = example
        measured = {
            index: measure_shape(region, example.spacing_mm)
            for index, region in enumerate(example.regions)
            if not region.iscrowd
        }
        self.shapes: dict[int, Shape] = {index: shape for index, shape in measured.items() if shape is not None}
        self.nouns = find_nouns(example.regions)
        self.landmarks = tuple(
            noun.regions[0] for noun in self.nouns if noun.sure and len(noun.regions) == 1 and self._has_mask(noun)
        )
        taxonomy = load_taxonomy()
        labels = [region.label for region in example.regions]
        self.labels = [known.id if (known := taxonomy.find(label)) else label for label in labels]
        indices = list(self.shapes)
        boxes = np.stack([self.shapes[index].box for index in indices]) if indices else np.zeros((0, 4))
        parts = decide_parts(boxes, example.height, example.width)
        self._parts = {part: dict(zip(indices, truth.tolist(), strict=True)) for part, truth in parts.items()}
        self._overlaps: dict[tuple[int, int], float] = {}
        self._distances: dict[tuple[int, int], float] = {}

    def _has_mask(self, noun: Noun) -> bool:
        return all(index in self.shapes for index in noun.regions)

    def noun_of(self, index: int) -> Noun | None:
        """Returns the noun that a region's own phrase is, if it is sure."""
        name = normalize_name(self.example.regions[index].phrase)
        for noun in self.nouns:
            if index in noun.regions and normalize_name(noun.phrase) == name:
                return noun if noun.sure else None
        return None

    def overlap(self, inner: int, outer: int) -> float:
        """Returns the share of a region's mask in another's."""
        key = (inner, outer)
        if key not in self._overlaps:
            self._overlaps[key] = overlap_share(self.shapes[inner], self.shapes[outer])
        return self._overlaps[key]

    def gap(self, one: int, other: int) -> float:
        """Returns the distance of two regions' outlines in pixels."""
        key = (min(one, other), max(one, other))
        if key not in self._distances:
            self._distances[key] = distance(self.shapes[one], self.shapes[other])
        return self._distances[key]

    def are_kin(self, one: int, other: int) -> bool:
        """Says whether one region's label is the other's or a more general one: neither locates the other."""
        first, second = self.labels[one], self.labels[other]
        return first == second or first in find_broader(second) or second in find_broader(first)

    def candidates(self, target: int, noun: Noun) -> list[Predicate]:
        """Returns the predicates that are true of a region: what a query may claim.

        Size, shape and length are a lesion's or a cell's: of an organ in a slice they say how it was cut, and sound
        like a finding.
        """
        shape, example, several = self.shapes[target], self.example, len(noun.regions) > 1
        found = [Predicate("part", part) for part in PARTS]
        if example.regions[target].granularity in _DESCRIBED:
            found += [Predicate("size", word) for word in _SIZES]
            found += [Predicate("shape", word) for word in ("round", "elongated", "irregular")]
            found += [Predicate("length", str(_round_length(shape.length_mm)))] * (shape.length_mm >= 1)
        if several:
            found += [Predicate("rank", word) for word in RANKS]
        for other in self.landmarks:
            if other == target or self.are_kin(target, other):
                continue
            if self.overlap(target, other) > _INSIDE[1]:
                found += [Predicate("third", third, other) for third in THIRDS]
            found += [Predicate("relation", word, other) for word in ("inside", "touching", *DIRECTIONS)]
            if several:
                found.append(Predicate("nearest", "nearest", other))
        return [predicate for predicate in found if self._decide_of(predicate, target, noun) == TRUE]

    def _decide_of(self, predicate: Predicate, target: int, noun: Noun) -> float:
        if predicate.kind not in COMPARING:
            return self._decide_one(predicate, target)
        return float(self.decide(predicate, noun.regions)[noun.regions.index(target)])

    def decide(self, predicate: Predicate, members: Sequence[int]) -> np.ndarray:
        """Returns the truth float64[n] of a predicate for n regions; undecided for those without a mask.

        Ranks and "nearest" compare the members with each other.
        """
        if predicate.kind == "rank":
            return self._rank([self._signed_area(index, predicate.value) for index in members])
        if predicate.kind == "nearest":
            return self._rank(
                [-(self.gap(index, predicate.other) + _NEAR) if index in self.shapes else None for index in members]
            )
        return np.asarray([self._decide_one(predicate, index) for index in members])

    def _signed_area(self, index: int, rank: str) -> float | None:
        if index not in self.shapes:
            return None
        area = self.shapes[index].area
        return area if rank == "largest" else -area

    @staticmethod
    def _rank(values: Sequence[float | None]) -> np.ndarray:
        """Returns the truth of "is the greatest"; values have one sign, and None is one that is not known."""
        known = [value for value in values if value is not None]
        truth = []
        for value in values:
            if value is None or len(known) < len(values) or len(values) < 2:
                truth.append(UNDECIDED)
                continue
            others = list(known)
            others.remove(value)
            best = max(others)
            large, small = (value, best) if value > 0 else (-best, -value)
            truth.append(TRUE if large >= _RANK_RATIO * small else FALSE if small >= _RANK_RATIO * large else UNDECIDED)
        return np.asarray(truth)

    def _decide_one(self, predicate: Predicate, index: int) -> float:
        if index not in self.shapes:
            return UNDECIDED
        shape, value = self.shapes[index], predicate.value
        match predicate.kind:
            case "part":
                return self._parts[value][index]
            case "size":
                return _grade(float(np.sqrt(shape.share)), *_SIZES[value])
            case "shape":
                return _decide_shape(shape, value)
            case "length":
                if not shape.length_mm:
                    return UNDECIDED
                return _grade(abs(shape.length_mm / float(value) - 1), *_LENGTH)
            case "third":
                return self._decide_third(index, value, predicate.other)
            case "relation":
                return self._decide_relation(index, value, predicate.other)
        raise ValueError(f"unknown kind of predicate {predicate.kind!r}: expected one that `Predicate` lists")

    def _decide_third(self, index: int, third: str, holder: int) -> float:
        if index == holder:
            return FALSE
        start, end = self.shapes[holder].box[1], self.shapes[holder].box[3]
        height = end - start
        low = start + height * THIRDS.index(third) / 3
        high = low + height / 3
        margin = _THIRD * height
        top, bottom = self.shapes[index].box[1], self.shapes[index].box[3]
        middle = (top + bottom) / 2
        fits = top >= low - margin and bottom <= high + margin and low <= middle <= high
        place = TRUE if fits else FALSE if middle <= low - margin or middle >= high + margin else UNDECIDED
        return min(place, self._decide_relation(index, "inside", holder))

    def _decide_relation(self, index: int, relation: str, other: int) -> float:
        if index == other:
            return FALSE
        side = max(self.example.height, self.example.width)
        if relation == "inside":
            share = self.overlap(index, other)
            if share >= _INSIDE[0]:  # of two masks that are nearly the same, neither is inside the other
                return TRUE if self.overlap(other, index) < _INSIDE[0] else UNDECIDED
            apart = share <= _INSIDE[1] and self.gap(index, other) > _APART * side
            return FALSE if apart else UNDECIDED
        if relation == "touching":
            overlapping = max(self.overlap(index, other), self.overlap(other, index)) > 0
            gap = self.gap(index, other)
            if gap <= _TOUCH and not overlapping:
                return TRUE
            return FALSE if gap > _APART * side and not overlapping else UNDECIDED
        return self._decide_direction(index, relation, other)

    def _decide_direction(self, index: int, direction: str, other: int) -> float:
        axis = 0 if direction in ("left of", "right of") else 1
        first, second = (index, other) if direction in ("left of", "above") else (other, index)
        one, two = self.shapes[first], self.shapes[second]
        length = (self.example.width, self.example.height)[axis]
        if one.center[axis] >= two.center[axis]:
            return FALSE
        across = 1 - axis
        common = min(one.box[across + 2], two.box[across + 2]) - max(one.box[across], two.box[across])
        smaller = min(shape.box[across + 2] - shape.box[across] for shape in (one, two))
        separate = one.box[axis + 2] <= two.box[axis] + _APART * length
        return TRUE if separate and common >= _BESIDE * smaller else UNDECIDED


def _round_length(millimetres: float) -> int:
    """Returns whole millimetres up to 20, and fives above: what a report says."""
    return round(millimetres) if millimetres < 20 else 5 * round(millimetres / 5)


def _grade(value: float, true: float, false: float) -> float:
    """Returns the truth of a measurement that is true up to one number and false from another, or the other way."""
    if true < false:
        return TRUE if value <= true else FALSE if value >= false else UNDECIDED
    return TRUE if value >= true else FALSE if value <= false else UNDECIDED


def _decide_shape(shape: Shape, word: str) -> float:
    if not shape.elongation:
        return UNDECIDED
    match word:
        case "round":
            return min(_grade(shape.elongation, *_ROUND), _grade(shape.solidity, *_SOLID))
        case "elongated":
            return _grade(shape.elongation, *_ELONGATED)
        case "irregular":
            return _grade(shape.solidity, *_IRREGULAR)
    raise ValueError(f"unknown shape {word!r}: expected round, elongated or irregular")
