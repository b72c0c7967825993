import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.curate import SourceError, make_region
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.taxonomy import Label, load_taxonomy
from data_pipelines.taxonomy.mapping import (
    NORMAL,
    NOT_ANNOTATED,
    Dropped,
    LabelMapping,
    add_absent,
    apply_mapping,
    describe_unmapped,
    list_mappings,
    load_mapping,
)

LABELS = load_taxonomy().labels
BUNDLED = {name: load_mapping(name) for name in list_mappings()}
SETS = {
    "amos": 15,
    "bccd": 3,
    "biomedparse_demo": 36,
    "brats": 7,
    "btcv": 13,
    "busi": 2,
    "chestx_det": 13,
    "drive": 1,
    "dsb": 1,
    "idrid": 6,
    "isic": 14,
    "kvasir": 14,
    "msd": 16,
    "pannuke": 5,
    "rsna": 1,
    "sa_med2d": 150,
    "siim": 1,
    "totalsegmentator_ct": 117,
    "totalsegmentator_mr": 50,
    "vindr_cxr": 25,
}
MAPPING_TEXT = """
source: a paper
classes: [liver, Spot, Rim, Fine, Odd_thing]
labels: {Spot: lung_nodule, Odd_thing: lung_mass}
drop: {Rim: the rim of the picture}
not_annotated: [Unlabelled]
normal: [Fine]
"""
BOX = np.asarray([1, 2, 3, 4], np.float32)


@pytest.fixture
def mapping(tmp_path) -> LabelMapping:
    path = tmp_path / "mine.yaml"
    path.write_text(MAPPING_TEXT)
    return load_mapping(path)


def example_of(*names: str, absent: tuple[str, ...] = (), **fields) -> GroundingExample:
    regions = tuple(make_region(name, BOX) for name in names)
    return GroundingExample(b"", "i", "d", 8, 8, regions=regions, absent=absent, **fields)


def apply(example: GroundingExample, mapping: LabelMapping):
    unmapped = collections.Counter()
    mapped, left_out = apply_mapping(example, mapping, unmapped)
    return mapped, left_out, unmapped


def test_every_supported_set_has_a_mapping_that_says_where_its_classes_are_listed():
    assert BUNDLED.keys() == SETS.keys()
    assert all(mapping.source and mapping.classes for mapping in BUNDLED.values())


@pytest.mark.parametrize("name", SETS)
def test_every_class_of_a_set_has_a_label_or_a_reason_to_be_left_out(name):
    mapping = BUNDLED[name]
    for class_ in mapping.classes:
        meaning = mapping.resolve(class_)
        assert isinstance(meaning, Label) or (isinstance(meaning, Dropped) and meaning.reason), class_
    assert len(mapping.labels) >= SETS[name]


@pytest.mark.parametrize("name", ["totalsegmentator_ct", "totalsegmentator_mr", "amos", "btcv"])
def test_no_two_organs_of_a_set_are_one_label_and_sides_are_kept(name):
    mapping = BUNDLED[name]
    assert len(mapping.labels) == SETS[name]
    for class_ in mapping.classes:
        meaning = mapping.resolve(class_)
        if isinstance(meaning, Label) and len(class_) > 4:  # shorter ones are abbreviations
            said = set(re.split(r"[ _]", class_)) & {"left", "right"}
            assert {meaning.side} - {"none"} == said


