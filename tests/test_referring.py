import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from data_pipelines.curate import box_from_mask
from data_pipelines.positions import FALSE, TRUE, UNDECIDED
from data_pipelines.referring import ReferRule, refer
from data_pipelines.referring.attributes import measure_shape, overlap_share
from data_pipelines.referring.compose import Query, compose, compose_negation
from data_pipelines.referring.scene import Predicate, Scene
from data_pipelines.referring.verify import has_good_format, is_plausible, verify, verify_negation
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sides import swap_sides
from data_pipelines.transforms import flip_annotations

SIZE = 96
LABELS = {
    "lung nodule": ("lung_nodule", "lesion", "lung"),
    "left lung": ("left_lung", "organ", "lung"),
    "right lung": ("right_lung", "organ", "lung"),
    "heart": ("heart", "organ", "mediastinum"),
    "spot": ("odd", "lesion", ""),
}


def paint(kind: str, x: float, y: float, width: float = 8, height: float = 0, ring: bool = False) -> np.ndarray:
    """Returns a bool[SIZE, SIZE] mask of an ellipse or a rectangle around a center."""
    rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
    across, down = np.abs(columns - x) / (width / 2), np.abs(rows - y) / ((height or width) / 2)
    radius = np.maximum(across, down) if kind == "rectangle" else np.sqrt(across**2 + down**2)
    return (radius <= 1) & ((radius > 0.5) | (not ring))


