"""Who is at fault, from what was left on disk. What is unknown stays unknown, and is never success."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from trainyard.contract.messages import ErrorCard, ExitReport, Outcome, RankExit
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.status import Reason
from trainyard.worker.agent.exit_report import (
    Evidence,
    RankError,
    StopCause,
    apply_time_limit,
    collect_evidence,
    diagnose,
)
from trainyard.worker.agent.follower import NodeExit
from trainyard.worker.agent.oom import OomReport

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def judge(cause: StopCause | None = None, **found: Any) -> ExitReport:
    nothing = Evidence(
        outcome=None, torchrun_status=1, errors=(), ranks=(), step=7, memory=OomReport(), tails={}, agent_tail=""
    )
    return diagnose(Evidence(**{**nothing.__dict__, **found}), cause, last_seq=3, now=NOW)


def error(rank: int, at: float, message: str) -> RankError:
    return RankError(rank, at, message, f"Traceback of rank {rank}")


PEER_ERROR = error(0, 1.0, "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("AcceleratorError: CUDA error: no kernel image is available for execution on the device", "build of torch"),
        ("AcceleratorError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", "nvidia-smi -c 0"),
        ("AcceleratorError: CUDA error: an illegal memory access was encountered", "XID"),
        ("ValueError: no", None),
    ],
)
def test_an_error_of_cuda_has_a_hint(message: str, hint: str | None) -> None:
    report = judge(errors=(error(0, 1.0, message),))
    assert (report.outcome, report.reason) == ("crashed", Reason.WORKER_CRASHED)
    assert report.error is not None
    assert report.error.hint is None if hint is None else hint in str(report.error.hint)


def test_the_outcome_of_rank_0_comes_first() -> None:
    for status in (0, 1, -6):
        report = judge(outcome=Outcome(outcome="completed", step=9), torchrun_status=status)
        assert (report.outcome, report.step, report.reason) == ("completed", 9, None)


def test_exit_code_0_without_an_outcome_is_not_success() -> None:
    report = judge(torchrun_status=0)
    assert (report.outcome, report.reason) == ("crashed", Reason.UNKNOWN)
    assert "without an outcome" in report.message


TORCHRUN_LOG = """\
frame #28: <unknown function> + 0x8d (0x7f in /usr/lib/x86_64-linux-gnu/libc.so.6)

Traceback (most recent call last):
  File "run.py", line 1019, in run
