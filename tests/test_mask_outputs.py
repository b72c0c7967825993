"""Masks on their way out: run lengths of a part of an image, and logits of the canvas in the image's own pixels."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from data_pipelines.mask_targets import resize_mask
from data_pipelines.transforms import resize_into
from medglip_jax.inference import merge
from medglip_jax.mask_outputs import decode, encode_crop, encode_logits, grow_boxes, to_text


@given(st.data())
def test_a_part_is_encoded_as_the_whole_image_is(data):
    height, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(0, height - y)), data.draw(st.integers(0, width - x))
    density, seed = data.draw(st.sampled_from([0.0, 0.5, 1.0])), data.draw(st.integers(0, 99))
    part = np.random.default_rng(seed).random((h, w)) < density
    whole = np.zeros((height, width), np.uint8, order="F")
    whole[y : y + h, x : x + w] = part
    assert encode_crop(part, (y, x), (height, width)) == dict(coco_mask.encode(whole))


def test_a_run_goes_on_in_the_next_column():
    whole = np.ones((3, 4), np.uint8, order="F")
    whole[:, [0, 3]] = 0
    assert encode_crop(np.ones((3, 2), bool), (0, 1), (3, 4)) == dict(coco_mask.encode(whole))


def disc(height, width):
    rows, columns = np.mgrid[:height, :width]
    return (((rows - 0.45 * height) / height) ** 2 + ((columns - 0.6 * width) / width) ** 2 < 0.3**2).astype(np.uint8)


@given(height=st.integers(24, 300), width=st.integers(24, 300), canvas=st.sampled_from([(64, 96), (128, 128)]))
def test_a_mask_comes_back_from_the_grid_where_it_was(height, width, canvas):
    mask = disc(height, width)
    _, size, scale = resize_into(np.zeros((height, width, 3), np.uint8), canvas)
    grid = np.where(resize_mask(mask, size, canvas), 40, -40).astype(np.int8)
    found = decode(encode_logits(grid, np.asarray(scale), (height, width)))
    assert found.shape == mask.shape
    cell = 4 / min(scale)
    error = np.argwhere(found != mask)
    if len(error):  # within a cell of the edge
        y, x = (error[:, 0] / height - 0.45) * height, (error[:, 1] / width - 0.6) * width
        radius = np.hypot(y / height, x / width)
        assert np.abs(radius - 0.3).max() * min(height, width) <= 1.5 * cell


def test_a_mask_ends_where_its_box_does():
    logits = np.full((16, 24), 40, np.int8)
    found = decode(encode_logits(logits, np.ones(2), (64, 96), (10.2, 20, 30, 40.5)))
    rows, columns = np.nonzero(found)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [10, 20, 30, 41]
    assert not decode(encode_logits(-logits, np.ones(2), (64, 96))).any()
    assert not decode(encode_logits(logits, np.ones(2), (64, 96), (200, 0, 220, 10))).any()
    np.testing.assert_allclose(grow_boxes(np.array([[10, 20, 30, 60]]), 0.1), [[8, 16, 32, 64]])


def test_run_lengths_go_through_text():
    rle = encode_crop(np.ones((2, 3), bool), (1, 1), (5, 6))
    text = to_text(rle)
    assert isinstance(text["counts"], str) and decode(text).sum() == 6


def test_masks_of_several_prompts_are_joined_with_their_boxes():
    """Two prompts on a canvas of 32 x 32 pixels with an image of 64 x 64: each detection keeps its own mask."""
    grids = np.full((4, 8, 8), -16, np.int8)
    grids[0, :2], grids[1, :, :2], grids[2, 6:] = 16, 16, 16
    whole = [0, 0, 32, 32]

    def part(scores, phrases, masks, phrase_masks):
        return {
            "boxes": np.float32([whole] * len(scores)),
            "scores": np.float32(scores),
            "phrases": np.int32(phrases),
            "masks": masks,
            "phrase_masks": phrase_masks,
        }

    parts = [
        part([0.5, 0.0], [0, -1], grids[[0, 3]], grids[[0, 3]]),
        part([0.9, 0.2], [1, 0], grids[[1, 2]], grids[1:3]),
    ]
    found = merge(parts, [[2], [0, 1]], 10, scale=np.full(2, 0.5), size=(64, 64), mask_margin=0.1)
    assert found.phrases.tolist() == [1, 2, 0] and found.masks is not None and found.phrase_masks is not None
    areas = [decode(mask).any(axis=axis).sum() for mask, axis in zip(found.masks, (0, 1, 1), strict=True)]
    assert areas == [16, 16, 16] and [decode(mask).sum() for mask in found.masks] == [16 * 64] * 3
    assert sorted(found.phrase_masks) == [0, 1, 2]
    np.testing.assert_array_equal(decode(found.phrase_masks[2]), decode(found.masks[1]))
    speck = np.full((1, 8, 8), -127, np.int8)
    speck[0, 4, 4] = 1  # above 0 at the centre of a cell, which is of no pixel
    parts[0]["phrase_masks"] = speck
    assert merge(parts[:1], [[2]], 10, scale=np.full(2, 0.5), size=(64, 64)).phrase_masks == {}
    assert merge(parts, [[2], [0, 1]], 10, scale=np.full(2, 0.5), size=(64, 64)).phrases.tolist() == [1, 2, 0]
