"""Annotations that contradict one another: found, resolved by named rules, counted and listed.

example, conflicts = resolve(example, ConflictRules())      one image by itself
example, conflicts = merge([first, copy], ConflictRules())  the same pixels, annotated several times
report = ConflictReport(); report.add(conflicts[0])         counts, and some of each kind by name
"""

from data_pipelines.conflicts.merging import find_keepers, merge
from data_pipelines.conflicts.report import ConflictReport
from data_pipelines.conflicts.resolving import resolve
from data_pipelines.conflicts.rules import CHOICES, KINDS, Conflict, ConflictRules

__all__ = ["CHOICES", "KINDS", "Conflict", "ConflictReport", "ConflictRules", "find_keepers", "merge", "resolve"]
