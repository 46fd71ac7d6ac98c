"""The size of a vocabulary, read without a tokenizer library."""

import json
from pathlib import Path

import pytest

from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.contract.allowed_paths import OutsideRoots
from trainyard.contract.tokenizer_info import (
    BYTE_VOCABULARY,
    TokenizerInfo,
    TokenizerInvalid,
    TokenizerTooLarge,
    vocabulary_size,
)


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


def test_the_error_names_a_directory_that_cannot_be_read() -> None:
    with public_tmp_dir() as folder:
        (folder / "private" / "tokenizer").mkdir(parents=True)
        (folder / "private").chmod(0)
        with drop_root(), pytest.raises(TokenizerInvalid, match=r"private/tokenizer cannot be read: Permission denied"):
            vocabulary_size(str(folder / "private" / "tokenizer"))
        (folder / "private").chmod(0o700)


@pytest.mark.parametrize("content", ["[]," * 2_000_000, '{"a":1},' * 1_600_000, "x" * ((64 << 20) + 1)])
def test_what_would_fill_the_memory_is_not_parsed(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "more": [' + content + "0]}")
    monkeypatch.setattr("trainyard.contract.tokenizer_info.json.loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(TokenizerTooLarge, match="at most 64 MiB and 3,000,000 values are read"):
        vocabulary_size(str(tmp_path))


@pytest.mark.long
def test_the_largest_tokenizers_in_use_are_parsed(tmp_path: Path) -> None:
    """As many tokens and merges as Gemma's has, each merge a list."""
    vocab = {f"token {number}": number for number in range(262_144)}
    merges = [["token", str(number)] for number in range(514_906)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}}))
    assert vocabulary_size(str(tmp_path)) == 262_144


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_leads_out_of_the_roots_is_not_read(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"<s>": 0}}}')
        (folder / "tokenizer_config.json").write_text("{}")
    TokenizerInfo.read(root / "tokenizer.json", [root])
    (root / name).unlink()
    (root / name).symlink_to(outside / name)
    with pytest.raises(OutsideRoots):
        TokenizerInfo.read(root / "tokenizer.json", [root])
    TokenizerInfo.read(root / "tokenizer.json", [tmp_path])
