"""Collects the evidence of an attempt's end and diagnoses its cause, a pure function. Unknown stays unknown."""

import json
import re
import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal, assert_never

from trainyard.contract.messages import ErrorCard, ExitReport, Outcome, RankExit, read_message
from trainyard.contract.rundir import RANK_FILE, AttemptDir, write_json
from trainyard.contract.status import Reason
from trainyard.worker.agent.follower import NodeExit, PeerNodes
from trainyard.worker.agent.oom import OomReport
from trainyard.worker.cuda_errors import EXCEPTION, cuda_advice

TAIL_LINES = 15
TAIL_BYTES = 16384

# torchrun's summary of failed ranks, in its log. Nothing else names a rank that was killed by a signal.
SUMMARY = re.compile(r"rank\s*:\s*(\d+)\s*\(local_rank:\s*\d+\)\s*\n\s*exitcode\s*:\s*(-?\d+)")

MESSAGE_LINES, MESSAGE_CHARACTERS = 3, 600

ROOT_CAUSE = "Root Cause (first observed failure)"


class StopCause(StrEnum):
    """Why the agent ended the ranks. No cause (None) means that they ended by themselves."""

    KILLED = "killed"
    """The user requested a kill, without a save."""
    OVERDUE = "overdue"
    """A stop was requested, and the ranks did not save and exit within the grace period."""
    HUNG = "hung"
    """The ranks made no progress."""
    PEER_LOST = "peer_lost"
    """The ranks of another node ended, and these did not."""


@dataclass(frozen=True)
class RankError:
    """A rank's exception, from its error.json; ``at`` is in seconds since 1970."""

    rank: int
    at: float
    message: str
    traceback: str


@dataclass(frozen=True)
class Evidence:
    """The input of the diagnosis. ``errors`` are in order of time.

    ``ranks`` starts with the one that torchrun observed to fail first; torchrun ends the others with SIGTERM.
    ``nodes``: how torchrun ended on the other nodes; ``lost_nodes``: those without an exit record.
    """

    outcome: Outcome | None
    torchrun_status: int | None
    errors: tuple[RankError, ...]
    ranks: tuple[RankExit, ...]
    step: int
    memory: OomReport
    tails: dict[int, str]
    agent_tail: str
    nodes: tuple[NodeExit, ...] = ()
    lost_nodes: tuple[int, ...] = ()
    train_seconds: float | None = None


def collect_evidence(
    attempt: AttemptDir, torchrun_status: int | None, memory: OomReport, peers: PeerNodes | None = None
) -> Evidence:
    """Read all evidence. Missing and damaged files are left out and never raise."""
    exits = peers.exits if peers is not None else {}
    return Evidence(
        outcome=read_message(Outcome, attempt.outcome),
        torchrun_status=torchrun_status,
        errors=_rank_errors(attempt.torchrun_logs),
        ranks=tuple(
            rank for node in (0, *exits) for rank in _rank_exits(_tail(attempt.node_log(node), 4 * TAIL_BYTES))
        ),
        step=attempt.read_step() or 0,
        train_seconds=attempt.read_train_seconds(),
        memory=memory,
        tails={rank: _last_lines(log) for rank, log in _rank_logs(attempt)},
        agent_tail=_last_lines(attempt.agent_log),
        nodes=tuple(exits.values()),
        lost_nodes=tuple(peers.missing()) if peers is not None else (),
    )


def _rank_errors(torchrun_logs: Path) -> tuple[RankError, ...]:
    # Sorted by time: the earliest is usually the cause, and later ones report the loss of a peer.
    errors = [error for file in torchrun_logs.glob("**/error.json") if (error := _rank_error(file))]
    return tuple(sorted(errors, key=lambda error: error.at))