torch.distributed.DistNetworkError: The client socket has timed out after 300000ms while trying to connect to (a, 4).
"""


def test_if_the_ranks_leave_no_word_torchrun_has_the_last_one() -> None:
    words = "torchrun's log ends with: torch.distributed.DistNetworkError: The client socket has timed out after"
    report = judge(agent_tail=TORCHRUN_LOG)
    assert report.message.startswith(
        f"the ranks ended at step 7 without an outcome or an error; torchrun's exit code was 1; {words}"
    )
    hung = judge(StopCause.HUNG, agent_tail=TORCHRUN_LOG)
    assert hung.reason is Reason.HUNG
    assert words in hung.message
    plain = judge(agent_tail="a\nb\n\nc\nd\n")
    assert plain.message.endswith("torchrun's log ends with: b | c | d")
    assert "torchrun's log" not in judge().message
    assert "torchrun's log" not in judge(StopCause.HUNG, agent_tail=TORCHRUN_LOG, tails={0: "a stack"}).message


def test_a_failure_with_a_card_is_passed_on() -> None:
    card = ErrorCard(code="data_invalid", message="line 7 is not JSON", hint="fix it")
    said = Outcome(outcome="failed", step=0, reason=Reason.DATA_INVALID, message="line 7 is not JSON", error=card)
    report = judge(outcome=said)
    assert (report.outcome, report.reason, report.error) == ("failed", Reason.DATA_INVALID, card)


def test_the_earliest_primary_error_is_the_cause() -> None:
    report = judge(errors=(PEER_ERROR, error(1, 2.0, "ZeroDivisionError: division by zero")))
    assert report.error is not None
    assert (report.error.rank, report.error.traceback) == (1, "Traceback of rank 1")
    assert report.message == "rank 1 failed at step 7: ZeroDivisionError: division by zero"


def test_a_killed_rank_comes_before_the_errors_of_its_peers() -> None:
    report = judge(errors=(PEER_ERROR,), ranks=(RankExit(rank=1, signal="SIGKILL"),), tails={1: "last line"})
    assert "rank 1 was killed by SIGKILL" in report.message
    assert report.error is not None
    assert (report.error.rank, report.error.traceback) == (1, "last line")


def test_the_ranks_that_torchrun_ended_are_not_blamed() -> None:
    first, others = (
        RankExit(rank=1, exit_code=1),
        (RankExit(rank=0, signal="SIGTERM"), RankExit(rank=2, signal="SIGTERM")),
    )
    report = judge(errors=(error(1, 1.0, "ValueError: bad"),), ranks=(first, *others))
    assert report.message == "rank 1 failed at step 7: ValueError: bad"
    assert "rank 2 was killed by SIGSEGV" in judge(ranks=(first, RankExit(rank=2, signal="SIGSEGV"))).message
    assert "rank 1 ended with exit code 1" in judge(ranks=(first, *others)).message


SUMMARY = """worker FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-25_03:26:51
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 27472)  (SIGTERM)
  error_file: /tmp/error.json
  traceback : Traceback (most recent call last):
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-25_03:26:51
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 27473)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 27473
============================================================
"""


def test_torchrun_s_root_cause_comes_first(tmp_path: Path) -> None:
    attempt = AttemptDir(tmp_path)
    attempt.logs.mkdir()
    attempt.agent_log.write_text(SUMMARY)
    evidence = collect_evidence(attempt, 1, OomReport())
    assert evidence.ranks == (RankExit(rank=1, signal="SIGKILL"), RankExit(rank=0, signal="SIGTERM"))
    assert "rank 1 was killed by SIGKILL" in diagnose(evidence, None, 0, NOW).message


def test_host_memory_is_blamed_only_when_the_kernel_says_so() -> None:
    killed = (RankExit(rank=1, signal="SIGKILL"),)
    assert judge(ranks=killed).reason is Reason.WORKER_CRASHED
    assert judge(ranks=killed, memory=OomReport(0, 5 * 10**9)).reason is Reason.WORKER_CRASHED
    report = judge(ranks=killed, memory=OomReport(1, 5 * 10**9, 6 * 10**9), tails={1: "its last line"})
    assert (report.outcome, report.reason) == ("failed", Reason.HOST_OUT_OF_MEMORY)
    assert report.message == (
        "the kernel killed rank 1 for lack of memory at step 7; "
        "the run's processes had 5.0 GB at most of 6.0 GB allowed"
    )
    assert report.error is not None
    assert (report.error.rank, report.error.traceback) == (1, "its last line")
    assert "batch_size" in (report.error.hint or "")


def test_torchrun_may_be_the_one_that_the_kernel_chose() -> None:
    assert judge(torchrun_status=-9).reason is Reason.WORKER_CRASHED
    report = judge(torchrun_status=-9, memory=OomReport(2))
    assert report.reason is Reason.HOST_OUT_OF_MEMORY
    assert report.message == "the kernel killed torchrun for lack of memory at step 7; its peak is not known"
    segfault = judge(torchrun_status=-11, memory=OomReport(1))
    assert segfault.reason is Reason.WORKER_CRASHED, "another process's misfortune explains no segfault"


def test_out_of_gpu_memory_on_any_rank_gets_the_knob() -> None:
    report = judge(errors=(error(2, 1.0, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"),))
    assert (report.outcome, report.reason) == ("failed", Reason.OUT_OF_MEMORY)
    assert report.error is not None
    assert "batch_size" in (report.error.hint or "")


@pytest.mark.parametrize(
    ("cause", "outcome", "reason"),
    [
        (StopCause.KILLED, "killed", Reason.USER),
        (StopCause.OVERDUE, "killed", Reason.USER),
        (StopCause.HUNG, "crashed", Reason.HUNG),
    ],
)
def test_what_the_agent_ended_itself_is_no_crash_of_the_ranks(cause: StopCause, outcome: str, reason: Reason) -> None:
    report = judge(cause, torchrun_status=-9, errors=(PEER_ERROR,))
    assert (report.outcome, report.reason) == (outcome, reason)


def test_a_peer_that_torchrun_takes_for_the_first_does_not_hide_the_killed_rank() -> None:
    """The peer failed a second before torchrun noticed that rank 1 was gone, and then got SIGTERM itself."""
    ranks = (RankExit(rank=0, signal="SIGTERM"), RankExit(rank=1, signal="SIGKILL"))
    report = judge(errors=(PEER_ERROR,), ranks=ranks)
    assert report.message == "rank 1 was killed by SIGKILL at step 7; the other ranks were ended"


def test_a_rank_killed_after_its_own_error_is_not_the_cause() -> None:
    """torchrun ends with SIGKILL what does not heed its SIGTERM."""
    ranks = (RankExit(rank=0, signal="SIGKILL"), RankExit(rank=1, signal="SIGSEGV"))
    report = judge(errors=(PEER_ERROR,), ranks=ranks)
    assert report.message.startswith("rank 1 was killed by SIGSEGV")


def test_a_rank_that_saved_before_it_was_killed_has_saved() -> None:
    report = judge(StopCause.KILLED, outcome=Outcome(outcome="stopped", step=8))
    assert (report.outcome, report.step) == ("stopped", 8)


def test_evidence_is_read_from_torchrun_s_files(tmp_path: Path) -> None:
    attempt = AttemptDir(tmp_path)
    for rank, at, text in ((0, 20, "RuntimeError: Connection closed by peer"), (1, 10, "ValueError: bad")):
        file = attempt.torchrun_logs / "none_ab" / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": {"py_callstack": "tb"}}}))
        os.utime(file, (at, at))
    attempt.rank_log(1).write_text("\n".join(f"line {n}" for n in range(40)))
    attempt.agent_log.write_text(
        "[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -11 (pid: 5)\n  error_file: <N/A>\n"
    )
    attempt.outcome.write_text("{ torn")
    attempt.progress.write_text("12")
    evidence = collect_evidence(attempt, 1, OomReport())
    assert [found.rank for found in evidence.errors] == [1, 0]
    assert evidence.ranks == (RankExit(rank=1, signal="SIGSEGV"),)
    assert evidence.outcome is None
    assert evidence.step == 12
    assert evidence.tails[1].splitlines()[0] == "line 25"


def test_an_empty_directory_is_evidence_of_nothing(tmp_path: Path) -> None:
    evidence = collect_evidence(AttemptDir(tmp_path), None, OomReport())
    assert (evidence.errors, evidence.ranks, evidence.step, evidence.tails) == ((), (), 0, {})


def test_a_node_without_an_exit_record_was_lost() -> None:
    report = judge(lost_nodes=(1,))
    assert (report.outcome, report.reason, report.message) == (
        *("crashed", Reason.NODE_LOST),
        "node 2 of 2 was lost at step 7",
    )
    assert judge(lost_nodes=(1,), errors=(PEER_ERROR,)).reason is Reason.NODE_LOST
    report = judge(lost_nodes=(2,), nodes=(NodeExit(1, "n2", 1),), errors=(error(1, 2.0, "ValueError: bad"),))
    assert report.message == "rank 1 failed at step 7: ValueError: bad", "what is known to have failed first"


@pytest.mark.parametrize("cause", [None, StopCause.PEER_LOST])
def test_a_lost_node_is_reported_however_ours_ended(cause: StopCause | None) -> None:
    assert judge(cause, lost_nodes=(1, 2)).message == "node 2, node 3 of 3 was lost at step 7"


@pytest.mark.parametrize(
    ("found", "reason", "message"),
    [
        (
            {"nodes": (NodeExit(1, "n2", -9),)},
            Reason.WORKER_CRASHED,
            "the ranks on n2 ended at step 7 (torchrun's exit",
        ),
        ({"nodes": (NodeExit(1, "n2", None, "no room"),)}, Reason.NODE_LOST, "on n2: no room, at step 7"),
        ({}, Reason.NODE_LOST, "the cluster lost sight of the first node's agent, at step 7"),
        (
            {"nodes": (NodeExit(1, "n2", 1),), "errors": (PEER_ERROR, error(3, 2.0, "ValueError: x"))},
            None,
            "rank 3 failed",
        ),
    ],
)
def test_ranks_that_lost_their_peers_are_not_blamed(found: dict[str, Any], reason: Reason | None, message: str) -> None:
    report = judge(StopCause.PEER_LOST, **found)
    assert report.outcome == "crashed"
    assert report.message.startswith(message)
    assert reason in (None, report.reason)


@pytest.mark.parametrize(
    ("cause", "found", "outcome", "reason"),
    [
        (None, {"outcome": Outcome(outcome="stopped", step=9)}, "stopped", Reason.TIME_LIMIT),
        (None, {"outcome": Outcome(outcome="completed", step=9)}, "completed", None),
        (None, {"outcome": Outcome(outcome="failed", step=9, reason=Reason.DIVERGED)}, "failed", Reason.DIVERGED),
        (StopCause.OVERDUE, {}, "killed", Reason.TIME_LIMIT),
        (None, {"torchrun_status": -15}, "crashed", Reason.TIME_LIMIT),
    ],
)
def test_time_that_is_over_is_blamed_for_whatever_did_not_end_by_itself(
    cause: StopCause | None, found: dict[str, Any], outcome: str, reason: Reason | None
) -> None:
    report = apply_time_limit(judge(cause, **found))
    assert (report.outcome, report.reason) == (outcome, reason)


def test_a_card_has_the_last_lines_of_its_rank() -> None:
    tails = {0: "of rank 0", 1: "first\nsecond"}
    failed = judge(errors=(error(1, 1.0, "ValueError: bad"),), tails=tails)
    assert failed.error is not None
    assert (failed.error.rank, failed.error.log_tail) == (1, ["first", "second"])
    said = Outcome(outcome="failed", step=0, error=ErrorCard(code="data_invalid", message="line 7"))
    assert judge(outcome=said, tails=tails).error == ErrorCard(
        code="data_invalid", message="line 7", log_tail=["of rank 0"]
    )
    silent = judge(torchrun_status=1, agent_tail="it said")
    assert silent.error is not None
    assert silent.error.log_tail == ["it said"]
    assert judge(outcome=Outcome(outcome="completed", step=9), tails=tails).error is None


def test_what_failed_before_a_cluster_ended_the_rest_is_the_cause() -> None:
    report = judge(torchrun_status=-15, errors=(PEER_ERROR, error(1, 2.0, "ValueError: bad")))
    assert report.message == "rank 1 failed at step 7: ValueError: bad"
    assert judge(torchrun_status=-15, errors=(PEER_ERROR,)).message.startswith("torchrun was killed by SIGTERM")
    assert judge(torchrun_status=-9, errors=(error(1, 2.0, "ValueError: x"),)).message.startswith("torchrun was killed")
