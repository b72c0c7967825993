import io

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import images
from data_pipelines.curate import SourceError
from data_pipelines.images import Previews, encode_png, keep_previews, list_images, make_preview, read_mask, store_image

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GREYS = COLOURS[..., 0]


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def stored_pixels(path, *arguments):
    stored = store_image(path, *arguments)
    image = Image.open(io.BytesIO(stored.encoded))
    assert (image.height, image.width) == (stored.height, stored.width)
    assert image.mode in ("L", "RGB")
    return np.asarray(image)


@pytest.mark.parametrize(
    ("name", "pixels"), [("a.jpg", COLOURS), ("a.jpg", GREYS), ("a.png", COLOURS), ("a.png", GREYS)]
)
def test_plain_files_are_kept_byte_for_byte(tmp_path, name, pixels):
    path = save(tmp_path / name, pixels)
    assert store_image(path).encoded == path.read_bytes()


def test_opaque_alpha_is_dropped_and_equal_channels_become_grey(tmp_path):
    opaque = np.full((6, 9, 1), 255, np.uint8)
    grey = np.repeat(GREYS[..., None], 3, axis=-1)
    np.testing.assert_array_equal(stored_pixels(save(tmp_path / "a.png", np.dstack([COLOURS, opaque]))), COLOURS)
    np.testing.assert_array_equal(stored_pixels(save(tmp_path / "b.png", np.dstack([grey, opaque]))), GREYS)


def test_transparent_pixels_become_black(tmp_path):
    alpha = np.zeros((6, 9, 1), np.uint8)
    assert not stored_pixels(save(tmp_path / "a.png", np.dstack([COLOURS, alpha]))).any()


def test_palette_is_looked_up(tmp_path):
    image = Image.fromarray(GREYS % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    expected = np.asarray([[10, 20, 30], [40, 50, 60], [70, 80, 90], [1, 2, 3]], np.uint8)[GREYS % 4]
    np.testing.assert_array_equal(stored_pixels(save(tmp_path / "a.png", image)), expected)


def test_sixteen_bit_grey_fills_the_range(tmp_path):
    values = np.asarray([[1000, 1100], [1200, 3000]], np.uint16)
    np.testing.assert_array_equal(stored_pixels(save(tmp_path / "a.png", values)), [[0, 13], [26, 255]])


def test_sixteen_bit_colour_becomes_eight_bit(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), COLOURS[..., ::-1].astype(np.uint16) * 257)
    assert store_image(tmp_path / "a.png").encoded[24] == 8
    np.testing.assert_array_equal(stored_pixels(tmp_path / "a.png"), COLOURS)


def test_turned_jpeg_is_stored_as_its_annotation_sees_it(tmp_path):
    path = save(tmp_path / "a.jpg", COLOURS, exif=turned(), quality=100)
    plain = stored_pixels(path, (6, 9))
    assert plain.shape == (6, 9, 3)
    np.testing.assert_array_equal(stored_pixels(path, (9, 6)), np.rot90(plain, -1))
    assert not Image.open(io.BytesIO(store_image(path).encoded)).getexif()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_file_cut_short_is_an_error_that_names_it(tmp_path, name):
    path = save(tmp_path / name, np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    whole = path.read_bytes()
    for share in (0.0, 0.2, 0.5, 0.95):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(SourceError, match=rf"{name}: the image cannot be decoded"):
            store_image(path)


def test_other_size_than_annotated_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"is 9 x 6 pixels, its annotation says 18 x 12"):
        store_image(save(tmp_path / "a.jpg", COLOURS), (12, 18))


def test_several_pictures_in_a_file_are_an_error(tmp_path):
    frames = [Image.fromarray(GREYS), Image.fromarray(GREYS + 1)]
    with pytest.raises(SourceError, match="several pictures"):
        store_image(save(tmp_path / "a.tif", frames[0], save_all=True, append_images=frames[1:]))


