"""Names of labels in sentences, in the singular or the plural."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.taxonomy import load_taxonomy

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


class NameIndex:
    """Finds names in sentences, in the plural too.

    Args:
        owners: (name, what it stands for) pairs.
    """

    def __init__(self, owners: Iterable[tuple[str, str]]):
        self._owners: dict[str, set[str]] = {}
        self._longest: dict[str, int] = {}  # words of the longest name that begins with a word
        for name, owner in owners:
            words = fold(name)
            if words:
                self._owners.setdefault(" ".join(words), set()).add(owner)
                self._longest[words[0]] = max(self._longest.get(words[0], 0), len(words))

    def find(self, words: Sequence[str]) -> Iterator[str]:
        """Yields what the names in `fold(text)` stand for, names inside of names included."""
        for start, word in enumerate(words):
            for length in range(1, self._longest.get(word, 0) + 1):
                yield from self._owners.get(" ".join(words[start : start + length]), ())


@functools.cache
def taxonomy_index() -> NameIndex:
    """Returns the index of the names and variants of all labels, which stand for their ids (made once)."""
    taxonomy = load_taxonomy()
    return NameIndex(
        (name, id_) for id_, label in taxonomy.labels.items() for name in (*label.names, *taxonomy.variants(id_))
    )


def fold(text: str) -> list[str]:
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


def find_head(phrase: str) -> str:
    """Returns the noun that a phrase is about, folded: "lobe" of "left upper lobe of the lung", "rib" of "rib 4"."""
    words = fold(_AFTER_HEAD.split(phrase.lower(), maxsplit=1)[0]) or fold(phrase)
    return next((word for word in reversed(words) if not word.isdigit()), "")
