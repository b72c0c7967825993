import collections

import pytest

from data_pipelines.schema import GRANULARITIES, MODALITIES
from data_pipelines.taxonomy import SIDES, Label, Taxonomy, load_taxonomy, normalize_name, parse_taxonomy
from data_pipelines.text import swap_sides

TAXONOMY = load_taxonomy()
LABELS = TAXONOMY.labels
SIDED = [label for label in LABELS.values() if label.side != "none"]
ONE_SIDED = {"right_middle_lobe"}  # the left lung has none; a mirrored image shows one all the same


def test_ids_are_the_keys_and_fields_are_from_their_lists():
    assert len(LABELS) > 150
    for id_, label in LABELS.items():
        assert label.id == id_
        assert label.granularity in GRANULARITIES and label.side in SIDES
        assert label.region
        assert label.modalities and set(label.modalities) <= set(MODALITIES) - {"unknown"}
        assert len(set(label.modalities)) == len(label.modalities)


def test_no_name_is_of_two_labels():
    owners = collections.defaultdict(set)
    for label in LABELS.values():
        for name in (label.id, label.name, *label.synonyms):
            owners[normalize_name(name)].add(label.id)
    assert [name for name, ids in owners.items() if len(ids) > 1] == []


def test_names_are_phrases_as_prompts_take_them():
    for label in LABELS.values():
        assert label.name == label.name.lower()
        for name in (label.name, *label.synonyms):
            assert name == " ".join(name.split()) and "_" not in name and ". " not in name and not name.endswith(".")


def test_parents_exist_and_end_at_a_label_without_one():
    assert TAXONOMY.parents("left_upper_lobe") == ("left_lung", "lung", "chest")
    for label in LABELS.values():
        assert not label.parent or label.parent in LABELS
        assert TAXONOMY.parents(label.id) == ((label.parent, *TAXONOMY.parents(label.parent)) if label.parent else ())


def test_nothing_larger_hangs_below_a_lesion_or_a_cell():
    for label in LABELS.values():
        if label.granularity in ("region", "organ"):
            assert {LABELS[parent].granularity for parent in TAXONOMY.parents(label.id)}.isdisjoint({"lesion", "cell"})


def test_parent_of_a_sided_label_is_of_the_same_side_or_of_none():
    for label in SIDED:
        assert all(LABELS[parent].side in (label.side, "none") for parent in TAXONOMY.parents(label.id))


def test_modalities_cover_all_that_images_can_have():
    assert {modality for label in LABELS.values() for modality in label.modalities} == set(MODALITIES[1:])


def test_side_is_what_the_name_says():
    for label in LABELS.values():
        sides = {word for name in (label.id, label.name, *label.synonyms) for word in normalize_name(name).split()}
        assert sides & {"left", "right"} == {label.side} - {"none"}


def test_what_exists_on_one_side_only_is_known():
    assert {label.id for label in SIDED if swap_sides(label.id) not in LABELS} == ONE_SIDED


@pytest.mark.parametrize("label", [label for label in SIDED if label.id not in ONE_SIDED], ids=lambda label: label.id)
def test_every_sided_label_has_its_mirror_image(label):
    mirrored = LABELS[swap_sides(label.id)]
    assert mirrored.id != label.id
    assert mirrored.name == swap_sides(label.name)
    assert mirrored.synonyms == tuple(swap_sides(name) for name in label.synonyms)
    assert mirrored.parent == swap_sides(label.parent)
    assert mirrored.side == swap_sides(label.side)
    assert (mirrored.granularity, mirrored.modalities, mirrored.region) == (
        label.granularity,
        label.modalities,
        label.region,
    )


def test_label_without_a_side_is_its_own_mirror_image():
    for label in LABELS.values():
        if label.side == "none":
            assert swap_sides(label.id) == label.id and swap_sides(label.name) == label.name


@pytest.mark.parametrize("name", ["left_lung", "Left Lung", "LEFT-LUNG", " left  lung\n", "lung_left", "Lung Left"])
def test_label_is_found_by_any_of_its_names_however_they_are_joined(name):
    assert TAXONOMY.find(name) is LABELS["left_lung"]


def test_every_label_is_found_by_every_name():
    for label in LABELS.values():
        for name in (label.id, label.name, *label.synonyms):
            assert TAXONOMY.find(name) is TAXONOMY.find(name.upper().replace(" ", "_")) is label


