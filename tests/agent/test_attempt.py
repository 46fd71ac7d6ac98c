"""One attempt from launch to report, with every way it can end. The agent is real, the ranks are fake and quick."""

import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.agent.conftest import DRIVER, NAME, go_on, launch, until
from tests.agent.fake_ingest import TOKEN, FakeIngest
from trainyard.contract.locks import is_held
from trainyard.contract.messages import ExitReport, read_message
from trainyard.contract.processes import MARKER, ProcessIdentity, find_by_marker
from trainyard.contract.rundir import AttemptDir, RunDir, read_json, write_json
from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Desired, Reason
from trainyard.service.launch import local
from trainyard.service.launch.base import AttemptState
from trainyard.service.launch.local import LocalLauncher


def ended(launcher: LocalLauncher) -> ExitReport:
    until(lambda: launcher.find(NAME).state is AttemptState.ENDED)
    report = launcher.find(NAME).report
    assert report is not None
    assert find_by_marker(str(NAME)) == [] or all(
        process.variable("RANK") is None for process in find_by_marker(str(NAME))
    )
    return report


def processes(variable: str, value: str | None = None) -> list[ProcessIdentity]:
    found = [process for process in find_by_marker(str(NAME)) if process.variable(variable) is not None]
    return [process for process in found if value is None or process.variable(variable) == value]


def torchrun() -> ProcessIdentity:
    plain = [
        p
        for p in find_by_marker(str(NAME))
        if p.variable("RANK") is None and p.variable("TRAINYARD_ATTEMPT_ID") is None
    ]
    return plain[0]


def test_a_good_run_uploads_every_line_once_and_is_completed(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    assert launcher.find(NAME).state is AttemptState.ABSENT
    launcher.start(launch(steps="30"))
    assert launcher.find(NAME).state is AttemptState.ALIVE
    report = ended(launcher)
    assert (report.outcome, report.step, report.reason) == ("completed", 30, None)
    until(lambda: service.reports)
    assert ExitReport.model_validate(service.reports[0]) == report
    assert sorted(service.lines) == list(range(1, report.last_seq + 1))
    assert service.duplicates == 0
    assert [line["step"] for line in service.lines.values() if line["kind"] == "metric"] == list(range(1, 31))
    assert not [text for text in service.authorizations if TOKEN in text or "Bearer" in text], "it is never sent"
    assert not is_held(RunDir(attempt.path.parent).launch_lock)
    assert not is_held(RunDir(attempt.path.parent).alive_lock)


def test_the_resume_step_and_the_save_request_are_written_for_the_ranks(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    launcher.save(NAME)
    assert not attempt.path.exists(), "a save request without an attempt is not kept"
    launcher.start(replace(launch(steps="30"), resume_step=1200))
    assert attempt.read_resume_from() == 1200
    launcher.save(NAME)
    assert attempt.save.exists()
    assert ended(launcher).outcome == "completed"


def test_only_changed_settings_are_written_for_the_ranks(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    spec = launch().spec
    same = {"log_interval": spec.reporting.log_interval, "save_interval": spec.checkpoint.save_interval, "keep_last": 3}
    service.settings = same
    launcher.start(launch(steps="100000"))
    until(lambda: len(service.lines) > 5)
    assert not attempt.settings.exists(), "nothing was changed"
    service.settings = {**same, "log_interval": 7}
    until(attempt.settings.exists)
    assert read_json(attempt.settings) == service.settings
    # An answer that makes no sense is no answer, and harms nothing.
    service.settings = {**same, "log_interval": 0}
    known = len(service.lines)
    service.settings = {**same, "log_interval": 8}
    until(lambda: len(service.lines) > known and read_json(attempt.settings) == service.settings)
    service.desired = Desired.KILL
    assert ended(launcher).outcome == "killed"


def test_the_token_is_neither_in_the_ranks_environment_nor_in_a_file(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    wanted = launch(steps="50", fault="file_at_10")
    launcher.start(wanted)
    until(lambda: processes("RANK"))
    for process in processes("RANK"):
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert wanted.token.encode() not in environment
    go_on(attempt)
    ended(launcher)
    for file in attempt.path.rglob("*"):
        if file.is_file():
            assert wanted.token.encode() not in file.read_bytes(), file


def test_a_stranger_on_the_port_of_a_dead_service_is_not_obeyed_and_learns_no_token(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir, tmp_path: Path
) -> None:
    service.token = None
    service.desired = Desired.KILL
    launcher.start(launch(steps="60"))
    until(lambda: "is not from the service of this run" in attempt.agent_log.read_text())
    report = ended(launcher)
    assert (report.outcome, report.step) == ("completed", 60)
    assert service.authorizations
    assert not [text for text in service.authorizations if TOKEN in text or TOKEN.encode().hex() in text]
    # The real service is back: it gets every line.
    second = FakeIngest()
    try:
        write_json(tmp_path / "service.json", {"url": second.url})
        until(lambda: second.reports)
        assert sorted(second.lines) == list(range(1, report.last_seq + 1))
    finally:
        second.close()


HANG = Timeouts(progress=3.0)
"""Far longer than a step takes on a busy host, if no save in it waits for a disk."""


@pytest.mark.parametrize("desired", [Desired.PAUSE, Desired.CANCEL])
def test_on_a_stop_request_the_ranks_save(launcher: LocalLauncher, service: FakeIngest, desired: Desired) -> None:
    launcher.start(launch(steps="100000"))
    until(lambda: len(service.lines) > 5)
    service.desired = desired
    report = ended(launcher)
    assert report.outcome == "stopped"
    assert 0 < report.step < 100_000


def test_the_launcher_s_own_hint_stops_without_the_service(launcher: LocalLauncher, service: FakeIngest) -> None:
    service.down = True
    launcher.start(launch(steps="100000"))
    until(lambda: processes("RANK"))
    launcher.stop(NAME)
    assert ended(launcher).outcome == "stopped"
    service.down = False
    until(lambda: service.reports)


def test_kill_ends_all_at_once_and_is_no_success(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="100000"))
    until(lambda: len(service.lines) > 5)
    service.desired = Desired.KILL
    report = ended(launcher)
    assert (report.outcome, report.reason) == ("killed", Reason.USER)


def test_ranks_that_ignore_a_stop_request_are_killed(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(Timeouts(stop=0.3, term=0.3), steps="100000", deaf="1"))
    until(lambda: len(service.lines) > 5)
    service.desired = Desired.PAUSE
    report = ended(launcher)
    assert (report.outcome, report.reason) == ("killed", Reason.USER)
    assert "grace" in report.message


def test_a_rank_killed_is_named(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="1000", fault="signal_9_at_5", fault_rank="1"))
    report = ended(launcher)
    assert (report.outcome, report.reason) == ("crashed", Reason.WORKER_CRASHED)
    assert "rank 1 was killed by SIGKILL" in report.message
    assert report.error is not None
    assert report.error.rank == 1


def test_torchrun_killed_leaves_no_rank(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="100000"))
    # The first rank makes steps while the second one is still started.
    until(lambda: len(service.lines) > 5 and len(processes("RANK")) == 2)
    ranks = processes("RANK")
    torchrun().send(signal.SIGKILL)
    report = ended(launcher)
    assert (report.outcome, report.reason) == ("crashed", Reason.WORKER_CRASHED)
    assert "torchrun was killed by SIGKILL" in report.message
    assert not any(rank.alive() for rank in ranks)


def test_a_child_of_a_rank_does_not_survive_the_attempt(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="20", fault="loader_at_5"))
    assert ended(launcher).outcome == "completed"
    until(lambda: not processes("RANK"))


