"""How an attempt ended and who is at fault: a pure function of the evidence. The unknown stays unknown."""

import json
import re
import signal
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, assert_never

from trainyard.contract.messages import (
    ErrorCard,
    ExitReport,
    Outcome,
    RankExit,
    read_message,
)
from trainyard.contract.rundir import RANK_FILE, AttemptDir, write_json
from trainyard.contract.status import Reason
from trainyard.worker.agent.escalation import StopCause
from trainyard.worker.agent.follower import NodeExit, PeerNodes
from trainyard.worker.agent.oom import OomReport

TAIL_LINES = 15

TAIL_BYTES = 16384

# torchrun's summary of failed ranks is text for people; nothing else of it names a rank that was killed by a signal.
SUMMARY = re.compile(r"rank\s*:\s*(\d+)\s*\(local_rank:\s*\d+\)\s*\n\s*exitcode\s*:\s*(-?\d+)")

ROOT_CAUSE = "Root Cause (first observed failure)"


@dataclass(frozen=True)
class RankError:
    """One rank's exception as its error.json has it; ``at`` is in seconds since 1970."""

    rank: int
    at: float
    message: str
    traceback: str


@dataclass(frozen=True)
class Evidence:
    """Everything the verdict is made of. ``errors`` are in the order in which they happened.

    ``ranks`` begins with the one that torchrun takes for the first to fail: it sends SIGTERM to the others, which die
    of that.
    ``nodes``: how torchrun ended on the other nodes; ``lost_nodes``: those that nobody has heard of again.
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


def collect_evidence(
    attempt: AttemptDir, torchrun_status: int | None, memory: OomReport, others: PeerNodes | None = None
) -> Evidence:
    """Read it all; whatever is missing or torn is left out, and never makes this fail."""
    ended = others.ended if others is not None else {}
    return Evidence(
        outcome=read_message(Outcome, attempt.outcome),
        torchrun_status=torchrun_status,
        errors=_rank_errors(attempt.torchrun_logs),
        ranks=tuple(
            rank for node in (0, *ended) for rank in _rank_exits(_tail(attempt.node_log(node), 4 * TAIL_BYTES))
        ),
        step=attempt.read_step() or 0,
        memory=memory,
        tails={rank: _last_lines(log) for rank, log in _rank_logs(attempt)},
        agent_tail=_last_lines(attempt.agent_log),
        nodes=tuple(ended.values()),
        lost_nodes=tuple(others.missing()) if others is not None else (),
    )


def _rank_errors(torchrun_logs: Path) -> tuple[RankError, ...]:
    """The earliest is the real one: the others only report that a peer went away."""
    found = [error for file in torchrun_logs.glob("**/error.json") if (error := _rank_error(file))]
    return tuple(sorted(found, key=lambda error: error.at))


def _rank_error(file: Path) -> RankError | None:
    try:
        message = json.loads(file.read_bytes())["message"]
        extra = message["extraInfo"] if isinstance(message, dict) else {}
        text = message["message"] if isinstance(message, dict) else str(message)
        return RankError(
            rank=_rank_of(file),
            # The recorded time has whole seconds only, and two ranks often fail within one.
            at=file.stat().st_mtime,
            message=str(text),
            traceback=str(extra.get("py_callstack", "")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rank_of(error_file: Path) -> int:
    """The rank says it itself beside the file: torchrun's folder has only its number on the node."""
    try:
        return int((error_file.parent / RANK_FILE).read_text())
    except (OSError, ValueError):
        return int(error_file.parent.name)


def _rank_exits(torchrun_summary: str) -> tuple[RankExit, ...]:
    others, _, root = torchrun_summary.partition(ROOT_CAUSE)
    found = [*SUMMARY.findall(root)[:1], *sorted(SUMMARY.findall(others))]
    return tuple(rank_exit(int(rank), int(code)) for rank, code in dict(found).items())


def rank_exit(rank: int, status: int) -> RankExit:
    """A rank's end from its exit status, negative for a signal."""
    return RankExit(rank=rank, signal=signal_name(-status)) if status < 0 else RankExit(rank=rank, exit_code=status)


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9."""
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


# The ranks of an attempt fail one after the other; these only say that a peer was lost.
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

"""Part of an exception's text -> who is at fault, and what to do."""

