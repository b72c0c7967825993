"""What the taxonomy says about a label of a region, be it a label of the taxonomy or a data set's own."""

import functools
import re

from data_pipelines.schema import Region
from data_pipelines.sides import swap_sides
from data_pipelines.taxonomy import load_taxonomy, normalize_name

_SIDE_WORD = re.compile(r"(?<![^\W_])(?ai:left|right)(?![^\W_])")


@functools.lru_cache(maxsize=65536)
def find_key(label: str) -> str:
    """Returns what two labels of one structure share: its id in the taxonomy, else the label in plain words."""
    known = load_taxonomy().find(label)
    return known.id if known else normalize_name(label)


@functools.lru_cache(maxsize=65536)
def find_holders(label: str, parent: str = "") -> tuple[str, ...]:
    """Returns the keys of the structures that hold a label, the nearest first.

    Args:
        label: any label.
        parent: what its region says holds it, where the taxonomy does not know the label.
    """
    taxonomy = load_taxonomy()
    if known := taxonomy.find(label):
        return taxonomy.parents(known.id)
    if not parent:
        return ()
    return tuple(key for key in (find_key(parent), *find_holders(parent)) if key != find_key(label))


@functools.lru_cache(maxsize=65536)
def find_truths(label: str, parent: str = "") -> frozenset[str]:
    """Returns the keys of all that is true of an image that shows a label: itself, its holders, and its kinds."""
    taxonomy = load_taxonomy()
    known = taxonomy.find(label)
    above = taxonomy.ancestors(known.id) if known else find_holders(label, parent)
    return frozenset((find_key(label), *above))


def are_related(a: Region, b: Region) -> bool:
    """Whether one of two regions is of what holds the other, of its kind, or the same."""
    return find_key(a.label) in find_truths(b.label, b.parent) or find_key(b.label) in find_truths(a.label, a.parent)


@functools.lru_cache(maxsize=65536)
def find_side(label: str) -> str:
    """Returns "left" or "right" for a structure that is there twice, else "".

    The chambers of the heart are named by sides but do not mirror each other: they have none here.
    """
    known = load_taxonomy().find(label)
    if known:
        inside = {known.id, *load_taxonomy().parents(known.id)}
        return "" if known.side == "none" or "heart" in inside else known.side
    words = normalize_name(label).split()
    sides = {word for word in words if word in ("left", "right")}
    if len(sides) != 1 or len(words) < 2 or {"heart", "atrium", "ventricle", "atrial", "ventricular"} & set(words):
        return ""
    return sides.pop()


@functools.lru_cache(maxsize=65536)
def find_mirrored(label: str) -> str:
    """Returns the key of the same structure on the other side."""
    return find_key(swap_sides(find_key(label)))


def names_side(text: str) -> bool:
    """Whether a text has left or right as a word."""
    return bool(_SIDE_WORD.search(text))


@functools.lru_cache(maxsize=65536)
def remove_side(text: str) -> str:
    """Takes left and right out of a name: "left_kidney" -> "kidney", "rib left 9" -> "rib 9"."""
    text = _SIDE_WORD.sub("", text)
    text = re.sub(r"([_\s-])[_\s-]+", r"\1", text)
    text = re.sub(r"\b(of|in|on|at|to) the\s*$", "", text)
    return text.strip("_- ")
