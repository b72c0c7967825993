import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.text import (
    Prompt,
    PromptTooLong,
    build_caption_prompt,
    build_prompt,
    build_prompts,
    load_tokenizer,
    make_prefix,
    order_by_body_region,
    swap_sides,
    swap_sides_with_spans,
)

TOKENIZER = load_tokenizer()
CLS, SEP, STOP = (TOKENIZER.encode("[CLS] [SEP] .").ids[place] for place in (1, 2, 3))
TAXONOMY = load_taxonomy()


def tokenize(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids[1:-1]


def tokens_of(prompt: Prompt, row: int) -> list[int]:
    """Returns the tokens that the positive map gives to a phrase."""
    return prompt.input_ids[prompt.positive_map[row] > 0].tolist()


def num_tokens(prompt: Prompt) -> int:
    return int(prompt.attention_mask.sum())


# Phrases that repeat, hold each other, and are spelled in several ways.
phrases_of_few_words = st.lists(
    st.sampled_from(["lung", "left", "left lung", "non-small", "x-ray", "T2/FLAIR", "Œdème", "α-globin", "肺", "e."]),
    min_size=1,
    max_size=3,
).map(" ".join)
phrases = st.one_of(
    phrases_of_few_words,
    st.sampled_from(TAXONOMY.phrases()),
    st.text(min_size=1, max_size=10).map(str.strip).filter(tokenize),
)


def test_phrases_are_joined_by_full_stops_with_none_at_the_end():
    prompt = build_prompt([" left lung", "nodule\n", "COVID-19 infection"], TOKENIZER, 32)
    assert prompt.text == "left lung. nodule. COVID-19 infection"
    assert prompt.phrases == ("left lung", "nodule", "COVID-19 infection")
    assert (prompt.input_ids.dtype, prompt.attention_mask.dtype) == (np.int32, np.int32)
    assert prompt.positive_map.dtype == np.float32


@given(st.lists(phrases, min_size=1, max_size=8))
def test_every_phrase_gets_exactly_its_own_tokens_and_separators_belong_to_none(names):
    prompt = build_prompt(names, TOKENIZER, 256)
    ids, expected = [CLS], np.zeros((len(names), 256), np.float32)
    for row, name in zip(expected, names, strict=True):
        own = tokenize(name)
        row[len(ids) : len(ids) + len(own)] = 1 / len(own)
        ids += [*own, STOP]
    ids[-1] = SEP
    assert prompt.input_ids[: len(ids)].tolist() == ids
    np.testing.assert_allclose(prompt.positive_map, expected, rtol=1e-6)
    np.testing.assert_allclose(prompt.positive_map.sum(axis=1), 1, rtol=1e-6)


@given(st.lists(phrases, min_size=1, max_size=8), st.sampled_from(["", "chest x-ray: ", "odd:"]), st.integers(4, 60))
def test_prompts_of_remembered_phrases_are_those_of_the_whole_text(names, prefix, max_tokens):
    whole = copy.copy(TOKENIZER)
    whole.splits_at_spaces = False

    def build(tokenizer):
        try:
            return build_prompt(names, tokenizer, max_tokens, prefix)
        except PromptTooLong as error:
            return error.phrases, error.num_tokens

    quick, slow = build(TOKENIZER), build(whole)
    if not isinstance(quick, Prompt) or not isinstance(slow, Prompt):
        assert quick == slow
        return
    assert (quick.text, quick.phrases) == (slow.text, slow.phrases)
    for field in ("input_ids", "attention_mask", "positive_map"):
        np.testing.assert_array_equal(getattr(quick, field), getattr(slow, field))


def test_rest_of_a_prompt_is_padding_that_belongs_to_no_phrase():
    prompt = build_prompt(["left lung", "nodule"], TOKENIZER, 12)
    assert prompt.attention_mask.tolist() == [1] * 6 + [0] * 6
    assert prompt.input_ids[6:].tolist() == [TOKENIZER.pad_id] * 6
    assert not prompt.positive_map[:, 6:].any()


@pytest.mark.parametrize("empty", ["", "  ", "\t\n"])
def test_empty_phrase_is_an_error(empty):
    for build in (build_prompt, build_prompts):
        with pytest.raises(ValueError, match=r"a phrase is empty"):
            build(["lung", empty], TOKENIZER, 32)


def test_phrase_that_the_tokenizer_drops_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"keeps nothing of the phrase '\\u200b'"):
        build_prompt(["lung", "\u200b"], TOKENIZER, 32)