MEMORY_HINT = (
    "Give the host or its container more memory, or ask for less: fewer ranks on it, a smaller batch_size with more "
    "accumulation_steps, a smaller max_seq_len. Saving keeps a copy of weights and moments on rank 0 for a while."
)


@dataclass(frozen=True)
class _ExitSummary:
    outcome: Literal["completed", "stopped", "failed", "crashed", "killed"]
    reason: Reason | None
    message: str
    error: ErrorCard | None = None


def diagnose(evidence: Evidence, cause: StopCause | None, last_seq: int, now: datetime) -> ExitReport:
    """The exit report. Rank 0's own word counts before everything: an exit code says nothing about success.

    torchrun exits with 1 after a crash and after a clean stop alike, and a rank may abort after its work was done.
    """
    end = _from_outcome(evidence) or _from_agent(evidence, cause) or _from_crash(evidence)
    return ExitReport(
        outcome=end.outcome,
        reason=end.reason,
        message=end.message,
        error=_with_tail(end.error, evidence),
        step=evidence.outcome.step if evidence.outcome else evidence.step,
        ranks=list(evidence.ranks),
        last_seq=last_seq,
        ended_at=now,
    )


def _with_tail(card: ErrorCard | None, evidence: Evidence) -> ErrorCard | None:
    """The card with the last lines of its rank, or of the agent where the rank printed none."""
    if card is None:
        return None
    tail = evidence.tails.get(card.rank or 0) or evidence.agent_tail
    return card.model_copy(update={"log_tail": tail.splitlines()})


def apply_time_limit(report: ExitReport) -> ExitReport:
    """The report of an attempt that the cluster's time limit ended: whether it was saved in time or not."""
    if report.outcome in ("completed", "failed"):
        return report
    message = f"{report.message}: its time on the cluster was over"
    return report.model_copy(update={"reason": Reason.TIME_LIMIT, "message": message})


def launch_failed_report(attempt: AttemptDir, message: str) -> None:
    """Report an attempt of which nothing was started."""
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
    said = evidence.outcome
    if said is None:
        return None
    match said.outcome:
        case "completed":
            return _ExitSummary("completed", None, said.message or f"finished at step {said.step}")
        case "stopped":
            return _ExitSummary(
                "stopped", said.reason or Reason.USER, said.message or f"saved and stopped at step {said.step}"
            )
        case "failed":
            message = said.message or "the run failed"
            reason = said.reason or Reason.UNKNOWN
            return _ExitSummary("failed", reason, message, said.error or ErrorCard(code=reason, message=message))
        case _:
            assert_never(said.outcome)


def _from_agent(evidence: Evidence, cause: StopCause | None) -> _ExitSummary | None:
    match cause:
        case None:
            return None
        case StopCause.KILLED:
            return _ExitSummary("killed", Reason.USER, f"ended at step {evidence.step} as asked")
        case StopCause.OVERDUE:
            message = f"was asked to save and stop, did not within the grace, and was ended at step {evidence.step}"
            return _ExitSummary("killed", Reason.USER, message)
        case StopCause.DESERTED:
            return _lost_node(evidence) or _from_other_node(evidence)
        case StopCause.HUNG:
            message = f"made no progress after step {evidence.step}"
            hint = "The stacks of all ranks are at the end of their logs."
            card = ErrorCard(code=Reason.HUNG, message=message, hint=hint, traceback=evidence.tails.get(0))
            return _ExitSummary("crashed", Reason.HUNG, message, card)
        case _:
            assert_never(cause)


def _lost_node(evidence: Evidence) -> _ExitSummary | None:
    """A node of which nobody has heard again, where nothing else is known to have failed."""
    first = _first_real_error(evidence)
    if not evidence.lost_nodes or (first is not None and not _is_secondary(first)):
        return None
    names = ", ".join(f"node {number + 1}" for number in evidence.lost_nodes)
    message = f"{names} of {len(evidence.nodes) + len(evidence.lost_nodes) + 1} was lost at step {evidence.step}"
    return _crash(Reason.NODE_LOST, message, evidence)


