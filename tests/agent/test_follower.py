"""The agents of the other nodes: real processes, ranks that are none, and a directory that all of them share."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.conftest import DRIVER, until
from tests.unique_ids import unique_job_id
from trainyard.contract.locks import FileLock
from trainyard.contract.processes import MARKER, find_by_marker
from trainyard.contract.rundir import UNSEEN, AttemptDir, RunDir, read_json, write_json
from trainyard.worker.agent import follower
from trainyard.worker.agent.rendezvous import NodeInfo

JOB = unique_job_id("job_follow")
MARK = f"{JOB}/1"
RESOURCES = '{"resources": {"nproc_per_node": 1}}'
PARENT = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()"
"""Stands in for the cluster's process above the agent: killing it orphans the agent."""


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    made = RunDir(tmp_path / JOB).attempt(1)
    made.path.mkdir(parents=True)
    made.spec.write_text(RESOURCES)
    (made.path.parent / "current").write_text("1")
    return made


@pytest.fixture
def started(attempt: AttemptDir) -> Iterator[list["subprocess.Popen[str]"]]:
    """Agents of the second node, each under a parent of its own."""
    made: list[subprocess.Popen[str]] = []
    yield made
    for parent in made:
        parent.kill()
        parent.communicate()
    for process in find_by_marker(MARK):
        process.send(signal.SIGKILL)
    until(lambda: find_by_marker(MARK) == [])


def start(attempt: AttemptDir, started: list["subprocess.Popen[str]"]) -> tuple["subprocess.Popen[str]", int]:
    """Start an agent; return its parent and its pid."""
    command = [*DRIVER, str(attempt.path.parent), "--attempt=1"]
    environment = {
        **os.environ,
        MARKER: MARK,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "TRAINYARD_NODE": "1",
        "TRAINYARD_NODES": "2",
        "SLURMD_NODENAME": "second",
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-S", "-c", PARENT, *command], env=environment, text=True, **pipes)
    started.append(parent)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def exit_record(attempt: AttemptDir) -> dict[str, Any]:
    until(attempt.node(1).exists)
    found: dict[str, Any] = read_json(attempt.node(1)) or {}
    return found


def meet(attempt: AttemptDir) -> None:
    write_json(attempt.rendezvous, {"host": "127.0.0.1", "port": 1})


def test_a_node_runs_its_ranks_until_the_first_one_s_are_over(
    attempt: AttemptDir, started: list["subprocess.Popen[str]"]
) -> None:
    start(attempt, started)
    meet(attempt)
    until(lambda: len(find_by_marker(MARK)) >= 3)  # what started the agent, the agent, its torchrun
    attempt.over.touch()
    assert exit_record(attempt) == {"name": "second", "status": 0, "message": None}
    until(lambda: len(find_by_marker(MARK)) == 1)


def test_a_cluster_that_loses_sight_of_the_agent_leaves_no_ranks(
    attempt: AttemptDir, started: list["subprocess.Popen[str]"]
) -> None:
    parent, _ = start(attempt, started)
    meet(attempt)
    until(lambda: len(find_by_marker(MARK)) >= 3)
    parent.kill()
    assert exit_record(attempt)["message"] == "the cluster lost sight of this node's agent"
    until(lambda: find_by_marker(MARK) == [])


def test_sigterm_is_left_to_the_first_node(attempt: AttemptDir, started: list["subprocess.Popen[str]"]) -> None:
    _, agent = start(attempt, started)
    meet(attempt)
    until(lambda: len(find_by_marker(MARK)) >= 3)
    os.kill(agent, signal.SIGTERM)
    attempt.over.touch()
    assert exit_record(attempt)["status"] == 0


@pytest.mark.parametrize(
    ("current", "said"), [("2", "attempt 2 has followed this one"), ("", "attempt  has followed this one")]
)
def test_a_node_that_comes_late_starts_nothing(
    attempt: AttemptDir, started: list["subprocess.Popen[str]"], current: str, said: str
) -> None:
    (attempt.path.parent / "current").write_text(current)
    meet(attempt)
    start(attempt, started)
    assert exit_record(attempt) == {"name": "second", "status": None, "message": said}


def test_a_node_that_finds_the_attempt_over_starts_nothing(
    attempt: AttemptDir, started: list["subprocess.Popen[str]"]
) -> None:
    attempt.exit.touch()
    start(attempt, started)
    assert "had ended before" in exit_record(attempt)["message"]


def test_a_node_starts_nothing_beside_ranks_of_before(
    attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follower, "LOCK_SECONDS", 0.1)
    meet(attempt)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with FileLock(RunDir(attempt.path.parent).alive_lock).take():
            run = RunDir(attempt.path.parent)
            assert follower.run_follower(run, attempt, NodeInfo(1, 2, clustered=True)) == 0, "its word is left"
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    assert "held by another process" in exit_record(attempt)["message"]
    assert "nothing was started" in capsys.readouterr().err


class Ranks:
    """Never end by themselves."""

    def torchrun_status(self) -> int | None:
        return None


def test_ranks_that_do_not_follow_the_first_node_s_are_given_up(
    attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "PEER_EXIT_GRACE_SECONDS", 0.3)
    attempt.over.touch()
    began = time.monotonic()
    message = follower._watch(Ranks(), attempt, os.getppid())  # type: ignore[arg-type]
    assert message == "the first node's ranks ended, and these did not follow"
    assert time.monotonic() - began >= 0.3


def test_a_node_that_does_not_see_the_home_says_so_where_the_cluster_keeps_it(
    attempt: AttemptDir, started: list["subprocess.Popen[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt.spec.unlink()
    code = """if True:
        import sys
        from trainyard.worker.agent import __main__ as agent
        agent.HOME_SECONDS = 0.1
        sys.exit(agent.main())
    """
    command = [sys.executable, "-c", code, str(attempt.path.parent), "--attempt=1"]
    environment = {**os.environ, "TRAINYARD_NODE": "1", "TRAINYARD_NODES": "2", "SLURMD_NODENAME": "second"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 75
    assert f"{UNSEEN}: {attempt.path} is not there on second" in done.stderr
    assert list(attempt.path.iterdir()) == [], "nothing is written into what may be a disk of the node's own"


def test_an_error_of_the_network_file_system_does_not_end_the_ranks(
    attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[object] = []
    intact = os.stat

    def stale_at_first(path: Any, **options: Any) -> os.stat_result:
        if path != attempt.over:
            return intact(path, **options)
        polled.append(path)
        if len(polled) == 3:
            attempt.over.touch()
        if len(polled) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return intact(path, **options)

    monkeypatch.setattr(follower, "PEER_EXIT_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(os, "stat", stale_at_first)
    message = follower._watch(Ranks(), attempt, os.getppid())  # type: ignore[arg-type]
    assert message == "the first node's ranks ended, and these did not follow"