def test_prompt_that_is_too_long_names_the_phrases_that_fell_off():
    names = ["left lung", "nodule", "heart"]
    assert build_prompt(names, TOKENIZER, 8).attention_mask.all()
    with pytest.raises(PromptTooLong, match=r"needs 8 tokens and 7 are allowed: 'heart' fell off") as caught:
        build_prompt(names, TOKENIZER, 7)
    assert caught.value.phrases == ("heart",)
    with pytest.raises(PromptTooLong, match=r"'left lung', 'nodule', 'heart' fell off"):
        build_prompt(names, TOKENIZER, 3)
    with pytest.raises(PromptTooLong, match=r"'nodule', 'nodule' and 2 more fell off"):
        build_prompt(["nodule"] * 9, TOKENIZER, 6)
    with pytest.raises(PromptTooLong, match=r"2 tokens and 1 are allowed; use fewer"):
        build_prompt([], TOKENIZER, 1)


def test_too_long_error_survives_the_way_out_of_a_worker():
    error = PromptTooLong(["left lung"], 300, 256)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.phrases) == (str(error), ("left lung",))


SENTENCE = "A nodule in the left lung, another in the right one."


def spans_of(*words: str) -> list[tuple[int, int]]:
    return [(SENTENCE.index(word), SENTENCE.index(word) + len(word)) for word in words]


def test_sentence_is_the_prompt_as_it_is_and_spans_become_phrases():
    prompt = build_caption_prompt(SENTENCE, [spans_of("left lung"), spans_of("nodule", "right one")], TOKENIZER, 32)
    assert prompt.text == SENTENCE
    assert prompt.input_ids[: num_tokens(prompt)].tolist() == TOKENIZER.encode(SENTENCE).ids
    assert prompt.phrases == ("left lung", "nodule right one")
    assert tokens_of(prompt, 0) == tokenize("left lung")
    assert tokens_of(prompt, 1) == tokenize("nodule right one")
    np.testing.assert_allclose(prompt.positive_map.sum(axis=1), 1, rtol=1e-6)


@given(st.data())
def test_spans_of_a_sentence_get_exactly_their_words(data):
    words = data.draw(st.lists(phrases, min_size=1, max_size=10))
    starts = list(itertools.accumulate((len(word) + 1 for word in words), initial=0))
    groups = data.draw(st.lists(st.sets(st.integers(0, len(words) - 1), min_size=1), max_size=4))
    spans = [[(starts[i], starts[i] + len(words[i])) for i in group] for group in groups]
    prompt = build_caption_prompt(" ".join(words), spans, TOKENIZER, 256)
    for row, group in enumerate(groups):
        assert tokens_of(prompt, row) == [token for i in sorted(group) for token in tokenize(words[i])]
        assert set(np.unique(prompt.positive_map[row] * len(tokens_of(prompt, row))).round(5)) <= {0, 1}


def test_span_gets_no_token_that_ends_where_it_begins_or_begins_where_it_ends():
    text = "(left)lung/nodule"
    prompt = build_caption_prompt(text, [[(text.index("lung"), text.index("/"))]], TOKENIZER, 16)
    assert tokens_of(prompt, 0) == tokenize("lung")


