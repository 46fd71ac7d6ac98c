"""An agent that starts too late, or on a host with a failing disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked_service import FAKE_AGENT
from tests.faults.service_home import until
from tests.unique_ids import unique_job_id
from trainyard.contract.messages import ExitReport, read_message
from trainyard.contract.processes import MARKER, find_by_marker
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import DataSpec, JobSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.service.launch.base import AttemptRef, AttemptState, Launch
from trainyard.service.launch.local import LocalLauncher
from trainyard.worker.agent.__main__ import EXIT_NOT_STARTED
from trainyard.worker.agent.torchrun import ProcessTree

JOB = unique_job_id("job_late")


def launcher(home: Path) -> LocalLauncher:
    return LocalLauncher(home, home / "cache", agent=FAKE_AGENT)


def launch(number: int = 1, **labels: str) -> Launch:
    spec = JobSpec(labels=labels, data=DataSpec(data_path="/nowhere"))
    return Launch(AttemptRef(JOB, number), "att_1", spec, ("cpu:0",), "secret")


def agent(home: Path, number: int = 1) -> int:
    """Run an attempt's agent, as after a delayed launch; return its exit code."""
    attempt = RunDir(home / "runs" / JOB).attempt(number)
    attempt.path.mkdir(parents=True, exist_ok=True)
    attempt.spec.write_text(launch(number, steps="3", ranks="1").spec.model_dump_json())
    environment = {**os.environ, MARKER: f"{JOB}/{number}"}
    return subprocess.run([*FAKE_AGENT, str(attempt.path.parent), f"--attempt={number}"], env=environment).returncode


def test_an_attempt_that_was_given_up_is_not_started_by_a_late_agent(tmp_path: Path) -> None:
    local = launcher(tmp_path)
    assert local.find(launch().name).state is AttemptState.ABSENT
    local.kill(launch().name)
    assert local.find(launch().name).state is AttemptState.ABSENT
    assert agent(tmp_path) == EXIT_NOT_STARTED
    attempt = RunDir(tmp_path / "runs" / JOB).attempt(1)
    report = read_message(ExitReport, attempt.exit)
    assert report is not None
    assert (report.outcome, report.reason) == ("crashed", Reason.LAUNCH_FAILED)
    assert "given up before its agent started" in report.message
    assert not attempt.outbox.exists()


def test_nor_by_a_late_launcher(tmp_path: Path) -> None:
    launcher(tmp_path).kill(launch().name)
    late = launcher(tmp_path)
    late.start(launch(steps="3"))
    assert late.find(launch().name).state is AttemptState.ABSENT
    assert not RunDir(tmp_path / "runs" / JOB).attempt(1).agent_log.exists()


def test_an_agent_whose_attempt_has_a_successor_starts_nothing(tmp_path: Path) -> None:
    """The successor has ended meanwhile, so that no lock is held any more: the numbers still say who is late."""
    assert agent(tmp_path, 2) == 0
    assert agent(tmp_path, 1) == EXIT_NOT_STARTED
    first = RunDir(tmp_path / "runs" / JOB).attempt(1)
    assert not first.outbox.exists()
    assert agent(tmp_path, 3) == 0