def test_images_that_differ_only_in_suffix_are_an_error(tmp_path):
    save(tmp_path / "a.png", GREYS)
    save(tmp_path / "a.jpg", GREYS)
    with pytest.raises(SourceError, match="same name"):
        list_images(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_mask_is_what_is_not_black_in_any_mode(tmp_path, mode):
    mask = GREYS > 128
    image = Image.fromarray(mask.astype(np.uint16) * 300) if mode == "I;16" else Image.fromarray(mask).convert(mode)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", image), mask.shape), mask)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return exif


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture of these sides."""
    blobs = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("a.jpg", Image.fromarray(draw(300, 530)), {}),
        ("a.jpg", Image.fromarray(draw(300, 530)[..., 0]), {"progressive": True}),
        ("a.jpg", Image.fromarray(draw(300, 530)), {"exif": turned()}),
        ("a.png", Image.fromarray(draw(300, 530)), {}),
        ("a.png", Image.fromarray(draw(300, 530)).quantize(8), {}),
        ("a.tif", Image.fromarray(draw(300, 530)[..., 0].astype(np.uint16) * 9), {}),
    ],
)
def test_kept_preview_is_that_of_the_stored_bytes(tmp_path, monkeypatch, name, image, options):
    path = save(tmp_path / name, image, **options)
    with keep_previews() as previews:
        stored = store_image(path)
    expected = Previews().find(stored.encoded, "a copy")
    monkeypatch.setattr(images, "open_image", None)  # nothing is decoded again
    np.testing.assert_array_equal(previews.find(stored.encoded, "a"), expected)


def test_preview_of_another_image_is_not_taken(tmp_path):
    paths = [save(tmp_path / f"{seed}.jpg", draw(80, 80, seed)) for seed in range(2)]
    with keep_previews() as previews:
        first, second = (store_image(path).encoded for path in paths)
    assert not np.array_equal(previews.find(first, "first"), previews.find(second, "second"))
    np.testing.assert_array_equal(previews.find(first, "first"), Previews().find(first, "first"))


def test_preview_of_bytes_that_are_no_image_is_an_error_that_names_them():
    with pytest.raises(SourceError, match=r"image 7: the image cannot be decoded"):
        Previews().find(b"\xff\xd8\xff nothing", "image 7")


@pytest.mark.parametrize(("sides", "factor"), [((64, 200), 1), ((128, 200), 2), ((256, 999), 4), ((800, 512), 8)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_preview_is_the_mean_of_blocks(tmp_path, sides, factor, name):
    path = save(tmp_path / name, draw(*sides)[..., 0])
    preview = Previews().find(path.read_bytes(), name).astype(float)
    assert preview.shape == tuple(-(-side // factor) for side in sides)
    height, width = (side // factor for side in sides)
    pixels = np.asarray(Image.open(path), float)[: height * factor, : width * factor]
    means = pixels.reshape(height, factor, width, factor).mean(axis=(1, 3))
    assert np.abs(preview[:height, :width] - means).max() <= 1.5


def test_preview_of_any_mode_is_grey():
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        preview = make_preview(Image.fromarray(draw(90, 70)).convert(mode))
        assert preview.shape == (90, 70) and preview.dtype == np.uint8


@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 9))
def test_encoded_pixels_come_back(height, width, coloured, seed):
    shape = (height, width, 3) if coloured else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


@hypothesis.given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["L", "RGB", "LA", "1"]), st.integers(0, 9))
def test_mask_of_any_shape_is_where_a_colour_is(tmp_path_factory, height, width, mode, seed):
    values = np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * 255
    image = Image.fromarray(values if mode == "RGB" else values[..., 0]).convert(mode)
    expected = values.any(axis=-1) if mode == "RGB" else values[..., 0] > 0
    path = save(tmp_path_factory.mktemp("mask") / "a.png", image)
    np.testing.assert_array_equal(read_mask(path, (height, width)), expected)
