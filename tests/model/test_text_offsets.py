"""Learned offsets of phrases: they go to the tokens of their phrase, as the positive map has them, and nowhere else."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.medglip_t import get_config
from data_pipelines.records import write_records
from data_pipelines.sources.phantoms import Phantoms
from data_pipelines.text import build_prompt, load_tokenizer
from medglip_jax.model.text_offsets import apply_model, place_offsets
from medglip_jax.training.phrases import learned_phrases, make_offsets
from tests.training.slim import Slim

LEARNED = ["lung", "left lung", "nodule", "right upper lobe of lung", "Pneumothorax"]
OTHERS = ["lung nodule", "upper lobe", "lung of left lung", "nodule nodule", "heart"]
LENGTH, WIDTH = 96, 3


def recipe(phrases):
    config = get_config()
    config.finetune.mode, config.finetune.phrases, config.model.bert.hidden_size = "prompt", phrases, WIDTH
    return config


def offsets_of(config):
    """The subtree with a number of its own in every place."""
    prompt = jax.device_get(make_offsets(config))
    assert not prompt["offsets"].any()
    return {
        **prompt,
        "offsets": 1 + np.arange(prompt["offsets"].size, dtype=np.float32).reshape(prompt["offsets"].shape),
    }


PROMPT = offsets_of(recipe(". ".join(LEARNED)))
place = jax.jit(place_offsets)


@given(st.permutations(LEARNED + OTHERS), st.integers(1, 10), st.sampled_from(["", "chest x-ray: ", "CT: "]))
def test_offsets_stand_where_the_positive_map_has_the_phrase(phrases, count, prefix):
    prompt = build_prompt(phrases[:count], load_tokenizer(), LENGTH, prefix)
    wanted = np.zeros((LENGTH, WIDTH), np.float32)
    for phrase, row in zip(prompt.phrases, prompt.positive_map, strict=True):
        if phrase in LEARNED:
            places = np.flatnonzero(row)
            wanted[places] = PROMPT["offsets"][LEARNED.index(phrase), : len(places)]
    np.testing.assert_array_equal(place(PROMPT, prompt.input_ids[None])[0], wanted)


def test_sentences_and_other_phrases_get_none():
    prompts = [build_prompt([text], load_tokenizer(), LENGTH) for text in ("a nodule in the left lung", "lung nodule")]
    assert not place(PROMPT, np.stack([prompt.input_ids for prompt in prompts])).any()


def test_phrases_of_the_same_tokens_share_their_offsets():
    prompt = make_offsets(recipe("nodule. Nodule. lung"))
    assert prompt["offsets"].shape == (2, 1, WIDTH)


def test_model_gets_the_offsets_and_does_not_see_their_subtree():
    config = recipe(". ".join(LEARNED))
    config.model.bert.hidden_size = 8
    model, prompt = Slim(), offsets_of(config)
    params = model.init(jax.random.key(0))["params"]
    ids = build_prompt(["heart", "left lung"], load_tokenizer(), 32).input_ids[None]
    inputs = np.ones((1, 64, 64, 3), np.float32), ids, np.ones_like(ids)
    base = model.apply({"params": params}, *inputs)
    still = apply_model(model, {**params, "prompt": make_offsets(config)}, *inputs)
    moved = apply_model(model, {**params, "prompt": prompt}, *inputs)
    jax.tree.map(np.testing.assert_array_equal, still, base)
    jax.tree.map(np.testing.assert_array_equal, apply_model(model, params, *inputs), base)
    changed = np.abs(moved["token_logits"] - base["token_logits"]).max(axis=(0, 1)) > 0
    assert changed.tolist() == (np.asarray(place_offsets(prompt, ids))[0] != 0).any(axis=1).tolist()
    assert changed.sum() == 2


def test_phrases_come_from_a_line_a_file_or_the_records(tmp_path):
    assert learned_phrases(recipe("left lung. nodule.")) == ["left lung", "nodule"]
    (tmp_path / "names.txt").write_text("left lung\n\n nodule \n")
    assert learned_phrases(recipe(str(tmp_path / "names.txt"))) == ["left lung", "nodule"]
    config = recipe("")
    with pytest.raises(ValueError, match=r"mode is prompt, but there are no phrases"):
        learned_phrases(config)
    config.data.train = str(tmp_path / "phantoms")
    records = write_records(Phantoms(4, size=64), tmp_path / "phantoms", name="phantoms")
    assert learned_phrases(config) == sorted(records.metadata["phrases"])


def test_phrases_that_cannot_be_learned_are_named(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no phrases"):
        make_offsets(recipe(str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match=r"keeps nothing of '\\x00'"):
        make_offsets(recipe("lung. \0"))
