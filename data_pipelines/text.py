"""Prompts: phrases or a sentence as tokens, which tokens stand for which phrase, and sampling of both in training.

As GLIP does (maskrcnn_benchmark/data/datasets/od_to_grounding.py): phrases joined by ". " without one at the end, in
random order in training, together with sampled phrases that the image does not show. Inference uses the same code.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.tokenization import Encoding, TextTokenizer, load_tokenizer

__all__ = [
    "Encoding",
    "Prompt",
    "PromptTooLong",
    "TextTokenizer",
    "Vocabulary",
    "build_caption_prompt",
    "build_prompt",
    "build_prompts",
    "load_tokenizer",
    "sample_prompt",
    "swap_sides",
    "swap_sides_with_spans",
]

SEPARATOR = ". "
Span = tuple[int, int]
_NAMED = 5  # phrases that an error message lists


class PromptTooLong(ValueError):
    """A prompt that needs more tokens than there are.

    Attributes:
        phrases: those that fell off.
    """

    def __init__(self, phrases: Sequence[str], num_tokens: int, max_tokens: int):
        self.phrases, self.num_tokens, self.max_tokens = tuple(phrases), num_tokens, max_tokens
        named = ", ".join(repr(phrase) for phrase in phrases[:_NAMED])
        more = f" and {len(phrases) - _NAMED} more" if len(phrases) > _NAMED else ""
        fallen = f": {named}{more} fell off" if phrases else ""
        super().__init__(
            f"the prompt needs {num_tokens} tokens and {max_tokens} are allowed{fallen}; "
            "use fewer or shorter phrases, or raise config.data.max_tokens"
        )

    def __reduce__(self):
        return PromptTooLong, (self.phrases, self.num_tokens, self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A tokenised prompt of L tokens, padding included, for K phrases.

    Attributes:
        text: what was tokenised.
        input_ids: int32[L].
        attention_mask: int32[L], 0 on padding.
        positive_map: float32[K, L]; row k is spread evenly over the tokens of phrase k, without separators, and sums
            to 1.
        phrases: the K phrases.
    """

    text: str
    input_ids: np.ndarray
    attention_mask: np.ndarray
    positive_map: np.ndarray
    phrases: tuple[str, ...]


def _make_prompt(
    text: str,
    phrases: Sequence[str],
    spans: Sequence[Sequence[Span]],
    tokenizer: TextTokenizer,
    max_tokens: int,
) -> Prompt:
    """Tokenises `text`, of which phrase k is the characters `spans[k]`; words of no phrase may fall off its end."""
    encoding = tokenizer.encode(text)
    ids, offsets, tail = encoding.ids, encoding.offsets, tokenizer.num_trailing
    reach = np.asarray(offsets, np.int64).reshape(-1, 2)
    tokens = np.zeros((len(phrases), len(ids)), bool)
    for row, phrase_spans in zip(tokens, spans, strict=True):
        for start, end in phrase_spans:
            row |= (reach[:, 0] < end) & (reach[:, 1] > start)
    found = tokens.any(axis=1)
    if not found.all():
        missing = phrases[int(np.argmin(found))]
        raise ValueError(f"the tokenizer keeps nothing of the phrase {missing!r}: leave it out or rename it")
    if len(ids) > max_tokens:
        kept = max_tokens - tail
        fallen = tokens[:, max(kept, 0) :].any(axis=1)
        if fallen.any() or kept < tokenizer.num_leading:
            raise PromptTooLong([phrases[k] for k in np.flatnonzero(fallen).tolist()], len(ids), max_tokens)
        ids = ids[:kept] + ids[len(ids) - tail :]
        tokens = tokens[:, :max_tokens]
    input_ids = np.full(max_tokens, tokenizer.pad_id, np.int32)
    input_ids[: len(ids)] = ids
    positive_map = np.zeros((len(phrases), max_tokens), np.float32)
    positive_map[:, : len(ids)] = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    attention_mask = (np.arange(max_tokens) < len(ids)).astype(np.int32)
    return Prompt(text, input_ids, attention_mask, positive_map, tuple(phrases))


def build_prompt(phrases: Sequence[str], tokenizer: TextTokenizer, max_tokens: int) -> Prompt:
    """Joins phrases into one prompt, in their order.

    Args:
        phrases: K phrases; white space around them does not count.
        tokenizer: makes the tokens.
        max_tokens: length L of the prompt, special tokens included.

    Raises:
        ValueError: a phrase is empty.
        PromptTooLong: not all of them fit; it names those that do not.
    """
    phrases = [_strip(phrase) for phrase in phrases]
    spans, start = [], 0
    for phrase in phrases:
        spans.append([(start, start + len(phrase))])
        start += len(phrase) + len(SEPARATOR)
    return _make_prompt(SEPARATOR.join(phrases), phrases, spans, tokenizer, max_tokens)


