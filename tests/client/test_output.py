"""Every command: a reader that exits, a full disk, closed streams, and terminals that are not UTF-8."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from tests.client.fake_service import QUICK, FakeService, job, metric
from trainyard.client import api
from trainyard.client.cli.main import main
from trainyard.client.cli.parser import Command, trainyard
from trainyard.client.connection import Connection

CHINESE = "预训练-é"
READING = (
    ["list"], ["list", "--json"], ["show", CHINESE], ["metrics", CHINESE], ["metrics", CHINESE, "--csv"],
    ["metrics", CHINESE, "--json"], ["events", CHINESE], ["attempts", CHINESE], ["samples", CHINESE], ["devices"],
    ["checkpoints", CHINESE], ["logs", CHINESE], ["pause", CHINESE], ["version"], ["completion", "bash"],
    ["watch", CHINESE], ["--version"], ["show", "nosuch"], ["kill", CHINESE], ["token", "list"], ["webhook", "list"],
)  # fmt: skip
MODULES = {
    "corpus check": ["trainyard.worker.data.corpus", "check", "corpus.jsonl"],
    "corpus check --json": ["trainyard.worker.data.corpus", "check", "corpus.jsonl", "--json"],
    "corpus list": ["trainyard.service.maintenance.corpus_cache", "list"],
    "tokenizer train": ["trainyard.worker.data.tokenizers", "train", "corpus.jsonl", "--out", "t", "--vocab-size=300"],
    "db": ["trainyard.service.db.cli", "--help"],
}
"""Command -> the module that `trainyard` becomes, with arguments."""


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yield the words of each command that has no subcommands."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, (*words, name))
    else:
        yield list(words)


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Import what the commands import, once and not in every fork."""
    from trainyard.client.cli.spec_flags import spec_options

    for words in leaves(trainyard):
        command: click.Command = trainyard
        for word in words:
            assert isinstance(command, click.Group)
            command = command.commands[word]
        assert isinstance(command, Command)
        command.runner()
    spec_options()


def connected(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    def connection(url: str, token: str | None, timeout: float, *_: object) -> Connection:
        return Connection(url, token, timeout, QUICK, service.transport)

    monkeypatch.setattr(api, "Connection", connection)


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    ended = job("succeeded", name=CHINESE, message="完成", labels={"队": "甲"})
    service = FakeService(ended)
    service.curve, service.log = [metric(1), metric(2, None)], "损失 3.2 \udcff\n"
    service.log = "损失 3.2\n"
    service.rows = {
        "events": [{"at": "2026-01-31T16:31:05Z", "kind": "x", "message": "已保存", "actor": "王"}],
        "samples": [{"step": 1, "prompt": "你", "text": "你好"}],
        "checkpoints": [{"step": 1, "kind": "full", "path": "/数据", "bytes": 1, "sha256": "0", "loss": 1.0}],
    }
    connected(service, monkeypatch)
    return service


def in_a_child(line: list[str], stdout: int | None, stderr: Path, encoding: str = "utf-8") -> int:
    """Run one command line as the program does, in a fork of this process, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            with stderr.open("wb") as file:
                os.dup2(file.fileno(), 2)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stderr = os.fdopen(2, "w", encoding=encoding, closefd=False)
            if stdout is None:
                os.close(1)
                sys.stdout = None
            else:
                os.dup2(stdout, 1)
                sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
            sys.argv = ["trainyard", *line]
            code = main()
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_reader_that_exits_ends_every_command_quietly(tmp_path: Path, chinese: FakeService) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for line in [*([*words, "--help"] for words in leaves(trainyard)), *READING]:
        code = in_a_child(line, writing, tmp_path / "err")
        err = (tmp_path / "err").read_text()
        assert "Traceback" not in err, (line, err)
        assert code == (1 if "nosuch" in line else 2 if "kill" in line and "--help" not in line else 130) or (
            line[0] in ("token", "webhook") and code == 0
        ), (line, code, err)
    os.close(writing)


def test_a_full_disk_is_one_line_and_exit_code_1(tmp_path: Path, chinese: FakeService) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for line in [*([*words, "--help"] for words in leaves(trainyard)), *READING]:
        if line[0] in ("kill", "token", "webhook") and "--help" not in line:
            continue  # They print nothing on stdout here.
        code = in_a_child(line, full, tmp_path / "err")
        err = (tmp_path / "err").read_text()
        assert code == 1, (line, err)
        expected = (
            "nosuch" if "nosuch" in line else "trainyard: the output cannot be written: No space left on device\n"
        )
        assert expected in err, (line, err)
        assert "Traceback" not in err
    os.close(full)


def test_a_closed_stdout_is_no_traceback(tmp_path: Path, chinese: FakeService) -> None:
    for line in (["list"], ["show", CHINESE], ["watch", CHINESE], ["--version"], ["list", "--help"]):
        code = in_a_child(line, None, tmp_path / "err")
        err = (tmp_path / "err").read_text()
        assert (code, "Traceback" in err) == (0, False), (line, err)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_every_command_prints_other_scripts_on_every_terminal(
    tmp_path: Path, chinese: FakeService, encoding: str
) -> None:
    out = tmp_path / "out"
    for line in READING:
        with out.open("wb") as file:
            code = in_a_child(line, file.fileno(), tmp_path / "err", encoding)
        err = (tmp_path / "err").read_bytes().decode(encoding)
        assert "Traceback" not in err, (line, err)
        assert code == (1 if "nosuch" in line else 2 if "kill" in line else 0), (line, err)
        printed = out.read_bytes().decode(encoding)
        if "--json" in line and line[0] == "list":
            assert json.loads(printed)["data"][0]["name"] == CHINESE
        if line == ["show", CHINESE]:
            assert (CHINESE if encoding == "utf-8" else "\\u9884\\u8bad\\u7ec3") in printed


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *(("corpus check", where) for where in ("pipe", "full", "latin-1")),
        ("corpus check --json", "full"),
        ("corpus list", "pipe"),
        ("tokenizer train", "full"),
        ("db", "pipe"),
    ],
)
def test_the_commands_that_run_a_module_as_well(name: str, where: str, tmp_path: Path) -> None:
    module, *arguments = MODULES[name]
    (tmp_path / "corpus.jsonl").write_text('{"text": "some text"}\n' * 9 + "损坏的一行\n", encoding="utf-8")
    environment: dict[str, Any] = {**os.environ, "TRAINYARD_HOME": "家", "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    reading, writing = os.pipe()
    os.close(reading)
    if where == "full":
        writing = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE if where == "latin-1" else writing,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    err = done.stderr.decode("latin-1")
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    # The corpus has too many bad lines: 1 of 10.
    clean = 1 if name.startswith("corpus check") else 0
    assert done.returncode == {"pipe": 130, "full": 1, "latin-1": clean}[where], err
    assert ("the output cannot be written" in err) == (where == "full")


def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    # The merges of this corpus take far longer than the test: only the signal's default action can end it.
    code = (
        "import os, signal, sys\n"
        "from trainyard.worker.data import tokenizers as t\n"
        "def texts():\n"
        "    open('ready', 'w').close()\n"
        "    while True:\n"
        "        yield 'word'\n"
        "from contextlib import ExitStack\n"
        "with t.ended_by_ctrl_c():\n"
        "    t.train_tokenizer(texts(), 6400, __import__('pathlib').Path('out'))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE)
    (tmp_path / "ready").open().close()
    child.send_signal(2)
    _, err = child.communicate(timeout=200)
    assert (child.returncode, err) == (-2, b"")
    assert not (tmp_path / "out").exists()