def region(phrase: str, mask: np.ndarray | None, **fields) -> Region:
    label, granularity, parent = LABELS.get(phrase, (phrase.replace(" ", "_"), "lesion", ""))
    encoded = None if mask is None else dict(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
    box = box_from_mask(mask) if mask is not None else np.asarray([0, 0, 9, 9], np.float32)
    return Region(box, phrase, label, granularity, parent, encoded, **fields)


def image(*regions: Region, **fields) -> GroundingExample:
    return GroundingExample(b"", "i", "d", SIZE, SIZE, regions=regions, **fields)


shapes = st.builds(
    paint,
    st.sampled_from(["ellipse", "rectangle"]),
    st.integers(4, SIZE - 4),
    st.integers(4, SIZE - 4),
    st.integers(5, 40),
    st.integers(5, 40),
)
scenes = st.lists(st.builds(region, st.sampled_from(sorted(LABELS)), shapes), min_size=1, max_size=6).map(
    lambda regions: image(*regions, modality="xray", spacing_mm=(1.0, 1.0))
)


@settings(max_examples=30)
@given(scenes, st.integers(0, 99))
def test_query_that_stays_is_true_of_its_region_and_false_of_all_others_of_its_name(example, seed):
    scene, rng = Scene(example), np.random.default_rng(seed)
    for target in range(len(example.regions)):
        query = compose(scene, target, rng)
        if query is None or verify(scene, query):
            continue
        again = Scene(example)
        name = example.regions[target].phrase
        assert name in query.text
        for index, other in enumerate(example.regions):
            if other.phrase == name:
                place = query.noun.regions.index(index)
                truth = min(again.decide(each, query.noun.regions)[place] for each in query.predicates)
                assert truth == (TRUE if index == target else FALSE)


@settings(max_examples=30)
@given(scenes, st.integers(0, 9))
def test_what_is_said_of_an_image_may_be_said_of_its_mirror_image(example, seed):
    """The mirrored query keeps its claim: left and right change places in its words and its predicates."""
    scene, mirrored = Scene(example), Scene(flip_annotations(example))
    for target in range(len(example.regions)):
        query = compose(scene, target, np.random.default_rng(seed))
        if query is None:
            continue
        claims = tuple(dataclasses.replace(each, value=swap_sides(each.value)) for each in query.predicates)
        members = query.noun.regions
        before = [scene.decide(each, members).tolist() for each in query.predicates]
        assert before == [mirrored.decide(each, members).tolist() for each in claims]
        assert (verify(scene, query) == "not unique") == (_verify_mirrored(mirrored, query, claims) == "not unique")


def _verify_mirrored(scene: Scene, query: Query, claims: tuple[Predicate, ...]) -> str:
    return verify(scene, dataclasses.replace(query, text=swap_sides(query.text), predicates=claims))


@settings(max_examples=30)
@given(scenes, st.integers(0, 9))
def test_expressions_have_words_spans_and_the_regions_that_their_kind_has(example, seed):
    expressions, dropped = refer(example, np.random.default_rng(seed))
    assert (expressions, dropped) == refer(example, np.random.default_rng(seed))
    assert min(dropped.values(), default=1) > 0
    assert len({expression.text for expression in expressions}) == len(expressions)
    for expression in expressions:
        assert has_good_format(expression.text)
        if expression.kind == "referring":
            (target,) = expression.regions
            ((start, end),) = expression.spans
            assert expression.text[start:end].startswith("the ")
            assert example.regions[target].phrase in expression.text[start:end]
        else:
            assert (expression.kind, expression.regions) == ("negation", ())


@settings(max_examples=30)
@given(scenes, st.integers(0, 99))
def test_negation_that_stays_is_false_of_every_region_of_its_name(example, seed):
    scene = Scene(example)
    query = compose_negation(scene, np.random.default_rng(seed))
    if query is None or verify_negation(scene, query):
        return
    for index in query.noun.regions:
        assert scene.decide(query.predicates[0], (index,)).tolist() == [FALSE]


def test_measurements_agree_with_what_was_painted():
    disk = measure_shape(region("spot", paint("ellipse", 40, 30, 20)), (0.5, 0.5))
    bar = measure_shape(region("spot", paint("rectangle", 50, 40, 40, 8)), (2.0, 1.0))
    ring = measure_shape(region("spot", paint("ellipse", 40, 40, 40, ring=True)))
    assert disk is not None and bar is not None and ring is not None
    assert disk.center == pytest.approx((40, 30))
    assert disk.box.tolist() == [30, 20, 50, 40]
    assert disk.share == disk.area / SIZE**2
    assert disk.elongation == pytest.approx(1, abs=0.01)
    assert disk.solidity > 0.95
    assert disk.length_mm == pytest.approx(10, abs=0.6)
    assert bar.elongation == pytest.approx(5, abs=0.01)
    assert bar.solidity == pytest.approx(1, abs=0.02)
    assert bar.length_mm == pytest.approx(np.hypot(39, 14) + 1, abs=1e-6)
    assert ring.filled.sum() > 1.3 * ring.area and ring.length_mm == 0
    assert overlap_share(disk, ring) > 0.5
    assert measure_shape(region("spot", None)) is None
    assert measure_shape(region("spot", np.zeros((SIZE, SIZE), bool))) is None


def chest(*nodules: tuple[float, float, float], **fields) -> GroundingExample:
    """Returns both lungs, the heart between them and nodules (x, y, diameter)."""
    return image(
        region("right lung", paint("rectangle", 24, 48, 32, 80)),
        region("left lung", paint("rectangle", 72, 48, 32, 80)),
        region("heart", paint("rectangle", 48, 60, 14, 30)),
        *(region("lung nodule", paint("ellipse", *nodule)) for nodule in nodules),
        **{"modality": "xray", **fields},
    )


def decide(example: GroundingExample, kind: str, value: str, index: int, other: int = -1) -> float:
    members = range(3, len(example.regions)) if kind in ("rank", "nearest") else (index,)
    return float(Scene(example).decide(Predicate(kind, value, other), members)[list(members).index(index)])


def test_predicates_say_what_their_words_mean_with_a_margin_between_true_and_false():
    example = chest((24, 20, 6), (72, 80, 24), (26, 80, 8))
    assert [decide(example, "size", "large", i) for i in (3, 4)] == [FALSE, UNDECIDED]
    assert [decide(example, "shape", "round", i) for i in (3, 4)] == [UNDECIDED, TRUE]  # the first is too small to say
    assert decide(example, "shape", "elongated", 0) == TRUE
    assert [decide(example, "rank", "largest", i) for i in (3, 4, 5)] == [FALSE, TRUE, FALSE]
    assert [decide(example, "rank", "smallest", i) for i in (3, 4, 5)] == [TRUE, FALSE, FALSE]
    assert [decide(example, "relation", "inside", i, 0) for i in (3, 4, 5)] == [TRUE, FALSE, TRUE]
    assert [decide(example, "third", "upper", i, 0) for i in (3, 4, 5)] == [TRUE, FALSE, FALSE]
    assert [decide(example, "third", "lower", i, 0) for i in (3, 4, 5)] == [FALSE, FALSE, TRUE]
    assert [decide(example, "relation", "left of", i, 2) for i in (0, 1, 2)] == [TRUE, FALSE, FALSE]
    assert [decide(example, "relation", "above", i, 2) for i in (3, 4)] == [UNDECIDED, FALSE]  # not above, beside it
    assert decide(example, "relation", "touching", 2, 0) == TRUE
    assert decide(example, "relation", "touching", 3, 1) == FALSE
    assert [decide(example, "nearest", "nearest", i, 2) for i in (3, 4, 5)] == [FALSE, TRUE, FALSE]


def test_length_is_told_in_millimetres_where_the_spacing_is_known():
    example = chest((24, 20, 10), spacing_mm=(2.0, 2.0))
    assert [decide(example, "length", length, 3) for length in ("20", "27", "40")] == [TRUE, UNDECIDED, FALSE]
    assert decide(chest((24, 20, 10)), "length", "20", 3) == UNDECIDED


def texts_of(example: GroundingExample, kind: str = "referring", seeds: int = 40, **rule) -> dict[str, tuple[int, ...]]:
    found = {}
    for seed in range(seeds):
        expressions, _ = refer(example, np.random.default_rng(seed), ReferRule(**rule))
        found |= {each.text: each.regions for each in expressions if each.kind == kind}
    return {text.removeprefix("find ").removeprefix("locate "): regions for text, regions in found.items()}


def test_queries_tell_the_nodules_of_a_chest_apart():
    found = texts_of(chest((24, 20, 6), (72, 80, 16), (26, 80, 8)))
    assert found["the largest lung nodule"] == (4,)
    assert found["the lung nodule inside the left lung"] == (4,)
    assert found["the lung nodule in the upper zone of the right lung"] == (3,)
    assert found["the lung nodule in the lower left part of the image"] == (5,)
    assert "the lung nodule inside the right lung" not in found  # there are two
    assert not [
        text for text in found if "elongated left lung" in text or ("large" in text and "lung nodule" not in text)
    ]


def test_zones_are_a_radiographs_and_a_slice_has_thirds_of_the_image():
    found = texts_of(chest((24, 20, 6), modality="ct"))
    assert "the lung nodule in the upper third of the right lung on the image" in found
    assert not [text for text in found if "zone" in text]


def query_about(example: GroundingExample, target: int, *predicates: Predicate, text: str = "the lung nodule") -> str:
    scene = Scene(example)
    noun = scene.noun_of(target)
    assert noun is not None
    return verify(scene, Query(text, noun, predicates, target))


@pytest.mark.parametrize(
    ("predicate", "reason"),
    [
        (Predicate("relation", "inside", 1), ""),
        (Predicate("relation", "inside", 0), "geometry"),
        (Predicate("part", "lower"), "not unique"),
        (Predicate("rank", "largest"), ""),
    ],
)
def test_verifier_drops_what_is_wrong_or_means_several(predicate, reason):
    assert query_about(chest((72, 80, 16), (26, 80, 8)), 3, predicate) == reason


def test_region_without_a_mask_keeps_the_others_of_its_name_from_being_told_apart():
    example = chest((72, 80, 16))
    blind = dataclasses.replace(example, regions=(*example.regions, region("lung nodule", None)))
    inside = Predicate("relation", "inside", 1)
    assert query_about(example, 3, inside) == ""
    assert query_about(blind, 3, inside) == "not unique"
    _, dropped = refer(blind, np.random.default_rng(0))
    assert dropped["region has no mask"] == 1


@pytest.mark.parametrize(
    ("changes", "plausible"),
    [
        ({}, True),
        ({"modality": "fundus"}, False),  # shows no lung
        ({"modality": "unknown"}, True),
    ],
)
def test_modality_must_be_one_that_shows_the_label(changes, plausible):
    assert is_plausible(Scene(chest((24, 20, 6), **changes)), 3) == plausible


def test_lesion_outside_the_structure_that_holds_it_is_not_plausible():
    assert is_plausible(Scene(chest((48, 20, 6))), 3) is False  # between the lungs
    assert is_plausible(Scene(chest((40, 20, 6))), 3) is True  # at the border: its center is in a lung's box
    assert query_about(chest((48, 20, 6)), 3, Predicate("part", "upper")) == "medical prior"


def test_sides_must_lie_as_radiology_shows_them():
    example = chest()
    wrong = dataclasses.replace(example, regions=(*example.regions[1::-1], example.regions[2]))
    swapped = dataclasses.replace(
        example,
        regions=tuple(
            dataclasses.replace(each, phrase=swap_sides(each.phrase), label=swap_sides(each.label))
            for each in example.regions
        ),
    )
    assert [is_plausible(Scene(each), 0) for each in (example, wrong, swapped)] == [True, True, False]
    ultrasound = dataclasses.replace(swapped, modality="unknown")
    assert is_plausible(Scene(ultrasound), 0)


def test_whole_is_not_said_to_be_inside_its_part():
    core = region("tumor core", paint("ellipse", 48, 48, 16))
    rim = region("enhancing tumor", paint("ellipse", 48, 48, 40, ring=True))
    inside = Predicate("relation", "inside", 1)
    assert query_about(image(core, rim, modality="mri"), 0, inside) == "medical prior"


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("the lung nodule inside the left lung", True),
        ("nodule", False),
        ("the nodule inside the {}", False),
        ("the nodule  inside the lung", False),
        ("the the nodule inside the lung", False),
        ("the nodule. It is inside the lung", False),
        ("the " + "nodule and " * 20, False),
    ],
)
def test_format_is_one_short_sentence_without_empty_slots(text, good):
    assert has_good_format(text) == good


