import io
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from data_pipelines.images import store_image
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.transforms import (
    decode_image,
    flip_annotations,
    flip_boxes,
    flip_mask,
    resize_into,
    scale_boxes,
)

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
ORIENTATION = 0x0112  # EXIF tag


def encode(image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, kind, **options)
    return stream.getvalue()


@st.composite
def boxes_and_sizes(draw, step: float = 0.125):
    """Boxes with an area inside an image, at multiples of `step` pixels: ([n, 4], (height, width))."""
    size = draw(st.integers(1, 2000)), draw(st.integers(1, 2000))

    def interval(length):
        ends = st.lists(st.integers(0, int(length / step)), min_size=2, max_size=2, unique=True)
        return ends.map(lambda pair: [step * end for end in sorted(pair)])

    box = st.tuples(interval(size[1]), interval(size[0])).map(lambda xy: [xy[0][0], xy[1][0], xy[0][1], xy[1][1]])
    return np.asarray(draw(st.lists(box, max_size=4)), np.float32).reshape(-1, 4), size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_any_kind_of_png_decodes_to_rgb(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image, "PNG")), np.asarray(image.convert("RGB")))


def test_grey_jpeg_decodes_to_three_equal_channels():
    pixels = decode_image(encode(COLOURS[..., 0], "JPEG", quality=100))
    assert pixels.shape == (6, 9, 3)
    assert (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0].astype(int) - COLOURS[..., 0]).max() < 3


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_black_and_half_transparent_ones_half_as_bright(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, 3:6], alpha[:, 6:] = 128, 255
    image.putalpha(Image.fromarray(alpha))
    decoded, opaque = decode_image(encode(image, "PNG")), np.asarray(image.convert("RGB"))
    assert not decoded[:, :3].any()
    np.testing.assert_allclose(decoded[:, 3:6], opaque[:, 3:6] * (128 / 255), atol=0.51)
    np.testing.assert_array_equal(decoded[:, 6:], opaque[:, 6:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg_is_applied(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    encoded = encode(COLOURS, "JPEG", quality=100, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode_image(encoded), np.asarray(upright))


def test_decoding_agrees_with_what_a_build_stores(tmp_path):
    images = [encode(COLOURS, "JPEG"), encode(Image.fromarray(COLOURS).convert("P"), "PNG")]
    images.append(encode(np.dstack([COLOURS, COLOURS[..., 0]]), "PNG"))
    for index, encoded in enumerate(images):
        path = tmp_path / f"{index}.png"
        path.write_bytes(encoded)
        np.testing.assert_array_equal(decode_image(encoded), decode_image(store_image(path).encoded))


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.float32)])
def test_more_than_eight_bits_are_refused(kind, dtype):
    with pytest.raises(ValueError, match=rf"has {dtype.__name__} pixels: map the window"):
        decode_image(encode(COLOURS[..., 0].astype(dtype), kind))


