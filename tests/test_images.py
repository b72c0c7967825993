import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.curate import SourceError
from data_pipelines.images import list_images, read_mask, store_image

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
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = save(tmp_path / "a.jpg", COLOURS, exif=exif, quality=100)
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
