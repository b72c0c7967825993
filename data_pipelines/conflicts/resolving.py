"""Conflicts inside one example, resolved one after the other until none is left that changes anything."""

import collections

import numpy as np

from data_pipelines.conflicts.draft import Draft
from data_pipelines.conflicts.laterality import find_swapped
from data_pipelines.conflicts.outlines import combine, join_pairs, measure_inside
from data_pipelines.conflicts.rules import Conflict, ConflictRules
from data_pipelines.conflicts.structures import (
    are_related,
    find_holders,
    find_key,
    find_mirrored,
    find_side,
    find_truths,
    remove_side,
)
from data_pipelines.schema import GroundingExample, Region
from data_pipelines.sides import swap_sides
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.taxonomy.placeholders import is_no_finding, is_not_annotated
from data_pipelines.vocabulary import find_broader

SAME_IOU = 0.95  # from which two outlines are one outline made twice
OVERLAP_IOU = 0.5  # from which two outlines of one label are of one structure
_COMBINING = ("union", "intersection", "majority")
_SAME_BOX = 0.5  # pixels between the corners of boxes that count as the same
_BOX_SLACK = 1.5  # pixels by which a box may differ from its mask's: polygons and their pixels differ by one
_LEAST_INSIDE = 0.5  # share of a child's outline that its parent's should cover


def resolve(example: GroundingExample, rules: ConflictRules) -> tuple[GroundingExample, list[Conflict]]:
    """Finds what contradicts itself in an example and resolves it by the rules.

    A region's `parent` becomes the nearest structure in the image that holds it, if there is one. Expressions keep to
    their regions; those that lost one are dropped. No label appears that was not there, but for sides that are taken
    away or exchanged. What is not annotated is never absent. Doing it again changes nothing.

    Args:
        example: with labels of the taxonomy, where it knows them, and boxes inside the image.
        rules: one choice for each kind of conflict.

    Returns:
        (example, conflicts): those that were kept as they are among them.
    """
    found: collections.Counter[Conflict] = collections.Counter()
    lost: list[Conflict] = []
    # Every pass that changes something leaves fewer regions or fewer wrong sides.
    for _ in range(len(example.regions) + 3):
        draft = Draft(example, rules)
        for step in (_read_names, _hang, _fit_boxes, _unite, _compare_labels, _compare_absent, _relate):
            step(draft)
        example = draft.finish()
        # What is kept is found again in each pass, a text is lost once.
        found |= collections.Counter(each for each in draft.conflicts if each.kind != "lost_text")
        lost += (each for each in draft.conflicts if each.kind == "lost_text")
        if not draft.changed:
            break
    return example, [*found.elements(), *lost]


def _read_names(draft: Draft) -> None:
    """Takes out labels that are none, and absent labels that only say what was not annotated."""
    for kind, means in (("not_annotated", is_not_annotated), ("no_finding", is_no_finding)):
        named = [k for k in draft.live if means(draft[k].label)]
        listed = [label for label in draft.absent if means(label)]
        if not named and not listed:
            continue
        labels = sorted({region.label for region in draft.take(named)} | set(listed))
        draft.note(kind, labels, f"{len(named)} regions, {len(listed)} absent labels")
        if draft.rules.of(kind) == "drop":
            draft.drop(named)
            draft.absent = tuple(label for label in draft.absent if label not in listed)
    if draft.absent and draft.rules.absent_labels == "not_annotated":
        draft.note("absent_labels", draft.absent, f"{len(draft.absent)} labels are unknown rather than absent")
        draft.absent = ()


def _hang(draft: Draft) -> None:
    """Compares left and right with the picture."""
    live = draft.live
    places, seen = find_swapped(draft.example, draft.take(live))
    swapped = [live[place] for place in places]
    if not swapped:
        return
    draft.note("swapped_sides", sorted({region.label for region in draft.take(swapped)}), seen)
    rule = draft.rules.swapped_sides
    if rule == "keep":
        return
    draft.changed = True
    if rule == "swap":
        draft.swap_sided_texts()
        for k in swapped:
            draft.replace(k, **_swap_names(draft[k]))
        draft.absent = tuple(swap_sides(label) if find_side(label) else label for label in draft.absent)
        return
    draft.drop_sided_texts()
    if rule == "drop":
        draft.drop(swapped)
    else:
        for k in swapped:
            draft.replace(k, **_unside_names(draft[k]))
    for k in draft.live:
        if find_side(draft[k].parent):
            draft.replace(k, parent=_unsided_holder(draft[k].parent, ""))
    # What is absent on one side may be there on the other; what both sides lack is absent anyhow.
    keys = {find_key(label) for label in draft.absent}
    draft.absent = tuple(label for label in draft.absent if not find_side(label) or find_mirrored(label) in keys)


