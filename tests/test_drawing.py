"""Boxes on images: where they land, in which colour, and that sheets hold every picture."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medglip_jax.drawing import PALETTE, SheetEntry, contact_sheet, draw_predictions, phrase_colors

GREY = np.full((64, 64, 3), 128, np.uint8)
NOTHING = {"boxes": np.zeros((0, 4)), "labels": [], "scores": np.zeros(0)}


def pixels_of(image, color):
    return np.argwhere((np.asarray(image) == color).all(axis=-1))  # (y, x)


def test_a_box_is_drawn_on_its_own_outermost_pixels():
    drawn = draw_predictions(GREY, np.array([[16, 8, 48, 40]]), ["a"], np.array([0.5]))  # ten times as large
    row = pixels_of(drawn.crop((0, 200, 640, 201)), PALETTE[0])[:, 1]
    column = pixels_of(drawn.crop((400, 0, 401, 640)), PALETTE[0])[:, 0]
    assert (row.min(), row.max()) == (160, 479)  # half-open: pixel 480 is outside
    assert (column.min(), column.max()) == (80, 399)


def test_small_images_are_enlarged_and_large_ones_kept():
    assert draw_predictions(GREY[:, :32], **NOTHING).size == (320, 640)
    assert draw_predictions(np.zeros((900, 700, 3), np.uint8), **NOTHING).size == (700, 900)


def test_the_image_given_is_not_changed():
    image = Image.fromarray(GREY)
    draw_predictions(image, np.array([[0, 0, 64, 64]]), ["a"], np.array([1.0]), least_side=64)
    assert (np.asarray(image) == 128).all()


def test_true_boxes_are_dashed():
    box = np.array([[80, 80, 560, 560]])
    solid = draw_predictions(GREY, box / 10, ["nodule"], np.array([0.9]))
    dashed = draw_predictions(GREY, **NOTHING, true_boxes=box / 10, true_labels=["nodule"])
    left = slice(200, 500), slice(80, 83)  # away from labels
    share = [(np.asarray(image)[left] == PALETTE[0]).all(axis=-1).any(axis=1).mean() for image in (solid, dashed)]
    assert share[0] == 1 and 0.3 < share[1] < 0.8


@given(st.lists(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=len(PALETTE) // 2), max_size=4))
def test_few_phrases_of_a_picture_differ_in_colour(pictures):
    colors = phrase_colors(pictures)
    assert set(colors) == set().union(*pictures)
    if len(colors) <= len(PALETTE):
        assert len(set(colors.values())) == len(colors)


def test_phrases_seen_together_differ_even_when_colours_run_out():
    names = [f"{i:02d}" for i in range(2 * len(PALETTE))]
    pictures = [names[i : i + 6] for i in range(0, len(names), 6)]
    colors = phrase_colors(pictures)
    for picture in pictures:
        assert len({colors[name] for name in picture}) == len(picture)


def test_a_contact_sheet_shows_every_image_and_a_legend(tmp_path):
    rng = np.random.default_rng(0)
    entries = [
        SheetEntry(np.full((40, 60), value, np.uint8), f"ct · {value}", np.array([[5, 5, 30, 30]]), ["a"], np.ones(1))
        for value in (50, 100, 150)
    ]
    many = rng.uniform(0, 40, (30, 2))
    crowded = np.concatenate([many, many + 8], axis=1)
    entries.append(SheetEntry(GREY, "crowd", crowded, ["cell"] * 30, rng.random(30), crowded, ["cell"] * 30))
    path = contact_sheet(entries, tmp_path / "new" / "sheet.png", columns=2, tile=160)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * 160 + 16 + 2 * 20
    for value in (50, 100, 150):
        assert (sheet == value).all(axis=-1).sum() > 1000
    assert set(map(tuple, sheet[-60:].reshape(-1, 3))) >= set(PALETTE[:2])


def test_an_empty_sheet_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(-50, 150, width=32), min_size=4, max_size=4))
def test_any_box_can_be_drawn(corners):
    x0, x1, y0, y1 = *sorted(corners[:2]), *sorted(corners[2:])
    drawn = draw_predictions(GREY, np.array([[x0, y0, x1, y1]]), ["very long phrase " * 9], np.ones(1), least_side=64)
    assert drawn.size == (64, 64)


def test_masks_are_tinted_in_the_colour_of_their_phrase():
    mask = np.zeros((80, 80), bool)
    mask[20:60, 10:50] = True
    image = np.full((80, 80, 3), 120, np.uint8)
    plain = draw_predictions(image, np.zeros((0, 4)), [], np.zeros(0))
    drawn = draw_predictions(image, np.zeros((0, 4)), [], np.zeros(0), masks=[("nodule", mask)])
    changed = (np.asarray(plain) != np.asarray(drawn)).any(axis=2)
    scale = changed.shape[0] / 80
    assert (changed != (np.kron(mask, np.ones((int(scale), int(scale)))) > 0)).mean() < 1e-3  # corners are rounded
    color, inside = (
        np.asarray(phrase_colors([["nodule"]])["nodule"]),
        np.asarray(drawn)[int(40 * scale), int(30 * scale)],
    )
    assert np.abs(inside - (120 + (color - 120) * 90 / 255)).max() <= 2
    assert (np.asarray(drawn)[int(20 * scale), int(30 * scale)] == color).all()  # the edge
