"""Evaluation of records: the same on one device and on a mesh, phrases in several prompts, and its oracle."""

import collections
import dataclasses
import io
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.records import read_examples, write_records
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.phantoms import phantom
from data_pipelines.text import build_prompts, load_tokenizer, order_by_body_region
from medglip_jax.evaluation.run import choose_shown, detect_records, evaluate_records
from medglip_jax.inference import make_detector, parameter_shapes
from medglip_jax.model.detector import GLIP
from medglip_jax.parallel.mesh import make_mesh

PHRASES = ("left lung", "heart", "nodule", "pleural effusion")


def mesh_of(data, fsdp, tensor):
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


class WordByWord(nn.Module):
    """A detector in which no word sees another, so that a phrase is found the same in whatever prompt it stands."""

    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, pixels, input_ids, attention_mask, train=False):
        cells = []
        for stride in self.strides:
            window = (min(stride, pixels.shape[1]), min(stride, pixels.shape[2]))
            level = nn.avg_pool(pixels, window, (stride, stride), "SAME")
            cells.append(level.reshape(level.shape[0], -1, 3))
        colors = jnp.concatenate(cells, axis=1)  # [B, N, 3]
        places = self.param("place", nn.initializers.normal(), (colors.shape[1], 8))  # no two anchors are alike
        features = jnp.tanh(nn.Dense(8, name="pixel")(colors) + places)
        words = nn.Embed(4096, 8, name="word")(input_ids)
        return {
            "token_logits": jnp.einsum("bnc,blc->bnl", features, words),
            "box_deltas": nn.Dense(4, name="box")(features),
            "centerness": nn.Dense(1, name="centerness")(features)[..., 0],
        }


def filled(model, config):
    """Random parameters under which scores differ from place to place; it takes no compilation."""
    rng = np.random.default_rng(0)

    def fill(path, x):
        if len(x.shape) < 2:
            return np.full(x.shape, path[-1].key.startswith(("scale", "gamma")), np.float32)
        return rng.normal(0, 1 if path[-1].key == "embedding" else np.prod(x.shape[:-1]) ** -0.5, x.shape).astype(
            np.float32
        )

    return jax.tree_util.tree_map_with_path(fill, parameter_shapes(model, config))


