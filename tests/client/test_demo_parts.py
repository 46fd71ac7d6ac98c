import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.api import Trainyard
from client.demo.curl import curl
from client.demo.docstrings import LEAST_CHARACTERS, docstrings, standard_library, write_corpus
from client.demo.loss_lines import EVERY, LossLines, done_again, loss_line, past, running_again
from client.demo.machine import Machine
from client.demo.proof import damaged_files, done_twice, sha256, weights_of
from client.demo.ranks import kill_one, ranks_of
from client.demo.recipe import KILL_AFTER, LEARNED_LOSS, PAUSE_AFTER, SAVE_INTERVAL, STEPS, UNTRAINED_LOSS, spec
from client.demo.server import DemoService, ServiceFailed, environment
from client.errors import WaitTimedOut
from contract.parsing import parse_spec
from contract.processes import MARKER
from tests.client.fake_service import URL, FakeService, job, metric

JOB = "job_7f3kq9"


# The corpus


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    before = set(sys.modules)
    file = tmp_path / "corpus.jsonl"
    number = write_corpus(file)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert number == len(texts) > 5000
    assert min(map(len, texts)) >= LEAST_CHARACTERS
    assert len(set(texts)) == len(texts)
    assert any("Return" in text for text in texts)
    assert not {"turtle", "tkinter", "antigravity"} & (set(sys.modules) - before)
    assert standard_library().is_dir()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of a few files: one broken, one of somebody else, one with each kind of docstring."""
    sources = {
        "b.py": '"""The second module, with a docstring that is long enough."""\n',
        "a.py": '''
            """The first module, with a docstring that is long enough."""
            class C:
                """A class, whose docstring is certainly long enough to count."""
                async def f(self):
                    """An async function, whose docstring is long enough.

                    With a second paragraph.
                    """
                def g(self):
                    """Too short."""
            def h():
                """The first module, with a docstring that is long enough."""
            raise SystemExit("this module must never be imported")
            ''',
        "broken.py": "def (:\n",
        "nul.py": "x = 1\0",
        "site-packages/other.py": '"""Somebody else\'s docstring, which is long enough too."""\n',
        "test/test_a.py": '"""A docstring of a test of the standard library itself."""\n',
    }
    for name, text in sources.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "lib" / "latin.py").write_bytes(b'"""\xe9 is no UTF-8, so that nobody can read this module."""')
    return tmp_path / "lib"


def test_docstrings_in_a_fixed_order_each_once(library: Path) -> None:
    found = list(docstrings(library))
    assert found == [
        "The first module, with a docstring that is long enough.",
        "A class, whose docstring is certainly long enough to count.",
        "An async function, whose docstring is long enough.\n\nWith a second paragraph.",
        "The second module, with a docstring that is long enough.",
    ]
    assert found == list(docstrings(library))


# The run


@pytest.mark.parametrize(
    "machine", [Machine(1, 1, 0), Machine(2, 1, 0), Machine(64, 1, 0), Machine(8, 1, 1), Machine(8, 1, 8)]
)
def test_the_recipe_is_a_valid_spec(machine: Machine) -> None:
    made = parse_spec(spec(machine, Path("/c.jsonl"), Path("/t")))
    assert made.problems == ()
    assert made.spec.rows_per_step == 16
    assert made.spec.resources.nproc_per_node == machine.ranks
    assert made.spec.training.max_steps == STEPS


def test_the_accident_happens_where_there_is_something_to_compare() -> None:
    saved_before = KILL_AFTER // SAVE_INTERVAL * SAVE_INTERVAL
    assert SAVE_INTERVAL < PAUSE_AFTER < saved_before < KILL_AFTER - 20
    assert KILL_AFTER < saved_before + SAVE_INTERVAL < STEPS
    assert pytest.approx(0.6 * UNTRAINED_LOSS) == LEARNED_LOSS
    assert round(UNTRAINED_LOSS, 2) == 8.76


