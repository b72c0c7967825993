"""Prediction from a run's working directory: every kind of image, batches, what is refused, and the command."""

import copy
import io
import json

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from data_pipelines.text import load_tokenizer
from medglip_jax import MedGLIP, inference
from medglip_jax.configuration import save_config
from medglip_jax.inference import parameter_shapes
from medglip_jax.mask_outputs import decode
from medglip_jax.model.detector import GLIP
from medglip_jax.predict import _as_json, main, read_image, split_phrases
from medglip_jax.training.checkpoint import Checkpoints
from medglip_jax.training.state import TrainState

PHRASES = ["left lung", "pleural effusion"]
ANY = 0.0  # the threshold that lets everything through which the recipe's own does


def save_run(folder, config, params, ema):
    """Leaves a working directory as training does."""
    save_config(config, folder / "config.json")
    load_tokenizer().save(folder / "tokenizer")
    state = TrainState(np.int32(1), params, optax.sgd(0.1).init(params), ema, jax.random.key(0))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, jax.tree.map(jax.numpy.asarray, state))


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """The working directory of a tiny detector with random parameters; the average is another set of them."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        if len(x.shape) < 2:
            return np.full(x.shape, path[-1].key.startswith(("scale", "gamma")), np.float32)
        return rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(np.float32)

    shapes = parameter_shapes(GLIP(tiny_config.model), tiny_config)
    params, ema = (jax.tree_util.tree_map_with_path(fill, shapes) for _ in range(2))
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, tiny_config, params, ema)
    return folder, params, ema


@pytest.fixture(scope="module")
def model(run):
    return MedGLIP.from_pretrained(run[0])


@pytest.fixture(scope="module")
def pictures():
    """Noise images of three shapes, none of them the canvas's."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((90, 150), (200, 100), (40, 30))]


def with_detector(model, detector):
    """The same model with another detector behind its preprocessing."""
    other = copy.copy(model)
    other._detector = detector
    return other


def encode(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def assert_same(a, b, atol=0.0):
    assert len(a) == len(b) > 0 and a.phrases == b.phrases
    np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=atol)
    np.testing.assert_allclose(a.boxes, b.boxes, rtol=0, atol=1000 * atol)


def test_boxes_are_in_the_pixels_of_the_image(model, pictures):
    for pixels in pictures:
        found = model.predict(pixels, PHRASES, threshold=ANY)
        height, width = pixels.shape[:2]
        assert len(found) == len(found.boxes) == len(found.phrases) > 5 and set(found.phrases) <= set(PHRASES)
        assert found.boxes.dtype == found.scores.dtype == np.float32
        assert np.all(np.diff(found.scores) <= 0) and found.boxes.min() >= 0
        assert np.all(found.boxes[:, 2:] > found.boxes[:, :2])
        # Some anchors reach over every side, so the largest coordinates are the image's own.
        np.testing.assert_allclose(found.boxes.max(axis=0)[2:], [width, height], rtol=1e-6)


def test_a_box_comes_back_from_the_canvas_exactly(model, pictures):

    def detector(params, *, image, image_size, phrase_valid, **others):
        """Finds the right lower quarter of each image."""
        found = np.concatenate([image_size[:, ::-1] / 2, image_size[:, ::-1]], axis=1)[:, None]
        return {"boxes": found, "scores": np.full((len(image), 1), 0.5), "phrases": np.full((len(image), 1), 1)}

    model = with_detector(model, detector)
    for pixels, found in zip(pictures, model.predict(pictures, PHRASES), strict=True):
        height, width = pixels.shape[:2]
        np.testing.assert_allclose(found.boxes, [[width / 2, height / 2, width, height]], rtol=1e-6)
        assert found.phrases == [PHRASES[1]]