def _from_other_node(evidence: Evidence) -> _ExitSummary:
    """The ranks of another node ended first."""
    first = _first_real_error(evidence)
    if first is not None and not _is_secondary(first):
        return _exception(evidence, first)
    said = next((node for node in evidence.nodes if node.message), None)
    if said is not None or not evidence.nodes:
        what = (
            f"on {said.name}: {said.message}"
            if said is not None
            else "the cluster lost sight of the first node's agent"
        )
        return _crash(Reason.NODE_LOST, f"{what}, at step {evidence.step}", evidence)
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
        real = next((error for error in evidence.errors if not _is_secondary(error)), None)
        if name == "SIGTERM" and real is not None:  # a cluster ended what was left
            return _exception(evidence, real)
        if name == "SIGKILL" and evidence.memory.kills:
            return _out_of_memory(evidence, "torchrun")
        message = f"torchrun was killed by {name} at step {evidence.step}; its ranks were ended"
        return _crash(Reason.WORKER_CRASHED, message, evidence)
    killed = _killed_first(evidence)
    first = _first_real_error(evidence)
    if killed is not None and (first is None or _is_secondary(first)):
        return _killed_rank(evidence, killed.rank, str(killed.signal))
    if first is not None:
        return _exception(evidence, first)
    if evidence.ranks:
        rank = evidence.ranks[0]
        message = f"rank {rank.rank} ended with exit code {rank.exit_code} at step {evidence.step}"
        return _crash(Reason.WORKER_CRASHED, message, evidence, rank.rank)
    message = (
        f"the ranks ended at step {evidence.step} without a word; torchrun's exit code was {evidence.torchrun_status}"
    )
    return _crash(Reason.UNKNOWN, message, evidence)


def _killed_first(evidence: Evidence) -> RankExit | None:
    """The rank that a signal ended, and no exception before it. torchrun sends SIGTERM to all but the first.

    The first place alone proves nothing: torchrun sorts a killed rank by when it looked, and a peer that lost it by the
    time in the peer's error file, which is earlier.
    """
    killed = [rank for rank in evidence.ranks if rank.signal not in (None, "SIGTERM")]
    first = next(iter(evidence.ranks), None)
    if not killed and first is not None and first.signal:
        killed = [first]
    raised = {error.rank for error in evidence.errors}
    return next((rank for rank in killed if rank.rank not in raised), None)


def _killed_rank(evidence: Evidence, rank: int, name: str) -> _ExitSummary:
    message = f"rank {rank} was killed by {name} at step {evidence.step}; the other ranks were ended"
    if name == "SIGKILL" and evidence.memory.kills:
        return _out_of_memory(evidence, f"rank {rank}", rank)
    return _crash(Reason.WORKER_CRASHED, message, evidence, rank)


def _out_of_memory(evidence: Evidence, who: str, rank: int | None = None) -> _ExitSummary:
    message = f"the kernel killed {who} for want of memory at step {evidence.step}; {evidence.memory}"
    tail = evidence.tails.get(rank or 0) or None
    card = ErrorCard(code=Reason.HOST_OUT_OF_MEMORY, message=message, hint=MEMORY_HINT, rank=rank, traceback=tail)
    return _ExitSummary("failed", Reason.HOST_OUT_OF_MEMORY, message, card)


def _exception(evidence: Evidence, error: RankError) -> _ExitSummary:
    message = f"rank {error.rank} failed at step {evidence.step}: {_first_line(error.message)}"
    everything = f"{error.message}\n{error.traceback}".lower()
    reason, hint = next(
        ((reason, hint) for part, reason, hint in KNOWN_ERRORS if part in everything), (Reason.WORKER_CRASHED, None)
    )
    card = ErrorCard(
        code=reason, message=message, hint=hint, rank=error.rank, traceback=error.traceback or error.message
    )
    return _ExitSummary("failed" if reason is not Reason.WORKER_CRASHED else "crashed", reason, message, card)


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no message")[:500]


def _first_real_error(evidence: Evidence) -> RankError | None:
    real = [error for error in evidence.errors if not _is_secondary(error)]
    return next(iter(real or evidence.errors), None)


def _is_secondary(error: RankError) -> bool:
    return any(echo in error.message.lower() for echo in SECONDARY_ERRORS)


def _crash(reason: Reason, message: str, evidence: Evidence, rank: int | None = None) -> _ExitSummary:
    tail = evidence.tails.get(rank or 0) or evidence.agent_tail
    return _ExitSummary(
        "crashed", reason, message, ErrorCard(code=reason, message=message, rank=rank, traceback=tail or None)
    )
