"""The size of a vocabulary, read without a tokenizer library."""

import json
from pathlib import Path

import pytest

from trainyard.contract.tokenizer_info import BYTE_VOCABULARY, TokenizerInvalid, vocabulary_size


def test_byte_is_built_in() -> None:
    assert vocabulary_size("byte") == BYTE_VOCABULARY == 259


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 4}, [["a", 0.1], ["b", 0.2], ["c", 0.3], ["d", 0], ["e", 0]]])
def test_the_highest_id_counts(tmp_path: Path, vocab: object) -> None:
    described = {"model": {"vocab": vocab}, "added_tokens": [{"id": 9, "content": "<|x|>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert vocabulary_size(str(tmp_path)) == 10
    assert vocabulary_size(str(tmp_path / "tokenizer.json")) == 10


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {}}}', "[" * 5000])
def test_anything_else_is_rejected_with_the_name_of_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerInvalid, match=r"tokenizer\.json"):
        vocabulary_size(str(tmp_path))


def test_a_directory_without_tokenizer_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(TokenizerInvalid, match="trainyard tokenizer train"):
        vocabulary_size(str(tmp_path))
