"""The command works in any folder, also in one that has folders of our names: training code often has a ``model/``."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

TRAINYARD = Path(sys.executable).with_name("trainyard")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    for name in ("model", "worker", "service", "contract", "client"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a stranger was imported')\n")
    (tmp_path / "corpus.jsonl").write_text('{"text": "a text"}\n')
    return tmp_path


def test_modules_of_our_old_names_on_the_python_path_change_nothing(tmp_path: Path) -> None:
    """A `contract.py` on PYTHONPATH ended the service and the command of 0.1."""
    for name in ("contract", "client", "service", "worker", "model", "migrations"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('a stranger was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRAINYARD_HOME": str(tmp_path / "home")}
    lines: tuple[Sequence[str | Path], ...] = (
        [TRAINYARD, "db", "upgrade"],
        [TRAINYARD, "--help"],
        *([sys.executable, "-m", f"trainyard.{name}", "--help"] for name in ("service", "worker", "worker.agent")),
    )
    for line in lines:
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert "stranger" not in done.stderr, line
        assert done.returncode in (0, 2), (line, done.stderr)


@pytest.mark.parametrize("words", [["corpus", "check", "corpus.jsonl"], ["db", "upgrade"], ["--help"]])
def test_a_folder_of_our_name_is_not_taken_for_ours(foreign: Path, words: list[str]) -> None:
    environment = {**os.environ, "TRAINYARD_HOME": str(foreign / "home")}
    done = subprocess.run(
        [TRAINYARD, *words], cwd=foreign, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "stranger" not in done.stderr
