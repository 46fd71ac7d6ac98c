"""Token count of a text without a tokenizer library: exact for bytes, approximate for a byte-pair vocabulary."""

from collections.abc import Callable, Sequence
from pathlib import Path

from trainyard.contract.tokenizer_info import BYTE, read_bounded, tokenizer_file

SPECIAL = 2  # beginning and end of a document

SAMPLE_CHARACTERS = 100_000
MAX_TOKEN = 24

TokenCounter = Callable[[str], float]


def token_counter(tokenizer_path: str, texts: list[str], roots: Sequence[Path] = ()) -> TokenCounter:
    """Return a function from a text to its number of tokens, including its beginning and end.

    With a vocabulary, a sample of ``texts`` is cut greedily into the longest tokens from left to right, and its tokens
    per byte are used for all texts. Byte-pair merging gives about as many tokens.
    """
    if tokenizer_path == BYTE:
        return lambda text: SPECIAL + len(text.encode())
    per_byte = _tokens_per_byte(tokenizer_path, texts, roots)
    return lambda text: SPECIAL + max(1.0, per_byte * len(text.encode()))


def _tokens_per_byte(tokenizer_path: str, texts: list[str], roots: Sequence[Path]) -> float:
    vocabulary = _vocabulary(tokenizer_path, roots)
    sample = _sample(texts)
    if not vocabulary or not sample:
        return 1.0
    by_bytes = "\u0120" in vocabulary
    characters = _byte_letters(sample) if by_bytes else sample.replace(" ", "\u2581")
    return longest_matches(characters, vocabulary) / len(sample.encode())


def _vocabulary(tokenizer_path: str, roots: Sequence[Path]) -> frozenset[str]:
    try:
        _, described = read_bounded(tokenizer_file(tokenizer_path), roots)
        vocabulary = described["model"]["vocab"]
        names = vocabulary if isinstance(vocabulary, dict) else (entry[0] for entry in vocabulary)
        return frozenset(name for name in names if len(name) <= MAX_TOKEN)
    except (OSError, ValueError, LookupError, TypeError):
        return frozenset()


def _sample(texts: list[str]) -> str:
    step = max(1, len(texts) // 200)
    selected = texts[::step]
    length = SAMPLE_CHARACTERS // max(1, len(selected))
    return "\n".join(text[:length] for text in selected)[:SAMPLE_CHARACTERS]


def longest_matches(text: str, vocabulary: frozenset[str]) -> int:
    """Return the number of tokens that ``text`` is cut into if the longest match is taken each time."""
    max_size = max(map(len, vocabulary))
    count = position = 0
    while position < len(text):
        size = next((n for n in range(max_size, 1, -1) if text[position : position + n] in vocabulary), 1)
        position += size
        count += 1
    return count


def _byte_letters(text: str) -> str:
    """Map bytes to the characters of byte-level vocabularies (Radford et al. 2019, GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return "".join(letters[byte] for byte in text.encode())
