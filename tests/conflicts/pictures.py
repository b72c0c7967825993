"""Examples with made regions, and what tests ask of them."""

import dataclasses

import hypothesis.strategies as st
import numpy as np

from data_pipelines.conflicts import CHOICES, ConflictRules, resolve
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sources.masks import encode_mask

SIDE = 40  # pixels of the pictures made here


def region(label, box, masked=False, **fields):
    fields = {"phrase": label.replace("_", " "), **fields}
    if masked:
        mask = np.zeros((SIDE, SIDE), bool)
        x0, y0, x1, y1 = map(int, box)
        mask[y0:y1, x0:x1] = True
        fields["mask"] = encode_mask(mask)
    return Region(np.asarray(box, np.float32), label=label, **fields)


def picture(*regions, **fields):
    fields = {"image_id": "a", "dataset": "one", "modality": "ct", **fields}
    return GroundingExample(image=b"", height=SIDE, width=SIDE, regions=regions, **fields)


def run(example, **rules):
    """The resolved example, and its conflicts as kind: rule."""
    example, conflicts = resolve(example, ConflictRules(**rules))
    return example, {conflict.kind: conflict.rule for conflict in conflicts}


def labels(example):
    return [each.label for each in example.regions]


def boxes(example):
    return [each.box.tolist() for each in example.regions]


def outline_set(example):
    return {
        (each.label, tuple(each.box.tolist()), each.mask["counts"] if each.mask else b"") for each in example.regions
    }


LABELS = (
    *("lung", "left_lung", "right_lung", "left_upper_lobe", "lung_nodule", "nodule", "liver", "Liver"),
    *("rib_left_9", "rib_right_9", "void", "normal", "left_kidney", "right_kidney", "left_autochthon", "aorta"),
)


@st.composite
def regions_of(draw, names=LABELS):
    x0, y0 = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    box = (x0, y0, x0 + draw(st.integers(2, 40 - x0)), y0 + draw(st.integers(2, 40 - y0)))
    return region(draw(st.sampled_from(names)), box, draw(st.booleans()), iscrowd=draw(st.integers(0, 9)) == 0)


@st.composite
def pictures(draw, names=LABELS, **fields):
    found = draw(st.lists(regions_of(names), max_size=7))
    absent = tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True)))
    places = st.lists(st.integers(0, max(len(found) - 1, 0)), max_size=2, unique=True).map(sorted)
    said = tuple(Expression(f"number {k}", tuple(draw(places)) if found else ()) for k in range(2))
    return picture(*found, absent=absent, expressions=said, **fields)


any_rules = st.fixed_dictionaries(
    {field: st.sampled_from(choices) for field, choices in CHOICES.items() if not field.startswith("duplicates")}
)


def same(a, b):
    plain = [
        [(r.label, r.phrase, r.parent, r.box.tolist(), r.mask, r.spans) for r in example.regions] for example in (a, b)
    ]
    return plain[0] == plain[1] and dataclasses.replace(a, regions=()) == dataclasses.replace(b, regions=())
