"""Texts of a training example other than prompts: one sentence about the image, or one about each of some regions.

Made after mirroring, as prompts are, so that sides in them are those that the model sees.
"""

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.prompts import build_caption_prompt, make_prefix
from data_pipelines.schema import GroundingExample
from data_pipelines.sentences import describe_regions, find_nouns, generate_sentences
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.tokenization import TextTokenizer
from data_pipelines.transforms import scale_boxes
from data_pipelines.vocabulary import body_regions

TEXTS = ("prompts", "captions", "descriptions", "none")  # config.data.text
_NAMELESS = "a medical image"
_MOST_DENIED = 3  # absent labels in a sentence


def write_caption(example: GroundingExample, rng: np.random.Generator) -> str:
    """Returns a sentence about an image that is true of it.

    The first that there is: its own caption; one of its expressions that ground to something; a sentence made of all of
    its regions; another of its expressions, which deny something; a sentence that denies absent labels; the words for
    its modality.
    """
    if caption := example.caption.strip():
        return caption
    found = [expression.text for expression in example.expressions if expression.regions]
    if found:
        return found[int(rng.integers(len(found)))]
    if described := describe_regions(example, rng)[0]:
        return described
    if example.expressions:
        return example.expressions[int(rng.integers(len(example.expressions)))].text
    if example.absent:
        taxonomy = load_taxonomy()
        drawn = [example.absent[i] for i in rng.permutation(len(example.absent))[:_MOST_DENIED]]
        known = [(label, taxonomy.find(label)) for label in drawn]
        return " and ".join(f"no {entry.name if entry else label.replace('_', ' ')}" for label, entry in known)
    return make_prefix(example.modality).rstrip(": ") or _NAMELESS


def describe_each(example: GroundingExample, rng: np.random.Generator) -> list[tuple[int, str]]:
    """Writes a description of each region that one can be written of: (place of the region, text).

    It is one of the example's expressions that ground to that region alone, where there is one. Else it is its phrase,
    where that is surely said of no other region, or one of `generate_sentences` about it alone. Crowds have none.
    """
    stored: dict[int, list[str]] = {}
    for expression in example.expressions:
        if len(expression.regions) == 1:
            stored.setdefault(expression.regions[0], []).append(expression.text)
    made: dict[int, list[str]] = {}
    if len(stored) < len(example.regions):
        for noun in find_nouns(example.regions):
            if noun.sure and len(noun.regions) == 1 and noun.phrase:
                made.setdefault(noun.regions[0], []).append(noun.phrase)
        for expression in generate_sentences(example):
            if len(expression.regions) == 1:
                made.setdefault(expression.regions[0], []).append(expression.text)
    described = []
    for place, region in enumerate(example.regions):
        if not region.iscrowd and (texts := stored.get(place) or made.get(place)):
            described.append((place, texts[int(rng.integers(len(texts)))]))
    return described


@dataclasses.dataclass(frozen=True)
class TextRule:
    """Writes the texts of training examples; the fields of `config.data` with these names.

    Attributes:
        text: captions, descriptions or none.
        max_tokens: length L of a text, special tokens included; what is longer is cut.
        max_descriptions: R, most regions of an image that are described.
        prefix_probability: how often a caption begins with modality and body region ("chest x-ray: ").
    """

    text: str
    max_tokens: int
    max_descriptions: int
    prefix_probability: float

    @classmethod
    def from_config(cls, data: ConfigDict) -> "TextRule | None":
        """Reads the fields of `config.data`; None where its texts are prompts.

        Raises:
            ValueError: one cannot be used; the message names it.
        """
        if data.text not in TEXTS:
            raise ValueError(f"config.data.text is {data.text!r}: there are {', '.join(TEXTS)}")
        if data.max_descriptions < 1:
            raise ValueError(f"config.data.max_descriptions is {data.max_descriptions}: it must be 1 or more")
        if not 0 <= data.prefix_probability <= 1:
            raise ValueError(f"config.data.prefix_probability is {data.prefix_probability}: it must be from 0 to 1")
        if data.text == TEXTS[0]:
            return None
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls)})

    def __call__(
        self,
        example: GroundingExample,
        rng: np.random.Generator,
        tokenizer: TextTokenizer,
        scales: tuple[float, float],
    ) -> dict[str, Any]:
        """Returns what a row of the batch has of texts.

        Args:
            example: mirrored, if its pixels are.
            rng: draws among the texts.
            tokenizer: makes the tokens.
            scales: canvas pixels per pixel of the image, (y, x).

        Returns:
            Of captions input_ids and attention_mask int32[L]; of descriptions int32[R, L], with boxes float32[R, 4] in
            pixels of the canvas, half-open, and box_mask bool[R]; nothing of none.
        """
        if self.text == "none":
            return {}
        if self.text == "captions":
            prefix = make_prefix(example.modality, body_regions(example))
            prefixed = rng.random() < self.prefix_probability
            return self._tokenize(write_caption(example, rng), tokenizer, prefix if prefixed else "")
        described = describe_each(example, rng)
        described = [described[i] for i in rng.permutation(len(described))[: self.max_descriptions]]
        empty = {"input_ids": tokenizer.pad_id, "attention_mask": 0}
        row = {name: np.full((self.max_descriptions, self.max_tokens), x, np.int32) for name, x in empty.items()}
        boxes = np.zeros((self.max_descriptions, 4), np.float32)
        for place, (region, text) in enumerate(described):
            for name, tokens in self._tokenize(text, tokenizer).items():
                row[name][place] = tokens
            boxes[place] = scale_boxes(example.regions[region].box, scales)
        return row | {"boxes": boxes, "box_mask": np.arange(self.max_descriptions) < len(described)}

    def _tokenize(self, text: str, tokenizer: TextTokenizer, prefix: str = "") -> dict[str, np.ndarray]:
        prompt = build_caption_prompt(text, [], tokenizer, self.max_tokens, prefix)
        return {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
