"""Text to token ids and back, and the command that trains a tokenizer.

Corpus text is encoded as text: a ``<|im_end|>`` written in a document becomes the tokens of those ten characters, never
the control token. Beginning and end are added by the corpus builder, by id.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainyard.contract.rundir import write_atomically
from trainyard.contract.tokenizer_info import (
    BYTE,
    BYTE_FINGERPRINT,
    BYTE_VOCABULARY,
    SPECIAL_TOKENS,
    TokenizerInfo,
    TokenizerInvalid,
    tokenizer_file,
)
from trainyard.worker.data.jsonl import DataInvalid
from trainyard.worker.data.readers import Reader, open_reader

Ids = npt.NDArray[np.uint32]

PAD, BOS, EOS = range(3)
"""Ids of our own special tokens."""


class Tokenizer(Protocol):
    """What the corpus builder and the sampler need. ``vocab_size`` is the highest id + 1."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    fingerprint: str
    """Equal for two tokenizers only if they give equal ids for every text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, as text: no special token is ever among them."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; control tokens and ids that do not exist are left out, broken UTF-8 becomes U+FFFD."""


def load_tokenizer(tokenizer_path: str) -> Tokenizer:
    """The tokenizer "byte", or that of a Hugging Face directory. Raises TokenizerInvalid."""
    return ByteTokenizer() if tokenizer_path == BYTE else FileTokenizer(tokenizer_file(tokenizer_path))


def limit_threads(count: int | None) -> None:
    """Let all tokenizers run on ``count`` threads, 0 being one; None: one a core.

    To be called before the first text is encoded: the library reads it when it starts its threads, once a process.
    What the environment says already is kept.
    """
    if count is not None:
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, count)))


class ByteTokenizer:
    """Built in: byte b of the UTF-8 text is token 3 + b."""

    vocab_size = BYTE_VOCABULARY
    pad_id, bos_id, eos_id = PAD, BOS, EOS
    fingerprint = BYTE_FINGERPRINT

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer`."""
        shift = np.uint32(len(SPECIAL_TOKENS))
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) + shift for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        shift = len(SPECIAL_TOKENS)
        return bytes(i - shift for i in ids if shift <= i < self.vocab_size).decode(errors="replace")


class FileTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library, with its control tokens made unreachable from text."""

    def __init__(self, file: Path) -> None:
        found = TokenizerInfo.read(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_without_special_tokens(found.described)))
        # The library raises plain Exception for whatever it does not like.
        except Exception as error:
            raise TokenizerInvalid(f"{file} is not a tokenizer.json: {error}") from error
        # A tokenizer made for training sentence pairs may cut or pad what it encodes.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size, self.fingerprint = found.size, found.fingerprint
        self.bos_id, self.eos_id, self.pad_id = found.bos_id, found.eos_id, found.pad_id
        self._control = frozenset(found.added[name] for name in _unreachable(found.described))
        self._control |= {self.bos_id, self.eos_id, self.pad_id}

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See `Tokenizer`. Runs on as many threads as ``RAYON_NUM_THREADS`` says."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        known = [i for i in ids if 0 <= i < self.vocab_size and i not in self._control]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text


def _unreachable(described: dict[str, Any]) -> list[str]:
    """Added tokens that text must not turn into: all but runs of white space, which some tokenizers add to be short."""
    return [token["content"] for token in described.get("added_tokens") or () if token["content"].strip()]


def _without_special_tokens(described: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer without a way from text to a control token, and with the same ids.

    Control tokens are renamed to what no text holds: among the added tokens, which are matched before anything else,
    and in the vocabulary, where a Unigram or word model would find them. Leaving them out would give others their ids.
    """
    model = dict(described["model"])
    renamed = {name: f"\0{hashlib.sha256(name.encode()).hexdigest()}" for name in _unreachable(described)}
    if isinstance(model["vocab"], list):
        model["vocab"] = [[renamed.get(token, token), score] for token, score in model["vocab"]]
    else:
        model["vocab"] = {renamed.get(token, token): number for token, number in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    added = [
        {**token, "content": renamed.get(token["content"], token["content"])}
        for token in described.get("added_tokens") or ()
    ]
    return {**described, "model": model, "added_tokens": added, "post_processor": None}


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> int:
    """Learn a byte-level BPE from ``texts`` and write a directory that Hugging Face's transformers loads too.

    The special tokens get the ids 0, 1, 2 and the 256 bytes come next, so every text can be encoded. The same texts
    give the same files. Returns the size of the vocabulary, which is smaller than asked for where the texts are few.
    """
    return _save(_train_bpe(texts, vocab_size), out)


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    if vocab_size < BYTE_VOCABULARY:
        raise ValueError(f"a vocabulary needs at least {BYTE_VOCABULARY} tokens: 3 special ones and 256 bytes")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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
    """``python -m trainyard.worker.data.tokenizers train FILE --vocab-size 6400 --out DIR``; 1 on failure, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="trainyard tokenizer", description="Tokenizers for pretraining.")
    command = parser.add_subparsers(dest="command", required=True, metavar="train")
    training = command.add_parser("train", help="learn a byte-level BPE from a corpus")
    training.add_argument("file", type=Path, metavar="FILE", help="JSONL, .txt, packed or parquet")
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
    with open_reader(file) as reader:
        tokenizer = _train_bpe(_texts(reader, text_field), vocab_size)
    report = reader.stats
    if report.documents == 0:
        raise DataInvalid(f"{file} {report.empty_reason(text_field)}")
    size = _save(tokenizer, out)
    print(f"{out}: {size:,} tokens from {report.documents:,} documents")
    if report.bad_lines:
        print(report.describe_bad(), file=sys.stderr)
    if size < vocab_size:
        print(f"{vocab_size:,} were asked for: the text has no more pairs to merge", file=sys.stderr)
    return 0


def _texts(reader: Reader, text_field: str) -> Iterator[str]:
    for document in reader.documents(text_field):
        yield document.text


if __name__ == "__main__":
    sys.exit(main())
