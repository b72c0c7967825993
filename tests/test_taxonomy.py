import collections
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.schema import GRANULARITIES, MODALITIES
from data_pipelines.taxonomy import SIDES, Label, Taxonomy, load_classes, load_taxonomy, normalize_name, parse_taxonomy
from data_pipelines.text import swap_sides
from data_pipelines.vocabulary import find_broader

TAXONOMY = load_taxonomy()
LABELS = TAXONOMY.labels
SIDED = [label for label in LABELS.values() if label.side != "none"]
# The left lung has no middle lobe, and appendages of the right atrium have no data set; mirrored images show them.
ONE_SIDED = {"right_middle_lobe", "left_atrial_appendage"}
LESION_KINDS = ("tumor", "cyst", "nodule", "hemorrhage", "edema", "effusion", "fracture")


def _certain(label: Label) -> set[str]:
    """Returns what parents and kinds say is true with a label."""
    above = {up for up in (label.parent, *label.kind_of) if up}
    return above.union(*(_certain(LABELS[up]) for up in above))


CERTAIN = {label.id: _certain(label) for label in LABELS.values()}


def test_ids_are_the_keys_and_fields_are_from_their_lists():
    assert len(LABELS) >= 198
    for id_, label in LABELS.items():
        assert label.id == id_
        assert label.granularity in GRANULARITIES and label.side in SIDES
        assert label.modalities and set(label.modalities) <= set(MODALITIES) - {"unknown"}
        assert len(set(label.modalities)) == len(label.modalities)


def test_labels_are_in_38_classes_and_6_body_regions():
    classes = load_classes()
    assert len(classes) == 38 and len(set(classes.values())) == 6
    assert {label.label_class for label in LABELS.values()} == classes.keys()
    for label in LABELS.values():
        assert label.body_region == classes[label.label_class]


def test_no_name_is_of_two_labels():
    owners = collections.defaultdict(set)
    for label in LABELS.values():
        for name in (label.id, *label.names):
            owners[normalize_name(name)].add(label.id)
    assert [name for name, ids in owners.items() if len(ids) > 1] == []


def test_names_are_phrases_as_prompts_take_them():
    for label in LABELS.values():
        spelled = re.sub(r"\b[CTLS]\d+\b|Barrett", lambda found: found.group().lower(), label.name)
        assert spelled == spelled.lower()
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


def test_what_hangs_below_a_lesion_or_a_cell_is_a_part_of_it():
    below = {
        label.id: label.parent
        for label in LABELS.values()
        if label.parent and LABELS[label.parent].granularity == label.granularity in ("lesion", "cell")
    }
    parts = {"tumor_core": "brain_tumor", "peritumoral_edema": "brain_tumor", "nucleus": "cell"}
    parts |= dict.fromkeys(("enhancing_tumor", "non_enhancing_tumor", "necrotic_tumor_core"), "tumor_core")
    assert below == parts


@pytest.mark.parametrize(
    ("label", "kind", "holder"),
    [
        ("neoplastic_polyp", "polyp", "colon"),
        ("melanoma", "skin_lesion", "skin"),
        ("seborrheic_keratosis", "skin_lesion", "skin"),
        ("neutrophil", "white_blood_cell", ""),
        ("left_rib_4", "rib", "chest"),
        ("third_ventricle", "cerebral_ventricle", "brain"),
        ("right_hippocampus", "hippocampus", "right_temporal_lobe"),
        ("left_common_carotid_artery", "carotid_artery", ""),
        ("nasopharyngeal_tumor", "head_and_neck_tumor", "pharynx"),
        ("microaneurysm", "lesion", "retina"),
        ("splenic_vein", "blood_vessel", "portal_vein_and_splenic_vein"),
    ],
)
def test_label_is_a_kind_of_what_it_is_one_of_and_below_what_holds_it(label, kind, holder):
    assert kind in find_broader(label) and kind not in TAXONOMY.parents(label)
    assert LABELS[label].parent == holder


def test_numbered_bone_is_a_kind_of_its_bone():
    numbered = [label for label in LABELS if re.search(r"(rib_|vertebra_[ctls])\d+$", label)]
    assert len(numbered) == 24 + 25
    assert all({"rib", "vertebra"} & {*find_broader(label)} for label in numbered)


def test_lesion_is_a_kind_of_lesions_and_not_of_the_organ_that_it_is_a_finding_of():
    of_others = {
        (label.id, kind)
        for label in LABELS.values()
        for kind in label.kind_of
        if label.granularity == "lesion" and LABELS[kind].granularity != "lesion"
    }
    assert of_others == {("neck_lymph_node", "lymph_node")}
    assert [LABELS[name].parent for name in ("cardiomegaly", "aortic_enlargement")] == ["heart", "aorta"]


def test_what_is_seen_under_a_dermatoscope_only_is_no_mass():
    flat = [label for label in LABELS.values() if label.modalities == ("dermoscopy",)]
    assert flat and not any("mass" in find_broader(label.id) for label in flat)
    assert "tumor" in TAXONOMY.ancestors("melanoma")  # so that it is no negative


