"""Whether a query may stay: its format, its geometry, what medicine says, and that it means one region and no other."""

import re

import numpy as np

from data_pipelines.positions import FALSE, TRUE
from data_pipelines.referring.compose import Query
from data_pipelines.referring.scene import Predicate, Scene
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.vocabulary import find_broader

_LENGTHS = (8, 160)  # characters of a query
_MOST_WORDS = 30
_REPEATED = re.compile(r"\b(\w+) \1\b")
_LESS_THAN_ORGAN = ("substructure", "lesion", "cell")
_ROOM = 0.05  # of the holder's box, by which a lesion's center may leave it
_SIDE_GAP = 0.05  # of the image's width, by which a left structure may lie on the wrong side of its right one
_RADIOLOGICAL = ("xray", "ct", "mri", "pet")  # seen from the front or the feet: the patient's left is right


def verify(scene: Scene, query: Query) -> str:
    """Returns why a query about one region has to go, "" if it may stay."""
    if not has_good_format(query.text):
        return "format"
    members = query.noun.regions
    truth = np.stack([scene.decide(predicate, members) for predicate in query.predicates])  # [predicates, members]
    meant = np.asarray([index == query.target for index in members])
    if not (truth[:, meant] == TRUE).all() or not meant.any():
        return "geometry"
    others = [predicate.other for predicate in query.predicates if predicate.other >= 0]
    if not all(is_plausible(scene, index) for index in (query.target, *others)):
        return "medical prior"
    if any(_is_whole_in_part(scene, predicate, query.target) for predicate in query.predicates):
        return "medical prior"
    if not (truth[:, ~meant].min(axis=0, initial=TRUE) == FALSE).all():
        return "not unique"
    return ""


def verify_negation(scene: Scene, query: Query) -> str:
    """Returns why a query that is to mean nothing has to go, "" if it is surely false of every region of its noun."""
    if not has_good_format(query.text):
        return "format"
    truth = np.stack([scene.decide(predicate, query.noun.regions) for predicate in query.predicates])
    return "" if (truth.min(axis=0) == FALSE).all() else "may be true"


def has_good_format(text: str) -> bool:
    """Says whether a query is one short sentence without empty or doubled places."""
    return (
        _LENGTHS[0] <= len(text) <= _LENGTHS[1]
        and len(text.split()) <= _MOST_WORDS
        and text == " ".join(text.split())
        and not set(text) & set("{}[]<>_")
        and ". " not in text
        and not _REPEATED.search(text.lower())
    )


def is_plausible(scene: Scene, index: int) -> bool:
    """Says whether the taxonomy has nothing against a region: its modality, where it lies, and its side.

    A part or a lesion has its center in the box of the structure that holds it, where that has a mask; not in the mask
    itself, since many data sets cut lesions out of their organ. The left one of a pair lies on the image's right of the
    right one, as radiology shows them. What the taxonomy does not know is plausible.
    """
    taxonomy = load_taxonomy()
    known, modality = taxonomy.find(scene.labels[index]), scene.example.modality
    if known is None:
        return True
    if known.modalities and modality != "unknown" and modality not in known.modalities:
        return False
    holders = set(taxonomy.parents(known.id)) if known.granularity in _LESS_THAN_ORGAN else set()
    # A lung is held by "left lung" too: a nodule is in one of both.
    holding = [
        other
        for other in scene.shapes
        if other != index and holders & {scene.labels[other], *find_broader(scene.labels[other])}
    ]
    if holding and not any(_is_in_box(scene, index, other) for other in holding):
        return False
    return known.side == "none" or modality not in _RADIOLOGICAL or _lies_on_its_side(scene, index, known.side)


def _is_whole_in_part(scene: Scene, predicate: Predicate, target: int) -> bool:
    """Says whether a claim puts a structure into what the taxonomy says it holds: a mask's filled holes can look so."""
    if predicate.kind != "third" and predicate.value != "inside":
        return False
    known = load_taxonomy().find(scene.labels[predicate.other])
    return known is not None and scene.labels[target] in load_taxonomy().parents(known.id)


def _is_in_box(scene: Scene, index: int, holder: int) -> bool:
    center, box = np.asarray(scene.shapes[index].center), scene.shapes[holder].box
    room = _ROOM * (box[2:] - box[:2])
    return bool((center >= box[:2] - room).all() and (center <= box[2:] + room).all())


def _lies_on_its_side(scene: Scene, index: int, side: str) -> bool:
    label = scene.labels[index]
    pair = label.replace(side, "right" if side == "left" else "left", 1)
    others = [other for other in scene.shapes if scene.labels[other] == pair]
    room = _SIDE_GAP * scene.example.width
    x = scene.shapes[index].center[0]
    sign = 1 if side == "left" else -1
    return all(sign * (x - scene.shapes[other].center[0]) >= -room for other in others)
