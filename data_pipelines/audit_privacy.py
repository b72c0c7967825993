"""Text that may point to a person, in the words of records; what is found is shown masked only."""

import functools
import re

_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_NAMED_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"

# In this order: what a pattern has taken is not looked at again. The first two are no names of a person.
_PATTERNS: tuple[tuple[str, re.Pattern], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE | re.ASCII))
    for kind, pattern in (
        ("", r"(?<![0-9a-z])(?=[0-9]*[a-f])[0-9a-f]{12,}(?![0-9a-z])"),  # a hash
        ("dicom uid", r"(?<![\d.])[0-2](?:\.\d+){5,}(?![\d.])"),
        ("e-mail", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
        ("file path", r"[a-z]:\\[^\s\"']+|\\\\\w[^\s\"']+|(?<![\w.:/])~?/[\w.~-]+(?:/[\w.~-]+)+"),
        (
            "date",
            rf"(?<!\d){_YEAR}(?P<a>[-/._]){_MONTH}(?P=a){_DAY}(?!\d)"
            rf"|(?<!\d)(?:{_DAY}(?P<b>[-/._]){_MONTH}|{_MONTH}(?P<c>[-/._]){_DAY})(?:(?P=b)|(?P=c))(?:{_YEAR}|\d\d)(?!\d)"
            rf"|(?<!\d){_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)"
            rf"|(?<!\w)(?:{_DAY}[. -]*{_NAMED_MONTH}|{_NAMED_MONTH}[. -]*{_DAY})[., -]*{_YEAR}(?!\w)",
        ),
        ("dicom name", r"[a-z][a-z' -]*(?:\^+[a-z][a-z' -]*)+\^*"),
        ("long number", r"(?<!\d)\d{7,}(?!\d)"),
    )
)
_SHOWN = 32  # characters of a mask


@functools.lru_cache(maxsize=65536)
def find_private(text: str) -> tuple[tuple[str, str, int, int], ...]:
    """Returns (kind, mask, start, end) of what looks like a date, a long number, a path, an address or a name.

    In the mask letters are "x" and digits "#", so that it shows the shape of the text and nothing of it.
    """
    taken, found = text, []
    for kind, pattern in _PATTERNS:
        for match in pattern.finditer(taken):
            start, end = match.span()
            taken = taken[:start] + "\0" * (end - start) + taken[end:]
            if kind:
                found.append((kind, _mask(text[start:end])[:_SHOWN], start, end))
    return tuple(found)


def mask_private(text: str) -> str:
    """Returns the text with everything that `find_private` finds masked."""
    characters = list(text)
    for _, _, start, end in find_private(text):
        characters[start:end] = _mask(text[start:end])
    return "".join(characters)


def _mask(text: str) -> str:
    return re.sub(r"[^\W\d_]", "x", re.sub(r"\d", "#", text))
