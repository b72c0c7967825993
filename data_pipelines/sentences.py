"""Sentences made of an image's boxes while it is loaded: what there is, how many, and in which part of the image.

Made after mirroring, of the mirrored boxes, so that their words are true of what the model sees. A sentence that is not
surely true of exactly the boxes that it names, or that might be said of others too, is not made.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.positions import FALSE, PARTS, TRUE, decide_parts, part_words
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sides import Span
from data_pipelines.taxonomy import Label, load_taxonomy, normalize_name
from data_pipelines.vocabulary import find_broader
from data_pipelines.wording import NUMBERS, pluralize, with_article

_OPENINGS = ("", "an image of ", "there is ", "this image shows ")
_SINGLE = ("organ", "region", "substructure")  # granularities of which there is one of a name


@dataclasses.dataclass(frozen=True)
class Noun:
    """A phrase and all regions of an image that it may be said of.

    Attributes:
        phrase: as the first of the regions has it.
        regions: their positions in the example's regions.
        sure: nothing else of the image might be meant, and no crowd.
        definite: there is one of the name ("the liver"), where lesions and cells are counted.
    """

    phrase: str
    regions: tuple[int, ...]
    sure: bool
    definite: bool


def find_nouns(regions: Sequence[Region]) -> list[Noun]:
    """Returns the phrases of an image's regions, each with the regions that it may be said of.

    "Polyp" is said of a "neoplastic polyp" too. The other way round nobody knows, so that beside a box of "polyp" the
    phrase "neoplastic polyp" is not sure; nor is "lung" beside a box of the left lung, which is a part of the other.
    """
    taxonomy = load_taxonomy()
    names = [normalize_name(region.phrase) for region in regions]
    known = [taxonomy.find(region.label) for region in regions]
    labels = [entry.id if entry else region.label for entry, region in zip(known, regions, strict=True)]
    above = {label: set(find_broader(label)) for label in {*labels}}
    nouns = []
    for name, label in dict.fromkeys(zip(names, labels, strict=True)):
        first = names.index(name)
        meant = [i for i in range(len(regions)) if names[i] == name or labels[i] == label or label in above[labels[i]]]
        vague = not _is_sided(known[first]) and any(other in above[label] for other in labels)
        crowd = any(regions[i].iscrowd for i in meant)
        definite = regions[first].granularity in _SINGLE
        # A box of both lungs beside one of the left: neither is a lung among lungs.
        vague |= definite and any(labels[i] != label and _is_sided(known[i]) for i in meant)
        nouns.append(Noun(regions[first].phrase.strip(), tuple(meant), not vague and not crowd, definite))
    return nouns


def _is_sided(entry: Label | None) -> bool:
    return entry is not None and entry.side != "none"


def sample_sentence(example: GroundingExample, rng: np.random.Generator) -> Expression | None:
    """Draws one of `generate_sentences`, the same chance for each noun, without making all of them."""
    nouns = [noun for noun in find_nouns(example.regions) if noun.sure]
    parts = _decide(example) if nouns else {}
    for noun in (nouns[i] for i in rng.permutation(len(nouns))):
        made = list(_say(noun, parts))
        if made:
            expression = made[int(rng.integers(len(made)))]
            opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
            if opening == "there is " and (len(expression.regions) > 1 or noun.definite):
                opening = ""
            shift = len(opening)
            spans = tuple((start + shift, end + shift) for start, end in expression.spans)
            return dataclasses.replace(expression, text=opening + expression.text, spans=spans)
    return None


def generate_sentences(example: GroundingExample) -> list[Expression]:
    """Returns every sentence of kind "position" that is surely true of an image: which part, how many, or both.

    Mirroring the example and swapping the sides in the sentences are the same.
    """
    nouns = [noun for noun in find_nouns(example.regions) if noun.sure]
    parts = _decide(example) if nouns else {}
    return [expression for noun in nouns for expression in _say(noun, parts)]


def _decide(example: GroundingExample) -> dict[str, np.ndarray]:
    return decide_parts(np.stack([region.box for region in example.regions]), example.height, example.width)


def _say(noun: Noun, parts: dict[str, np.ndarray]) -> Iterator[Expression]:
    """Yields the sentences about one noun; their span is the whole of what they name."""
    members = np.asarray(noun.regions)
    if len(members) > 1 and (words := _name(noun, len(members))):
        yield Expression(words, noun.regions, ((0, len(words)),), "position")
    for part in PARTS:
        truth = parts[part][members]
        inside = tuple(members[truth == TRUE].tolist())
        if inside and ((truth == TRUE) | (truth == FALSE)).all() and (words := _name(noun, len(inside))):
            text = f"{words} {part_words(part)}"
            yield Expression(text, inside, ((0, len(text)),), "position")


def _name(noun: Noun, count: int) -> str:
    """Returns the words for `count` regions of a noun, "" where there are no sure ones."""
    if not noun.phrase:
        return ""
    if count == 1:
        return f"the {noun.phrase}" if noun.definite else with_article(noun.phrase)
    plural = pluralize(noun.phrase)
    if not plural or count >= len(NUMBERS) or noun.definite:
        return ""
    return f"{NUMBERS[count]} {plural}"


def describe_regions(
    example: GroundingExample, rng: np.random.Generator
) -> tuple[str, tuple[int, ...], list[Sequence[Span]]]:
    """Writes one sentence that names everything that is boxed, organs and lesions, in random order.

    Returns:
        (text, regions, spans): the sentence, the positions of the regions it names, and for each of them the characters
        of its words. Crowds and phrases without words are left out; ("", (), []) if nothing is left.
    """
    groups: dict[str, list[int]] = {}
    for index, region in enumerate(example.regions):
        if not region.iscrowd and region.phrase.strip():
            groups.setdefault(normalize_name(region.phrase), []).append(index)
    if not groups:
        return "", (), []
    names = list(groups)
    names = [names[i] for i in rng.permutation(len(names))]
    text, regions, spans = "this image shows ", [], []
    for place, name in enumerate(names):
        members = groups[name]
        first = example.regions[members[0]]
        noun = Noun(first.phrase.strip(), tuple(members), True, first.granularity in _SINGLE)
        words = _name(noun, len(members)) or (not noun.definite and pluralize(noun.phrase)) or noun.phrase
        text += "" if place == 0 else " and " if place == len(names) - 1 else ", "
        spans += [((len(text), len(text) + len(words)),)] * len(members)
        regions += members
        text += words
    return text, tuple(regions), spans
