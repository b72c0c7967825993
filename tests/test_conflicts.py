"""Conflicts: every kind found, resolved by each rule, counted; copies put together whatever their order."""

import dataclasses
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.conflicts import (
    CHOICES,
    KINDS,
    Conflict,
    ConflictReport,
    ConflictRules,
    find_keepers,
    merge,
    resolve,
)
from data_pipelines.conflicts.structures import find_truths, is_no_finding, is_not_annotated, remove_side
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources import load_source
from data_pipelines.sources.masks import encode_mask
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.transforms import flip_annotations

SIDE = 40  # pixels of the pictures made here


def region(label, box, masked=False, **fields):
    fields = {"phrase": label.replace("_", " "), **fields}
    if masked:
        mask = np.zeros((SIDE, SIDE), bool)
        x0, y0, x1, y1 = map(int, box)
        mask[y0:y1, x0:x1] = True
        fields["mask"] = encode_mask(mask)
    return Region(np.asarray(box, np.float32), label=label, **fields)


def picture(*regions, **fields):
    fields = {"image_id": "a", "dataset": "one", "modality": "ct", **fields}
    return GroundingExample(image=b"", height=SIDE, width=SIDE, regions=regions, **fields)


def run(example, **rules):
    """The resolved example, and its conflicts as kind: rule."""
    example, conflicts = resolve(example, ConflictRules(**rules))
    return example, {conflict.kind: conflict.rule for conflict in conflicts}


def labels(example):
    return [each.label for each in example.regions]


def boxes(example):
    return [each.box.tolist() for each in example.regions]


def outline_set(example):
    return {
        (each.label, tuple(each.box.tolist()), each.mask["counts"] if each.mask else b"") for each in example.regions
    }


def test_rules_have_the_choices_that_are_listed_and_no_others():
    fields = {field.name: field.default for field in dataclasses.fields(ConflictRules)}
    assert fields == {name: choices[0] for name, choices in CHOICES.items()}
    assert CHOICES.keys() < KINDS.keys()
    with pytest.raises(ValueError, match="rule two_labels: expected one of keep_both, keep_first, drop, found 'both'"):
        ConflictRules(two_labels="both")


def test_a_structure_under_two_names_is_kept_once_with_its_mask():
    twice = picture(region("liver", (2, 2, 22, 22)), region("Liver", (2, 2, 22, 22), True, source_label="hepar"))
    example, found = run(twice)
    assert (labels(example), found) == (["liver"], {"same_structure": "keep_first"})
    assert example.regions[0].mask == twice.regions[1].mask
    example, found = run(twice, same_structure="keep_both")
    assert (labels(example), found) == (["liver", "Liver"], {"same_structure": "keep_both"})


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("keep_all", [[0, 0, 20, 20], [2, 0, 22, 20], [30, 30, 40, 40]]),
        ("first", [[0, 0, 20, 20], [30, 30, 40, 40]]),
        ("union", [[0, 0, 22, 20], [30, 30, 40, 40]]),
        ("intersection", [[2, 0, 20, 20], [30, 30, 40, 40]]),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_outlines_that_disagree(rule, expected, masked):
    example = picture(*(region("polyp", box, masked) for box in ((0, 0, 20, 20), (2, 0, 22, 20), (30, 30, 40, 40))))
    example, found = run(example, disagreeing_masks=rule)
    assert (boxes(example), found) == (expected, {"disagreeing_masks": rule})
    assert all((each.mask is not None) == masked for each in example.regions)


def test_the_majority_is_of_pixels_or_of_each_side_of_the_boxes():
    outlines = [(0, 0, 20, 20), (2, 0, 22, 20), (4, 0, 24, 20)]
    for masked in (False, True):
        example, _ = run(picture(*(region("polyp", box, masked) for box in outlines)), disagreeing_masks="majority")
        assert boxes(example) == [[2, 0, 22, 20]]


def test_outlines_with_nothing_in_common_are_kept():
    chain = picture(*(region("polyp", (x, 0, x + 12, 12)) for x in (0, 4, 8, 12)))
    example, found = run(chain, disagreeing_masks="intersection")
    assert (boxes(example), found) == (boxes(chain), {"disagreeing_masks": "intersection"})


def test_a_union_joins_what_it_overlaps_then():
    growing = picture(*(region("polyp", box) for box in ((0, 0, 18, 20), (6, 0, 24, 20), (0, 0, 40, 20))))
    assert boxes(run(growing, disagreeing_masks="union")[0]) == [[0, 0, 40, 20]]