def test_masks_go_with_their_boxes_and_into_the_json(model, pictures, tmp_path):
    """The first box has the upper half of its image as its mask, the second the lower half; a phrase has the first."""

    def detector(params, *, image, image_size, phrase_valid, **others):
        rows = np.arange(16)[:, None] * 4 < image_size[:, 0][:, None, None] / 2
        halves = np.where(np.stack([rows, ~rows], axis=1), 40, -40).astype(np.int8) * np.ones((16,), np.int8)
        return {
            "boxes": np.tile(np.float32([0, 0, 64, 64]), (len(image), 2, 1)),
            "scores": np.tile(np.float32([0.9, 0.6]), (len(image), 1)),
            "phrases": np.tile(np.int32([1, 0]), (len(image), 1)),
            "masks": halves,
            "phrase_masks": np.stack([np.full_like(halves[:, 0], -40), halves[:, 0]], axis=1),
        }

    model = with_detector(model, detector)
    for pixels, found in zip(pictures, model.predict(pictures, PHRASES), strict=True):
        assert found.phrases == PHRASES[::-1] and found.phrase_masks.keys() == {PHRASES[1]}
        upper, lower = (decode(mask) for mask in found.masks)
        assert upper.shape == pixels.shape[:2] and upper[0].all() and lower[-1].all() and not lower[0].any()
        assert abs(upper.mean() - 0.5) < 0.1 and not (upper & lower).any()
        np.testing.assert_array_equal(decode(found.phrase_masks[PHRASES[1]]), upper)
        (kept,) = model.predict([pixels], PHRASES, threshold=0.7)
        assert len(kept.masks) == 1
        fields = json.loads(json.dumps(_as_json("a.png", found)))
        assert [decode(mask).sum() for mask in fields["masks"]] == [upper.sum(), lower.sum()]
        assert fields["phrase_masks"].keys() == {PHRASES[1]}


def test_file_bytes_pillow_image_and_array_are_the_same_image(model, pictures, tmp_path):
    pixels = pictures[0]
    path = tmp_path / "a.png"
    path.write_bytes(encode(pixels))
    expected = model.predict(pixels, PHRASES, threshold=ANY)
    for image in (
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(pixels),
        Image.open(path),
        pixels[..., ::-1][..., ::-1],
    ):
        assert_same(model.predict(image, PHRASES, threshold=ANY), expected)
    (listed,) = model.predict([path], PHRASES, threshold=ANY)
    assert_same(listed, expected)


def test_jpeg_images_are_turned_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn to the right
    slope = np.add.outer(np.arange(60), 2 * np.arange(90)).astype(np.uint8)
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(slope, "JPEG", quality=95, exif=turned))
    for image in (path, path.read_bytes(), Image.open(path)):
        np.testing.assert_allclose(read_image(image)[..., 0], np.rot90(slope, -1), atol=8)


def test_grey_images_have_three_equal_channels(pictures):
    grey = pictures[0][..., 0]
    for image in (grey, encode(grey), Image.fromarray(grey)):
        np.testing.assert_array_equal(read_image(image), np.repeat(grey[..., None], 3, axis=2))


def test_batches_change_nothing(model, pictures):
    together = model.predict(pictures, PHRASES, threshold=ANY, batch_size=2)
    for pixels, found in zip(pictures, together, strict=True):
        assert_same(found, model.predict(pixels, PHRASES, threshold=ANY), atol=1e-5)


def test_every_image_may_have_its_own_phrases(model, pictures):
    asked = [["nodule", "mass"], "left lung. pleural effusion", ("heart", "liver")]
    together = model.predict(pictures, asked, threshold=ANY, batch_size=2)
    for found, pixels, phrases in zip(together, pictures, asked, strict=True):
        assert set(found.phrases) <= set(split_phrases(phrases))
        assert_same(found, model.predict(pixels, phrases, threshold=ANY), atol=1e-5)


def test_more_phrases_than_a_prompt_holds_are_all_asked_for(model, pictures):
    many = [" ".join([organ] * 10) for organ in ("lung", "kidney", "eye", "breast", "heart", "liver")]  # two a prompt
    for pixels, together in zip(pictures, model.predict(pictures, many, threshold=ANY, batch_size=2), strict=True):
        assert np.all(np.diff(together.scores) <= 0)
        parts = [model.predict(pixels, many[start : start + 2], threshold=ANY) for start in (0, 2, 4)]
        assert len(together) == sum(map(len, parts))
        for phrase, part in zip(many, [part for part in parts for _ in range(2)], strict=True):
            found, expected = (_scores_of(prediction, phrase) for prediction in (together, part))
            assert len(found) > 0
            np.testing.assert_allclose(found, expected, atol=1e-5)


