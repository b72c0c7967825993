"""Text to tokens: any Hugging Face fast tokenizer; the default is the project's own medical WordPiece vocabulary."""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import tokenizers

BUNDLED = pathlib.Path(__file__).with_name("tokenizer")
_REMEMBERED = 65536  # phrases whose number of tokens is kept, and words whose tokens are
_PAD_TOKENS = ("[PAD]", "<pad>", "<|endoftext|>")  # BERT, RoBERTa and T5, GPT-2


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A tokenised text.

    Attributes:
        ids: vocabulary rows, special tokens included.
        offsets: characters (start, end) of the text that each token stands for, half-open; (0, 0) for special tokens.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class TextTokenizer:
    """A fast tokenizer without truncation or padding; picklable, safe to use from several threads.

    Attributes:
        vocab_size: rows that an embedding table needs.
        pad_id: id of the padding token.
        num_leading, num_trailing: special tokens before and after a text ([CLS] and [SEP] in BERT).
        splits_at_spaces: whether the tokens of a text are those of its words one by one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]):
        """Takes over `tokenizer`; `config` is the content of its tokenizer_config.json.

        Raises:
            ValueError: it has no padding token, or no tokens but special ones.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._config = tokenizer, config
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        if not any(character.isalnum() for token in vocabulary.keys() - added for character in token):
            # transformers makes such a tokenizer of a folder that has only a config.json.
            raise ValueError("it has no tokens but special ones: the file of its vocabulary is missing")
        declared = config.get("pad_token")
        declared = declared["content"] if isinstance(declared, dict) else declared
        candidates = (tokenizer.token_to_id(token) for token in (declared, *_PAD_TOKENS) if token)
        self.pad_id = next((id_ for id_ in candidates if id_ is not None), -1)
        if self.pad_id < 0:
            raise ValueError("it has no padding token: name one as pad_token in its tokenizer_config.json")
        self.vocab_size = max(vocabulary.values()) + 1
        probe = tokenizer.encode("a")
        ids, special = probe.ids, probe.special_tokens_mask
        self.num_leading = special.index(0)
        self.num_trailing = special[::-1].index(0)
        self._leading, self._trailing = ids[: self.num_leading], ids[len(ids) - self.num_trailing :]
        self.splits_at_spaces = _splits_at_spaces(tokenizer)
        self._lengths: dict[str, int] = {}
        self._words: dict[str, tuple[list[int], list[tuple[int, int]]]] = {}
        self._parts: dict[str, dict[str, tuple[list[int], int]]] = {}

    def encode(self, text: str) -> Encoding:
        """Tokenises a text and adds the special tokens.

        Raises:
            ValueError: the text has lone surrogates.
        """
        if not self.splits_at_spaces:
            encoding = self._encode(text)
            return Encoding(encoding.ids, encoding.offsets)
        ids, offsets = self._encode_words(text)
        return Encoding(self.add_special(ids), [(0, 0)] * self.num_leading + offsets + [(0, 0)] * self.num_trailing)

    def add_special(self, ids: list[int]) -> list[int]:
        """Returns the tokens of a text with the special ones around them."""
        return self._leading + ids + self._trailing

    def encode_parts(self, phrases: Iterable[str], separator: str) -> list[tuple[list[int], int]]:
        """Returns for each phrase the tokens of it and a separator, and how many of them are of the phrase.

        Without special tokens; remembered, phrases come again. Where `splits_at_spaces`, the tokens of a prompt are
        those of its parts, if a space stands between them.
        """
        known = self._parts.setdefault(separator, {})
        return [known.get(phrase) or self._encode_part(phrase, separator, known) for phrase in phrases]

    def _encode_part(
        self, phrase: str, separator: str, known: dict[str, tuple[list[int], int]]
    ) -> tuple[list[int], int]:
        ids, offsets = self._encode_words(phrase + separator)
        if len(known) >= _REMEMBERED:
            known.clear()
        part = known[phrase] = ids, sum(start < len(phrase) for start, _ in offsets)
        return part

    def _encode_words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns tokens and offsets without special tokens, word by word.

        Prompts are made of the same words again and again, and encoding one takes longer than joining a hundred.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for word in text.split(" "):
            known = self._words.get(word) or self._encode_word(word, text)
            ids += known[0]
            offsets += [(first + start, last + start) for first, last in known[1]]
            start += len(word) + 1
        return ids, offsets

    def _encode_word(self, word: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            encoding = self._encode(word, add_special_tokens=False)
        except ValueError:
            encoding = self._encode(text)  # fails too, and its message shows all of the text
        if len(self._words) >= _REMEMBERED:
            self._words.clear()
        tokens = self._words[word] = encoding.ids, encoding.offsets
        return tokens

    def count(self, phrase: str) -> int:
        """Returns the number of tokens of a phrase, without special tokens; remembered, phrases come again."""
        length = self._lengths.get(phrase)
        if length is None:
            length = len(self._encode(phrase, add_special_tokens=False).ids)
            if len(self._lengths) >= _REMEMBERED:
                self._lengths.clear()
            self._lengths[phrase] = length
        return length

    def _encode(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # of tokenizers, which only says that it must be str
            raise ValueError(f"{text!r} is no valid Unicode text: where it comes from was not read as UTF-8") from None

    def save(self, directory: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, and for WordPiece the vocab.txt that older tools read."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        config = json.dumps(self._config, indent=1, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
        if json.loads(self._tokenizer.to_str())["model"]["type"] == "WordPiece":
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": {}, "_words": {}, "_parts": {}}


def _splits_at_spaces(tokenizer: tokenizers.Tokenizer) -> bool:
    """Tells whether the tokens of a text are those of its words one by one, as with BERT's own WordPiece."""
    content = json.loads(tokenizer.to_str())
    kinds = {name: (content.get(name) or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")}
    return kinds == {
        "normalizer": "BertNormalizer",
        "pre_tokenizer": "BertPreTokenizer",
        "model": "WordPiece",
    } and not any(" " in token["content"] or token["lstrip"] or token["rstrip"] for token in content["added_tokens"])


@functools.lru_cache(maxsize=8)
def load_tokenizer(name_or_dir: str = "") -> TextTokenizer:
    """Loads a tokenizer: "" is the bundled one; else a folder, or the name of a model on the Hugging Face hub.

    A folder with tokenizer.json is read as it is; anything else goes through transformers, and a name needs the network
    unless it is in the local cache.

    Raises:
        ValueError: there is no such tokenizer, it is no fast one, or it has no padding token or no vocabulary.
    """
    directory = pathlib.Path(name_or_dir) if name_or_dir else BUNDLED
    if not (directory / "tokenizer.json").is_file():
        return _load_with_transformers(name_or_dir)
    return _load_folder(directory, str(directory))


def _load_folder(directory: pathlib.Path, name: str) -> TextTokenizer:
    config = directory / "tokenizer_config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return TextTokenizer(tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")), content)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"the tokenizer {name!r} cannot be used: {error}") from error


def _load_with_transformers(name_or_dir: str) -> TextTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {name_or_dir!r}: expected a folder with tokenizer.json, or with its vocabulary and "
            f'config.json, a name on the Hugging Face hub, or "" for the bundled one ({error})'
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        if not os.path.isfile(os.path.join(directory, "tokenizer.json")):
            raise ValueError(f"{name_or_dir!r} has no fast tokenizer, and its offsets are needed: choose one that has")
        return _load_folder(pathlib.Path(directory), name_or_dir)
