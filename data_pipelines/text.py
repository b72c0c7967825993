"""The text side of the pipeline under one name: tokens, prompts, their sampling in training, and mirrored words."""

from data_pipelines.prompt_sampling import PromptRule, sample_prompt
from data_pipelines.prompts import (
    Prompt,
    PromptTooLong,
    build_caption_prompt,
    build_prompt,
    build_prompts,
    make_prefix,
    order_by_body_region,
    split_phrases,
    strip_phrase,
)
from data_pipelines.sides import swap_sides, swap_sides_with_spans
from data_pipelines.tokenization import Encoding, TextTokenizer, load_tokenizer
from data_pipelines.vocabulary import Vocabulary, make_vocabularies

__all__ = [
    "Encoding",
    "Prompt",
    "PromptRule",
    "PromptTooLong",
    "TextTokenizer",
    "Vocabulary",
    "build_caption_prompt",
    "build_prompt",
    "build_prompts",
    "load_tokenizer",
    "make_prefix",
    "make_vocabularies",
    "order_by_body_region",
    "sample_prompt",
    "split_phrases",
    "strip_phrase",
    "swap_sides",
    "swap_sides_with_spans",
]