def _rank_error(file: Path) -> RankError | None:
    try:
        message = json.loads(file.read_bytes())["message"]
        extra = message["extraInfo"] if isinstance(message, dict) else {}
        text = message["message"] if isinstance(message, dict) else str(message)
        return RankError(
            rank=_rank_of(file),
            # The time in the file is in whole seconds, and two ranks often fail within one.
            at=file.stat().st_mtime,
            message=str(text),
            traceback=str(extra.get("py_callstack", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rank_of(error_file: Path) -> int:
    # The rank writes its global rank next to the file: torchrun's folder has the local rank only.
    try:
        return int((error_file.parent / RANK_FILE).read_text())
    except (OSError, ValueError):
        return int(error_file.parent.name)


def _rank_exits(torchrun_summary: str) -> tuple[RankExit, ...]:
    others, _, root = torchrun_summary.partition(ROOT_CAUSE)
    failures = [*SUMMARY.findall(root)[:1], *sorted(SUMMARY.findall(others))]
    return tuple(rank_exit(int(rank), int(code)) for rank, code in dict(failures).items())


def rank_exit(rank: int, status: int) -> RankExit:
    """Return a rank's exit from its exit status, which is negative for a signal."""
    return RankExit(rank=rank, signal=signal_name(-status)) if status < 0 else RankExit(rank=rank, exit_code=status)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as ``SIGKILL`` for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _rank_logs(attempt: AttemptDir) -> list[tuple[int, Path]]:
    return sorted((int(log.stem.removeprefix("rank-")), log) for log in attempt.logs.glob("rank-*.log"))


def _tail(file: Path, size: int) -> str:
    try:
        with file.open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - size))
            return log.read().decode(errors="replace")
    except OSError:
        return ""


def _last_lines(file: Path) -> str:
    return "\n".join(_tail(file, TAIL_BYTES).splitlines()[-TAIL_LINES:])


# After one rank has failed the others fail too; these errors only report the loss of a peer.
SECONDARY_ERRORS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
)

KNOWN_ERRORS: tuple[tuple[str, Reason, str], ...] = (
    (
        "outofmemoryerror",
        Reason.OUT_OF_MEMORY,
        "Lower training.batch_size and raise training.accumulation_steps by the same factor: the result is the same.",
    ),
    ("no space left on device", Reason.DISK_FULL, "Free space, or point checkpoint.save_dir at a larger disk."),
)
"""(part of an exception's text in lower case, reason, hint)"""

MEMORY_HINT = (
    "Give the host or its container more memory, or ask for less: gradient_checkpointing, fewer ranks on it, a smaller "
    "batch_size with more accumulation_steps, a smaller max_seq_len, or resources.parallelism zero1 or fsdp. Saving "
    "keeps a copy of weights and moments on rank 0 for a while."
)


PREPARATION_MEMORY_HINT = (
    "Give the host or its container more memory, or lower data.num_workers: each process that tokenizes needs memory."
)


@dataclass(frozen=True)
class _ExitSummary:
    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"]
    reason: Reason | None
    message: str
    error: ErrorCard | None = None


def diagnose(evidence: Evidence, cause: StopCause | None, last_seq: int, now: datetime) -> ExitReport:
    """Return the exit report. Rank 0's outcome comes first, then the agent's own action, then the signs of a crash.

    Exit codes prove nothing: torchrun exits with 1 after a crash and after a clean stop, and a rank may abort after it
    has finished.
    """
    summary = _from_outcome(evidence) or _from_agent(evidence, cause) or _from_crash(evidence)
    return _report(summary, evidence, last_seq, now)


def diagnose_preparation(evidence: Evidence, cause: StopCause | None, last_seq: int, now: datetime) -> ExitReport:
    """Return the exit report of an attempt that prepares a corpus: one process instead of torchrun and ranks."""
    return _report(_from_outcome(evidence) or _from_preparation(evidence, cause), evidence, last_seq, now)


def _report(summary: "_ExitSummary", evidence: Evidence, last_seq: int, now: datetime) -> ExitReport:
    return ExitReport(
        outcome=summary.outcome,
        reason=summary.reason,
        message=summary.message,
        error=_with_tail(summary.error, evidence),
        step=evidence.outcome.step if evidence.outcome else evidence.step,
        ranks=list(evidence.ranks),
        last_seq=last_seq,
        ended_at=now,
        train_seconds=evidence.train_seconds,
    )


def _with_tail(card: ErrorCard | None, evidence: Evidence) -> ErrorCard | None:
    """Add the last lines of the rank's log, or of the agent's log if the rank printed nothing."""
    if card is None:
        return None
    tail = evidence.tails.get(card.rank or 0) or evidence.agent_tail
    return card.model_copy(update={"log_tail": tail.splitlines()})


def apply_time_limit(report: ExitReport) -> ExitReport:
    """Return the report with the cluster's time limit as the reason, unless the run completed or failed by itself."""
    if report.outcome in ("completed", "failed"):
        return report
    message = f"{report.message}: its time on the cluster was over"
    return report.model_copy(update={"reason": Reason.TIME_LIMIT, "message": message})


def launch_failed_report(attempt: AttemptDir, message: str) -> None:
    """Write the exit report of an attempt that was not started."""
    hint = "End the other processes of this job first." if "held by another process" in message else None
    error = ErrorCard(code=Reason.LAUNCH_FAILED, message=message, hint=hint)
    report = ExitReport(
        outcome="crashed",
        step=0,
        reason=Reason.LAUNCH_FAILED,
        message=message,
        error=error,
        last_seq=0,
        ended_at=datetime.now(UTC),
    )
    write_json(attempt.exit, report.model_dump(mode="json"))


