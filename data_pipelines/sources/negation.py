"""Which labels of the taxonomy a sentence names, and which of them it says are absent.

A small rule after NegEx (Chapman et al. 2001), made to be right where it speaks rather than to speak often: a wrong
absent label teaches a model not to find what is there. It reads a cue ("no", "without", "absence of", "free of") and
the list of findings behind it, up to the end of the clause, and takes nothing of a clause that it cannot read to the
end: "no change in the effusion", "no large effusion" and "no effusion on the left" say nothing is absent.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

from data_pipelines.taxonomy import Label, load_taxonomy, normalize_name


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ITEM_WORDS = 4  # of a denied finding that the taxonomy does not know
_MOST_WORDS = 6  # in a name of the taxonomy that is looked for
_CUE = re.compile(
    r"\b(?:(?:there (?:is|are|was|were) )?no (?:(?:radiographic )?(?:evidence|signs?|findings?) (?:of|for) )?"
    r"|without (?:any )?(?:(?:evidence|signs?) of )?|(?<!in the )(?<!in )absence of |free of )"
)
_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and/or|or|and|nor)?|\b(?:and/or|or|and|nor)\b|/)\s*")
_CLAUSE_END = re.compile(r"[.;:]|\b(?:but|however|although|though|yet|whereas|while)\b")
# Words of a sentence that make what it denies doubtful, of another time, or of one place only.
_DOUBTS = _words(
    """cannot can could may might if whether rule exclude excluded excluding unless question questionable possible
    possibly probable probably likely suspected suspicious concern concerning prior previous previously history compared
    comparison unchanged resolved resolution longer not never except besides apart aside left right bilateral unilateral
    upper lower mid middle base bases basal basilar apex apical lobe zone anterior posterior medial lateral"""
)
_HARMLESS = _words("a an the any focal")  # before a name in a denied list: they narrow nothing that matters
_NARROWING = _words(
    """acute new large small significant substantial definite obvious gross further additional other enlarging worsening
    increasing recurrent residual active overt dense marked major new-onset"""
)
_PREPOSITIONS = _words("in at on of within along near than with to for from by over under around through")
_TAIL = re.compile(
    r"(?: (?:is|are|was|were))?(?: (?:seen|identified|present|noted|visible|detected|evident|demonstrated|found"
    r"|appreciated|visualized))?"
)
_VERBS = _words("is are was were has have had shows show appears appear remains remain")
_NORMAL = re.compile(
    r"(?P<subject>[\w ]+?) (?:is|are|appears?) (?:clear|normal|unremarkable|within normal limits|normal in \w+)"
    r"|(?:normal|unremarkable) (?P<thing>[\w ]+)"
)
_SUBJECT_WORDS = 6  # of what is called normal: a longer one may tell of a finding as well


@dataclasses.dataclass(frozen=True)
class Mention:
    """A label that a text names.

    Attributes:
        label: of the taxonomy.
        start, end: characters of the normalised text, half-open.
        exact: the words mean the label, no more and no less, which class names of data sets may not.
    """

    label: Label
    start: int
    end: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a sentence says.

    Attributes:
        kind: "negation" if it denies findings and says nothing else, "normal" if it calls something normal, else "".
        absent: ids of the labels that it denies.
        mentioned: ids of all other labels that it names.
    """

    kind: str
    absent: tuple[str, ...]
    mentioned: tuple[str, ...]


def normalize_text(text: str) -> str:
    """Folds case, underscores, hyphens and white space, as names of the taxonomy are, and drops "(...)" marks."""
    return normalize_name(re.sub(r"[()\"]", " ", text))


def _singular(words: str) -> Iterable[str]:
    """The words as they are, and what they may be the plural of."""
    yield words
    for ending, single in (("aces", "ax"), ("ies", "y"), ("es", ""), ("s", "")):
        if words.endswith(ending) and len(words) > len(ending) + 2:
            yield words[: -len(ending)] + single


@functools.lru_cache(maxsize=65536)
def _find(words: str) -> tuple[Label, bool] | None:
    """Returns the label of this name, and whether the name means it exactly."""
    taxonomy = load_taxonomy()
    for name in _singular(words):
        if label := taxonomy.find(name):
            return label, name not in {normalize_name(class_name) for class_name in label.class_names}
    return None


