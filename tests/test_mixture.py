import collections
import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.mixture import (
    Series,
    rarest_labels,
    rarest_levels,
    repeat_factors,
    sampling_order,
    sampling_rates,
)
from data_pipelines.record_index import RecordIndex
from data_pipelines.schema import GRANULARITIES

SIZES = {"large": 900, "middle": 90, "small": 9}
WEIGHTS = (("middle", 0.3), ("small", 0.1), ("large", 0.6))


def make_index(labels, datasets=None, modalities=None) -> RecordIndex:
    """An index of records with these labels (a string of letters each), data sets and modalities."""
    names = tuple(dict.fromkeys("".join(labels)))
    datasets = datasets or ["set"] * len(labels)
    dataset_names = tuple(dict.fromkeys(datasets))
    return RecordIndex(
        datasets=dataset_names,
        dataset=np.asarray([dataset_names.index(name) for name in datasets], np.int32),
        modality=np.asarray(modalities or [0] * len(labels), np.int8),
        label_names=names,
        label_offsets=np.cumsum([0, *map(len, labels)]),
        label_ids=np.asarray([names.index(label) for label in "".join(labels)], np.int32),
    )


def random_index(seed: int, count: int = 999) -> RecordIndex:
    rng = np.random.default_rng(seed)
    labels = ["".join(rng.choice(list("aaaabbc"), rng.integers(0, 3), replace=False)) for _ in range(count)]
    labels = ["".join(dict.fromkeys(text)) for text in labels]
    datasets = [name for name, size in SIZES.items() for _ in range(size)][:count]
    return make_index(labels, datasets, rng.choice(3, count, p=[0.7, 0.2, 0.1]).tolist())


INDEX = random_index(0)


def shares(index: RecordIndex, records, attribute: str = "dataset") -> np.ndarray:
    values = getattr(index, attribute)
    return np.bincount(values[records], minlength=values.max() + 1) / len(records)


def make_series(index: RecordIndex, seed: int = 0, **options) -> Series:
    return Series(len(index), seed, sampling_rates(index, **options), sampling_order(index, seed))


def test_without_rates_an_epoch_is_every_record_once_and_each_epoch_has_its_own_order():
    series = Series(50, 3)
    epochs = [[series[place] for place in range(start, start + 50)] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_series_is_a_function_of_seed_and_place():
    series, again = make_series(INDEX, 5, weights=WEIGHTS), make_series(INDEX, 5, weights=WEIGHTS)
    places = np.random.default_rng(0).integers(0, 4 * series.length, 300).tolist()
    found = [series[place] for place in places]
    assert [again[place] for place in reversed(places)] == found[::-1]
    assert [pickle.loads(pickle.dumps(series))[place] for place in places] == found
    other = make_series(INDEX, 6, weights=WEIGHTS)
    assert [other[place] for place in places] != found


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 4), min_size=1, max_size=12).filter(lambda rates: sum(rates) >= 1),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
)
def test_every_run_of_records_comes_as_often_as_expected_rounded_up_or_down(rates, epoch, seed):
    rates = np.asarray(rates)
    series = Series(len(rates), seed, rates)
    counts = np.bincount(series.epoch(epoch), minlength=len(rates))
    assert counts.sum() == series.length == round(rates.sum())
    expected = rates * series.length / rates.sum()
    for start, end in itertools.combinations(range(len(rates) + 1), 2):
        assert abs(counts[start:end].sum() - expected[start:end].sum()) < 1 + 1e-9
    assert not counts[rates == 0].any()


def test_record_of_a_small_rate_waits_no_longer_than_three_times_its_turn():
    rates = np.asarray([0.23, 0.04, 1.73])
    series = Series(3, 1, rates)
    visits = np.asarray([np.bincount(series.epoch(epoch), minlength=3) for epoch in range(600)])
    np.testing.assert_allclose(visits.mean(axis=0), rates, atol=0.01)
    for record in range(2):
        gaps = np.diff(np.flatnonzero(visits[:, record]))
        assert gaps.max() <= 3 / rates[record]