def test_crowds_and_neighbours_do_not_disagree():
    cells = picture(
        region("nucleus", (0, 0, 20, 20), True),
        region("nucleus", (0, 0, 20, 20), True, iscrowd=True),
        region("nucleus", (10, 0, 30, 20), True),
    )
    assert run(cells) == (cells, {})


def test_a_box_is_made_to_fit_its_mask():
    loose = dataclasses.replace(region("liver", (5, 5, 20, 20), True), box=np.asarray([0, 0, 20, 20], np.float32))
    example, found = run(picture(loose))
    assert (boxes(example), found) == ([[5, 5, 20, 20]], {"box_and_mask": "mask"})
    assert run(picture(loose), box_and_mask="keep")[1] == {"box_and_mask": "keep"}
    near = dataclasses.replace(loose, box=np.asarray([4, 4.5, 20.5, 21], np.float32))
    assert run(picture(near))[1] == {}


@pytest.mark.parametrize(("rule", "kept"), [("keep_both", 2), ("keep_first", 1), ("drop", 0)])
def test_one_outline_with_two_labels(rule, kept):
    two = picture(region("liver", (0, 0, 20, 20)), region("spleen", (0, 0, 20, 20)))
    example, found = run(two, two_labels=rule)
    assert labels(example) == ["liver", "spleen"][:kept]
    assert found == {"two_labels": rule}


def test_what_holds_a_structure_and_what_it_is_a_kind_of_may_have_its_outline():
    held = picture(region("lung", (0, 0, 20, 20)), region("left_lung", (0, 0, 20, 20)))
    assert run(held)[1] == {"parent_child": "keep_both"}
    kind = picture(region("nodule", (0, 0, 20, 20)), region("lung_nodule", (0, 0, 20, 20)))
    assert run(kind)[1] == {}


def test_parent_is_the_nearest_structure_in_the_image():
    inner = [region("left_upper_lobe", (4, 4, 10, 10), parent="left_lung"), region("my_bulla", (5, 5, 6, 6))]
    inner[1] = dataclasses.replace(inner[1], parent="left_upper_lobe")
    outer = [region("chest", (0, 0, 40, 40)), region("Lung", (2, 2, 30, 30))]
    example, conflicts = resolve(picture(*inner, *outer), ConflictRules())
    assert [each.parent for each in example.regions] == ["Lung", "left_upper_lobe", "", "chest"]
    assert [conflict.detail for conflict in conflicts] == [
        "left_upper_lobe in Lung",
        "my_bulla in left_upper_lobe",
        "Lung in chest",
    ]
    assert resolve(picture(*inner[:1]), ConflictRules())[0].regions[0].parent == "left_lung"
    for rule, kept in (("keep_child", ["my_bulla"]), ("keep_parent", ["chest"])):
        assert labels(run(picture(*inner, *outer), parent_child=rule)[0]) == kept


def test_a_child_outside_its_parent_is_told():
    inside, outside = (0, 0, 10, 10), (25, 25, 35, 35)
    lungs = [region("lung", (0, 0, 12, 20), True), region("lung", (14, 0, 24, 20), True)]
    nodules = [region("lung_nodule", inside, True), region("lung_nodule", outside, True)]
    example, found = run(picture(*lungs, *nodules))
    assert found == {"parent_child": "keep_both", "child_outside_parent": "keep"}
    assert len(example.regions) == 4
    example, _ = run(picture(*lungs, *nodules), child_outside_parent="drop")
    assert boxes(example) == [[0, 0, 12, 20], [14, 0, 24, 20], list(inside)]
    across = region("lung_nodule", (8, 0, 18, 10), True)
    assert "child_outside_parent" not in run(picture(*lungs, across))[1]


def test_a_label_map_cuts_children_out_of_their_parent():
    disc = np.zeros((SIDE, SIDE), bool)
    disc[0:20, 0:20] = True
    disc[5:15, 5:15] = False
    disc = region("optic_disc", (0, 0, 20, 20), mask=encode_mask(disc))
    example = picture(disc, region("optic_cup", (5, 5, 15, 15), True), modality="fundus")
    assert run(example)[1] == {"parent_child": "keep_both"}


LEFT, RIGHT = (25, 5, 35, 25), (5, 5, 15, 25)  # where radiologists hang the patient's sides


