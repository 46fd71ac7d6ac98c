"""The launcher against fake Slurm commands: real output, time-outs, nonsense, answers that are lost."""

import contextlib
import os
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.fake_commands import CONFIG, Programs
from trainyard.contract.messages import ExitReport
from trainyard.contract.rundir import UNSEEN, AttemptDir, RunDir, read_json, write_json
from trainyard.contract.spec import DataSpec, JobSpec, ResourcesSpec
from trainyard.contract.status import Reason
from trainyard.service.launch.base import (
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    LauncherUnavailable,
    LaunchRefused,
)
from trainyard.service.launch.slurm import cli
from trainyard.service.launch.slurm.config import SlurmSetup
from trainyard.service.launch.slurm.launcher import SlurmLauncher

NAME = AttemptRef("job_a", 1, "slurm")
SPEC = JobSpec(data=DataSpec(data_path="/nowhere"), resources=ResourcesSpec(launcher="slurm", nnodes=2))
LAUNCH = Launch(NAME, "att_1", SPEC, (), "secret")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    made = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    monkeypatch.setattr(cli, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(cli, "FRESH_FACTOR", 0.0)
    # On a busy machine these programs take long to begin.
    for seconds in ("SUBMIT_SECONDS", "CANCEL_SECONDS", "QUERY_SECONDS", "NAME_SECONDS", "MAX_WAIT_SECONDS"):
        monkeypatch.setattr(cli, seconds, 60.0)
    return made


@pytest.fixture
def launcher(tmp_path: Path, slurm: Programs) -> SlurmLauncher:
    return made(tmp_path)


def made(tmp_path: Path) -> SlurmLauncher:
    return SlurmLauncher(tmp_path, tmp_path / "cache", SlurmSetup(TRAINYARD_SLURM_DEVICE="cpu"))


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    return RunDir(tmp_path / "runs" / NAME.job_id).attempt(NAME.number)


def test_an_attempt_is_submitted_once_however_often_it_is_started(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    launcher.start(LAUNCH)
    slurm.queue({"job_state": "PENDING", "nodes": ""})
    launcher.start(LAUNCH)
    assert slurm.calls("sbatch") == [f"--parsable {attempt.batch}"]
    asked = read_json(attempt.submitted) or {}
    assert (asked["slurm_job_id"], asked["cluster"], asked["uid"]) == ("8", "here", os.getuid())


@pytest.mark.parametrize(
    "ending",
    [
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
        "echo 'sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received' >&2; exit 1",
        "exec sleep 60",
    ],
)
def test_a_submission_whose_answer_is_lost_is_found_and_not_repeated(
    slurm: Programs, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    if "sleep" in ending:
        # Long enough for the program to take the job.
        monkeypatch.setattr(cli, "SUBMIT_SECONDS", 4.0)
    slurm.takes_and(ending)
    with pytest.raises(LauncherUnavailable):
        launcher.start(LAUNCH)
    assert launcher.find(NAME).state is AttemptState.ALIVE
    launcher.start(LAUNCH)
    assert len(slurm.calls("sbatch")) == 1


def test_a_submission_that_never_came_is_absent(slurm: Programs, launcher: SlurmLauncher) -> None:
    slurm.says("sbatch", error="sbatch: error: Unable to contact slurm controller (connect failure)", code=1)
    with pytest.raises(LauncherUnavailable, match="connect failure"):
        launcher.start(LAUNCH)
    assert launcher.find(NAME).state is AttemptState.ABSENT


def test_nothing_is_submitted_unless_the_queue_was_seen(slurm: Programs, launcher: SlurmLauncher) -> None:
    slurm.says("squeue", error="slurm_load_jobs error: Unable to contact slurm controller (connect failure)", code=1)
    with pytest.raises(LauncherUnavailable):
        launcher.start(LAUNCH)
    assert slurm.calls("sbatch") == []


@pytest.mark.parametrize(("said", "number"), [("12;cluster\n", "12"), ("Welcome to X\n34\n", "34"), ("taken", None)])
def test_the_number_is_found_among_other_words(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, said: str, number: str | None
) -> None:
    slurm.says("sbatch", said)
    launcher.start(LAUNCH)
    assert (read_json(attempt.submitted) or {})["slurm_job_id"] == number


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed", "sinfo"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", "account"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "time_limit"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "no more of"),
        ("Requested node configuration is not available", "No nodes have all of it"),
        ("Node count specification invalid", "nnodes"),
    ],
)
def test_what_slurm_refuses_is_said_with_what_to_do(
    slurm: Programs, launcher: SlurmLauncher, said: str, hint: str
) -> None:
    slurm.says("sbatch", error=said, code=1)
    with pytest.raises(LaunchRefused) as refused:
        launcher.start(LAUNCH)
    assert str(refused.value) == " ".join(said.split())
    assert refused.value.hint is not None
    assert hint in refused.value.hint


