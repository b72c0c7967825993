"""Prompts: phrases or a sentence as tokens, and which tokens stand for which phrase.

As GLIP does (maskrcnn_benchmark/data/datasets/od_to_grounding.py): phrases joined by ". " without one at the end.
Training, evaluation and inference use the same code.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines.sides import Span
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.tokenization import Encoding, TextTokenizer

SEPARATOR = ". "
_STOP = SEPARATOR.strip()
Range = tuple[int, int]  # tokens (first, after the last)
_NAMED = 5  # phrases that an error message lists
_MODALITY_WORDS = {
    "xray": "x-ray",
    "ct": "CT",
    "mri": "MRI",
    "ultrasound": "ultrasound",
    "endoscopy": "endoscopy",
    "dermoscopy": "dermoscopy",
    "fundus": "fundus photograph",
    "histopathology": "histopathology",
    "microscopy": "microscopy",
    "oct": "OCT",
    "pet": "PET",
}
_OF_ANY_REGION = ("xray", "ct", "mri", "ultrasound", "pet")  # the others show one part of the body each
_REGION_WORDS = {"head_neck": "head and neck", "chest": "chest", "abdomen": "abdominal", "pelvis": "pelvic"}


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
        ranges: of every phrase that the text asks for, those without a row too, the ranges of its tokens; none twice.
        named: every phrase of a prompt of phrases, with or without a row, and its tokens (first, after the last); () in
            a sentence.
    """

    text: str
    input_ids: np.ndarray
    attention_mask: np.ndarray
    positive_map: np.ndarray
    phrases: tuple[str, ...]
    ranges: tuple[tuple[Range, ...], ...] = ()
    named: tuple[tuple[str, Range], ...] = ()


def _fill_prompt(
    text: str,
    phrases: Sequence[str],
    ids: list[int],
    rows: Sequence[Sequence[Range]],
    asked: Sequence[Sequence[Range]],
    tokenizer: TextTokenizer,
    max_tokens: int,
) -> Prompt:
    """Pads or cuts the tokens of a prompt to `max_tokens`; row k of the positive map is over the ranges `rows[k]`."""
    if len(ids) > max_tokens:
        kept = max_tokens - tokenizer.num_trailing
        ids = ids[:kept] + ids[len(ids) - tokenizer.num_trailing :]
    input_ids = np.full(max_tokens, tokenizer.pad_id, np.int32)
    input_ids[: len(ids)] = ids
    attention_mask = np.zeros(max_tokens, np.int32)
    attention_mask[: len(ids)] = 1
    positive_map = np.zeros((len(rows), max_tokens), np.float32)
    for row, ranges in zip(positive_map, rows, strict=True):
        for first, last in ranges:
            row[first:last] = 1
    positive_map /= np.maximum(positive_map.sum(axis=1, keepdims=True), 1)
    ranges = tuple(dict.fromkeys(tuple(of_phrase) for of_phrase in asked))
    return Prompt(text, input_ids, attention_mask, positive_map, tuple(phrases), ranges)


def _check_fit(
    phrases: Sequence[str], ranges: Sequence[Range], num_tokens: int, tokenizer: TextTokenizer, max_tokens: int
) -> None:
    """Raises an error if a phrase has no tokens, or not all within `max_tokens` of `num_tokens`."""
    if nothing := [k for k, (first, last) in enumerate(ranges) if first >= last]:
        raise ValueError(
            f"the tokenizer keeps nothing of the phrase {phrases[nothing[0]]!r}: leave it out or rename it"
        )
    if num_tokens > max_tokens:
        kept = max_tokens - tokenizer.num_trailing
        fallen = [phrase for phrase, (_, last) in zip(phrases, ranges, strict=True) if last > kept]
        if fallen or kept < tokenizer.num_leading:
            raise PromptTooLong(fallen, num_tokens, max_tokens)


def _find_ranges(encoding: Encoding, spans: Sequence[Sequence[Span]], tokenizer: TextTokenizer) -> list[list[Range]]:
    """Returns for each phrase the tokens that its characters are in: a range for each span that has any."""
    lead = tokenizer.num_leading
    reach = np.asarray(encoding.offsets[lead : len(encoding.ids) - tokenizer.num_trailing], np.int64).reshape(-1, 2)
    if not spans:
        return []
    starts, ends = np.asarray([span for of_phrase in spans for span in of_phrase], np.int64).reshape(-1, 2).T
    firsts = lead + reach[:, 1].searchsorted(starts, side="right")
    lasts = lead + reach[:, 0].searchsorted(ends, side="left")
    found = iter(zip(firsts.tolist(), lasts.tolist(), strict=True))
    rows = [list(itertools.islice(found, len(of_phrase))) for of_phrase in spans]
    return [[(first, last) for first, last in row if first < last] for row in rows]


