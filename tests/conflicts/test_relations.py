"""Labels of one image: two of one outline, parts and what holds them, shown and absent ones, names of nothing."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.conflicts import ConflictRules, resolve
from data_pipelines.sources.masks import encode_mask
from data_pipelines.taxonomy.placeholders import is_no_finding, is_not_annotated, is_placeholder
from tests.conflicts.pictures import SIDE, boxes, labels, picture, region, run


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


def test_name_of_no_structure_is_known_however_it_is_written():
    assert is_not_annotated("Not-Annotated") and is_no_finding("No_Finding")
    assert is_placeholder("VOID") and is_placeholder("background")
    assert not is_placeholder("liver") and not is_placeholder("unicorn")


def test_an_absent_list_may_mean_that_nobody_annotated():
    example = picture(region("liver", (0, 0, 9, 9)), absent=("spleen",))
    resolved, found = run(example, absent_labels="not_annotated")
    assert (resolved.absent, found) == ((), {"absent_labels": "not_annotated"})
