import collections
import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import demo, medglip_t
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.text import (
    Prompt,
    PromptRule,
    PromptTooLong,
    Vocabulary,
    build_prompt,
    load_tokenizer,
    sample_prompt,
)

TOKENIZER = load_tokenizer()
TAXONOMY = load_taxonomy()
PLAIN = PromptRule(
    max_tokens=64,
    max_negatives=4,
    full_negatives_probability=0.5,
    caption_probability=0.0,
    expression_probability=0.0,
    prefix_probability=0.0,
    parents_positive_probability=0.0,
    hard_negative_share=0.0,
    sibling_negative_share=0.0,
    level_negative_share=0.0,
    variant_probability=0.0,
)


@functools.cache
def tokenize(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids[1:-1]


def tokens_of(prompt: Prompt, row: int) -> list[int]:
    """Returns the tokens that the positive map gives to a phrase."""
    return prompt.input_ids[prompt.positive_map[row] > 0].tolist()


SENTENCE = "A lung nodule in the left lung, another in the right one."


def spans_of(*words: str) -> list[tuple[int, int]]:
    return [(SENTENCE.index(word), SENTENCE.index(word) + len(word)) for word in words]


def num_tokens(prompt: Prompt) -> int:
    return int(prompt.attention_mask.sum())


def shows(*labels: str, absent: tuple[str, ...] = (), **fields) -> GroundingExample:
    """Returns an image with a region for each label of the taxonomy."""
    regions = []
    for label in labels:
        entry = TAXONOMY.labels[label]
        regions.append(Region(np.zeros(4, np.float32), entry.name, label, entry.granularity, entry.parent))
    return GroundingExample(b"", "i", "d", 8, 8, regions=tuple(regions), absent=absent, **fields)


def region(phrase: str, label: str, **fields) -> Region:
    return Region(np.zeros(4, np.float32), phrase, label, **fields)


EVERYTHING = Vocabulary(
    {name: label.id for label in TAXONOMY.labels.values() for name in (label.name, *label.synonyms)}
)


def sample(example: GroundingExample, seed: int = 0, **changes) -> tuple[Prompt, tuple[Region, ...]]:
    vocabulary = changes.pop("vocabulary", EVERYTHING)
    rule = dataclasses.replace(PLAIN, **changes)
    return sample_prompt(example, np.random.default_rng(seed), tokenizer=TOKENIZER, vocabulary=vocabulary, rule=rule)


def names_in(prompt: Prompt) -> list[str]:
    return prompt.text.split(". ") if prompt.text else []


@pytest.mark.parametrize(
    ("field", "value"), [("max_negatives", -1), ("prefix_probability", 1.5), ("hard_negative_share", -0.1)]
)
def test_field_out_of_its_range_is_an_error_that_names_it(field, value):
    with pytest.raises(ValueError, match=f"config.data.{field} is {value}: it must be"):
        dataclasses.replace(PLAIN, **{field: value})


def test_rule_reads_its_fields_from_the_recipe_and_the_demo_draws_names_only():
    full = PromptRule.from_config(medglip_t.get_config().data)
    assert (full.max_tokens, full.max_negatives, full.caption_probability) == (256, 85, 0.5)
    assert full.expression_probability > 0
    plain = PromptRule.from_config(demo.get_config().data)
    added = [field.name for field in dataclasses.fields(PromptRule)][4:]
    assert {name: getattr(plain, name) for name in added} == dict.fromkeys(added, 0.0)


def test_regions_get_the_tokens_of_their_phrase_among_negatives():
    example = shows("left_lung", "lung_nodule", "left_lung")
    for seed in range(20):
        prompt, regions = sample(example, seed)
        assert regions == example.regions
        assert prompt.phrases == ("left lung", "lung nodule", "left lung")
        assert [tokens_of(prompt, row) for row in range(3)] == [tokenize(name) for name in prompt.phrases]
        assert prompt.positive_map[0].tolist() == prompt.positive_map[2].tolist()
        assert names_in(prompt).count("left lung") == names_in(prompt).count("lung nodule") == 1
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


def test_negatives_may_be_siblings_of_what_is_shown():
    example = shows("liver_cyst")
    for seed in range(5):
        prompt, _ = sample(example, seed, max_negatives=6, full_negatives_probability=1.0, sibling_negative_share=1.0)
        others = [known for name in names_in(prompt) if (known := TAXONOMY.find(name)) and known.id != "liver_cyst"]
        assert len(others) == 6
        assert all(other.granularity == "lesion" for other in others)


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
    spans = [spans_of("left lung"), spans_of("lung nodule")]
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
        assert all(prompt.phrases == ("left lung", "lung nodule") for prompt in prompts)
        assert all(tokens_of(prompt, 0) == tokenize("left lung") for prompt in prompts)


def test_sentence_that_does_not_say_where_or_does_not_fit_gives_way_to_phrases():
    example = captioned()
    silent = dataclasses.replace(example, regions=(example.regions[0], region("lung nodule", "lung_nodule")))
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


def test_prefix_says_what_kind_of_image_it_is_where_it_fits():
    example = shows("left_lung", modality="xray")
    found = collections.Counter(sample(example, seed, prefix_probability=0.5)[0].text[:13] for seed in range(200))
    assert 60 < found["chest x-ray: "] < 140
    prompt, _ = sample(example, max_negatives=0, prefix_probability=1.0)
    assert prompt.text == "chest x-ray: left lung"
    assert tokens_of(prompt, 0) == tokenize("left lung")
    assert sample(example, max_negatives=0, prefix_probability=1.0, max_tokens=5)[0].text == "left lung"
    spoken = captioned(modality="ct")
    assert sample(spoken, caption_probability=1.0, prefix_probability=1.0)[0].text == f"chest CT: {SENTENCE}"


def test_broader_names_mean_the_boxes_of_what_they_hold():
    example = shows("left_lung", "right_lung", "liver")
    prompt, _ = sample(example, max_negatives=0, parents_positive_probability=1.0)
    assert sorted(names_in(prompt)) == ["left lung", "liver", "lung", "right lung"]
    assert sorted(tokens_of(prompt, 0)) == sorted(tokenize("left lung") + tokenize("lung"))
    assert sorted(tokens_of(prompt, 1)) == sorted(tokenize("right lung") + tokenize("lung"))
    assert tokens_of(prompt, 2) == tokenize("liver")
    np.testing.assert_allclose(prompt.positive_map.sum(axis=1), 1, rtol=1e-6)
    assert prompt.phrases == ("left lung", "right lung", "liver")


def test_broader_name_with_boxes_of_its_own_means_those_of_its_kinds_but_no_single_side():
    options = {"max_negatives": 0, "parents_positive_probability": 1e-9}  # nothing is added, what is there is linked
    prompt, _ = sample(shows("tumor", "liver_tumor"), **options)
    assert tokens_of(prompt, 0) == tokenize("tumor")
    assert sorted(tokens_of(prompt, 1)) == sorted(tokenize("liver tumor") + tokenize("tumor"))
    prompt, _ = sample(shows("lung", "left_lung"), **options)
    assert [tokens_of(prompt, row) for row in (0, 1)] == [tokenize("lung"), tokenize("left lung")]


def test_variants_are_other_names_of_the_same_labels():
    example = shows("left_lung", "heart", "left_lung")
    found = set()
    for seed in range(40):
        prompt, _ = sample(example, seed, variant_probability=1.0)
        assert [TAXONOMY.find(phrase).id for phrase in prompt.phrases] == ["left_lung", "heart", "left_lung"]
        assert prompt.phrases[0] == prompt.phrases[2]
        names = [normalize_name(name) for name in names_in(prompt)]
        assert len(set(names)) == len(names)
        found.add(prompt.phrases[0])
    assert found == set(TAXONOMY.variants("left_lung"))
    assert sample(shows(), variant_probability=1.0, vocabulary=Vocabulary({"odd": "odd"}))[0].text == "odd"


def test_names_of_one_label_never_become_the_same_variant():
    names = TAXONOMY.variants("left_lung")
    assert len(names) > 1
    vocabulary = Vocabulary(dict.fromkeys(names, "left_lung"))
    for seed in range(20):
        prompt, _ = sample(
            shows(), seed, variant_probability=0.5, full_negatives_probability=1.0, vocabulary=vocabulary
        )
        drawn = [normalize_name(name) for name in names_in(prompt)]
        assert len(drawn) == len(set(drawn)) > 1


def test_prefix_that_does_not_fit_leaves_its_room_to_negatives():
    vocabulary = Vocabulary({"heart": "heart"})
    needed = num_tokens(build_prompt(["left lung", "heart"], TOKENIZER, 64))
    example = shows("left_lung", modality="xray")
    prompt, _ = sample(example, prefix_probability=1.0, max_tokens=needed, vocabulary=vocabulary)
    assert sorted(names_in(prompt)) == ["heart", "left lung"]


def with_expressions(*expressions: Expression, iscrowd: bool = False) -> GroundingExample:
    example = shows("left_lung", "lung_nodule")
    nodule = dataclasses.replace(example.regions[1], iscrowd=iscrowd)
    return dataclasses.replace(example, regions=(example.regions[0], nodule), expressions=expressions)


REFERRING = Expression("the nodule inside the left lung.", (1,), ((0, 10),), "referring")


def expression_prompts(example: GroundingExample, **options) -> dict[str, tuple[Prompt, tuple[Region, ...]]]:
    drawn = (sample(example, seed, expression_probability=1.0, **options) for seed in range(60))
    return {prompt.text: (prompt, regions) for prompt, regions in drawn}


def test_expression_is_a_prompt_whose_targets_are_its_regions_only():
    prompts = expression_prompts(
        with_expressions(REFERRING, dataclasses.replace(REFERRING, text="the nodule", spans=()))
    )
    prompt, regions = prompts[REFERRING.text]
    assert [each.phrase for each in regions] == ["lung nodule"]
    assert tokens_of(prompt, 0) == tokenize("the nodule")
    assert tokens_of(prompts["the nodule"][0], 0) == tokenize("the nodule")


def test_expressions_of_one_sentence_are_one_prompt_that_grounds_each_by_its_own_words():
    text = "a nodule in the left lung, the nodule being small"
    first = Expression(text, (1,), ((0, 8),))
    again = Expression(text, (1,), ((text.index("the nodule"), text.index(" being")),))
    lung = Expression(text, (0,), ((text.index("left"), text.index(",")),))
    prompt, regions = expression_prompts(with_expressions(first, lung, REFERRING, again))[text]
    assert [each.phrase for each in regions] == ["lung nodule", "left lung"]
    assert tokens_of(prompt, 0) == tokenize("a nodule the nodule")
    assert tokens_of(prompt, 1) == tokenize("left lung")


def test_expression_of_nothing_is_a_prompt_without_targets():
    prompt, regions = expression_prompts(with_expressions(Expression("no rib fracture", kind="absent")))[
        "no rib fracture"
    ]
    assert (regions, prompt.phrases, prompt.positive_map.shape) == ((), (), (0, 64))
    assert num_tokens(prompt) == 2 + len(tokenize("no rib fracture"))


def test_expression_about_a_crowd_or_too_long_is_no_prompt():
    assert REFERRING.text not in expression_prompts(with_expressions(REFERRING, iscrowd=True))
    long = dataclasses.replace(REFERRING, text="the " * 30 + "nodule", spans=())
    prompts = expression_prompts(with_expressions(long), max_tokens=24)
    assert prompts and long.text not in prompts


def test_description_names_every_box_with_its_own_words():
    (prompt, regions), *_ = (
        found for text, found in expression_prompts(shows("left_lung", "lung_nodule")).items() if " and " in text
    )
    words = {each.phrase: prompt.phrases[row] for row, each in enumerate(regions)}
    assert words == {"left lung": "the left lung", "lung nodule": "a lung nodule"}


@given(
    st.lists(st.sampled_from(sorted(TAXONOMY.labels)), max_size=5),
    st.integers(2, 48),
    st.integers(0, 99),
    st.sampled_from(["xray", "unknown"]),
)
def test_prompts_hold_together_at_any_token_limit(labels, max_tokens, seed, modality):
    example = shows(*labels, modality=modality, absent=("fracture",))
    options = {"max_tokens": max_tokens, "caption_probability": 0.5, "expression_probability": 0.2}
    options |= {"prefix_probability": 0.5, "parents_positive_probability": 0.5, "variant_probability": 0.5}
    names = list(dict.fromkeys(normalize_name(each.phrase) for each in example.regions))
    try:
        build_prompt(names, TOKENIZER, max_tokens)
    except PromptTooLong:
        return
    prompt, regions = sample(example, seed, hard_negative_share=0.5, **options)
    assert prompt.input_ids.shape == prompt.attention_mask.shape == (max_tokens,)
    assert prompt.positive_map.shape == (len(regions), max_tokens)
    assert len(prompt.phrases) == len(regions)
    assert not prompt.positive_map[:, prompt.attention_mask == 0].any()
    np.testing.assert_allclose(prompt.positive_map.sum(axis=1), 1, rtol=1e-5)
    assert {id(each) for each in regions} <= {id(each) for each in example.regions}
