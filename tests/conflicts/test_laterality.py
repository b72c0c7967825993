"""Left and right against the picture."""

import dataclasses

import pytest

from data_pipelines.schema import Expression
from data_pipelines.sources import load_source
from data_pipelines.transforms import flip_annotations
from tests.conflicts.pictures import labels, picture, region, run

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


def test_name_without_its_side_keeps_what_it_is_one_of_or_what_holds_it():
    wrong = picture(
        region("left_kidney", RIGHT),
        region("right_kidney", LEFT),
        region("left_rib_9", (5, 26, 9, 30)),
        region("left_hip", (5, 31, 9, 35)),
        region("left_upper_lobe", (5, 36, 9, 38)),
    )
    example, _ = run(wrong)
    parents = {each.label: each.parent for each in example.regions}
    assert parents == {"kidney": "abdomen", "rib_9": "rib", "hip": "pelvis", "upper_lobe": "lung"}


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
