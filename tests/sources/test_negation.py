import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sources.negation import combine, find_labels, read_sentence
from data_pipelines.taxonomy import load_taxonomy


def absent(sentence, modality="xray"):
    return set(read_sentence(sentence, modality).absent)


@pytest.mark.parametrize(
    ("sentence", "labels"),
    [
        ("No pleural effusion.", {"pleural_effusion"}),
        ("There is no evidence of pneumothorax.", {"pneumothorax"}),
        ("No focal consolidation, pleural effusion, or pneumothorax is seen.", None),
        ("No pneumothorax, no pleural effusion, no consolidation.", None),
        ("Lungs are clear without consolidation, pleural effusions or pneumothoraces.", None),
        ("The lungs are free of consolidation.", {"consolidation"}),
        ("Absence of pneumothorax", {"pneumothorax"}),
        ("No pneumothorax, but small pleural effusion.", {"pneumothorax"}),
        ("No pneumothorax and small pleural effusion", {"pneumothorax"}),
        ("No widget, pneumothorax", {"pneumothorax"}),
    ],
)
def test_denied_findings_are_absent(sentence, labels):
    three = {"consolidation", "pleural_effusion", "pneumothorax"}
    assert absent(sentence) == (three if labels is None else labels)


@pytest.mark.parametrize(
    "sentence",
    [
        "Pneumothorax.",
        "No change in the pneumothorax",
        "No interval change in pneumothorax or pleural effusion",
        "Cannot exclude pneumothorax",
        "No pneumothorax can be excluded",
        "No large pneumothorax or pleural effusion",
        "No new or enlarging pneumothorax",
        "No acute process, pneumothorax",
        "No pneumothorax on the left",
        "No consolidation or pneumothorax in the lower lobe",
        "No pneumothorax or opacities in the right lung",
        "On the left no pneumothorax",
        "No pneumothorax except a trace",
        "No prior pneumothorax",
        "Is there no pneumothorax?",
        "Not without pneumothorax",
        "In the absence of pneumothorax the tube may be pulled",
        "No longer pneumothorax",
        "No pneumothorax persisting",
        "No pneumothorax or widgets at a widget",
        "No pneumothorax with pleural effusion",
        "No heart",
    ],
)
def test_what_is_not_surely_denied_of_the_whole_image_is_not_absent(sentence):
    assert absent(sentence) == set()


def test_only_findings_of_the_modality_are_absent():
    assert absent("No pneumothorax", "fundus") == set()
    assert absent("No pneumothorax", "unknown") == {"pneumothorax"}


def test_class_name_that_says_less_or_more_than_its_label_is_mentioned_and_not_absent():
    reading = read_sentence("No hematoma", "ct")
    assert (reading.absent, reading.mentioned, reading.kind) == ((), ("brain_hemorrhage",), "")


@settings(max_examples=40)
@given(st.sampled_from(["xray", "ct", "fundus"]), st.data())
def test_label_named_without_a_cue_is_mentioned_and_never_absent(modality, data):
    labels = [label for label in load_taxonomy().labels.values() if modality in label.modalities]
    label = data.draw(st.sampled_from(labels))
    reading = read_sentence(f"There is {label.name}.", modality)
    assert reading.absent == () and label.id in reading.mentioned


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("No pneumothorax or pleural effusion.", "negation"),
        ("There is no pneumothorax. No pleural effusion.", "negation"),
        ("Without pneumothorax", "negation"),
        ("The lungs are clear.", "normal"),
        ("Normal heart size", "normal"),
        ("The pneumothorax is unremarkable", ""),
        ("Normal heart size with tortuous aorta", ""),
        ("A tube is in place and the heart is normal", ""),
        ("Small heart without pneumothorax", ""),
        ("No pneumothorax, the ribs are broken", ""),
        ("No pneumothorax, but small pleural effusion", ""),
        ("No change", ""),
        ("Small pleural effusion", ""),
    ],
)
def test_kind_says_that_a_sentence_denies_or_calls_normal_and_nothing_else(sentence, kind):
    assert read_sentence(sentence, "xray").kind == kind


@pytest.mark.parametrize(
    ("sentences", "labels"),
    [
        (["No pneumothorax.", "No pleural effusion."], ("pneumothorax", "pleural_effusion")),
        (["No pneumothorax.", "Small pneumothorax."], ()),
        (["No pneumothorax, small pneumothorax"], ()),
        (["No polyp.", "A hyperplastic polyp is seen."], ()),
        (["No effusion.", "Small pleural effusion."], ()),
        (["No pleural effusion.", "A small effusion."], ()),
        (["No lung nodule.", "The lungs are clear."], ("lung_nodule",)),
    ],
)
def test_label_that_a_sentence_denies_and_another_names_is_not_absent(sentences, labels):
    assert combine([read_sentence(sentence) for sentence in sentences]) == labels


def test_longest_name_of_a_label_is_found_once():
    text = "Left lung: pleural effusions, (small) left-sided lung_nodule"
    found = find_labels(text)
    assert [mention.label.id for mention in found] == ["left_lung", "pleural_effusion", "lung_nodule"]
