"""Left and right change places in words, as they do in a mirrored image."""

import re
from collections.abc import Sequence

Span = tuple[int, int]  # characters (start, end), half-open

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
