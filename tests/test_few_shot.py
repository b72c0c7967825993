"""A few images of each label: enough of each, none without need, the same everywhere."""

import collections
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.medglip_t import get_config
from data_pipelines.few_shot import choose_few
from data_pipelines.loader import train_loader
from data_pipelines.mixture import sampling_rates
from data_pipelines.record_index import read_index, select_records
from data_pipelines.records import read_examples, write_records
from data_pipelines.sources.phantoms import Phantoms
from tests.test_record_index import build, described, make_example

images = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=3).map(set), max_size=40)


@given(images, st.integers(1, 5), st.integers(0, 3))
def test_each_label_has_enough_images_and_each_image_is_needed(labels, count, seed):
    index = build([make_example(labels=sorted(names)) for names in labels])
    total = collections.Counter(name for names in labels for name in names)
    if not total:
        with pytest.raises(ValueError, match=f"few_shot is {count}, but none of the {len(labels)} images has a label"):
            choose_few(index, count, seed)
        return
    chosen = choose_few(index, count, seed)
    assert (np.diff(chosen) > 0).all()
    found = collections.Counter(name for place in chosen for name in labels[place])
    assert all(found[name] >= min(count, total[name]) for name in total)
    assert len(chosen) <= sum(min(count, total[name]) for name in total)
    order = [place for place in np.random.default_rng(seed).permutation(len(labels)) if place in chosen]
    seen = collections.Counter()
    for place in order:  # taken only if a label lacked images when its turn came
        assert min(seen[name] for name in labels[place]) < count
        seen.update(labels[place])


def test_seed_chooses():
    index = build([make_example(labels=[f"label {i % 3}"]) for i in range(60)])
    chosen = [choose_few(index, 2, seed).tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[2]) == 6
    for count, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"few_shot is {count} and config.data.few_shot_seed {seed}"):
            choose_few(index, count, seed)


def test_labels_with_fewer_images_are_reported(caplog):
    contents = [make_example(labels=["often"]) for _ in range(9)] + [make_example(labels=["rare"])] * 2
    with caplog.at_level(logging.INFO):
        choose_few(build(contents), 3, 0)
    assert "5 of 11 images, for 2 labels" in caplog.text
    assert "fewer images: rare (2)" in caplog.text and "often" not in caplog.text


@given(images, st.data())
def test_selected_records_are_those_of_the_index(labels, data):
    index = build([make_example(f"set {len(names)}", labels=sorted(names)) for names in labels])
    places = np.asarray(data.draw(st.lists(st.sampled_from(range(len(labels))), unique=True)) if labels else [], int)
    selected = select_records(index, np.sort(places))
    selected._check()
    assert described(selected) == [described(index)[place] for place in sorted(places)]


def test_a_weight_of_a_data_set_without_chosen_images_is_an_error():
    index = build([make_example("a", labels=["x"]), make_example("b", labels=["x"])])
    one = select_records(index, np.array([0]))
    with pytest.raises(ValueError, match=r"no image of b is among those of config\.data\.few_shot"):
        sampling_rates(one, weights=(("a", 1.0), ("b", 1.0)))
    np.testing.assert_array_equal(sampling_rates(one, weights=(("a", 1.0), ("b", 0.0))), [1.0])


@pytest.mark.parametrize("fields", [{}, {"balance_labels": 0.5}])
def test_all_processes_train_on_the_chosen_images_alone(tmp_path, fields):
    records = write_records(Phantoms(24, size=64), tmp_path, name="phantoms")
    data = get_config().data
    data.update(fields | {"train": str(tmp_path), "canvas": (64, 64), "num_threads": 1, "prefetch": 2, "few_shot": 1})
    chosen = choose_few(read_index(records), 1, data.few_shot_seed)
    assert 4 < len(chosen) < 24
    names = [example.image_id for example in read_examples(records)]

    def epochs(processes):
        loaders = [
            train_loader(data, seed=5, batch_size=4 // processes, process_index=process, process_count=processes)
            for process in range(processes)
        ]
        ids = [name for _ in range(len(chosen)) for loader in loaders for name in next(loader)["image_id"]]
        for loader in loaders:
            loader.close()
        return ids

    found = epochs(1)
    assert found == epochs(2) and set(found) == {names[place] for place in chosen}
    if not fields:
        assert set(collections.Counter(found).values()) == {4}  # each once an epoch
