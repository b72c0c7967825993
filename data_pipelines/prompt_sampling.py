"""The prompt of a training example: which phrases or which sentence, and which boxes it is about."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.prompts import (
    Prompt,
    PromptTooLong,
    build_caption_prompt,
    join_phrases,
    make_prefix,
    strip_phrase,
    token_budget,
    token_costs,
)
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sentences import describe_regions, sample_sentence
from data_pipelines.sides import Span
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.tokenization import TextTokenizer
from data_pipelines.vocabulary import Vocabulary, body_regions, find_broader


@dataclasses.dataclass(frozen=True)
class PromptRule:
    """How prompts of training examples are drawn; the fields of `config.data` with these names.

    Attributes:
        max_tokens: length L of a prompt, special tokens included.
        max_negatives: most phrases in it that the image does not show.
        full_negatives_probability: how often all of them are taken; otherwise a random number from 1.
        caption_probability: how often the example's own sentence is the prompt, where it has one.
        expression_probability: how often a sentence that grounds to some of the regions, or to none, is the prompt: one
            of the example's expressions, or one made of its boxes.
        prefix_probability: how often a prompt begins with modality and body region ("chest x-ray: ").
        parents_positive_probability: how often broader names of what is shown are in the prompt and mean its boxes too
            ("lung" for the left lung, "skin lesion" for a melanoma).
        hard_negative_share: least share of the sampled negatives from the image's own body regions.
        sibling_negative_share: least share of them that are siblings of what is shown, see `Vocabulary`.
        level_negative_share: least share of them of the granularities of what is shown.
        variant_probability: how often a phrase is replaced by another name of its label.
    """

    max_tokens: int
    max_negatives: int
    full_negatives_probability: float
    caption_probability: float
    expression_probability: float
    prefix_probability: float
    parents_positive_probability: float
    hard_negative_share: float
    sibling_negative_share: float
    level_negative_share: float
    variant_probability: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_"):
                if value < 0:
                    raise ValueError(f"config.data.{field.name} is {value}: it must be 0 or more")
            elif not 0 <= value <= 1:
                raise ValueError(f"config.data.{field.name} is {value}: it must be from 0 to 1")

    @classmethod
    def from_config(cls, data: ConfigDict) -> "PromptRule":
        """Reads the fields of `config.data`.

        Raises:
            ValueError: one is out of its range; the message names it.
        """
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})


def sample_prompt(
    example: GroundingExample,
    rng: np.random.Generator,
    *,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    rule: PromptRule,
) -> tuple[Prompt, tuple[Region, ...]]:
    """Makes the prompt of a training step.

    With `rule.caption_probability` it is the example's own sentence, if every region has spans in it that fit. Else,
    with `rule.expression_probability`, it is a sentence about some regions, which are then the only targets; one about
    nothing in the image has none. Else it is the phrases of the regions, with their broader names if the rule says so,
    and sampled negatives, shuffled. Negatives that do not fit are left out, then broader names and the prefix; phrases
    of the image never are.

    Crowd regions are no targets, as in GLIP, and their phrases are no negatives.

    Returns:
        (prompt, regions): the prompt has a phrase, and a row of the positive map, for each of the K regions.

    Raises:
        ValueError: a phrase is empty, or a span is not inside its sentence.
        PromptTooLong: the phrases of the image alone do not fit.
    """
    regions = tuple(region for region in example.regions if not region.iscrowd)
    # The coin is tossed for every example, so that captions do not shift the other draws.
    own_sentence = rng.random() < rule.caption_probability and regions and all(region.spans for region in regions)
    # Coins of what a rule leaves out are not tossed: it draws what it drew before there was a choice.
    prefix = make_prefix(example.modality, body_regions(example)) if _toss(rng, rule.prefix_probability) else ""
    sentences: list[tuple[str, tuple[Region, ...], Sequence[Sequence[Span]]]] = []
    if own_sentence:
        sentences.append((example.caption, regions, [region.spans for region in regions]))
    if _toss(rng, rule.expression_probability):
        sentences.extend(_sample_expression(example, rng))
    for text, targets, spans in sentences:
        for words in dict.fromkeys((prefix, "")):
            try:
                return build_caption_prompt(text, spans, tokenizer, rule.max_tokens, words), targets
            except PromptTooLong:
                continue
    return _sample_phrases(example, regions, prefix, rng, tokenizer, vocabulary, rule), regions


def _toss(rng: np.random.Generator, probability: float) -> bool:
    return probability > 0 and bool(rng.random() < probability)


def _sample_expression(
    example: GroundingExample, rng: np.random.Generator
) -> list[tuple[str, tuple[Region, ...], list[Sequence[Span]]]]:
    """Draws a sentence, the regions it is about and the spans of each: one, or none where nothing can be said."""
    stored = [
        expression
        for expression in example.expressions
        if not any(example.regions[index].iscrowd for index in expression.regions)
    ]
    texts = list(dict.fromkeys(expression.text for expression in stored))
    ways = ["stored"] * bool(stored) + ["position", "description"] * bool(example.regions)
    for way in (ways[i] for i in rng.permutation(len(ways))):
        if way == "description":
            text, described, spans = describe_regions(example, rng)
            if described:
                return [(text, tuple(example.regions[index] for index in described), spans)]
            continue
        if way == "stored":
            text = texts[int(rng.integers(len(texts)))]
            said = [expression for expression in stored if expression.text == text]
        else:
            said = [expression for expression in (sample_sentence(example, rng),) if expression is not None]
            text = said[0].text if said else ""
        if said:
            # What one sentence says of several regions, of each by its own words, is one prompt.
            words: dict[int, list[Span]] = {}
            for expression in said:
                for index in expression.regions:
                    words.setdefault(index, []).extend(_words_of(expression))
            return [(text, tuple(example.regions[index] for index in words), list(words.values()))]
    return []


def _words_of(expression: Expression) -> Sequence[Span]:
    """Returns the spans of an expression's regions: all of it but the full stop where it names none."""
    return expression.spans or ((0, len(expression.text.rstrip(" ."))),)


