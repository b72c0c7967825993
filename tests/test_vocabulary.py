import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.vocabulary import Vocabulary, find_broader, make_vocabularies

TAXONOMY = load_taxonomy()


def shows(*labels: str, absent: tuple[str, ...] = (), **fields) -> GroundingExample:
    """Returns an image with a region for each label of the taxonomy."""
    regions = []
    for label in labels:
        entry = TAXONOMY.labels[label]
        regions.append(Region(np.zeros(4, np.float32), entry.name, label, entry.granularity, entry.parent))
    return GroundingExample(b"", "i", "d", 8, 8, regions=tuple(regions), absent=absent, **fields)


def region(phrase: str, label: str, **fields) -> Region:
    return Region(np.zeros(4, np.float32), phrase, label, **fields)


NAMES = {name: label.id for label in TAXONOMY.labels.values() for name in (label.name, *label.synonyms)}
EVERYTHING = Vocabulary(NAMES)
CHEST = Vocabulary({phrase: NAMES[phrase] for phrase in ("heart", "lung nodule", "fracture", "trachea")})


def negatives_of(
    example: GroundingExample, vocabulary: Vocabulary = EVERYTHING, count: int = 10**6, seed: int = 0, **options
) -> list[str]:
    return list(vocabulary.sample_negatives(example, np.random.default_rng(seed), count, **options).values())


@given(st.sets(st.sampled_from(sorted(TAXONOMY.labels)), max_size=4))
def test_negatives_are_all_but_what_the_image_shows_what_that_is_and_is_in_and_what_might_be_it(labels):
    named = labels | {parent for label in labels if (parent := TAXONOMY.labels[label].parent)}  # as regions name them
    true = named.union(*(TAXONOMY.ancestors(label) for label in named))
    might = {label for label in TAXONOMY.labels if labels & {*find_broader(label)}}
    expected = sorted(name for name, label in NAMES.items() if label not in true | might)
    assert sorted(negatives_of(shows(*labels))) == expected


def test_broader_labels_are_kinds_and_the_structure_of_both_sides_but_not_what_holds_it():
    assert find_broader("left_lung") == ("lung",)
    assert {"tumor", "lesion"} <= {*find_broader("liver_tumor")}
    assert not {"liver", "abdomen"} & {*find_broader("liver_tumor")}
    assert find_broader("liver") == find_broader("left_ventricle") == find_broader("odd") == ()


def test_what_the_image_shows_is_known_by_phrase_label_and_parent():
    def left_out(*regions):
        found = {NAMES[name] for name in negatives_of(dataclasses.replace(shows(), regions=regions))}
        return set(TAXONOMY.labels) - found

    assert left_out() == set()
    assert left_out(region("Lung_Cancer", "class 3")) >= {"lung_tumor", "lung", "chest", "tumor"}
    assert "red_blood_cell" in left_out(region("a spot", "RBC"))
    assert left_out(region("a spot", "spot", parent="left_lung")) == {"left_lung", "lung", "chest"}
    assert left_out(region("heart", "heart", iscrowd=True)) >= {"heart", "mediastinum", "chest"}
    assert left_out(region("lung", "lung")) >= {"left_lung", "right_lung"}  # one of both may be what is boxed


@pytest.mark.parametrize(
    "told",
    [
        {"caption": "Multiple Lung-Nodules; heart enlarged."},
        {"expressions": (Expression("several lung nodules beside the heart"),)},
    ],
)
def test_what_the_sentences_of_an_image_mention_is_no_negative_though_it_is_not_boxed(told):
    assert sorted(negatives_of(shows("trachea", **told), CHEST)) == ["fracture"]
    odd = Vocabulary({"odd shadow": "odd_shadow", "shadow": "shadow"})
    assert negatives_of(shows(caption="Two odd shadows."), odd) == []
    assert negatives_of(shows(caption="An odd thing."), odd) != []


def test_what_a_sentence_denies_may_be_a_negative():
    denial = Expression("no lung nodule", kind="absent")
    assert "lung nodule" in negatives_of(shows(expressions=(denial,)), CHEST)
    mentioned = shows(caption="No lung nodule.", absent=("lung_nodule",))  # an expert looked for it
    assert negatives_of(mentioned, CHEST)[0] == "lung nodule"


