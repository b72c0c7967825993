import concurrent.futures
import json
import os
import pathlib
import pickle
import shutil
import socket
import string
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import data_pipelines
from data_pipelines import tokenization
from data_pipelines.schema import MODALITIES
from data_pipelines.taxonomy import load_taxonomy
from data_pipelines.text import PromptTooLong, build_caption_prompt, build_prompt, build_prompts
from data_pipelines.tokenization import BUNDLED, TextTokenizer, load_tokenizer
from data_pipelines.train_tokenizer import REPORT_WORDS_FILE, SPECIAL_TOKENS, corpus, train_tokenizer

TOKENIZER = load_tokenizer()
VOCABULARY = (BUNDLED / "vocab.txt").read_text(encoding="utf-8").splitlines()
PAD, UNK, CLS, SEP, MASK = map(VOCABULARY.index, SPECIAL_TOKENS)
REPORT = "Left-sided pleural EFFUSION (2.5 cm); no pneumothorax, see Übersicht."


def byte_level_bpe(directory: pathlib.Path, special_tokens: list[str], **config) -> str:
    """Writes a tokenizer as GPT-2's: no [CLS], no [SEP], words with the space before them; returns its folder."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_taxonomy().phrases(), trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> TextTokenizer:
    return load_tokenizer(byte_level_bpe(tmp_path_factory.mktemp("bpe"), ["<|endoftext|>"]))


@pytest.fixture
def no_network(monkeypatch):
    """Makes every connection fail, and tells huggingface_hub not to try."""

    def refuse(*unused_arguments, **unused_options):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_bundled_tokenizer_loads_without_network_or_transformers(no_network):
    script = "import sys, data_pipelines.text as text; text.load_tokenizer(); assert 'transformers' not in sys.modules"
    root = pathlib.Path(data_pipelines.__path__[0]).parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)
    assert load_tokenizer.__wrapped__("").encode(REPORT) == TOKENIZER.encode(REPORT)


def test_bundled_vocabulary_has_as_many_tokens_as_rows():
    tokens = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert sorted(tokens.values()) == list(range(TOKENIZER.vocab_size))
    assert [token for token, _ in sorted(tokens.items(), key=lambda item: item[1])] == VOCABULARY
    assert (TOKENIZER.pad_id, TOKENIZER.num_leading, TOKENIZER.num_trailing) == (PAD, 1, 1)


def test_training_again_gives_the_bundled_files_byte_for_byte(tmp_path):
    command = [sys.executable, "-m", "data_pipelines.train_tokenizer", "--output", str(tmp_path / "again")]
    root = pathlib.Path(data_pipelines.__path__[0]).parent
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    printed = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.startswith(f"{TOKENIZER.vocab_size} tokens written to")
    written = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert written == {path.name: path.read_bytes() for path in BUNDLED.iterdir()}


def test_every_word_of_the_taxonomy_and_of_reports_is_one_token():
    splitter = pre_tokenizers.BertPreTokenizer()
    for text in (*load_taxonomy().phrases(), *MODALITIES, REPORT_WORDS_FILE.read_text(encoding="utf-8")):
        words = [word.lower() for word, _ in splitter.pre_tokenize_str(text)]
        assert TOKENIZER.encode(text).ids == [CLS, *map(VOCABULARY.index, words), SEP]
        assert UNK not in TOKENIZER.encode(text).ids


printable = "".join(c for c in string.printable if not c.isspace())


@given(
    st.one_of(st.text(printable, min_size=1, max_size=100), st.text(string.ascii_letters, min_size=90, max_size=100))
)
def test_printable_ascii_is_never_unknown(word):
    encoding = TOKENIZER.encode(word)
    assert UNK not in encoding.ids
    spelled = "".join(VOCABULARY[id_].removeprefix("##") for id_ in encoding.ids[1:-1])
    assert spelled == word.lower()


def test_case_and_accents_do_not_matter():
    assert TOKENIZER.encode("Épanchement PLEURAL").ids == TOKENIZER.encode("epanchement pleural").ids


def test_offsets_are_the_characters_of_each_token():
    encoding = TOKENIZER.encode(REPORT)
    words = [REPORT[start:end] for start, end in encoding.offsets]
    assert words[:3] == ["", "Left", "-"] and words[-1] == ""
    assert {"pleural", "EFFUSION", ";", "pneumothorax"} <= set(words)
    assert "".join(words) == REPORT.replace(" ", "")


def test_unknown_word_is_spelled_from_an_ending_that_many_words_share():
    tokenizer = train_tokenizer(["gastritis colitis arthritis neuritis"])
    assert tokenizer._tokenizer.encode("xitis").tokens == ["[CLS]", "x", "##itis", "[SEP]"]


def test_order_of_the_texts_does_not_matter():
    texts = list(corpus())
    tokenizer = train_tokenizer(reversed(texts))
    assert tokenizer._tokenizer.to_str() == TOKENIZER._tokenizer.to_str()


def test_transformers_reads_the_bundled_folder_the_same_way():
    theirs = AutoTokenizer.from_pretrained(BUNDLED)
    assert len(theirs) == TOKENIZER.vocab_size
    assert theirs.pad_token_id == TOKENIZER.pad_id
    for text in (*load_taxonomy().phrases(), REPORT, "", "日本 a\u0301 \x00 x"):
        encoding = theirs(text, return_offsets_mapping=True)
        assert encoding["input_ids"] == TOKENIZER.encode(text).ids
        assert encoding["offset_mapping"] == TOKENIZER.encode(text).offsets


def test_folder_with_only_a_vocabulary_and_a_config_works(tmp_path, no_network):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    shutil.copy(BUNDLED / "vocab.txt", tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == TOKENIZER.vocab_size
    assert (tokenizer.pad_id, tokenizer.num_leading, tokenizer.num_trailing) == (PAD, 1, 1)
    for text in (*load_taxonomy().phrases(), REPORT):
        assert tokenizer.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
def test_folder_without_a_vocabulary_is_an_error_not_all_unknown(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    with pytest.raises(ValueError, match=f"{tmp_path.name}' cannot be used: .* the file of its vocabulary is missing"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_offsets_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "canine"}')
    with pytest.raises(ValueError, match="has no fast tokenizer, and its offsets are needed"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "not a name!", "folder/that/is/missing"])
def test_unknown_name_is_an_error_that_says_what_is_expected(name, no_network):
    with pytest.raises(ValueError, match=f"no tokenizer '{name}': expected a folder with tokenizer.json, or"):
        load_tokenizer(name)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "Odd"}}'])
def test_damaged_tokenizer_file_is_an_error_that_names_its_folder(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"the tokenizer '.*{tmp_path.name}' cannot be used"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_a_padding_token_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no padding token: name one as pad_token in its tokenizer_config"):
        load_tokenizer(byte_level_bpe(tmp_path, ["<s>"]))


@pytest.mark.parametrize("declared", ["<blank>", {"content": "<blank>", "lstrip": False}])
def test_declared_padding_token_comes_before_the_usual_ones(tmp_path, declared):
    tokenizer = load_tokenizer(byte_level_bpe(tmp_path, ["<pad>", "<blank>"], pad_token=declared))
    assert tokenizer.pad_id == 1


@pytest.mark.parametrize("usual", ["[PAD]", "<pad>", "<|endoftext|>"])
def test_usual_padding_tokens_need_no_declaration(tmp_path, usual):
    assert load_tokenizer(byte_level_bpe(tmp_path, ["<other>", usual])).pad_id == 1


def test_prompts_of_a_tokenizer_without_special_tokens(bpe):
    assert (bpe.num_leading, bpe.num_trailing, bpe.pad_id) == (0, 0, 0)
    names = ["left lung", "Œdème", "nodule", "left lung", "肺"]
    prompt = build_prompt(names, bpe, 64)
    encoding = bpe.encode(prompt.text)
    assert prompt.attention_mask.sum() == len(encoding.ids)
    start = 0
    for row, name in zip(prompt.positive_map, names, strict=True):
        characters = {c for place in np.flatnonzero(row) for c in range(*encoding.offsets[place])}
        assert characters == {start + place for place, character in enumerate(name) if character != " "}
        np.testing.assert_allclose(row[row > 0], 1 / (row > 0).sum(), rtol=1e-6)
        start += len(name) + 2
    overlap = (prompt.positive_map > 0).sum(axis=0)
    separators = [place for place, (start, end) in enumerate(encoding.offsets) if prompt.text[start:end] == "."]
    assert overlap.max() == 1 and len(separators) == 4 and not overlap[separators].any()


@given(
    st.lists(st.sampled_from([*load_taxonomy().phrases(), "x-ray 肺"]), min_size=1, max_size=12), st.integers(24, 60)
)
def test_chunks_of_a_tokenizer_that_counts_words_with_their_space_fit(bpe, names, max_tokens):
    prompts = build_prompts(names, bpe, max_tokens)
    assert [place for _, places in prompts for place in places] == list(range(len(names)))
    for prompt, places in prompts:
        assert prompt.phrases == tuple(names[place] for place in places)
        np.testing.assert_allclose(prompt.positive_map.sum(axis=1), 1, rtol=1e-6)


def test_cut_sentence_keeps_the_special_tokens_that_the_tokenizer_has(tmp_path, bpe):
    folder = byte_level_bpe(tmp_path, ["<pad>", "</s>"])
    ending = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    ending.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = TextTokenizer(ending, {})
    assert (t5.num_leading, t5.num_trailing) == (0, 1)
    for tokenizer, tail in ((t5, [1]), (bpe, []), (TOKENIZER, [SEP])):
        ids = tokenizer.encode(REPORT).ids
        prompt = build_caption_prompt(REPORT, [[(0, 4)]], tokenizer, 8)
        assert prompt.input_ids.tolist() == ids[: 8 - len(tail)] + tail
        with pytest.raises(PromptTooLong, match="'pneumothorax' fell off"):
            start = REPORT.index("pneumothorax")
            build_caption_prompt(REPORT, [[(0, 4)], [(start, start + 12)]], tokenizer, 8)


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode(REPORT) == TOKENIZER.encode(REPORT)


def test_saved_tokenizer_is_the_same_when_loaded(tmp_path, bpe):
    for tokenizer, names in (
        (TOKENIZER, {"tokenizer.json", "tokenizer_config.json", "vocab.txt"}),
        (bpe, {"tokenizer.json", "tokenizer_config.json"}),
    ):
        folder = tmp_path / f"{tokenizer.vocab_size}" / "deep"
        tokenizer.save(folder)
        assert {path.name for path in folder.iterdir()} == names
        loaded = load_tokenizer(str(folder))
        assert (loaded.vocab_size, loaded.pad_id) == (tokenizer.vocab_size, tokenizer.pad_id)
        assert loaded.encode(REPORT) == tokenizer.encode(REPORT)


def test_count_is_the_number_of_tokens_without_special_ones(bpe):
    for phrase in ["left lung", "x", "", REPORT, "left lung"]:
        assert TOKENIZER.count(phrase) == len(TOKENIZER.encode(phrase).ids) - 2
        assert bpe.count(phrase) == len(bpe.encode(phrase).ids)


@given(
    st.text(st.sampled_from(" \t\x1f\u2003\u0301.-aZßΣ中é7") | st.characters(exclude_categories=["Cs"]), max_size=12)
)
def test_text_is_encoded_as_by_the_tokenizers_library(text):
    for each in (text, f"[SEP] {text}[MASK] lung"):
        whole = TOKENIZER._tokenizer.encode(each)
        encoding = TOKENIZER.encode(each)
        assert (encoding.ids, encoding.offsets) == (whole.ids, whole.offsets)


def test_remembered_words_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(tokenization, "_REMEMBERED", 3)
    tokenizer = load_tokenizer.__wrapped__("")
    tokenizer.encode(REPORT)
    assert 0 < len(tokenizer._words) <= 3
    assert pickle.loads(pickle.dumps(tokenizer))._words == {}


def test_remembered_counts_do_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(tokenization, "_REMEMBERED", 3)
    tokenizer = load_tokenizer.__wrapped__("")
    for length in [*range(9), *range(9)]:
        assert tokenizer.count("lung " * length) == length
        assert len(tokenizer._lengths) <= 3


def test_tokenizer_travels_to_workers_without_what_it_remembers():
    TOKENIZER.count("left lung")
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy._lengths == {}
    assert copy.encode(REPORT) == TOKENIZER.encode(REPORT)
    attributes = ("vocab_size", "pad_id", "num_leading", "num_trailing")
    assert [getattr(copy, name) for name in attributes] == [getattr(TOKENIZER, name) for name in attributes]
    assert TOKENIZER._lengths["left lung"] == 2


def test_threads_share_a_tokenizer(monkeypatch):
    monkeypatch.setattr(tokenization, "_REMEMBERED", 8)
    phrases = load_taxonomy().phrases() * 4
    expected = [(TOKENIZER.encode(phrase), TOKENIZER.count(phrase)) for phrase in phrases]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda phrase: (TOKENIZER.encode(phrase), TOKENIZER.count(phrase)), phrases)) == expected


def test_text_that_is_no_unicode_is_an_error_that_shows_it():
    for tokenize in (TOKENIZER.encode, TOKENIZER.count):
        with pytest.raises(ValueError, match=r"'m\\udce9lanome' is no valid Unicode text"):
            tokenize("m\udce9lanome")


def test_same_name_is_loaded_once():
    assert load_tokenizer("") is load_tokenizer("")