def test_the_machine_in_words(tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    assert Machine.found(tmp_path).gpus == 1
    assert Machine.found(tmp_path / "none").cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 avx512_bf16", "bfloat16"), ("avx2 avx512f", "float32")])
def test_bfloat16_is_used_where_the_cores_have_it(tmp_path: Path, flags: str, dtype: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    machine = Machine.found(tmp_path, tmp_path / "cpuinfo")
    assert spec(machine, tmp_path, tmp_path)["training"]["dtype"] == dtype


def test_a_machine_describes_itself() -> None:
    assert "2 cores, 8.0 GB memory, no GPU" in str(Machine(2, 8_000_000_000, 0))
    assert str(Machine(1, 1, 0)).endswith("1 rank on the CPU")
    assert str(Machine(4, 1, 3)).endswith("2 ranks on the GPU")


def test_curl_can_be_copied(tmp_path: Path) -> None:
    awkward = tmp_path / "it's a spec.json"
    line = curl("POST", "http://h/jobs?a=1&b=2", awkward)
    assert shlex.split(line) == [
        *("curl", "-sS", "-X", "POST", "-H", "Content-Type: application/json"),
        *("-d", f"@{awkward}", "http://h/jobs?a=1&b=2"),
    ]
    assert curl("GET", "http://h/jobs") == "curl -sS http://h/jobs"


def test_curl_does_what_it_says_in_a_shell(tmp_path: Path) -> None:
    file = tmp_path / "a b.json"
    file.write_text('{"a": 1}')
    shown = curl("POST", "http://127.0.0.1:1/jobs", file).replace("curl", "printf '%s\\n'", 1)
    done = subprocess.run(shown, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [f"@{file}", "http://127.0.0.1:1/jobs"]


# Loss lines


def test_a_loss_line() -> None:
    assert loss_line(metric(50, 4.38), 8.76) == f"step   50   loss 4.380   {'#' * 12}{'-' * 12}   lr 2.61e-04"
    assert "loss -   ----" in loss_line(metric(50, None), 8.76)


def test_each_line_is_said_once(service: FakeService, trainyard: Trainyard) -> None:
    said: list[str] = []
    lines = LossLines(trainyard, JOB, 8.76, said.append)
    service.curve = [metric(step) for step in range(10, EVERY + 11, 10)]
    for _ in range(2):
        lines.until(lambda _: True, 1)
    service.curve += [metric(step, attempt=2) for step in range(EVERY, 2 * EVERY + 1, 10)]
    lines.until(lambda _: True, 1)
    assert [line.split()[1] for line in said] == ["10", str(EVERY), str(2 * EVERY)]


def test_waiting_is_bounded_and_ends_with_a_failure(service: FakeService, trainyard: Trainyard) -> None:
    lines = LossLines(trainyard, JOB, 8.76, print)
    with pytest.raises(WaitTimedOut):
        lines.until(lambda _: False, 0.0)
    service.jobs[JOB] = job("failed")
    assert lines.until(lambda _: False, 0.0)["status"] == "failed"


def changed(one: Any, **changes: Any) -> Any:
    return {**one, **changes}


def test_the_conditions(service: FakeService, trainyard: Trainyard) -> None:
    running: Any = job("running", attempt=2)
    assert past(12400)(running)
    assert not past(12401)(running)
    assert past(99999)(changed(running, status="paused"))
    assert not past(1)(changed(running, progress=None))
    assert running_again(1)(running)
    assert not running_again(2)(running)
    assert not running_again(1)(changed(running, phase="loading"))
    service.curve = [metric(100, attempt=1)]
    assert not done_again(trainyard, 100)(running)
    service.curve.append(metric(100, attempt=2))
    assert done_again(trainyard, 100)(running)
    assert not done_again(trainyard, 101)(running)


# Proofs


def test_a_damaged_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    told = {"bytes": 7, "sha256": sha256(tmp_path / "model.safetensors")}
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"model.safetensors": told}}))
    assert damaged_files(tmp_path) == []
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert damaged_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert damaged_files(tmp_path) == ["model.safetensors"]
    (tmp_path / "manifest.json").unlink()
    assert damaged_files(tmp_path) == ["manifest.json"]


def test_steps_done_twice() -> None:
    before = [metric(10, 5.0), metric(20, 4.0), metric(30, 3.0)]
    after = [metric(30, 3.0, attempt=2), metric(40, 2.0, attempt=2)]
    assert done_twice(before, after) == [(30, 3.0, 3.0)]


def test_the_weights_file(tmp_path: Path) -> None:
    made = {"spec": {"model": {"hidden_size": 128, "use_moe": True}, "checkpoint": {"save_weight": "pretrain"}}}
    checkpoint = tmp_path / "checkpoints" / "step-00000010"
    with pytest.raises(FileNotFoundError, match=r"pretrain_128_moe\.pth"):
        weights_of(made, checkpoint)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain_128_moe.pth").touch()
    assert weights_of(made, checkpoint) == tmp_path / "out" / "pretrain_128_moe.pth"


# Ranks


@pytest.fixture
def attempt() -> Iterator[str]:
    """Two processes that look like the ranks of an attempt, and one like its agent."""
    mark = f"job_{os.getpid()}"
    variables: list[dict[str, str]] = [{"RANK": "0"}, {"RANK": "1"}, {}]
    environments = [{"PATH": os.environ["PATH"], MARKER: f"{mark}/1", **one} for one in variables]
    processes = [subprocess.Popen(["sleep", "60"], env=environment) for environment in environments]
    yield mark
    for process in processes:
        process.kill()
        process.wait()


def test_ranks_are_found_by_their_marker(attempt: str) -> None:
    deadline = time.monotonic() + 10
    while len(ranks_of(attempt, 1)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(ranks_of(attempt, 1)) == [0, 1]
    assert ranks_of(attempt, 2) == {}


def test_the_highest_rank_is_killed_and_nobody_else(attempt: str) -> None:
    rank, pid = kill_one(attempt, 1)
    assert rank == 1
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    assert ended.si_status == signal.SIGKILL
    assert 0 in ranks_of(attempt, 1)


def test_no_rank_to_kill_is_said() -> None:
    with pytest.raises(LookupError, match="no rank of job_none, attempt 1"):
        kill_one("job_none", 1, seconds=0.05)


# The service of the demo


def test_the_user_s_own_settings_stay_outside(tmp_path: Path) -> None:
    made = environment({"PATH": "/bin", "TRAINYARD_TOKEN": "secret", "TRAINYARD_URL": URL}, tmp_path)
    assert made == {
        "PATH": "/bin",
        "TRAINYARD_HOME": str(tmp_path),
        "TRAINYARD_HOST": "127.0.0.1",
        "TRAINYARD_PORT": "0",
    }


def test_a_service_that_ends_at_once_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.demo.server.environment", lambda *_: {"PATH": "/bin", "PYTHONPATH": "/nowhere"})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DemoService(tmp_path) as service, pytest.raises(ServiceFailed, match="exit code 1"):
        service.start()
    assert service.tail(3) == []
