"""The logistic regression of a linear probe, and recall of retrieval: against what can be counted by hand."""

import numpy as np
import pytest

from medglip_jax.evaluation.auroc import UNKNOWN, auroc
from medglip_jax.evaluation.probe import fit_probe
from medglip_jax.evaluation.retrieval import recall_at


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(200, 6)) * [1, 10, 0.1, 1, 1, 0] + 5).astype(np.float32)
    truth = (features @ rng.normal(size=(6, 3)) / 3 + rng.normal(size=(200, 3)) * 0.3 > 0).astype(np.int8)
    truth[:, 0] = features[:, 2] > 5  # a small feature decides
    return features, truth


def test_probe_finds_the_optimum_of_its_objective(labelled):
    features, truth = labelled
    seen = truth.copy()
    seen[150:] = UNKNOWN
    predict, slope = fit_probe(features, seen, decay=1e-3, steps=100)
    assert slope < 1e-4
    logits = predict(features)
    assert auroc(logits[150:, 0], truth[150:, 0]) > 0.95
    shares = 1 / (1 + np.exp(-logits[:150]))
    np.testing.assert_allclose(shares.mean(axis=0), truth[:150].mean(axis=0), atol=1e-3)  # the bias is free
    seen[150:] = 1 - truth[150:]  # images that are known count
    assert np.abs(fit_probe(features, seen, decay=1e-3, steps=100)[0](features) - logits).max() > 0.1


def test_recall_counts_ties_against_the_region():
    scores = np.array([[0.9, 0.1, 0.0], [0.1, 0.5, 0.5], [0.0, 0.0, 0.0]])
    found = recall_at(scores, np.array([0, 1, 2]))
    assert found == {"recall@1": pytest.approx(1 / 3), "recall@5": 1.0, "chance@1": pytest.approx(1 / 3), "chance@5": 1}
    assert recall_at(np.zeros((0, 3)), np.array([], int))["recall@1"] is None
