"""Areas under ROC curves of image-level labels, where some of the truth may be unknown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.schema import GroundingExample
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.vocabulary import Vocabulary, find_broader

SHOWN, NOT_SHOWN, UNKNOWN = 1, 0, -1


def auroc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Returns the share of pairs of a positive and a negative in which the positive scores higher; ties are half.

    Args:
        scores: float[n].
        truth: int[n]: `SHOWN`, `NOT_SHOWN`, or `UNKNOWN`, which is in no pair.

    Returns:
        0 to 1, or None where there are no positives or no negatives.
    """
    known = truth != UNKNOWN
    positive = truth[known] == SHOWN
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return None
    _, places, counts = np.unique(scores[known], return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of equal scores, their mean
    above = ranks[places[positive]].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def image_truth(example: GroundingExample, phrases: Mapping[str, str], vocabulary: Vocabulary) -> np.ndarray:
    """Returns what is known of an image and each phrase.

    Args:
        example: the image.
        phrases: K phrases, each with its label.
        vocabulary: of the image's data set.

    Returns:
        int8[K]: `SHOWN` where a region is of the label or of a kind of it; `NOT_SHOWN` where the image surely does not
        show it (see `Vocabulary.find_absent`); `UNKNOWN` elsewhere.
    """
    taxonomy = load_taxonomy()
    labels, names = set(), set()
    for region in example.regions:
        known = taxonomy.find(region.label)
        labels.update((region.label, *((known.id, *find_broader(known.id)) if known else ())))
        names.add(normalize_name(region.phrase))
    absent = {normalize_name(phrase) for phrase in vocabulary.find_absent(example)}
    truth = np.full(len(phrases), UNKNOWN, np.int8)
    for place, (phrase, label) in enumerate(phrases.items()):
        name = normalize_name(phrase)
        if label in labels or name in names:
            truth[place] = SHOWN
        elif name in absent:
            truth[place] = NOT_SHOWN
    return truth


def summarize(
    scores: np.ndarray, truth: np.ndarray, phrases: Sequence[str], modalities: Sequence[str]
) -> dict[str, Any]:
    """Returns the areas of all phrases over all images, and inside each modality.

    What tells a fundus photograph from a CT raises the first; the second is about what modality alone does not tell.

    Args:
        scores: float[N, K], of N images and K phrases.
        truth: int8[N, K], from `image_truth`.
        phrases: K names.
        modalities: of each image.

    Returns:
        {"AUROC": mean over phrases, "AUROC_within": mean over pairs of a modality and a phrase, inside the modality,
        "per_class": {phrase: {"AUROC", "positives", "negatives"}},
        "per_modality": {modality: {"AUROC": mean over phrases inside it, "classes": how many these are, "images"}},
        "left_out": phrases without a positive or without a negative, which have no area and count in no mean,
        "images"}. Numbers are in 0 to 1, or None where undefined.
    """
    per_class: dict[str, Any] = {}
    for place, phrase in enumerate(phrases):
        counts = {name: int((truth[:, place] == x).sum()) for name, x in (("positives", 1), ("negatives", 0))}
        per_class[phrase] = {"AUROC": auroc(scores[:, place], truth[:, place]), **counts}
    per_modality: dict[str, Any] = {}
    within: list[float] = []
    names = np.asarray(modalities, str)
    for modality in sorted({*modalities}):
        rows = names == modality
        areas = [auroc(scores[rows, place], truth[rows, place]) for place in range(len(phrases))]
        defined = [area for area in areas if area is not None]
        within += defined
        per_modality[modality] = {"AUROC": _mean(defined), "classes": len(defined), "images": int(rows.sum())}
    areas = [entry["AUROC"] for entry in per_class.values() if entry["AUROC"] is not None]
    return {
        "AUROC": _mean(areas),
        "AUROC_within": _mean(within),
        "per_class": per_class,
        "per_modality": per_modality,
        "left_out": len(phrases) - len(areas),
        "images": len(scores),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
