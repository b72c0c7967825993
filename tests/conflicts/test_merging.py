"""Copies of one picture put together."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.conflicts import ConflictRules, find_keepers, merge, resolve
from data_pipelines.schema import Expression
from tests.conflicts.pictures import labels, outline_set, picture, pictures, region


@hypothesis.given(st.lists(pictures(("liver", "spleen", "nodule", "lung_nodule")), min_size=2, max_size=3), st.data())
@hypothesis.settings(max_examples=30)
def test_a_union_is_the_same_in_any_order(copies, data):
    rules = ConflictRules(disagreeing_masks="union")
    datasets = data.draw(st.lists(st.sampled_from(["one", "two"]), min_size=len(copies), max_size=len(copies)))
    copies = [
        resolve(dataclasses.replace(copy, dataset=name, image_id=str(k)), rules)[0]
        for k, (copy, name) in enumerate(zip(copies, datasets, strict=True))
    ]
    results = [merge(order, rules)[0] for order in itertools.permutations(copies)]
    assert len({frozenset(outline_set(each)) for each in results}) == 1
    assert len({frozenset(each.absent) for each in results}) == 1


def test_copies_are_put_together():
    first = picture(
        region("liver", (0, 0, 20, 20)),
        region("lung", (0, 20, 20, 40)),
        absent=("spleen", "pancreas"),
        expressions=(Expression("no spleen here"), Expression("liver", (0,))),
    )
    second = picture(
        region("spleen", (25, 0, 35, 9), spans=((0, 6),)),
        region("Liver", (0, 0, 20, 20), True),
        dataset="two",
        image_id="b",
        modality="mri",
        patient_id="p",
        caption="spleen",
        expressions=(Expression("liver too", (1,)), Expression("spleen", (0,))),
    )
    merged, conflicts = merge([first, second], ConflictRules())
    assert (merged.image_id, merged.dataset, merged.modality, merged.patient_id) == ("a", "one", "ct", "p")
    assert labels(merged) == ["liver", "lung", "spleen"]
    assert merged.regions[0].mask == second.regions[1].mask
    assert (merged.absent, merged.caption, merged.regions[2].spans) == (("pancreas",), "spleen", ((0, 6),))
    assert [(each.text, each.regions) for each in merged.expressions] == [
        ("liver", (0,)),
        ("liver too", (0,)),
        ("spleen", (2,)),
    ]
    found = {conflict.kind: conflict.detail for conflict in conflicts}
    assert found["duplicates_across"] == "two/b"
    assert found["merged_fields"] == "modality: ct, mri"
    assert found["shown_and_absent"] == "1 regions"
    assert found["same_structure"] == "2 outlines, IoU 1.00 to 1.00, named Liver, liver"
    assert found["lost_text"] == "expression: a copy shows what it says is not there"


@hypothesis.given(
    st.lists(st.sampled_from(["", "a liver.", "Two ribs", "no liver! ", "a liver"]), max_size=4), st.data()
)
def test_captions_of_copies_are_joined_and_spans_keep_their_words(captions, data):
    copies = []
    for k, caption in enumerate(captions):
        words = [word for word in ("liver", "ribs") if word in caption]
        spans = {word: ((caption.index(word), caption.index(word) + len(word)),) for word in words}
        box = (2 * k, 30, 2 * k + 1, 31 + data.draw(st.integers(0, 5)))
        regions = [region(word, box, spans=spans[word]) for word in words]
        copies.append(picture(*regions, caption=caption, dataset=data.draw(st.sampled_from("ab"))))
    copies.append(picture(region("spleen", (0, 0, 9, 9))))
    merged, conflicts = merge(copies, ConflictRules())
    different = {caption for caption in captions if caption}
    assert all(merged.caption.count(caption) >= 1 for caption in different)
    told = {word: 0 for word in ("liver", "ribs")}
    for each in merged.regions:
        for start, end in each.spans:
            assert merged.caption[start:end] == each.label
            told[each.label] += 1
    assert all(bool(told[word]) == any(word in caption for caption in different) for word in told)
    assert any((each.kind, each.rule) == ("merged_fields", "join") for each in conflicts) == (len(different) > 1)


def test_joined_captions_are_sentences_one_after_another():
    copies = [picture(caption=caption) for caption in ("A liver", "two ribs.", "", "A liver", "no mass")]
    assert merge(copies, ConflictRules())[0].caption == "A liver. two ribs. no mass"
    known = dataclasses.replace(copies[1], dataset="two", regions=(region("rib", (0, 0, 9, 9), spans=((4, 8),)),))
    for order in ([*copies, known], [known, *copies]):
        merged = merge(order, ConflictRules())[0]
        assert merged.caption == "A liver. two ribs. no mass"  # which another copy has already said
        assert [each.spans for each in merged.regions] == [((13, 17),)]


def test_conflicts_of_each_copy_are_not_told_again():
    one = picture(region("lung", (0, 0, 20, 20)), region("lung_nodule", (2, 2, 5, 5)))
    kinds = [conflict.kind for conflict in merge([one, one, one], ConflictRules())[1]]
    assert kinds.count("duplicates_within") == 2
    assert "parent_child" not in kinds


def test_merging_by_the_other_rules():
    one, two = picture(region("liver", (0, 0, 9, 9))), picture(region("spleen", (0, 0, 9, 9)), image_id="b")
    merged, conflicts = merge([one, two], ConflictRules(duplicates_within="keep_first"))
    assert (merged, [conflict.rule for conflict in conflicts]) == (one, ["keep_first"])
    with pytest.raises(ValueError, match="duplicates_within is keep_all"):
        merge([one, two], ConflictRules(duplicates_within="keep_all"))
    with pytest.raises(ValueError, match="same size; found one/a 40 x 40, one/b 40 x 41"):
        merge([one, dataclasses.replace(two, height=41)], ConflictRules())
    with pytest.raises(ValueError, match="at least one"):
        merge([], ConflictRules())
    assert merge([one], ConflictRules()) == (one, [])


@pytest.mark.parametrize(
    ("within", "across", "expected"),
    [
        ("merge", "merge", [0, 0, 0, 3, 0]),
        ("keep_first", "keep_all", [0, 1, 0, 3, 1]),
        ("keep_all", "merge", [0, 0, 2, 3, 2]),
        ("keep_all", "keep_all", [0, 1, 2, 3, 4]),
    ],
)
def test_which_copies_are_kept(within, across, expected):
    rules = ConflictRules(duplicates_within=within, duplicates_across=across)
    keepers = find_keepers(np.asarray([7, 7, 7, 3, 7]), ["a", "b", "a", "a", "b"], rules)
    assert keepers.tolist() == expected
    assert not find_keepers(np.zeros(0), [], rules).size