def test_stopped_ranks_are_found_by_their_lack_of_progress(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(HANG, steps="1000", save="1000", fault="signal_19_at_100"))
    report = ended(launcher)
    assert (report.outcome, report.reason, report.step) == ("crashed", Reason.HUNG, 99)


@pytest.mark.parametrize("labels", [{}, {"talks": "1"}], ids=["stacks", "outcome"])
def test_a_hung_attempt_stays_hung_whatever_a_rank_says_after(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir, labels: dict[str, str]
) -> None:
    """The signal for the stacks reaches the ranks alone: a compiler that it ended would look like a broken compiler."""
    launcher.start(launch(HANG, 1, steps="1000", pace="0.05", save="1000", fault="compiler_at_100", **labels))
    report = ended(launcher)
    assert (report.outcome, report.reason, report.step) == ("crashed", Reason.HUNG, 99)
    assert attempt.outcome.exists() == bool(labels)
    assert ("the stacks" in attempt.rank_log(0).read_text()) != bool(labels)


def test_a_service_that_is_away_harms_nothing_and_misses_nothing(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    launcher.start(launch(steps="60", fault="file_at_30"))
    until(lambda: len(service.lines) > 5)
    service.down = True
    go_on(attempt)
    report = ended(launcher)
    assert report.outcome == "completed"
    assert len(service.lines) < report.last_seq
    missing = launcher.unacked_lines(NAME, len(service.lines), 1000)
    assert [line["seq"] for line in missing] == list(range(len(service.lines) + 1, report.last_seq + 1))
    service.down = False
    until(lambda: service.reports)
    assert sorted(service.lines) == list(range(1, report.last_seq + 1))


def test_a_restarted_service_is_found_at_its_new_address(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir, tmp_path: Path
) -> None:
    launcher.start(launch(steps="60", fault="file_at_30"))
    until(lambda: len(service.lines) > 5)
    service.down = True
    second = FakeIngest()
    try:
        second.lines.update(service.lines)
        write_json(tmp_path / "service.json", {"url": second.url})
        go_on(attempt)
        report = ended(launcher)
        until(lambda: second.reports)
        assert sorted(second.lines) == list(range(1, report.last_seq + 1))
    finally:
        second.close()


def test_agent_killed_is_seen_as_orphans_and_they_can_be_ended(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="100000"))
    until(lambda: len(service.lines) > 5)
    for agent in processes("TRAINYARD_ATTEMPT_ID"):
        agent.send(signal.SIGKILL)
    until(lambda: launcher.find(NAME).state is AttemptState.ORPHANED)
    launcher.kill(NAME)
    found = launcher.find(NAME)
    assert found.state is AttemptState.ENDED
    assert found.report is not None
    assert (found.report.outcome, found.report.reason) == ("crashed", Reason.AGENT_LOST)
    assert found.report.step > 0


