"""Outlines of one structure that were made several times, and boxes that are not their masks'."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.conflicts import CHOICES, KINDS, ConflictRules
from tests.conflicts.pictures import boxes, labels, picture, region, run


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
