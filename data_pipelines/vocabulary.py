"""What may stand in a prompt beside an image: phrases that it does not show, and broader names of what it shows."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.schema import MODALITIES, GroundingExample, Region
from data_pipelines.taxonomy import Label, load_taxonomy, normalize_name

_REMEMBERED = 65536  # descriptions of regions whose phrases are kept
_WORD = re.compile(r"[^\W_]+")
_AFTER_HEAD = re.compile(r"[\s_]+(?:of|in|on|with|at|from)[\s_]+|[,(]")
# Endings of words, and what singular and plural have in common instead: "metastasis" and "metastases", "nuclei" and
# "nucleus". The first that fits counts.
_ENDINGS = (
    ("thoraces", "thorax"),
    ("cortices", "cortex"),
    ("apices", "apex"),
    ("appendices", "appendix"),
    ("calyces", "calyx"),
    ("varices", "varix"),
    ("mata", "ma"),
    ("ies", "y"),
    ("sses", "ss"),
    ("ses", "s"),
    ("sis", "s"),
    ("se", "s"),
    ("ss", "ss"),
    ("ae", "a"),
    ("um", "a"),
    ("i", "u"),
    ("s", ""),
)


@functools.lru_cache(maxsize=4096)
def find_broader(label: str) -> tuple[str, ...]:
    """Returns the ids of the labels that a label is one of, the nearest first; () if the taxonomy does not know it.

    A melanoma is a skin lesion and a left lung is a lung, so what is true of a box of the one is true of the other; a
    liver is in the abdomen and is none.
    """
    taxonomy = load_taxonomy()
    found: dict[str, None] = {}
    front = [label] if label in taxonomy.labels else []
    while front:
        entries = [taxonomy.labels[id_] for id_ in front]
        front = [up for entry in entries for up in (*entry.kind_of, *_unsided(entry)) if up not in found]
        found.update(dict.fromkeys(front))
    return tuple(found)


def _unsided(entry: Label) -> tuple[str, ...]:
    """Returns the parent that is the same structure of both sides, if there is one."""
    same = entry.side != "none" and entry.id == f"{entry.side}_{entry.parent}"
    return (entry.parent,) if same else ()


def body_regions(example: GroundingExample) -> tuple[str, ...]:
    """Returns the body region of each region of an image, or else of each absent label, of those that have one."""
    taxonomy = load_taxonomy()
    for names in ([region.label for region in example.regions], example.absent):
        found = tuple(known.body_region for name in names if (known := taxonomy.find(name)) and known.body_region)
        if found:
            return found
    return ()


@dataclasses.dataclass(frozen=True)
class _Block:
    """What keeps phrases from being negatives: their names, their labels, or what they are one of."""

    names: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()


class Vocabulary:
    """The phrases from which the negatives of a data set's training prompts come.

    Its own phrases are annotated wherever its images show them, so that one without a box is absent. Those of other
    data sets are not: of them only what no such image can show is a negative, which is what lies in another part of the
    body and is not seen in the image's modality.

    Args:
        labels: the label of each phrase.
        foreign: likewise, of other data sets.
        modalities: names of the modalities in which a phrase was seen.
        exhaustive: False where the data set marks only some of what its images show. No phrase of its own is a negative
            then, unless an expert looked for it.

    Attributes:
        phrases: the V phrases, its own first.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        foreign: Mapping[str, str] | None = None,
        *,
        modalities: Mapping[str, Iterable[str]] | None = None,
        exhaustive: bool = True,
    ):
        own = {normalize_name(phrase) for phrase in labels}
        others = {normalize_name(phrase): phrase for phrase in reversed(list(foreign or ()))}
        everything = {**labels, **{p: (foreign or {})[p] for name, p in others.items() if name not in own}}
        self.phrases = tuple(everything)
        self._names = tuple(normalize_name(phrase) for phrase in everything)
        self._labels = tuple(everything.values())
        self._phrase_of_label = {label: phrase for phrase, label in reversed(everything.items())}
        known = [load_taxonomy().find(label) for label in self._labels]
        self._body_regions = np.asarray([entry.body_region if entry else "" for entry in known], str)
        self._is_own = np.arange(len(everything)) < len(labels)
        self._exhaustive = exhaustive
        self._is_seen = np.zeros((len(everything), len(MODALITIES)), bool)
        for index, (phrase, entry) in enumerate(zip(everything, known, strict=True)):
            seen = {*(modalities or {}).get(phrase, ()), *(entry.modalities if entry else ())}
            self._is_seen[index, [MODALITIES.index(modality) for modality in seen]] = True
        self._with_name = _group_indices((name,) for name in self._names)
        self._with_label = _group_indices((label,) for label in self._labels)
        self._with_kind = _group_indices(find_broader(entry.id) if entry else () for entry in known)
        self._with_head = _group_indices((_find_head(phrase),) for phrase in everything)
        self._has_twins = len(self._with_name) < len(everything)
        self._index = _NameIndex(zip(self.phrases, self._names, strict=True))
        self._remembered: dict[Any, np.ndarray] = {}

    def phrase_of(self, label: str) -> str:
        """Returns the phrase of a label: the data set's, else the taxonomy's, else the label's own words."""
        if label in self._phrase_of_label:
            return self._phrase_of_label[label]
        known = load_taxonomy().find(label)
        return known.name if known else label.replace("_", " ")

    def sample_negatives(
        self, example: GroundingExample, rng: np.random.Generator, count: int, hard_share: float = 0.0
    ) -> dict[str, str]:
        """Draws up to `count` phrases that the image does not show, none twice: by their normalised names.

        Those that an expert looked for and did not find (`example.absent`) come first, the rest of the vocabulary
        after them. Never drawn are a phrase of the image, one of the same label, one of what holds it or is more
        general ("lung" where "left lung" is shown), one of what is more special ("left lung" where "lung" is shown),
        nor one that the image's sentences mention, boxed or not.

        Args:
            hard_share: least share of those after the absent ones that comes from the body regions of the image, as far
                as there are enough; the others come from the whole vocabulary.
        """
        regions = tuple(sorted(set(body_regions(example))))
        possible, near = self._select_possible(example.modality, regions)
        free = possible.copy()  # [V]
        for region in example.regions:
            free[self._find_blocked(region.phrase, region.label, region.parent)] = False
        if texts := _own_sentences(example):
            free[self._find_mentioned(texts)] = False
        negatives: dict[str, str] = {}
        if example.absent:
            negatives = self._sample_absent(example, rng, count)
            free[self._indices(_Block(names=frozenset(negatives)))] = False
        missing = count - len(negatives)
        order = rng.permutation(np.flatnonzero(free))
        if self._has_twins:
            _, firsts = np.unique([self._names[index] for index in order], return_index=True)
            order = order[np.sort(firsts)]
        if hard_share and regions:
            hard = order[near[order]][: int(np.ceil(hard_share * missing))]
            free[hard] = False
            order = np.concatenate([hard, order[free[order]]])
        for index in order[:missing].tolist():
            negatives[self._names[index]] = self.phrases[index]
        return negatives

    def find_absent(self, example: GroundingExample) -> set[str]:
        """Returns the phrases that an image surely does not show, whatever else it may show.

        Of an exhaustive data set, all of its own that would be marked if they were there: as in `sample_negatives`
        without those of other data sets. And those of the labels that an expert looked for and did not find.
        """
        free = self._is_own & self._exhaustive  # [V]
        for region in example.regions:
            free[self._find_blocked(region.phrase, region.label, region.parent)] = False
        if texts := _own_sentences(example):
            free[self._find_mentioned(texts)] = False
        _, labels = _shown(example.regions)
        denied = {self.phrase_of(label) for label in example.absent if label not in labels}
        return denied.union(self.phrases[index] for index in np.flatnonzero(free))

    def _sample_absent(self, example: GroundingExample, rng: np.random.Generator, count: int) -> dict[str, str]:
        """Draws up to `count` phrases of the absent labels, by name, without what the image shows."""
        names, labels = _shown(example.regions)
        absent = list(dict.fromkeys(self.phrase_of(label) for label in example.absent if label not in labels))
        drawn: dict[str, str] = {}
        for phrase in (absent[i] for i in rng.permutation(len(absent))):
            name = normalize_name(phrase)
            if name not in names and len(drawn) < count:
                drawn.setdefault(name, phrase)
        return drawn

    def _select_possible(self, modality: str, regions: tuple[str, ...]) -> np.ndarray:
        """Returns bool[2, V]: what is a negative for images of these body regions unless they show it, and what of all
        is of these regions."""
        key = (modality, regions)
        if key not in self._remembered:
            possible = self._is_own & self._exhaustive
            near = np.isin(self._body_regions, regions)
            if regions and modality != MODALITIES[0]:
                elsewhere = (self._body_regions != "") & ~near
                possible |= elsewhere & ~self._is_seen[:, MODALITIES.index(modality)]
            self._remember(key, np.stack([possible, near]))
        return self._remembered[key]

    def _find_blocked(self, phrase: str, label: str, parent: str) -> np.ndarray:
        """Returns the places of the phrases that a region with these words may show."""
        key = (phrase, label, parent)
        if key not in self._remembered:
            self._remember(key, self._indices(_Block(*_shown_by(*key), frozenset(_ids(label)))))
        return self._remembered[key]

    def _remember(self, key: Any, found: np.ndarray) -> None:
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[key] = found

    def _indices(self, block: _Block) -> np.ndarray:
        found: set[int] = set()
        for index, wanted in (
            (self._with_name, block.names),
            (self._with_label, block.labels),
            (self._with_kind, block.kinds),
        ):
            for key in wanted:
                found.update(index.get(key, ()))
        return np.asarray(sorted(found), np.int64)

    def _find_mentioned(self, texts: Iterable[str]) -> np.ndarray:
        """Returns the places of the phrases that texts may mention, whatever they say of them.

        "A small effusion" may be a pleural effusion, and "a tumor" any kind of tumor.
        """
        names: set[str] = set()
        labels: set[str] = set()
        kinds: set[str] = set()
        heads: set[int] = set()
        for text in texts:
            words = _fold(text)
            names.update(self._index.find(words))
            kinds.update(_taxonomy_index().find(words))
            for word in words:
                heads.update(self._with_head.get(word, ()))
        for label in kinds:
            labels.update((label, *load_taxonomy().ancestors(label)))
        found = self._indices(_Block(frozenset(names), frozenset(labels), frozenset(kinds)))
        return np.union1d(found, np.asarray(sorted(heads), np.int64))