@pytest.mark.parametrize("name", ["", "leftlung", "left", "unicorn"])
def test_unknown_name_is_found_nowhere(name):
    assert TAXONOMY.find(name) is None


def test_phrases_are_all_names_and_synonyms_once():
    taxonomy = parse_taxonomy("b: {granularity: organ, synonyms: [B two, b]}\na: {granularity: cell, name: an a}")
    assert taxonomy.phrases() == ["b", "B two", "an a"]
    assert len(set(TAXONOMY.phrases())) == len(TAXONOMY.phrases())


def test_fields_that_are_left_out_have_their_defaults():
    taxonomy = parse_taxonomy("upper_lobe: {granularity: substructure}")
    assert taxonomy.labels == {"upper_lobe": Label("upper_lobe", "upper lobe", "substructure")}


def test_parents_of_an_unknown_label_are_an_error():
    with pytest.raises(KeyError, match="unicorn"):
        TAXONOMY.parents("unicorn")


def test_own_file_is_read_once():
    assert load_taxonomy() is TAXONOMY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a mapping of label ids to their fields, not NoneType"),
        ("[lung]", "a mapping of label ids to their fields, not list"),
        ("lung: {granularity: organ", "must be valid YAML"),
        ("lung: organ", "label 'lung': expected fields .*, found 'organ'"),
        ("lung: {}", "label 'lung': has no granularity"),
        ("lung: {granularity: organ}\nlung: {granularity: organ}", "'lung' occurs twice, first in line 1"),
        ("a: {granularity: organ}\nlung: {name: x, granularity: organ, name: y}", "'name' occurs twice, .* line 2"),
        ("lung: {granularity: organ, colour: red, 1: 2}", "label 'lung': unknown field 'colour'; known: granularity,"),
        ("lung: {granularity: organ, id: x}", "label 'lung': unknown field 'id'"),
        ("lung: {granularity: big}", "label 'lung': granularity 'big' is none of region, organ"),
        ("lung: {granularity: organ, side: up}", "label 'lung': side 'up' is none of left, right, none"),
        ("lung: {granularity: organ, side: no}", "label 'lung': side must be a text, found False"),
        ("lung: {granularity: organ, name: 5}", "label 'lung': name must be a text, found 5"),
        ("lung: {granularity: organ, parent: [chest]}", "label 'lung': parent must be a text, found \\['chest'\\]"),
        ("lung: {granularity: organ, parent: chest}", "label 'lung': unknown parent 'chest'"),
        (
            "lung: {granularity: organ, modalities: [xray, sonar]}",
            "label 'lung': unknown modality 'sonar'; known: x",
        ),
        ("lung: {granularity: organ, modalities: [unknown]}", "label 'lung': unknown modality 'unknown'"),
        ("lung: {granularity: organ, modalities: ct}", "label 'lung': modalities must be a list of texts, found 'ct'"),
        (
            "lung: {granularity: organ, synonyms: [no]}",
            "label 'lung': synonyms must be a list of texts, found",
        ),
        ("lung: {granularity: organ, synonyms: ['_']}", "label 'lung': a name or synonym is empty"),
        ("Left Lung: {granularity: organ}", "label 'Left Lung': an id is lower-case words joined by '_'"),
        ("lung: {granularity: organ, parent: lung}", "label 'lung': its parents form a circle: lung -> lung"),
        (
            "\n".join(f"{child}: {{granularity: organ, parent: {parent}}}" for child, parent in ("ab", "bc", "cb")),
            "label 'a': its parents form a circle: a -> b -> c -> b",
        ),
        (
            "lung: {granularity: organ}\npulmo: {granularity: organ, synonyms: [LUNG]}",
            "label 'pulmo': the name 'lung' already belongs to 'lung'",
        ),
    ],
)
def test_mistake_in_a_taxonomy_is_an_error_that_names_the_entry(text, message):
    with pytest.raises(ValueError, match=message):
        parse_taxonomy(text)


def test_labels_made_in_code_are_checked_too():
    with pytest.raises(ValueError, match="label 'lung': unknown parent 'chest'"):
        Taxonomy({"lung": Label("lung", "lung", "organ", parent="chest")})