@pytest.mark.parametrize(
    ("name", "class_", "label"),
    [
        ("totalsegmentator_ct", "rib_left_4", "left_rib_4"),
        ("totalsegmentator_ct", "vertebrae_T12", "vertebra_t12"),
        ("totalsegmentator_ct", "iliopsoas_right", "right_iliopsoas"),
        ("totalsegmentator_mr", "vertebrae", "vertebra"),
        ("amos", "arota", "aorta"),
        ("btcv", "LKid", "left_kidney"),
        ("msd", "lung cancer", "lung_tumor"),
        ("msd", "BRATS edema", "peritumoral_edema"),
        ("msd", "prostate TZ", "prostate_transition_zone"),
        ("brats", "NCR/NET", "necrotic_tumor_core"),
        ("vindr_cxr", "Nodule/Mass", "lung_nodule_or_mass"),
        ("vindr_cxr", "Edema", "pulmonary_edema"),
        ("chestx_det", "Effusion", "pleural_effusion"),
        ("isic", "MEL", "melanoma"),
        ("kvasir", "ulcerative-colitis-grade-2-3", "ulcerative_colitis"),
        ("busi", "malignant", "malignant_breast_tumor"),
        ("idrid", "SE", "cotton_wool_spot"),
        ("drive", "vessel", "retinal_vessel"),
        ("pannuke", "Connective/Soft tissue cells", "connective_tissue_cell"),
        ("dsb", "nuclei", "nucleus"),
    ],
)
def test_classes_mean_what_their_publishers_mean(name, class_, label):
    assert BUNDLED[name].resolve(class_) is LABELS[label]


def test_same_name_means_what_its_set_means():
    meant = {"brats": "peritumoral_edema", "vindr_cxr": "pulmonary_edema", "siim": "edema"}
    assert {name: BUNDLED[name].resolve("edema") for name in meant} == {n: LABELS[id_] for n, id_ in meant.items()}


def test_table_comes_before_the_taxonomy_and_names_are_folded(mapping):
    assert mapping.resolve("SPOT (small)") is LABELS["lung_nodule"]
    assert mapping.resolve("odd thing") is mapping.resolve("Odd-Thing") is LABELS["lung_mass"]
    assert mapping.resolve("kidney_left") is LABELS["left_kidney"]
    assert mapping.resolve("rim") == Dropped("the rim of the picture")
    assert (mapping.resolve("unlabelled"), mapping.resolve("fine")) == (NOT_ANNOTATED, NORMAL)
    assert mapping.resolve("unicorn") is None