def _unsided_holder(label: str, parent: str) -> str:
    return next((key for key in find_holders(label, parent) if not find_side(key)), "")


def _unsided_kind(label: str) -> str:
    """The nearest name without a side that a label is one of ("rib" of rib 9), if it tells all that a holder does."""
    known = load_taxonomy().find(label)
    holder = _unsided_holder(label, "")
    kinds = (kind for kind in find_broader(known.id if known else "") if not find_side(kind))
    return next((kind for kind in kinds if not holder or holder in find_truths(kind)), "")


def _unside_names(region: Region) -> dict[str, str]:
    """Names of a region without its side: the taxonomy's, if it knows them."""
    label = remove_side(region.label)
    known = load_taxonomy().find(label)
    if known:
        return {
            "label": known.id,
            "phrase": remove_side(region.phrase) or known.name,
            "granularity": known.granularity,
            "parent": known.parent,
        }
    return {
        "label": label,
        "phrase": remove_side(region.phrase) or label.replace("_", " "),
        "parent": _unsided_kind(region.label) or _unsided_holder(region.label, region.parent),
    }


def _swap_names(region: Region) -> dict[str, str]:
    """Names of a region of the other side; without any where only one side has such a structure."""
    taxonomy = load_taxonomy()
    if taxonomy.find(region.label) and not taxonomy.find(swap_sides(region.label)):
        return _unside_names(region)
    return {
        "label": swap_sides(region.label),
        "phrase": swap_sides(region.phrase),
        "parent": swap_sides(region.parent) if find_side(region.parent) else region.parent,
    }


def _fit_boxes(draft: Draft) -> None:
    """Compares boxes with those of their masks."""
    masked = [k for k in draft.live if draft[k].mask]
    if not masked:
        return
    regions = draft.take(masked)
    fitted = draft.measure(masked)
    given = np.asarray([region.box for region in regions], np.float64)
    off = np.abs(fitted - given).max(axis=1)
    empty = (fitted[:, 2:] <= fitted[:, :2]).any(axis=1)
    for place in np.flatnonzero((off > _BOX_SLACK) & ~empty).tolist():
        draft.note("box_and_mask", [regions[place].label], f"up to {off[place]:.1f} pixels")
        if draft.rules.box_and_mask == "mask":
            draft.replace(masked[place], box=fitted[place].astype(np.float32))


def _unite(draft: Draft) -> None:
    """Finds outlines of one structure that were made several times."""
    groups: dict[str, list[tuple[int, int, float]]] = {}
    for i, j, iou in draft.find_overlaps(OVERLAP_IOU, SAME_IOU):
        key = find_key(draft[i].label)
        if key == find_key(draft[j].label):
            groups.setdefault(key, []).append((i, j, iou))
    for pairs in groups.values():
        for members in join_pairs(pairs):
            inside = set(members)
            _unite_members(draft, members, [pair for pair in pairs if pair[0] in inside])


