"""Articles, plurals and numbers of the phrases in generated sentences; what has no sure form gets none."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_IRREGULAR = {"nucleus": "nuclei", "metastasis": "metastases", "focus": "foci", "vertebra": "vertebrae"}
# Words that take neither "a" nor a number.
_MASS = frozenset({"ascites", "atelectasis", "drusen", "edema", "epithelium", "fluid", "mucosa", "tissue"})
_MASS_ENDINGS = ("itis", "losis", "brosis", "emphysema", "pneumonia", "megaly")  # of diseases
_UNSURE = frozenset({"of", "and", "or", "with", "in"})
_LIKE_YOU = ("uni", "ur", "us", "ute")  # begin with a consonant to the ear


def is_countable(phrase: str) -> bool:
    """Says whether "a" and numbers go with a phrase; "of", "and" and the like make its head unsure, so they do not."""
    words = phrase.lower().split()
    head = words[-1]
    mass = head in _MASS or head.endswith(_MASS_ENDINGS)
    plural_already = head.endswith("s") and not head.endswith(("ss", "us", "is"))
    return head[-1].isalpha() and not (mass or plural_already or _UNSURE & {*words})


def with_article(phrase: str) -> str:
    """Returns the phrase with "a" or "an", or alone where it is not countable."""
    if not is_countable(phrase):
        return phrase
    first = phrase.lower()
    vowel = first[0] in "aeio" or (first[0] == "u" and not first.startswith(_LIKE_YOU))
    return f"{'an' if vowel else 'a'} {phrase}"


def pluralize(phrase: str) -> str:
    """Returns the plural of a countable phrase, "" where it has no sure one."""
    if not is_countable(phrase):
        return ""
    *before, head = phrase.split()
    if head.lower() in _IRREGULAR:
        return " ".join((*before, _IRREGULAR[head.lower()]))
    if head.endswith(("us", "is", "x", "a", "um", "on")) and not head.endswith(("ion", "oma")):
        return ""  # Greek and Latin: "pneumothorax", "thrombus", "vena cava"
    if head.endswith("y") and head[-2:-1] not in "aeiou":
        head = f"{head[:-1]}ies"
    else:
        head += "es" if head.endswith(("s", "sh", "ch", "z")) else "s"
    return " ".join((*before, head))
