"""The kinds of conflict, and the rules that resolve them."""

import dataclasses

# What each kind means, in a sentence for reports. Those without a rule of their own follow from another conflict.
KINDS: dict[str, str] = {
    "same_structure": "One structure outlined twice alike, under two names or the same one.",
    "disagreeing_masks": "One structure outlined several times, and the outlines differ.",
    "box_and_mask": "The box of a region is not the box of its mask.",
    "two_labels": "One outline with two labels of which neither holds the other.",
    "parent_child": "A structure and one that holds it in one image, with their relation.",
    "child_outside_parent": "A structure that lies mostly outside the one that holds it.",
    "swapped_sides": "Left and right are on the wrong sides of a picture, as radiologists hang it.",
    "shown_and_absent": "A label is shown, or a part of it is, and is said to be absent.",
    "absent_labels": "Labels said to be absent by a data set that only did not annotate them.",
    "not_annotated": "A label that means that nobody looked there (void, ignore).",
    "no_finding": "A label that means that nothing was found (normal, background).",
    "duplicates_within": "The same pixels several times in one data set.",
    "duplicates_across": "The same pixels in several data sets.",
    "merged_fields": "Copies of one picture with different modality, patient, spacing or caption.",
    "lost_text": "A caption or expression that is no longer true of the regions, or not of all.",
}

# The values of each field of `ConflictRules`, the default first.
CHOICES: dict[str, tuple[str, ...]] = {
    "same_structure": ("keep_first", "keep_both"),
    "disagreeing_masks": ("keep_all", "first", "union", "intersection", "majority"),
    "box_and_mask": ("mask", "keep"),
    "two_labels": ("keep_both", "keep_first", "drop"),
    "parent_child": ("keep_both", "keep_child", "keep_parent"),
    "child_outside_parent": ("keep", "drop"),
    "swapped_sides": ("unsided", "swap", "drop", "keep"),
    "shown_and_absent": ("shown", "absent", "keep"),
    "absent_labels": ("absent", "not_annotated"),
    "not_annotated": ("drop", "keep"),
    "no_finding": ("drop", "keep"),
    "duplicates_within": ("merge", "keep_first", "keep_all"),
    "duplicates_across": ("merge", "keep_first", "keep_all"),
}
FIXED_RULES = {"merged_fields": "first", "lost_text": "drop"}  # of the kinds that have no choice


@dataclasses.dataclass(frozen=True)
class ConflictRules:
    """How each kind of conflict is resolved. Whatever the rule, the conflict is counted and listed.

    Attributes:
        same_structure: two regions of one label that overlap by an IoU of 0.95 and more: "keep_first" (the first that
            has a mask, if any has), "keep_both". Rules of `disagreeing_masks` that combine outlines combine these too.
        disagreeing_masks: regions of one label that overlap by 0.5 to 0.95: "keep_all"; "first" keeps the first of
            those that overlap; "union", "intersection" and "majority" (more than half of the outlines) combine all that
            hang together. Masks are combined if there are any, else boxes (majority: the median of each side). A
            combination without a pixel is not made; the regions are kept.
        box_and_mask: a box that differs from that of its mask: "mask" takes the mask's, "keep".
        two_labels: boxes within half a pixel, and masks within 0.95, whose labels are unrelated: "keep_both",
            "keep_first", "drop" both.
        parent_child: "keep_both", or only one of the two: "keep_child", "keep_parent".
        child_outside_parent: more than half of the child lies outside: "keep", "drop" the child.
        swapped_sides: "unsided" takes the side out of the names (left kidney: kidney), which stays true; "swap" trusts
            the picture and exchanges left and right; "drop" drops the sided regions; "keep".
        shown_and_absent: "shown" takes the label off the absent ones, "absent" drops the regions, "keep".
        absent_labels: what a label that is listed as absent means: "absent", or "not_annotated" for data sets whose
            list only says what nobody annotated; then the list is emptied.
        not_annotated, no_finding: regions with such a label: "drop", "keep". Neither makes any label absent.
        duplicates_within: copies in one data set: "merge" their annotations, "keep_first" as it is, "keep_all" of them.
        duplicates_across: the same, for copies in several data sets.

    Raises:
        ValueError: a value is none of `CHOICES`.
    """

    same_structure: str = "keep_first"
    disagreeing_masks: str = "keep_all"
    box_and_mask: str = "mask"
    two_labels: str = "keep_both"
    parent_child: str = "keep_both"
    child_outside_parent: str = "keep"
    swapped_sides: str = "unsided"
    shown_and_absent: str = "shown"
    absent_labels: str = "absent"
    not_annotated: str = "drop"
    no_finding: str = "drop"
    duplicates_within: str = "merge"
    duplicates_across: str = "merge"

    def __post_init__(self):
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"rule {field}: expected one of {', '.join(choices)}, found {getattr(self, field)!r}")

    def of(self, kind: str) -> str:
        """Returns the rule that is followed for a kind of conflict."""
        return FIXED_RULES.get(kind) or getattr(self, kind)


@dataclasses.dataclass(frozen=True)
class Conflict:
    """One conflict, and how it was resolved.

    Attributes:
        kind: one of `KINDS`.
        rule: that was followed.
        dataset, image_id: of the example; of the one that is kept, for copies.
        labels: that contradict one another.
        detail: what was found, for people.
    """

    kind: str
    rule: str
    dataset: str
    image_id: str
    labels: tuple[str, ...] = ()
    detail: str = ""
