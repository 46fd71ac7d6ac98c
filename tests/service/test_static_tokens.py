"""Static tokens: those of the settings, and of a file that changes while the service runs."""

import os
from pathlib import Path

import pytest

from trainyard.service.errors import Unauthorized
from trainyard.service.settings import InvalidSettings, Settings
from trainyard.service.static_tokens import TokenFile


def good(tokens: TokenFile, given: str) -> bool:
    try:
        tokens.require(given)
    except Unauthorized:
        return False
    return True


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# of the team\n\n  old  \n")
    tokens = TokenFile("fixed", file)
    assert [good(tokens, t) for t in ("fixed", "old", "new", "", "# of the team")] == [True, True, False, False, False]
    file.write_text("old\nnew\n")
    assert [good(tokens, t) for t in ("old", "new")] == [True, True], "both while they overlap"
    (tmp_path / "next").write_text("new\n")
    os.replace(tmp_path / "next", file)
    assert [good(tokens, t) for t in ("old", "new", "fixed")] == [False, True, True]


def test_an_empty_file_lets_nobody_in_and_a_missing_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("one\n")
    tokens = TokenFile(None, file)
    assert good(tokens, "one")
    file.unlink()
    assert good(tokens, "one")
    assert not good(tokens, "two")
    file.write_text("# none any more\n")
    assert tokens.is_required
    assert not good(tokens, "one")
    assert not good(tokens, "")
    assert not TokenFile(None, None).is_required


def test_the_setting(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with pytest.raises(InvalidSettings, match="can read"):
        Settings.read({"TRAINYARD_TOKEN_FILE": str(file)})
    file.write_text("\n# nothing\n")
    with pytest.raises(InvalidSettings, match="no token"):
        Settings.read({"TRAINYARD_TOKEN_FILE": str(file)})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSettings, match="can read"):
        Settings.read({"TRAINYARD_TOKEN_FILE": str(file)})
    file.write_text("secret\n")
    settings = Settings.read({"TRAINYARD_TOKEN_FILE": str(file)}, host="10.0.0.5")
    assert settings.token_file == file
    assert "secret" not in repr(settings)


def test_a_byte_order_mark_is_no_part_of_the_first_token(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first\nsecond\n", encoding="utf-8-sig")
    assert [good(TokenFile(None, file), token) for token in ("first", "second")] == [True, True]
