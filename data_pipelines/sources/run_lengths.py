"""Run lengths as tables write them: "start length start length ..." of a mask's pixels."""

import numpy as np

RUNS = ("relative", "absolute")
ORDERS = ("columns", "rows")


def decode_runs(text: str, size: tuple[int, int], runs: str, order: str = "columns") -> np.ndarray:
    """Decodes a mask.

    Args:
        text: whole numbers, two a run: where it starts, and its length.
        size: (height, width) of the mask.
        runs: "absolute", where pixels count from 1, as Kaggle has them since 2017 (the 2018 Data Science Bowl); or
            "relative", where a start counts from the end of the run before, and the first from 0 (SIIM-ACR).
        order: of the pixels: "columns" one after the other, each from its top, or "rows", each from its left.

    Returns:
        bool[height, width].

    Raises:
        ValueError: the numbers are no runs, or do not fit the mask; the message says which.
    """
    height, width = size
    try:
        numbers = np.asarray([int(word) for word in text.split()], np.int64)
    except (ValueError, OverflowError):
        raise ValueError(f"expected whole numbers, two a run, found {text[:60]!r}") from None
    if numbers.size % 2:
        raise ValueError(f"has {numbers.size} numbers, expected two a run")
    starts, lengths = numbers[::2], numbers[1::2]
    if (lengths < 1).any() or (lengths > height * width).any():
        raise ValueError(f"has a run of {lengths[(lengths < 1) | (lengths > height * width)][0]} pixels")
    if (starts < 0).any() or (starts > height * width).any():
        raise ValueError(f"has a run that starts at {starts[(starts < 0) | (starts > height * width)][0]}")
    if runs == "absolute":
        firsts = starts - 1
        if (firsts[:1] < 0).any() or (firsts[1:] < firsts[:-1] + lengths[:-1]).any():
            raise ValueError("has runs that begin before the one before ends: are they relative?")
    else:
        firsts = np.cumsum(starts + lengths) - lengths
    if firsts.size and firsts[-1] + lengths[-1] > height * width:
        other = "absolute" if runs == "relative" else "relative"
        raise ValueError(f"has runs beyond the end of the image, {width} x {height} pixels: are they {other}?")
    steps = np.zeros(height * width + 1, np.int8)
    steps[firsts] += 1
    steps[firsts + lengths] -= 1
    mask = np.cumsum(steps[:-1], dtype=np.int8).view(bool)
    return mask.reshape(height, width) if order == "rows" else mask.reshape(width, height).T


def encode_runs(mask: np.ndarray, runs: str, order: str = "columns") -> str:
    """Encodes a bool[height, width] mask, the reverse of `decode_runs`."""
    pixels = mask.ravel() if order == "rows" else mask.T.ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels.astype(np.int8), [0]])))
    firsts, ends = edges[::2], edges[1::2]
    starts = firsts + 1 if runs == "absolute" else firsts - np.concatenate([[0], ends[:-1]])[: firsts.size]
    return " ".join(f"{start} {length}" for start, length in zip(starts, ends - firsts, strict=True))