def test_beginning_of_names_counts_after_whole_names_and_before_the_taxonomy(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("drop: {union_*: a, union_left*: b, liver_*: c}\nlabels: {union_left_x: spleen}")
    mapping = load_mapping(path)
    names = ("Union-kidney", "union_left_kidney", "union left x", "liver", "liver_tumor", "spleen", "onion_x")
    found = [mapping.resolve(name) for name in names]
    dropped, spleen = [Dropped("a"), Dropped("b")], LABELS["spleen"]
    assert found == [*dropped, spleen, LABELS["liver"], Dropped("c"), spleen, None]
    assert "union_*" not in mapping.classes and LabelMapping("m").resolve("*") is None


def test_classes_of_sa_med2d_that_name_no_structure_are_left_out():
    for name in ("union_liver_tumor", "class_3", "class1", "left", "right"):
        assert isinstance(BUNDLED["sa_med2d"].resolve(name), Dropped), name


def test_plain_mapping_knows_what_the_taxonomy_knows():
    plain = load_mapping("")
    assert plain.name == "" and plain.resolve("Left Lung") is LABELS["left_lung"] and plain.resolve("Spot") is None


def test_mapped_region_takes_all_from_its_label(mapping):
    example = example_of("Spot", "liver")
    mapped, left_out, unmapped = apply(example, mapping)
    (spot, liver), nodule = mapped.regions, LABELS["lung_nodule"]
    assert (spot.label, spot.phrase, spot.granularity, spot.parent) == (nodule.id, nodule.name, "lesion", "lung")
    assert (liver.label, spot.source_label) == ("liver", "Spot")
    np.testing.assert_array_equal(spot.box, BOX)
    assert not left_out and not unmapped


def test_words_of_the_caption_stay_the_phrase(mapping):
    region = dataclasses.replace(make_region("Spot", BOX), phrase="a dot", spans=((0, 5),))
    mapped, _, _ = apply(dataclasses.replace(example_of(), caption="a dot", regions=(region,)), mapping)
    assert (mapped.regions[0].phrase, mapped.regions[0].label) == ("a dot", "lung_nodule")


def test_narrower_parent_stays():
    def mapped_parent(parent: str) -> str:
        region = dataclasses.replace(make_region("lung nodule", BOX), parent=parent)
        return apply(dataclasses.replace(example_of(), regions=(region,)), load_mapping(""))[0].regions[0].parent

    assert mapped_parent("left_lung") == "left_lung"
    assert [mapped_parent(parent) for parent in ("", "liver", "odd", "chest")] == ["lung"] * 4


def test_site_before_a_name_is_no_hindrance():
    region = make_region("left lung", BOX, "chest")
    assert region.source_label == "chest left lung"
    mapped, _, unmapped = apply(dataclasses.replace(example_of(), regions=(region,)), BUNDLED["biomedparse_demo"])
    assert mapped.regions[0].label == "left_lung" and not unmapped
    tumor = make_region("tumor", BOX, "abdomen")
    mapped, _, _ = apply(dataclasses.replace(example_of(), regions=(tumor,)), BUNDLED["biomedparse_demo"])
    assert mapped.regions[0].label == "kidney_tumor"


def test_region_without_a_source_label_goes_by_its_label(mapping):
    region = Region(BOX, "x", "Spot")
    mapped, _, _ = apply(dataclasses.replace(example_of(), regions=(region,)), mapping)
    assert mapped.regions[0].label == "lung_nodule"


def test_dropped_regions_are_counted_and_unknown_ones_kept_and_counted(mapping):
    example = example_of("Rim", "unicorn", "Unlabelled", "Rim", "unicorn", "liver")
    mapped, left_out, unmapped = apply(example, mapping)
    assert [region.label for region in mapped.regions] == ["unicorn", "unicorn", "liver"]
    assert mapped.regions[0] is example.regions[1]
    assert left_out == {"the rim of the picture": 2, "not annotated": 1}
    assert unmapped == {"unicorn": 2}


def test_name_of_no_structure_is_left_to_the_rules_of_conflicts(mapping):
    example = example_of("void", "No_Finding", "unicorn", absent=("Background",))
    mapped, left_out, unmapped = apply(example, mapping)
    assert mapped == example and not left_out and unmapped == {"unicorn": 1}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["Rim", "liver", "unicorn"]), max_size=6),
    st.lists(st.sets(st.integers(0, 5), max_size=3), max_size=4),
)
def test_expressions_ground_to_the_same_regions_or_go(names, groups):
    mapping = LabelMapping("m", {"rim": Dropped("rim")})
    example = example_of(*names)
    boxes = [np.asarray([place, 0, place + 1, 1], np.float32) for place in range(len(names))]
    regions = tuple(dataclasses.replace(region, box=box) for region, box in zip(example.regions, boxes, strict=True))
    texts = [tuple(sorted(place for place in group if place < len(names))) for group in groups]
    expressions = tuple(Expression(f"sentence {k}", group) for k, group in enumerate(texts))
    mapped, left_out, _ = apply(dataclasses.replace(example, regions=regions, expressions=expressions), mapping)
    whole = [k for k, group in enumerate(texts) if all(names[place] != "Rim" for place in group)]
    assert [expression.text for expression in mapped.expressions] == [f"sentence {k}" for k in whole]
    for expression, k in zip(mapped.expressions, whole, strict=True):
        assert [int(mapped.regions[place].box[0]) for place in expression.regions] == list(texts[k])
    assert left_out["expression of a region left out"] == len(groups) - len(whole)


def test_absent_labels_are_mapped_and_one_that_is_shown_is_not_absent(mapping):
    example = example_of("Spot", absent=("Odd_thing", "lung_mass", "lung_nodule", "lung", "nodule", "Rim", "unicorn"))
    mapped, left_out, unmapped = apply(example, mapping)
    assert mapped.absent == ("lung_mass", "unicorn")
    assert left_out == {"absent: shown in the image": 3, "absent: the rim of the picture": 1}
    assert unmapped == {"unicorn": 1}


