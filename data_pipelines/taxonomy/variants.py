"""Phrases made from a label's name: "left upper lobe of the lung", "kidney on the left", "tumor in the liver"."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipelines.taxonomy import Label

# Parts that several organs have, so that people add of which one.
_PARTS = ("lobe", "hemisphere", "ventricle", "atrium", "appendage", "septum")
_ORGANS = ("lung", "heart", "brain")
_NO_SIDE_FORM = ("retina", "sense_organ")  # an "eye on the left" may be meant from the reader's side


def generate_variants(label: "Label", labels: Mapping[str, "Label"]) -> Iterator[str]:
    """Yields natural phrases that say what the label's name says.

    Args:
        label: the label.
        labels: all labels by id.
    """
    words = label.name.split()
    if label.granularity == "organ" and words[0] == label.side and label.label_class not in _NO_SIDE_FORM:
        yield f"{' '.join(words[1:])} on the {label.side}"
    if label.granularity == "substructure" and words[-1] in _PARTS:
        holder = labels.get(label.parent)
        while holder and holder.name not in _ORGANS:
            holder = labels.get(holder.parent)
        if holder:
            yield f"{label.name} of the {holder.name}"
    if label.granularity == "lesion" and label.parent:
        parent = labels[label.parent].name
        for kind in (labels[kind].name for kind in label.kind_of):
            if label.name == f"{parent} {kind}":
                yield f"{kind} {'of' if kind == 'fracture' else 'in'} the {parent}"