def _from_outcome(evidence: Evidence) -> _ExitSummary | None:
    result = evidence.outcome
    if result is None:
        return None
    match result.outcome:
        case "completed":
            return _ExitSummary("completed", result.reason, result.message or f"finished at step {result.step}")
        case "stopped":
            message = result.message or f"saved and stopped at step {result.step}"
            return _ExitSummary("stopped", result.reason or Reason.USER, message)
        case "failed":
            message = result.message or "the run failed"
            reason = result.reason or Reason.UNKNOWN
            return _ExitSummary("failed", reason, message, result.error or ErrorCard(code=reason, message=message))
        case _:
            assert_never(result.outcome)


def _from_agent(evidence: Evidence, cause: StopCause | None) -> _ExitSummary | None:
    match cause:
        case None:
            return None
        case StopCause.KILLED:
            return _ExitSummary("killed", Reason.USER, f"killed at step {evidence.step} as requested")
        case StopCause.OVERDUE:
            late = "did not save and stop within the grace period (timeouts.stop)"
            return _ExitSummary("killed", Reason.USER, f"{late}, and was killed at step {evidence.step}")
        case StopCause.PEER_LOST:
            return _lost_node(evidence) or _from_other_node(evidence)
        case StopCause.HUNG:
            message = f"made no progress after step {evidence.step}"
            hint = "The stacks of all ranks are at the end of their logs."
            if not any(evidence.tails.values()):
                return _crash(Reason.HUNG, f"{message}{_torchrun_words(evidence)}", evidence)
            card = ErrorCard(code=Reason.HUNG, message=message, hint=hint, traceback=evidence.tails.get(0))
            return _ExitSummary("crashed", Reason.HUNG, message, card)
        case _:
            assert_never(cause)


def _from_preparation(evidence: Evidence, cause: StopCause | None) -> _ExitSummary:
    if cause in (StopCause.KILLED, StopCause.OVERDUE):
        late = "" if cause is StopCause.KILLED else ": it did not stop within the grace period (timeouts.stop)"
        return _ExitSummary("killed", Reason.USER, f"the preparation of the corpus was killed{late}")
    if cause is StopCause.HUNG:
        return _crash(Reason.HUNG, "the preparation of the corpus made no progress", evidence)
    status = evidence.torchrun_status
    if status is not None and status < 0:
        name = signal_name(-status)
        if name == "SIGKILL" and evidence.memory.kills:
            return _out_of_memory(evidence, "the process that prepares the corpus", hint=PREPARATION_MEMORY_HINT)
        return _crash(Reason.WORKER_CRASHED, f"the process that prepares the corpus was killed by {name}", evidence)
    lines = evidence.tails.get(0, "").strip().splitlines()
    last = f": {lines[-1][:MESSAGE_CHARACTERS]}" if lines else ""
    message = f"the process that prepares the corpus ended with exit code {status}{last}"
    return _crash(Reason.WORKER_CRASHED, message, evidence)


def _lost_node(evidence: Evidence) -> _ExitSummary | None:
    """Blame nodes without an exit record, unless an error is known to be the cause."""
    if not evidence.lost_nodes or _primary_error(evidence) is not None:
        return None
    names = ", ".join(f"node {number + 1}" for number in evidence.lost_nodes)
    message = f"{names} of {len(evidence.nodes) + len(evidence.lost_nodes) + 1} was lost at step {evidence.step}"
    return _crash(Reason.NODE_LOST, message, evidence)


def _from_other_node(evidence: Evidence) -> _ExitSummary:
    """Report that the ranks of another node ended first."""
    primary = _primary_error(evidence)
    if primary is not None:
        return _exception(evidence, primary)
    if not evidence.nodes:
        message = f"the cluster lost sight of the first node's agent, at step {evidence.step}"
        return _crash(Reason.NODE_LOST, message, evidence)
    for node in evidence.nodes:
        if node.message:
            return _crash(Reason.NODE_LOST, f"on {node.name}: {node.message}, at step {evidence.step}", evidence)
    node = evidence.nodes[0]
    code = f"torchrun's exit code was {node.status}"
    message = f"the ranks on {node.name} ended at step {evidence.step} ({code}), and the others hung"
    return _crash(Reason.WORKER_CRASHED, message, evidence)