@pytest.mark.parametrize("modality", ["xray", "ct", "mri"])
def test_swapped_sides_lose_their_side(modality):
    right_way = picture(region("left_lung", LEFT), region("right_lung", RIGHT), modality=modality)
    assert run(right_way) == (right_way, {})
    wrong = picture(
        region("left_lung", RIGHT, phrase="left lung"),
        region("right_lung", LEFT),
        region("right_middle_lobe", LEFT),
        region("rib_left_9", (5, 30, 15, 35), parent="left_lung"),
        modality=modality,
    )
    example, found = run(wrong)
    assert found["swapped_sides"] == "unsided"
    assert labels(example) == ["lung", "lung", "middle_lobe", "rib_9"]
    assert [each.phrase for each in example.regions] == ["lung", "lung", "middle lobe", "rib 9"]
    assert not any("left" in each.parent or "right" in each.parent for each in example.regions)


def test_swapped_sides_by_the_other_rules():
    wrong = picture(
        region("left_kidney", RIGHT),
        region("right_kidney", LEFT),
        region("liver", (5, 26, 15, 36)),
        absent=("left_hip",),
    )
    swapped, found = run(wrong, swapped_sides="swap")
    assert (labels(swapped), found) == (["right_kidney", "left_kidney", "liver"], {"swapped_sides": "swap"})
    assert swapped.absent == ("right_hip",)
    dropped, _ = run(wrong, swapped_sides="drop")
    assert (labels(dropped), dropped.absent) == (["liver"], ())
    assert run(wrong, swapped_sides="keep") == (wrong, {"swapped_sides": "keep"})


def test_what_both_sides_lack_stays_absent_where_sides_are_unsure():
    absent = ("left_hip", "right_femur", "right_hip")
    wrong = picture(region("left_kidney", RIGHT), region("right_kidney", LEFT), absent=absent)
    assert run(wrong)[0].absent == ("left_hip", "right_hip")


def test_one_wrong_pair_among_right_ones_is_a_wrong_label():
    lungs = [region("left_lung", LEFT), region("right_lung", RIGHT)]
    kidneys = [region("left_kidney", (5, 28, 12, 35)), region("right_kidney", (28, 28, 35, 35))]
    assert labels(run(picture(*lungs, *kidneys))[0]) == ["left_lung", "right_lung", "kidney", "kidney"]


@pytest.mark.parametrize(
    "example",
    [
        picture(region("left_kidney", RIGHT), region("right_kidney", LEFT), image_id="case/sagittal/12"),
        picture(region("left_kidney", RIGHT), region("right_kidney", LEFT), modality="endoscopy"),
        picture(region("left_kidney", (5, 0, 12, 10)), region("right_kidney", (14, 25, 22, 35))),
        picture(region("left_lung", (5, 5, 30, 30)), region("right_lung", (9, 5, 34, 30))),
        picture(region("left_ventricle", RIGHT), region("right_ventricle", LEFT)),
        picture(region("left_kidney", RIGHT), region("liver", (2, 30, 4, 34))),
    ],
    ids=["sagittal", "endoscopy", "turned by a quarter", "from the side", "heart", "one side only"],
)
def test_where_sides_cannot_be_told_they_stay(example):
    assert run(example) == (example, {})


def test_a_picture_turned_by_half_is_right_and_one_turned_over_is_not():
    kidneys = [region("left_kidney", RIGHT), region("right_kidney", LEFT)]
    back = [region("left_autochthon", (12, 0, 18, 5)), region("right_autochthon", (22, 0, 28, 5))]
    turned = picture(*kidneys, *back, region("aorta", (18, 10, 22, 14)))
    assert run(turned) == (turned, {})
    flipped = flip_annotations(turned).regions
    names = labels(turned)
    mirrored = [dataclasses.replace(each, label=name) for each, name in zip(flipped, names, strict=True)]
    mirrored = dataclasses.replace(turned, regions=tuple(mirrored))
    assert run(mirrored)[1]["swapped_sides"] == "unsided"


@pytest.mark.parametrize("image_id", ["s0114_111", "s0619_32"])
def test_slices_of_sa_med2d_lie_on_their_backs_and_their_sides_are_right(shared_dir, image_id):
    source = load_source("sa_med2d", shared_dir / "data" / "sa_med2d_demo", dataset="demo", modality="ct")
    example = next(each for each in source if each.image_id == image_id)
    assert "swapped_sides" not in run(example)[1]
    wrong = [
        dataclasses.replace(r, label=r.label.replace("left", "L").replace("right", "left")) for r in example.regions
    ]
    wrong = [dataclasses.replace(each, label=each.label.replace("L_", "right_")) for each in wrong]
    assert "swapped_sides" in run(dataclasses.replace(example, regions=tuple(wrong)))[1]


