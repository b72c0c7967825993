"""Masks on their way into a batch: onto the grid, mirrored, chosen; and nothing at all where they are off."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.medglip_t import get_config
from data_pipelines.loader import train_loader
from data_pipelines.mask_targets import MASK_STRIDE, decode_mask, grid_size, packed_size, resize_mask
from data_pipelines.records import write_records
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.masks import encode_mask, outline

CANVAS, MOST = (48, 64), 4


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def disc(shape, y, x, radius):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def region(mask, phrase, *, known=True, iscrowd=False):
    found = outline(mask)
    return Region(
        found["box"], phrase, phrase.replace(" ", "_"), mask=found["mask"] if known else None, iscrowd=iscrowd
    )


def example(regions, shape=(40, 60)):
    """The picture is bright where some region is, so that pixels and masks can be compared."""
    pixels = np.zeros(shape, np.uint8)
    for each in regions:
        pixels[decode_mask(each.mask or encode_mask(np.zeros(shape, bool))) > 0] = 255
    return GroundingExample(png(pixels), "one", "set", *shape, modality="xray", regions=tuple(regions))


def recipe(path, **changes):
    data = get_config().data
    data.update(train=path, canvas=CANVAS, max_boxes=8, max_tokens=48, max_negatives=3, num_threads=1, prefetch=2)
    data.update(max_masks=MOST, caption_probability=0.0, expression_probability=0.0, prefix_probability=0.0)
    data.update(parents_positive_probability=0.0, hard_negative_share=0.0, variant_probability=0.0)
    data.update(full_negatives_probability=1.0)
    data.update_from_flattened_dict(changes)
    return data.lock()


def batches(folder, examples, count=4, **changes):
    write_records(examples, folder / "set", name="set")
    loader = train_loader(
        recipe(str(folder / "set"), **changes), seed=0, batch_size=1, process_index=0, process_count=1
    )
    try:
        return [{key: value[0] for key, value in next(loader).items()} for _ in range(count)]
    finally:
        loader.close()


def unpack(packed):
    return np.unpackbits(packed, axis=-1)[..., : grid_size(CANVAS)[1]] > 0


SHAPE = (40, 60)
LEFT, RIGHT = disc(SHAPE, 12, 12, 8), disc(SHAPE, 28, 44, 9)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 48), st.integers(1, 64)),
    seed=st.integers(0, 999),
    flip=st.booleans(),
)
def test_a_mask_keeps_its_place_and_never_vanishes(shape, size, seed, flip):
    rng = np.random.default_rng(seed)
    y, x = rng.integers(shape[0]), rng.integers(shape[1])
    height, width = rng.integers(1, shape[0] - y + 1), rng.integers(1, shape[1] - x + 1)
    mask = np.zeros(shape, np.uint8)
    mask[y : y + height, x : x + width] = 1
    grid = resize_mask(mask, size, CANVAS, flip)
    assert grid.shape == grid_size(CANVAS) and grid.any()
    rows, columns = np.nonzero(grid)
    if flip:
        x = shape[1] - x - width
    # Resizing reaches a pixel of either image to each side.
    for cells, start, length, scale in ((rows, y, height, size[0] / shape[0]), (columns, x, width, size[1] / shape[1])):
        slack = max(scale, 1)
        assert (cells.max() + 1) * MASK_STRIDE >= start * scale - slack
        assert cells.min() * MASK_STRIDE <= (start + length) * scale + slack
    assert not resize_mask(np.zeros(shape, np.uint8), size, CANVAS, flip).any()


def test_half_of_a_cell_is_enough_and_less_is_only_where_nothing_else_is():
    mask = np.zeros(CANVAS, np.uint8)
    mask[:4, :2], mask[4:8, :1] = 1, 1
    assert np.argwhere(resize_mask(mask, CANVAS, CANVAS)).tolist() == [[0, 0]]
    mask[:4] = 0
    assert np.argwhere(resize_mask(mask, CANVAS, CANVAS)).tolist() == [[1, 0]]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_lie_on_the_pixels_of_their_image(tmp_path, flip):
    (row,) = batches(
        tmp_path, [example([region(LEFT, "left lung"), region(RIGHT, "nodule")])], 1, flip_probability=flip
    )
    assert {key: row[key].shape for key in ("masks", "phrase_masks")} == dict.fromkeys(
        ("masks", "phrase_masks"), (MOST, *packed_size(CANVAS))
    )
    masks, boxes = unpack(row["masks"]), row["boxes"]
    assert sorted(row["mask_boxes"]) == [-1, -1, 0, 1]
    shown = row["image"][..., 0].reshape(12, 4, 16, 4).mean(axis=(1, 3)) >= 127.5
    np.testing.assert_array_equal(masks.any(axis=0), shown)
    for mask, place in zip(masks, row["mask_boxes"], strict=True):
        if place >= 0:
            rows, columns = np.nonzero(mask)
            x0, y0, x1, y1 = boxes[place]
            np.testing.assert_allclose([columns.min() * 4, rows.min() * 4], [x0, y0], atol=4)
            np.testing.assert_allclose([columns.max() * 4 + 4, rows.max() * 4 + 4], [x1, y1], atol=4)


def phrases_of(row):
    """(mask of each phrase that has one, by the boxes whose words hold all of its; those that mean no box)."""
    present, absent = {}, 0
    words = row["positive_map"] > 0
    for tokens, mask in zip(row["phrase_tokens"], unpack(row["phrase_masks"]), strict=True):
        if tokens.any():
            boxes = tuple(np.flatnonzero(words[:, tokens].all(axis=1) & row["box_mask"]).tolist())
            present[boxes] = mask
            absent += not boxes
    return present, absent


OTHERS = [
    dataclasses.replace(example([region(disc(SHAPE, 20, 30, 6), phrase)]), image_id=phrase)
    for phrase in ("heart", "pleural effusion")
]


def rows_of(folder, regions, **changes):
    found = batches(folder, [example(regions), *OTHERS], 12, **changes)
    return [row for row in found if row["image_id"] == "one"]


def test_a_phrase_has_the_union_of_its_boxes_and_absent_ones_nothing(tmp_path):
    for row in rows_of(tmp_path, [region(LEFT, "nodule"), region(RIGHT, "nodule")]):
        present, absent = phrases_of(row)
        masks = unpack(row["masks"])
        np.testing.assert_array_equal(present[0, 1], masks.any(axis=0))
        assert absent == 2 and not present[()].any()


@pytest.mark.parametrize(
    ("second", "has_absent"),
    [
        (region(RIGHT, "nodule", known=False), True),  # another box of the phrase has none
        (region(RIGHT, "nodule", iscrowd=True), False),
    ],
)
def test_a_phrase_whose_whole_mask_is_not_known_is_left_out(tmp_path, second, has_absent):
    for row in rows_of(tmp_path, [region(LEFT, "nodule"), second]):
        present, absent = phrases_of(row)
        assert set(present) <= {()} and (absent > 0) == has_absent
        assert sorted(row["mask_boxes"])[-1] == 0 and (row["mask_boxes"] >= 0).sum() == 1


@pytest.mark.parametrize(("ignored", "known"), [((), {(0,), (1,)}), (("is_a",), {(0,)})])
def test_a_phrase_that_another_box_shows_too_is_left_out(tmp_path, ignored, known):
    regions = [region(LEFT, "melanoma"), region(RIGHT, "skin lesion")]
    for row in rows_of(tmp_path, regions, **{"hierarchy.ignored": ignored}):
        order = np.argsort(row["boxes"][:2, 0])  # of the boxes in the batch, from left to right
        assert {tuple(order[[*boxes]]) for boxes in phrases_of(row)[0] if boxes} == known


def test_images_with_boxes_only_teach_no_mask(tmp_path):
    for row in rows_of(tmp_path, [region(LEFT, "nodule", known=False), region(RIGHT, "heart", known=False)]):
        assert not row["phrase_tokens"].any() and (row["mask_boxes"] == -1).all()


def test_more_masks_than_there_is_room_for_are_drawn(tmp_path):
    regions = [region(disc(SHAPE, 8 + 3 * i, 8 + 7 * i, 5), phrase) for i, phrase in enumerate("abcdefg")]
    chosen = [tuple(row["mask_boxes"]) for row in rows_of(tmp_path, regions)]
    assert len(set(chosen)) > 1 and all(len(set(boxes)) == MOST and min(boxes) >= 0 for boxes in chosen)


def test_off_a_batch_has_the_same_arrays_as_without_masks_in_the_records(tmp_path):
    regions = [region(LEFT, "left lung"), region(RIGHT, "nodule")]
    bare = [dataclasses.replace(each, mask=None) for each in regions]
    found = [batches(tmp_path / name, [example(regions)], max_masks=most) for name, most in (("on", MOST), ("off", 0))]
    (tmp_path / "bare").mkdir()
    write_records([dataclasses.replace(example(regions), regions=tuple(bare))], tmp_path / "bare", name="set")
    new = {"masks", "mask_boxes", "phrase_masks", "phrase_tokens"}
    for on, off in zip(*found, strict=True):
        assert on.keys() - off.keys() == new
        for key in off:
            np.testing.assert_array_equal(on[key], off[key], err_msg=key)  # prompts are drawn alike


def test_a_negative_number_of_masks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.max_masks is -1"):
        batches(tmp_path, [example([region(LEFT, "nodule")])], max_masks=-1)