def test_without_slurm_s_commands_the_launch_is_refused(
    slurm: Programs, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.bin / "sbatch").unlink()
    monkeypatch.setenv("PATH", f"{slurm.bin}:/bin:/nowhere" if not Path("/bin/sbatch").exists() else str(slurm.bin))
    slurm.body("squeue", "printf '{\"jobs\": []}'")
    with pytest.raises(LaunchRefused, match="sbatch cannot be run") as refused:
        launcher.start(LAUNCH)
    assert "PATH" in str(refused.value.hint)


HALF = '{"jobs": [{"job_id": 7, "name": "trainyard-job_a", "comment": "job_a/1", "job_st'


@pytest.mark.parametrize(
    ("out", "error", "code"),
    [
        ("", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1),
        ("", "slurm_load_jobs error: Socket timed out on send/recv operation", 1),
        ("", "squeue: error: If munged is up, restart with --num-threads=10", 1),
        ("", "squeue: fatal: Could not establish a configuration source", 1),
        ("", "slurm_load_jobs error: Zero Bytes were transmitted or received", 1),
        ("", "", 0),
        ("JOBID PARTITION NAME\n", "", 0),
        (HALF, "", 0),
        ("[" * 200_000, "", 0),
        ('{"jobs": [{"name": "trainyard-job_a"}]}', "", 0),
        ('{"jobs": [{"name": "trainyard-job_a", "job_state": "RUNNING", "job_id": {"set": false}}]}', "", 0),
        ("null", "", 0),
    ],
)
def test_output_that_is_not_understood_is_unknown_and_never_an_end(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, out: str, error: str, code: int
) -> None:
    launcher.start(LAUNCH)
    begin(attempt)
    (slurm.bin / "said").write_text(out)
    slurm.body("squeue", f"cat {slurm.bin}/said; printf %s {error!r} >&2; exit {code}")
    found = launcher.find(NAME)
    assert found.state is AttemptState.UNKNOWN
    assert found.silence is not None
    assert found.silence.startswith("Slurm does not answer: ")
    with pytest.raises(LauncherUnavailable):
        launcher.stop(NAME)
    launcher.kill(NAME)
    assert slurm.calls("scancel") == []
    slurm.queue({})
    slurm.body("squeue", f"cat {slurm.bin.parent}/queue.json")
    assert launcher.find(NAME).state is AttemptState.ALIVE


