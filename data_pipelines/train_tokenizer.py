"""Trains the bundled WordPiece vocabulary from the taxonomy; run it again when its labels have new words.

    python -m data_pipelines.train_tokenizer [--output DIR]

The words of the taxonomy and of short reports get a token each; any other word is spelled from pieces that many words
share and from single characters, so that no plain ASCII word of up to 100 characters becomes [UNK]. The same taxonomy
gives the same files.
"""

import argparse
import collections
import string
import sys
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data_pipelines.schema import MODALITIES
from data_pipelines.taxonomy import FOLDER, load_taxonomy
from data_pipelines.tokenization import BUNDLED, TextTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PREFIX = "##"  # of a piece that goes on with a word
_LEAST_USES = 4  # words that share a piece
_LONGEST_PIECE = 8  # characters
_MOST_PIECES = 192  # the vocabulary has to stay below the 1,024 rows of configs/demo.py
_CONFIG = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "model_max_length": 256,
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

# What findings and referring phrases are made of, beside the names of the taxonomy.
REPORT_WORDS_FILE = FOLDER / "report_words.txt"


def corpus() -> Iterable[str]:
    """Yields the texts that the vocabulary comes from."""
    yield from load_taxonomy().phrases()
    yield from MODALITIES
    yield REPORT_WORDS_FILE.read_text(encoding="utf-8")


def _frequent_pieces(words: Sequence[str]) -> list[str]:
    """Returns the endings and middles of words ("##itis") that many of them share, without those that others contain.

    A piece that only ever occurs inside one longer piece would never be used, so it is left out.
    """
    uses = collections.Counter(
        word[start : start + length]
        for word in words
        for length in range(2, _LONGEST_PIECE + 1)
        for start in range(1, len(word) - length + 1)
    )
    frequent = {piece: count for piece, count in uses.items() if count >= _LEAST_USES and piece.isalpha()}
    longer = {
        part for piece, count in frequent.items() for part in (piece[1:], piece[:-1]) if frequent.get(part) == count
    }
    kept = [piece for piece in frequent if piece not in longer]
    # What a piece saves is its length in each of its words.
    return sorted(sorted(kept, key=lambda piece: (-len(piece) * frequent[piece], piece))[:_MOST_PIECES])


def train_tokenizer(texts: Iterable[str]) -> TextTokenizer:
    """Returns a lower-casing BERT tokenizer whose vocabulary has every word of the texts.

    Not `tokenizers.trainers`: its merges depend on the order of a hash map, and so differ from run to run.

    Args:
        texts: phrases and words.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    characters = sorted({c for c in string.printable if not c.isspace() and not c.isupper()} | set("".join(words)))
    pieces = [_PREFIX + piece for piece in (*characters, *_frequent_pieces(words))]
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *characters, *words, *pieces])
    vocabulary = {token: place for place, token in enumerate(tokens)}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    ends = [(token, vocabulary[token]) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return TextTokenizer(tokenizer, dict(_CONFIG))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tokenizer; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trains the bundled WordPiece vocabulary from the taxonomy.")
    parser.add_argument("--output", default=str(BUNDLED), help="folder to write to; default: the bundled one")
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer(corpus())
    tokenizer.save(options.output)
    print(f"{tokenizer.vocab_size} tokens written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
