"""Splits: patients and copies stay together, whatever the order of the rows; blank pictures are no copies."""

import dataclasses

import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import splits
from data_pipelines.audit_pixels import digest_pixels, hash_picture, look_alike, make_thumbnail, shrink, soften, to_grey
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.phantoms import phantom
from data_pipelines.splits import (
    ZERO_SHOT,
    assign_splits,
    digest_annotations,
    find_duplicates,
    group_examples,
    split_share,
)
from data_pipelines.transforms import decode_image

EXAMPLE = GroundingExample(image=b"", image_id="a", dataset="d", height=10, width=20)
names = st.text("abc", max_size=2)


def groups_by_walking(keys, pairs):
    """The same groups the slow way."""
    groups = list(range(len(keys)))
    links = [(i, j) for i in range(len(keys)) for j in range(i) if keys[i] == keys[j]] + [tuple(pair) for pair in pairs]
    for _ in keys:
        for i, j in links:
            groups[i] = groups[j] = min(groups[i], groups[j])
    return groups


@st.composite
def rows(draw):
    keys = draw(st.lists(st.tuples(names, st.text("xyz", min_size=1, max_size=3)), min_size=1, max_size=12))
    place = st.integers(0, len(keys) - 1)
    pairs = draw(st.lists(st.tuples(place, place), max_size=6))
    patients, images = zip(*keys, strict=True)
    return list(patients), list(images), np.asarray(pairs, np.int64).reshape(-1, 2)


def split_keys(patients, images):
    return [patient or image for patient, image in zip(patients, images, strict=True)]


@hypothesis.given(rows())
def test_groups_are_those_of_a_walk_over_all_links(drawn):
    patients, images, pairs = drawn
    keys = split_keys(patients, images)
    assert group_examples(patients, images, pairs).tolist() == groups_by_walking(keys, pairs)


def test_a_long_chain_is_one_group():
    count = 3000
    order = np.random.default_rng(0).permutation(count)
    chain = np.stack([order[:-1], order[1:]], axis=1)
    groups = group_examples([""] * count, [str(k) for k in range(count)], chain[np.arange(count - 1)[::-1]])
    assert (groups == 0).all()
    assert group_examples([], [], np.zeros((0, 2))).shape == (0,)


