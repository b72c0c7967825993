"""What average precision does not tell: grounding by level and modality, boxes of what is absent, and the hierarchy.

Pure functions on what is known of images and what was found in them. An entry of a group that nothing belongs to is
None, as in `coco`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.hierarchy import IS_A, MAY_BE, PART_OF, known_label, relate, relate_in
from data_pipelines.schema import GRANULARITIES
from data_pipelines.taxonomy import load_taxonomy, normalize_name
from data_pipelines.vocabulary import find_broader
from medglip_jax.evaluation.coco import GroundTruth, average_precision
from medglip_jax.inference import Detections

_IOU = 0.5  # at which a box is found, as in Acc@0.5 and AP50
_INSIDE = 0.5  # least share of a box inside what holds it, as among the conflicts of annotations
_ROUNDING = 1e-6  # of scores that are equal


class Grounding(NamedTuple):
    """The best box of each phrase in each image that shows it.

    Attributes:
        image, phrase: int[n], places in the lists.
        iou: float[n], the largest with a true box of the phrase; 0 where nothing was found.
        pointed: bool[n], whether the centre of the best box is in a true one.
    """

    image: np.ndarray
    phrase: np.ndarray
    iou: np.ndarray
    pointed: np.ndarray


class AbsentScores(NamedTuple):
    """The best score of each phrase in each image that surely does not show it, 0 for none: int[n] twice, float[n]."""

    image: np.ndarray
    phrase: np.ndarray
    score: np.ndarray


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def _intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns float[n, m], the areas in which boxes [n, 4] and [m, 4] meet."""
    a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
    return _areas(np.concatenate([np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], axis=-1))


def _ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    meet = _intersections(a, b)
    union = _areas(np.asarray(a, np.float64))[:, None] + _areas(np.asarray(b, np.float64))[None] - meet
    return meet / np.maximum(union, np.finfo(float).tiny)


def ground(truth: Sequence[GroundTruth], detections: Sequence[Detections], phrases: Sequence[str]) -> Grounding:
    """Compares the best box of each phrase with the true ones, in every image that shows the phrase.

    A phrase of which the image has a crowd is left out there: nobody knows how many boxes it has.
    """
    places = {phrase: k for k, phrase in enumerate(phrases)}
    rows: list[tuple[int, int, float, bool]] = []
    for image, (known, found) in enumerate(zip(truth, detections, strict=True)):
        crowds = {phrase for phrase, crowd in zip(known.phrases, known.iscrowd, strict=True) if crowd}
        for phrase in dict.fromkeys(known.phrases):
            if phrase in crowds:
                continue
            of_phrase = np.flatnonzero(found.phrases == places[phrase])
            if not len(of_phrase):
                rows.append((image, places[phrase], 0.0, False))
                continue
            best = found.boxes[of_phrase[np.argmax(found.scores[of_phrase])]]
            true = known.boxes[[name == phrase for name in known.phrases]]
            center = (best[:2] + best[2:]) / 2
            pointed = ((true[:, :2] <= center) & (center < true[:, 2:])).all(axis=1).any()
            rows.append((image, places[phrase], float(_ious(best[None], true).max()), bool(pointed)))
    image, phrase, iou, pointed = zip(*rows, strict=True) if rows else ((),) * 4
    return Grounding(np.asarray(image, int), np.asarray(phrase, int), np.asarray(iou, float), np.asarray(pointed, bool))


def score_absent(
    truth: Sequence[GroundTruth], detections: Sequence[Detections], phrases: Sequence[str]
) -> AbsentScores:
    """Returns the best score of every phrase in every image whose `absent` names it."""
    places = {phrase: k for k, phrase in enumerate(phrases)}
    rows: list[tuple[int, int, float]] = []
    for image, (known, found) in enumerate(zip(truth, detections, strict=True)):
        best = np.zeros(len(phrases))
        np.maximum.at(best, found.phrases, found.scores)
        rows += [(image, places[phrase], float(best[places[phrase]])) for phrase in known.absent if phrase in places]
    image, phrase, score = zip(*rows, strict=True) if rows else ((),) * 3
    return AbsentScores(np.asarray(image, int), np.asarray(phrase, int), np.asarray(score, float))


