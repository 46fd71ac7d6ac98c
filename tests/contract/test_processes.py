"""A process is known by more than its pid, and a stranger is never signalled."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unique_ids import unique_job_id
from trainyard.contract.locks import FileLock, LockBusy, is_held
from trainyard.contract.processes import MARKER, ProcessIdentity, descendants, find_by_marker, live_markers, wait_gone
from trainyard.contract.rundir import RunDir
from trainyard.service.launch.base import AttemptRef
from trainyard.service.launch.local import AGENT_TOKEN_VARIABLE, LocalLauncher

TEST, A, B, C, D = (unique_job_id(f"job_{name}") for name in ("test", "a", "b", "c", "d"))

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, MARKER: f"{TEST}/1"}
    with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_the_marker_finds_it_and_only_it(sleeper: subprocess.Popen[bytes]) -> None:
    assert [found.pid for found in find_by_marker(f"{TEST}/1")] == [sleeper.pid]
    assert find_by_marker(f"{TEST}/11") == []
    assert sleeper.pid in [found.pid for found in descendants(os.getpid())]


def test_a_signal_ends_exactly_the_one_that_was_found(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(sleeper.pid)
    assert identity is not None
    for other in (
        dataclasses.replace(identity, start_ticks=identity.start_ticks + 1),
        dataclasses.replace(identity, boot_id="another boot"),
        dataclasses.replace(identity, pid_namespace="pid:[1]"),
    ):
        assert not other.send(signal.SIGKILL)
        assert not other.alive()
    assert identity.alive()
    assert identity.send(signal.SIGKILL)
    assert wait_gone([identity], 60) == []
    assert not identity.send(signal.SIGKILL)


def test_a_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    identity = ProcessIdentity.of(sleeper.pid)
    assert identity is not None
    identity.send(signal.SIGKILL)
    assert wait_gone([identity], 60) == []  # not reaped yet: Popen has not looked
    assert ProcessIdentity.of(sleeper.pid) is None


NAMED = """
import signal, time
signal.signal(signal.SIGUSR2, lambda *_: None)
open("/proc/self/comm", "wb").write(b"B\\xfccher")
print("up", flush=True)
time.sleep(600)
"""


def test_a_process_may_have_a_name_in_another_encoding() -> None:
    with subprocess.Popen([sys.executable, "-c", NAMED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        identity = ProcessIdentity.of(process.pid)
        assert identity is not None
        assert identity.catches(signal.SIGUSR2)
        assert not identity.catches(signal.SIGUSR1)
        process.kill()


def test_identity_survives_json() -> None:
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    assert ProcessIdentity.from_json(identity.to_json()) == identity


def test_an_exclusive_lock_proves_that_no_process_shares_it(tmp_path: Path) -> None:
    file = tmp_path / "alive.lock"
    assert not is_held(file)
    with FileLock(file).take(shared=True), FileLock(file).take(shared=True):
        assert is_held(file)
        with FileLock(file) as third, pytest.raises(LockBusy):
            third.take(seconds=0.05)
    assert not is_held(file)


def test_a_lock_ends_with_its_last_inheritor(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "launch.lock").take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.descriptor,))
    lock.release()
    assert is_held(lock.path)
    child.communicate(b"\n")
    assert not is_held(lock.path)


def test_one_look_for_all_attempts_sees_those_that_live() -> None:
    def started(mark: str, **besides: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "600"], env={**os.environ, MARKER: mark, **besides})

    processes = [started(f"{A}/1", SPEAKS="yes"), started(f"{B}/2"), started(f"{C}/3", SPEAKS="")]
    gone = started(f"{D}/4", SPEAKS="yes")
    gone.kill()
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)  # a signal is sent before it is obeyed; it stays a zombie
    try:
        # The kernel shows what a process was given once it has become another program.
        while not all(find_by_marker(mark) for mark in (f"{A}/1", f"{B}/2", f"{C}/3")):
            assert all(process.poll() is None for process in processes)
        assert live_markers(with_variable="SPEAKS") & {f"{A}/1", f"{B}/2", f"{C}/3", f"{D}/4"} == {f"{A}/1", f"{C}/3"}
    finally:
        gone.wait()
        for process in processes:
            process.kill()
            process.wait()


def test_who_lives_is_seen_by_the_launcher_until_it_has_left_its_report(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path, tmp_path / "corpora")
    names = [AttemptRef(A, 1), AttemptRef(A, 2), AttemptRef(B, 1), AttemptRef(C, 1)]
    agents = [
        subprocess.Popen(["sleep", "600"], env={**os.environ, MARKER: str(name), AGENT_TOKEN_VARIABLE: "secret"})
        for name in names[:2]
    ]
    rank = subprocess.Popen(["sleep", "600"], env={**os.environ, MARKER: str(names[2])})
    try:
        while not all(find_by_marker(str(name)) for name in names[:3]):
            assert all(process.poll() is None for process in (*agents, rank))
        assert launcher.find_alive(names) == {names[0], names[1]}, "a rank without its agent is no sign of life"
        assert launcher.find_alive(names[1:]) == {names[1]}, "only who was asked for"
        report = RunDir(tmp_path / "runs" / A).attempt(2).exit
        report.parent.mkdir(parents=True)
        report.write_text("{}")
        assert launcher.find_alive(names) == {names[0]}
    finally:
        for process in (*agents, rank):
            process.kill()
            process.wait()
