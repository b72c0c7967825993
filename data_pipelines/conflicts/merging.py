"""Copies of one picture: whose annotations are put together, and how."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.conflicts.resolving import resolve
from data_pipelines.conflicts.rules import Conflict, ConflictRules
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.taxonomy import normalize_name

_SAME_SPACING = 0.01  # relative difference of pixel spacings that are the same but for rounding
_SENTENCE_ENDS = (".", "!", "?")


def find_keepers(groups: np.ndarray, datasets: Sequence[str], rules: ConflictRules) -> np.ndarray:
    """Says which example of each group of copies stands for which.

    Args:
        groups: int[N], the same number for the same pixels.
        datasets: N names.
        rules: `duplicates_within` and `duplicates_across` count.

    Returns:
        int64[N]: the row of the example that is kept for each; its own row for one that is kept. Give all rows of one
        keeper to `merge`, in their order.
    """
    groups = np.asarray(groups, np.int64)
    if not len(groups):
        return np.zeros(0, np.int64)
    names = {name: code for code, name in enumerate(dict.fromkeys(datasets))}
    codes = np.fromiter((names[name] for name in datasets), np.int64, len(groups))
    kept_apart = np.zeros((2, len(groups)), np.int64)
    if rules.duplicates_across == "keep_all":
        kept_apart[0] = codes
    if rules.duplicates_within == "keep_all":  # the first copies of the data sets come together, then the second ones
        order = np.lexsort((codes, groups))
        starts = np.r_[True, (np.diff(groups[order]) != 0) | (np.diff(codes[order]) != 0)]
        first = np.maximum.accumulate(np.where(starts, np.arange(len(groups)), 0))
        kept_apart[1, order] = np.arange(len(groups)) - first
    order = np.lexsort((*kept_apart, groups))  # stable: equal ones keep the order of their rows
    sets = np.stack([groups, *kept_apart])[:, order]
    starts = np.r_[True, (np.diff(sets, axis=1) != 0).any(axis=0)]
    keepers = np.zeros(len(groups), np.int64)
    keepers[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(groups)), 0))]
    return keepers


def merge(examples: Sequence[GroundingExample], rules: ConflictRules) -> tuple[GroundingExample, list[Conflict]]:
    """Puts the annotations of one picture together, which several data sets, or one several times, have made.

    The first example gives the picture and its ids, the first that knows them modality, spacing and patient; different
    captions are joined, with the spans of their regions. Regions of all are kept, equal ones once, disagreeing ones by
    the rules. A label is absent if an example lists it and none shows it, or a part of it; what is not annotated is not
    absent. An expression that grounds to nothing goes if its words name something that another example shows.

    Args:
        examples: with the same pixels, resolved each by itself.
        rules: as for `resolve`.

    Returns:
        (example, conflicts): those that the examples had by themselves are not told again.

    Raises:
        ValueError: there is no example, they differ in size, or the rules keep all copies.
    """
    if not examples:
        raise ValueError("nothing to merge: expected at least one example")
    if len({(example.height, example.width) for example in examples}) > 1:
        sizes = ", ".join(f"{each.dataset}/{each.image_id} {each.width} x {each.height}" for each in examples)
        raise ValueError(f"copies of one picture have the same size; found {sizes}")
    by_dataset: dict[str, list[GroundingExample]] = {}
    for example in examples:
        by_dataset.setdefault(example.dataset, []).append(example)
    firsts, conflicts = [], []
    for copies in by_dataset.values():
        example, found = _put_together(copies, "duplicates_within", rules)
        firsts.append(example)
        conflicts += found
    example, found = _put_together(firsts, "duplicates_across", rules)
    return example, [*conflicts, *found]


def _put_together(
    copies: Sequence[GroundingExample], kind: str, rules: ConflictRules
) -> tuple[GroundingExample, list[Conflict]]:
    first, others = copies[0], copies[1:]
    if not others:
        return first, []
    rule = rules.of(kind)
    if rule == "keep_all":
        raise ValueError(f"{kind} is keep_all: {first.image_id} and its copies stay apart (see find_keepers)")

    def conflict(kind: str, rule: str, detail: str) -> Conflict:
        return Conflict(kind, rule, first.dataset, first.image_id, (), detail)

    conflicts = [conflict(kind, rule, f"{each.dataset}/{each.image_id}") for each in others]
    if rule == "keep_first":
        return first, conflicts
    rules = dataclasses.replace(rules, same_structure="keep_first")
    told = {(each.kind, each.labels, each.detail) for copy in copies for each in resolve(copy, rules)[1]}
    joined, lost = _join(copies)
    merged, found = resolve(joined, rules)
    conflicts += [conflict("merged_fields", rule, detail) for rule, detail in _compare_fields(copies, kind)]
    conflicts += [conflict("lost_text", "drop", "expression: a copy shows what it says is not there")] * lost
    return merged, conflicts + [each for each in found if (each.kind, each.labels, each.detail) not in told]


def _compare_fields(copies: Sequence[GroundingExample], kind: str) -> list[tuple[str, str]]:
    """Says (what is done, which field) of the fields of the copies that differ, unknown ones apart."""
    found = []
    for field in ("modality", "patient_id", "caption"):
        values = {value for copy in copies if (value := getattr(copy, field)) not in ("", "unknown")}
        # Data sets may hash their patients with salts of their own.
        if len(values) > 1 and not (field == "patient_id" and kind == "duplicates_across"):
            detail = f"{field}: {', '.join(sorted(values))}" if field == "modality" else f"{len(values)} of {field}"
            found.append(("join" if field == "caption" else "first", detail))
    spacings = np.asarray([copy.spacing_mm for copy in copies if min(copy.spacing_mm) > 0]).reshape(-1, 2)
    if len(spacings) > 1 and (spacings.max(axis=0) > spacings.min(axis=0) * (1 + _SAME_SPACING)).any():
        found.append(("first", f"spacing_mm: {len(spacings)} values"))
    return found


def _join_captions(copies: Sequence[GroundingExample]) -> tuple[str, dict[str, int]]:
    """Puts the different captions one after another, without those that are in another one.

    Returns:
        (text, where each of the captions starts in it).
    """
    captions = list(dict.fromkeys(copy.caption for copy in copies if copy.caption))
    text = ""
    for caption in captions:
        if any(_find_sentence(other, caption) >= 0 for other in captions if other != caption):
            continue
        if text:
            text += " " if text.rstrip().endswith(_SENTENCE_ENDS) else ". "
        text += caption
    return text, {caption: _find_sentence(text, caption) for caption in captions}


def _find_sentence(text: str, sentence: str) -> int:
    """Returns where a sentence starts in a text, as a whole; -1 if it is not there."""
    start = text.find(sentence)
    while start >= 0:
        before, after = text[:start].rstrip(), text[start + len(sentence) :].lstrip()
        begins = not before or before.endswith(_SENTENCE_ENDS)
        if begins and (not after or sentence.rstrip().endswith(_SENTENCE_ENDS) or after.startswith(".")):
            return start
        start = text.find(sentence, start + 1)
    return -1


def _join(copies: Sequence[GroundingExample]) -> tuple[GroundingExample, int]:
    """Puts regions, absent labels and expressions one after another; returns how many expressions became untrue."""

    def known(field: str, unknown: tuple) -> object:
        return next((value for copy in copies if (value := getattr(copy, field)) not in unknown), unknown[0])

    caption, starts = _join_captions(copies)
    regions: list[Region] = []
    expressions: dict[Expression, None] = {}
    lost = 0
    for place, copy in enumerate(copies):
        shift = starts.get(copy.caption, 0)
        names = [
            normalize_name(region.phrase)
            for other, each in enumerate(copies)
            for region in each.regions
            if other != place
        ]
        for expression in copy.expressions:
            text = f" {normalize_name(expression.text)} "
            if not expression.regions and any(f" {name} " in text for name in names):
                lost += 1
                continue
            moved = tuple(k + len(regions) for k in expression.regions)
            expressions[dataclasses.replace(expression, regions=moved)] = None
        regions += (
            dataclasses.replace(region, spans=tuple((start + shift, end + shift) for start, end in region.spans))
            for region in copy.regions
        )
    joined = dataclasses.replace(
        copies[0],
        patient_id=known("patient_id", ("",)),
        modality=known("modality", ("unknown", "")),
        spacing_mm=known("spacing_mm", ((0.0, 0.0),)),
        caption=caption,
        regions=tuple(regions),
        absent=tuple(dict.fromkeys(label for copy in copies for label in copy.absent)),
        expressions=tuple(expressions),
    )
    return joined, lost