def test_span_that_cuts_a_word_gets_its_tokens():
    ((start, end),) = spans_of("nodule")
    prompt = build_caption_prompt(SENTENCE, [[(start + 2, end - 2)]], TOKENIZER, 32)
    assert tokens_of(prompt, 0) == tokenize("nodule")


@pytest.mark.parametrize("spans", [[], [(3, 3)], [(5, 2)], [(-1, 2)], [(0, 99)], [(2, 8), (50, 53)]])
def test_span_outside_its_sentence_is_an_error(spans):
    with pytest.raises(ValueError, match="are not inside the caption 'A nodule in"):
        build_caption_prompt(SENTENCE, [spans_of("lung"), spans], TOKENIZER, 32)


def test_span_of_white_space_is_an_error():
    with pytest.raises(ValueError, match="a phrase is empty"):
        build_caption_prompt(SENTENCE, [[(1, 2)]], TOKENIZER, 32)


def test_words_of_no_phrase_may_fall_off_the_end_of_a_sentence():
    whole = TOKENIZER.encode(SENTENCE).ids
    spans = [spans_of("left lung")]
    prompt = build_caption_prompt(SENTENCE, spans, TOKENIZER, 8)
    assert prompt.input_ids.tolist() == [*whole[:7], SEP]
    assert tokens_of(prompt, 0) == tokenize("left lung")
    with pytest.raises(PromptTooLong, match=f"needs {len(whole)} tokens and 7 are allowed: 'left lung' fell off"):
        build_caption_prompt(SENTENCE, spans, TOKENIZER, 7)
    with pytest.raises(PromptTooLong, match="'nodule right one' fell off"):
        build_caption_prompt(SENTENCE, [*spans, spans_of("nodule", "right one")], TOKENIZER, 10)


@given(st.lists(phrases, min_size=1, max_size=20), st.integers(8, 24))
def test_chunks_hold_every_phrase_once_in_order_and_as_many_as_fit(names, max_tokens):
    assume(all(len(tokenize(name)) + 2 <= max_tokens for name in names))
    prompts = build_prompts(names, TOKENIZER, max_tokens)
    assert [place for _, places in prompts for place in places] == list(range(len(names)))
    for prompt, places in prompts:
        alone = build_prompt([names[place] for place in places], TOKENIZER, max_tokens)
        assert (prompt.text, prompt.phrases) == (alone.text, alone.phrases)
        np.testing.assert_array_equal(prompt.input_ids, alone.input_ids)
        np.testing.assert_array_equal(prompt.positive_map, alone.positive_map)
    for (prompt, _), (_, after) in itertools.pairwise(prompts):
        with pytest.raises(PromptTooLong):
            build_prompt([*prompt.phrases, names[after[0]]], TOKENIZER, max_tokens)


def test_phrase_too_long_for_any_prompt_is_an_error_that_names_it():
    with pytest.raises(PromptTooLong, match=r"'left upper lobe of the lung' fell off"):
        build_prompts(["nodule", "left upper lobe of the lung", "heart"], TOKENIZER, 7)


@given(st.lists(phrases, min_size=1, max_size=8), st.integers(24, 60))
def test_prefix_begins_every_chunk_and_belongs_to_no_phrase(names, max_tokens):
    prefix = "chest x-ray: "
    leading = TOKENIZER.encode(prefix).ids[:-1]
    chunks = build_prompts(names, TOKENIZER, max_tokens, prefix)
    assert [index for _, indices in chunks for index in indices] == list(range(len(names)))
    for prompt, indices in chunks:
        assert prompt.text.startswith(prefix)
        assert prompt.input_ids[: len(leading)].tolist() == leading
        assert not prompt.positive_map[:, : len(leading)].any()
        assert [tokens_of(prompt, row) for row in range(len(indices))] == [tokenize(names[i]) for i in indices]