def _share(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _summarize(
    grounded: Grounding, absent: AbsentScores, threshold: float, kept: Callable[[Any], np.ndarray]
) -> dict[str, Any]:
    """Returns the shares of the entries for which `kept(entries)`, a bool[n], says so."""
    of_group, of_absent = kept(grounded), kept(absent)
    scores, images = absent.score[of_absent], absent.image[of_absent]
    false = scores >= threshold
    return {
        "accuracy": _share(grounded.iou[of_group] >= _IOU),
        "pointing": _share(grounded.pointed[of_group]),
        "grounded": int(of_group.sum()),
        "false_phrases": _share(false),
        "false_images": len(set(images[false].tolist())) / len(set(images.tolist())) if len(images) else None,
        "absent": len(scores),
    }


def measure_grounding(
    truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    phrases: Sequence[str],
    levels: Sequence[str],
    per_class: Mapping[str, Mapping[str, Any]],
    threshold: float,
) -> dict[str, Any]:
    """Measures grounding over all images and phrases, for each level and for each modality.

    Args:
        truth, detections, phrases: as in `average_precision`.
        levels: one of `schema.GRANULARITIES` a phrase.
        per_class: of `average_precision`, of the same phrases.
        threshold: least score of a box that counts as found where its phrase is absent.

    Returns:
        {"accuracy", "pointing", "grounded", "false_phrases", "false_images", "absent", "per_level": {level: the same,
        "AP", "AP50", "count"}, "per_modality": {modality: the same six}}. accuracy (Acc@0.5) is the share of phrases
        and images that show them whose best box has an IoU of 0.5 with a true one, pointing of those whose centre is in
        a true one, grounded their number; false_phrases is the share of absent phrases that get a box from `threshold`
        on, false_images of the images in which some absent phrase gets one, absent the number of phrases and images.
        AP and AP50 are means over the phrases of the level, count is the number of their true boxes.
    """
    grounded = ground(truth, detections, phrases)
    absent = score_absent(truth, detections, phrases)
    level_of = np.asarray([GRANULARITIES.index(level) for level in levels], int)
    modality_of = np.asarray([known.modality for known in truth], str)

    def of_level(place: int) -> dict[str, Any]:
        entries = [per_class[phrase] for phrase, level in zip(phrases, level_of, strict=True) if level == place]
        means = {name: _share(np.array([e[name] for e in entries if e[name] is not None])) for name in ("AP", "AP50")}
        return {
            **means,
            "count": sum(entry["count"] for entry in entries),
            **_summarize(grounded, absent, threshold, lambda found: level_of[found.phrase] == place),
        }

    return {
        **_summarize(grounded, absent, threshold, lambda found: np.ones(len(found.image), bool)),
        "per_level": {name: of_level(place) for place, name in enumerate(GRANULARITIES) if place in level_of},
        "per_modality": {
            name: _summarize(grounded, absent, threshold, lambda found, name=name: modality_of[found.image] == name)
            for name in sorted(set(modality_of.tolist()))
        },
    }


def measure_consistency(
    truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    phrases: Sequence[str],
    labels: Mapping[str, str],
    threshold: float,
) -> dict[str, Any]:
    """Measures whether what was found agrees with the hierarchy.

    Args:
        truth, detections, phrases: as in `average_precision`.
        labels: id of the taxonomy of each phrase, "" where it has none.
        threshold: least score of the boxes that are compared.

    Returns:
        {"score_violations", "pairs", "outside", "inside", "held"}. score_violations is the share of boxes and broader
        phrases of theirs, `pairs` of them, in which no box of the broader phrase with an IoU of 0.5 has at least the
        box's score. outside is the share of the boxes whose phrase is a part of a true structure of their image, `held`
        of them, of which less than half lies in the box of such a structure; inside is the mean share that does. None
        where nothing is to compare.
    """
    violated: list[bool] = []
    inside: list[float] = []
    label_of = [labels[phrase] for phrase in phrases]
    broader = [
        [place for place, other in enumerate(label_of) if other != label and relate(label, other) == IS_A]
        for label in label_of
    ]
    for known, found in zip(truth, detections, strict=True):
        shown = [labels[phrase] for phrase in known.phrases]
        boxed = frozenset(shown) - {""}
        sure = ~np.asarray(known.iscrowd, bool)
        for index in np.flatnonzero(found.scores >= threshold).tolist():
            phrase = int(found.phrases[index])
            box, label = found.boxes[index][None], label_of[phrase]
            for parent in broader[phrase]:
                if relate_in(label, label_of[parent], boxed) == IS_A:
                    same = (found.phrases == parent) & (_ious(box, found.boxes)[0] >= _IOU)
                    violated.append(bool((found.scores[same] < found.scores[index] - _ROUNDING).all()))
            holds = np.array([relate_in(label, other, boxed) == PART_OF for other in shown], bool) & sure
            if holds.any():
                shares = _intersections(box, known.boxes[holds])[0] / np.maximum(_areas(box), np.finfo(float).tiny)
                inside.append(float(shares.max()))
    return {
        "score_violations": _share(np.asarray(violated)),
        "pairs": len(violated),
        "outside": _share(np.asarray(inside) < _INSIDE),
        "inside": _share(np.asarray(inside)),
        "held": len(inside),
    }


def label_phrases(phrases: Sequence[str], table: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the taxonomy's id of each phrase, "" where it has none; `table` is "phrases" of the records' metadata."""
    return {phrase: known_label(table[phrase]["label"], phrase) for phrase in phrases}


def broader_phrases(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the broader names of phrases, with their labels.

    Args:
        labels: of `label_phrases`. What is broader and among them keeps its phrase.
    """
    own = {label: phrase for phrase, label in reversed(list(labels.items()))}
    names = {normalize_name(phrase) for phrase in labels}
    found: dict[str, str] = {}
    for label in dict.fromkeys(labels.values()):
        for broad in find_broader(label):
            name = load_taxonomy().labels[broad].name
            if broad in own or normalize_name(name) not in names:
                found[own.get(broad, name)] = broad
    return found


def broader_truth(known: GroundTruth, labels: Mapping[str, str], broader: Mapping[str, str]) -> GroundTruth:
    """Returns the true boxes of broader phrases: those of all their kinds.

    Args:
        known: of an image.
        labels: of its phrases.
        broader: labels of broader phrases, from `broader_phrases`.

    Returns:
        A box for each box and broader phrase that is true of it; a crowd, neither right nor wrong, where it may be.
    """
    boxed = frozenset(labels[phrase] for phrase in known.phrases) - {""}
    rows = [
        (box, name, bool(crowd) or relation == MAY_BE)
        for box, phrase, crowd in zip(known.boxes, known.phrases, known.iscrowd, strict=True)
        for name, broad in broader.items()
        if (relation := relate_in(labels[phrase], broad, boxed)) in (IS_A, MAY_BE)
    ]
    boxes, names, crowds = zip(*rows, strict=True) if rows else ((), (), ())
    return GroundTruth(
        image_id=known.image_id,
        modality=known.modality,
        size=known.size,
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
        phrases=tuple(names),
        iscrowd=np.asarray(crowds, bool),
    )


def measure_broader(
    truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    asked: Sequence[str],
    labels: Mapping[str, str],
    broader: Mapping[str, str],
) -> dict[str, Any]:
    """Measures how broader phrases ground to the boxes of their kinds.

    Args:
        truth: one entry an image.
        detections: of all phrases of `asked`, the broader ones among them.
        asked: places that the detections name.
        labels, broader: see `broader_truth`.

    Returns:
        {"AP", "AP50", "accuracy", "phrases": how many an image shows, "per_class"}, as in `average_precision` and
        `measure_grounding`.
    """
    names = list(broader)
    places = np.asarray([names.index(phrase) if phrase in broader else -1 for phrase in asked], int)
    kept = []
    for found in detections:
        place = places[found.phrases]
        kept.append(Detections(found.boxes[place >= 0], found.scores[place >= 0], place[place >= 0]))
    known = [broader_truth(each, labels, broader) for each in truth]
    scores = average_precision(known, kept, names)
    return {
        "AP": scores["AP"],
        "AP50": scores["AP50"],
        "accuracy": _share(ground(known, kept, names).iou >= _IOU),
        "phrases": sum(entry["count"] > 0 for entry in scores["per_class"].values()),
        "per_class": scores["per_class"],
    }


def add_levels(
    results: dict[str, Any],
    truth: Sequence[GroundTruth],
    detections: Sequence[Detections],
    phrases: Sequence[str],
    table: Mapping[str, Mapping[str, Any]],
    threshold: float,
) -> None:
    """Adds to what `average_precision` returned what `measure_grounding` and `measure_consistency` return.

    Args:
        results: gets "score_threshold", "consistency" and the keys of `measure_grounding`; those of a modality go to
            its own.
        truth, detections, phrases: as in `average_precision`.
        table: phrases of the records' metadata. The level of a phrase is the taxonomy's, or else the one stored there.
        threshold: least score of the boxes that false positives and consistency are of.
    """
    known = {phrase: load_taxonomy().find(table[phrase]["label"]) for phrase in phrases}
    levels = [entry.granularity if (entry := known[phrase]) else table[phrase]["granularity"] for phrase in phrases]
    measured = measure_grounding(truth, detections, phrases, levels, results["per_class"], threshold)
    for modality, entry in measured.pop("per_modality").items():
        results["per_modality"][modality] |= entry
    labels = label_phrases(phrases, table)
    consistency = measure_consistency(truth, detections, phrases, labels, threshold)
    results |= measured | {"score_threshold": threshold, "consistency": consistency}