@pytest.fixture(scope="module")
def config(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.detection.pre_nms = 10_000  # all pairs of anchor and phrase, in whatever prompt
    return config


@pytest.fixture(scope="module")
def words(config):
    model = WordByWord(tuple(config.detection.strides))
    return model, filled(model, config)


def stretched_phantom(index):
    """A phantom of another height and width, so that images take different parts of the canvas."""
    example, stretch = phantom(index, size=(64, 96, 150)[index % 3]), (0.5, 1.0, 1.6, 0.8)[index % 4]
    stream, width = io.BytesIO(), round(stretch * example.width)
    Image.open(io.BytesIO(example.image)).resize((width, example.height)).save(stream, "PNG")
    boxes = [region.box * np.float32([stretch, 1, stretch, 1]) for region in example.regions]
    regions = [dataclasses.replace(r, box=box, mask=None) for r, box in zip(example.regions, boxes, strict=True)]
    return dataclasses.replace(example, image=stream.getvalue(), width=width, regions=tuple(regions))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Eleven phantoms: one batch of eight, and one that is not full."""
    folder = tmp_path_factory.mktemp("phantoms")
    examples = [stretched_phantom(index) for index in range(11)]
    return write_records(examples, folder, name="phantoms"), str(folder)


def picture(index, size):
    """An image of one colour, which tells which one it is after any resizing."""
    stream = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 10 * index, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    """Ten images of all shapes with 0 to 3 boxes each, one of them a crowd."""
    rng = np.random.default_rng(2)
    examples = []
    for index in range(10):
        height, width = ((64, 64), (40, 90), (130, 50), (37, 23), (300, 200))[index % 5]
        regions = []
        for place in range(index % 4):
            x0, y0 = rng.uniform(0, 0.5, 2) * (width, height)
            x1, y1 = (x0, y0) + rng.uniform(0.2, 0.45, 2) * (width, height)
            phrase = PHRASES[(index + place) % len(PHRASES)]
            regions.append(Region(np.float32([x0, y0, x1, y1]), phrase, phrase, iscrowd=(index, place) == (7, 2)))
        modality = ("xray", "ct")[index % 2]
        examples.append(
            GroundingExample(
                picture(index, (height, width)),
                f"image-{index}",
                "set",
                height,
                width,
                "",
                modality,
                regions=tuple(regions),
            )
        )
    folder = tmp_path_factory.mktemp("annotated")
    write_records(examples, folder, name="annotated")
    return str(folder)


def oracle(config, records, rename=lambda phrase: phrase):
    """A detector that answers every prompt with the true boxes of its phrases, on the canvas."""
    examples, tokenizer = list(read_examples(records)), load_tokenizer()
    phrases = sorted({region.phrase for example in examples for region in example.regions})
    ordered = [phrases[k] for k in order_by_body_region(phrases)]
    prompts = build_prompts(ordered, tokenizer, config.data.max_tokens)
    asked_by_ids = {prompt.input_ids.tobytes(): prompt.phrases for prompt, _ in prompts}

    def detector(params, *, image, image_size, input_ids, **others):
        most = config.detection.max_detections
        found = {
            "boxes": np.zeros((len(image), most, 4), np.float32),
            "scores": np.zeros((len(image), most), np.float32),
            "phrases": np.full((len(image), most), -1, np.int32),
        }
        asked = asked_by_ids[np.pad(input_ids[0], (0, config.data.max_tokens - input_ids.shape[1])).tobytes()]
        for row, (pixels, size) in enumerate(zip(np.asarray(image), np.asarray(image_size), strict=True)):
            example = examples[int(pixels[0, 0, 0]) // 10]
            scale = np.tile((size / (example.height, example.width))[::-1], 2)
            regions = [region for region in example.regions if rename(region.phrase) in asked and not region.iscrowd]
            for place, region in enumerate(regions):
                found["boxes"][row, place] = region.box * scale
                found["scores"][row, place] = 0.9
                found["phrases"][row, place] = asked.index(rename(region.phrase))
        return found

    return detector


def test_true_boxes_have_average_precision_one(config, annotated):
    results = evaluate_records(None, None, config, annotated, mesh_of(4, 1, 1), detector=oracle(config, annotated))
    assert results["AP"] == results["AP50"] == results["AP75"] == 1
    assert results["accuracy"] == results["pointing"] == 1 and results["false_phrases"] == 0
    assert results["images"] == 10 and results["images_per_second"] > 0 and results["seconds"] > 0
    assert set(results["per_class"]) == set(PHRASES)
    assert all(entry["AP"] == 1 for entry in results["per_class"].values())
    assert sum(entry["count"] for entry in results["per_class"].values()) == 12  # 13 regions, one of them a crowd
    assert {name: (entry["AP"], entry["images"]) for name, entry in results["per_modality"].items()} == {
        "ct": (1, 5),
        "xray": (1, 5),
    }
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_several_prompts_bring_their_phrases_back_to_their_places(config, annotated):
    narrow = config.copy_and_resolve_references()
    narrow.data.max_tokens = 5
    assert len(build_prompts(sorted(PHRASES), load_tokenizer(), 5)) > 2
    results = evaluate_records(None, None, narrow, annotated, mesh_of(1, 1, 1), detector=oracle(narrow, annotated))
    assert results["AP"] == 1


def test_boxes_under_a_wrong_phrase_are_wrong(config, annotated):
    swapped = {"heart": "nodule", "nodule": "heart"}
    detector = oracle(config, annotated, rename=lambda phrase: swapped.get(phrase, phrase))
    results = evaluate_records(None, None, config, annotated, mesh_of(1, 1, 1), detector=detector)
    values = {phrase: entry["AP"] for phrase, entry in results["per_class"].items()}
    assert values["heart"] < 0.1 and values["nodule"] < 0.1 and values["left lung"] == values["pleural effusion"] == 1


def detections_of(model, params, config, records, mesh):
    phrases = sorted(records[0].metadata["phrases"])
    found, speed = detect_records(model, params, config, records[1], mesh, tokenizer=load_tokenizer(), phrases=phrases)
    assert speed > 0 and len(found) == 11
    return found


def assert_same_detections(a, b):
    for first, second in zip(a, b, strict=True):
        # Phrase by phrase: rounding may exchange two boxes of different phrases that have almost the same score.
        p, q = (np.lexsort((-found.scores, found.phrases)) for found in (first, second))
        np.testing.assert_array_equal(first.phrases[p], second.phrases[q])
        np.testing.assert_allclose(first.scores[p], second.scores[q], atol=1e-5)
        np.testing.assert_allclose(first.boxes[p], second.boxes[q], atol=1e-2)


def test_a_mesh_of_eight_devices_finds_the_same(config, phantoms):
    model = GLIP(config.model)
    params = filled(model, config)
    alone = detections_of(model, params, config, phantoms, mesh_of(1, 1, 1))
    assert min(len(found.scores) for found in alone) > 10 and np.ptp(alone[0].scores) > 0.01
    assert_same_detections(alone, detections_of(model, params, config, phantoms, mesh_of(2, 2, 2)))


def test_results_have_every_phrase_and_modality_on_any_mesh(config, words, phantoms, tmp_path):
    model, params = words
    alone = evaluate_records(model, params, config, phantoms[1], mesh_of(1, 1, 1))
    sheet = tmp_path / "new" / "sheet.png"
    asked = config.copy_and_resolve_references()
    asked.evaluation.broader_phrases = True
    spread = evaluate_records(model, params, asked, phantoms[1], mesh_of(2, 2, 2), sheet=sheet, sheet_images=3)
    assert json.loads(json.dumps(spread, allow_nan=False)) == spread
    broader = spread.pop("broader")
    assert {"lesion", "lung opacity", "blood vessel", "bone"} <= set(broader["per_class"]) and broader["AP"] is not None
    assert spread["consistency"]["pairs"] > alone["consistency"]["pairs"]
    assert set(alone["per_class"]) == set(phantoms[0].metadata["phrases"])
    assert set(alone["per_modality"]) == {example.modality for example in read_examples(phantoms[0])}
    assert {"organ", "lesion"} <= set(alone["per_level"]) and alone["absent"] > 0
    for results in (alone, spread):  # what broader names are asked for does not change the rest
        del results["seconds"], results["images_per_second"], results["consistency"]
    assert spread == jax.tree.map(lambda x: pytest.approx(x, abs=1e-6), alone)
    with Image.open(sheet) as image:
        assert image.width > 3 * 300


def test_several_prompts_find_what_one_prompt_finds(config, words, phantoms):
    model, params = words
    mesh, wide = mesh_of(1, 1, 1), config.copy_and_resolve_references()
    wide.data.max_tokens = 256
    phrases = sorted(phantoms[0].metadata["phrases"])
    in_one = detections_of(model, params, wide, phantoms, mesh)
    in_many = detections_of(model, params, config, phantoms, mesh)
    prompts = build_prompts(phrases, load_tokenizer(), config.data.max_tokens)
    assert len(build_prompts(phrases, load_tokenizer(), 256)) == 1 and len(prompts) > 3
    shown = {int(phrase) for found in in_one for phrase in found.phrases}
    assert all(shown & set(places) for _, places in prompts)
    assert_same_detections(in_one, in_many)


def test_broader_phrases_may_be_made_to_score_as_their_kinds(config, words, phantoms):
    model, params = words
    chain = ("melanoma", "skin lesion", "lesion")

    def rises(raised):
        recipe = config.copy_and_resolve_references()
        recipe.detection.raise_broader = raised
        options = {"tokenizer": load_tokenizer(), "phrases": [*chain, "liver"]}
        found, _ = detect_records(model, params, recipe, phantoms[1], mesh_of(2, 2, 2), **options)
        best = [[max(each.scores[each.phrases == k], default=0) for k in range(3)] for each in found]
        return [a <= b <= c for a, b, c in best]

    assert all(rises(True)) and not all(rises(False))


def test_one_compilation_serves_all_prompts(config, words, phantoms):
    model, params = words
    mesh = mesh_of(1, 1, 1)
    detector = make_detector(model, config, mesh)
    for _ in range(2):
        evaluate_records(model, params, config, phantoms[1], mesh, detector=detector)
    assert detector._cache_size() == 1


def test_records_without_regions_are_refused(config, tmp_path):
    example = dataclasses.replace(phantom(0, size=64), regions=())
    write_records([example], tmp_path, name="normal")
    with pytest.raises(ValueError, match=f"{tmp_path}: no image of these records has a region"):
        evaluate_records(None, None, config, str(tmp_path), mesh_of(1, 1, 1))


def test_batch_that_does_not_fit_the_mesh_is_refused(config, annotated):
    config = config.copy_and_resolve_references()
    config.data.eval_batch_size = 6
    with pytest.raises(ValueError, match="eval_batch_size is 6: it must be a multiple of 4"):
        evaluate_records(None, None, config, annotated, mesh_of(2, 2, 2), detector=oracle(config, annotated))


@pytest.mark.parametrize(
    ("options", "message"), [({"sheet_images": 0}, "sheet_images is 0"), ({"sheet": "x.foo"}, "x.foo")]
)
def test_contact_sheet_that_cannot_be_written_is_refused_before_the_detection(config, annotated, options, message):
    def detector(*arguments, **named):
        pytest.fail("it detects first")

    with pytest.raises(ValueError, match=message):
        evaluate_records(
            None, None, config, annotated, mesh_of(1, 1, 1), detector=detector, **{"sheet": "x.png", **options}
        )


@given(st.lists(st.sampled_from(["ct", "mri", "xray"]), min_size=1, max_size=40), st.integers(1, 20))
def test_a_sheet_has_as_many_images_of_each_modality_as_there_are(modalities, count):
    chosen = choose_shown(modalities, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(modalities))
    shown, there = (collections.Counter(x) for x in ([modalities[i] for i in chosen], modalities))
    for one, other in itertools.permutations(there, 2):
        assert shown[one] >= shown[other] - 1 or shown[one] == there[one]
    first = list(dict.fromkeys(modalities))
    assert chosen == sorted(chosen, key=lambda i: (first.index(modalities[i]), i))