def _unite_members(draft: Draft, members: list[int], pairs: list[tuple[int, int, float]]) -> None:
    """Unites regions of one label that hang together by pairs (i, j, IoU)."""
    rules = draft.rules
    regions = draft.take(members)
    names = sorted({region.source_label or region.label for region in regions})
    ious = [iou for *_, iou in pairs]
    detail = f"{len(members)} outlines, IoU {min(ious):.2f} to {max(ious):.2f}"
    detail += f", named {', '.join(names)}" if len(names) > 1 else ""
    labels = sorted({region.label for region in regions})
    alike, differ = [iou for iou in ious if iou >= SAME_IOU], [iou for iou in ious if iou < SAME_IOU]
    if rules.disagreeing_masks in _COMBINING:
        outline = combine(regions, rules.disagreeing_masks)
        kind = "disagreeing_masks" if differ else "same_structure"
        if outline is None:
            draft.note(kind, labels, f"{detail}; nothing in common, all kept")
            return
        draft.note(kind, labels, detail, rules.disagreeing_masks)
        for k in members[1:]:
            draft.fold(k, members[0])
        draft.replace(members[0], box=outline[0], mask=outline[1])
        return
    if alike:
        draft.note("same_structure", labels, detail)
    if differ:
        draft.note("disagreeing_masks", labels, detail)
    least = OVERLAP_IOU if rules.disagreeing_masks == "first" else SAME_IOU
    gone: set[int] = set()
    for i, j, iou in sorted(pairs):
        by_rule = iou < SAME_IOU or rules.same_structure == "keep_first"
        if iou < least or not by_rule or i in gone or j in gone:
            continue
        if draft[j].mask and not draft[i].mask:
            draft.replace(i, mask=draft[j].mask, box=draft[j].box)
        draft.fold(j, i)
        gone.add(j)


def _compare_labels(draft: Draft) -> None:
    """Finds one outline with two labels that have nothing to do with each other."""
    dropped: set[int] = set()
    for i, j, iou in draft.find_overlaps(OVERLAP_IOU, SAME_IOU):
        a, b = draft[i], draft[j]
        if iou < SAME_IOU or are_related(a, b) or np.abs(a.box - b.box).max() > _SAME_BOX:
            continue
        draft.note("two_labels", (a.label, b.label), f"IoU {iou:.2f}")
        if draft.rules.two_labels == "drop":
            dropped |= {i, j}
        elif draft.rules.two_labels == "keep_first" and i not in dropped:
            dropped.add(j)
    draft.drop(sorted(dropped))


def _compare_absent(draft: Draft) -> None:
    """Compares the absent labels with the shown ones, and with all that they imply."""
    wrong: set[str] = set()
    for label in dict.fromkeys(draft.absent):
        key = find_key(label)
        shown = [k for k in draft.live if key in find_truths(draft[k].label, draft[k].parent)]
        if not shown:
            continue
        draft.note("shown_and_absent", (label, draft[shown[0]].label), f"{len(shown)} regions")
        wrong.add(label)
        if draft.rules.shown_and_absent == "absent":
            draft.drop(shown)
    if draft.rules.shown_and_absent == "shown":
        draft.absent = tuple(label for label in draft.absent if label not in wrong)


def _relate(draft: Draft) -> None:
    """Gives regions the nearest structure in the image that holds them as parent, and looks whether it does."""
    present: dict[str, list[int]] = {}
    for k in draft.live:
        present.setdefault(find_key(draft[k].label), []).append(k)
    if len(present) < 2:
        return
    children: dict[tuple[str, str], list[int]] = {}
    for key, places in present.items():
        for k in places:
            held = next((up for up in find_holders(draft[k].label, draft[k].parent) if up in present and up != key), "")
            if held:
                children.setdefault((key, held), []).append(k)
    dropped: set[int] = set()
    for (key, holder), places in children.items():
        outer = draft.take(present[holder])
        label, parent = draft[places[0]].label, outer[0].label
        draft.note("parent_child", (label, parent), f"{label} in {parent}")
        for k in places:
            if draft[k].parent != parent:
                draft.replace(k, parent=parent)
        inside = measure_inside(draft.take(places), outer, draft.measure(places), draft.measure(present[holder]))
        outside = np.flatnonzero(inside < _LEAST_INSIDE).tolist()
        if outside:
            seen = f"{len(outside)} of {len(places)} regions of {key}; the farthest is {min(inside):.0%} inside"
            draft.note("child_outside_parent", (label, parent), seen)
        if outside and draft.rules.child_outside_parent == "drop":
            dropped |= {places[place] for place in outside}
        if draft.rules.parent_child == "keep_child":
            dropped |= set(present[holder])
        elif draft.rules.parent_child == "keep_parent":
            dropped |= set(places)
    draft.drop(sorted(dropped))