@pytest.mark.parametrize("encoded", [b"", b"\x00", b"not an image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_a_clear_error(encoded):
    with pytest.raises(ValueError, match=rf"not an image that can be decoded, or cut short \({len(encoded)} bytes\)"):
        decode_image(encoded)


@pytest.mark.parametrize("options", [{"kind": "PNG"}, {"kind": "JPEG"}, {"kind": "JPEG", "progressive": True}])
def test_file_cut_short_anywhere_is_an_error(options):
    encoded = encode(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8), **options)
    for end in (*range(0, len(encoded), len(encoded) // 20), len(encoded) - 12, len(encoded) - 1):
        with pytest.raises(ValueError, match="cut short"):
            decode_image(encoded[:end])


def test_damage_inside_a_jpeg_shows_in_the_pixels_only():
    # Pillow accepts it too: that is why records carry checksums.
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    encoded = encode(pixels, "JPEG", quality=100)
    damaged = encoded[: len(encoded) // 2] + b"\xff\xd9"
    Image.open(io.BytesIO(damaged)).load()
    decoded = decode_image(damaged)
    np.testing.assert_array_equal(decoded[:8], decode_image(encoded)[:8])
    assert (decoded[-1] == 128).all()


@given(st.tuples(*[st.integers(1, 90)] * 2), st.tuples(*[st.integers(1, 70)] * 2), st.floats(0.05, 1.0))
def test_resized_image_keeps_its_aspect_beside_zeros(size, canvas, scale):
    image = np.random.default_rng(0).integers(1, 256, (*size, 3), np.uint8)
    pixels, resized, scales = resize_into(image, canvas, scale)
    height, width = resized
    assert pixels.shape == (*canvas, 3) and pixels.dtype == np.uint8
    assert pixels[:height, :width].all()
    assert not pixels[height:].any() and not pixels[:, width:].any()
    assert scales == (height / size[0], width / size[1])
    factor = scale * min(canvas[0] / size[0], canvas[1] / size[1])
    for length, original in zip(resized, size, strict=True):
        assert length == 1 or abs(length - factor * original) <= 0.5


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [((10, 20), 1.0, (16, 32)), ((20, 10), 1.0, (32, 16)), ((10, 20), 0.5, (8, 16)), ((300, 300), 1.0, (32, 32))],
)
def test_longer_side_fills_its_share_of_the_canvas(size, scale, expected):
    _, resized, scales = resize_into(np.ones((*size, 3), np.uint8), (32, 32), scale)
    assert resized == expected
    assert scales == (expected[0] / size[0], expected[1] / size[1])


def test_image_of_the_canvas_size_is_not_resampled():
    pixels, size, scales = resize_into(COLOURS, (6, 9))
    np.testing.assert_array_equal(pixels, COLOURS)
    assert (size, scales) == ((6, 9), (1.0, 1.0))


@pytest.mark.parametrize(("factor", "canvas"), [(2, (24, 32)), (0.5, (6, 8))])
def test_box_still_frames_its_content_after_resizing(factor, canvas):
    image = np.zeros((12, 16, 3), np.uint8)
    box = np.asarray([4, 2, 10, 8], np.float32)
    image[2:8, 4:10] = 200
    pixels, _, scales = resize_into(image, canvas)
    x0, y0, x1, y1 = scale_boxes(box, scales).astype(int)
    assert scales == (factor, factor)
    bright = pixels[..., 0] >= 100
    assert bright[y0:y1, x0:x1].all()
    assert bright.sum() == (y1 - y0) * (x1 - x0)


def test_shrinking_averages_all_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 200
    pixels, _, _ = resize_into(stripes, (16, 16))
    assert (pixels == 50).all()


@pytest.mark.parametrize("scale", [0, -0.5, 1.01, float("nan")])
def test_scale_outside_its_range_is_an_error(scale):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        resize_into(COLOURS, (32, 32), scale)


def test_image_without_pixels_is_an_error():
    with pytest.raises(ValueError, match=r"no pixels: its shape is \(0, 5, 3\)"):
        resize_into(np.zeros((0, 5, 3), np.uint8), (32, 32))


@given(boxes_and_sizes(), st.tuples(*[st.integers(1, 1500)] * 2))
def test_scaled_boxes_stay_inside_and_go_back_to_the_original_pixels(boxes_and_size, resized):
    boxes, (height, width) = boxes_and_size
    scales = resized[0] / height, resized[1] / width
    scaled = scale_boxes(boxes, scales)
    assert scaled.dtype == np.float32 and scaled.shape == boxes.shape
    assert (scaled >= 0).all() and (scaled <= [resized[1], resized[0]] * 2).all()
    assert (scaled[:, 2:] > scaled[:, :2]).all()
    np.testing.assert_allclose(scale_boxes(scaled, (1 / scales[0], 1 / scales[1])), boxes, rtol=3e-7)


@given(st.tuples(*[st.integers(1, 5000)] * 2), st.tuples(*[st.integers(1, 1500)] * 2))
def test_box_of_the_whole_image_scales_to_the_whole_image_exactly(size, resized):
    scales = resized[0] / size[0], resized[1] / size[1]
    whole = scale_boxes(np.asarray([0, 0, size[1], size[0]], np.float32), scales)
    assert whole.tolist() == [0, 0, resized[1], resized[0]]


@given(boxes_and_sizes())
def test_flipping_boxes_twice_changes_nothing(boxes_and_size):
    boxes, (_, width) = boxes_and_size
    np.testing.assert_array_equal(flip_boxes(flip_boxes(boxes, width), width), boxes)


@given(boxes_and_sizes())
def test_flipped_boxes_stay_inside_with_their_size(boxes_and_size):
    boxes, (height, width) = boxes_and_size
    flipped = flip_boxes(boxes, width)
    assert flipped.dtype == np.float32
    assert (flipped >= 0).all() and (flipped <= [width, height] * 2).all()
    np.testing.assert_array_equal(flipped[:, 2:] - flipped[:, :2], boxes[:, 2:] - boxes[:, :2])
    np.testing.assert_array_equal(flipped[:, 1::2], boxes[:, 1::2])


@given(boxes_and_sizes(), st.tuples(*[st.integers(1, 1500)] * 2))
def test_flipping_before_and_after_scaling_agree(boxes_and_size, resized):
    boxes, (height, width) = boxes_and_size
    scales = resized[0] / height, resized[1] / width
    before, after = scale_boxes(flip_boxes(boxes, width), scales), flip_boxes(scale_boxes(boxes, scales), resized[1])
    np.testing.assert_allclose(before, after, atol=resized[1] * 2e-7)


@given(boxes_and_sizes(step=1.0))
def test_flipped_box_covers_the_same_pixels_of_the_flipped_image(boxes_and_size):
    boxes, (height, width) = boxes_and_size
    for x0, y0, x1, y1 in boxes.astype(int):
        covered = np.zeros((height, width), np.uint8)
        covered[y0:y1, x0:x1] = 1
        mirrored = np.zeros_like(covered)
        a0, b0, a1, b1 = flip_boxes(np.asarray([x0, y0, x1, y1]), width)
        mirrored[b0:b1, a0:a1] = 1
        np.testing.assert_array_equal(covered[:, ::-1], mirrored)


def test_boxes_keep_their_leading_dimensions():
    boxes = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert flip_boxes(boxes, 30).shape == scale_boxes(boxes, (2, 3)).shape == (2, 3, 4)
    np.testing.assert_array_equal(flip_boxes(boxes, 30)[1, 2], flip_boxes(boxes[1, 2], 30))
    np.testing.assert_array_equal(scale_boxes(boxes, (2, 3))[1, 2], scale_boxes(boxes[1, 2], (2, 3)))
    assert flip_boxes(boxes[:, :0], 30).shape == scale_boxes(boxes[:, :0], (2, 3)).shape == (2, 0, 4)


def test_only_the_image_is_flipped_and_its_padding_stays():
    given = COLOURS.copy()
    for canvas, scale in [((16, 16), 0.5), (COLOURS.shape[:2], 1.0), ((3, 11), 1.0)]:
        (pixels, size, scales), flipped = (
            resize_into(given, canvas, scale),
            resize_into(given, canvas, scale, flip=True),
        )
        assert flipped[1:] == (size, scales)
        expected = np.zeros_like(pixels)
        expected[: size[0], : size[1]] = pixels[: size[0], : size[1]][:, ::-1]
        np.testing.assert_array_equal(flipped[0], expected)
    np.testing.assert_array_equal(given, COLOURS)


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1)))
def test_mask_is_mirrored_and_mirrored_back(mask):
    encoded = dict(coco_mask.encode(np.asfortranarray(mask)))
    flipped = flip_mask(encoded)
    np.testing.assert_array_equal(coco_mask.decode(flipped), mask[:, ::-1])
    assert flip_mask(flipped) == encoded