def _scores_of(prediction, phrase):
    return [s for s, p in zip(prediction.scores, prediction.phrases, strict=True) if p == phrase]


def test_each_bucket_of_shapes_is_compiled_once(run, pictures, monkeypatch):
    traced = []
    normalize = inference.normalize_pixels
    monkeypatch.setattr(
        inference, "normalize_pixels", lambda image, size: (traced.append(len(image)), normalize(image, size))[1]
    )
    model = MedGLIP.from_pretrained(run[0])
    for _ in range(2):
        model.predict(pictures[0], PHRASES)
        model.predict(pictures[1], ["heart", "liver"], threshold=0.9)
        model.predict(pictures[:2], PHRASES, batch_size=1)
    assert traced == [1]
    model.predict(pictures, PHRASES, batch_size=2)  # two images, then one
    assert traced == [1, 2]


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"), [(7, 4, [4, 4]), (5, 3, [3, 2]), (7, 6, [6, 1]), (5, 8, [8])]
)
def test_no_batch_is_larger_than_allowed(model, pictures, count, batch_size, sizes):
    seen = []

    def detector(params, *, image, **others):
        seen.append(len(image))
        empty = np.zeros((len(image), 1))
        return {"boxes": np.zeros((len(image), 1, 4)), "scores": empty, "phrases": empty.astype(int) - 1}

    found = with_detector(model, detector).predict([pictures[0]] * count, PHRASES, batch_size=batch_size)
    assert seen == sizes and [len(prediction) for prediction in found] == [0] * count


def test_threshold_and_limit_cut_the_list(model, pictures):
    everything = model.predict(pictures[0], PHRASES, threshold=ANY)
    middle = float(everything.scores[3])
    assert_same(model.predict(pictures[0], PHRASES, threshold=ANY, max_detections=2), _first(everything, 2))
    some = model.predict(pictures[0], PHRASES, threshold=middle)
    assert_same(some, _first(everything, int(np.sum(everything.scores >= middle))))
    assert len(model.predict(pictures[0], PHRASES, threshold=1.0)) == 0


def _first(prediction, count):
    return type(prediction)(prediction.boxes[:count], prediction.scores[:count], prediction.phrases[:count])


def test_the_average_is_loaded_unless_asked_otherwise(run, model):
    folder, params, ema = run
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), model.params, ema)
    plain = MedGLIP.from_pretrained(folder, use_ema=False)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), plain.params, params)


