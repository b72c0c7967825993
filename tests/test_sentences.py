import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.positions import FALSE, PARTS, TRUE, UNDECIDED, decide_parts
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sentences import describe_regions, find_nouns, generate_sentences, sample_sentence
from data_pipelines.sides import swap_sides
from data_pipelines.transforms import flip_annotations
from data_pipelines.wording import NUMBERS, pluralize, with_article

KINDS = [("lung nodule", "lung_nodule", "lesion"), ("left lung", "left_lung", "organ"), ("spot", "odd", "lesion")]


@st.composite
def examples(draw):
    height, width = draw(st.integers(8, 64)), draw(st.integers(8, 64))
    regions = []
    for _ in range(draw(st.integers(0, 6))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
        phrase, label, granularity = draw(st.sampled_from(KINDS))
        crowd = draw(st.integers(0, 9)) == 0
        regions.append(Region(np.asarray([x0, y0, x1, y1], np.float32), phrase, label, granularity, iscrowd=crowd))
    return GroundingExample(b"", "i", "d", height, width, regions=tuple(regions))


def image(*boxes: tuple[float, ...], kind: int = 0) -> GroundingExample:
    """Returns a square image of 100 pixels with boxes of one kind."""
    regions = tuple(Region(np.asarray(box, np.float32), *KINDS[kind]) for box in boxes)
    return GroundingExample(b"", "i", "d", 100, 100, regions=regions)


def texts(example: GroundingExample) -> dict[str, tuple[int, ...]]:
    return {expression.text: expression.regions for expression in generate_sentences(example)}


@given(examples())
def test_sentence_is_true_of_its_regions_and_of_no_other_that_it_might_mean(example):
    """Read again from the words alone: number, name and part."""
    for expression in generate_sentences(example):
        words = re.fullmatch(r"(the|an?|\w+) (.*?)(?: in the ([a-z ]+?)(?: part)? of the image)?", expression.text)
        assert words is not None
        number, name, part = words.groups()
        called = [i for i, region in enumerate(example.regions) if name in (region.phrase, f"{region.phrase}s")]
        named = [example.regions[i] for i in called]
        assert not any(region.iscrowd for region in named)
        assert len(expression.regions) == (1 if number in ("the", "a", "an") else NUMBERS.index(number))
        for index, region in zip(called, named, strict=True):
            x, y = (region.box[:2] + region.box[2:]) / 2 / [example.width, example.height]
            true = {"left": x < 0.5, "right": x > 0.5, "upper": y < 0.5, "lower": y > 0.5}
            true["center"] = abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.1
            meant = all(true[word] for word in (part or "").split())
            assert meant == (index in expression.regions)
        assert [expression.text[start:end] for start, end in expression.spans] == [expression.text]
        assert expression.kind == "position"


@given(examples())
def test_mirrored_image_gets_the_mirrored_sentences(example):
    mirrored = {text: set(regions) for text, regions in texts(flip_annotations(example)).items()}
    assert mirrored == {swap_sides(text): set(regions) for text, regions in texts(example).items()}


@given(examples(), st.integers(0, 9))
def test_drawn_sentence_says_one_of_the_generated_ones(example, seed):
    drawn, generated = sample_sentence(example, np.random.default_rng(seed)), generate_sentences(example)
    assert (drawn is None) == (not generated)
    if drawn is not None:
        ((start, end),) = drawn.spans
        assert (drawn.text[start:end], drawn.regions) in [(each.text, each.regions) for each in generated]
        assert drawn == sample_sentence(example, np.random.default_rng(seed))


@given(examples(), st.integers(0, 9))
def test_description_names_each_box_once_by_its_own_words(example, seed):
    text, regions, spans = describe_regions(example, np.random.default_rng(seed))
    assert sorted(regions) == [i for i, region in enumerate(example.regions) if not region.iscrowd]
    for index, ((start, end),) in zip(regions, spans, strict=True):
        assert example.regions[index].phrase in text[start:end]
    assert len({*spans}) == len({example.regions[index].phrase for index in regions})


def test_words_are_said_only_away_from_the_borders_between_them():
    boxes = np.asarray([[0, 0, 40, 40], [0, 0, 44, 20], [30, 0, 60, 20], [70, 70, 90, 90], [45, 45, 56, 54]])
    truth = decide_parts(boxes, 100, 100)
    assert truth.keys() == {*PARTS}
    assert truth["left"].tolist() == [TRUE, UNDECIDED, UNDECIDED, FALSE, UNDECIDED]
    assert truth["upper left"].tolist() == [TRUE, UNDECIDED, UNDECIDED, FALSE, UNDECIDED]
    assert truth["center"].tolist() == [FALSE, FALSE, FALSE, FALSE, TRUE]


def test_box_near_a_border_keeps_the_word_from_others_of_its_name():
    clear = image((0, 0, 30, 30), (70, 0, 90, 30))
    assert texts(clear)["a lung nodule in the left part of the image"] == (0,)
    assert texts(clear)["two lung nodules in the upper part of the image"] == (0, 1)
    unclear = texts(image((0, 0, 30, 30), (40, 0, 60, 30)))
    assert not [text for text in unclear if "left" in text]
    assert unclear["two lung nodules"] == (0, 1)


def test_organs_are_not_counted_and_unsure_plurals_are_left_out():
    assert set(texts(image((0, 0, 30, 30), (0, 70, 30, 90), kind=1))) == {
        f"the left lung in the {part} part of the image" for part in ("upper", "lower", "upper left", "lower left")
    }
    thorax = [Region(np.zeros(4, np.float32), "pneumothorax", "pneumothorax", "lesion")] * 2
    assert texts(dataclasses.replace(image(), regions=tuple(thorax))) == {}


def test_general_name_is_said_of_special_ones_and_a_special_one_not_beside_the_general():
    box = np.zeros(4, np.float32)
    tumors = (Region(box, "tumor", "tumor", "lesion"), Region(box, "liver tumor", "liver_tumor", "lesion"))
    general, special = find_nouns(tumors)
    assert (general.regions, general.sure) == ((0, 1), True)
    assert (special.regions, special.sure) == ((1,), False)
    lungs = (Region(box, "lung", "lung", "organ"), Region(box, "left lung", "left_lung", "organ"))
    assert [noun.sure for noun in find_nouns(lungs)] == [False, True]  # a box of both lungs is no lung beside the left
    assert [noun.sure for noun in find_nouns(lungs[:1])] == [True]


@pytest.mark.parametrize(
    ("phrase", "single", "plural"),
    [
        ("lung nodule", "a lung nodule", "lung nodules"),
        ("ulcer", "an ulcer", "ulcers"),
        ("uterus", "a uterus", ""),
        ("lung opacity", "a lung opacity", "lung opacities"),
        ("mass", "a mass", "masses"),
        ("brain metastasis", "a brain metastasis", "brain metastases"),
        ("nucleus", "a nucleus", "nuclei"),
        ("pneumothorax", "a pneumothorax", ""),
        ("pulmonary edema", "pulmonary edema", ""),
        ("tumor of the cervix", "tumor of the cervix", ""),
        ("diffuse nodules", "diffuse nodules", ""),
        ("x7", "x7", ""),
    ],
)
def test_articles_and_plurals_are_given_where_they_are_sure(phrase, single, plural):
    assert (with_article(phrase), pluralize(phrase)) == (single, plural)
