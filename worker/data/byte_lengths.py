"""The number of UTF-8 bytes of text of each token, from which bits per byte are computed.

A table by token id is exact for byte-level vocabularies (GPT-2, Qwen, Llama 3, MiniMind), for those with byte fallback
(Llama 2, Gemma) and for the byte tokenizer. A tokenizer that drops or inserts characters, or has an unknown token, has
no such table.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainyard.contract.tokenizer_info import SpecialTokens, TokenizerInfo

SPACE = "\u2581"
"""What vocabularies with byte fallback write for a space."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}

PROBES = (
    "The cat sat on 3,141 mats.\n\n\tIt's  here   \r\n",
    "x",
    "中文字符。汉字与 English 混排",
    "\U0001f600\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea e\u0301 ñ \u0928\u092e\u0938\u094d\u0924\u0947",
    "def f(a_b):\n    return {'x': [1, 2]} # ok",
)
"""Texts whose bytes every table must give, so that a tokenizer with an unforeseen rule has none."""


class BytesUnknown(Exception):
    """The bytes that a token stands for do not follow from its id. The message says why: ``its ...``."""


@dataclass(frozen=True)
class ByteLengths:
    """The UTF-8 bytes of the text that each token stands for.

    ``lengths`` [V] int64; 0 for special tokens. ``inserts_space``: before the first token of a text, and after an added
    token in it, the tokenizer inserts a space that the text does not have. ``added`` [V]: the beginning, the end and
    the added tokens, which begin such a part.
    """

    lengths: npt.NDArray[np.int64]
    added: npt.NDArray[np.bool_]
    inserts_space: bool = False

    def of_document(self, ids: Sequence[int]) -> int:
        """Return the bytes of a document's tokens, given between its beginning and end tokens."""
        before, after = np.asarray(ids[:-1], np.int64), np.asarray(ids[1:], np.int64)
        inserted = int((self.added[before] & ~self.added[after]).sum()) if self.inserts_space else 0
        return int(self.lengths[after].sum()) - inserted


def byte_lengths_of_bytes(special: int) -> ByteLengths:
    """Return the lengths of the byte tokenizer, whose first ``special`` tokens are special."""
    added = np.arange(special + 256) < special
    return ByteLengths((~added).astype(np.int64), added)


def byte_lengths_of_file(
    info: TokenizerInfo, special_tokens: SpecialTokens, encode: Callable[[list[str]], Sequence[npt.NDArray[np.uint32]]]
) -> ByteLengths:
    """Return the lengths of a tokenizer.json. ``encode``: its ids of some texts. Raises BytesUnknown.

    If the tokenizer normalises Unicode, the bytes are those of the normalised text, which is what it stands for.
    """
    described = info.described
    normalizers, splitters = (list(_parts(described.get(name))) for name in ("normalizer", "pre_tokenizer"))
    _require_lossless(info, special_tokens, normalizers, splitters)
    if any(part["type"] == "ByteLevel" for part in (*normalizers, *splitters)):
        piece_length = _byte_level(described["model"])
    else:
        has_spaces = any(part["type"] in ("Replace", "Metaspace") for part in (*normalizers, *splitters))
        piece_length = _byte_fallback(described["model"], has_spaces)
    special = {info.bos_id, info.eos_id, info.pad_id, *(info.added[name] for name in info.special)}
    lengths, added = np.zeros(info.size, np.int64), np.zeros(info.size, np.bool_)
    for number, piece in _pieces(described["model"]):
        lengths[number] = piece_length(piece)
    for token in described.get("added_tokens") or ():
        lengths[token["id"]] = len(token["content"].encode())
        added[token["id"]] = True
    lengths[[*special]], added[[*special]] = 0, True
    found = ByteLengths(lengths, added, any(part["type"] == "Prepend" for part in normalizers))
    _probe(found, info, encode, [part["type"] for part in normalizers if part["type"] in UNICODE_FORMS])
    return found