def paint(boxes: np.ndarray, values: tuple[int, ...], height: int, width: int) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    for (x0, y0, x1, y1), value in zip(boxes.astype(int), values, strict=True):
        pixels[y0:y1, x0:x1] = value
    return pixels


@pytest.fixture
def chest() -> GroundingExample:
    """The patient's right lung lies in the left half of the image."""
    boxes = np.asarray([[1, 2, 5, 9], [9, 1, 15, 8], [6, 5, 9, 7]], np.float32)
    masks = [dict(coco_mask.encode(np.asfortranarray(paint(box[None], (1,), 10, 16)[..., 0]))) for box in boxes[:2]]
    caption = "The right lung is clear; Left pleural effusion."
    return GroundingExample(
        image=encode(paint(boxes, (80, 160, 240), 10, 16), "PNG"),
        image_id="chest",
        dataset="set",
        height=10,
        width=16,
        caption=caption,
        regions=(
            Region(boxes[0], "right lung", "right_lung", "organ", "lung", masks[0], spans=((4, 14),)),
            Region(boxes[1], "Left effusion", "left effusion", "lesion", "left_lung", masks[1], spans=((25, 46),)),
            Region(boxes[2], "heart", "heart", "organ", iscrowd=True),
        ),
        absent=("left_pneumothorax", "fracture"),
        expressions=(
            Expression("a box on the right of the image, a left effusion", (1,), ((35, 48),), "position"),
            Expression("no left pneumothorax", kind="negation"),
        ),
    )