def _strip(phrase: str) -> str:
    stripped = phrase.strip()
    if not stripped:
        raise ValueError(f"a phrase is empty ({phrase!r}): a prompt's phrases must have words, as 'left lung'")
    return stripped


def _budget(tokenizer: TextTokenizer, max_tokens: int) -> int:
    """Returns the tokens of a prompt that phrases may take, each with a separator after it."""
    return max_tokens - tokenizer.num_leading - tokenizer.num_trailing + tokenizer.count(SEPARATOR.strip())


def _cost(phrase: str, tokenizer: TextTokenizer) -> int:
    """Returns the tokens of a phrase with its separator (exact where words are tokenised one by one, as in BERT)."""
    return tokenizer.count(phrase) + tokenizer.count(SEPARATOR.strip())


def build_prompts(phrases: Sequence[str], tokenizer: TextTokenizer, max_tokens: int) -> list[tuple[Prompt, list[int]]]:
    """Spreads phrases over as few prompts as hold them in their order; with each, the indices of its phrases.

    Raises:
        ValueError: there are no phrases, or one is empty.
        PromptTooLong: a phrase alone does not fit into a prompt.
    """
    if not phrases:
        raise ValueError("there are no phrases to look for: give at least one")
    budget = _budget(tokenizer, max_tokens)
    prompts: list[tuple[Prompt, list[int]]] = []
    start = 0
    while start < len(phrases):
        end, used = start, 0
        while end < len(phrases) and (used := used + _cost(_strip(phrases[end]), tokenizer)) <= budget:
            end += 1
        end = max(end, start + 1)
        while True:
            try:
                prompts.append((build_prompt(phrases[start:end], tokenizer, max_tokens), list(range(start, end))))
                break
            except PromptTooLong:
                end -= 1
                if end == start:
                    raise
        start = end
    return prompts


def build_caption_prompt(
    caption: str,
    spans: Sequence[Sequence[Span]],
    tokenizer: TextTokenizer,
    max_tokens: int,
) -> Prompt:
    """Takes a free sentence as the prompt.

    Args:
        caption: the sentence. Words beyond the limit are cut off where no span reaches them.
        spans: for each of the K phrases, the characters (start, end) of its words in the caption, half-open.
        tokenizer: makes the tokens.
        max_tokens: length L of the prompt, special tokens included.

    Returns:
        The prompt; its phrases are the words of each span, joined by spaces.

    Raises:
        ValueError: a phrase has no span, or one that holds no words or is not inside the caption.
        PromptTooLong: words of a span fell off; it names them.
    """
    phrases = []
    for phrase_spans in spans:
        if not phrase_spans or not all(0 <= start < end <= len(caption) for start, end in phrase_spans):
            raise ValueError(
                f"spans {list(phrase_spans)} are not inside the caption {caption!r} of {len(caption)} characters"
            )
        phrases.append(_strip(" ".join(caption[start:end] for start, end in phrase_spans)))
    return _make_prompt(caption, phrases, spans, tokenizer, max_tokens)


class Vocabulary:
    """The phrases of a data set, from which the negatives of training prompts come.

    Args:
        labels: the label of each phrase.
    """

    def __init__(self, labels: Mapping[str, str]):
        labels = dict(labels)
        self.phrases = tuple(labels)
        self._names = tuple(normalize_name(phrase) for phrase in labels)
        self._labels = tuple(labels.values())
        self._phrase_of_label = {label: phrase for phrase, label in reversed(labels.items())}

    @classmethod
    def from_metadata(cls, phrases: Mapping[str, Mapping]) -> "Vocabulary":
        """Reads the "phrases" of a split's metadata (`Records.metadata`)."""
        return cls({phrase: entry["label"] for phrase, entry in phrases.items()})

    def phrase_of(self, label: str) -> str:
        """Returns the phrase of a label: the data set's, else the taxonomy's, else the label's own words."""
        if label in self._phrase_of_label:
            return self._phrase_of_label[label]
        known = load_taxonomy().find(label)
        return known.name if known else label.replace("_", " ")

    def sample_negatives(self, example: GroundingExample, rng: np.random.Generator, count: int) -> list[str]:
        """Draws up to `count` phrases that the image does not show, none twice.

        Those that an expert looked for and did not find (`example.absent`) come first, the rest of the vocabulary
        after them. A phrase of the image is never drawn, nor one of the same label, nor one of a structure that holds
        what the image shows ("lung" where "left lung" is shown).
        """
        names, labels = _shown(example.regions)
        absent = list(dict.fromkeys(self.phrase_of(label) for label in example.absent if label not in labels))
        negatives = []
        for phrase in (absent[i] for i in rng.permutation(len(absent))):
            if normalize_name(phrase) not in names and len(negatives) < count:
                names.add(normalize_name(phrase))
                negatives.append(phrase)
        for index in rng.permutation(len(self.phrases)):
            if len(negatives) >= count:
                break
            if self._names[index] not in names and self._labels[index] not in labels:
                names.add(self._names[index])
                negatives.append(self.phrases[index])
        return negatives