def test_classes_that_are_always_marked_are_absent_without_a_region():
    mapping = BUNDLED["vindr_cxr"]
    example, _, _ = apply(example_of("Consolidation", modality="xray"), mapping)
    absent = add_absent(example, mapping).absent
    assert {"pneumothorax", "lung_nodule_or_mass"} <= set(absent)
    assert not {"consolidation", "lung_opacity", "pneumonia", "tuberculosis"} & set(
        absent
    )  # shown, true, without boxes
    assert "pneumothorax" not in add_absent(dataclasses.replace(example, modality="fundus"), mapping).absent
    assert add_absent(example, BUNDLED["amos"]) is example


def test_mapping_of_a_name_is_found_once_and_memory_stays_small(monkeypatch):
    monkeypatch.setattr("data_pipelines.taxonomy.mapping._REMEMBERED", 3)
    mapping = LabelMapping("m")
    assert [mapping.resolve(f"name {k}") for k in range(9)] == [None] * 9
    assert mapping.resolve("liver") is LABELS["liver"] and len(mapping._resolved) <= 3


def test_error_of_unknown_classes_names_them_with_counts_candidates_and_what_to_write(mapping):
    text = describe_unmapped({"pneumothoraxx": 3, "qqqq": 12}, "chests", mapping)
    assert text.index("'qqqq' (12): nearest labels: none") < text.index(
        "'pneumothoraxx' (3): nearest labels: pneumothor"
    )
    for part in ("data set 'chests' has 2 classes", "'mine'", "labels: {'qqqq': ID}", "drop: {'qqqq': REASON}"):
        assert part in text
    assert "no mapping was given" in describe_unmapped({"x": 1}, "d", load_mapping(""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labels: {Spot: lung_nodul}", r"labels: 'Spot' has the unknown label 'lung_nodul'; nearest: lung_nodule"),
        ("colour: red", "unknown field 'colour'; known: source, classes,"),
        ("labels: [a]", r"labels: expected dict, found \['a'\]"),
        ("exhaustive: maybe", "exhaustive: expected true, false or a list, found 'maybe'"),
        ("drop: {Spot: ''}", "drop holds '', expected texts"),
        ("normal: [no]", "normal holds False, expected texts; YAML needs quotes"),
        ("labels: {Spot: liver}\ndrop: {spot: x}", "the class 'spot' has two meanings"),
        ("labels: {Spot: liver, Spot: liver}", "'Spot' occurs twice, first in line 1"),
        ("exhaustive: [liver]", "exhaustive names 'liver', which is none of the classes"),
        ("classes: [livver]", r"'livver' \(1\): nearest labels: liver"),
        ("[a]", "a label mapping is a mapping of names to their entries, not list"),
        ("a: [", "a label mapping must be valid YAML"),
    ],
)
def test_mistake_in_a_mapping_is_an_error_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SourceError, match=f"{re.escape(str(path))}: (.|\n)*({message})"):
        load_mapping(path)


def test_unknown_mapping_is_an_error_that_names_the_known_ones(tmp_path):
    with pytest.raises(SourceError, match=r"no label mapping 'vindr': give the path of a \.yaml file, or one of amos,"):
        load_mapping("vindr")
    with pytest.raises(SourceError, match=r"gone\.yaml: the label mapping cannot be read"):
        load_mapping(tmp_path / "gone.yaml")


def test_names_in_real_pictures_all_map(shared_dir):
    folder = shared_dir / "data" / "biomedparse_demo" / "masks"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    for path in folder.glob("*.png"):
        _, _, site, phrase = path.stem.split("_")
        region = make_region(phrase.replace("+", " "), BOX, site)
        found = BUNDLED["biomedparse_demo"].resolve_region(region)
        assert isinstance(found, Label) and found.id not in ("tumor", "nodule", "edema"), path.name
