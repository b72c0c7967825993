"""Splits by patient that copies do not cross: which examples belong together, and where each group goes.

found = find_duplicates(digests, hashes, thumbnails, annotations)   over all data sets of a build
groups = group_examples(patients, image_keys, found.pairs)          the same patient, or the same picture
splits, report = assign_splits(keys, groups, eval_fraction)         train, validation, zero_shot
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.audit_pixels import LEAST_CONTRAST, find_near, look_alike, soften
from data_pipelines.curate import digest_text
from data_pipelines.schema import GroundingExample

ZERO_SHOT = "zero_shot"
_BLANK_RANGE = 4  # grey values from the darkest to the brightest place of a thumbnail that shows nothing
_CHUNK = 4096  # pairs whose thumbnails are held at once
_BLOCK = 256  # of them that are compared at once, for which they become numbers of 8 bytes
_MOST_PAIRS = 1_000_000  # pairs of near hashes, after which the search ends
_LISTED = 10  # largest groups that a report names

Thumbnails = np.ndarray | Callable[[int], np.ndarray]


def digest_annotations(example: GroundingExample) -> int:
    """Returns 64 bits of the labels and boxes of an example, whatever their order; 0 where it has none."""
    if not example.regions:
        return 0
    return _digest("\0".join(sorted(f"{each.label} {np.asarray(each.box).tolist()}" for each in example.regions))) or 1


def _digest(text: str) -> int:
    return int.from_bytes(digest_text(text)[:8], "big")


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Copies among N pictures.

    Attributes:
        exact: int64[N], for each picture the row of the first with the same pixels, its own if there is none.
        near: int64[M, 2], rows of pictures that are nearly the same, the smaller first; one of each set of copies.
        candidates: pairs of near hashes whose thumbnails were compared.
        complete: whether all such pairs were looked at.
    """

    exact: np.ndarray
    near: np.ndarray
    candidates: int
    complete: bool

    @property
    def pairs(self) -> np.ndarray:
        """int64[P, 2]: exact and near copies, for `group_examples`."""
        rows = np.flatnonzero(self.exact != np.arange(len(self.exact)))
        return np.concatenate([np.stack([self.exact[rows], rows], axis=1), self.near])

    def as_dict(self) -> dict[str, Any]:
        return {
            "exact_copies": int((self.exact != np.arange(len(self.exact))).sum()),
            "near_pairs": len(self.near),
            "compared_pairs": self.candidates,
            "complete": self.complete,
        }


def find_duplicates(
    digests: np.ndarray,
    hashes: np.ndarray,
    thumbnails: Thumbnails | None,
    annotations: np.ndarray | None = None,
    most: int = _MOST_PAIRS,
) -> Duplicates:
    """Finds exact copies by digest, and near copies by hash and thumbnail.

    Near copies have hashes within `audit_pixels.HASH_DISTANCE` bits and thumbnails of which `look_alike` is true; they
    are looked for among one of each set of exact copies. Blank pictures (black slices) are equal without being copies:
    they are exact copies only where they have the same annotations, and some, and never near ones.

    Args:
        digests: uint64[N] of `audit_pixels.digest_pixels` or of the encoded images, 0 where unknown.
        hashes: uint64[N] of `audit_pixels.hash_picture`, 0 where unknown.
        thumbnails: uint8[N, 32, 32] of `audit_pixels.shrink`, in memory or mapped from a file; or a function from a row
            to its uint8[32, 32]; or None, which finds no near copies, since hashes alone do not tell one chest from
            another, and takes no picture for blank.
        annotations: uint64[N] of `digest_annotations`; None where there are none.
        most: pairs of near hashes after which the search ends; the result says so.
    """
    digests, hashes = np.asarray(digests, np.uint64), np.asarray(hashes, np.uint64)
    exact = _group_exact(digests, np.arange(len(digests)))
    if thumbnails is None:
        return Duplicates(exact, np.zeros((0, 2), np.int64), 0, True)
    copied = np.unique(exact[exact != np.arange(len(exact))])
    blank = copied[np.asarray([_is_blank(_read_thumbnails(thumbnails, row)) for row in copied[:, None]], bool)]
    exact = _part_blank(exact, np.flatnonzero(np.isin(exact, blank)), annotations)
    kept = np.flatnonzero((exact == np.arange(len(exact))) & (hashes != 0))
    kept = kept[~np.isin(digests[kept], digests[blank])]
    candidates, complete = find_near(hashes[kept], most=most)
    candidates = kept[candidates]
    near = [chunk[_compare(chunk, thumbnails)] for chunk in _chunks(candidates)]
    return Duplicates(exact, np.concatenate([candidates[:0], *near]), len(candidates), complete)


