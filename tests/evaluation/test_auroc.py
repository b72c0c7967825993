"""Areas under ROC curves against counting pairs, and what counts as shown and as not shown."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.schema import GroundingExample, Region
from data_pipelines.text import Vocabulary
from medglip_jax.evaluation.auroc import NOT_SHOWN, SHOWN, UNKNOWN, auroc, image_truth, summarize

PHRASES = {"left lung": "left_lung", "lung": "lung", "right lung": "right_lung", "nodule": "nodule", "heart": "heart"}


@given(st.lists(st.tuples(st.integers(-2, 2), st.sampled_from([SHOWN, NOT_SHOWN, UNKNOWN])), max_size=12))
def test_area_is_the_share_of_pairs_in_the_right_order(images):
    scores = np.asarray([score for score, _ in images], float)
    truth = np.asarray([known for _, known in images], int)
    pairs = [(p, n) for p in scores[truth == SHOWN] for n in scores[truth == NOT_SHOWN]]
    found = auroc(scores, truth)
    if not pairs:
        assert found is None
    else:
        assert found == pytest.approx(np.mean([(p > n) + (p == n) / 2 for p, n in pairs]))


def example(*labels, absent=(), caption=""):
    box = np.float32([0, 0, 4, 4])
    regions = tuple(Region(box, label.replace("_", " "), label) for label in labels)
    return GroundingExample(b"", "a", "set", 8, 8, regions=regions, absent=absent, caption=caption)


def truth_of(image, exhaustive=True):
    found = image_truth(image, PHRASES, Vocabulary(PHRASES, exhaustive=exhaustive))
    return dict(zip(PHRASES, found.tolist(), strict=True))


def test_a_kind_of_a_label_shows_it_and_an_exhaustive_set_denies_the_rest():
    assert truth_of(example("left_lung")) == {
        "left lung": SHOWN,
        "lung": SHOWN,
        "right lung": NOT_SHOWN,
        "nodule": NOT_SHOWN,
        "heart": NOT_SHOWN,
    }


def test_what_is_more_special_than_the_shown_is_unknown():
    truth = truth_of(example("lung"))
    assert truth["lung"] == SHOWN and truth["left lung"] == truth["right lung"] == UNKNOWN


def test_where_not_everything_is_marked_only_an_expert_denies():
    truth = truth_of(example("heart", absent=("nodule",)), exhaustive=False)
    assert truth == {**dict.fromkeys(PHRASES, UNKNOWN), "heart": SHOWN, "nodule": NOT_SHOWN}


def test_what_the_caption_mentions_is_not_denied():
    assert truth_of(example("heart", caption="A small nodule."))["nodule"] == UNKNOWN


def test_summary_keeps_modalities_apart_and_counts_what_has_no_area():
    scores = np.array([[3.0, 0], [2, 0], [1, 0], [0, 0]])
    truth = np.array([[1, 1], [1, 1], [0, 1], [1, -1]], np.int8)
    found = summarize(scores, truth, ["a", "b"], ["ct", "xray", "ct", "xray"])
    assert found["AUROC"] == pytest.approx(2 / 3) and found["left_out"] == 1 and found["images"] == 4
    assert found["per_class"]["b"] == {"AUROC": None, "positives": 3, "negatives": 0}
    assert found["AUROC_within"] == found["per_modality"]["ct"]["AUROC"] == 1.0
    assert found["per_modality"]["xray"] == {"AUROC": None, "classes": 0, "images": 2}
