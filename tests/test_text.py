import collections
import dataclasses
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_pipelines.schema import GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.text import (
    Prompt,
    PromptTooLong,
    Vocabulary,
    build_caption_prompt,
    build_prompt,
    build_prompts,
    load_tokenizer,
    sample_prompt,
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


def test_no_phrases_to_look_for_is_an_error():
    with pytest.raises(ValueError, match="there are no phrases to look for"):
        build_prompts([], TOKENIZER, 32)


def shows(*labels: str, absent: tuple[str, ...] = (), **fields) -> GroundingExample:
    """Returns an image with a region for each label of the taxonomy."""
    regions = []
    for label in labels:
        entry = TAXONOMY.labels[label]
        regions.append(Region(np.zeros(4, np.float32), entry.name, label, entry.granularity, entry.parent))
    return GroundingExample(b"", "i", "d", 8, 8, regions=tuple(regions), absent=absent, **fields)


def region(phrase: str, label: str, **fields) -> Region:
    return Region(np.zeros(4, np.float32), phrase, label, **fields)


NAMES = {name: label.id for label in TAXONOMY.labels.values() for name in (label.name, *label.synonyms)}
EVERYTHING = Vocabulary(NAMES)
CHEST = Vocabulary({phrase: NAMES[phrase] for phrase in ("heart", "nodule", "fracture", "trachea")})


@given(st.sets(st.sampled_from(sorted(TAXONOMY.labels)), max_size=4), st.integers(0, 9))
def test_negatives_are_all_but_what_the_image_shows_its_synonyms_and_what_holds_it(labels, seed):
    negatives = EVERYTHING.sample_negatives(shows(*labels), np.random.default_rng(seed), 10**6)
    true = labels.union(*(TAXONOMY.parents(label) for label in labels))
    assert sorted(negatives) == sorted(name for name, label in NAMES.items() if label not in true)


def test_what_the_image_shows_is_known_by_phrase_label_and_parent():
    def drawn(*regions):
        example = dataclasses.replace(shows(), regions=regions)
        return {NAMES[name] for name in EVERYTHING.sample_negatives(example, np.random.default_rng(0), 10**6)}

    everything = set(TAXONOMY.labels)
    assert drawn() == everything
    assert drawn(region("Lung_Cancer", "class 3")) == everything - {"lung_tumor", "lung", "chest"}
    assert drawn(region("a spot", "RBC")) == everything - {"red_blood_cell"}
    assert drawn(region("a spot", "spot", parent="left_lung")) == everything - {"left_lung", "lung", "chest"}
    assert drawn(region("heart", "heart", iscrowd=True)) == everything - {"heart", "mediastinum", "chest"}


def test_phrase_of_a_label_that_is_shown_is_no_negative_outside_the_taxonomy_either():
    vocabulary = Vocabulary({"Spot": "odd", "blot": "odd", "streak-like": "even", "streak like": "even"})
    example = dataclasses.replace(shows(), regions=(region("spot", "odd"),))
    (negative,) = vocabulary.sample_negatives(example, np.random.default_rng(0), 9)
    assert negative in ("streak-like", "streak like")
    synonym = Vocabulary({"Lung Cancer": "class 3"})
    assert synonym.sample_negatives(shows("lung_tumor"), np.random.default_rng(0), 9) == []


def test_absent_labels_are_the_first_negatives():
    example = shows("left_lung", absent=("pneumothorax", "lung_nodule", "odd_shadow", "pneumothorax"))
    first = collections.Counter()
    for seed in range(60):
        negatives = EVERYTHING.sample_negatives(example, np.random.default_rng(seed), 5)
        assert len(set(negatives)) == 5
        assert sorted(negatives[:3]) == ["nodule", "odd shadow", "pneumothorax"]
        first[negatives[0]] += 1
    assert len(first) == 3


def test_absent_label_goes_by_the_phrase_of_the_data_set():
    vocabulary = Vocabulary({"lung lesion": "lung_nodule", "spot": "lung_nodule"})
    example = shows(absent=("lung_nodule",))
    assert vocabulary.sample_negatives(example, np.random.default_rng(0), 1) == ["lung lesion"]
    assert Vocabulary({}).phrase_of("left_autochthon") == "left back muscle"  # else by that of the taxonomy


def test_label_both_shown_and_absent_is_no_negative():
    example = shows("left_lung", "lung_tumor", absent=("lung", "lung_tumor", "Lung Cancer", "odd"))
    example = dataclasses.replace(example, regions=(*example.regions, region("spot", "odd")))
    assert Vocabulary({}).sample_negatives(example, np.random.default_rng(0), 9) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_more_negatives_than_asked_for(count):
    example = shows(absent=("pneumothorax", "polyp"))
    assert len(CHEST.sample_negatives(example, np.random.default_rng(0), count)) == count


def test_every_phrase_of_the_vocabulary_comes_up():
    drawn = (CHEST.sample_negatives(shows("heart"), np.random.default_rng(seed), 1) for seed in range(300))
    found = collections.Counter(name for names in drawn for name in names)
    assert found.keys() == {"nodule", "fracture", "trachea"}
    assert min(found.values()) > 60


def test_vocabulary_comes_from_the_metadata_of_records():
    metadata = {"spot": {"label": "lung_nodule", "granularity": "lesion", "count": 3, "modalities": {"ct": 3}}}
    vocabulary = Vocabulary.from_metadata(metadata)
    assert (vocabulary.phrases, vocabulary.phrase_of("lung_nodule")) == (("spot",), "spot")


def sample(example: GroundingExample, seed: int = 0, **changes) -> tuple[Prompt, tuple[Region, ...]]:
    options = {
        "tokenizer": TOKENIZER,
        "max_tokens": 64,
        "max_negatives": 4,
        "full_negatives_probability": 0.5,
        "caption_probability": 0.0,
        "vocabulary": EVERYTHING,
    }
    return sample_prompt(example, np.random.default_rng(seed), **{**options, **changes})


def names_in(prompt: Prompt) -> list[str]:
    return prompt.text.split(". ") if prompt.text else []


def test_regions_get_the_tokens_of_their_phrase_among_negatives():
    example = shows("left_lung", "lung_nodule", "left_lung")
    for seed in range(20):
        prompt, regions = sample(example, seed)
        assert regions == example.regions
        assert prompt.phrases == ("left lung", "nodule", "left lung")
        assert [tokens_of(prompt, row) for row in range(3)] == [tokenize(name) for name in prompt.phrases]
        assert prompt.positive_map[0].tolist() == prompt.positive_map[2].tolist()
        assert names_in(prompt).count("left lung") == names_in(prompt).count("nodule") == 1
        assert 3 <= len(names_in(prompt)) <= 6


def test_spellings_of_one_name_are_one_phrase():
    example = shows()
    found = (region("A nodule", "x"), region("a Nodule", "y"), region("a_nodule ", "z"))
    prompt, _ = sample(dataclasses.replace(example, regions=found), max_negatives=0)
    assert prompt.text == "A nodule"
    assert [tokens_of(prompt, row) for row in range(3)] == [tokenize("a nodule")] * 3


def test_crowd_regions_are_neither_targets_nor_negatives():
    example = shows("left_lung")
    example = dataclasses.replace(example, regions=(*example.regions, region("nodule", "lung_nodule", iscrowd=True)))
    prompt, regions = sample(example, max_negatives=10**6, full_negatives_probability=1.0, max_tokens=4096)
    assert regions == example.regions[:1]
    assert prompt.phrases == ("left lung",)
    assert prompt.positive_map.shape[0] == 1
    assert not {"nodule", "lung nodule"} & set(names_in(prompt))


def test_image_without_regions_is_asked_for_negatives_only():
    prompt, regions = sample(shows(absent=("fracture",)), max_negatives=1)
    assert (regions, prompt.phrases, prompt.text) == ((), (), "fracture")
    assert prompt.positive_map.shape == (0, 64)
    assert sample(shows(), max_negatives=0)[0].text == ""


def test_number_of_negatives_is_the_most_or_anything_from_one_to_it():
    example = shows("left_lung")

    def counts(probability: float) -> list[int]:
        drawn = (sample(example, seed, full_negatives_probability=probability)[0] for seed in range(800))
        found = collections.Counter(len(names_in(prompt)) - 1 for prompt in drawn)
        assert found.keys() <= {1, 2, 3, 4}
        return [found[number] for number in (1, 2, 3, 4)]

    assert counts(1.0) == [0, 0, 0, 800]
    np.testing.assert_allclose(counts(0.0), [200] * 4, atol=50)  # four standard deviations
    np.testing.assert_allclose(counts(0.5), [100, 100, 100, 500], atol=57)
    assert len(names_in(sample(example, max_negatives=0)[0])) == 1


@given(
    st.lists(st.sampled_from(sorted(TAXONOMY.labels)), min_size=1, max_size=5, unique=True),
    st.integers(0, 30),
    st.integers(0, 9),
)
def test_negatives_fill_the_free_tokens_and_no_positive_is_ever_dropped(labels, free, seed):
    example = shows(*labels)
    names = [found.phrase for found in example.regions]
    needed = num_tokens(build_prompt(names, TOKENIZER, 256))
    prompt, regions = sample(
        example, seed, max_tokens=needed + free, max_negatives=10**6, full_negatives_probability=1.0
    )
    assert regions == example.regions
    assert set(names) <= set(names_in(prompt))
    assert [tokens_of(prompt, row) for row in range(len(names))] == [tokenize(name) for name in names]
    assert num_tokens(prompt) >= needed + free - 1  # a word with its separator takes two
    assert num_tokens(prompt) == needed or free >= 2


def test_long_negative_that_does_not_fit_leaves_room_for_a_short_one():
    vocabulary = Vocabulary({"a very long name of a finding": "a", "cyst": "b"})
    for seed in range(8):
        prompt, _ = sample(shows("heart"), seed, max_tokens=5, full_negatives_probability=1.0, vocabulary=vocabulary)
        assert sorted(names_in(prompt)) == ["cyst", "heart"]


def test_phrases_of_the_image_that_alone_do_not_fit_are_an_error():
    with pytest.raises(PromptTooLong, match="7 tokens and 6 are allowed"):
        sample(shows("left_lung", "right_lung"), max_tokens=6)


def test_order_of_phrases_is_random():
    example = shows("heart", "lung_nodule")
    options = {"max_negatives": 1, "vocabulary": Vocabulary({"cyst": "cyst"})}
    orders = collections.Counter(sample(example, seed, **options)[0].text for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 60


def test_same_seed_gives_the_same_prompt():
    example = shows("left_lung", "lung_nodule", absent=("fracture",))
    first, again, other = (sample(example, seed)[0] for seed in (3, 3, 4))
    assert first.text == again.text != other.text
    np.testing.assert_array_equal(first.input_ids, again.input_ids)
    np.testing.assert_array_equal(first.positive_map, again.positive_map)


def captioned(**fields) -> GroundingExample:
    example = shows("left_lung", "lung_nodule", caption=SENTENCE, **fields)
    spans = [spans_of("left lung"), spans_of("nodule")]
    return dataclasses.replace(
        example,
        regions=tuple(dataclasses.replace(r, spans=tuple(s)) for r, s in zip(example.regions, spans, strict=True)),
    )


def test_own_sentence_is_the_prompt_as_often_as_asked_for():
    example = captioned()
    for probability, expected in ((0.0, 0), (0.5, 200), (1.0, 400)):
        prompts = [sample(example, seed, caption_probability=probability)[0] for seed in range(400)]
        found = [prompt for prompt in prompts if prompt.text == SENTENCE]
        assert abs(len(found) - expected) <= (40 if probability == 0.5 else 0)
        assert all(prompt.phrases == ("left lung", "nodule") for prompt in prompts)
        assert all(tokens_of(prompt, 0) == tokenize("left lung") for prompt in prompts)


def test_sentence_that_does_not_say_where_or_does_not_fit_gives_way_to_phrases():
    example = captioned()
    silent = dataclasses.replace(example, regions=(example.regions[0], region("nodule", "lung_nodule")))
    for text, options in ((silent, {}), (example, {"max_tokens": 7}), (shows(caption=SENTENCE), {})):
        prompt, _ = sample(text, caption_probability=1.0, **options)
        assert prompt.text and prompt.text != SENTENCE
        assert prompt.text == sample(text, caption_probability=0.0, **options)[0].text
    assert sample(silent)[0].text == sample(example)[0].text


def test_crowd_region_without_words_does_not_keep_a_sentence_away():
    example = captioned()
    crowd = dataclasses.replace(example, regions=(*example.regions, region("rib", "rib", iscrowd=True)))
    prompt, regions = sample(crowd, caption_probability=1.0)
    assert (prompt.text, regions) == (SENTENCE, example.regions)


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