def test_the_run_keeps_its_own_tokenizer(run, tiny_config, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.data.tokenizer = str(tmp_path / "gone")
    save_run(tmp_path, config, run[1], None)
    assert MedGLIP.from_pretrained(tmp_path).tokenizer.vocab_size == load_tokenizer().vocab_size


def test_tokenizer_with_more_tokens_than_the_model_is_refused(run, tiny_config, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.model.bert.vocab_size = 100
    params = jax.tree.map(lambda x: x, run[1])
    params["language"]["word_embeddings"]["embedding"] = np.zeros((100, 16), np.float32)
    save_run(tmp_path, config, params, None)
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, but the model of .* knows 100"):
        MedGLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("phrases", [[], "", " . ", ["left lung", " "]])
def test_no_phrases_or_an_empty_one_are_refused(model, pictures, phrases):
    with pytest.raises(ValueError, match="expected at least one and none empty"):
        model.predict(pictures[0], phrases)


def test_phrases_are_split_at_periods_and_counted_once():
    assert split_phrases("left lung. T2.5 lesion.  nodule. left lung.") == ["left lung", "T2.5 lesion", "nodule"]
    assert split_phrases([" nodule ", "nodule", "a. b"]) == ["nodule", "a. b"]


def test_phrase_that_is_too_long_is_named(model, pictures):
    phrase = "very " * 40 + "large mass"
    with pytest.raises(ValueError, match=r"and 32 are allowed: 'very very .*large mass' fell off"):
        model.predict(pictures[0], ["nodule", phrase])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is 1.5: scores are between 0 and 1"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"max_detections": 0}, "max_detections is 0: this model gives between 1 and 100"),
        ({"max_detections": 101}, "max_detections is 101"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_out_of_range_are_refused(model, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        model.predict(pictures[0], PHRASES, **options)


def test_lists_of_another_length_are_refused(model, pictures):
    with pytest.raises(ValueError, match="3 images but 2 lists of phrases"):
        model.predict(pictures, [PHRASES, PHRASES])
    assert model.predict([], PHRASES) == []


def test_damaged_and_missing_images_are_named(tmp_path, pictures):
    whole = encode(pictures[0], "JPEG")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg: the image cannot be decoded .*truncated"):
        read_image(cut)
    with pytest.raises(ValueError, match=rf"the {len(whole) // 2} bytes of the image cannot be decoded: .*truncated"):
        read_image(cut.read_bytes())
    with pytest.raises(ValueError, match=r"the Pillow image cannot be decoded: .*truncated"):
        read_image(Image.open(cut))
    with pytest.raises(ValueError, match=r"none\.png: there is no such image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="the 5 bytes of the image cannot be decoded"):
        read_image(b"words")


def test_image_of_absurd_size_is_refused(monkeypatch, pictures):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cannot be decoded: .*exceeds limit"):
        read_image(encode(pictures[0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), r"not float32\[4, 5, 3\]"),
        (np.zeros((2, 4, 5, 3), np.uint8), "several images go into a list"),
        (np.zeros((4, 5, 4), np.uint8), r"not uint8\[4, 5, 4\]"),
        (np.zeros((0, 5, 3), np.uint8), r"not uint8\[0, 5, 3\]"),
        (Image.fromarray(np.zeros((4, 5), np.uint16)), "mode I;16: choose a window"),
        (encode(np.zeros((4, 5), np.uint16)), "uint16 pixels"),
    ],
)
def test_images_of_another_kind_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image)


def test_command_prints_draws_and_writes_the_boxes(run, model, pictures, tmp_path, capsys):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, pixels in zip(files, pictures, strict=False):
        path.write_bytes(encode(pixels))
    out, boxes = tmp_path / "new" / "out.png", tmp_path / "new" / "out.json"
    arguments = [
        "--checkpoint",
        run[0],
        "--image",
        *files,
        "--phrases",
        "left lung. pleural effusion",
        "--threshold",
        "0.1",
    ]
    assert main([str(word) for word in [*arguments, "--out", out, "--json", boxes]]) == 0

    expected = model.predict(files, PHRASES, threshold=0.1)
    for entry, path, found in zip(json.loads(boxes.read_text()), files, expected, strict=True):
        assert entry["image"] == str(path) and entry["phrases"] == found.phrases and len(found) > 0
        np.testing.assert_allclose(entry["boxes"], found.boxes, atol=1e-2)
        np.testing.assert_allclose(entry["scores"], found.scores, atol=1e-5)
    with Image.open(out) as image:
        assert image.format == "PNG" and image.width > 480
    printed = capsys.readouterr().out
    assert f"{files[0]}: {len(expected[0])} boxes" in printed and f"drawn in {out}" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": "none.png"}, "none.png: there is no such image"),
        ({"--checkpoint": "nowhere"}, "nowhere has no config.json"),
        ({"--threshold": "2"}, "threshold is 2.0"),
        ({"--phrases": "."}, "expected at least one"),
    ],
)
def test_command_reports_mistakes_in_one_line(run, pictures, tmp_path, capsys, changes, message):
    path = tmp_path / "a.png"
    path.write_bytes(encode(pictures[0]))
    options = {"--checkpoint": str(run[0]), "--image": str(path), "--phrases": "nodule"} | changes
    assert main([word for option in options.items() for word in option]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
