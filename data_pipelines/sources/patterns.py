"""Patterns of file names that say which annotation belongs to which image, and what the parts of a name mean.

A pattern is a path below the input folder, with "/" between folders:

    {word}        one or more characters of one name, the same ones wherever the word stands
    {word:a*}     such characters that this glob matches
    *  ?  [abc]   any characters of a name, one, one of these, as a shell has them
    **/           any folders, or none

    {id}/{id}_{sequence}.nii.gz and {id}/{id}_seg.nii.gz        BraTS
    images/{id}.jpg and masks/{id}_{class}.png                   a mask a class
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from data_pipelines import limits
from data_pipelines.curate import SourceError
from data_pipelines.images import describe

_TOKEN = re.compile(
    r"\{(?P<word>[a-z_]+)(?::(?P<glob>[^{}/]+))?\}|(?P<folders>\*\*/)|(?P<any>\*)|(?P<one>\?)|\[(?P<set>!?\]?[^\]/]*)\]"
)
_SET_MARKS = re.compile(r"[\\\]\[^&~|]")  # that mean something between [ and ] in regular expressions; "-" does in both
_SHOWN = 3  # names in a message
_ID = "id"  # the word that is told from its neighbours by which images there are


def _glob(text: str) -> str:
    """Returns the regular expression of a glob without words."""
    parts, end = [], 0
    for token in _TOKEN.finditer(text):
        parts.append(re.escape(text[end : token.start()]))
        end = token.end()
        if token["word"]:
            raise SourceError(f"the pattern {text!r} has a word in a word")
        if token["folders"]:
            parts.append("(?:[^/]+/)*")
        elif token["any"]:
            parts.append("[^/]*")
        elif token["one"]:
            parts.append("[^/]")
        else:
            negated, inner = token["set"].startswith("!"), token["set"].removeprefix("!")
            if not inner:
                raise SourceError(f"the pattern {text!r} has an empty [] in it")
            parts.append(("[^/" if negated else "[") + _SET_MARKS.sub(r"\\\g<0>", inner) + "]")
    return "".join(parts) + re.escape(text[end:])


class Pattern:
    """A pattern of file names; see the head of the module.

    Attributes:
        text: the pattern.
        words: its words, in order, each once.

    Raises:
        SourceError: it is no pattern.
    """

    def __init__(self, text: str):
        self.text = text
        words: dict[str, str] = {}
        self._parts: list[tuple[str, str]] = []  # (word, "") or ("", regular expression)
        end = 0
        for token in _TOKEN.finditer(text):
            if not token["word"]:
                continue
            self._parts.append(("", _glob(text[end : token.start()])))
            self._parts.append((token["word"], ""))
            end = token.end()
            found = _glob(token["glob"]) if token["glob"] else ""
            if words.setdefault(token["word"], found) != found and found:
                raise SourceError(f"the pattern {text!r} says twice what {{{token['word']}}} is; say it once, first")
        self._parts.append(("", _glob(text[end:])))
        if not text or text.startswith("/") or ".." in text.split("/") or re.search(r"[{}]", _TOKEN.sub("", text)):
            raise SourceError(
                f"the pattern {text!r} must be a path below the input folder, whose words are like {{id}}, {{class}} "
                "or {sequence:t1*}, in small letters"
            )
        self.words = tuple(words)
        self._globs = words
        self._compiled: dict[int, re.Pattern[str]] = {}

    def match(self, path: str, id_length: int = 0) -> dict[str, str] | None:
        """Returns the words of a path below the input folder, None where it is another.

        Args:
            path: with "/" between folders.
            id_length: characters of {id}, 0 for as many as fit; words that come first take all that they can.
        """
        if id_length not in self._compiled:
            self._compiled[id_length] = self._compile(id_length)
        found = self._compiled[id_length].fullmatch(path)
        return found.groupdict() if found else None

    def _compile(self, id_length: int) -> re.Pattern[str]:
        seen: set[str] = set()
        parts = []
        for word, expression in self._parts:
            if word in seen:
                parts.append(f"(?P={word})")
            elif word:
                seen.add(word)
                count = f"{{{id_length}}}" if word == _ID and id_length else "+"
                inner = f"[^/]{count}" if word == _ID and id_length else self._globs[word] or f"[^/]{count}"
                parts.append(f"(?P<{word}>(?=[^/]){inner})")
            else:
                parts.append(expression)
        return re.compile("".join(parts), re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and its annotations.

    Attributes:
        image_id: the words of the image's name, joined by "/".
        image: its file.
        words: of its name.
        annotations: (file, words, number of the pattern) of each, in the order of names.
    """

    image_id: str
    image: pathlib.Path
    words: Mapping[str, str]
    annotations: tuple[tuple[pathlib.Path, Mapping[str, str], int], ...]