def test_spinal_cord_runs_through_the_spine_and_no_single_vertebra():
    assert TAXONOMY.parents("spinal_cord") == ("spinal_canal", "spine")


@pytest.mark.parametrize(
    ("label", "true", "not_said"),
    [
        ("liver_tumor", {"liver", "abdomen", "tumor", "mass", "lesion"}, {"cyst", "kidney_tumor"}),
        ("left_upper_lobe", {"left_lung", "lung", "chest"}, {"right_lung", "left_lower_lobe"}),
        ("left_kidney_cyst", {"kidney_cyst", "cyst", "left_kidney", "kidney"}, {"right_kidney_cyst", "tumor"}),
        ("lung_nodule", {"nodule", "lung_opacity", "lung"}, {"lung_mass", "thyroid_nodule"}),
        ("vertebra_l1", {"lumbar_vertebra", "vertebra", "spine"}, {"vertebra_l2", "thoracic_vertebra"}),
        ("enhancing_tumor", {"tumor_core", "brain_tumor", "tumor", "brain"}, {"peritumoral_edema"}),
        ("red_blood_cell", {"cell"}, {"white_blood_cell"}),
        ("covid_19_infection", {"pneumonia", "lung_opacity", "consolidation"}, {"atelectasis"}),
        ("lung_tumor", {"lung_nodule", "lung_mass", "nodule", "tumor", "lung"}, {"lung_cyst"}),
        ("portal_vein_and_splenic_vein", {"portal_vein", "splenic_vein", "blood_vessel"}, {"aorta"}),
    ],
)
def test_ancestors_are_all_that_is_true_of_an_image(label, true, not_said):
    found = set(TAXONOMY.ancestors(label))
    assert true <= found and not (not_said | {label}) & found


def test_ancestors_are_those_of_parents_and_kinds_then_what_may_be_true():
    for label in LABELS.values():
        found = TAXONOMY.ancestors(label.id)
        certain = CERTAIN[label.id]
        possible = set(label.may_be).union(*(CERTAIN[up] for up in label.may_be))
        assert set(found[: len(certain)]) == certain
        assert set(found) == (certain | possible) - {label.id} and len(set(found)) == len(found)


def test_label_may_be_another_that_it_is_a_part_or_kind_of():
    taxonomy = parse_taxonomy("a: {granularity: organ, may_be: [b]}\nb: {granularity: organ, parent: a, kind_of: [a]}")
    assert (taxonomy.ancestors("a"), taxonomy.ancestors("b")) == (("b",), ("a",))


def test_image_of_a_box_of_a_kind_has_the_modality_of_the_more_general_label():
    for label in LABELS.values():
        for kind in label.kind_of:
            assert set(label.modalities) & set(LABELS[kind].modalities), (label.id, kind)


def test_lesion_with_a_general_name_in_its_own_is_of_that_kind():
    for label in LABELS.values():
        for kind in LESION_KINDS:
            if label.granularity == "lesion" and label.name.split()[-1] == kind:
                assert kind in (label.id, *TAXONOMY.ancestors(label.id)), label.id


@pytest.mark.parametrize(
    ("name", "nearest"), [("pneumothoraxx", "pneumothorax"), ("Kidney_lft", "left_kidney"), ("livr", "liver")]
)
def test_nearest_labels_of_a_misspelled_name(name, nearest):
    assert TAXONOMY.nearest(name)[0] == nearest
    assert len(TAXONOMY.nearest(name, 2)) <= 2 and len(set(TAXONOMY.nearest(name, 9))) == len(TAXONOMY.nearest(name, 9))


def test_nothing_is_near_nonsense():
    assert TAXONOMY.nearest("qqqqqq") == []


@pytest.mark.parametrize(
    ("label", "phrases"),
    [
        ("left_upper_lobe", {"left upper lobe", "left upper lung lobe", "left upper lobe of the lung"}),
        ("left_kidney", {"left kidney", "kidney on the left"}),
        ("liver_tumor", {"liver tumor", "hepatic tumor", "tumor in the liver"}),
        ("left_rib_4", {"left rib 4", "fourth left rib", "rib 4 on the left"}),
        ("vertebra_l1", {"vertebra L1", "L1 vertebra"}),
        ("left_eye", {"left eye"}),
        ("left_thalamus", {"left thalamus"}),
        ("rib_fracture", {"rib fracture", "fractured rib", "fracture of the rib"}),
    ],
)
def test_variants_say_what_the_name_says(label, phrases):
    assert set(TAXONOMY.variants(label)) == phrases


def test_variants_lead_back_to_their_label_and_class_names_are_none():
    for id_, label in LABELS.items():
        variants = TAXONOMY.variants(id_)
        assert variants[0] == label.name and len(set(variants)) == len(variants)
        assert all(TAXONOMY.find(variant) is label for variant in variants)
        assert not set(variants) & set(label.class_names)


