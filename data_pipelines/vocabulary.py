"""What may stand in a prompt beside an image: phrases that it does not show, and broader names of what it shows."""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import Label, load_taxonomy, normalize_name

_WORD = re.compile(r"[^\W_]+")


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


class Vocabulary:
    """The phrases of a data set, from which the negatives of training prompts come.

    Where data sets are mixed that do not annotate the same structures, each needs its own: what one of them leaves out
    is not absent from its images.

    Args:
        labels: the label of each phrase.
    """

    def __init__(self, labels: Mapping[str, str]):
        labels = dict(labels)
        self.phrases = tuple(labels)
        self._names = tuple(normalize_name(phrase) for phrase in labels)
        self._labels = tuple(labels.values())
        self._phrase_of_label = {label: phrase for phrase, label in reversed(labels.items())}
        known = [load_taxonomy().find(label) for label in self._labels]
        self._broader = tuple(frozenset(find_broader(entry.id)) if entry else frozenset() for entry in known)
        self._body_regions = tuple(entry.body_region if entry else "" for entry in known)
        self._index = _NameIndex(zip(self.phrases, self._names, strict=True))

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

    def sample_negatives(
        self, example: GroundingExample, rng: np.random.Generator, count: int, hard_share: float = 0.0
    ) -> list[str]:
        """Draws up to `count` phrases that the image does not show, none twice.

        Those that an expert looked for and did not find (`example.absent`) come first, the rest of the vocabulary
        after them. Never drawn are a phrase of the image, one of the same label, one of what holds it or is more
        general ("lung" where "left lung" is shown), one of what is more special ("left lung" where "lung" is shown),
        nor one that the image's sentences mention, boxed or not.

        Args:
            hard_share: least share of those after the absent ones that comes from the body regions of the image, as far
                as there are enough; the others come from the whole vocabulary.
        """
        names, labels = _shown(example.regions)
        boxed = {name for region in example.regions for name in _ids(region.label)}
        absent = list(dict.fromkeys(self.phrase_of(label) for label in example.absent if label not in labels))
        negatives: list[str] = []
        for phrase in (absent[i] for i in rng.permutation(len(absent))):
            if normalize_name(phrase) not in names and len(negatives) < count:
                names.add(normalize_name(phrase))
                negatives.append(phrase)
        mentioned_names, mentioned = self._mentioned(example)
        names |= mentioned_names
        labels |= mentioned
        order = rng.permutation(len(self.phrases)).tolist()
        missing = count - len(negatives)
        quota = int(np.ceil(hard_share * missing)) if hard_share else 0
        near = set(body_regions(example)) if quota else set()
        hard = [index for index in order if self._body_regions[index] in near] if near else []
        last = len(negatives) + quota
        for candidates, limit in ((hard, last), (order, count)):
            for index in candidates:
                if len(negatives) >= limit:
                    break
                name, label = self._names[index], self._labels[index]
                if name not in names and label not in labels and not self._broader[index] & boxed:
                    names.add(name)
                    negatives.append(self.phrases[index])
        return negatives

    def _mentioned(self, example: GroundingExample) -> tuple[set[str], set[str]]:
        """Returns names and labels that the image's own sentences mention, whatever they say of them.

        Sentences that were made of the boxes are left out: they name nothing else, or deny it.
        """
        texts = [expression.text for expression in example.expressions if expression.kind == "report"]
        if example.caption:
            texts.append(example.caption)
        names: set[str] = set()
        labels: set[str] = set()
        taxonomy = load_taxonomy()
        for text in texts:
            words = _fold(text)
            names.update(self._index.find(words))
            for label in _taxonomy_index().find(words):
                labels.update((label, *taxonomy.ancestors(label)))
        return names, labels


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
    """Returns the words of a text in lower case and the singular, for comparison only."""
    return [_singular(word) for word in _WORD.findall(text.lower())]


def _singular(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    return f"{word[:-3]}y" if word.endswith("ies") else word[:-2] if word.endswith("sses") else word[:-1]


def _ids(name: str) -> tuple[str, ...]:
    known = load_taxonomy().find(name)
    return (name, known.id) if known else (name,)


def _shown(regions: Sequence[Region]) -> tuple[set[str], set[str]]:
    """Returns the normalised names and the labels that say something true of an image with these regions."""
    taxonomy = load_taxonomy()
    names = {normalize_name(region.phrase) for region in regions}
    labels = {label for region in regions for label in (region.label, region.parent) if label}
    for label in [*labels, *names]:
        if known := taxonomy.find(label):
            labels.update((known.id, *taxonomy.ancestors(known.id)))
    for label in labels & taxonomy.labels.keys():
        names.update(normalize_name(name) for name in taxonomy.variants(label))
    return names, labels
