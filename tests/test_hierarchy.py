"""What a training example carries of the hierarchy, next to its positive map."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.medglip_t import get_config
from data_pipelines.hierarchy import (
    RELATIONS,
    HierarchyRule,
    find_containers,
    find_ignored,
    find_kinds,
    find_pairs,
    known_label,
    relate,
    relate_in,
)
from data_pipelines.records import write_records
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sources.phantoms import phantom
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.text import build_caption_prompt, sample_prompt
from data_pipelines.vocabulary import find_broader
from tests.test_loader import recipe, take
from tests.test_prompts import EVERYTHING, PLAIN, TAXONOMY, TOKENIZER, region, shows, tokenize

LABELS = sorted(load_taxonomy().labels)


def prompt_of(example, seed=0, **changes):
    rule = dataclasses.replace(PLAIN, **changes)
    return sample_prompt(example, np.random.default_rng(seed), tokenizer=TOKENIZER, vocabulary=EVERYTHING, rule=rule)


def words_of(prompt, tokens) -> list[str]:
    """Returns the phrases of the prompt whose tokens are all marked; no phrase is marked in part."""
    found = []
    for name, (first, last) in prompt.named:
        assert tokens[first:last].all() or not tokens[first:last].any()
        if tokens[first:last].all():
            found.append(name)
    assert sum(len(tokenize(name)) for name in found) == tokens.sum()
    return sorted(found)


@pytest.mark.parametrize(
    ("label", "other", "relation"),
    [
        ("melanoma", "skin_lesion", "is_a"),
        ("melanoma", "melanoma", "is_a"),
        ("left_lung", "lung", "is_a"),
        ("skin_lesion", "melanoma", "may_be"),
        ("lung", "left_lung", "may_be"),
        ("pneumonia", "consolidation", "may_be"),
        ("lung_nodule", "lung", "part_of"),
        ("liver_tumor", "liver", "part_of"),
        ("liver", "liver_tumor", ""),
        ("liver", "spleen", ""),
        ("no such label", "liver", ""),
    ],
)
def test_what_a_box_is_to_another_label(label, other, relation):
    assert relate(label, other) == relation


@given(st.sampled_from(LABELS), st.sampled_from(LABELS))
def test_relations_are_those_of_the_taxonomy(label, other):
    relation = relate(label, other)
    assert (relation == "is_a") == (other == label or other in find_broader(label))
    assert (relation != "") or other not in TAXONOMY.ancestors(label)
    if relation == "may_be":
        assert relate(other, label) in ("is_a", "may_be")


def test_one_side_is_a_part_of_a_box_that_holds_both():
    assert relate_in("left_lung", "lung", frozenset({"left_lung"})) == "is_a"
    assert relate_in("left_lung", "lung", frozenset({"lung"})) == "part_of"
    assert relate_in("melanoma", "skin_lesion", frozenset({"skin_lesion"})) == "is_a"


def test_broader_and_possible_names_of_a_box_carry_no_loss_and_what_holds_it_only_if_asked():
    example = shows("neoplastic_polyp", "polyp", "colon", "ulcer")
    prompt, regions = prompt_of(example, max_negatives=0)
    rows = find_ignored(prompt, regions, ("is_a", "may_be"))
    assert [words_of(prompt, row) for row in rows] == [["polyp"], ["neoplastic polyp"], [], []]
    rows = find_ignored(prompt, regions, ("part_of",))
    assert [words_of(prompt, row) for row in rows] == [["colon"], ["colon"], [], []]
    assert not find_ignored(prompt, regions, ()).any()


def test_what_the_positive_map_marks_is_never_ignored():
    example = shows("neoplastic_polyp", "polyp")
    prompt, regions = prompt_of(example, max_negatives=0, parents_positive_probability=1.0)
    rows = find_ignored(prompt, regions, RELATIONS)
    assert not (rows & (prompt.positive_map > 0)).any()
    assert words_of(prompt, prompt.positive_map[0] > 0) == ["lesion", "neoplastic polyp", "polyp"]


def test_other_names_of_the_same_label_carry_no_loss():
    names = {"a thing": "x", "hepatic tumor": "liver_tumor", "liver tumor": "liver_tumor"}
    found = tuple(region(phrase, label) for phrase, label in names.items())
    prompt, regions = prompt_of(dataclasses.replace(shows(), regions=found), max_negatives=0)
    rows = find_ignored(prompt, regions, ("is_a",))
    assert [words_of(prompt, row) for row in rows] == [[], ["liver tumor"], ["hepatic tumor"]]


def test_what_the_record_says_holds_a_box_is_what_it_is_a_part_of():
    found = (region("pigment globule", "pigment_globule", parent="melanoma"), region("melanoma", "melanoma"))
    prompt, regions = prompt_of(dataclasses.replace(shows(), regions=found), max_negatives=0)
    assert words_of(prompt, find_ignored(prompt, regions, ("part_of",))[0]) == ["melanoma"]


def test_in_a_sentence_the_words_of_other_regions_are_its_phrases():
    caption = "A polyp, and a neoplastic polyp in the colon."
    regions = (region("polyp", "polyp"), region("neoplastic polyp", "neoplastic_polyp"), region("colon", "colon"))
    spans = [((caption.index(each.phrase), caption.index(each.phrase) + len(each.phrase)),) for each in regions]
    prompt = build_caption_prompt(caption, spans, TOKENIZER, 32)
    rows = find_ignored(prompt, regions, ("is_a", "may_be"))
    assert [prompt.input_ids[row].tolist() for row in rows] == [tokenize("neoplastic polyp"), tokenize("polyp"), []]


@given(
    st.lists(st.sampled_from(LABELS), max_size=5, unique=True),
    st.sets(st.sampled_from(RELATIONS)),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 99),
)
def test_ignored_tokens_are_those_of_related_phrases_and_pairs_are_of_kinds(labels, relations, parents, variants, seed):
    example = shows(*labels)
    options = {"parents_positive_probability": parents, "variant_probability": variants, "max_negatives": 20}
    prompt, regions = prompt_of(example, seed, max_tokens=160, **options)
    boxed = frozenset(labels)
    rows = find_ignored(prompt, regions, tuple(relations))
    assert rows.shape == prompt.positive_map.shape and rows.dtype == bool
    for row, marked, shown in zip(rows, prompt.positive_map > 0, regions, strict=True):
        assert not (row & marked).any() and not row[prompt.attention_mask == 0].any()
        for name in words_of(prompt, row):
            assert relate_in(shown.label, known_label(name), boxed) in relations
    children, parents_ = find_pairs(prompt, regions, 6)
    assert children.shape == parents_.shape == (len(children), 160) and len(children) <= 6
    for child, parent in zip(children, parents_, strict=True):
        (narrow,), (broad,) = words_of(prompt, child), words_of(prompt, parent)
        assert known_label(broad) in find_broader(known_label(narrow))


def test_kinds_among_phrases_are_told_with_all_that_they_are():
    names = ["Melanoma", "nodule", "lesion", "skin_lesion", "skin", "thing"]
    assert find_kinds(names) == [(0, 2), (0, 3), (1, 2), (3, 2)]
    assert find_kinds([]) == []


def test_pairs_of_what_the_image_shows_come_first():
    example = shows("melanoma")
    for seed in range(6):
        options = {"parents_positive_probability": 1.0, "max_negatives": 30, "full_negatives_probability": 1.0}
        prompt, regions = prompt_of(example, seed, max_tokens=256, **options)
        children, parents = find_pairs(prompt, regions, 99)
        pairs = [words_of(prompt, a) + words_of(prompt, b) for a, b in zip(children, parents, strict=True)]
        first = [["melanoma", "lesion"], ["melanoma", "skin lesion"], ["skin lesion", "lesion"]]
        assert sorted(pairs[:3]) == first and len(pairs) > 3
        assert len(find_pairs(prompt, regions, 2)[0]) == 2


def boxed(phrase: str, label: str, box, **fields) -> Region:
    return Region(np.asarray(box, np.float32), phrase, label, **fields)


def test_container_is_the_smallest_box_that_holds_a_part_wholly():
    regions = (
        boxed("liver tumor", "liver_tumor", [10, 10, 20, 20]),
        boxed("abdomen", "abdomen", [0, 0, 50, 50]),
        boxed("liver", "liver", [5, 5, 40, 40]),
        boxed("liver cyst", "liver_cyst", [30, 30, 45, 38]),  # grows out of the liver
        boxed("spleen", "spleen", [9, 9, 21, 21]),  # holds the tumor's box, and not the tumor
        boxed("liver tumor", "liver_tumor", [44, 44, 60, 60]),
        boxed("liver", "liver", [6, 6, 30, 30], iscrowd=True),
    )
    example = GroundingExample(b"", "i", "d", 64, 64, regions=regions)
    found = find_containers(regions[:6], example)
    assert found.tolist() == [[5, 5, 40, 40], [0] * 4, [0, 0, 50, 50], [0, 0, 50, 50], [0, 0, 50, 50], [0] * 4]


@given(st.integers(0, 999))
def test_containers_of_phantoms_hold_their_boxes(index):
    example = phantom(index, size=64)
    regions = example.regions[::-1]  # a sentence may leave some out or change their order
    containers = find_containers(regions, example)
    known = {tuple(each.box.tolist()) for each in regions}
    for each, container in zip(regions, containers, strict=True):
        if container.any():
            assert tuple(container.tolist()) in known
            assert (container[:2] <= each.box[:2] + 0.01).all() and (container[2:] >= each.box[2:] - 0.01).all()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"ignored": ("isa",)}, "hierarchy.ignored has 'isa': the relations are is_a, may_be, part_of"),
        ({"max_pairs": -1}, "hierarchy.max_pairs is -1"),
        ({"ignored": ("may_be",), "max_pairs": 4}, "'is_a' is not in config.data.hierarchy.ignored"),
    ],
)
def test_rule_that_cannot_be_used_is_named(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        HierarchyRule(**{"ignored": (), "max_pairs": 0, "containers": False, **fields})


def test_batches_have_the_arrays_that_are_asked_for_and_are_else_the_same(tmp_path):
    examples = [phantom(index, size=64, modality="xray") for index in range(3)]
    write_records(examples, tmp_path / "set", name="set")
    options = {"max_boxes": 24, "max_tokens": 96, "parents_positive_probability": 1.0}
    plain = take(recipe(str(tmp_path / "set"), **options), 3)
    hierarchy = get_config().data.hierarchy
    assert not HierarchyRule.from_config(hierarchy).make_arrays(24, 96)
    hierarchy.ignored, hierarchy.max_pairs, hierarchy.containers = ("is_a", "part_of"), 4, True
    full = take(recipe(str(tmp_path / "set"), hierarchy=hierarchy, **options), 3)
    for batch, other in zip(plain, full, strict=True):
        added = {name: other.pop(name) for name in ("ignore_map", "child_map", "parent_map", "container")}
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])
        wanted = {"ignore_map": (2, 24, 96), "child_map": (2, 4, 96), "parent_map": (2, 4, 96), "container": (2, 24, 4)}
        assert {name: x.shape for name, x in added.items()} == wanted
        assert all(x.any() for x in added.values())
        held = np.asarray(added["container"].any(axis=-1))
        assert not added["ignore_map"][~batch["box_mask"]].any() and not (held & ~batch["box_mask"]).any()
        assert (added["container"][held, :2] <= batch["boxes"][held, :2] + 0.01).all()
        assert (added["container"][held, 2:] >= batch["boxes"][held, 2:] - 0.01).all()


def test_names_of_phrases_are_read_whatever_their_spelling():
    found = (region("Liver_Tumor", "liver_tumor"), region("LIVER", "liver"))
    prompt, regions = prompt_of(dataclasses.replace(shows(), regions=found), max_negatives=0)
    rows = find_ignored(prompt, regions, ("part_of",))
    assert [normalize_name(name) for row in rows for name in words_of(prompt, row)] == ["liver"]