def pair_files(folder: pathlib.Path, images: str, annotations: Sequence[str]) -> tuple[list[Pair], list[str]]:
    """Finds images and what belongs to them: all words that their patterns share are the same.

    A file that a pattern of annotations takes for an image is no image, even if the pattern of images fits it too.
    Where the characters of a name could be {id} or another word, {id} is the longest one that an image has.

    Args:
        folder: the input folder.
        images: pattern of the images.
        annotations: patterns of what annotates them.

    Returns:
        (pairs in the order of names, unused): images with at least one annotation; the files that some pattern fits and
        that belong to no pair.

    Raises:
        SourceError: a pattern is none, fits no file, shares no word with the images', or two images have one id.
    """
    image_pattern, patterns = Pattern(images), [Pattern(text) for text in annotations]
    shared = [tuple(word for word in pattern.words if word in image_pattern.words) for pattern in patterns]
    for pattern, words in zip(patterns, shared, strict=True):
        if not words:
            raise SourceError(
                f"the patterns {images!r} and {pattern.text!r} share no word: write {{id}} into both, where the names "
                "of an image and its annotation agree"
            )
    files = [path.relative_to(folder).as_posix() for path in limits.list_files(folder)]
    fitting = {name: words for name in files if (words := image_pattern.match(name)) is not None}
    named = fitting
    owned: dict[str, tuple[int, dict[str, str]]] = {}
    for _ in range(2):  # the second time without those that are annotations
        owned = _find_owned(files, patterns, shared, list(named.values()))
        named = {name: words for name, words in named.items() if name not in owned}
    by_key: dict[tuple[int, tuple[str, ...]], list[tuple[str, int, dict[str, str]]]] = {}
    for name, (number, words) in owned.items():
        by_key.setdefault((number, _key(words, shared[number])), []).append((name, number, words))
    _check_found(folder, files, image_pattern, patterns, fitting, named, owned)
    pairs, used = [], set()
    ids: dict[str, str] = {}
    for name, words in named.items():
        mine = [each for number, keys in enumerate(shared) for each in by_key.get((number, _key(words, keys)), ())]
        if not mine:
            continue
        image_id = "/".join(words.values())
        if image_id in ids:
            raise SourceError(
                f"{folder / ids[image_id]} and {folder / name} have the same id {image_id!r}: the pattern {images!r} "
                "needs a word where they differ"
            )
        ids[image_id] = name
        used |= {name, *(annotation for annotation, _, _ in mine)}
        mine.sort(key=lambda each: each[:2])
        annotations_of_it = tuple((folder / annotation, theirs, number) for annotation, number, theirs in mine)
        pairs.append(Pair(image_id, folder / name, words, annotations_of_it))
    known = {*fitting, *owned, *(name for name in files if any(pattern.match(name) for pattern in patterns))}
    return pairs, [str(folder / name) for name in sorted(known - used)]


def _key(words: Mapping[str, str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(words[name] for name in names)


def _find_owned(
    files: Sequence[str],
    patterns: Sequence[Pattern],
    shared: Sequence[tuple[str, ...]],
    images: Sequence[Mapping[str, str]],
) -> dict[str, tuple[int, dict[str, str]]]:
    """Returns (number of the pattern, words) of the files that annotate one of the images, by name."""
    keys = [{_key(words, names) for words in images} for names in shared]
    lengths = sorted({len(words[_ID]) for words in images if _ID in words}, reverse=True)
    return {
        name: found
        for name in files
        if (found := next(_match_owned(name, patterns, shared, keys, lengths), None)) is not None
    }


def _match_owned(
    name: str,
    patterns: Sequence[Pattern],
    shared: Sequence[tuple[str, ...]],
    keys: Sequence[set[tuple[str, ...]]],
    lengths: Sequence[int],
) -> Iterator[tuple[int, dict[str, str]]]:
    for number, pattern in enumerate(patterns):
        if pattern.match(name) is None:
            continue
        for length in lengths if _ID in shared[number] else (0,):
            words = pattern.match(name, length)
            if words is not None and _key(words, shared[number]) in keys[number]:
                yield number, words


def _check_found(
    folder: pathlib.Path,
    files: Sequence[str],
    image_pattern: Pattern,
    patterns: Sequence[Pattern],
    fitting: Mapping[str, object],
    named: Mapping[str, object],
    owned: Mapping[str, object],
) -> None:
    """Raises SourceError where a pattern fits nothing, or nothing belongs together."""
    shown = describe(files, _SHOWN) or "no files"
    if not fitting:
        raise SourceError(f"{folder}: no file is named {image_pattern.text!r}; found {shown}")
    if not named:
        raise SourceError(
            f"{folder}: all files named {image_pattern.text!r} are what the pattern of annotations takes for them, "
            f"such as {describe(fitting, 1)}: make one of the patterns narrower"
        )
    for pattern in patterns:
        if not any(pattern.match(name) for name in files):
            raise SourceError(f"{folder}: no file is named {pattern.text!r}; found {shown}")
    if not owned:
        asked = describe((repr(pattern.text) for pattern in patterns), _SHOWN)
        raise SourceError(
            f"{folder}: no file named {asked} belongs to one named {image_pattern.text!r}, such as "
            f"{describe(named, 1)}: the words that both have must be the same"
        )