def test_an_agent_without_a_readable_spec_says_so_and_counts_as_a_failed_launch(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / JOB)
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).spec.write_text("{")
    environment = {**os.environ, MARKER: f"{JOB}/1"}
    done = subprocess.run([*FAKE_AGENT, str(run.path), "--attempt=1"], env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_NOT_STARTED
    found = launcher(tmp_path).find(launch().name)
    assert found.report is not None
    assert found.report.reason is Reason.LAUNCH_FAILED
    assert "JSONDecodeError" in found.report.message


def test_ranks_whose_agent_cannot_watch_them_are_ended(tmp_path: Path) -> None:
    """The spec is good enough to start torchrun and not to supervise it."""
    run = RunDir(tmp_path / "runs" / JOB)
    run.attempt(1).path.mkdir(parents=True)
    run.attempt(1).spec.write_text('{"resources": {"nproc_per_node": 1}, "labels": {"steps": "100000"}}')
    environment = {**os.environ, MARKER: f"{JOB}/1"}
    assert subprocess.run([*FAKE_AGENT, str(run.path), "--attempt=1"], env=environment).returncode == EXIT_NOT_STARTED
    until(lambda: find_by_marker(f"{JOB}/1") == [])
    found = launcher(tmp_path).find(launch().name)
    assert found.report is not None
    assert found.report.reason is Reason.LAUNCH_FAILED


def test_an_agent_that_died_before_it_began_is_a_failed_launch(tmp_path: Path) -> None:
    broken = LocalLauncher(tmp_path, tmp_path / "cache", agent=("/bin/sh", "-c", "echo no torch here >&2; exit 1"))
    broken.start(launch())
    log = RunDir(tmp_path / "runs" / JOB).attempt(1).agent_log
    until(lambda: log.read_text() and not find_by_marker(f"{JOB}/1"))
    broken.kill(launch().name)
    found = broken.find(launch().name)
    assert found.report is not None
    assert (found.report.outcome, found.report.reason) == ("crashed", Reason.LAUNCH_FAILED)
    assert found.report.message == "the attempt's agent ended before it began: no torch here"
    assert found.report.error is not None
    assert found.report.error.traceback == "no torch here\n"


def supervise(tmp_path: Path, fails: str) -> dict[str, Any]:
    """Return the report of `failing_disk`, a supervisor whose disk fails three times."""
    attempt = RunDir(tmp_path).attempt(1)
    attempt.path.mkdir()
    attempt.spec.write_text(launch(steps="3").spec.model_dump_json())
    command = [sys.executable, "-m", "tests.faults.failing_disk", str(attempt.path), fails]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True, timeout=60
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_a_disk_in_trouble_does_not_end_a_good_run(tmp_path: Path) -> None:
    report = supervise(tmp_path, "read_step")
    assert report["running"] == [True] * 4
    assert report["calls"] == 4
    assert report["printed"].count("No space left on device; training continues") == 1
    assert report["status"] is None
    assert report["ended"] is True


def test_a_report_that_cannot_be_written_can_still_be_uploaded(tmp_path: Path) -> None:
    report = supervise(tmp_path, "exit")
    assert report["outcome"] == "crashed"
    assert report["printed"].count("No space left on device; the report is only uploaded") == 1
    assert report["ended"] is True


def test_a_stop_request_that_cannot_be_written_is_a_sigterm(tmp_path: Path) -> None:
    report = supervise(tmp_path, "stop")
    assert report["running"] == [True]
    assert report["status"] == -15
    assert report["stop_requested_at"] == 0.0
    assert Timeouts().stop == 120.0


def test_only_what_is_below_the_ancestor_is_ended(sleep: "subprocess.Popen[bytes]") -> None:
    """The caller's other children stay alive, and their exit codes can still be waited for."""
    shell = ["/bin/sh", "-c", "sleep 100 & sleep 100 & echo started; wait"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE) as ancestor, subprocess.Popen(["/bin/true"]) as torchrun:
        assert ancestor.stdout is not None
        ancestor.stdout.readline()
        processes = ProcessTree(torchrun, ancestor=ancestor.pid)
        assert len(processes.alive()) == 2
        assert processes.kill()
        assert processes.alive() == []
        assert processes.orphans == {}
        assert ancestor.wait(60) == 0
    assert sleep.poll() is None
    sleep.terminate()
    assert sleep.wait(60) == -signal.SIGTERM


def test_a_process_that_is_no_subreaper_cannot_end_all_below_it(sleep: "subprocess.Popen[bytes]") -> None:
    """Such as this one: below it is what other tests have started."""
    with pytest.raises(ValueError, match="call become_subreaper first"):
        ProcessTree(sleep, ancestor=os.getpid())
    assert sleep.poll() is None


@pytest.fixture
def sleep() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["/bin/sleep", "100"]) as process:
        yield process
        process.kill()