def test_prefix_moves_the_spans_of_a_sentence():
    prompt = build_caption_prompt(SENTENCE, [spans_of("left lung")], TOKENIZER, 32, "CT: ")
    assert (prompt.text, prompt.phrases) == (f"CT: {SENTENCE}", ("left lung",))
    assert tokens_of(prompt, 0) == tokenize("left lung")


@pytest.mark.parametrize(
    ("modality", "regions", "prefix"),
    [
        ("xray", ("chest", "chest", "abdomen"), "chest x-ray: "),
        ("ct", ("abdomen",), "abdominal CT: "),
        ("mri", ("chest", "abdomen"), "MRI: "),  # neither is most of it
        ("ct", ("tissue",), "CT: "),
        ("fundus", ("head_neck",), "fundus photograph: "),  # says as much itself
        ("xray", (), "x-ray: "),
        ("unknown", ("chest",), ""),
    ],
)
def test_prefix_says_modality_and_what_most_of_the_image_shows(modality, regions, prefix):
    assert make_prefix(modality, regions) == prefix


def test_phrases_of_one_body_region_come_together():
    names = ["liver", "odd", "heart", "spleen", "left lung", "odder"]
    assert [names[i] for i in order_by_body_region(names)] == ["liver", "spleen", "heart", "left lung", "odd", "odder"]


def test_no_phrases_to_look_for_is_an_error():
    with pytest.raises(ValueError, match="there are no phrases to look for"):
        build_prompts([], TOKENIZER, 32)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("left lung", "right lung"),
        ("Right-sided effusion, LEFT base.", "Left-sided effusion, RIGHT base."),
        ("left_lower_lobe", "right_lower_lobe"),
        ("lung_left_upper", "lung_right_upper"),
        ("the left and the right lung", "the right and the left lung"),
        ("the leftmost bright upright copyright", "the leftmost bright upright copyright"),
        ("left2 2right éleft rightß", "left2 2right éleft rightß"),
        ("rıght rİght", "rıght rİght"),
        ("", ""),
    ],
)
def test_left_and_right_change_places_as_whole_words_with_their_case(text, swapped):
    assert swap_sides(text) == swapped


OTHER = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OTHER.update({right: left for left, right in OTHER.items()})
joints = st.sampled_from(["most", "b", "lung", "é", "ß", "rıght", "İ", "7", " ", "  ", "_", "-", ". ", "'"])


@given(st.lists(st.sampled_from(sorted(OTHER)) | joints, max_size=20).map("".join))
def test_swapping_sides_twice_changes_nothing(text):
    words = ("".join(run) for _, run in itertools.groupby(text, str.isalnum))
    assert swap_sides(text) == "".join(OTHER.get(word, word) for word in words)
    assert swap_sides(swap_sides(text)) == text


@given(st.lists(st.sampled_from([*OTHER, "lung", "leftmost", "rıght"]), min_size=1), st.data())
def test_spans_move_with_their_words(words, data):
    def spans_of_words(lengths):
        starts = list(itertools.accumulate((length + 1 for length in lengths), initial=0))
        return [tuple((starts[i], starts[j] + lengths[j]) for i, j in group) for group in groups]

    place = st.integers(0, len(words) - 1)
    span = st.tuples(place, place).map(sorted)
    groups = data.draw(st.lists(st.lists(span, max_size=3), max_size=3))
    spans = spans_of_words([len(word) for word in words])
    text, moved = swap_sides_with_spans(" ".join(words), spans)
    swapped = [OTHER.get(word, word) for word in words]
    assert text == " ".join(swapped)
    assert moved == spans_of_words([len(word) for word in swapped])
    assert swap_sides_with_spans(text, moved) == (" ".join(words), spans)


def test_span_that_cuts_a_swapped_word_gets_all_of_it():
    text, (spans,) = swap_sides_with_spans("the left lung, right", [[(5, 10), (0, 6), (15, 18), (6, 7), (8, 13)]])
    assert text == "the right lung, left"
    assert [text[start:end] for start, end in spans] == ["right l", "the right", "left", "right", " lung"]
