"""Which record stands at which place of the endless training series: a function of seed and place, of nothing else.

Every record has a rate, its expected visits in an epoch. The records lie one after another on a line, each as long as
its rate, and an epoch visits what lies at the whole numbers plus an offset (systematic sampling): a record of rate r is
visited r times rounded up or down, and so is every run of neighbours, such as a data set. The offset moves on by the
golden ratio from epoch to epoch, which spreads the visits of a record of a small rate evenly over the epochs. The
visits of an epoch are shuffled, so that processes that take every n-th place have the same shares up to chance.
"""

import difflib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.record_index import RecordIndex
from data_pipelines.schema import GRANULARITIES
from data_pipelines.taxonomy import load_taxonomy

_STEP = (5**0.5 - 1) / 2  # of the offset: no multiple of it comes near a whole number
_ORDER, _OFFSET, _SHUFFLE = 1, 2, 3  # keep the draws of one seed apart


def repeat_factors(index: RecordIndex, threshold: float) -> np.ndarray:
    """Returns float64[N], at least 1: how often images of rare labels are repeated in an epoch.

    As in LVIS (arXiv 1908.03195, appendix B.3): a label in the share f of the images has max(1, sqrt(threshold / f)),
    an image the largest of its labels.
    """
    shares = _images_of_labels(index) / max(len(index), 1)
    of_label = np.maximum(1, np.sqrt(threshold / np.maximum(shares, np.finfo(float).tiny)))
    return _over_labels(np.maximum, of_label, index, 1.0)