def _tokenize_phrases(phrases: Sequence[str], tokenizer: TextTokenizer, prefix: str) -> tuple[list[int], list[Range]]:
    """Returns the tokens of a prompt of phrases, and which of them are each phrase's."""
    ranges = []
    if tokenizer.splits_at_spaces and phrases and (not prefix or prefix.endswith(" ")):
        # The same as below, without tokenising and looking for each phrase again.
        parts = tokenizer.encode_parts(phrases[:-1], _STOP) + tokenizer.encode_parts(phrases[-1:], "")
        ((ids, _),) = tokenizer.encode_parts([prefix], "")
        ids = ids.copy()
        for part, count in parts:
            first = len(ids) + tokenizer.num_leading
            ranges.append((first, first + count))
            ids += part
        return tokenizer.add_special(ids), ranges
    spans, start = [], len(prefix)
    for phrase in phrases:
        spans.append([(start, start + len(phrase))])
        start += len(phrase) + len(SEPARATOR)
    encoding = tokenizer.encode(prefix + SEPARATOR.join(phrases))
    return encoding.ids, [_enclose(row) for row in _find_ranges(encoding, spans, tokenizer)]


def _enclose(ranges: Sequence[Range]) -> Range:
    """Returns the range from the first to the last of a phrase's tokens, (0, 0) if it has none."""
    return min((first for first, _ in ranges), default=0), max((last for _, last in ranges), default=0)


def join_phrases(
    phrases: Sequence[str],
    groups: Sequence[Sequence[int]],
    tokenizer: TextTokenizer,
    max_tokens: int,
    prefix: str = "",
) -> Prompt:
    """Joins phrases without white space around them, as `build_prompt`, with a row for each group of them.

    Args:
        groups: positions of the phrases whose tokens a row of the positive map is spread over; the first of them names
            it. A phrase may be in several groups or in none.

    Raises:
        ValueError: the tokenizer has no tokens for a phrase.
        PromptTooLong: not all phrases fit.
    """
    ids, ranges = _tokenize_phrases(phrases, tokenizer, prefix)
    _check_fit(phrases, ranges, len(ids), tokenizer, max_tokens)
    rows = [[ranges[k] for k in group] for group in groups]
    names = [phrases[group[0]] for group in groups]
    asked = [[each] for each in ranges]
    prompt = _fill_prompt(prefix + SEPARATOR.join(phrases), names, ids, rows, asked, tokenizer, max_tokens)
    return dataclasses.replace(prompt, named=tuple(zip(phrases, ranges, strict=True)))


def build_prompt(phrases: Sequence[str], tokenizer: TextTokenizer, max_tokens: int, prefix: str = "") -> Prompt:
    """Joins phrases into one prompt, in their order.

    Args:
        phrases: K phrases; white space around them does not count.
        tokenizer: makes the tokens.
        max_tokens: length L of the prompt, special tokens included.
        prefix: words before the phrases that belong to none of them, as `make_prefix` writes them.

    Raises:
        ValueError: a phrase is empty.
        PromptTooLong: not all of them fit; it names those that do not.
    """
    phrases = [strip_phrase(phrase) for phrase in phrases]
    return join_phrases(phrases, [[k] for k in range(len(phrases))], tokenizer, max_tokens, prefix)


def split_phrases(phrases: str | Sequence[str]) -> list[str]:
    """Returns the phrases of "left lung. nodule." or of a list, without repetition.

    Raises:
        ValueError: there are none, or one is empty.
    """
    if isinstance(phrases, str):
        phrases = re.split(r"\.\s+", re.sub(r"\.\s*$", "", phrases.strip()))
    names = [phrase.strip() for phrase in phrases]
    if not names or not all(names):
        raise ValueError(f"phrases: expected at least one and none empty, as 'left lung. nodule', not {phrases!r}")
    return list(dict.fromkeys(names))


def strip_phrase(phrase: str) -> str:
    """Returns the phrase without white space around it.

    Raises:
        ValueError: nothing is left.
    """
    stripped = phrase.strip()
    if not stripped:
        raise ValueError(f"a phrase is empty ({phrase!r}): a prompt's phrases must have words, as 'left lung'")
    return stripped


