"""Texts of pretraining: true of the image as it is shown, and of the region that they are about."""

import collections
import dataclasses

import numpy as np
import pytest

from data_pipelines.captions import TextRule, describe_each, write_caption
from data_pipelines.loader import train_loader
from data_pipelines.records import write_records
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources.phantoms import phantom
from data_pipelines.text import load_tokenizer
from data_pipelines.transforms import flip_annotations


def region(phrase, x=0.0, **others):
    return Region(np.float32([x, 0, x + 10, 10]), phrase, phrase.replace(" ", "_"), **others)


def example(*regions, **others):
    return GroundingExample(b"", "a", "set", 64, 64, regions=regions, **others)


def caption_of(image, seed=0):
    return write_caption(image, np.random.default_rng(seed))


def test_the_best_caption_that_there_is_is_taken():
    positive = Expression("the lung on the left", (0,))
    denial = Expression("no nodule", kind="absent")
    lung = region("left lung", granularity="organ")
    assert caption_of(example(lung, caption="A chest. ", expressions=(positive,))) == "A chest."
    assert {caption_of(example(lung, expressions=(positive, denial)), s) for s in range(9)} == {positive.text}
    assert caption_of(example(lung, expressions=(denial,))) == "this image shows the left lung"
    assert caption_of(example(expressions=(denial,))) == "no nodule"
    assert caption_of(example(absent=("pleural_effusion",))) == "no pleural effusion"
    assert caption_of(example(modality="ct")) == "CT"
    assert caption_of(example()) == "a medical image"


def test_descriptions_are_of_one_region_only_and_crowds_have_none():
    image = example(
        region("left lung", 40, granularity="organ"),
        region("nodule", 5, granularity="lesion"),
        region("nodule", 45, granularity="lesion"),
        region("cell", 20, iscrowd=True),
        expressions=(Expression("both nodules", (1, 2)), Expression("the one beside the heart", (1,))),
    )
    seen = collections.defaultdict(set)
    for seed in range(20):
        for place, text in describe_each(image, np.random.default_rng(seed)):
            seen[place].add(text)
    assert seen[1] == {"the one beside the heart"} and 3 not in seen
    assert "left lung" in seen[0]
    assert "nodule" not in seen[2] and all("right" in text for text in seen[2])


def test_mirrored_image_has_mirrored_descriptions():
    image = example(region("left lung", 50, granularity="organ"), region("heart", 30, granularity="organ"))
    drawn = [describe_each(x, np.random.default_rng(0)) for x in (image, flip_annotations(image))]
    assert dict(drawn[0])[0].replace("left", "right") == dict(drawn[1])[0].replace("left", "right")
    assert all("right lung" in text for place, text in drawn[1] if place == 0)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records([phantom(index, size=64) for index in range(8)], folder, name="phantoms")
    return str(folder)


def batches_of(tiny_config, records, text, number=3, **fields):
    data = tiny_config.data.copy_and_resolve_references()
    data.train, data.text, data.batch_size = records, text, 4
    data.update(fields)
    loader = train_loader(data, seed=1, batch_size=4, process_index=0, process_count=1)
    batches = [next(loader) for _ in range(number)]
    loader.close()
    return batches


def test_batches_of_descriptions_have_their_boxes(tiny_config, records):
    (batch,) = batches_of(tiny_config, records, "descriptions", 1, max_descriptions=3, max_tokens=24)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 3, 24)
    assert batch["boxes"].shape == (4, 3, 4) and batch["box_mask"].shape == (4, 3)
    assert (batch["box_mask"] == (batch["attention_mask"].sum(axis=-1) > 2)).all() and batch["box_mask"].any()
    sides = batch["boxes"][batch["box_mask"]]
    assert (sides[:, 2:] > sides[:, :2]).all() and sides.max() <= 64
    assert "positive_map" not in batch


def test_captions_are_cut_and_the_same_again(tiny_config, records):
    first, again = (batches_of(tiny_config, records, "captions", max_tokens=12) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
        assert (one["attention_mask"].sum(axis=1) <= 12).all() and "boxes" not in one
    (none,) = batches_of(tiny_config, records, "none", 1)
    assert none.keys() == {"image", "image_size", "modality", "image_id"}
    np.testing.assert_array_equal(none["image"], first[0]["image"])  # what is drawn before the text does not change


def test_prefix_is_that_of_prompts():
    rule = TextRule("captions", max_tokens=32, max_descriptions=1, prefix_probability=1.0)
    tokenizer = load_tokenizer()
    image = dataclasses.replace(phantom(0, size=64, modality="xray"), caption="one nodule")
    row = rule(image, np.random.default_rng(0), tokenizer, (1.0, 1.0))
    wanted = tokenizer.encode("chest x-ray: one nodule").ids
    assert row["input_ids"][: len(wanted)].tolist() == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "caption"}, r"config\.data\.text is 'caption': there are prompts, captions"),
        ({"max_descriptions": 0}, r"max_descriptions is 0"),
        ({"prefix_probability": 1.5, "text": "captions"}, r"prefix_probability is 1.5"),
    ],
)
def test_unusable_fields_are_named(tiny_config, fields, message):
    data = tiny_config.data.copy_and_resolve_references()
    data.update(fields)
    with pytest.raises(ValueError, match=message):
        TextRule.from_config(data)