def words(example: GroundingExample) -> list[tuple[str, ...]]:
    return [tuple(example.caption[start:end] for start, end in region.spans) for region in example.regions]


def test_mirrored_chest_swaps_left_and_right_everywhere(chest):
    mirrored = flip_annotations(chest)
    right, effusion, heart = mirrored.regions
    assert (right.phrase, right.label, right.parent) == ("left lung", "left_lung", "lung")
    assert right.box[0] > mirrored.width / 2
    assert (effusion.phrase, effusion.label, effusion.parent) == ("Right effusion", "right effusion", "right_lung")
    assert effusion.box[2] < mirrored.width / 2
    assert (heart.phrase, heart.label, heart.iscrowd) == ("heart", "heart", True)
    assert mirrored.absent == ("right_pneumothorax", "fracture")
    assert mirrored.caption == "The left lung is clear; Right pleural effusion."
    box, negation = mirrored.expressions
    assert box.text == "a box on the left of the image, a right effusion"
    assert [box.text[start:end] for start, end in box.spans] == ["right effusion"]
    assert (box.regions, box.kind) == ((1,), "position")
    assert (negation.text, negation.regions, negation.spans) == ("no right pneumothorax", (), ())
    assert words(chest) == [("right lung",), ("Left pleural effusion",), ()]
    assert words(mirrored) == [("left lung",), ("Right pleural effusion",), ()]


def test_mirrored_annotations_fit_the_mirrored_pixels(chest):
    mirrored, pixels = flip_annotations(chest), decode_image(chest.image)[:, ::-1]
    painted = np.zeros_like(pixels)
    for region, value in zip(mirrored.regions, (80, 160, 240), strict=True):
        x0, y0, x1, y1 = region.box.astype(int)
        assert (pixels[y0:y1, x0:x1] == value).all()
        painted[y0:y1, x0:x1] = value
        if region.mask is not None:
            np.testing.assert_array_equal(coco_mask.decode(region.mask) == 1, pixels[..., 0] == value)
    np.testing.assert_array_equal(painted, pixels)


def test_mirroring_twice_gives_the_same_annotations(chest):
    twice = flip_annotations(flip_annotations(chest))
    assert (twice.caption, twice.absent, twice.expressions) == (chest.caption, chest.absent, chest.expressions)
    for region, original in zip(twice.regions, chest.regions, strict=True):
        np.testing.assert_array_equal(region.box, original.box)
        assert (region.phrase, region.label, region.parent) == (original.phrase, original.label, original.parent)
        assert (region.mask, region.spans) == (original.mask, original.spans)


def test_image_without_regions_is_mirrored_too():
    empty = GroundingExample(b"", "normal", "set", 4, 6, absent=("left_lung",))
    mirrored = flip_annotations(empty)
    assert mirrored.regions == () and mirrored.absent == ("right_lung",)


def test_flips_and_scales_of_a_training_image_keep_content_in_its_box(chest):
    pixels = decode_image(chest.image)
    for canvas, scale in itertools.product([(40, 64), (64, 128)], [1.0, 0.5]):
        flipped, _, scales = resize_into(pixels, canvas, scale, flip=True)
        for region, value in zip(flip_annotations(chest).regions, (80, 160, 240), strict=True):
            x0, y0, x1, y1 = scale_boxes(region.box, scales)
            assert (flipped[int((y0 + y1) / 2), int((x0 + x1) / 2)] == value).all()
