import ast
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import pathlib

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import data_pipelines
from configs.medglip_t import get_config
from data_pipelines.loader import ExampleSource, eval_loader, train_loader
from data_pipelines.records import FORMATS, RecordsError, find_shards, write_records
from data_pipelines.schema import MODALITIES, GroundingExample, Region
from data_pipelines.text import load_tokenizer

CANVAS = (24, 32)
MAX_BOXES, MAX_TOKENS = 3, 24
COUNT = 11  # examples, in three shards


def png(height: int, width: int, seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(1, 256, (height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def make_example(index: int) -> GroundingExample:
    """Chests with one side annotated, or both, or, every fourth, nothing at all."""
    height, width = 10 + index, 24 - index
    left = Region(np.asarray([width - 6, 1, width - 1, 9], np.float32), "left lung", "left_lung", "organ", "lung")
    right = Region(np.asarray([1.5, 2, 6, 8.25], np.float32), "right lung", "right_lung", "organ", "lung")
    regions = [(), (left,), (right,), (left, right)][index % 4]
    caption = "The left lung; the right lung." if index % 4 == 3 else ""
    if caption:
        spans = (((4, 13),), ((19, 29),))
        regions = tuple(dataclasses.replace(r, spans=s) for r, s in zip(regions, spans, strict=True))
    return GroundingExample(
        image=png(height, width, index),
        image_id=f"image {index}",
        dataset="set",
        height=height,
        width=width,
        modality="xray" if index % 2 else "ct",
        caption=caption,
        regions=regions,
        absent=("fracture",) if index % 3 == 0 else (),
    )


@pytest.fixture(scope="module", params=FORMATS)
def path(request, tmp_path_factory) -> str:
    """Records of `COUNT` examples in three shards, in both formats."""
    directory = tmp_path_factory.mktemp("records") / "set"
    examples = [make_example(index) for index in range(COUNT)]
    write_records(examples, directory, name="set", file_format=request.param, num_shards=3)
    return str(directory)


def recipe(path: str, **changes):
    data = get_config().data
    data.update(
        train=path,
        canvas=CANVAS,
        max_boxes=MAX_BOXES,
        max_tokens=MAX_TOKENS,
        max_negatives=3,
        num_threads=2,
        prefetch=4,
        expression_probability=0.0,
        prefix_probability=0.0,
        parents_positive_probability=0.0,
        variant_probability=0.0,
    )
    data.update(changes)
    return data.lock()


@contextlib.contextmanager
def opened(
    data, *, seed: int = 0, batch_size: int = 2, process: int = 0, processes: int = 1, places=None, quarantine=None
):
    loader = train_loader(
        data,
        seed=seed,
        batch_size=batch_size,
        process_index=process,
        process_count=processes,
        places=places,
        quarantine=quarantine,
    )
    try:
        yield loader
    finally:
        loader.close()


def take(data, count: int, **options) -> list[dict[str, np.ndarray]]:
    with opened(data, **options) as loader:
        return list(itertools.islice(loader, count))


def evaluate(data, path: str, batch_size: int = 2, process: int = 0, processes: int = 1):
    return eval_loader(data, path=path, batch_size=batch_size, process_index=process, process_count=processes)


def assert_batches_equal(found, expected) -> None:
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def rows(batches) -> list[dict[str, np.ndarray]]:
    return [{key: batch[key][i] for key in batch} for batch in batches for i in range(len(batch["image"]))]


def join(parts) -> list[dict[str, np.ndarray]]:
    """The rows of the global batches that the batches of all processes make, one process after another."""
    return [row for batches in zip(*parts, strict=True) for row in rows(batches)]


def ids(batches) -> list[str]:
    return [str(row["image_id"]) for row in rows(batches)]


ALL_IDS = sorted(f"image {index}" for index in range(COUNT))


def test_training_batch_has_the_documented_arrays(path):
    (batch,) = take(recipe(path), 1, batch_size=5)
    image_ids = batch.pop("image_id")
    assert image_ids.shape == (5,) and image_ids.dtype.kind == "U"
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((5, *CANVAS, 3), np.uint8),
        "image_size": ((5, 2), np.int32),
        "input_ids": ((5, MAX_TOKENS), np.int32),
        "attention_mask": ((5, MAX_TOKENS), np.int32),
        "boxes": ((5, MAX_BOXES, 4), np.float32),
        "box_mask": ((5, MAX_BOXES), np.bool_),
        "positive_map": ((5, MAX_BOXES, MAX_TOKENS), np.float32),
        "modality": ((5,), np.int32),
    }
    for image_id, modality in zip(image_ids, batch["modality"], strict=True):
        assert MODALITIES[modality] == make_example(int(image_id.split()[1])).modality


def test_boxes_and_positive_maps_are_there_for_every_region_and_zero_after_them(path):
    for row in rows(take(recipe(path, caption_probability=0.5), 2 * COUNT)):
        count = len(make_example(int(row["image_id"].split()[1])).regions)
        height, width = row["image_size"]
        assert row["box_mask"].tolist() == [True] * count + [False] * (MAX_BOXES - count)
        np.testing.assert_allclose(row["positive_map"].sum(axis=1), row["box_mask"], atol=1e-6)
        assert not row["positive_map"][:, row["attention_mask"] == 0].any()
        boxes = row["boxes"][:count]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= [width, height] * 2).all()
        assert not row["boxes"][count:].any()
        assert row["image"][:height, :width].any(axis=-1).all()
        assert not row["image"][height:].any() and not row["image"][:, width:].any()


def test_image_size_is_drawn_from_the_scale_range(path):
    for low, high in [(0.5, 0.5), (0.25, 1.0)]:
        shares = [max(row["image_size"] / CANVAS) for row in rows(take(recipe(path, scale_range=(low, high)), COUNT))]
        assert min(shares) >= low - 0.03 and max(shares) <= high + 0.03
    assert len(set(shares)) > COUNT


def test_same_seed_gives_the_same_batches_whatever_the_threads(path):
    expected = take(recipe(path, num_threads=1, prefetch=1), COUNT)
    for num_threads, prefetch in [(1, 1), (3, 7), (0, 4)]:
        assert_batches_equal(take(recipe(path, num_threads=num_threads, prefetch=prefetch), COUNT), expected)


def test_both_formats_give_the_same_batches(path, tmp_path):
    other = FORMATS[1 - FORMATS.index(find_shards(path).format)]
    examples = [make_example(index) for index in range(COUNT)]
    write_records(examples, tmp_path / "set", name="set", file_format=other, num_shards=3)
    assert_batches_equal(take(recipe(path), 3), take(recipe(str(tmp_path / "set")), 3))


def test_another_seed_gives_another_order_and_other_prompts(path):
    first, second = take(recipe(path), COUNT), take(recipe(path), COUNT, seed=1)
    assert ids(first) != ids(second)
    prompts = [{row["image_id"]: row["input_ids"].tolist() for row in rows(batches)} for batches in (first, second)]
    assert prompts[0] != prompts[1]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_together_see_every_example_once_an_epoch(path, processes):
    batches = -(-2 * COUNT // (2 * processes))
    parts = [take(recipe(path), batches, process=p, processes=processes) for p in range(processes)]
    series = join(parts)[: 2 * COUNT]
    epochs = [[row["image_id"] for row in series[:COUNT]], [row["image_id"] for row in series[COUNT:]]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == ALL_IDS
    assert epochs[0] != epochs[1]
    alone = rows(take(recipe(path), COUNT))
    for row, expected in zip(series, alone, strict=True):
        np.testing.assert_array_equal(row["image"], expected["image"])
        np.testing.assert_array_equal(row["input_ids"], expected["input_ids"])


def test_an_example_is_augmented_anew_in_each_epoch(path):
    seen = {}
    for row in rows(take(recipe(path), 2 * COUNT)):
        seen.setdefault(str(row["image_id"]), []).append((row["image"].tobytes(), row["input_ids"].tobytes()))
    assert {len(views) for views in seen.values()} == {4}
    assert sum(len(set(views)) for views in seen.values()) > 0.9 * 4 * COUNT  # two of one size and prompt may meet


def test_split_of_one_example_goes_on_for_ever(tmp_path):
    write_records([make_example(3)], tmp_path, name="set")
    assert ids(take(recipe(str(tmp_path)), 3, batch_size=4)) == ["image 3"] * 12


def test_another_seed_augments_the_same_order_differently(tmp_path):
    write_records([make_example(3)], tmp_path, name="set")
    first, second = (np.concatenate([b["image"] for b in take(recipe(str(tmp_path)), 6, seed=s)]) for s in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("before", [0, 1, 7])
def test_state_goes_on_with_exactly_the_next_batches(path, before):
    data = recipe(path)
    with opened(data) as loader:
        seen = list(itertools.islice(loader, before))
        state = json.loads(json.dumps(loader.get_state()))
        expected = list(itertools.islice(loader, 4))
        loader.set_state(state)
        assert_batches_equal(list(itertools.islice(loader, 4)), expected)
    with opened(data) as fresh:
        fresh.set_state(state)
        assert_batches_equal(list(itertools.islice(fresh, 4)), expected)
    assert_batches_equal(seen + expected, take(data, before + 4))


def test_state_goes_through_an_orbax_checkpoint(path, tmp_path):
    data = recipe(path)
    handlers = {"loader": grain.checkpoint.CheckpointHandler()}
    with opened(data) as loader, ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        list(itertools.islice(loader, 3))
        manager.save(3, args=ocp.args.Composite(loader=grain.checkpoint.CheckpointSave(loader)))
        expected = list(itertools.islice(loader, 3))
        manager.wait_until_finished()
        with opened(data) as fresh:
            manager.restore(3, args=ocp.args.Composite(loader=grain.checkpoint.CheckpointRestore(fresh)))
            assert_batches_equal(list(itertools.islice(fresh, 3)), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_process_reads_the_rows_that_its_devices_hold_in_their_place(path, num_workers):
    data = recipe(path, num_workers=num_workers)
    held = {0: (0, 5), 1: (2, 3), 2: (1, 4)}
    parts = {p: take(data, 2, process=p, processes=3, places=places) for p, places in held.items()}
    for batch, expected in enumerate(take(recipe(path), 2, batch_size=6)):
        for process, places in held.items():
            for row, place in enumerate(places):
                assert parts[process][batch]["image_id"][row] == expected["image_id"][place]
                np.testing.assert_array_equal(parts[process][batch]["image"][row], expected["image"][place])


@pytest.mark.parametrize("places", [(0,), (0, 4), (-1, 0)])
def test_places_outside_the_global_batch_are_an_error(path, places):
    with (
        pytest.raises(ValueError, match="reads 2 rows of a global batch of 4"),
        opened(recipe(path), processes=2, places=places),
    ):
        pass


@pytest.mark.parametrize(("saved_by", "gone_on_by"), [(1, 2), (4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_another_number_of_processes_goes_on_with_exactly_the_next_global_batch(
    path, saved_by, gone_on_by, num_threads
):
    data = recipe(path, num_threads=num_threads, mixture_weights=(("set", 1.0),), balance_labels=0.5)

    def load(processes: int, state=None) -> tuple[list, list]:
        """Three global batches of four, as rows in the order of their places; and the states of all processes."""
        parts, states = [], []
        for process in range(processes):
            with opened(data, batch_size=4 // processes, process=process, processes=processes) as loader:
                if state:
                    loader.set_state(state)
                parts.append(list(itertools.islice(loader, 3)))
                states.append(json.loads(json.dumps(loader.get_state())))
        return join(parts), states

    before, states = load(saved_by)
    assert states == [states[0]] * saved_by
    after, _ = load(gone_on_by, states[0])
    with opened(data, batch_size=4) as loader:
        expected = rows(itertools.islice(loader, 6))
    for row, other in zip(before + after, expected, strict=True):
        for key in row:
            np.testing.assert_array_equal(row[key], other[key], err_msg=key)


@pytest.mark.parametrize("state", [{"next_index": 3}, {"position": -1}, {"position": True}, None])
def test_state_that_is_no_position_is_an_error(path, state):
    with opened(recipe(path)) as loader, pytest.raises(ValueError, match="no position in the training data"):
        loader.set_state(state)


def test_state_of_another_mixture_is_told(path, caplog):
    with opened(recipe(path)) as loader:
        state = loader.get_state()
        loader.set_state(state)
        assert not caplog.records
    for data, seed in [(recipe(path, repeat_threshold=0.9), 0), (recipe(path), 1)]:
        caplog.clear()
        with opened(data, seed=seed) as loader, caplog.at_level(logging.WARNING):
            loader.set_state(state)
        assert "another series of examples" in caplog.text


def test_several_records_are_mixed_by_the_weights_of_their_data_sets(path, tmp_path):
    other = [dataclasses.replace(make_example(index), image_id=f"other {index}", dataset="o") for index in range(4)]
    write_records(other, tmp_path / "a,b", name="other")
    both = f"{path}, {tmp_path / 'a,b'}:train".replace("a,b", "c")
    (tmp_path / "a,b").rename(tmp_path / "c")
    plain = ids(take(recipe(both), 15, batch_size=1))
    assert sorted(plain) == sorted([*ALL_IDS, *(example.image_id for example in other)])
    weighted = ids(take(recipe(both, mixture_weights=(("o", 0.8), ("set", 0.2))), 30, batch_size=1))
    assert sum(image_id.startswith("other") for image_id in weighted) == 24


def test_negatives_are_of_the_image_s_own_data_set(tmp_path):
    write_records([make_example(index) for index in range(4)], tmp_path / "one", name="set")
    spot = Region(np.asarray([1, 1, 5, 5], np.float32), "spot", "spot")
    other = [dataclasses.replace(make_example(4), image_id="other", dataset="o", absent=(), regions=(spot,))]
    write_records(other, tmp_path / "two", name="other")
    data = recipe(f"{tmp_path / 'one'},{tmp_path / 'two'}", caption_probability=0.0)
    words = {name: set(load_tokenizer().encode(name).ids[1:-1]) for name in ("spot", "lung")}
    shown = {"spot": 0, "lung": 0}
    for batch in take(data, 20):
        for image_id, tokens in zip(batch["image_id"], batch["input_ids"], strict=True):
            stranger = "lung" if image_id == "other" else "spot"
            assert not words[stranger] & set(tokens.tolist())
            shown[stranger] += 1
    assert min(shown.values()) > 0


def test_examples_of_batches_hold_no_masks(tmp_path):
    example = make_example(3)
    masked = dataclasses.replace(example.regions[0], mask={"size": [example.height, example.width], "counts": b"0"})
    write_records([dataclasses.replace(example, regions=(masked,))], tmp_path / "set", name="set")
    assert ExampleSource(find_shards(tmp_path / "set"))[0].regions[0].mask is None


def test_folder_with_a_comma_in_its_name_is_one_folder(tmp_path):
    write_records([make_example(1)], tmp_path / "a,b", name="set")
    for text in (f"{tmp_path}/a,b", f"{tmp_path}/a,b:train"):
        assert ids(take(recipe(text), 1)) == ["image 1", "image 1"]


def corrupt_records(directory: pathlib.Path, places, file_format="array_record", count=COUNT) -> str:
    examples = [make_example(index) for index in range(count)]
    for place in places:
        examples[place] = dataclasses.replace(examples[place], image=b"no image")
    write_records(examples, directory, name="set", file_format=file_format)
    return str(directory)


@pytest.mark.parametrize("file_format", FORMATS)
def test_corrupt_records_are_replaced_counted_and_listed_once(tmp_path, file_format):
    data = recipe(corrupt_records(tmp_path / "set", [3, 7], file_format), max_corrupt=2)
    listed = tmp_path / "run" / "quarantine.jsonl"
    with opened(data, quarantine=listed) as loader:
        found = list(itertools.islice(loader, 2 * COUNT))
        assert loader.quarantine.count() == 2
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted((entry["records"], entry["shard"], entry["record"]) for entry in entries) == [
        ("set", f"set-train.{file_format}-00000-of-00001", 3),
        ("set", f"set-train.{file_format}-00000-of-00001", 7),
    ]
    assert all("not an image that can be decoded" in entry["reason"] for entry in entries)
    assert str(tmp_path) not in listed.read_text() and "image 3" not in listed.read_text()

    whole = recipe(corrupt_records(tmp_path / "whole", []))
    expected = ids(take(whole, 2 * COUNT + 1))
    for place, image_id in enumerate(ids(found)):
        good = (x for x in expected[place:] if x not in ("image 3", "image 7"))
        assert image_id == next(good)

    with opened(data, quarantine=listed) as again:  # the same rows after a restart, and nothing listed twice
        list(itertools.islice(again, 5))
        state = again.get_state()
    with opened(data, quarantine=listed) as resumed:
        resumed.set_state(state)
        assert_batches_equal(itertools.islice(resumed, 2), found[5:7])
    assert len(listed.read_text().splitlines()) == 2


def test_too_many_corrupt_records_end_the_run_with_the_list(tmp_path):
    data = recipe(corrupt_records(tmp_path / "set", [3, 7, 9]), max_corrupt=2)
    listed = tmp_path / "quarantine.jsonl"
    message = r"record \d, image 'image [379]': not an image.*\n3 records cannot be used.*max_corrupt is 2.*quarantine"
    with pytest.raises(RecordsError, match=message):
        take(data, COUNT, quarantine=listed)
    with pytest.raises(RecordsError, match=message):  # and end it again
        take(data, COUNT, quarantine=listed)
    assert len(listed.read_text().splitlines()) == 3


def test_records_without_a_single_good_one_are_an_error_even_with_a_high_limit(tmp_path):
    data = recipe(corrupt_records(tmp_path / "set", [0], count=1), max_corrupt=5)
    with pytest.raises(RecordsError, match="none of 100 records in a row can be used; the last: not an image"):
        take(data, 1)


def test_worker_processes_give_the_same_batches_list_corrupt_records_and_leave_a_state_for_threads(tmp_path):
    path = corrupt_records(tmp_path / "set", [3])
    listed = tmp_path / "quarantine.jsonl"
    with opened(recipe(path, num_workers=2, prefetch=2), quarantine=listed) as loader:
        found = list(itertools.islice(loader, 9))
        state = json.loads(json.dumps(loader.get_state()))
    assert [json.loads(line)["record"] for line in listed.read_text().splitlines()] == [3]
    assert loader.quarantine.count() == 1
    with opened(recipe(path)) as threads:
        assert_batches_equal(itertools.islice(threads, 9), found)
        expected = list(itertools.islice(threads, 3))
    with opened(recipe(path)) as resumed:
        resumed.set_state(state)
        assert_batches_equal(itertools.islice(resumed, 3), expected)


def phrase_tokens(phrase: str) -> list[int]:
    tokenizer = load_tokenizer()
    return tokenizer.encode(phrase).ids[tokenizer.num_leading : -tokenizer.num_trailing]


@pytest.mark.parametrize("caption_probability", [0.0, 1.0])
def test_flips_swap_left_and_right_in_pixels_boxes_and_prompt_together(path, caption_probability):
    fixed = {"scale_range": (1.0, 1.0), "caption_probability": caption_probability}
    plain, flipped = (rows(take(recipe(path, flip_probability=p, **fixed), 6)) for p in (0.0, 1.0))
    phrases = set()
    for row, mirrored in zip(plain, flipped, strict=True):
        assert row["image_id"] == mirrored["image_id"]
        height, width = row["image_size"]
        image = row["image"][:height, :width]
        np.testing.assert_array_equal(mirrored["image"][:height, :width], image[:, ::-1])
        np.testing.assert_array_equal(mirrored["box_mask"], row["box_mask"])
        for k in np.flatnonzero(row["box_mask"]):
            x0, y0, x1, y1 = row["boxes"][k]
            np.testing.assert_allclose(mirrored["boxes"][k], [width - x1, y0, width - x0, y1], atol=1e-5)
            on_the_left = x0 + x1 < width
            names = ("right lung", "left lung") if on_the_left else ("left lung", "right lung")
            for view, name in zip((row, mirrored), names, strict=True):
                assert view["input_ids"][view["positive_map"][k] > 0].tolist() == phrase_tokens(name)
            phrases.add(names)
    assert len(phrases) == 2


def test_caption_is_the_prompt_where_every_region_has_words_in_it(path):
    batches = take(recipe(path, caption_probability=1.0, flip_probability=0.0), COUNT)
    found = [row["input_ids"][: row["attention_mask"].sum()].tolist() for row in rows(batches)]
    captions = [tokens == load_tokenizer().encode("The left lung; the right lung.").ids for tokens in found]
    assert captions == [bool(make_example(int(image_id.split()[1])).caption) for image_id in ids(batches)]


def test_images_without_regions_are_trained_and_evaluated_on(path):
    normal = {f"image {index}" for index in range(0, COUNT, 4)}
    seen = [row for row in rows(take(recipe(path), COUNT)) if row["image_id"] in normal]
    assert {row["image_id"] for row in seen} == normal
    for row in seen:
        assert not row["box_mask"].any() and not row["positive_map"].any()
        assert row["attention_mask"].sum() > 2  # its prompt asks for what is not there
    assert normal < set(ids(evaluate(recipe(path), path)))


def test_more_boxes_than_fit_is_an_error_that_names_the_image(path):
    with pytest.raises(
        ValueError, match=r"image 'image (3|7)'.*2 boxes and config.data.max_boxes is 1: raise that to 2"
    ):
        take(recipe(path, max_boxes=1), COUNT)


def test_phrases_that_do_not_fit_are_an_error_that_names_the_image(path):
    with pytest.raises(ValueError, match=r"image 'image \d+'.*fell off"):
        take(recipe(path, max_tokens=3), COUNT)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": b"\xff\xd8\xffno image"}, "not an image that can be decoded"),
        ({"image": png(13, 20, 3)[:-20]}, "cut short"),
        ({"image": png(7, 5, 0)}, "the image is 5 x 7 pixels and its record says 21 x 13.*build the records again"),
    ],
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_damaged_image_is_an_error_that_names_shard_and_image(tmp_path, file_format, change, complaint):
    examples = [make_example(index) for index in range(5)]
    examples[3] = dataclasses.replace(examples[3], **change)
    write_records(examples, tmp_path, name="set", file_format=file_format, num_shards=2)
    place = rf"set-train\.{file_format}-00001-of-00002, record 1, image 'image 3': .*{complaint}"
    with pytest.raises(ValueError, match=place):
        take(recipe(str(tmp_path), max_corrupt=0), 3)
    with pytest.raises(ValueError, match=place):
        list(evaluate(recipe(""), str(tmp_path)))


def test_malformed_record_is_an_error_that_names_its_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.shards.encode_example", lambda example: b"\x07garbage")
    write_records([make_example(0)], tmp_path, name="set")
    with pytest.raises(RecordsError, match=r"set-train\.array_record-00000-of-00001, record 0: malformed record"):
        take(recipe(str(tmp_path), max_corrupt=0), 1)


def test_evaluation_batch_has_the_documented_arrays(path):
    batch = next(iter(evaluate(recipe(path), path, batch_size=4)))
    image_ids = batch.pop("image_id")
    assert image_ids.shape == (4,) and image_ids.dtype.kind == "U"
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, *CANVAS, 3), np.uint8),
        "image_size": ((4, 2), np.int32),
        "modality": ((4,), np.int32),
        "scale": ((4, 2), np.float32),
        "original_size": ((4, 2), np.int32),
        "valid": ((4,), np.bool_),
        "index": ((4,), np.int32),
    }


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_sees_each_example_once_over_all_processes(path, processes, batch_size):
    loaders = [evaluate(recipe(path), path, batch_size, p, processes) for p in range(processes)]
    parts = [list(loader) for loader in loaders]
    assert {len(loader) for loader in loaders} == {len(part) for part in parts} == {len(parts[0])}
    assert {loader.num_examples for loader in loaders} == {COUNT}
    assert len(parts[0]) * batch_size * processes - COUNT < batch_size * processes
    assert all(len(batch["image"]) == batch_size for part in parts for batch in part)
    series = [row for places in zip(*map(rows, parts), strict=True) for row in places]
    stored = [example.image_id for example in map(ExampleSource(find_shards(path)).__getitem__, range(COUNT))]
    assert [row["image_id"] for row in series[:COUNT]] == stored
    assert [row["index"] for row in series] == [*range(COUNT), *[-1] * (len(series) - COUNT)]
    assert [row["valid"] for row in series] == [index < COUNT for index in range(len(series))]
    for row in series[COUNT:]:
        assert row["image_id"] == "" and not row["image"].any()


def test_evaluated_image_fills_the_canvas_and_says_how_it_was_scaled(path):
    for row in rows(evaluate(recipe(path), path)):
        if not row["valid"]:
            continue
        example = make_example(int(row["image_id"].split()[1]))
        assert row["original_size"].tolist() == [example.height, example.width]
        np.testing.assert_allclose(row["scale"], row["image_size"] / row["original_size"], rtol=1e-6)
        height, width = row["image_size"]
        assert (height, width)[0] == CANVAS[0] or (height, width)[1] == CANVAS[1]
        assert row["image"][:height, :width].any(axis=-1).all()
        assert not row["image"][height:].any() and not row["image"][:, width:].any()


def test_evaluation_starts_over_each_time_even_after_a_break(path):
    loader = evaluate(recipe(path), path)
    first = list(loader)
    assert len(first) == len(loader) == 6
    for batch in loader:
        assert_batches_equal([batch], first[:1])
        break
    assert_batches_equal(loader, first)


@pytest.mark.parametrize("path", ["tfrecord"], indirect=True)
def test_evaluation_with_worker_processes_keeps_the_order(path):
    assert_batches_equal(evaluate(recipe(path, num_workers=2, prefetch=2), path, 3), evaluate(recipe(path), path, 3))


@pytest.mark.parametrize(("process", "processes"), [(1, 1), (-1, 2), (0, 0)])
def test_process_that_does_not_exist_is_an_error(path, process, processes):
    with pytest.raises(ValueError, match=f"process {process} of {processes}"):
        take(recipe(path), 1, process=process, processes=processes)
    with pytest.raises(ValueError, match=f"process {process} of {processes}"):
        evaluate(recipe(path), path, process=process, processes=processes)


@pytest.mark.parametrize("scale_range", [(0.0, 1.0), (0.8, 0.5), (0.5, 1.5)])
def test_scale_range_that_does_not_fit_is_an_error_that_names_the_field(path, scale_range):
    with pytest.raises(ValueError, match=r"config\.data\.scale_range is \("):
        take(recipe(path, scale_range=scale_range), 1)


def test_missing_or_empty_records_are_a_clear_error(path, tmp_path):
    with pytest.raises(RecordsError, match=r"config\.data\.train is empty"):
        take(recipe(""), 1)
    with pytest.raises(RecordsError, match="holds no records"):
        take(recipe(str(tmp_path)), 1)
    with pytest.raises(RecordsError, match="holds no examples"):
        ExampleSource(dataclasses.replace(find_shards(path), shards=(), shard_lengths=()))


def test_no_module_of_the_pipeline_imports_jax():
    for module in pathlib.Path(data_pipelines.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"jax", "flax", "medglip_jax"}, module