def test_a_controller_that_hangs_blocks_no_caller_and_ends_nothing(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.start(LAUNCH)
    begin(attempt)
    slurm.queue({})
    answers = slurm.bin.parent / "answers"
    slurm.body("squeue", f"until [ -e {answers} ]; do sleep 0.02; done\ncat {slurm.bin.parent}/queue.json")
    monkeypatch.setattr(cli, "MAX_WAIT_SECONDS", 0.2)
    for _ in range(3):
        found = launcher.find(NAME)
        assert (found.state, found.silence) == (AttemptState.UNKNOWN, "Slurm does not answer: squeue takes long")
    answers.touch()
    deadline = time.monotonic() + 60
    while (found := launcher.find(NAME)).state is AttemptState.UNKNOWN:
        assert time.monotonic() < deadline
    assert found.state is AttemptState.ALIVE


def test_what_a_command_prints_before_it_hangs_is_reported(
    slurm: Programs, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for the program to print something.
    monkeypatch.setattr(cli, "QUERY_SECONDS", 4.0)
    slurm.body("squeue", "echo 'squeue: error: Munge encode failed: Failed to access socket' >&2; exec sleep 60")
    assert str(launcher.find(NAME).silence) == (
        "Slurm does not answer: squeue did not answer within 4 s: "
        "squeue: error: Munge encode failed: Failed to access socket"
    )


def test_another_cluster_s_queue_says_nothing_of_the_attempt(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, tmp_path: Path
) -> None:
    launcher.start(LAUNCH)
    begin(attempt)
    slurm.says("scontrol", CONFIG.format(name="elsewhere"))
    found = made(tmp_path).find(NAME)
    assert (found.state, found.silence) == (
        AttemptState.UNKNOWN,
        "the attempt is on cluster here, and SLURM_CONF points to elsewhere",
    )
    slurm.says("scontrol", error="scontrol: error: no", code=1)
    assert made(tmp_path).find(NAME).state is AttemptState.UNKNOWN
    assert launcher.find(NAME).state is AttemptState.ENDED


def test_another_user_s_queue_says_nothing_of_the_attempt(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    launcher.start(LAUNCH)
    write_json(attempt.submitted, {**(read_json(attempt.submitted) or {}), "uid": os.getuid() + 1})
    found = launcher.find(NAME)
    assert found.state is AttemptState.UNKNOWN
    assert "runs as another user" in str(found.silence)
    slurm.queue({})
    assert launcher.find(NAME).state is AttemptState.ALIVE, "where it is seen all the same, it is seen"


@pytest.mark.parametrize(
    ("state", "cancelled_with"),
    [
        ("PENDING", ["--state=PENDING 7", "--signal=23 7"]),
        ("CONFIGURING", ["7", "--signal=23 7"]),
        (["RUNNING", "CONFIGURING"], ["7", "--signal=23 7"]),
        ("RUNNING", ["--signal=23 7"]),
        ("SUSPENDED", ["--signal=23 7"]),
        ("COMPLETED", []),
    ],
)
def test_a_pending_job_is_cancelled_and_a_running_one_is_signalled(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, state: object, cancelled_with: list[str]
) -> None:
    launcher.start(LAUNCH)
    slurm.queue({"job_state": state})
    launcher.stop(NAME)
    assert attempt.stop.exists()
    assert slurm.calls("scancel") == cancelled_with


def test_a_job_that_ended_meanwhile_is_as_good_as_cancelled(slurm: Programs, launcher: SlurmLauncher) -> None:
    slurm.queue({})
    slurm.says("scancel", error="scancel: error: Kill job error on job id 7: Job/step already completing", code=1)
    launcher.stop(NAME)
    slurm.says("scancel", error="scancel: error: Kill job error on job id 7: Access/permission denied", code=1)
    with pytest.raises(LauncherUnavailable, match="permission denied"):
        launcher.stop(NAME)


def test_an_end_kills_until_slurm_knows_nothing_that_lives(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    slurm.queue({})
    gone = f"printf '{{\"jobs\": []}}' > {slurm.bin.parent}/queue.json"
    slurm.body("scancel", f'case "$*" in 7) {gone};; esac')
    launcher.kill(NAME)
    assert slurm.calls("scancel") == ["--signal=KILL --full 7", "7"]
    assert attempt.closed.exists()
    launcher.start(LAUNCH)
    assert slurm.calls("sbatch") == [], "nothing of it begins any more"


def test_leftovers_of_earlier_attempts_are_cancelled_first(slurm: Programs, launcher: SlurmLauncher) -> None:
    slurm.queue({"job_id": 5, "comment": "job_a/0"}, {"job_id": 4, "comment": "job_a/9", "job_state": "COMPLETED"})
    launcher.start(LAUNCH)
    assert (slurm.calls("scancel"), len(slurm.calls("sbatch"))) == (["5"], 1)


def test_the_queue_is_asked_less_often_where_an_answer_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def look() -> list[Any]:
        asked.append(now[0])
        now[0] += 3.0
        return []

    monkeypatch.setattr(cli, "MAX_WAIT_SECONDS", 60.0)
    queue = cli.QueueCache(look, lambda: now[0])
    for _ in range(20):
        queue.jobs()
        now[0] += 1.0
    assert asked == [0.0]
    now[0] += 30.0
    queue.jobs()
    assert len(asked) == 2
    now[0] += 1.0
    queue.jobs(since=now[0] - 0.5)
    assert len(asked) == 3, "whoever has changed something looks again at once"


def test_a_cluster_whose_squeue_takes_long_is_worked_with_all_the_same(
    slurm: Programs, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(cli, "FRESH_FACTOR", 10.0)
    queue = slurm.bin.parent / "queue.json"
    slurm.body("squeue", f"cat {queue} > {queue}.seen; sleep 0.4; cat {queue}.seen")

    def in_the_end(what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(LauncherUnavailable):
                what()
                return
        raise AssertionError("it was never heard")

    in_the_end(lambda: launcher.start(LAUNCH))
    assert len(slurm.calls("sbatch")) == 1
    slurm.queue({"job_state": "PENDING", "nodes": ""})
    in_the_end(lambda: launcher.stop(NAME))
    assert slurm.calls("scancel")[0] == "--state=PENDING 7"


def test_nodes_get_nothing_that_only_the_service_s_host_has(
    slurm: Programs, launcher: SlurmLauncher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TMPDIR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SBATCH_PARTITION", "SECRET"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    slurm.body("sbatch", f"env > {tmp_path}/environment; echo 8")
    launcher.start(LAUNCH)
    seen = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert seen["SLURM_CONF"] == "/etc/other.conf"
    assert seen["TRAINYARD_ATTEMPT_TOKEN"] == "secret"
    assert not {"TMPDIR", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SBATCH_PARTITION", "SECRET"} & seen.keys()


def begin(attempt: AttemptDir) -> None:
    attempt.path.mkdir(parents=True, exist_ok=True)
    write_json(attempt.started, {"agent": {}, "started_at": datetime.now(UTC).isoformat()})


def judged(launcher: SlurmLauncher) -> AttemptStatus:
    found = launcher.find(NAME)
    assert (found.report is not None) == (found.state is AttemptState.ENDED)
    return found


STOPPED, COMPLETED = {"outcome": "stopped", "step": 9}, {"outcome": "completed", "step": 9}
TABLE: list[tuple[str | None, str, dict[str, Any] | None, str, Reason | None]] = [
    # Slurm's state; what is on disk: s(topped), c(losed), b(egan); rank 0's word -> outcome, reason
    ("COMPLETED", "b", COMPLETED, "completed", None),
    ("FAILED", "b", COMPLETED, "completed", None),
    ("NODE_FAIL", "b", COMPLETED, "completed", None),
    ("CANCELLED", "bsc", COMPLETED, "completed", None),
    (None, "b", COMPLETED, "completed", None),
    ("CANCELLED", "bs", STOPPED, "stopped", None),
    ("FAILED", "bs", STOPPED, "stopped", None),
    (None, "bs", STOPPED, "stopped", None),
    ("COMPLETED", "b", None, "crashed", Reason.AGENT_LOST),
    ("FAILED", "b", None, "crashed", Reason.AGENT_LOST),
    ("FAILED", "bs", None, "crashed", Reason.AGENT_LOST),
    (None, "b", None, "crashed", Reason.AGENT_LOST),
    (None, "bs", None, "crashed", Reason.AGENT_LOST),
    ("REVOKED", "b", None, "crashed", Reason.AGENT_LOST),
    ("NODE_FAIL", "b", None, "crashed", Reason.NODE_LOST),
    ("NODE_FAIL", "bs", None, "crashed", Reason.NODE_LOST),
    ("NODE_FAIL", "", None, "crashed", Reason.NODE_LOST),
    ("BOOT_FAIL", "", None, "crashed", Reason.NODE_LOST),
    ("TIMEOUT", "b", None, "crashed", Reason.TIME_LIMIT),
    ("DEADLINE", "b", None, "crashed", Reason.TIME_LIMIT),
    ("PREEMPTED", "b", None, "crashed", Reason.PREEMPTED),
    ("OUT_OF_MEMORY", "b", None, "crashed", Reason.HOST_OUT_OF_MEMORY),
    ("CANCELLED", "b", None, "crashed", Reason.TERMINATED),
    ("CANCELLED", "", None, "crashed", Reason.TERMINATED),
    ("CANCELLED", "s", None, "stopped", Reason.USER),
    (None, "s", None, "stopped", Reason.USER),
    ("CANCELLED", "c", None, "killed", Reason.USER),
    ("CANCELLED", "bc", None, "killed", Reason.USER),
    ("CANCELLED", "bs", None, "killed", Reason.USER),
    (None, "c", None, "killed", Reason.USER),
    (None, "bc", None, "killed", Reason.USER),
    ("FAILED", "", None, "crashed", Reason.LAUNCH_FAILED),
    ("COMPLETED", "", None, "crashed", Reason.LAUNCH_FAILED),
    (None, "", None, "crashed", Reason.LAUNCH_FAILED),
]


@pytest.mark.parametrize(("state", "files", "said", "outcome", "reason"), TABLE)
def test_the_verdict(
    slurm: Programs,
    launcher: SlurmLauncher,
    attempt: AttemptDir,
    state: str | None,
    files: str,
    said: dict[str, Any] | None,
    outcome: str,
    reason: Reason | None,
) -> None:
    attempt.path.mkdir(parents=True)
    write_json(attempt.submitted, {"slurm_job_id": "7"})
    if "b" in files:
        begin(attempt)
    for letter, file in (("s", attempt.stop), ("c", attempt.closed)):
        if letter in files:
            file.touch()
    if said is not None:
        write_json(attempt.outcome, said)
    slurm.queue(*([{"job_state": state}] if state is not None else []))
    report = judged(launcher).report
    assert report is not None
    assert (report.outcome, report.reason) == (outcome, reason)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", ["CANCELLED", "COMPLETING"]])
def test_what_lives_in_slurm_has_not_ended_whatever_rank_0_says(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, state: str | list[str]
) -> None:
    launcher.start(LAUNCH)
    begin(attempt)
    write_json(attempt.outcome, COMPLETED)
    slurm.queue({"job_state": state})
    found = judged(launcher)
    assert found.state is AttemptState.ALIVE
    # Which of its nodes have not ended it yet is not where it ran.
    assert (found.placement is None) == ("COMPLETING" in state)


def test_the_agent_s_report_counts_before_everything(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    launcher.start(LAUNCH)
    said = ExitReport(
        outcome="crashed", step=3, reason=Reason.HUNG, message="hung", last_seq=0, ended_at=datetime.now(UTC)
    )
    write_json(attempt.exit, said.model_dump(mode="json"))
    slurm.says("squeue", error="no", code=1)
    assert judged(launcher).report == said


def test_a_report_that_nfs_hides_until_the_directory_is_opened_counts(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client remembers for up to a minute that a file was missing. The run would be restarted as agent_lost."""
    launcher.start(LAUNCH)
    begin(attempt)
    slurm.queue({"job_state": "COMPLETED"})
    written = ExitReport(outcome="completed", step=3, reason=None, message="", last_seq=0, ended_at=datetime.now(UTC))
    list_directory = os.listdir

    def open_directory(path: Path) -> list[str]:
        if path == attempt.path:
            write_json(attempt.exit, written.model_dump(mode="json"))
        return list_directory(path)

    monkeypatch.setattr(os, "listdir", open_directory)
    assert judged(launcher).report == written


def test_nodes_without_the_home_are_thought_of_where_not_even_a_log_was_written(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    launcher.start(LAUNCH)
    slurm.queue({"job_state": "FAILED"})
    report = judged(launcher).report
    assert report is not None
    assert report.error is not None
    assert f"do all nodes have {attempt.path}" in str(report.error.hint)
    attempt.cluster_log.write_text("slurmstepd: error: execve(): no\nbash: python: command not found\n")
    report = judged(launcher).report
    assert report is not None
    assert report.error is not None
    assert (report.error.hint, report.message) == (
        None,
        "the attempt's agent did not begin on the cluster: bash: python: command not found",
    )


def test_a_node_without_the_home_counts_against_the_launch_whatever_became_of_the_others(
    slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir
) -> None:
    launcher.start(LAUNCH)
    begin(attempt)
    attempt.cluster_log.write_text(f"slurmstepd: error\n{UNSEEN}: {attempt.path} is not there on n2\nsrun: error: n1\n")
    slurm.queue({"job_state": "FAILED"})
    report = judged(launcher).report
    assert report is not None
    assert (report.reason, report.message) == (Reason.LAUNCH_FAILED, f"{UNSEEN}: {attempt.path} is not there on n2")


def test_only_the_service_may_write_the_script(slurm: Programs, launcher: SlurmLauncher, attempt: AttemptDir) -> None:
    launcher.start(LAUNCH)
    assert attempt.batch.read_text().startswith("#!/bin/bash\n")
    assert not attempt.batch.stat().st_mode & stat.S_IWOTH


def test_a_home_whose_name_is_more_than_one_line_is_refused(slurm: Programs, tmp_path: Path) -> None:
    home = tmp_path / "a\n#SBATCH --wrap=ls"
    home.mkdir()
    with pytest.raises(LaunchRefused, match="cannot be given"):
        made(home).start(LAUNCH)
    assert slurm.calls("sbatch") == []