@given(st.floats(0.1, 1), st.integers(1, 12), st.integers(0, 9))
def test_share_of_negatives_is_from_the_same_body_region(share, count, seed):
    vocabulary = Vocabulary({label.name: label.id for label in TAXONOMY.labels.values()})
    drawn = negatives_of(shows("liver"), vocabulary, count, seed, hard_share=share)
    regions = [TAXONOMY.labels[NAMES[name]].body_region for name in drawn]
    assert len(drawn) == len(set(drawn)) == count
    assert regions.count("abdomen") >= share * count - 1e-9


def is_sibling(label: str, other: str) -> bool:
    a, b = TAXONOMY.labels[label], TAXONOMY.labels[other]
    common = (a.parent and a.parent == b.parent) or set(a.kind_of) & set(b.kind_of) or a.label_class == b.label_class
    return a.granularity == b.granularity and bool(common)


@given(
    st.lists(st.sampled_from(sorted(TAXONOMY.labels)), min_size=1, max_size=3, unique=True),
    st.tuples(*[st.sampled_from([0.0, 0.25, 0.6, 1.0])] * 3),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_shares_of_siblings_of_the_level_and_of_the_body_region_are_the_least(labels, shares, count, seed):
    example = shows(*labels)
    everything = EVERYTHING.sample_negatives(example, np.random.default_rng(seed), 10**6)
    hard, sibling, level = shares
    options = {"hard_share": hard, "sibling_share": sibling, "level_share": level}
    drawn = list(EVERYTHING.sample_negatives(example, np.random.default_rng(seed), count, **options).values())
    assert len(drawn) == min(count, len(everything)) and set(drawn) <= set(everything.values())
    shown = [TAXONOMY.labels[label] for label in labels]
    regions, levels = {entry.body_region for entry in shown}, {entry.granularity for entry in shown}
    properties = (
        (sibling, lambda other: any(is_sibling(label, other.id) for label in labels)),
        (level, lambda other: other.granularity in levels),
        (hard, lambda other: other.body_region in regions),
    )
    for place, (share, has) in enumerate(properties):
        possible = sum(has(TAXONOMY.labels[NAMES[phrase]]) for phrase in everything.values())
        found = sum(has(TAXONOMY.labels[NAMES[phrase]]) for phrase in drawn)
        # Where all shares have room; each share before may have been rounded up.
        if share and sum(before for before, _ in properties[:place]) + share <= 1:
            assert found >= min(int(np.ceil(share * count)) - place, possible, len(drawn))


def test_siblings_count_towards_the_share_of_their_level():
    options = {"sibling_share": 0.5, "level_share": 0.5}
    levels = []
    for seed in range(20):
        drawn = EVERYTHING.sample_negatives(shows("liver"), np.random.default_rng(seed), 4, **options)
        levels.append([TAXONOMY.labels[NAMES[phrase]].granularity for phrase in drawn.values()])
    assert all(found[:2] == ["organ"] * 2 for found in levels)
    assert any("lesion" in found[2:] for found in levels)  # the other two are of any level


def test_of_an_image_that_shows_nothing_siblings_are_those_of_what_was_looked_for():
    example = shows(absent=("liver_cyst",))
    drawn = EVERYTHING.sample_negatives(example, np.random.default_rng(0), 5, sibling_share=1.0)
    assert next(iter(drawn)) == "liver cyst"
    assert all(is_sibling("liver_cyst", NAMES[phrase]) for phrase in drawn)


def test_too_few_phrases_of_the_body_region_are_filled_up_from_elsewhere():
    vocabulary = Vocabulary({"spleen": "spleen", "heart": "heart", "trachea": "trachea"})
    assert sorted(negatives_of(shows("liver"), vocabulary, 3, hard_share=1.0)) == ["heart", "spleen", "trachea"]
    assert negatives_of(shows("liver"), vocabulary, 1, hard_share=1.0) == ["spleen"]
    assert negatives_of(shows(absent=("fracture",)), vocabulary, 1, hard_share=1.0) == ["fracture"]


def test_phrase_of_a_label_that_is_shown_is_no_negative_outside_the_taxonomy_either():
    vocabulary = Vocabulary({"Spot": "odd", "blot": "odd", "streak-like": "even", "streak like": "even"})
    example = dataclasses.replace(shows(), regions=(region("spot", "odd"),))
    (negative,) = negatives_of(example, vocabulary, 9)
    assert negative in ("streak-like", "streak like")
    synonym = Vocabulary({"Lung Cancer": "class 3"})
    assert negatives_of(shows("lung_tumor"), synonym) == []


def test_absent_labels_are_the_first_negatives():
    example = shows("left_lung", absent=("pneumothorax", "lung_nodule", "odd_shadow", "pneumothorax"))
    first = collections.Counter()
    for seed in range(60):
        negatives = negatives_of(example, EVERYTHING, 5, seed)
        assert len(set(negatives)) == 5
        assert sorted(negatives[:3]) == ["lung nodule", "odd shadow", "pneumothorax"]
        first[negatives[0]] += 1
    assert len(first) == 3
    assert sorted(negatives_of(example, CHEST)) == [
        "fracture",
        "heart",
        "lung nodule",
        "odd shadow",
        "pneumothorax",
        "trachea",
    ]


def test_absent_phrases_are_all_that_may_be_drawn():
    labels = {"left lung": "left_lung", "heart": "heart", "nodule": "lung_nodule", "fracture": "fracture"}
    for exhaustive in (True, False):
        vocabulary = Vocabulary(labels, exhaustive=exhaustive)
        example = shows("left_lung", absent=("pneumothorax", "fracture"))
        absent = vocabulary.find_absent(example)
        assert absent[:2] == ("pneumothorax", "fracture") and len(set(absent)) == len(absent)
        drawn = vocabulary.sample_negatives(example, np.random.default_rng(0), 99)
        assert sorted(drawn.values()) == sorted(absent) and ("heart" in absent) == exhaustive


def test_absent_label_goes_by_the_phrase_of_the_data_set():
    vocabulary = Vocabulary({"lung lesion": "lung_nodule", "spot": "lung_nodule"})
    example = shows(absent=("lung_nodule",))
    assert negatives_of(example, vocabulary, 1) == ["lung lesion"]
    assert Vocabulary({}).phrase_of("left_autochthon") == "left back muscle"  # else by that of the taxonomy


def test_label_both_shown_and_absent_is_no_negative():
    example = shows("left_lung", "lung_tumor", absent=("lung", "lung_tumor", "Lung Cancer", "odd"))
    example = dataclasses.replace(example, regions=(*example.regions, region("spot", "odd")))
    assert negatives_of(example, Vocabulary({})) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_more_negatives_than_asked_for(count):
    example = shows(absent=("pneumothorax", "polyp"))
    assert len(negatives_of(example, CHEST, count)) == count


def test_every_phrase_of_the_vocabulary_comes_up():
    drawn = (negatives_of(shows("heart"), CHEST, 1, seed) for seed in range(300))
    found = collections.Counter(name for names in drawn for name in names)
    assert found.keys() == {"lung nodule", "fracture", "trachea"}
    assert min(found.values()) > 60


SKIN = {"melanoma": "melanoma", "nevus": "nevus"}


def test_of_other_data_sets_only_what_the_image_cannot_show_is_a_negative():
    vocabulary = Vocabulary({"heart": "heart"}, {**SKIN, "liver": "liver", "fracture": "fracture", "odd": "odd"})
    assert sorted(negatives_of(shows("trachea", modality="ct"), vocabulary)) == ["heart", "melanoma", "nevus"]
    # A liver may be at the edge of a chest CT, and nobody knows what is odd.
    assert negatives_of(shows("trachea"), vocabulary) == ["heart"]  # the modality is not known
    assert negatives_of(shows(modality="ct"), vocabulary) == ["heart"]  # the part of the body is not known
    assert sorted(negatives_of(shows("melanoma", modality="dermoscopy"), vocabulary)) == ["fracture", "heart", "liver"]


def test_own_phrase_stands_for_that_of_other_data_sets():
    assert Vocabulary({"Heart": "heart"}, {"heart": "heart", "nevus": "nevus"}).phrases == ("Heart", "nevus")


def test_modality_in_which_a_phrase_was_seen_may_show_it():
    seen = {"melanoma": ["ct"], "odd": ["dermoscopy"]}
    vocabulary = Vocabulary({}, {**SKIN, "odd": "odd"}, modalities=seen)
    assert negatives_of(shows("trachea", modality="ct"), vocabulary) == ["nevus"]
    assert sorted(negatives_of(shows("trachea", modality="mri"), vocabulary)) == ["melanoma", "nevus"]


def test_data_set_that_is_not_annotated_in_full_has_what_was_looked_for_and_what_is_elsewhere_as_negatives():
    vocabulary = Vocabulary(dict.fromkeys(["heart", "trachea", "fracture"], "") | NAMES, SKIN, exhaustive=False)
    example = shows("left_lung", modality="xray", absent=("pneumothorax",))
    drawn = negatives_of(example, vocabulary)
    assert drawn[0] == "pneumothorax"
    assert all(TAXONOMY.labels[NAMES[name]].body_region != "chest" for name in drawn[1:])
    assert not any("xray" in TAXONOMY.labels[NAMES[name]].modalities for name in drawn[1:])
    assert {"melanoma", "nevus"} <= set(drawn)


@pytest.mark.parametrize(
    ("sentence", "mentioned"),
    [
        ("Small pneumothoraces on both sides.", "pneumothorax"),
        ("A small effusion.", "pleural effusion"),
        ("A tumor of 3 cm.", "meningioma"),
        ("Several metastases.", "liver metastasis"),
        ("Several thrombi.", "thrombus"),
    ],
)
def test_what_a_sentence_names_in_other_words_is_no_negative(sentence, mentioned):
    labels = {"pneumothorax": "pneumothorax", "pleural effusion": "pleural_effusion", "meningioma": "meningioma"}
    vocabulary = Vocabulary({**labels, "liver metastasis": "x", "thrombus": "y", "fracture": "fracture"})
    assert TAXONOMY.labels["meningioma"].kind_of
    every = set(negatives_of(shows(caption="A sentence."), vocabulary))
    assert every == set(vocabulary.phrases)
    assert every - set(negatives_of(shows(caption=sentence), vocabulary)) == {mentioned}


@given(st.data())
def test_negatives_are_none_twice_and_as_many_as_there_are(data):
    names = data.draw(st.lists(st.sampled_from(sorted(NAMES)), unique=True))
    own = {name.upper() if index % 2 else name: NAMES[name] for index, name in enumerate(names)}
    own |= {name: NAMES[name] for name in names[::3]}  # twice, in other letters
    example = shows(*data.draw(st.sets(st.sampled_from(sorted(TAXONOMY.labels)), max_size=3)), modality="ct")
    vocabulary = Vocabulary(own, NAMES)
    every = negatives_of(example, vocabulary)
    assert len({name.lower() for name in every}) == len(every)
    count, share = data.draw(st.integers(0, 30)), data.draw(st.floats(0, 1))
    drawn = negatives_of(example, vocabulary, count, hard_share=share)
    assert len(drawn) == min(count, len(every)) == len({name.lower() for name in drawn})
    assert {name.lower() for name in drawn} <= {name.lower() for name in every}


def entry(label: str, count: int, *modalities: str, data_sets=None) -> dict:
    fields = {"label": label, "granularity": "organ", "count": count, "modalities": list(modalities)}
    return fields if data_sets is None else {**fields, "data_sets": data_sets}


def test_each_data_set_of_the_metadata_has_its_own_vocabulary():
    first = {"phrases": {"x": entry("a", 2, "ct", data_sets=["one"]), "z": entry("d", 2, "ct", data_sets=["two"])}}
    second = {
        "phrases": {"x": entry("b", 5, "mri", data_sets=["two", "three"]), "y": entry("c", 9, data_sets=["two"])},
        "partial": ["three"],
    }
    found = make_vocabularies([first, second])
    drawn = {name: sorted(negatives_of(shows(), vocabulary)) for name, vocabulary in found.items()}
    assert drawn == {"one": ["x"], "two": ["x", "y", "z"], "three": [], "": []}
    assert found["one"].phrase_of("b") == "x"  # of two labels of a phrase the more frequent one


def test_phrases_of_older_metadata_belong_to_all_data_sets_of_their_split():
    phrases = {"x": entry("a", 2, "ct")}
    several = make_vocabularies([{"phrases": phrases, "datasets": {"one": [0, 2], "two": [2, 3]}}])
    assert {name: negatives_of(shows(), several[name]) for name in several} == {"one": ["x"], "two": ["x"], "": []}
    nobody = make_vocabularies([{"phrases": phrases}])
    assert negatives_of(shows(), nobody[""]) == ["x"]
