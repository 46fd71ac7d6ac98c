"""How many tokens a tokenizer has, without loading it: the service has no tokenizer library and needs none."""

import json
from pathlib import Path

BYTE = "byte"
"""The tokenizer that is built in: each UTF-8 byte is a token, after the three special ones."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""MiniMind's, in the order of their ids: padding 0, beginning 1, end 2."""

BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256


class TokenizerInvalid(ValueError):
    """The tokenizer cannot be used; the message says why and what to do."""


def vocabulary_size(tokenizer_path: str) -> int:
    """Number of embedding rows the tokenizer needs: its highest id + 1.

    Raises:
        TokenizerInvalid: ``tokenizer_path`` is neither "byte" nor a directory with a readable tokenizer.json.
    """
    if tokenizer_path == BYTE:
        return BYTE_VOCABULARY
    file = tokenizer_file(tokenizer_path)
    try:
        described = json.loads(file.read_bytes())
        vocabulary = described["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = [token["id"] for token in described.get("added_tokens") or ()]
        return int(max([*ids, *added])) + 1
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TokenizerInvalid(f"{file} is not a tokenizer.json: {type(error).__name__}") from error


def tokenizer_file(tokenizer_path: str) -> Path:
    """The tokenizer.json in a tokenizer's directory; the file itself is taken too."""
    path = Path(tokenizer_path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerInvalid(
            f'no tokenizer.json in {tokenizer_path}: give a Hugging Face tokenizer directory, "byte", '
            "or make one with `trainyard tokenizer train`"
        )
    return file