def _from_crash(evidence: Evidence) -> _ExitSummary:
    lost = _lost_node(evidence)
    if lost is not None:
        return lost
    if evidence.torchrun_status is not None and evidence.torchrun_status < 0:
        name = signal_name(-evidence.torchrun_status)
        primary = _primary_error(evidence)
        if name == "SIGTERM" and primary is not None:  # the cluster ended what was left after the error
            return _exception(evidence, primary)
        if name == "SIGKILL" and evidence.memory.kills:
            return _out_of_memory(evidence, "torchrun")
        message = f"torchrun was killed by {name} at step {evidence.step}; its ranks were ended"
        return _crash(Reason.WORKER_CRASHED, message, evidence)
    killed, primary = _killed_first(evidence), _primary_error(evidence)
    if killed is not None and primary is None:
        return _killed_rank(evidence, killed.rank, str(killed.signal))
    if evidence.errors:
        return _exception(evidence, primary or evidence.errors[0])
    if evidence.ranks:
        rank = evidence.ranks[0]
        message = f"rank {rank.rank} ended with exit code {rank.exit_code} at step {evidence.step}"
        return _crash(Reason.WORKER_CRASHED, message, evidence, rank.rank)
    code = f"torchrun's exit code was {evidence.torchrun_status}"
    message = f"the ranks ended at step {evidence.step} without an outcome or an error; {code}"
    message += _torchrun_words(evidence)
    return _crash(Reason.UNKNOWN, message, evidence)


def _torchrun_words(evidence: Evidence) -> str:
    """Return the last lines of torchrun's log as the end of a message, from its last exception on if it has one.

    "" if the log is empty. For ranks that left no error: then torchrun's log may be the only trace of the cause.
    """
    lines = [line.strip() for line in evidence.agent_tail.splitlines() if line.strip()]
    exceptions = [number for number, line in enumerate(lines) if EXCEPTION.match(line)]
    chosen = lines[exceptions[-1] :][:MESSAGE_LINES] if exceptions else lines[-MESSAGE_LINES:]
    return f"; torchrun's log ends with: {' | '.join(chosen)[:MESSAGE_CHARACTERS]}" if chosen else ""


def _killed_first(evidence: Evidence) -> RankExit | None:
    """Return the first rank that a signal killed and that raised no exception. SIGTERM counts for the first rank only.

    torchrun ends all other ranks with SIGTERM. Its order alone proves nothing: it sorts a killed rank by the time of
    its own poll, but a peer that lost it by the earlier time in the peer's error file.
    """
    killed = [rank for rank in evidence.ranks if rank.signal not in (None, "SIGTERM")]
    first = next(iter(evidence.ranks), None)
    if not killed and first is not None and first.signal:
        killed = [first]
    raised = {error.rank for error in evidence.errors}
    return next((rank for rank in killed if rank.rank not in raised), None)


def _killed_rank(evidence: Evidence, rank: int, name: str) -> _ExitSummary:
    if name == "SIGKILL" and evidence.memory.kills:
        return _out_of_memory(evidence, f"rank {rank}", rank)
    message = f"rank {rank} was killed by {name} at step {evidence.step}; the other ranks were ended"
    return _crash(Reason.WORKER_CRASHED, message, evidence, rank)


def _out_of_memory(evidence: Evidence, killed: str, rank: int | None = None, hint: str = MEMORY_HINT) -> _ExitSummary:
    at_step = f" at step {evidence.step}" if hint is MEMORY_HINT else ""
    message = f"the kernel killed {killed} for lack of memory{at_step}; {evidence.memory}"
    tail = evidence.tails.get(rank or 0) or None
    card = ErrorCard(code=Reason.HOST_OUT_OF_MEMORY, message=message, hint=hint, rank=rank, traceback=tail)
    return _ExitSummary("failed", Reason.HOST_OUT_OF_MEMORY, message, card)


def _exception(evidence: Evidence, error: RankError) -> _ExitSummary:
    message = f"rank {error.rank} failed at step {evidence.step}: {_first_line(error.message)}"
    text = f"{error.message}\n{error.traceback}".lower()
    known = ((reason, hint) for part, reason, hint in KNOWN_ERRORS if part in text)
    reason, hint = next(known, (Reason.WORKER_CRASHED, cuda_advice(error.message)))
    card = ErrorCard(
        code=reason, message=message, hint=hint, rank=error.rank, traceback=error.traceback or error.message
    )
    return _ExitSummary("failed" if reason is not Reason.WORKER_CRASHED else "crashed", reason, message, card)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no message")[:500]


def _primary_error(evidence: Evidence) -> RankError | None:
    """Return the earliest error that is not the loss of a peer, or None."""
    for error in evidence.errors:
        if not any(part in error.message.lower() for part in SECONDARY_ERRORS):
            return error
    return None


def _crash(reason: Reason, message: str, evidence: Evidence, rank: int | None = None) -> _ExitSummary:
    tail = evidence.tails.get(rank or 0) or evidence.agent_tail
    return _ExitSummary(
        "crashed", reason, message, ErrorCard(code=reason, message=message, rank=rank, traceback=tail or None)
    )