def _parts(described: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer."""
    if described is None:
        return
    if described["type"] == "Sequence":
        for part in described.get("normalizers") or described.get("pretokenizers") or ():
            yield from _parts(part)
    else:
        yield described


def _require_lossless(
    info: TokenizerInfo,
    special_tokens: SpecialTokens,
    normalizers: Sequence[Mapping[str, Any]],
    splitters: Sequence[Mapping[str, Any]],
) -> None:
    """Raise BytesUnknown if the tokenizer drops or inserts characters in a way that depends on the text."""
    for part in normalizers:
        if not _keeps_length(part):
            raise BytesUnknown(f"its normalizer {part['type']} changes the text")
    for part in splitters:
        if not _keeps_all(part):
            raise BytesUnknown(f"its pre-tokenizer {part['type']} drops or inserts characters")
    model = info.described["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise BytesUnknown("its tokens have marks for the beginning or end of a word")
    matched = set(info.ordinary) | (set(info.special) if special_tokens == "tokens" else set())
    for token in info.described.get("added_tokens") or ():
        if token["content"] not in matched:
            continue
        if token.get("lstrip") or token.get("rstrip"):
            raise BytesUnknown(f"its added token {token['content']!r} takes in white space")
        if token.get("normalized") and any(part["type"] == "Prepend" for part in normalizers):
            # The library prepends the space to the token itself, and then only matches it with one.
            raise BytesUnknown(f"its added token {token['content']!r} is normalized with a space before it")


def _keeps_length(part: Mapping[str, Any]) -> bool:
    match part["type"]:
        case "Prepend":
            return part.get("prepend") == SPACE
        case "Replace":
            return part.get("pattern") == {"String": " "} and part.get("content") == SPACE
        case kind:
            return kind == "ByteLevel" or kind in UNICODE_FORMS


def _keeps_all(part: Mapping[str, Any]) -> bool:
    match part["type"]:
        case "ByteLevel":
            # It inserts a space only before a text that has none.
            return part.get("add_prefix_space") is False
        case "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return part.get("replacement") == SPACE and scheme == "never"
        case "Split" | "Punctuation":
            return str(part.get("behavior", "Isolated")).lower() != "removed"
        case kind:
            return kind in ("Digits", "UnicodeScripts")


def _pieces(model: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        yield from ((number, piece) for number, (piece, _) in enumerate(vocabulary))
    else:
        yield from ((number, piece) for piece, number in vocabulary.items())


def _byte_level(model: Mapping[str, Any]) -> Callable[[str], int]:
    if model.get("type", "BPE") != "BPE":
        raise BytesUnknown(f"its model is {model['type']}")
    pieces = {piece for _, piece in _pieces(model)}
    _require_all_bytes({byte for byte, letter in enumerate(byte_characters()) if letter in pieces})
    # Each character is a byte.
    return len


def byte_characters() -> list[str]:
    """Return the characters for the bytes 0, 1, ... in byte-level vocabularies: themselves, or from U+0100 on.

    Source: GPT-2's byte encoder, which the ``tokenizers`` library has too.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _require_all_bytes(found: set[int]) -> None:
    if not set(range(256)) - NEVER_IN_UTF8 <= found:
        raise BytesUnknown("its vocabulary lacks some of the 256 bytes")


def _byte_fallback(model: Mapping[str, Any], has_spaces: bool) -> Callable[[str], int]:
    if not model.get("byte_fallback"):
        raise BytesUnknown("it has an unknown token for what is not in its vocabulary")
    _require_all_bytes({int(match[1], 16) for _, piece in _pieces(model) if (match := BYTE_TOKEN.fullmatch(piece))})

    def length(piece: str) -> int:
        if BYTE_TOKEN.fullmatch(piece):
            return 1
        return len((piece.replace(SPACE, " ") if has_spaces else piece).encode())

    return length


def _probe(
    found: ByteLengths,
    info: TokenizerInfo,
    encode: Callable[[list[str]], Sequence[npt.NDArray[np.uint32]]],
    forms: Sequence[str],
) -> None:
    for text, ids in zip(PROBES, encode(list(PROBES)), strict=True):
        for form in forms:
            text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
        if found.of_document([info.bos_id, *ids.tolist(), info.eos_id]) != len(text.encode()):
            raise BytesUnknown("its tokens decode to other bytes than the text has")
