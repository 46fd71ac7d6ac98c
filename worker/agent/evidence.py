"""What a finished attempt left on disk: rank 0's word, the ranks' error files, torchrun's summary, the logs' tails."""

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from trainyard.contract.report import Outcome, RankExit, read_message
from trainyard.contract.rundir import RANK_FILE, AttemptDir
from trainyard.worker.agent.memory import Shortage
from trainyard.worker.agent.nodes import NodeEnd, OtherNodes

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
    memory: Shortage
    tails: dict[int, str]
    agent_tail: str
    nodes: tuple[NodeEnd, ...] = ()
    lost_nodes: tuple[int, ...] = ()


def gather(
    attempt: AttemptDir, torchrun_status: int | None, memory: Shortage, others: OtherNodes | None = None
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