def test_weights_are_the_shares_of_the_data_sets_in_every_epoch():
    series = make_series(INDEX, weights=WEIGHTS)
    assert series.length == len(INDEX)
    for epoch in range(3):
        np.testing.assert_allclose(shares(INDEX, series.epoch(epoch)), [0.6, 0.3, 0.1], atol=1.01 / series.length)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8, 16])
def test_every_host_sees_the_weights(hosts):
    series = make_series(INDEX, weights=WEIGHTS)
    expected = np.asarray([0.6, 0.3, 0.1])
    places = range(20 * series.length)
    for host in range(hosts):
        mine = np.asarray([series[place] for place in places[host::hosts]])
        deviation = np.sqrt(expected * (1 - expected) / len(mine))  # of draws by chance
        assert (np.abs(shares(INDEX, mine) - expected) < 4 * deviation + 1e-3).all()


def test_data_set_of_weight_zero_never_comes():
    series = make_series(INDEX, weights=(("large", 1), ("middle", 0), ("small", 3)))
    found = shares(INDEX, np.concatenate([series.epoch(epoch) for epoch in range(4)]))
    np.testing.assert_allclose(found, [0.25, 0, 0.75], atol=0.002)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_modalities_are_balanced_by_temperature(temperature):
    rates = sampling_rates(INDEX, balance_modalities=temperature)
    wanted = np.bincount(INDEX.modality) ** (1 - temperature)
    np.testing.assert_allclose(np.bincount(INDEX.modality, rates) / rates.sum(), wanted / wanted.sum())
    assert rates.sum() == pytest.approx(len(INDEX))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_labels_are_balanced_by_the_rarest_of_an_image_and_normal_images_are_a_group(temperature):
    index = make_index(["a"] * 6 + ["ab"] * 2 + [""] * 4)
    rates = sampling_rates(index, balance_labels=temperature)
    wanted = np.asarray([6, 2, 4]) ** (1 - temperature)
    found = [rates[:6].sum(), rates[6:8].sum(), rates[8:].sum()]
    np.testing.assert_allclose(np.divide(found, rates.sum()), wanted / wanted.sum())


def leveled_index() -> RecordIndex:
    """Images of an organ, an organ and a lesion, an unknown label, a lesion, and nothing; the modality alternates."""
    labels = ["a"] * 12 + ["ab"] * 4 + ["c"] * 3 + ["d"] * 2 + [""] * 6
    index = make_index(labels, modalities=[k % 2 for k in range(len(labels))])
    return dataclasses.replace(index, label_names=("liver", "liver_tumor", "of nobody", "melanoma"))


def test_granularity_of_an_image_is_its_rarest():
    levels = rarest_levels(leveled_index()).tolist()
    organ, lesion = GRANULARITIES.index("organ"), GRANULARITIES.index("lesion")
    assert levels == [organ] * 12 + [lesion] * 4 + [len(GRANULARITIES)] * 3 + [lesion] * 2 + [-1] * 6
    assert rarest_levels(make_index(["", ""])).tolist() == [-1, -1]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_granularities_are_balanced_by_temperature(temperature):
    index = leveled_index()
    rates = sampling_rates(index, balance_granularities=temperature)
    images = np.bincount(rarest_levels(index) + 1)  # [without labels, region, organ, ..., unknown]
    wanted = images ** (1 - temperature) * (images > 0)
    found = np.bincount(rarest_levels(index) + 1, rates)
    np.testing.assert_allclose(np.divide(found, rates.sum()), wanted / wanted.sum())
    assert rates.sum() == pytest.approx(len(index))


def test_granularities_are_balanced_inside_modalities_and_labels_inside_granularities():
    index = leveled_index()
    rates = sampling_rates(index, balance_modalities=1.0, balance_granularities=1.0, balance_labels=1.0)
    levels, labels = rarest_levels(index), rarest_labels(index)
    assert rates[index.modality == 0].sum() == pytest.approx(rates.sum() / 2)
    for modality in (0, 1):
        groups = [rates[(index.modality == modality) & (levels == level)] for level in set(levels.tolist())]
        np.testing.assert_allclose([group.sum() for group in groups], rates.sum() / 8)
        lesions = (index.modality == modality) & (levels == GRANULARITIES.index("lesion"))
        parts = [rates[lesions & (labels == label)].sum() for label in set(labels[lesions].tolist())]
        np.testing.assert_allclose(parts, rates.sum() / 8 / len(parts))


