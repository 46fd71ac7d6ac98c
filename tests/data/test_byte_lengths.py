"""The bytes of the tokens are those of the text, for any text. A tokenizer for which they are not has no table."""

import json
import random
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from trainyard.contract.tokenizer_info import SpecialTokens
from trainyard.worker.data.byte_lengths import ByteLengths, BytesUnknown
from trainyard.worker.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "The cat sat on the mat, and the dog ran over the hill. " * 3,
    "今天天气很好,我们去公园散步。机器学习模型需要大量的数据。" * 3,
    "\U0001f600 \U0001f469\u200d\U0001f4bb emoji \U0001f680\U0001f680 naïve café über 日本語 한국어",
    "  two  spaces\n\n\ttabs\r\nand 12,345.678 digits",
]


def split_and_bytes() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)])


def byte_level(normalizer: Any = None, pre_tokenizer: Any = None) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback(normalizer: Any, pre_tokenizer: Any = None) -> tokenizers.Tokenizer:
    """A vocabulary of ASCII words, and a few Chinese ones: everything else falls back to bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=MARKS, limit_alphabet=60, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS[0], TEXTS[0], TEXTS[1][:12]], trainer)
    described = json.loads(tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    described["model"] |= {"byte_fallback": True, "unk_token": MARKS[0], "fuse_unk": True}
    fallback = tokenizers.Tokenizer.from_str(json.dumps(described))
    if pre_tokenizer is not None:
        fallback.pre_tokenizer = pre_tokenizer
    return fallback


def with_words(tokenizer: tokenizers.Tokenizer, **flags: bool) -> tokenizers.Tokenizer:
    tokenizer.add_tokens([AddedToken(word, **flags) for word in ("<think>", "词语", "é")])
    return tokenizer


prepend = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])

EXACT: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": byte_level,
    "qwen": lambda: byte_level(normalizers.NFC(), split_and_bytes()),
    "words": lambda: with_words(byte_level()),
    "llama2": lambda: byte_fallback(prepend),
    "llama2 with words": lambda: with_words(byte_fallback(prepend), normalized=False),
    "gemma": lambda: byte_fallback(
        normalizers.Replace(" ", "\u2581"), pre_tokenizers.Split(" ", "merged_with_previous")
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizers")
    for name, make in EXACT.items():
        save(make(), root / name)
    train_tokenizer(TEXTS, 400, root / "own")
    return root


def save(tokenizer: tokenizers.Tokenizer, path: Path) -> Path:
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": MARKS[1], "eos_token": MARKS[2], "pad_token": MARKS[0]}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


@cache
def loaded(path: str, special_tokens: SpecialTokens = "text") -> tuple[Tokenizer, ByteLengths]:
    tokenizer = load_tokenizer(path, special_tokens)
    return tokenizer, tokenizer.byte_lengths()


def counted(path: str, text: str, special_tokens: SpecialTokens = "text") -> int:
    tokenizer, lengths = loaded(path, special_tokens)
    (ids,) = tokenizer.encode_batch([text])
    return lengths.of_document([tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id])


def nasty_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    parts = ["中文", "词语", "한국", "\U0001f600", "\U0001f469\u200d\U0001f4bb", "\U0001f1e9\U0001f1ea", "é", "ü", "ﬁ"]
    parts += ["\u0928\u092e\u0938\u094d", "\u2028", "the cat", " ", "  ", "\n", "\t", "123", ".", "a_b"]
    parts += ["<think>", "<|im_end|>"]
    return ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", ["byte", "own", *EXACT])
def test_the_bytes_of_the_tokens_are_those_of_the_text(name: str, folder: Path) -> None:
    path = name if name == "byte" else str(folder / name)
    seed = random.randrange(2**32)
    print("seed", seed)
    for text in (*TEXTS, *nasty_texts(seed, 300)):
        normal = unicodedata.normalize("NFC", text) if name == "qwen" else text
        assert counted(path, text) == len(normal.encode()), repr(text)
    tokenizer, lengths = loaded(path)
    assert len(lengths.lengths) == tokenizer.vocab_size
    assert {int(lengths.lengths[i]) for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)} == {0}


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@pytest.mark.parametrize("name", ["byte", "own", "gpt2", "llama2", "gemma"])
def test_any_text(name: str, folder: Path, text: str) -> None:
    if text:
        assert counted(name if name == "byte" else str(folder / name), text) == len(text.encode())


@pytest.mark.parametrize("name", ["byte", "own", "llama2"])
def test_special_tokens_in_a_text_count_no_bytes_if_they_are_read_as_tokens(name: str, folder: Path) -> None:
    path = name if name == "byte" else str(folder / name)
    text = "a 中<|im_end|>b<|im_start|><|im_end|> c"
    assert counted(path, text, "tokens") == len("a 中b c".encode())
    assert counted(path, text, "text") == len(text.encode())


def without_a_byte() -> tokenizers.Tokenizer:
    described = json.loads(byte_level().to_str())
    letter = sorted(pre_tokenizers.ByteLevel.alphabet())[5]
    number = described["model"]["vocab"].pop(letter)
    described["model"]["vocab"]["unused"] = number
    described["model"]["merges"] = [pair for pair in described["model"]["merges"] if letter not in "".join(pair)]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def word_level() -> tokenizers.Tokenizer:
    vocabulary = {word: number for number, word in enumerate([*MARKS, "the", "cat"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=MARKS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def without_fallback() -> tokenizers.Tokenizer:
    tokenizer = byte_fallback(prepend)
    described = json.loads(tokenizer.to_str())
    described["model"]["byte_fallback"] = False
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme)


INEXACT: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "prefix space": (lambda: byte_level(None, pre_tokenizers.ByteLevel()), "pre-tokenizer ByteLevel"),
    "lower case": (lambda: byte_level(normalizers.Lowercase()), "normalizer Lowercase"),
    "words": (word_level, "pre-tokenizer Whitespace"),
    "removed": (
        lambda: byte_level(None, pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), split_and_bytes()])),
        "pre-tokenizer Split",
    ),
    "lacks a byte": (without_a_byte, "lacks some of the 256 bytes"),
    "no fallback": (without_fallback, "unknown token"),
    "metaspace first": (lambda: byte_fallback(normalizers.NFC(), metaspace("first")), "pre-tokenizer Metaspace"),
    "normalized words": (lambda: with_words(byte_fallback(prepend), normalized=True), "with a space before it"),
    "strips": (lambda: with_words(byte_level(), lstrip=True), "takes in white space"),
}


@pytest.mark.parametrize("name", INEXACT)
def test_a_tokenizer_whose_tokens_do_not_give_the_bytes_is_refused(name: str, tmp_path: Path) -> None:
    make, reason = INEXACT[name]
    tokenizer = load_tokenizer(str(save(make(), tmp_path / "tok")))
    with pytest.raises(BytesUnknown, match=reason):
        tokenizer.byte_lengths()


def test_an_unforeseen_rule_is_found_by_the_probes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(folder / "gpt2"))
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [ids[:-1] for ids in encode(texts)])
    with pytest.raises(BytesUnknown, match="other bytes"):
        tokenizer.byte_lengths()
