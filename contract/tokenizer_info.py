"""Size, fingerprint and control tokens of a tokenizer, read without a tokenizer library: the service has none."""

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from trainyard.contract.allowed_paths import OutsideRoots, open_regular_inside

BYTE = "byte"
"""The built-in tokenizer: the three special tokens, then one token for each byte of UTF-8."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""MiniMind's special tokens, in the order of their ids: padding 0, beginning 1, end 2."""

BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256
BYTE_FINGERPRINT = hashlib.sha256(b"byte 1").hexdigest()

BOS_NAMES = (SPECIAL_TOKENS[1], "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
EOS_NAMES = (SPECIAL_TOKENS[2], "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
"""Tried in this order if tokenizer_config.json names none."""


MAX_TOKENIZER_BYTES, MAX_TOKENIZER_VALUES = 64 << 20, 3_000_000
"""The largest file that is parsed: about twice the largest tokenizers in use. Each value takes up to 200 bytes of
memory, so the second limit matters more."""

_parsing = threading.Lock()
"""One file is parsed at a time, so that many requests at once need the memory of one."""
SpecialTokens = Literal["text", "tokens"]
"""``data.special_tokens``: what a special token that is written in a text becomes."""

MAX_SPECIAL_TEXTS = 0.01
"""A larger share of texts with special tokens is reported: they are probably control tokens, not words."""


class TokenizerInvalid(ValueError):
    """The tokenizer cannot be used. The message says why and what to do."""


def read_bounded(file: Path, roots: Sequence[Path] = ()) -> tuple[bytes, Any]:
    """Return the bytes and the value of a JSON file of a tokenizer, below one of ``roots`` if any are given.

    Raises TokenizerInvalid, before it is parsed, if that would take too long or too much memory. Raises OSError and
    ValueError.
    """
    with open_regular_inside(file, roots) as opened:
        raw = opened.read(MAX_TOKENIZER_BYTES + 1) or b""
        while len(raw) <= MAX_TOKENIZER_BYTES and (more := opened.read(MAX_TOKENIZER_BYTES + 1 - len(raw))):
            raw += more
    values = len(raw) - len(raw.translate(None, b",[{"))
    if len(raw) > MAX_TOKENIZER_BYTES or values > MAX_TOKENIZER_VALUES:
        raise TokenizerTooLarge(file)
    try:
        with _parsing:
            return raw, json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None


class TokenizerTooLarge(TokenizerInvalid):
    """Reading the file would take too much time or memory. ``limits`` says what is read."""

    limits = f"at most {MAX_TOKENIZER_BYTES >> 20} MiB and {MAX_TOKENIZER_VALUES:,} values are read"

    def __init__(self, file: Path) -> None:
        super().__init__(f"{file} is too large: {self.limits}")


def vocabulary_size(tokenizer_path: str, roots: Sequence[Path] = ()) -> int:
    """Return the vocabulary size that the tokenizer needs: its highest id + 1.

    Raises TokenizerInvalid if ``tokenizer_path`` is neither "byte" nor a directory with a valid tokenizer.json.
    """
    if tokenizer_path == BYTE:
        return BYTE_VOCABULARY
    file = tokenizer_file(tokenizer_path)
    try:
        _, described = read_bounded(file, roots)
        vocabulary = described["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in described.get("added_tokens") or ()]
        return int(max([*ids, *added])) + 1
    except TokenizerInvalid:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerInvalid(f"{file} is not a tokenizer.json: {type(error).__name__}") from error


def tokenizer_file(tokenizer_path: str) -> Path:
    """Return the path of tokenizer.json, given its directory or the file itself. Raises TokenizerInvalid."""
    path = Path(tokenizer_path)
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        found = file.is_file()
    except OSError as error:
        raise TokenizerInvalid(f"{tokenizer_path} cannot be read: {error.strerror}") from error
    if not found:
        raise TokenizerInvalid(
            f'no tokenizer.json in {tokenizer_path}: give a Hugging Face tokenizer directory, "byte", '
            "or make one with `trainyard tokenizer train`"
        )
    return file


@dataclass(frozen=True)
class TokenizerInfo:
    """The content of a tokenizer.json and of the tokenizer_config.json in the same directory.

    ``size``: highest id + 1. ``bos``, ``eos``: the tokens before and after each document. ``fingerprint``: equal for
    two tokenizers only if they give equal ids for every text. ``added``: ids of the added tokens. ``special``: those
    of them that are control tokens. ``described``: the JSON of tokenizer.json.
    """

    size: int
    bos: str
    eos: str
    bos_id: int
    eos_id: int
    pad_id: int
    fingerprint: str
    added: dict[str, int]
    special: tuple[str, ...]
    described: dict[str, Any]

    @property
    def ordinary(self) -> tuple[str, ...]:
        """Added tokens that are words and not control tokens, such as ``<think>``, without runs of white space."""
        return tuple(name for name in self.added if name.strip() and name not in self.special)

    @classmethod
    def read(cls, file: Path, roots: Sequence[Path] = ()) -> Self:
        """Read a tokenizer.json, below one of ``roots`` if any are given.

        Raises TokenizerInvalid, also if it has neither a beginning nor an end token, and OutsideRoots.
        """
        try:
            raw, described = read_bounded(file, roots)
            added = {str(token["content"]): int(token["id"]) for token in described.get("added_tokens") or ()}
            marked = {str(token["content"]) for token in described.get("added_tokens") or () if token.get("special")}
            names = _names(described, added)
            size = max(names.values()) + 1
        except (TokenizerInvalid, OutsideRoots):
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokenizerInvalid(f"{file} is not a tokenizer.json: {error}") from error
        bos, eos, pad = _control_ids(file, names, roots)
        fingerprint = hashlib.sha256(raw + f"{bos} {eos} {pad}".encode()).hexdigest()
        # transformers treats the tokens that tokenizer_config.json names as special, whatever tokenizer.json says. Runs
        # of white space are words: some tokenizers mark them as special by mistake.
        special = tuple(
            name for name, number in added.items() if name.strip() and (name in marked or number in (bos, eos, pad))
        )
        texts = {number: name for name, number in names.items()}
        return cls(size, texts[bos], texts[eos], bos, eos, pad, fingerprint, added, special, described)


def fingerprint_of(tokenizer_path: str, roots: Sequence[Path] = ()) -> tuple[int, str]:
    """Return (size, fingerprint) of a tokenizer or of the built-in one. Raises TokenizerInvalid."""
    if tokenizer_path == BYTE:
        return BYTE_VOCABULARY, BYTE_FINGERPRINT
    info = TokenizerInfo.read(tokenizer_file(tokenizer_path), roots)
    return info.size, info.fingerprint


@dataclass(frozen=True)
class TokenNames:
    """Texts of the special tokens, and of the two between which each document is put."""

    special: tuple[str, ...]
    bos: str
    eos: str

    @classmethod
    def read(cls, tokenizer_path: str, roots: Sequence[Path] = ()) -> Self:
        """Read those of a tokenizer, or of the built-in one. Raises TokenizerInvalid and OutsideRoots."""
        if tokenizer_path == BYTE:
            return cls(SPECIAL_TOKENS, *SPECIAL_TOKENS[1:])
        info = TokenizerInfo.read(tokenizer_file(tokenizer_path), roots)
        return cls(info.special, info.bos, info.eos)


def special_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds the special tokens in a text, the longest first; None if there are no names."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def special_tokens_warning(texts: int, documents: int, tokens: int) -> str | None:
    """Return a warning if too many texts hold special tokens that are read as ordinary text, else None.

    ``texts`` of ``documents`` hold ``tokens`` special tokens.
    """
    if not documents or texts / documents <= MAX_SPECIAL_TEXTS:
        return None
    return (
        f"{100 * texts / documents:.1f} % of the texts hold special tokens ({tokens:,} in all), and each is read as "
        f'several ordinary tokens: set data.special_tokens to "tokens" if they are marks, as in MiniMind\'s corpora'
    )


def _names(described: dict[str, Any], added: dict[str, int]) -> dict[str, int]:
    vocabulary = described["model"]["vocab"]
    # A Unigram vocabulary is a list of [token, score], the others are mappings.
    if isinstance(vocabulary, list):
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **added}


def _control_ids(file: Path, names: dict[str, int], roots: Sequence[Path]) -> tuple[int, int, int]:
    """Return the ids of (beginning, end, padding), by tokenizer_config.json, else by well-known names.

    A tokenizer with only one of beginning and end uses it for both, as GPT-2 does. Padding may be the end token,
    because padded positions are never trained on.
    """
    config = _tokenizer_config(file, roots)
    bos = _control_id("bos_token", config, names, BOS_NAMES)
    eos = _control_id("eos_token", config, names, EOS_NAMES)
    pad = _control_id("pad_token", config, names, PAD_NAMES)
    ends = [found for found in (bos, eos) if found is not None]
    if not ends:
        raise TokenizerInvalid(
            f"{file} has neither a beginning nor an end token: name them as bos_token and eos_token in "
            f"{file.with_name('tokenizer_config.json')}"
        )
    eos = eos if eos is not None else ends[0]
    return ends[0], eos, pad if pad is not None else eos


def _tokenizer_config(file: Path, roots: Sequence[Path]) -> dict[str, Any]:
    config_file = file.with_name("tokenizer_config.json")
    try:
        _, config = read_bounded(config_file, roots)
    except FileNotFoundError:
        return {}
    except (TokenizerInvalid, OutsideRoots):
        raise
    except (OSError, ValueError) as error:
        raise TokenizerInvalid(f"{config_file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerInvalid(f"{config_file} must hold a JSON object")
    return config


def _control_id(key: str, config: dict[str, Any], names: dict[str, int], usual: tuple[str, ...]) -> int | None:
    named = config.get(key)
    named = named.get("content") if isinstance(named, dict) else named
    if named is not None and named not in names:
        raise TokenizerInvalid(f"{key} of tokenizer_config.json is not in the vocabulary: {named!r}")
    candidates = usual if named is None else (named,)
    return next((names[name] for name in candidates if name in names), None)
