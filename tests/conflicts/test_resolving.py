"""Whatever the example and the rules: texts keep their regions, nothing is invented, and one pass is enough."""

import hypothesis

from data_pipelines.conflicts import ConflictRules, merge, resolve
from data_pipelines.conflicts.structures import find_truths, remove_side
from data_pipelines.schema import Expression
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.transforms import flip_annotations
from tests.conflicts.pictures import any_rules, labels, picture, pictures, region, run, same


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