def _sample_phrases(
    example: GroundingExample,
    regions: tuple[Region, ...],
    prefix: str,
    rng: np.random.Generator,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    rule: PromptRule,
) -> Prompt:
    # By name: of "Nodule" and "nodule" each would be a negative for the boxes of the other.
    positives: dict[str, str] = {}
    for region in regions:
        positives.setdefault(normalize_name(region.phrase), strip_phrase(region.phrase))
    broader, added = _find_parents(regions, positives, vocabulary, rng, rule)
    count = rule.max_negatives
    if rule.max_negatives and rng.random() >= rule.full_negatives_probability:
        count = int(rng.integers(1, rule.max_negatives, endpoint=True))
    drawn = vocabulary.sample_negatives(
        example,
        rng,
        count,
        rule.hard_negative_share,
        sibling_share=rule.sibling_negative_share,
        level_share=rule.level_negative_share,
    )
    # What each name is written as.
    written = {**positives, **added, **drawn}
    if rule.variant_probability:
        written = _vary(written, rng, rule.variant_probability)
        if sum(token_costs((written[name] for name in positives), tokenizer)) > token_budget(
            tokenizer, rule.max_tokens
        ):
            written.update(positives)
    costs = dict(zip(written, token_costs(written.values(), tokenizer), strict=True))
    free = token_budget(tokenizer, rule.max_tokens, prefix) - sum(costs[name] for name in positives)
    if free < 0 and prefix:
        free, prefix = free + tokenizer.count(prefix), ""
    extras: list[str] = []  # by name, the dearest first: they go from the end
    for name, cost in costs.items():
        if cost <= free and name not in positives:
            free -= cost
            extras.append(name)
    while True:
        names = [*positives, *extras]
        names = [names[i] for i in rng.permutation(len(names)).tolist()]
        row = {name: k for k, name in enumerate(names)}
        groups = [
            [row[normalize_name(region.phrase)], *(row[name] for name in broader.get(region.label, ()) if name in row)]
            for region in regions
        ]
        try:
            return join_phrases([written[name] for name in names], groups, tokenizer, rule.max_tokens, prefix)
        except PromptTooLong:
            if not extras and not prefix:
                raise
            if extras:
                extras.pop()
            else:
                prefix = ""


def _find_parents(
    regions: Sequence[Region],
    positives: dict[str, str],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    rule: PromptRule,
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns for each label the names of broader phrases that mean its boxes too, and those to add, by name.

    A broader phrase with boxes of its own ("polyp" beside "neoplastic polyp") means the narrower ones' too, unless it
    is the same structure of both sides: a box of "lung" holds both lungs, and none of the others is another lung.
    """
    if not rule.parents_positive_probability:
        return {}, {}
    add = _toss(rng, rule.parents_positive_probability)
    taxonomy = load_taxonomy()
    boxed = {known.id for region in regions if (known := taxonomy.find(region.label))}
    phrases = {known.id: name for name, phrase in positives.items() if (known := taxonomy.find(phrase))}
    broader: dict[str, list[str]] = {}
    added: dict[str, str] = {}
    for region in regions:
        known = taxonomy.find(region.label)
        if known is None or region.label in broader:
            continue
        names = broader.setdefault(region.label, [])
        for id_ in find_broader(known.id):
            if id_ in boxed or id_ in phrases:
                if id_ in phrases and known.side == "none":
                    names.append(phrases[id_])
            elif add and (name := normalize_name(phrase := vocabulary.phrase_of(id_))) not in positives:
                added[name] = phrase
                names.append(name)
    return broader, added


def _vary(written: dict[str, str], rng: np.random.Generator, probability: float) -> dict[str, str]:
    """Replaces some phrases by another name of their label, never so that two names read the same."""
    taxonomy = load_taxonomy()
    varied, taken = dict(written), set(written)
    coins, draws = rng.random((2, len(written)))
    names = list(written)
    for place in np.flatnonzero(coins < probability).tolist():
        name = names[place]
        known = taxonomy.find(written[name])
        if known is None:
            continue
        variants = taxonomy.variants(known.id)
        variant = variants[int(draws[place] * len(variants))]
        if (other := normalize_name(variant)) not in taken:
            taken.add(other)
            varied[name] = variant
    return varied