@pytest.mark.parametrize(
    ("rule", "kept", "absent"), [("shown", 1, ()), ("absent", 0, ("lung",)), ("keep", 1, ("lung",))]
)
def test_a_label_cannot_be_shown_in_part_and_absent(rule, kept, absent):
    example, found = run(picture(region("lung_nodule", (0, 0, 9, 9)), absent=("lung",)), shown_and_absent=rule)
    assert (len(example.regions), example.absent, found) == (kept, absent, {"shown_and_absent": rule})


def test_a_lung_can_be_there_without_its_nodule():
    example = picture(region("lung", (0, 0, 9, 9)), absent=("lung_nodule", "spleen"))
    assert run(example) == (example, {})


def test_labels_that_say_nothing_are_no_regions_and_make_nothing_absent():
    example = picture(region("void", (0, 0, 9, 9)), region("No finding", (0, 0, 9, 9)), region("liver", (9, 9, 20, 20)))
    resolved, found = run(example)
    assert (labels(resolved), resolved.absent) == (["liver"], ())
    assert found == {"not_annotated": "drop", "no_finding": "drop"}
    assert len(run(example, not_annotated="keep", no_finding="keep", two_labels="keep_both")[0].regions) == 3
    assert is_not_annotated("un-labeled") or is_not_annotated("unlabeled")
    assert is_no_finding("No_Finding")
    assert not is_no_finding("liver")


def test_an_absent_list_may_mean_that_nobody_annotated():
    example = picture(region("liver", (0, 0, 9, 9)), absent=("spleen",))
    resolved, found = run(example, absent_labels="not_annotated")
    assert (resolved.absent, found) == ((), {"absent_labels": "not_annotated"})


def test_expressions_and_captions_keep_to_their_regions():
    regions = [
        region("void", (30, 30, 35, 35)),
        region("liver", (0, 0, 20, 20), spans=((0, 5),)),
        region("liver", (0, 0, 20, 20), spans=((10, 15),)),
        region("spleen", (22, 0, 30, 9)),
    ]
    said = (Expression("both", (2, 3)), Expression("nothing"), Expression("void", (0, 3)), Expression("two", (1, 2)))
    example, conflicts = resolve(picture(*regions, caption="liver and liver", expressions=said), ConflictRules())
    assert labels(example) == ["liver", "spleen"]
    assert [(each.text, each.regions) for each in example.expressions] == [
        ("both", (0, 1)),
        ("nothing", ()),
        ("two", (0,)),
    ]
    assert example.regions[0].spans == ((0, 5), (10, 15))
    assert [conflict.kind for conflict in conflicts].count("lost_text") == 1


def test_a_caption_goes_with_a_region_that_it_names():
    one = region("void", (30, 30, 35, 35), spans=((0, 4),))
    example, found = run(picture(one, region("liver", (0, 0, 20, 20), spans=((9, 14),)), caption="void and liver"))
    assert (example.caption, example.regions[0].spans, found["lost_text"]) == ("", (), "drop")


def test_texts_that_name_a_side_follow_the_rule_of_the_sides():
    wrong = picture(
        region("left_kidney", RIGHT, spans=((6, 17),)),
        region("right_kidney", LEFT),
        caption="cyst, left kidney",
        expressions=(Expression("the left one", (0,), ((4, 8),)), Expression("the large one", (1,))),
    )
    example, found = run(wrong)
    assert (example.caption, example.regions[0].spans, found["lost_text"]) == ("", (), "drop")
    assert [each.text for each in example.expressions] == ["the large one"]
    example, _ = run(wrong, swapped_sides="swap")
    assert (example.caption, example.regions[0].spans) == ("cyst, right kidney", ((6, 18),))
    assert [(each.text, each.spans) for each in example.expressions] == [
        ("the right one", ((4, 9),)),
        ("the large one", ()),
    ]


LABELS = (
    *("lung", "left_lung", "right_lung", "left_upper_lobe", "lung_nodule", "nodule", "liver", "Liver"),
    *("rib_left_9", "rib_right_9", "void", "normal", "left_kidney", "right_kidney", "left_autochthon", "aorta"),
)


