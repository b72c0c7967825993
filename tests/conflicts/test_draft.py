"""What a draft remembers of its regions is forgotten when they change."""

import dataclasses

import hypothesis
import numpy as np
import pytest

from data_pipelines.conflicts import ConflictRules
from data_pipelines.conflicts.draft import Draft
from data_pipelines.conflicts.outlines import measure_boxes
from data_pipelines.conflicts.structures import find_key
from tests.conflicts.pictures import picture, pictures, region

LEAST, ACROSS = 0.5, 0.9


def overlaps(draft):
    return [(i, j) for i, j, _ in draft.find_overlaps(LEAST, ACROSS)]


def make_draft():
    outlines = ((0, 0, 20, 20), (2, 0, 22, 20), (0, 0, 20, 20), (30, 30, 40, 40))
    names = ("polyp", "polyp", "liver", "polyp")
    regions = [region(name, box, name == "liver") for name, box in zip(names, outlines, strict=True)]
    return Draft(picture(*regions, region("polyp", outlines[0], iscrowd=True)), ConflictRules())


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda draft: draft.drop([1]), [(0, 2)]),
        (lambda draft: draft.fold(2, 0), [(0, 1)]),
        (lambda draft: draft.replace(0, box=np.asarray([30, 30, 40, 40], np.float32)), [(0, 3)]),
        (lambda draft: draft.replace(2, label="polyp"), [(0, 1), (0, 2), (1, 2)]),
        (lambda draft: draft.replace(0, parent="colon"), [(0, 1), (0, 2)]),
    ],
)
def test_overlaps_are_those_of_the_regions_as_they_are(change, left):
    draft = make_draft()
    assert overlaps(draft) == [(0, 1), (0, 2)]  # of one label, and of two; the crowd is left out
    change(draft)
    assert overlaps(draft) == left
    live = draft.live
    np.testing.assert_array_equal(draft.measure(live), measure_boxes(draft.take(live)))


@hypothesis.given(pictures())
def test_overlaps_are_those_of_each_pair_by_itself(example):
    example = dataclasses.replace(example, expressions=())
    found = dict(((i, j), iou) for i, j, iou in Draft(example, ConflictRules()).find_overlaps(LEAST, ACROSS))
    for j, b in enumerate(example.regions):
        for i, a in enumerate(example.regions[:j]):
            pair = Draft(dataclasses.replace(example, regions=(a, b)), ConflictRules())
            alone = pair.find_overlaps(0.0, 0.0)
            iou = alone[0][2] if alone else -1.0
            least = LEAST if find_key(a.label) == find_key(b.label) else ACROSS
            assert found.get((i, j)) == (iou if iou >= least else None)