def test_no_second_attempt_starts_while_a_rank_of_the_first_lives(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.start(launch(steps="100000"))
    until(lambda: len(service.lines) > 5)
    for agent in processes("TRAINYARD_ATTEMPT_ID"):
        agent.send(signal.SIGKILL)
    launcher.start(launch(number=2, steps="5"))
    second = RunDir(attempt.path.parent).attempt(2)
    until(second.exit.exists)
    report = read_message(ExitReport, second.exit)
    assert report is not None
    assert (report.outcome, report.reason) == ("crashed", Reason.LAUNCH_FAILED)
    assert not second.outbox.exists()
    assert processes("RANK"), "the first attempt's ranks are untouched"


def test_an_attempt_of_before_a_reboot_is_told_from_a_lost_one(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    attempt.path.mkdir(parents=True)
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    # This very process has the recorded pid: a stranger that must neither be taken for the agent nor signalled.
    attempt.started.write_text(json.dumps({"agent": {**identity.to_json(), "boot_id": "the boot before"}}))
    found = launcher.find(NAME)
    assert found.state is AttemptState.ENDED
    assert found.report is not None
    assert found.report.reason is Reason.HOST_RESTARTED
    launcher.kill(NAME)


def test_a_container_restarted_under_the_same_namespace_number_is_told_from_a_lost_agent(
    launcher: LocalLauncher, service: FakeIngest, attempt: AttemptDir
) -> None:
    attempt.path.mkdir(parents=True)
    first = ProcessIdentity.of(1)
    assert first is not None
    older = {**first.to_json(), "start_ticks": first.start_ticks - 1}
    for record, reason in ((older, Reason.HOST_RESTARTED), (first.to_json(), Reason.AGENT_LOST)):
        attempt.started.write_text(json.dumps({"agent": record}))
        found = launcher.find(NAME)
        assert found.report is not None
        assert found.report.reason is reason


def test_an_attempt_is_seen_once_its_start_has_returned(
    launcher: LocalLauncher, service: FakeIngest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel shows the environment of a new program a moment after the spawn, and here even later."""
    spawn = os.posix_spawn

    def show_late(_path: str, command: list[str], environment: dict[str, str], **rest: Any) -> int:
        marked = ["/usr/bin/env", f"{MARKER}={environment[MARKER]}", *command]
        plain = {name: text for name, text in environment.items() if name != MARKER}
        return spawn("/bin/sh", ["/bin/sh", "-c", 'sleep 0.3; exec "$@"', "sh", *marked], plain, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_spawn", show_late)
        launcher.start(launch(steps="30"))
    assert launcher.find(NAME).state is AttemptState.ALIVE
    assert ended(launcher).outcome == "completed"


def test_an_error_after_the_agent_was_spawned_is_no_refused_launch(
    launcher: LocalLauncher, service: FakeIngest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the service is out of file descriptors. After a refused launch, the devices are leased again."""

    def fail(_pid: int, _mark: str) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(local, "_wait_until_visible", fail)
        with pytest.raises(OSError, match="Too many open files"):
            launcher.start(launch(steps="30"))
    assert ended(launcher).outcome == "completed"


def test_starting_twice_starts_once(launcher: LocalLauncher, service: FakeIngest) -> None:
    launcher.start(launch(steps="40"))
    launcher.start(launch(steps="40"))
    assert ended(launcher).outcome == "completed"
    launcher.start(launch(steps="40"))
    until(lambda: service.reports)
    assert [line["step"] for line in service.lines.values() if line["kind"] == "metric"] == list(range(1, 41))


def test_the_ranks_see_the_leased_gpus_by_their_uuids(tmp_path: Path, service: FakeIngest) -> None:
    local = LocalLauncher(tmp_path, tmp_path / "cache", agent=DRIVER)
    local.start(replace(launch(steps="100000"), devices=("cuda:2", "cuda:5"), cuda_visible="GPU-a,GPU-b"))
    until(lambda: processes("RANK"))
    rank = processes("RANK")[0]
    assert rank.variable("CUDA_VISIBLE_DEVICES") == "GPU-a,GPU-b"
    assert rank.variable("TRAINYARD_LEASED_DEVICES") == "cuda:2,cuda:5"
    local.kill(NAME)


def test_the_worker_learns_where_it_may_read_and_write(tmp_path: Path, service: FakeIngest) -> None:
    local = LocalLauncher(tmp_path, tmp_path / "cache", [Path("/data"), Path("/more")], agent=DRIVER)
    local.start(launch(steps="100000"))
    until(lambda: processes("RANK"))
    rank = processes("RANK")[0]
    assert json.loads(str(rank.variable("TRAINYARD_DATA_ROOTS"))) == ["/data", "/more", str(tmp_path)]
    assert json.loads(str(rank.variable("TRAINYARD_SAVE_ROOTS"))) == [str(tmp_path)]
    local.kill(NAME)