def _shown(regions: Sequence[Region]) -> tuple[set[str], set[str]]:
    """Returns the normalised names and the labels that say something true of an image with these regions."""
    taxonomy = load_taxonomy()
    names = {normalize_name(region.phrase) for region in regions}
    labels = {label for region in regions for label in (region.label, region.parent) if label}
    for label in [*labels, *names]:
        if known := taxonomy.find(label):
            labels.update((known.id, *taxonomy.parents(known.id)))
    for label in labels & taxonomy.labels.keys():
        known = taxonomy.labels[label]
        names.update(normalize_name(name) for name in (known.name, *known.synonyms))
    return names, labels


def sample_prompt(
    example: GroundingExample,
    rng: np.random.Generator,
    *,
    tokenizer: TextTokenizer,
    max_tokens: int,
    max_negatives: int,
    full_negatives_probability: float,
    caption_probability: float,
    vocabulary: Vocabulary,
) -> tuple[Prompt, tuple[Region, ...]]:
    """Makes the prompt of a training step.

    With `caption_probability` it is the example's own sentence, if every region has spans in it that fit. Else it is
    the phrases of the regions and `max_negatives` sampled ones (with `full_negatives_probability`; otherwise a random
    number from 1 to that), shuffled. Negatives that do not fit are left out, phrases of the image never are.

    Crowd regions are no targets, as in GLIP, and their phrases are no negatives.

    Returns:
        (prompt, regions): the prompt has a phrase, and a row of the positive map, for each of the K regions.

    Raises:
        ValueError: a phrase is empty, or a span is not inside the caption.
        PromptTooLong: the phrases of the image alone do not fit.
    """
    regions = tuple(region for region in example.regions if not region.iscrowd)
    # The coin is tossed for every example, so that captions do not shift the other draws.
    if rng.random() < caption_probability and regions and all(region.spans for region in regions):
        try:
            prompt = build_caption_prompt(example.caption, [region.spans for region in regions], tokenizer, max_tokens)
            return prompt, regions
        except PromptTooLong:
            pass
    # By name: of "Nodule" and "nodule" each would be a negative for the boxes of the other.
    positives: dict[str, str] = {}
    for region in regions:
        positives.setdefault(normalize_name(region.phrase), _strip(region.phrase))
    count = max_negatives
    if max_negatives and rng.random() >= full_negatives_probability:
        count = int(rng.integers(1, max_negatives, endpoint=True))
    negatives = []
    free = _budget(tokenizer, max_tokens) - sum(_cost(phrase, tokenizer) for phrase in positives.values())
    for phrase in vocabulary.sample_negatives(example, rng, count):
        cost = _cost(phrase, tokenizer)
        if cost <= free:
            free -= cost
            negatives.append(phrase)
    while True:
        phrases = [*positives.values(), *negatives]
        phrases = [phrases[i] for i in rng.permutation(len(phrases))]
        try:
            prompt = build_prompt(phrases, tokenizer, max_tokens)
            break
        except PromptTooLong:
            if not negatives:
                raise
            negatives.pop()
    row = {normalize_name(phrase): k for k, phrase in enumerate(prompt.phrases)}
    rows = [row[normalize_name(region.phrase)] for region in regions]
    names = tuple(prompt.phrases[k] for k in rows)
    return dataclasses.replace(prompt, positive_map=prompt.positive_map[rows], phrases=names), regions


_SIDE = re.compile(r"(?<![^\W_])(?ai:left|right)(?![^\W_])")  # ASCII: else the Turkish letters match an "i"


def _other_side(match: re.Match) -> str:
    word = match.group()
    other = "right" if word.lower() == "left" else "left"
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def swap_sides(text: str) -> str:
    """Swaps left and right as a mirror does, in sentences and in labels ("left_lung"); twice gives the text back.

    Only whole words: "leftmost" and "bright" stay as they are. Keeps lower case, a capital first letter, and capitals.
    """
    return _SIDE.sub(_other_side, text)


def swap_sides_with_spans(text: str, spans: Sequence[Sequence[Span]]) -> tuple[str, list[tuple[Span, ...]]]:
    """Swaps left and right in a text and moves spans with their words.

    Args:
        text: any text.
        spans: groups of characters (start, end) of it, half-open. A span that cuts a swapped word gets all of it.

    Returns:
        (text, spans) after the swap.
    """
    matches = list(_SIDE.finditer(text))

    def move(position: int, is_end: bool) -> int:
        shift = 0
        for match in matches:
            growth = len(_other_side(match)) - len(match.group())
            if position >= match.end():
                shift += growth
            elif position > match.start():
                return (match.end() + growth if is_end else match.start()) + shift
        return position + shift

    moved = [tuple((move(start, False), move(end, True)) for start, end in group) for group in spans]
    return swap_sides(text), moved