def rarest_labels(index: RecordIndex) -> np.ndarray:
    """Returns int64[N]: the label of each image that the fewest images have, -1 for an image without any."""
    order = np.argsort(_images_of_labels(index), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return np.append(order, -1)[_over_labels(np.minimum, rank, index, len(order))]


def rarest_levels(index: RecordIndex) -> np.ndarray:
    """Returns int64[N]: the granularity of each image that the fewest images have, -1 for an image without labels.

    It is the position in `schema.GRANULARITIES` that the taxonomy gives a label, or one more for labels that it does
    not know.
    """
    known = [load_taxonomy().find(name) for name in index.label_names]
    level = [GRANULARITIES.index(entry.granularity) if entry else len(GRANULARITIES) for entry in known]
    records = np.repeat(np.arange(len(index)), np.diff(index.label_offsets))
    has = np.zeros((len(index), len(GRANULARITIES) + 1), bool)
    has[records, np.asarray(level, np.int64)[index.label_ids]] = True
    order = np.argsort(has.sum(axis=0), kind="stable")
    return np.where(has.any(axis=1), order[np.argmax(has[:, order], axis=1)], -1)


def _images_of_labels(index: RecordIndex) -> np.ndarray:
    return np.bincount(index.label_ids, minlength=len(index.label_names))


def _over_labels(reduce: np.ufunc, values: np.ndarray, index: RecordIndex, without: float) -> np.ndarray:
    """Reduces a value of each label over the labels of each record; `without` is that of a record without labels."""
    starts, counts = index.label_offsets[:-1], np.diff(index.label_offsets)
    result = np.full(len(index), without, values.dtype)
    if len(index.label_ids):
        result[counts > 0] = reduce.reduceat(values[index.label_ids], starts[counts > 0])
    return result


def sampling_rates(
    index: RecordIndex,
    *,
    weights: Sequence[tuple[str, float]] = (),
    balance_modalities: float = 0.0,
    balance_granularities: float = 0.0,
    balance_labels: float = 0.0,
    repeat_threshold: float = 0.0,
) -> np.ndarray:
    """Returns float64[N]: the expected visits of each record in an epoch.

    Their sum, the length of an epoch, is N, or more where rare labels are repeated. Data sets have exactly the shares
    that `weights` give; modalities are balanced inside a data set then, granularities inside a modality and labels
    inside a granularity, where several are.

    Args:
        index: of the N records.
        weights: (data set, share) for every data set, shares relative to their sum; () leaves them as they come.
        balance_modalities: t from 0 (as they come) to 1 (equal shares): the share of a modality with n images is
            proportional to n ** (1 - t).
        balance_granularities: the same for groups of images with the same rarest granularity, see `rarest_levels`.
        balance_labels: the same for groups of images with the same rarest label; those without labels are a group.
        repeat_threshold: see `repeat_factors`; 0 repeats nothing.

    Raises:
        ValueError: a value is out of range, or the weights do not name exactly the data sets that are there.
    """
    for name, value in {
        "balance_modalities": balance_modalities,
        "balance_granularities": balance_granularities,
        "balance_labels": balance_labels,
    }.items():
        if not 0 <= value <= 1:
            raise ValueError(f"config.data.{name} is {value}: it must be from 0 (as they come) to 1 (equal shares)")
    if not 0 <= repeat_threshold < 1:
        raise ValueError(
            f"config.data.repeat_threshold is {repeat_threshold}: it must be at least 0 and below 1, a share of images"
        )
    shares = _check_weights(index, weights)
    rates = repeat_factors(index, repeat_threshold)
    length = rates.sum()
    pool = index.dataset.astype(np.int64) if weights else np.zeros(len(index), np.int64)
    # Groups inside of groups, the outermost first.
    levels: list[tuple[np.ndarray, float]] = []
    for temperature, group in (
        (balance_modalities, lambda: index.modality),
        (balance_granularities, lambda: rarest_levels(index)),
        (balance_labels, lambda: rarest_labels(index)),
    ):
        if temperature:
            levels.append((_pairs(levels[-1][0] if levels else pool, group()), temperature))
    for groups, temperature in reversed(levels):
        rates = _balance(rates, groups, temperature)
    if weights:
        rates = rates * (shares[pool] / np.bincount(pool, rates, len(shares))[pool])
    return rates * (length / rates.sum())


def _pairs(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Returns int64[N], a number for each pair of groups; inner ones from -1."""
    return outer * (int(inner.max(initial=-1)) + 2) + inner + 1


def _balance(rates: np.ndarray, groups: np.ndarray, temperature: float) -> np.ndarray:
    """Scales rates so that the n images of a group together have n ** (1 - temperature)."""
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return rates * (counts ** (1 - temperature) / np.bincount(group, rates))[group]


def _check_weights(index: RecordIndex, weights: Sequence[tuple[str, float]]) -> np.ndarray:
    """Returns float64[D], the share of each data set of the index."""
    field = f"config.data.mixture_weights is {tuple(weights)!r}"
    shares: dict[str, float] = {}
    for entry in weights:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(f"{field}: expected pairs such as (('{index.datasets[0]}', 1.0),)")
        name, weight = entry
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{field}: the weight of {name!r} must be a number of at least 0")
        if name not in index.datasets:
            nearest = difflib.get_close_matches(name, index.datasets, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{field}: the records hold no data set {name!r}, the nearest is {nearest!r}; "
                f"they hold {', '.join(index.datasets)}"
            )
        if name in shares:
            raise ValueError(f"{field}: {name!r} is there twice")
        shares[name] = float(weight)
    if weights and (missing := [name for name in index.datasets if name not in shares]):
        raise ValueError(f"{field}: {', '.join(missing)} has no weight; 0 leaves a data set out")
    images = np.bincount(index.dataset, minlength=len(index.datasets))
    if empty := [name for name, count in zip(index.datasets, images, strict=True) if not count and shares.get(name)]:
        raise ValueError(f"{field}: no image of {', '.join(empty)} is among those of config.data.few_shot: weigh it 0")
    if weights and not any(shares.values()):
        raise ValueError(f"{field}: all weights are 0")
    return np.asarray([shares.get(name, 0.0) for name in index.datasets])


def sampling_order(index: RecordIndex, seed: int, *, by_level: bool = False) -> np.ndarray:
    """Returns int64[N]: the records by data set, modality and rarest label, shuffled where all three are the same.

    With `by_level` the rarest granularity comes before the label.
    """
    chance = np.random.default_rng([seed, _ORDER]).permutation(len(index))
    level = (rarest_levels(index),) if by_level else ()
    return np.lexsort((chance, rarest_labels(index), *level, index.modality, index.dataset))


class Series:
    """The endless series of records, epoch after epoch: `series[place]`; picklable, and safe to use from threads.

    It keeps 4 bytes for each place of two epochs, and 16 for each record where rates are given.

    Attributes:
        length: places of an epoch.
    """

    def __init__(
        self, num_records: int, seed: int, rates: np.ndarray | None = None, order: np.ndarray | None = None
    ) -> None:
        """Lays the records on the line.

        Args:
            num_records: N.
            seed: of the order, 0 or more.
            rates: float64[N], expected visits of each record in an epoch, 0 or more; their sum is rounded to the length
                of an epoch. None visits each once.
            order: int[N], the records as they lie on the line: those that should together come as often as they are
                expected to lie together. None is their own order.
        """
        self.seed = seed
        self.length = num_records
        self._ends: np.ndarray | None = None
        self._order = order
        if rates is not None:
            ends = np.cumsum(rates if order is None else rates[order])
            self.length = max(1, round(float(ends[-1])))
            self._ends = ends * (self.length / ends[-1])
        self._type = np.int32 if max(num_records, self.length) < 2**31 else np.int64
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_epochs": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __getitem__(self, place: int) -> int:
        number, slot = divmod(place, self.length)
        epoch = self._epochs.get(number)
        return int((self.epoch(number) if epoch is None else epoch)[slot])

    def epoch(self, number: int) -> np.ndarray:
        """Returns int[length], the records that an epoch visits, in its order."""
        with self._lock:  # threads that come to a new epoch together wait for the first of them
            if number not in self._epochs:
                for old in list(self._epochs)[:-1]:  # examples made ahead are of two epochs where one ends
                    del self._epochs[old]
                self._epochs[number] = self._make_epoch(number)
            return self._epochs[number]

    def _make_epoch(self, number: int) -> np.ndarray:
        records = np.arange(self.length, dtype=self._type)
        if self._ends is not None:
            start = np.random.default_rng([self.seed, _OFFSET]).random()
            points = records + (start + number * _STEP) % 1
            points = np.minimum(points, np.nextafter(self._ends[-1], 0))  # rounding must not lead beyond the last one
            records = np.searchsorted(self._ends, points, side="right").astype(self._type)
            if self._order is not None:
                records = self._order[records].astype(self._type)
        return np.random.default_rng([self.seed, _SHUFFLE, number]).permutation(records)