def test_negations_deny_what_is_elsewhere():
    found = texts_of(chest((72, 80, 16)), "negation", seeds=160)
    assert all(regions == () for regions in found.values())
    assert {"no lung nodule inside the right lung", "a lung nodule inside the right lung"} <= {*found}
    assert "no lung nodule inside the left lung" not in found
    assert "the heart in the lower left part of the image" not in found  # low, and neither left nor right


def test_claim_that_is_true_of_one_region_or_nearly_so_is_not_denied():
    scene = Scene(chest((24, 20, 6), (72, 80, 16)))
    noun = scene.noun_of(3)
    assert noun is not None
    for part, reason in (("upper left", "may be true"), ("upper right", "")):
        claim = (Predicate("part", part),)
        assert verify_negation(scene, Query(f"no lung nodule in the {part} part", noun, claim, -1)) == reason
    assert decide(chest((40, 20, 8)), "relation", "inside", 3, 0) == UNDECIDED  # across the border of the lung


def test_absent_labels_are_denied_unless_they_are_shown():
    example = chest((72, 80, 16), absent=("pleural_effusion", "lung_nodule", "odd_shadow"))
    found = texts_of(example, "absent")
    openings = ("no", "no sign of", "there is no")
    assert {*found} == {f"{o} {name}" for o, name in itertools.product(openings, ("pleural effusion", "odd shadow"))}


def test_what_cannot_be_referred_to_is_counted():
    speck = region("spot", paint("rectangle", 10, 10, 2))
    crowd = region("heart", paint("ellipse", 50, 50, 20), iscrowd=True)
    expressions, dropped = refer(image(speck, crowd), np.random.default_rng(0), ReferRule(negations=0))
    assert expressions == ()
    assert dropped == {"mask under 16 pixels": 1, "region is a crowd": 1}
    assert refer(image(), np.random.default_rng(0), ReferRule(negations=0))[0] == ()


def test_rule_bounds_the_number_of_expressions():
    example = chest((24, 20, 6), (72, 80, 16), (26, 80, 8))
    for rule in (ReferRule(regions=2, per_region=1), ReferRule(regions=3, per_region=2)):
        found, _ = refer(example, np.random.default_rng(0), rule)
        targets = [each.regions for each in found if each.kind == "referring"]
        assert 0 < len(targets) <= rule.regions * rule.per_region
        assert max(targets.count(each) for each in targets) <= rule.per_region