def token_budget(tokenizer: TextTokenizer, max_tokens: int, prefix: str = "") -> int:
    """Returns the tokens of a prompt that phrases may take, each with a separator after it."""
    return (
        max_tokens - tokenizer.count(prefix) - tokenizer.num_leading - tokenizer.num_trailing + tokenizer.count(_STOP)
    )


def token_costs(phrases: Iterable[str], tokenizer: TextTokenizer) -> list[int]:
    """Returns the tokens of phrases with a separator each (exact where words are tokenised one by one, as in BERT)."""
    if tokenizer.splits_at_spaces:
        return [len(ids) for ids, _ in tokenizer.encode_parts(phrases, _STOP)]
    separator = tokenizer.count(_STOP)
    return [tokenizer.count(phrase) + separator for phrase in phrases]


def build_prompts(
    phrases: Sequence[str], tokenizer: TextTokenizer, max_tokens: int, prefix: str = ""
) -> list[tuple[Prompt, list[int]]]:
    """Spreads phrases over as few prompts as hold them in their order; with each, the indices of its phrases.

    All of them begin with the same `prefix`. `order_by_body_region` gives an order in which a prompt's phrases belong
    together.

    Raises:
        ValueError: there are no phrases, or one is empty.
        PromptTooLong: a phrase alone does not fit into a prompt.
    """
    if not phrases:
        raise ValueError("there are no phrases to look for: give at least one")
    budget = token_budget(tokenizer, max_tokens, prefix)
    costs = token_costs(map(strip_phrase, phrases), tokenizer)
    prompts: list[tuple[Prompt, list[int]]] = []
    start = 0
    while start < len(phrases):
        end, used = start, 0
        while end < len(phrases) and (used := used + costs[end]) <= budget:
            end += 1
        end = max(end, start + 1)
        while True:
            try:
                prompt = build_prompt(phrases[start:end], tokenizer, max_tokens, prefix)
                prompts.append((prompt, list(range(start, end))))
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
    prefix: str = "",
) -> Prompt:
    """Takes a free sentence as the prompt.

    Args:
        caption: the sentence. Words beyond the limit are cut off where no span reaches them.
        spans: for each of the K phrases, the characters (start, end) of its words in the caption, half-open.
        tokenizer: makes the tokens.
        max_tokens: length L of the prompt, special tokens included.
        prefix: words before the sentence that belong to no phrase, as `make_prefix` writes them.

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
        phrases.append(strip_phrase(" ".join(caption[start:end] for start, end in phrase_spans)))
    shift = len(prefix)
    spans = [[(start + shift, end + shift) for start, end in phrase_spans] for phrase_spans in spans]
    encoding = tokenizer.encode(prefix + caption)
    rows = _find_ranges(encoding, spans, tokenizer)
    _check_fit(phrases, [_enclose(row) for row in rows], len(encoding.ids), tokenizer, max_tokens)
    return _fill_prompt(prefix + caption, phrases, encoding.ids, rows, rows, tokenizer, max_tokens)


def make_prefix(modality: str, body_regions: Iterable[str] = ()) -> str:
    """Returns words that say what kind of image it is: "chest x-ray: ", "CT: "; "" for an unknown modality.

    Args:
        modality: one of `schema.MODALITIES`.
        body_regions: body regions of the taxonomy, as often as the image shows something of them. The one that more
            than half of them name is said, where the modality does not say as much itself.
    """
    words = _MODALITY_WORDS.get(modality, "")
    counts = collections.Counter(body_regions)
    region, count = counts.most_common(1)[0] if counts else ("", 0)
    if words and modality in _OF_ANY_REGION and 2 * count > counts.total() and region in _REGION_WORDS:
        words = f"{_REGION_WORDS[region]} {words}"
    return f"{words}: " if words else ""


def order_by_body_region(phrases: Sequence[str]) -> list[int]:
    """Returns the indices of phrases so that those of one body region follow each other; unknown ones come last.

    Regions come in the order of their first phrase, and phrases keep their order within one.
    """
    taxonomy = load_taxonomy()
    groups: dict[str, list[int]] = {}
    for index, phrase in enumerate(phrases):
        known = taxonomy.find(phrase)
        groups.setdefault(known.body_region if known else "", []).append(index)
    unknown = groups.pop("", [])
    return [index for group in (*groups.values(), unknown) for index in group]
