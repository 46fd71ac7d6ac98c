"""Tab: commands, options and jobs, in real shells; and never a word where no service answers."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.client.conftest import Run
from trainyard.client.cli.completion import candidates, script
from trainyard.client.cli.parser import trainyard

SHELLS = ("bash", "zsh", "fish")
PATIENCE = 60.0
"""Seconds in which the service answers on a busy machine. A user waits for a tenth of a second."""
JOBS = [("job_aaa", "pre-12"), ("job_aab", "with space"), ("job_bbb", "$(touch x)")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        body = (
            b'{"status": "ok"}'
            if self.path == "/health"
            else json.dumps({"data": [{"id": job_id, "name": name} for job_id, name in JOBS]}).encode()
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("trainyard.client.cli.job_names.SERVICE_SECONDS", PATIENCE)
    monkeypatch.setenv("TRAINYARD_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("TRAINYARD_TOKEN", "t0ken")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_commands_and_subcommands() -> None:
    commands = set(candidates([], ""))
    assert {"list", "show", "db", "completion", "submit"} <= commands
    assert "__complete" not in commands
    assert {"upgrade", "copy", "backup"} <= set(candidates(["db"], ""))
    assert list(candidates(["completion"], "")) == list(SHELLS)


def test_options_and_their_values() -> None:
    assert {"--rank", "--follow", "-f"} <= set(candidates(["logs"], "-"))
    assert "--watch" in set(candidates(["submit"], "--"))
    assert list(candidates(["submit"], "")) == [], "files"
    assert set(candidates(["export", "j", "--format"], "")) == {"hf", "minimind"}
    assert list(candidates(["logs", "--tail"], "")) == [], "a number of the user's own"
    assert list(candidates(["tokenizer", "train"], "")) == [], "files"


def test_jobs_by_id_and_by_name(url: str) -> None:
    expected = ["job_aaa", "pre-12", "job_aab", "job_bbb"]
    assert list(candidates(["show"], "")) == expected, "a name that a shell would take apart is left out"
    assert list(candidates(["logs", "--tail", "5"], "")) == expected
    assert list(candidates(["show", "job_aaa"], "")) == [], "one job is enough"
    assert Handler.asked[:2] == [("/health", None), ("/jobs?limit=50", "Bearer t0ken")]


def test_what_begins_like_the_word(run: Run, url: str) -> None:
    assert run("__complete", "show", "job_a") == (0, "job_aaa\njob_aab\n", "")
    assert run("__complete", "che") == (0, "checkpoints\n", "")
    assert run("__complete")[1].splitlines() == sorted(set(candidates([], "")))


@pytest.mark.parametrize("where", ["http://127.0.0.1:1", "http://", "nonsense", "http://127.0.0.1:99999999"])
def test_no_service_is_no_word(run: Run, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("TRAINYARD_URL", where)
    assert run("__complete", "show", "") == (0, "", "")


def test_it_needs_nothing_heavy() -> None:
    code = (
        "import sys; import trainyard.client.cli.completion as c; list(c.candidates(['show'], '')); print(*sys.modules)"
    )
    environment = {**os.environ, "TRAINYARD_URL": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "pydantic", "httpx2", "rich", "numpy", "sqlalchemy", "fastapi"}


def test_the_whole_client_needs_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys, trainyard.client\n"
        "for module in pkgutil.walk_packages(trainyard.client.__path__, 'trainyard.client.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "numpy", "sqlalchemy", "fastapi"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash(url: str, tmp_path: Path) -> None:
    words = "COMP_WORDS=(trainyard show job_a); COMP_CWORD=2; _trainyard_completion trainyard"
    words += "; printf '%s\\n' \"${COMPREPLY[@]}\""
    assert shell("bash", words, tmp_path) == ["job_aaa", "job_aab"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish(url: str, tmp_path: Path) -> None:
    assert shell("fish", "complete -C 'trainyard show job_a'", tmp_path)[:2] == ["job_aaa", "job_aab"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh(url: str, tmp_path: Path) -> None:
    ask = "compadd() { shift; print -l -- $@ }; words=(trainyard show job_a); CURRENT=3; _trainyard"
    assert shell("zsh", ask, tmp_path) == ["job_aaa", "job_aab"]


def shell(name: str, words: str, folder: Path) -> list[str]:
    """What a shell prints that has read our script; `trainyard` is this very code."""
    command = folder / "trainyard"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nimport trainyard.client.cli.job_names, trainyard.client.cli.main\n"
        f"trainyard.client.cli.job_names.SERVICE_SECONDS = {PATIENCE}\nsys.exit(trainyard.client.cli.main.main())\n"
    )
    command.chmod(0o755)
    stubs = "compdef() { :; }\n" if name == "zsh" else ""
    (folder / "script").write_text(f"{stubs}{script(name)}\n{words}\n")
    root = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": root}
    done = subprocess.run([name, str(folder / "script")], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_shell_has_a_script(run: Run) -> None:
    for name in SHELLS:
        assert run("completion", name)[1] == f"{script(name)}\n"
        assert "_TRAINYARD_COMPLETE" in script(name)
    assert trainyard.commands["completion"].make_context("completion", ["fish"]).params == {"shell": "fish"}
