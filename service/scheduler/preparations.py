"""The scheduling of corpora that are prepared before devices are leased: a pure part of the plan.

The jobs of a host never wait for a preparation: it leases nothing, and runs at a lower priority of the CPU. Free CPU
slots decide how many processes it has. One may always run, even if runs use all CPU slots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from trainyard.contract.status import CorpusStatus, JobStatus, Reason
from trainyard.service.launch.base import LOCAL, AttemptRef
from trainyard.service.timing import Timing

MAX_LOCAL = 4
"""Preparations of one host at a time: a small corpus does not wait for a large one."""

INSPECT_AFTER = timedelta(seconds=0.5)
STALL_MARGIN = timedelta(seconds=60)
"""The agent ends a stalled preparation itself. After this the launcher does it, because the agent is stopped.

If a preparation was not inspected for longer than this, its reports are unknown, so it does not count as stalled."""

OrderKey = tuple[int, datetime, int]
"""Order of the queue: minus the priority, the time, and the number of the job."""


@dataclass(frozen=True)
class Preparation:
    """A corpus that is being prepared, or that something waits for.

    ``order``: of the first job or request that waits for it; None if nothing does. ``stall``: the time without a report
    after which it is considered hung. ``inspected_at``: from this process's memory.
    """

    id: str
    name: AttemptRef
    status: CorpusStatus
    order: OrderKey | None
    launched: bool = False
    acked_seq: int = 0
    restart_at: datetime | None = None
    asked_at: datetime | None = None
    heard_at: datetime | None = None
    inspected_at: datetime | None = None
    stall: timedelta = timedelta(days=1)


@dataclass(frozen=True)
class WaitingJob:
    """A queued or preparing job and the status of its corpus, or None if that was removed."""

    job_id: str
    status: JobStatus
    corpus_id: str
    corpus_status: CorpusStatus | None


@dataclass(frozen=True)
class Prepare:
    """Start the process that prepares a corpus, with this number of tokenizer processes; None: one per core."""

    corpus_id: str
    processes: int | None


@dataclass(frozen=True)
class InspectPreparation:
    """Read what the process has reported, and whether it has ended."""

    preparation: Preparation


@dataclass(frozen=True)
class StopPreparation:
    """Ask the process to stop, because nothing waits for its corpus."""

    preparation: Preparation


@dataclass(frozen=True)
class KillPreparation:
    """Kill the process, which did not stop or which made no progress."""

    preparation: Preparation
    reason: Reason


@dataclass(frozen=True)
class MoveWaitingJob:
    """Change a queued job to preparing because its corpus is being prepared, or back because it is not."""

    job_id: str
    corpus_id: str
    to: JobStatus


PreparationAction = Prepare | InspectPreparation | StopPreparation | KillPreparation | MoveWaitingJob


def log_fields(action: PreparationAction) -> dict[str, Any]:
    match action:
        case Prepare():
            return {"corpus_id": action.corpus_id}
        case MoveWaitingJob():
            return {"job_id": action.job_id}
        case _:
            return {"corpus_id": action.preparation.id, "attempt": action.preparation.name.number}


def plan_live_preparations(
    preparations: Sequence[Preparation], jobs: Sequence[WaitingJob], now: datetime, timing: Timing
) -> Iterator[PreparationAction]:
    """Yield the actions for running processes, and for jobs whose status does not fit their corpus."""
    for preparation in preparations:
        if preparation.status is CorpusStatus.PREPARING:
            yield from _attend(preparation, now, timing)
    for job in jobs:
        is_prepared = job.corpus_status is CorpusStatus.PREPARING
        if job.status is JobStatus.QUEUED and is_prepared:
            yield MoveWaitingJob(job.job_id, job.corpus_id, JobStatus.PREPARING)
        elif job.status is JobStatus.PREPARING and job.corpus_status in (None, CorpusStatus.READY):
            yield MoveWaitingJob(job.job_id, job.corpus_id, JobStatus.QUEUED)


def was_unobserved(preparation: Preparation, now: datetime) -> bool:
    """Return whether no report was read for long, because the service was down or suspended or the clock changed."""
    return preparation.inspected_at is None or abs(now - preparation.inspected_at) > STALL_MARGIN


def _attend(preparation: Preparation, now: datetime, timing: Timing) -> Iterator[PreparationAction]:
    # A time in the future was written before the clock was set back: it counts as old.
    if preparation.inspected_at is None or abs(now - preparation.inspected_at) > INSPECT_AFTER:
        yield InspectPreparation(preparation)
    if preparation.asked_at is not None:
        if abs(now - preparation.asked_at) > timing.kill_grace:
            yield KillPreparation(preparation, Reason.USER)
    elif preparation.order is None:
        yield StopPreparation(preparation)
    elif was_unobserved(preparation, now) or preparation.heard_at is None:
        return
    elif abs(now - preparation.heard_at) > preparation.stall + STALL_MARGIN:
        yield KillPreparation(preparation, Reason.HUNG)


def plan_new_preparations(
    preparations: Sequence[Preparation], free_slots: int, total_slots: int, now: datetime, timing: Timing = Timing()
) -> tuple[list[Prepare], dict[str, int]]:
    """Return the preparations to start, in the order of the queue, and how many come before each of the others.

    ``free_slots``: CPU slots that no run has. On a cluster all start: it has its own queue.
    """
    running = sum(p.status is CorpusStatus.PREPARING and p.name.launcher == LOCAL for p in preparations)
    limit = max(1, min(MAX_LOCAL, total_slots))
    started: list[Prepare] = []
    waiting: dict[str, int] = {}
    idle = [p for p in preparations if p.order is not None and p.status is not CorpusStatus.PREPARING]
    for preparation in sorted(idle, key=_order):
        if preparation.restart_at is not None and not timing.is_due(preparation.restart_at, now):
            waiting[preparation.id] = 0
        elif preparation.name.launcher != LOCAL:
            started.append(Prepare(preparation.id, None))
        elif running < limit:
            running += 1
            started.append(Prepare(preparation.id, max(1, free_slots // running)))
        else:
            waiting[preparation.id] = running + len(waiting)
    return started, waiting


def _order(preparation: Preparation) -> OrderKey:
    assert preparation.order is not None
    return preparation.order