@st.composite
def regions_of(draw, names=LABELS):
    x0, y0 = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    box = (x0, y0, x0 + draw(st.integers(2, 40 - x0)), y0 + draw(st.integers(2, 40 - y0)))
    return region(draw(st.sampled_from(names)), box, draw(st.booleans()), iscrowd=draw(st.integers(0, 9)) == 0)


@st.composite
def pictures(draw, names=LABELS, **fields):
    found = draw(st.lists(regions_of(names), max_size=7))
    absent = tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True)))
    places = st.lists(st.integers(0, max(len(found) - 1, 0)), max_size=2, unique=True).map(sorted)
    said = tuple(Expression(f"number {k}", tuple(draw(places)) if found else ()) for k in range(2))
    return picture(*found, absent=absent, expressions=said, **fields)


any_rules = st.fixed_dictionaries(
    {field: st.sampled_from(choices) for field, choices in CHOICES.items() if not field.startswith("duplicates")}
)


def same(a, b):
    plain = [
        [(r.label, r.phrase, r.parent, r.box.tolist(), r.mask, r.spans) for r in example.regions] for example in (a, b)
    ]
    return plain[0] == plain[1] and dataclasses.replace(a, regions=()) == dataclasses.replace(b, regions=())


@hypothesis.given(pictures(), any_rules)
def test_resolving_again_changes_nothing(example, rules):
    once, _ = resolve(example, ConflictRules(**rules))
    assert same(resolve(once, ConflictRules(**rules))[0], once)


@hypothesis.given(pictures(), any_rules)
def test_no_label_is_invented_and_every_text_keeps_its_regions(example, rules):
    resolved, conflicts = resolve(example, ConflictRules(**rules))
    given = {each.label for each in example.regions}
    known = load_taxonomy()
    swapped = set(labels(flip_annotations(example)))
    unsided = {found.id if (found := known.find(remove_side(label))) else remove_side(label) for label in given}
    assert set(labels(resolved)) <= given | unsided | (swapped if rules["swapped_sides"] == "swap" else set())
    assert set(resolved.absent) <= set(example.absent) | set(flip_annotations(example).absent)
    assert len(resolved.regions) <= len(example.regions)
    assert all(0 <= k < len(resolved.regions) for each in resolved.expressions for k in each.regions)
    lost = sum(conflict.detail.startswith("expression") for conflict in conflicts)
    assert len(example.expressions) - len(resolved.expressions) == lost


@hypothesis.given(pictures())
@hypothesis.settings(max_examples=30)
def test_what_is_not_annotated_is_never_absent(example):
    other = picture(region("spleen", (0, 0, 3, 3)), dataset="two", absent=("pancreas",))
    merged, _ = merge([resolve(example, ConflictRules())[0], other], ConflictRules())
    assert set(merged.absent) <= {*example.absent, "pancreas"}
    shown = set().union(*(find_truths(each.label, each.parent) for each in merged.regions))
    assert not shown & {label for label in merged.absent if load_taxonomy().find(label)}


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


def _conflicts(count):
    kinds = itertools.cycle(["two_labels", "same_structure"])
    return [Conflict(next(kinds), "keep_both", f"d{k % 3}", f"image {k}", ("a", "b"), "x") for k in range(count)]


@hypothesis.given(st.lists(st.integers(0, 2), min_size=30, max_size=30), st.permutations(range(3)))
@hypothesis.settings(max_examples=10)
def test_a_report_is_the_same_however_the_work_was_shared(workers, order):
    whole, parts = ConflictReport(listed=4), [ConflictReport(listed=4) for _ in range(3)]
    for conflict, worker in zip(_conflicts(30), workers, strict=True):
        whole.add(conflict)
        parts[worker].add(conflict)
    written = [ConflictReport.from_dict(json.loads(json.dumps(parts[k].as_dict())), listed=4) for k in order]
    assert (written[0] + written[1] + written[2]).as_dict() == whole.as_dict()


def test_a_report_counts_all_and_lists_some():
    report = ConflictReport(listed=3)
    for conflict in _conflicts(20):
        report.add(conflict)
    content = report.as_dict()
    assert content["counts"] == {"same_structure": {"keep_both": 10}, "two_labels": {"keep_both": 10}}
    assert content["datasets"]["d0"] == {"same_structure": {"keep_both": 3}, "two_labels": {"keep_both": 4}}
    assert [example["kind"] for example in content["examples"]] == ["same_structure"] * 3 + ["two_labels"] * 3
    assert report.total == 20
