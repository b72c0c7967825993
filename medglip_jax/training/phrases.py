"""The phrases whose text features a run of prompt tuning learns (`config.finetune.phrases`)."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from data_pipelines.text import load_tokenizer, split_phrases, strip_phrase

Config = ConfigDict | FrozenConfigDict

_FILE = ".txt"


def learned_phrases(config: Config) -> list[str]:
    """Returns the phrases that `config.finetune.phrases` means.

    Args:
        config: a recipe; reads `finetune.phrases`, and `data.train` where that is "": then they are all phrases that
            stand in the metadata of the records, in the order of the alphabet.

    Raises:
        ValueError: there are none, or one is empty.
        OSError: the file, or the records, cannot be read.
    """
    given = config.finetune.phrases
    if given.endswith(_FILE):
        lines = pathlib.Path(given).read_text(encoding="utf-8").splitlines()
        phrases = [line.strip() for line in lines if line.strip()]
    elif given:
        phrases = split_phrases(given)
    else:
        from data_pipelines.records import find_all_shards

        if not config.data.train:
            raise ValueError(
                "config.finetune.mode is prompt, but there are no phrases: set config.finetune.phrases, or "
                "config.data.train, whose phrases are taken"
            )
        phrases = sorted(
            {phrase for split in find_all_shards(config.data.train) for phrase in split.metadata["phrases"]}
        )
    if not phrases:
        raise ValueError(f"config.finetune.phrases: {given or config.data.train} holds no phrases")
    return phrases


def make_offsets(config: Config) -> dict[str, Any]:
    """Returns the subtree `prompt` (see `model.text_offsets`) of a new run: offsets of 0.

    Phrases that are the same tokens share their offsets.

    Args:
        config: a recipe; reads `finetune.phrases`, `data.train`, `data.tokenizer` and `model.bert.hidden_size`.

    Raises:
        ValueError: see `learned_phrases`; or the tokenizer has no tokens for a phrase, or those of a phrase depend on
            what stands before it.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if not tokenizer.splits_at_spaces:
        raise ValueError(
            f"config.finetune.mode is prompt, but the tokens that config.data.tokenizer {config.data.tokenizer!r} "
            "gives a phrase depend on what stands before it: use a BERT WordPiece tokenizer"
        )
    rows = []
    for phrase in map(strip_phrase, learned_phrases(config)):
        ((ids, count),) = tokenizer.encode_parts([phrase], "")
        if not count:
            raise ValueError(f"config.finetune.phrases: the tokenizer keeps nothing of {phrase!r}: leave it out")
        rows.append(tuple(ids))
    rows = list(dict.fromkeys(rows))
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return {
        "offsets": jnp.zeros((*tokens.shape, config.model.bert.hidden_size)),
        "tokens": jnp.asarray(tokens),
        "boundaries": jnp.asarray(tokenizer.encode(". :").ids, jnp.int32),
    }