def find_labels(text: str) -> list[Mention]:
    """Returns the labels that a text names, whether it affirms or denies them, in their order; the longest name wins.

    Names are whole words and may be plurals; the text counts as `normalize_text` leaves it.
    """
    text = normalize_text(text)
    words = list(re.finditer(r"[^\s.,;:/?!]+", text))
    found, at = [], 0
    while at < len(words):
        for count in range(min(_MOST_WORDS, len(words) - at), 0, -1):
            start, end = words[at].start(), words[at + count - 1].end()
            if named := _find(text[start:end]):
                found.append(Mention(named[0], start, end, named[1]))
                at += count
                break
        else:
            at += 1
    return found


def _read_list(clause: str) -> tuple[list[Label], bool]:
    """Reads the findings behind a cue.

    Returns:
        (labels that are denied, whether the clause holds nothing but denied findings).
    """
    denied: list[Label] = []
    complete = True
    # "No effusion, no pneumothorax": the cue may be said again.
    items = [_CUE.sub("", f"{item.strip()} ", count=1).strip() for item in _SEPARATOR.split(clause)]
    for item in items:
        if not item:
            continue
        words = item.split()
        mentions = find_labels(item)
        if not mentions:
            if _PREPOSITIONS & set(words):
                return [], False  # it may narrow the whole list: "... or opacities in one lobe"
            complete &= len(words) <= _ITEM_WORDS and not _VERBS & set(words)
            if _NARROWING & set(words):
                # What follows may be narrowed too, what came before is not.
                return denied, complete
            continue
        label, before, after = mentions[0].label, item[: mentions[0].start], item[mentions[0].end :]
        if not set(before.split()) <= _HARMLESS:
            return denied, False
        if len(mentions) > 1 or not _TAIL.fullmatch(after) or label.granularity != "lesion":
            return [], False
        if mentions[0].exact:
            denied.append(label)
        else:
            complete = False
    return denied, complete


def _is_normal(text: str) -> bool:
    match = _NORMAL.fullmatch(text)
    words = (match["subject"] or match["thing"]).split() if match else []
    return 0 < len(words) <= _SUBJECT_WORDS and not {*words} & (_VERBS | _PREPOSITIONS - {"of"})


def read_sentence(sentence: str, modality: str = "unknown") -> Reading:
    """Reads what a sentence of a report says is absent.

    Only lesions become absent labels, and only those that the taxonomy expects in images of the modality: "edema" of a
    radiograph is not the retina's.

    Args:
        sentence: English, of one or several clauses.
        modality: one of `data_pipelines.schema.MODALITIES`; "unknown" expects everything.
    """
    text = normalize_text(sentence).strip(" .")
    denied: list[Label] = []
    only_denials = True
    doubtful = bool(_DOUBTS & set(re.findall(r"[^\s.,;:/?!]+", text))) or "?" in text
    start = 0
    for end in [*(match.start() for match in _CLAUSE_END.finditer(text)), len(text)]:
        clause = text[start:end].strip(" .;:")
        start = end
        cue = _CUE.search(clause + " ")
        if not clause:
            continue
        if cue is None or doubtful:
            only_denials = False
            continue
        labels, complete = _read_list(clause[cue.end() :])
        denied += labels
        only_denials &= complete and bool(labels) and cue.start() == 0
    mentions = find_labels(text)
    named = {mention.label.id for mention in mentions}
    expected = [label for label in denied if modality == "unknown" or modality in label.modalities]
    # Said to be absent and named again in the same sentence: once too often to be sure.
    count = {label.id: sum(m.label.id == label.id for m in mentions) for label in expected}
    absent = tuple(dict.fromkeys(label.id for label in expected if count[label.id] <= denied.count(label)))
    denied_ids = {label.id for label in denied if label.id in absent or label not in expected}
    if denied and only_denials and denied_ids == named:
        kind = "negation"
    elif _is_normal(text) and not any(mention.label.granularity == "lesion" for mention in mentions):
        kind = "normal"
    else:
        kind = ""
    return Reading(kind, absent, tuple(sorted(named - denied_ids)))


def combine(readings: Sequence[Reading]) -> tuple[str, ...]:
    """Returns the labels absent from an image: denied by a sentence, and by none named otherwise.

    A label also stays out if one that it holds is named, as "no polyp" beside "a hyperplastic polyp", or a more general
    finding that may be it, as "no pleural effusion" beside "small effusion".
    """
    taxonomy = load_taxonomy()
    mentioned = {label for reading in readings for label in reading.mentioned}
    implied = mentioned.union(*(taxonomy.ancestors(label) for label in mentioned))
    findings = {label for label in mentioned if taxonomy.labels[label].granularity == "lesion"}
    absent = dict.fromkeys(label for reading in readings for label in reading.absent)
    return tuple(label for label in absent if label not in implied and not findings & {*taxonomy.ancestors(label)})