def _group_exact(digests: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first of `rows` with the digest of each, itself where the digest is 0; digests [K], rows int64[K] rising."""
    exact = rows.copy()
    known = np.flatnonzero(digests)
    _, first, inverse = np.unique(digests[known], return_index=True, return_inverse=True)
    exact[known] = rows[known[first[inverse]]]
    return exact


def _part_blank(exact: np.ndarray, rows: np.ndarray, annotations: np.ndarray | None) -> np.ndarray:
    """Leaves blank rows together only where pictures and annotations are the same."""
    if not len(rows):
        return exact
    exact, marks = exact.copy(), np.zeros(len(rows), np.uint64)
    if annotations is not None:
        seen = np.stack([exact[rows].astype(np.uint64), np.asarray(annotations, np.uint64)[rows]])
        marks = np.unique(seen, axis=1, return_inverse=True)[1].astype(np.uint64) + np.uint64(1)
        marks[seen[1] == 0] = 0
    exact[rows] = _group_exact(marks, rows)
    return exact


def _is_blank(small: np.ndarray) -> bool:
    return int(small.max()) - int(small.min()) <= _BLANK_RANGE


def _read_thumbnails(thumbnails: Thumbnails, rows: np.ndarray) -> np.ndarray:
    """uint8[len(rows), 32, 32]."""
    if callable(thumbnails):
        return np.stack([thumbnails(row) for row in rows.tolist()])
    return np.asarray(thumbnails[rows])


def _chunks(pairs: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pairs), _CHUNK):
        yield pairs[start : start + _CHUNK]


def _compare(pairs: np.ndarray, thumbnails: Thumbnails) -> np.ndarray:
    """Whether the pictures of each pair [C, 2] look alike, bool[C]; reads each of them once."""
    rows, places = np.unique(pairs, return_inverse=True)
    small, places = _read_thumbnails(thumbnails, rows), places.reshape(-1, 2)
    alike = [np.zeros(0, bool)]
    for start in range(0, len(places), _BLOCK):
        a, b = (soften(small[column]) for column in places[start : start + _BLOCK].T)  # [block, 32, 32]
        contrast = np.minimum(a.std(axis=(1, 2)), b.std(axis=(1, 2)))
        alike.append(look_alike(a, b) & (contrast >= LEAST_CONTRAST))
    return np.concatenate(alike)


def group_examples(patients: Sequence[str], image_keys: Sequence[str], near_pairs: np.ndarray) -> np.ndarray:
    """Joins examples that must be in one split: of one patient, or with pictures that are the same or nearly.

    Args:
        patients: N keys (`curate.split_key`), "" where the patient is unknown.
        image_keys: N keys; those of examples without a patient join them as a patient's does.
        near_pairs: int64[P, 2] of rows, as `Duplicates.pairs`.

    Returns:
        int64[N]: the first row of each example's group.
    """
    keys = [patient or image for patient, image in zip(patients, image_keys, strict=True)]
    first: dict[str, int] = {}
    same = np.fromiter((first.setdefault(key, row) for row, key in enumerate(keys)), np.int64, len(keys))
    pairs = np.asarray(near_pairs, np.int64).reshape(-1, 2)
    leaders = same
    while True:  # every round takes each group to the smallest of its neighbours, and so on from there
        low = np.minimum(leaders[pairs[:, 0]], leaders[pairs[:, 1]])
        lower = leaders.copy()
        for column in pairs.T:
            np.minimum.at(lower, leaders[column], low)
        while (jumped := lower[lower]).tobytes() != lower.tobytes():
            lower = jumped
        lower = lower[leaders]
        if (lower == leaders).all():
            return leaders
        leaders = lower


def split_share(key: str, seed: int = 0) -> float:
    """Returns the place of a key between 0 and 1, from its hash."""
    return _digest(f"{seed}:{key}") / 2**64


def assign_splits(
    keys: Sequence[str],
    groups: np.ndarray,
    eval_fraction: float,
    *,
    seed: int = 0,
    held_out: np.ndarray | None = None,
) -> tuple[list[str], dict[str, Any]]:
    """Sends each group of examples to a split, by the hash of its smallest key.

    The order of the rows does not matter, a larger fraction only moves groups from train to validation, and a group
    with one key goes where the hash of that key sends it, in whatever data set and build.

    Args:
        keys: N, the patient's key, or the image's where no patient is known.
        groups: int64[N], as `group_examples` makes them.
        eval_fraction: share of the groups that go to "validation", from 0 to 1; the others go to "train".
        seed: of that choice.
        held_out: bool[N], None for none; the whole group of such an example goes to "zero_shot".

    Returns:
        (splits, report): N names; and how many images and groups each split got, the groups that join several keys.

    Raises:
        ValueError: the fraction is not from 0 to 1.
    """
    if not 0 <= eval_fraction <= 1:
        raise ValueError(f"eval_fraction must be from 0 to 1, not {eval_fraction}")
    groups = np.asarray(groups, np.int64)
    held = np.zeros(len(groups), bool) if held_out is None else np.asarray(held_out, bool)
    members = np.unique(groups, return_inverse=True)[1]  # groups as 0, 1, 2 ...
    order = np.argsort(members, kind="stable")
    ends = np.cumsum(np.bincount(members)) if len(members) else np.zeros(0, np.int64)
    kept_out = np.bincount(members, held).astype(bool) if len(members) else held
    names, sizes = [], []  # of each group: split; images, keys and the smallest key
    for number, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        inside = {keys[int(row)] for row in order[start:end]}
        smallest = min(inside)
        validation = split_share(smallest, seed) < eval_fraction
        names.append(ZERO_SHOT if kept_out[number] else "validation" if validation else "train")
        sizes.append((end - start, len(inside), smallest))
    splits = [names[member] for member in members.tolist()]
    return splits, _report(names, sizes, held, eval_fraction)


def _report(
    names: Sequence[str], sizes: Sequence[tuple[int, int, str]], held: np.ndarray, eval_fraction: float
) -> dict[str, Any]:
    images: dict[str, int] = {}
    groups: dict[str, int] = {}
    for name, (count, *_) in zip(names, sizes, strict=True):
        images[name] = images.get(name, 0) + count
        groups[name] = groups.get(name, 0) + 1
    joined = sorted((-count, several, key) for count, several, key in sizes if several > 1)
    seen = images.get("train", 0) + images.get("validation", 0)
    return {
        "images": dict(sorted(images.items())),
        "groups": dict(sorted(groups.items())),
        "groups_of_several": {
            "count": len(joined),
            "images": -sum(count for count, *_ in joined),
            "largest": [{"images": -count, "patients": several} for count, several, _ in joined[:_LISTED]],
        },
        "eval_fraction": eval_fraction,
        "fraction_reached": round(images.get("validation", 0) / seen, 6) if seen else 0.0,
        "held_out": int(held.sum()),
        "held_out_with_them": images.get(ZERO_SHOT, 0) - int(held.sum()),
    }
