"""Tokenizers: text to token ids and back, and the command that trains a tokenizer.

With ``data.special_tokens: "text"``, corpus text is encoded as plain text: ``<|im_end|>`` in a document becomes the
tokens of its ten characters, never the control token. With ``"tokens"`` it becomes the control token, as in MiniMind.
Added tokens that are not special (``<think>``) are words, and always match. The corpus builder adds BOS and EOS by id.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainyard.contract.corpus_files import shown
from trainyard.contract.rundir import write_atomically
from trainyard.contract.stdio import run_command
from trainyard.contract.tokenizer_info import (
    BYTE,
    BYTE_FINGERPRINT,
    BYTE_VOCABULARY,
    SPECIAL_TOKENS,
    SpecialTokens,
    TokenizerInfo,
    TokenizerInvalid,
    special_pattern,
    tokenizer_file,
)
from trainyard.contract.units import counted
from trainyard.worker.data.byte_lengths import ByteLengths, byte_lengths_of_bytes, byte_lengths_of_file
from trainyard.worker.data.jsonl import DataInvalid, Document
from trainyard.worker.data.readers import Reader, open_reader

Ids = npt.NDArray[np.uint32]

PAD, BOS, EOS = range(3)
"""Ids of the special tokens of the byte tokenizer, and of the tokenizers trained here."""


MAX_WORD = 1000
LONG_WORD = re.compile(rf"\S{{{MAX_WORD}}}|\s{{{MAX_WORD}}}")

PROGRESS_SECONDS = 5.0


class Tokenizer(Protocol):
    """Encodes and decodes text. ``vocab_size`` is the highest id + 1."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    bos: str
    eos: str
    """The tokens before and after each document, as texts."""
    fingerprint: str
    """Equal for two tokenizers with the same ``matching`` only if they give equal ids for every text."""
    matching: str
    """Which added tokens a text matches. "": none but runs of white space, as in release 0.1; "added": those that are
    not special; "tokens": all. Part of a corpus's key, in which "" is left out, so that old keys stay valid."""
    special_pattern: re.Pattern[str] | None
    """Finds the special tokens in a text; None if there are none."""
    ordinary_ids: frozenset[int]
    """Ids of the added tokens that are not special and are matched in text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, without any special token."""

    def byte_lengths(self) -> ByteLengths:
        """Return how many bytes of text each token stands for. Raises BytesUnknown."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text without control tokens and unknown ids; invalid UTF-8 becomes U+FFFD."""


def load_tokenizer(
    tokenizer_path: str, special_tokens: SpecialTokens = "text", roots: Sequence[Path] = ()
) -> Tokenizer:
    """Load the tokenizer "byte", or that of a Hugging Face directory, below one of ``roots`` if any are given.

    Raises TokenizerInvalid and OutsideRoots.
    """
    if tokenizer_path == BYTE:
        return ByteTokenizer(special_tokens)
    return FileTokenizer(tokenizer_file(tokenizer_path), special_tokens, roots)


def limit_threads(count: int | None) -> None:
    """Run all tokenizers on ``count`` threads (0 means one), or on one per core if None.

    Call it before the first text is encoded: the library reads ``RAYON_NUM_THREADS`` when it starts its threads, once
    per process. A value that is already in the environment is kept.
    """
    if count is not None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, count)))