def test_mirrored_variants_are_those_of_the_mirror_image():
    for label in SIDED:
        if label.id not in ONE_SIDED:
            mirrored = tuple(swap_sides(variant) for variant in TAXONOMY.variants(label.id))
            assert mirrored == TAXONOMY.variants(swap_sides(label.id))


@given(st.sampled_from(sorted(LABELS)), st.integers(0, 2**32))
def test_sampled_variant_depends_on_the_seed_only(label, seed):
    first, second = (TAXONOMY.sample_variant(label, np.random.default_rng(seed)) for _ in range(2))
    assert first == second and first in TAXONOMY.variants(label)


def test_every_variant_is_drawn():
    rng = np.random.default_rng(0)
    drawn = {TAXONOMY.sample_variant("liver_tumor", rng) for _ in range(60)}
    assert drawn == set(TAXONOMY.variants("liver_tumor"))


def test_generated_phrase_that_is_the_name_of_another_label_is_left_out():
    text = """
lung: {granularity: organ}
tumor: {granularity: lesion}
lung_tumor: {granularity: lesion, parent: lung, kind_of: [tumor]}
spot: {granularity: lesion, synonyms: [tumor in the lung]}
"""
    taxonomy = parse_taxonomy(text)
    assert taxonomy.variants("lung_tumor") == ("lung tumor",)
    assert taxonomy.find("tumor in the lung") is taxonomy.labels["spot"]


def test_side_in_an_entry_stands_for_both_sides():
    labels = parse_taxonomy("SIDE_eye: {granularity: organ, name: SIDE eyeball, class_names: [eye SIDE]}").labels
    assert labels == {
        f"{side}_eye": Label(f"{side}_eye", f"{side} eyeball", "organ", side=side, class_names=(f"eye {side}",))
        for side in ("left", "right")
    }


def test_parent_of_a_sided_label_is_of_the_same_side_or_of_none():
    for label in SIDED:
        assert all(LABELS[parent].side in (label.side, "none") for parent in TAXONOMY.parents(label.id))


def test_modalities_cover_all_that_images_can_have():
    assert {modality for label in LABELS.values() for modality in label.modalities} == set(MODALITIES[1:])


def test_side_is_what_the_name_says():
    for label in LABELS.values():
        sides = {word for name in (label.id, *label.names) for word in normalize_name(name).split()}
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
    assert mirrored.class_names == tuple(swap_sides(name) for name in label.class_names)
    for field in ("kind_of", "may_be"):
        assert getattr(mirrored, field) == tuple(swap_sides(other) for other in getattr(label, field))
    for field in ("granularity", "modalities", "label_class"):
        assert getattr(mirrored, field) == getattr(label, field)


def test_label_without_a_side_is_its_own_mirror_image():
    for label in LABELS.values():
        if label.side == "none":
            assert swap_sides(label.id) == label.id and swap_sides(label.name) == label.name


@pytest.mark.parametrize("name", ["left_lung", "Left Lung", "LEFT-LUNG", " left  lung\n", "lung_left", "Lung Left"])
def test_label_is_found_by_any_of_its_names_however_they_are_joined(name):
    assert TAXONOMY.find(name) is LABELS["left_lung"]


def test_every_label_is_found_by_every_name():
    for label in LABELS.values():
        for name in (label.id, *label.names):
            assert TAXONOMY.find(name) is TAXONOMY.find(name.upper().replace(" ", "_")) is label


@pytest.mark.parametrize("name", ["", "leftlung", "left", "unicorn"])
def test_unknown_name_is_found_nowhere(name):
    assert TAXONOMY.find(name) is None


def test_phrases_are_all_names_and_synonyms_once_but_no_class_names():
    text = "b: {granularity: organ, synonyms: [B two, b], class_names: [bb]}\na: {granularity: cell, name: an a}"
    taxonomy = parse_taxonomy(text)
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
        ("", "a taxonomy is a mapping of names to their entries, not NoneType"),
        ("[lung]", "a taxonomy is a mapping of names to their entries, not list"),
        ("lung: {granularity: organ", "must be valid YAML"),
        ("lung: organ", "label 'lung': expected fields .*, found 'organ'"),
        ("lung: {}", "label 'lung': has no granularity"),
        ("lung: {granularity: organ}\nlung: {granularity: organ}", "'lung' occurs twice, first in line 1"),
        ("a: {granularity: organ}\nlung: {name: x, granularity: organ, name: y}", "'name' occurs twice, .* line 2"),
        ("lung: {granularity: organ, colour: red, 1: 2}", "label 'lung': unknown field 'colour'; known: body_region,"),
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
        ("lung: {granularity: organ, kind_of: [thing]}", "label 'lung': kind_of names the unknown label 'thing'"),
        ("lung: {granularity: organ, may_be: [thing]}", "label 'lung': may_be names the unknown label 'thing'"),
        (
            "a: {granularity: organ, kind_of: [b]}\nb: {granularity: organ, parent: a}",
            "label 'a': its parents and kinds form a circle",
        ),
        ("SIDE_lung: {granularity: organ}\nleft_lung: {granularity: organ}", "label 'left_lung' occurs twice"),
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
