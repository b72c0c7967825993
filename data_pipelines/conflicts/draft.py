"""An example while its conflicts are resolved: regions that change, fold into one another or go, and its texts."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines.conflicts.outlines import find_overlaps, measure_boxes
from data_pipelines.conflicts.rules import Conflict, ConflictRules
from data_pipelines.conflicts.structures import find_key, names_side
from data_pipelines.schema import Expression, GroundingExample, Region
from data_pipelines.sides import swap_sides_with_spans


class Draft:
    """One pass over an example.

    Attributes:
        example: as it came.
        rules: to follow.
        absent: labels that are absent, so far.
        caption: of the example, so far.
        conflicts: found, so far.
        changed: whether regions went, were combined or renamed, so that another pass may find more.
    """

    def __init__(self, example: GroundingExample, rules: ConflictRules):
        self.example, self.rules = example, rules
        self.absent, self.caption = tuple(example.absent), example.caption
        self.conflicts: list[Conflict] = []
        self.changed = False
        self._regions: list[Region | None] = list(example.regions)
        self._places = list(range(len(example.regions)))  # where each region is now, -1 where it is gone
        self._expressions = list(example.expressions)
        # What was measured of the regions, as long as they stay as they are.
        self._boxes: np.ndarray | None = None
        self._overlaps: list[tuple[int, int, float]] | None = None

    @property
    def live(self) -> list[int]:
        """Positions of the regions that are left."""
        return [k for k, region in enumerate(self._regions) if region is not None]

    def __getitem__(self, position: int) -> Region:
        region = self._regions[position]
        if region is None:
            raise IndexError(f"region {position} of {self.example.image_id} is gone")
        return region

    def take(self, positions: Iterable[int]) -> list[Region]:
        """Returns the regions at these positions."""
        return [self[k] for k in positions]

    def measure(self, positions: Sequence[int]) -> np.ndarray:
        """Returns `outlines.measure_boxes` of the regions at these positions, float64[K, 4]."""
        if self._boxes is None:
            live = self.live
            self._boxes = np.zeros((len(self._regions), 4))
            self._boxes[live] = measure_boxes(self.take(live))
        return self._boxes[positions]

    def find_overlaps(self, least: float, least_across: float) -> list[tuple[int, int, float]]:
        """Returns (i, j, IoU) of the pairs of regions i < j, crowds apart, whose IoU is at least `least`, or
        `least_across` where their labels are of two structures; always call it with the same numbers."""
        if self._overlaps is None:
            live = [k for k in self.live if not self[k].iscrowd]
            regions = self.take(live)
            codes: dict[str, int] = {}
            groups = np.asarray([codes.setdefault(find_key(region.label), len(codes)) for region in regions])
            found = find_overlaps(regions, self.measure(live), groups, least, least_across)
            self._overlaps = [(live[i], live[j], iou) for i, j, iou in found]
        return self._overlaps

    def _forget(self) -> None:
        self._boxes = self._overlaps = None

    def note(self, kind: str, labels: Sequence[str], detail: str, rule: str = "") -> None:
        """Records a conflict; `rule` where it is not the one of its kind."""
        rule = rule or self.rules.of(kind)
        example = self.example
        self.conflicts.append(Conflict(kind, rule, example.dataset, example.image_id, tuple(labels), detail))

    def replace(self, position: int, **fields) -> None:
        """Gives a region other fields."""
        self._regions[position] = dataclasses.replace(self[position], **fields)
        if not {"box", "mask", "label"}.isdisjoint(fields):
            self._forget()

    def drop(self, positions: Iterable[int]) -> None:
        """Takes regions away; the texts that ground to them go too."""
        for k in positions:
            spans = self[k].spans
            self._regions[k] = None
            self._forget()
            self._places = [-1 if place == k else place for place in self._places]
            self.changed = True
            if self.caption and spans:
                self.lose_caption("a region that it names was dropped")

    def fold(self, position: int, into: int) -> None:
        """Takes a region away because another one stands for it; texts then ground to that one."""
        spans = tuple(sorted({*self[into].spans, *self[position].spans}))
        if spans != self[into].spans:
            self.replace(into, spans=spans)
        self._regions[position] = None
        self._forget()
        self._places = [into if place == position else place for place in self._places]
        self.changed = True

    def lose_caption(self, reason: str) -> None:
        """Takes the caption away, and the regions' spans in it."""
        self.note("lost_text", (), f"caption: {reason}")
        self.caption = ""
        for k in self.live:
            if self[k].spans:
                self.replace(k, spans=())

    def drop_sided_texts(self) -> None:
        """Takes the texts away that name a side, which may be the wrong one."""
        if names_side(self.caption):
            self.lose_caption("it names a side that the picture contradicts")
        kept = [expression for expression in self._expressions if not names_side(expression.text)]
        for _ in range(len(self._expressions) - len(kept)):
            self.note("lost_text", (), "expression: it names a side that the picture contradicts")
        self._expressions = kept

    def swap_sided_texts(self) -> None:
        """Exchanges left and right in caption and expressions."""
        self.caption, spans = swap_sides_with_spans(self.caption, [region.spans for region in self.take(self.live)])
        for k, moved in zip(self.live, spans, strict=True):
            if moved != self[k].spans:
                self.replace(k, spans=moved)
        for place, expression in enumerate(self._expressions):
            text, (moved,) = swap_sides_with_spans(expression.text, [expression.spans])
            self._expressions[place] = dataclasses.replace(expression, text=text, spans=moved)

    def finish(self) -> GroundingExample:
        """Returns the example as it is now, with expressions on the regions that are left."""
        live = self.live
        rank = {k: place for place, k in enumerate(live)}
        expressions: list[Expression] = []
        for expression in self._expressions:
            places = [self._places[k] for k in expression.regions]
            if -1 in places:
                self.note("lost_text", (), "expression: a region that it names was dropped")
                continue
            moved = tuple(sorted({rank[place] for place in places}))
            if moved != expression.regions:
                expression = dataclasses.replace(expression, regions=moved)
            expressions.append(expression)
        return dataclasses.replace(
            self.example,
            regions=tuple(self.take(live)),
            absent=self.absent,
            caption=self.caption,
            expressions=tuple(expressions),
        )