class ByteTokenizer:
    """The built-in tokenizer: byte b of the UTF-8 text is token 3 + b."""

    vocab_size = BYTE_VOCABULARY
    pad_id, bos_id, eos_id = PAD, BOS, EOS
    bos, eos = SPECIAL_TOKENS[1:]
    fingerprint = BYTE_FINGERPRINT
    special_pattern = special_pattern(SPECIAL_TOKENS)
    ordinary_ids: frozenset[int] = frozenset()

    def __init__(self, special_tokens: SpecialTokens = "text") -> None:
        self.matching = "tokens" if special_tokens == "tokens" else ""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        if self.matching:
            return [self._encode_marked(text) for text in texts]
        return [self._encode(text) for text in texts]

    def byte_lengths(self) -> ByteLengths:
        return byte_lengths_of_bytes(len(SPECIAL_TOKENS))

    def _encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) + np.uint32(len(SPECIAL_TOKENS))

    def _encode_marked(self, text: str) -> Ids:
        assert self.special_pattern is not None
        marks = [np.array([SPECIAL_TOKENS.index(mark)], np.uint32) for mark in self.special_pattern.findall(text)]
        parts = [self._encode(part) for part in self.special_pattern.split(text)]
        between = [*marks, np.zeros(0, np.uint32)]
        return np.concatenate([ids for pair in zip(parts, between, strict=True) for ids in pair])

    def decode(self, ids: Iterable[int]) -> str:
        shift = len(SPECIAL_TOKENS)
        return bytes(i - shift for i in ids if shift <= i < self.vocab_size).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library.

    With ``special_tokens`` "text", no text encodes to a special token.
    """

    def __init__(self, file: Path, special_tokens: SpecialTokens = "text", roots: Sequence[Path] = ()) -> None:
        info = TokenizerInfo.read(file, roots)
        self._file, self._info, self._mode = file, info, special_tokens
        self.patterns = tuple(_patterns([info.described.get("normalizer"), info.described.get("pre_tokenizer")]))
        described = info.described if special_tokens == "tokens" else _hide_special_tokens(info)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**described, "post_processor": None}))
        # The library raises plain Exception for any invalid file.
        except Exception as error:
            raise TokenizerInvalid(f"{shown(file)} is not a tokenizer.json: {error}") from error
        # A tokenizer for sentence pairs may truncate or pad what it encodes.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size, self.fingerprint = info.size, info.fingerprint
        self.bos, self.eos = info.bos, info.eos
        self.bos_id, self.eos_id, self.pad_id = info.bos_id, info.eos_id, info.pad_id
        self.ordinary_ids = frozenset(info.added[name] for name in info.ordinary)
        self.matching = "tokens" if special_tokens == "tokens" else "added" if self.ordinary_ids else ""
        self.special_pattern = special_pattern(info.special)
        self._special_ids = frozenset(info.added[name] for name in info.special)
        self._special_ids |= {self.bos_id, self.eos_id, self.pad_id}

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            # The library's panics have a class that cannot be imported. It gives up a search after ten million steps.
            if type(error).__name__ != "PanicException":
                raise
            raise TokenizerInvalid(backtracking_message(str(self._file), self.patterns, str(error))) from None
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def byte_lengths(self) -> ByteLengths:
        return byte_lengths_of_file(self._info, self._mode, self.encode_batch)

    def decode(self, ids: Iterable[int]) -> str:
        known = [i for i in ids if 0 <= i < self.vocab_size and i not in self._special_ids]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text


def backtracking_message(name: str, patterns: Sequence[str], why: str) -> str:
    """Return what to do about a tokenizer whose regular expressions do not end."""
    listed = " or ".join(repr(pattern) if len(pattern) <= 200 else f"{pattern[:200]!r}..." for pattern in patterns)
    return (
        f"the regular expression {listed or 'of its pre-tokenizer'} of {name} backtracks: {why}. "
        "Use one without nested repetition such as (a+)+"
    )


def _patterns(value: Any) -> Iterator[str]:
    """Yield the regular expressions in a part of a tokenizer.json."""
    if isinstance(value, dict):
        if isinstance(pattern := value.get("Regex"), str):
            yield pattern
        for part in value.values():
            yield from _patterns(part)
    elif isinstance(value, list):
        for part in value:
            yield from _patterns(part)


def _hide_special_tokens(info: TokenizerInfo) -> dict[str, Any]:
    """Return the same tokenizer, with the same ids, but with special tokens that no text matches.

    They are renamed both among the added tokens, which match before anything else, and in the vocabulary, where a
    Unigram or word-level model would find them. Removing them would change the ids of other tokens. Merges that make
    them are removed: the text is tokenized with the parts.
    """
    described = info.described
    model = dict(described["model"])
    renamed = {name: f"\0{hashlib.sha256(name.encode()).hexdigest()}" for name in info.special}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    if model.get("merges"):
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if not _names_of_merge(merge, prefix) & renamed.keys()]
    added = [
        {**token, "content": renamed.get(token["content"], token["content"])}
        for token in described.get("added_tokens") or ()
    ]
    return {**described, "model": model, "added_tokens": added}


def _names_of_merge(merge: str | list[str], prefix: str) -> set[str]:
    """Return both parts of a merge and their result. Old files write a merge as one text, newer ones as a list."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right.removeprefix(prefix)}


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> int:
    """Train a byte-level BPE on ``texts`` and write it to ``out``, a directory that Hugging Face transformers can load.

    The special tokens have the ids 0, 1, 2 and the 256 bytes come next, so every text can be encoded. The same texts
    give the same files. Returns the vocabulary size, which is less than ``vocab_size`` if there is too little text.
    """
    return _save(_train_bpe(texts, vocab_size), out)


