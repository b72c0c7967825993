"""Queries in words, each with the claim that it makes; whether the claim holds is for the verifier to say.

Directions are the image's and say so: "left" alone could be the patient's. Mirroring an image swaps left and right in
these words and in its labels alike, so that a query stays true.
"""

import dataclasses

import numpy as np

from data_pipelines.positions import part_words
from data_pipelines.referring.scene import COMPARING, Predicate, Scene
from data_pipelines.sentences import Noun
from data_pipelines.sides import Span
from data_pipelines.wording import with_article

_BEFORE = ("size", "shape")  # kinds whose word stands before the noun
_FEW = 3  # regions of one noun, above which one claim hardly tells one from the others
_OPENINGS = ("", "", "find ", "locate ")
_LUNGS = frozenset({"lung", "left_lung", "right_lung"})
_RELATIONS = {
    "inside": "inside the {}",
    "touching": "touching the {}",
    "left of": "to the left of the {} on the image",
    "right of": "to the right of the {} on the image",
    "above": "above the {} on the image",
    "below": "below the {} on the image",
}


@dataclasses.dataclass(frozen=True)
class Query:
    """A sentence and what it claims.

    Attributes:
        text: the sentence.
        noun: what it speaks of.
        predicates: what it says of it.
        target: position of the region that it refers to, -1 if it is to refer to none.
        spans: the characters of the words that stand for the region, those of other structures left out.
    """

    text: str
    noun: Noun
    predicates: tuple[Predicate, ...]
    target: int
    spans: tuple[Span, ...] = ()

    @property
    def claim(self) -> tuple[int, str, frozenset[Predicate]]:
        """What is claimed of whom, whatever the words."""
        return self.target, self.noun.phrase, frozenset(self.predicates)


def compose(scene: Scene, target: int, rng: np.random.Generator) -> Query | None:
    """Draws one or two claims about a region and puts them into words; None if there is nothing to claim."""
    noun = scene.noun_of(target)
    if noun is None:
        return None
    kinds: dict[str, list[Predicate]] = {}
    for predicate in scene.candidates(target, noun):
        kinds.setdefault(predicate.kind, []).append(predicate)
    if not kinds:
        return None
    names = sorted(kinds)
    first = names[int(rng.integers(len(names)))]
    chosen = [_draw(kinds[first], rng)]
    # A word before the noun goes with a place after it; beside another claim it is unclear what a rank is among.
    rest = [name for name in names if name not in COMPARING and (name in _BEFORE) != (first in _BEFORE)]
    if first not in COMPARING and rest and (len(noun.regions) > _FEW or rng.random() < 0.5):
        chosen.append(_draw(kinds[rest[int(rng.integers(len(rest)))]], rng))
    opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
    return _word(scene, noun, tuple(chosen), target, opening, definite=True)


def compose_negation(scene: Scene, rng: np.random.Generator) -> Query | None:
    """Draws a claim about a noun of the image that may be true of none of its regions; None if there is no noun."""
    nouns = [noun for noun in scene.nouns if noun.sure and all(index in scene.shapes for index in noun.regions)]
    if not nouns:
        return None
    noun = nouns[int(rng.integers(len(nouns)))]
    claims = [Predicate("part", part) for part in ("upper left", "upper right", "lower left", "lower right")]
    for other in scene.landmarks:
        if other not in noun.regions and not any(scene.are_kin(index, other) for index in noun.regions):
            claims += [Predicate("relation", "inside", other)] * (not noun.definite)
            claims += [Predicate("relation", word, other) for word in ("left of", "right of", "above", "below")]
    claim = (_draw(claims, rng),)
    if noun.definite or rng.random() < 0.5:
        return _word(scene, noun, claim, -1, "", definite=noun.definite)
    return _word(scene, noun, claim, -1, "no ", definite=None)


def _draw(predicates: list[Predicate], rng: np.random.Generator) -> Predicate:
    return predicates[int(rng.integers(len(predicates)))]


def _word(
    scene: Scene, noun: Noun, predicates: tuple[Predicate, ...], target: int, opening: str, definite: bool | None
) -> Query:
    """Puts claims into words: with "the", with "a" or, if `definite` is None, with no article."""
    before = [predicate.value for predicate in predicates if predicate.kind in (*_BEFORE, "rank")]
    named = " ".join((*before, noun.phrase))
    named = named if definite is None else f"the {named}" if definite else with_article(named)
    spans = [(len(opening), len(opening) + len(named))]
    text = opening + named
    for predicate in predicates:
        if after := _place(scene, predicate):
            text += f" {after}"
            if predicate.other < 0:
                spans = [(spans[0][0], len(text))]
    return Query(text, noun, predicates, target, tuple(spans))


def _place(scene: Scene, predicate: Predicate) -> str:
    """Returns the words of a predicate that follow the noun, "" if they precede it."""
    match predicate.kind:
        case "part":
            return part_words(predicate.value)
        case "length":
            return f"about {predicate.value} mm long"
        case "relation":
            return _RELATIONS[predicate.value].format(_name(scene, predicate.other))
        case "nearest":
            return f"nearest the {_name(scene, predicate.other)}"
        case "third":
            name = _name(scene, predicate.other)
            # Zones are a frontal radiograph's words; in a slice, up is not toward the head.
            if scene.example.modality == "xray" and scene.labels[predicate.other] in _LUNGS:
                return f"in the {predicate.value} zone of the {name}"
            return f"in the {predicate.value} third of the {name} on the image"
    return ""


def _name(scene: Scene, index: int) -> str:
    return scene.example.regions[index].phrase.strip()