def _own_sentences(example: GroundingExample) -> list[str]:
    """Returns what the source says of an image. Sentences that were made of the boxes name nothing else, or deny it."""
    texts = [expression.text for expression in example.expressions if expression.kind == "report"]
    return [*texts, example.caption] if example.caption else texts


def _group_indices(keys: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """Returns for each key the places that have it."""
    groups: dict[str, list[int]] = {}
    for index, of_place in enumerate(keys):
        for key in of_place:
            groups.setdefault(key, []).append(index)
    return groups


def make_vocabularies(tables: Sequence[Mapping[str, Any]]) -> dict[str, Vocabulary]:
    """Makes the vocabulary of each data set from the metadata of the splits that are trained on.

    Args:
        tables: `Records.metadata` of each split. Its phrases name their data sets ("data_sets"); in records of older
            builds they do not, and all of a split belong to all of its data sets.

    Returns:
        Vocabularies by data set; "" is that of data sets that no table names.
    """
    merged: dict[str, dict[str, Any]] = {}
    partial: set[str] = set()
    for table in tables:
        partial.update(table.get("partial", ()))
        for phrase, entry in table["phrases"].items():
            known = merged.setdefault(phrase, {"label": "", "count": 0, "modalities": {}, "data_sets": {}})
            if entry["count"] > known["count"]:  # of two labels of a phrase, the more frequent one stays
                known.update(label=entry["label"], count=entry["count"])
            known["modalities"].update(dict.fromkeys(entry["modalities"]))
            known["data_sets"].update(dict.fromkeys(entry.get("data_sets", table.get("datasets", ("",)))))
    labels = {phrase: entry["label"] for phrase, entry in merged.items()}
    modalities = {phrase: tuple(entry["modalities"]) for phrase, entry in merged.items()}
    names = dict.fromkeys([*(name for entry in merged.values() for name in entry["data_sets"]), ""])
    return {
        name: Vocabulary(
            {phrase: labels[phrase] for phrase, entry in merged.items() if name in entry["data_sets"]},
            labels,
            modalities=modalities,
            exhaustive=name not in partial,
        )
        for name in names
    }


class _NameIndex:
    """Finds names in sentences, in the plural too.

    Args:
        owners: (name, what it stands for) pairs.
    """

    def __init__(self, owners: Iterable[tuple[str, str]]):
        self._owners: dict[str, set[str]] = {}
        self._longest: dict[str, int] = {}  # words of the longest name that begins with a word
        for name, owner in owners:
            words = _fold(name)
            if words:
                self._owners.setdefault(" ".join(words), set()).add(owner)
                self._longest[words[0]] = max(self._longest.get(words[0], 0), len(words))

    def find(self, words: Sequence[str]) -> Iterator[str]:
        """Yields what the names in `_fold(text)` stand for, names inside of names included."""
        for start, word in enumerate(words):
            for length in range(1, self._longest.get(word, 0) + 1):
                yield from self._owners.get(" ".join(words[start : start + length]), ())


@functools.cache
def _taxonomy_index() -> _NameIndex:
    taxonomy = load_taxonomy()
    return _NameIndex(
        (name, id_) for id_, label in taxonomy.labels.items() for name in (*label.names, *taxonomy.variants(id_))
    )


def _fold(text: str) -> list[str]:
    """Returns the words of a text in lower case, singular and plural alike, for comparison only."""
    return [_fold_word(word) for word in _WORD.findall(text.lower())]


@functools.lru_cache(maxsize=65536)
def _fold_word(word: str) -> str:
    if len(word) < 4:
        return word
    for ending, common in _ENDINGS:
        if word.endswith(ending):
            return word[: len(word) - len(ending)] + common
    return word


def _find_head(phrase: str) -> str:
    """Returns the noun that a phrase is about, folded: "lobe" of "left upper lobe of the lung", "rib" of "rib 4"."""
    words = _fold(_AFTER_HEAD.split(phrase.lower(), maxsplit=1)[0]) or _fold(phrase)
    return next((word for word in reversed(words) if not word.isdigit()), "")


def _ids(name: str) -> tuple[str, ...]:
    known = load_taxonomy().find(name)
    return (name, known.id) if known else (name,)


def _shown(regions: Sequence[Region]) -> tuple[set[str], set[str]]:
    """Returns the normalised names and the labels that say something true of an image with these regions."""
    shown = [_shown_by(region.phrase, region.label, region.parent) for region in regions]
    return set().union(*(names for names, _ in shown)), set().union(*(labels for _, labels in shown))


@functools.lru_cache(maxsize=_REMEMBERED)
def _shown_by(phrase: str, label: str, parent: str) -> tuple[frozenset[str], frozenset[str]]:
    taxonomy = load_taxonomy()
    names = {normalize_name(phrase)}
    labels = {label, parent} - {""}
    for name in [*labels, *names]:
        if known := taxonomy.find(name):
            labels.update((known.id, *taxonomy.ancestors(known.id)))
    for known_label in labels & taxonomy.labels.keys():
        names.update(normalize_name(name) for name in taxonomy.variants(known_label))
    return frozenset(names), frozenset(labels)
