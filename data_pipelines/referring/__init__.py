"""Sentences that refer to one region among others, made and checked on the masks when records are built.

After MedGround (arXiv 2601.06847): attributes measured on the masks compose a query, and a verifier keeps it only if
its format, its geometry and medical knowledge hold, and if the masks give back this region and no other. There a
language model words the queries and judges the pictures; here templates do, so that a claim can be measured again.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable
from typing import TypeGuard

import numpy as np

from data_pipelines.referring.compose import Query, compose, compose_negation
from data_pipelines.referring.scene import Scene
from data_pipelines.referring.verify import verify, verify_negation
from data_pipelines.schema import Expression, GroundingExample
from data_pipelines.taxonomy import load_taxonomy, normalize_name

__all__ = ["ReferRule", "refer"]
_LEAST_PIXELS = 16  # of a mask that is referred to: on fewer, position and size say little


@dataclasses.dataclass(frozen=True)
class ReferRule:
    """How many expressions an image gets.

    Attributes:
        regions: most regions of an image that are referred to, drawn at random.
        per_region: most expressions of one region.
        tries: queries composed for each of them, of which some are dropped.
        negations: most sentences about what there is, but not there or not so.
        absent: most sentences about labels that an expert looked for and did not find.
    """

    regions: int = 12
    per_region: int = 2
    tries: int = 4
    negations: int = 2
    absent: int = 4


def refer(
    example: GroundingExample, rng: np.random.Generator, rule: ReferRule | None = None
) -> tuple[tuple[Expression, ...], collections.Counter[str]]:
    """Makes expressions of an image's masks, and sentences that must ground to nothing.

    Args:
        example: as curated: boxes inside the image.
        rng: draws regions, attributes and templates; the same one gives the same expressions.
        rule: how many; the defaults of `ReferRule` if None.

    Returns:
        (expressions, dropped): "referring" ones of one region each, "negation" and "absent" ones of none; and how many
        regions and queries were dropped, by reason.
    """
    rule = rule or ReferRule()
    scene = Scene(example)
    dropped: collections.Counter[str] = collections.Counter()
    told: dict[Hashable, Expression] = {}  # by what is claimed, not by how it is worded

    def accept(query: Query | None, check: Callable[[Scene, Query], str], nothing: str) -> TypeGuard[Query]:
        """Whether a query is to be told; counts why not."""
        reason = nothing if query is None else "said already" if query.claim in told else check(scene, query)
        dropped.update([reason] if reason else ())
        return not reason

    candidates = []
    for index, region in enumerate(example.regions):
        if region.iscrowd or index not in scene.shapes:
            dropped["region is a crowd" if region.iscrowd else "region has no mask"] += 1
        elif scene.shapes[index].area < _LEAST_PIXELS:
            dropped[f"mask under {_LEAST_PIXELS} pixels"] += 1
        else:
            candidates.append(index)
    for target in (candidates[i] for i in rng.permutation(len(candidates))[: rule.regions]):
        kept = 0
        for _ in range(rule.tries):
            if kept == rule.per_region:
                break
            query = compose(scene, target, rng)
            if accept(query, verify, "nothing to tell"):
                kept += 1
                told[query.claim] = Expression(query.text, (target,), query.spans, "referring")
    for _ in range(rule.negations):
        query = compose_negation(scene, rng)
        if accept(query, verify_negation, "nothing to deny"):
            told[query.claim] = Expression(query.text, kind="negation")
    for sentence in _deny_absent(example, rng, rule.absent):
        told.setdefault(sentence.text, sentence)
    return tuple(told.values()), dropped


def _deny_absent(example: GroundingExample, rng: np.random.Generator, count: int) -> list[Expression]:
    taxonomy = load_taxonomy()
    shown = {name for region in example.regions for name in (region.label, normalize_name(region.phrase))}
    labels = [label for label in dict.fromkeys(example.absent) if label not in shown]
    sentences = []
    for label in (labels[i] for i in rng.permutation(len(labels))[:count]):
        known = taxonomy.find(label)
        phrase = known.name if known else label.replace("_", " ")
        opening = ("no", "no sign of", "there is no")[int(rng.integers(3))]
        sentences.append(Expression(f"{opening} {phrase}", kind="absent"))
    return sentences