def _train_bpe(texts: Iterable[str], vocab_size: int, show_progress: bool = False) -> tokenizers.Tokenizer:
    if vocab_size < BYTE_VOCABULARY:
        raise ValueError(f"a vocabulary needs at least {BYTE_VOCABULARY} tokens: 3 special ones and 256 bytes")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator((part for text in texts for part in split_long_words(text)), trainer)
    return tokenizer


def split_long_words(text: str) -> Iterator[str]:
    """Yield ``text`` in parts without a word, or a gap, of more than ``MAX_WORD`` characters.

    The time of the training grows with the square of the length of a word.
    """
    start = 0
    for match in LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    if start < len(text) or not text:
        yield text[start:]


def _save(tokenizer: tokenizers.Tokenizer, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tokenizer_config.json", json.dumps(_config_for_transformers(), indent=2).encode() + b"\n")
    write_atomically(out / "tokenizer.json", tokenizer.to_str(pretty=True).encode() + b"\n")
    size: int = tokenizer.get_vocab_size()
    return size


def _config_for_transformers() -> dict[str, Any]:
    pad, bos, eos = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m trainyard.worker.data.tokenizers train FILE --out DIR``. Exit code 1: failure; 2: usage."""
    parser = argparse.ArgumentParser(prog="trainyard tokenizer", description="Tokenizers for pretraining.")
    command = parser.add_subparsers(dest="command", required=True, metavar="train")
    training = command.add_parser("train", help="learn a byte-level BPE from a corpus")
    training.add_argument("file", type=Path, metavar="FILE", help="JSONL, .txt, compressed or parquet")
    training.add_argument("--vocab-size", "--vocab_size", type=_vocabulary_size, default=6400, metavar="N")
    training.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    training.add_argument("--text-field", "--text_field", default="text", metavar="KEY", help="key of the text")
    options = parser.parse_args(arguments)
    try:
        return _train_from_file(options.file, options.text_field, options.vocab_size, options.out)
    except (DataInvalid, OSError) as error:
        print(f"trainyard tokenizer: {error}", file=sys.stderr)
        return 1


def _vocabulary_size(text: str) -> int:
    if not text.isdecimal() or not BYTE_VOCABULARY <= int(text) <= 2**24:
        raise argparse.ArgumentTypeError(f"must be a whole number from {BYTE_VOCABULARY} to {2**24}")
    return int(text)


def _train_from_file(file: Path, text_field: str, vocab_size: int, out: Path) -> int:
    with open_reader(file) as reader, ended_by_ctrl_c():
        texts = (document.text for document in _with_progress(reader, text_field))
        tokenizer = _train_bpe(texts, vocab_size, show_progress=sys.stderr.isatty())
    stats = reader.stats
    if stats.documents == 0:
        raise DataInvalid(f"{shown(file)} {stats.empty_reason(text_field)}")
    size = _save(tokenizer, out)
    print(f"{out}: {size:,} tokens from {counted(stats.documents, 'document')}")
    if stats.bad_lines:
        print(stats.describe_bad(), file=sys.stderr)
    if size < vocab_size:
        print(f"{vocab_size:,} were requested: the text has no more pairs to merge", file=sys.stderr)
    return 0


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process at once: the library computes for minutes and Python handles signals only after it."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _with_progress(reader: Reader, text_field: str) -> Iterator[Document]:
    """Yield the documents, and print how much is read on stderr every few seconds."""
    due = time.monotonic() + PROGRESS_SECONDS
    for document in reader.documents(text_field):
        yield document
        if time.monotonic() >= due:
            due = time.monotonic() + PROGRESS_SECONDS
            _print_progress(reader)
    _print_progress(reader)
    print("counted the words; merging to the requested size", file=sys.stderr, flush=True)


def _print_progress(reader: Reader) -> None:
    share = f", {100 * reader.bytes_read / reader.size:.0f} % of the file" if reader.size else ""
    print(f"read {counted(reader.stats.documents, 'document')}{share}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command("trainyard tokenizer", main))
