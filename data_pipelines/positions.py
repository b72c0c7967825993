"""Where a box lies in its image, in words: true, false, or too near a border between two words to say.

Truth values are numbers (Kleene's logic), so that "and" is a minimum: 1 is true, 0 false, 0.5 undecided. All words
speak of the image, never of the patient, and mirroring an image turns a word into its mirror image exactly.
"""

import numpy as np

TRUE, UNDECIDED, FALSE = 1.0, 0.5, 0.0
PARTS = ("left", "right", "upper", "lower", "upper left", "upper right", "lower left", "lower right", "center")
MARGIN = 1 / 16  # of the image's side, both ways from its middle; a dyadic number, so that mirroring is exact
_CENTER_REACH = 3 / 16  # beyond it from the middle, a box is not in the center
_LARGEST_IN_CENTER = 1 / 2  # of the image's side: a larger box is not "in" its center


def part_words(part: str) -> str:
    """Returns the words of a part: "in the upper left part of the image"."""
    return "in the center of the image" if part == "center" else f"in the {part} part of the image"


def decide_parts(boxes: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """Decides for each box and each part of the image whether the box lies in it.

    A box is in the left part if all of it is left of the middle by a sixteenth of the width, and is not if its center
    is right of the middle by as much; likewise for the others. It is in the center if its own center is within a
    sixteenth of the image's, and it is no larger than half of it.

    Args:
        boxes: [N, 4] x0 y0 x1 y1 in pixels, half-open.
        height, width: of the image in pixels.

    Returns:
        For each of `PARTS` the truth values float64[N].
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    left, right, in_column = _decide_axis(boxes[:, 0], boxes[:, 2], width)
    upper, lower, in_row = _decide_axis(boxes[:, 1], boxes[:, 3], height)
    halves = {"left": left, "right": right, "upper": upper, "lower": lower}
    corners = {
        f"{vertical} {horizontal}": np.minimum(halves[vertical], halves[horizontal])
        for vertical in ("upper", "lower")
        for horizontal in ("left", "right")
    }
    return {**halves, **corners, "center": np.minimum(in_column, in_row)}


def _decide_axis(start: np.ndarray, end: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the truth of "before the middle", "after it" and "in it" along one axis."""
    middle, margin = length / 2, MARGIN * length
    center = (start + end) / 2
    before = _decide(end <= middle - margin, center >= middle + margin)
    after = _decide(start >= middle + margin, center <= middle - margin)
    away = np.abs(center - middle)
    large = end - start > _LARGEST_IN_CENTER * length
    return before, after, _decide((away <= margin) & ~large, away >= _CENTER_REACH * length)


def _decide(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    return np.where(true, TRUE, np.where(false, FALSE, UNDECIDED))
