"""Class names that stand for no structure: those of places that nobody annotated, and of images without a finding."""

import functools

from data_pipelines.taxonomy import load_taxonomy, normalize_name

_NOT_ANNOTATED = {
    *("not annotated", "unannotated", "unlabeled", "unlabelled", "not labeled", "not labelled", "void", "ignore"),
    *("ignored", "dont care", "don't care", "unknown", "undefined", "unclassified", "unspecified"),
}
_NO_FINDING = {
    *("no finding", "no findings", "normal", "healthy", "negative", "background", "nothing", "none"),
    *("no abnormality", "no lesion", "no tumor", "no disease", "absent"),
}


@functools.lru_cache(maxsize=65536)
def is_not_annotated(label: str) -> bool:
    """Whether a label, unknown to the taxonomy, means that nobody looked there."""
    return normalize_name(label) in _NOT_ANNOTATED and not load_taxonomy().find(label)


@functools.lru_cache(maxsize=65536)
def is_no_finding(label: str) -> bool:
    """Whether a label, unknown to the taxonomy, means that nothing was found."""
    return normalize_name(label) in _NO_FINDING and not load_taxonomy().find(label)


def is_placeholder(label: str) -> bool:
    """Whether a label stands for no structure; the rules of conflicts say what becomes of it."""
    return is_not_annotated(label) or is_no_finding(label)