@hypothesis.given(rows(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_group_straddles_and_the_order_does_not_matter(drawn, first, second, seed, random):
    patients, images, pairs = drawn
    keys = split_keys(patients, images)
    groups = group_examples(patients, images, pairs)
    small, large = sorted((first, second))
    splits, _ = assign_splits(keys, groups, small, seed=seed)
    assert len({(group, split) for group, split in zip(groups.tolist(), splits, strict=True)}) == len(
        set(groups.tolist())
    )
    more, _ = assign_splits(keys, groups, large, seed=seed)
    assert not any(one == "validation" and other == "train" for one, other in zip(splits, more, strict=True))
    order = random.sample(range(len(keys)), len(keys))
    place = np.argsort(order)
    regrouped = group_examples([patients[k] for k in order], [images[k] for k in order], place[pairs])
    assert assign_splits([keys[k] for k in order], regrouped, small, seed=seed)[0] == [splits[k] for k in order]


def test_split_is_what_it_was():
    def held_out(seed: int) -> list[int]:
        splits, _ = assign_splits([str(i) for i in range(1000)], np.arange(1000), 0.2, seed=seed)
        return [i for i, split in enumerate(splits) if split == "validation"]

    assert held_out(0)[:6] == [7, 15, 18, 20, 25, 36]
    assert 160 < len(held_out(0)) < 240
    assert held_out(0) != held_out(1)


def test_a_key_that_is_not_utf8_has_a_share():
    assert 0 <= split_share("sch\udce4del") < 1


def test_a_group_goes_by_its_smallest_key():
    keys = [str(k) for k in range(200)]
    alone, _ = assign_splits(keys, np.arange(200), 0.3)
    paired, report = assign_splits(keys, np.arange(200) // 2 * 2, 0.3)
    assert paired[0::2] == paired[1::2]
    assert paired[0::2] == [alone[min((k, k + 1), key=str)] for k in range(0, 200, 2)]
    assert report["groups_of_several"] == {"count": 100, "images": 200, "largest": [{"images": 2, "patients": 2}] * 10}
    assert report["fraction_reached"] == paired.count("validation") / 200
    assert report["images"] == {name: paired.count(name) for name in ("train", "validation")}


def test_the_whole_group_of_what_is_held_out_is_kept_for_zero_shot():
    held = np.asarray([False, True, False, False])
    splits, report = assign_splits(["p", "p", "q", "r"], np.asarray([0, 0, 2, 3]), 0.0, held_out=held)
    assert splits == [ZERO_SHOT, ZERO_SHOT, "train", "train"]
    assert (report["held_out"], report["held_out_with_them"]) == (1, 1)
    with pytest.raises(ValueError, match=r"from 0 to 1, not 1\.5"):
        assign_splits(["p"], np.asarray([0]), 1.5)
    assert assign_splits([], np.zeros(0), 0.5)[0] == []


def prints(pictures):
    """digests, hashes and thumbnails of uint8[H, W, 3] pictures."""
    greys = [to_grey(each) for each in pictures]
    return (
        np.asarray([digest_pixels(each) for each in pictures], np.uint64),
        np.asarray([hash_picture(grey) for grey in greys], np.uint64),
        np.stack([shrink(grey) for grey in greys]),
    )


@pytest.fixture(scope="module")
def pictures():
    """Six phantoms, a copy of the third and a smaller copy of the fifth."""
    plain = [decode_image(phantom(index, modality="ct", size=96).image) for index in range(6)]
    small = cv2.resize(plain[4], None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
    return [*plain, plain[2].copy(), small]


def test_exact_and_near_copies_are_found(pictures):
    digests, hashes, small = prints(pictures)
    found = find_duplicates(digests, hashes, small)
    assert found.exact.tolist() == [0, 1, 2, 3, 4, 5, 2, 7]
    assert found.near.tolist() == [[4, 7]]
    assert found.pairs.tolist() == [[2, 6], [4, 7]]
    assert found.as_dict() == {"exact_copies": 1, "near_pairs": 1, "compared_pairs": found.candidates, "complete": True}


def test_thumbnails_may_lie_in_a_file_or_be_read_one_by_one(pictures, tmp_path):
    digests, hashes, small = prints(pictures)
    np.save(tmp_path / "small.npy", small)
    mapped = np.load(tmp_path / "small.npy", mmap_mode="r")
    asked = []
    reader = lambda row: asked.append(row) or small[row]  # noqa: E731
    for thumbnails in (mapped, reader):
        assert find_duplicates(digests, hashes, thumbnails).pairs.tolist() == [[2, 6], [4, 7]]
    assert set(asked) < set(range(8))
    alone = find_duplicates(digests, hashes, None)
    assert (alone.near.size, alone.exact.tolist()) == (0, [0, 1, 2, 3, 4, 5, 2, 7])


def test_near_copies_are_the_same_however_many_are_compared_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    plain = cv2.resize(rng.integers(0, 256, (5, 6, 6), np.uint8).transpose(1, 2, 0), (32, 32)).transpose(2, 0, 1)
    small = plain[rng.integers(0, 5, 40)] + rng.integers(0, 2, (40, 32, 32), np.uint8)  # copies of five pictures
    prints = np.arange(1, 41), np.full(40, 3, np.uint64), small
    near = find_duplicates(*prints).near
    assert 0 < len(near) < 40 * 39 // 2
    for chunk, block in ((50, 7), (7, 50), (1, 1)):
        monkeypatch.setattr(splits, "_CHUNK", chunk)
        monkeypatch.setattr(splits, "_BLOCK", block)
        np.testing.assert_array_equal(find_duplicates(*prints).near, near)


def test_an_unknown_digest_is_no_copy_and_a_search_cut_short_says_so():
    digests, small = (
        np.asarray([0, 0, 5, 5], np.uint64),
        np.random.default_rng(0).integers(0, 255, (4, 32, 32), np.uint8),
    )
    assert find_duplicates(digests, np.zeros(4, np.uint64), small).exact.tolist() == [0, 1, 2, 2]
    many = np.repeat(small[:1], 100, axis=0)
    found = find_duplicates(np.arange(1, 101), np.full(100, 3, np.uint64), many, most=50)
    assert not found.complete


def test_near_pairs_are_those_that_look_alike(pictures):
    soft = [make_thumbnail(each) for each in pictures]
    rows, columns = np.triu_indices(len(pictures), 1)
    alike = look_alike(np.stack(soft)[rows], np.stack(soft)[columns])
    assert np.stack([rows, columns], axis=1)[alike].tolist() == [[2, 6], [4, 7]]
    assert bool(look_alike(soft[4], soft[7]))
    small = shrink(to_grey(pictures[0]))
    np.testing.assert_allclose(soft[0], cv2.GaussianBlur(small.astype(np.float32), (0, 0), 1.0), atol=1e-3)
    np.testing.assert_allclose(soften(np.stack([small, small]))[1], soft[0])


def test_blank_pictures_are_copies_only_where_they_are_annotated_alike():
    blank = np.zeros((48, 48, 3), np.uint8)
    faint = np.random.default_rng(0).integers(0, 4, (3, 48, 48, 3)).astype(np.uint8)
    digests, hashes, small = prints([blank] * 6 + list(faint))
    marks = np.asarray([0, 0, 7, 7, 8, 0, 0, 0, 0], np.uint64)
    found = find_duplicates(digests, hashes, small, marks)
    assert found.exact.tolist() == [0, 1, 2, 2, 4, 5, 6, 7, 8]
    assert not found.near.size
    assert find_duplicates(digests, hashes, small).exact.tolist() == list(range(9))
    groups = group_examples([""] * 9, list("abcdefghi"), found.pairs)
    assert np.bincount(groups).max() == 2


def test_pictures_without_contrast_or_of_another_brightness_are_no_near_copies(pictures):
    faint = np.random.default_rng(0).integers(0, 9, (2, 32, 32)).astype(np.uint8)
    bright = shrink(to_grey(pictures[0]))
    for small in (faint, np.stack([bright, bright // 2])):
        found = find_duplicates(np.asarray([1, 2]), np.full(2, 3, np.uint64), small)
        assert (found.candidates, len(found.near)) == (1, 0)
    assert bool(look_alike(*soften(faint)))  # an audit reports them all the same


def test_annotations_are_digested_whatever_their_order():
    def region(label, x):
        return Region(np.asarray([x, 0, 9, 9], np.float32), label, label)

    one, two = region("liver", 0), region("spleen", 1)
    digest = digest_annotations(dataclasses.replace(EXAMPLE, regions=(one, two)))
    assert digest == digest_annotations(dataclasses.replace(EXAMPLE, regions=(two, one)))
    assert digest != digest_annotations(dataclasses.replace(EXAMPLE, regions=(one,)))
    assert digest_annotations(EXAMPLE) == 0