@given(st.integers(0, 2**32 - 1))
def test_every_epoch_has_the_shares_of_the_granularities(seed):
    index = leveled_index()
    rates = sampling_rates(index, balance_granularities=1.0)
    order = sampling_order(index, seed, by_level=True)
    assert sorted(order.tolist()) == list(range(len(index)))
    levels = rarest_levels(index)[order]
    runs = [len(list(group)) for _, group in itertools.groupby(zip(index.modality[order], levels, strict=True))]
    assert len(runs) == 8  # one of each modality and granularity
    series = Series(len(index), seed, rates, order)
    counts = np.bincount(rarest_levels(index)[series.epoch(seed % 5)] + 1, minlength=7)
    assert (np.abs(counts[[0, 2, 4, 6]] - len(index) / 4) <= 2).all()  # a run in each of two modalities


def test_weights_stay_exact_beside_balancing_which_is_inside_data_set_and_modality():
    rates = sampling_rates(INDEX, weights=WEIGHTS, balance_modalities=1.0, balance_labels=1.0, repeat_threshold=0.3)
    groups = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(float)))
    for dataset, modality, label, rate in zip(
        INDEX.dataset.tolist(), INDEX.modality.tolist(), rarest_labels(INDEX).tolist(), rates, strict=True
    ):
        groups[dataset][modality][label] += rate
    sums = [sum(sum(labels.values()) for labels in groups[dataset].values()) for dataset in range(3)]
    np.testing.assert_allclose(np.divide(sums, rates.sum()), [0.6, 0.3, 0.1])
    for modalities in groups.values():
        totals = [sum(labels.values()) for labels in modalities.values()]
        np.testing.assert_allclose(totals, totals[0])
        for labels in modalities.values():
            np.testing.assert_allclose(list(labels.values()), next(iter(labels.values())))


def test_rare_labels_are_repeated_as_in_lvis():
    index = make_index(["a"] * 96 + ["b", "ab", "c", ""])
    factors = repeat_factors(index, 0.08)
    np.testing.assert_allclose(factors, [1.0] * 96 + [2, 2, math.sqrt(8), 1])
    np.testing.assert_allclose(sampling_rates(index, repeat_threshold=0.08), factors)
    series = make_series(index, repeat_threshold=0.08)
    assert series.length == round(factors.sum())
    counts = np.asarray([np.bincount(series.epoch(epoch), minlength=100) for epoch in range(200)])
    assert set(counts[:, 98]) == {2, 3}
    np.testing.assert_allclose(counts.mean(axis=0), factors, atol=0.05)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"weights": (("large", 1), ("smal", 1))}, "no data set 'smal', the nearest is 'small'"),
        ({"weights": (("large", 1), ("small", 1))}, "middle has no weight; 0 leaves a data set out"),
        ({"weights": (("large", 1), ("large", 1))}, "'large' is there twice"),
        ({"weights": (("large", -1),)}, "the weight of 'large' must be a number of at least 0"),
        ({"weights": (("large", float("nan")),)}, "the weight of 'large'"),
        ({"weights": tuple((name, 0) for name in SIZES)}, "all weights are 0"),
        ({"weights": ("large", 1.0)}, "expected pairs such as"),
        ({"balance_modalities": 1.5}, r"config\.data\.balance_modalities is 1\.5"),
        ({"balance_granularities": 2}, r"config\.data\.balance_granularities is 2"),
        ({"balance_labels": -0.5}, r"config\.data\.balance_labels is -0\.5"),
        ({"repeat_threshold": 1}, r"config\.data\.repeat_threshold is 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        sampling_rates(INDEX, **options)


def test_no_more_than_two_epochs_are_kept():
    series = Series(10, 0)
    for place in [0, 10, 20, 0, 30]:
        series[place]
    assert len(series._epochs) == 2
