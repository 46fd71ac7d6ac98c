"""What to do next: a pure function of the snapshot and the time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, assert_never

from trainyard.contract.status import Desired
from trainyard.service.devices.inventory import Device, kind_for
from trainyard.service.launch.base import LOCAL
from trainyard.service.scheduler.preemption import PreemptionBudget
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot
from trainyard.service.timing import Timing

REINSPECT_AFTER = timedelta(seconds=1)
"""An attempt that waits on its cluster is looked up so often: nobody else can say what it waits for.

So is one whose agent cannot report: at each look its outbox is read."""

BACKFILL_PATIENCE = timedelta(minutes=5)
"""So long smaller jobs may overtake one that does not fit; then free devices are kept for it."""

NAMES = {"cpu": ("CPU slot", "CPU slots"), "cuda": ("GPU", "GPUs")}


@dataclass(frozen=True)
class Start:
    """Lease the devices to a queued job and launch its next attempt; on a cluster there is nothing to lease."""

    job_id: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Restart:
    """Queue an interrupted job again: its back-off is over."""

    job_id: str


@dataclass(frozen=True)
class Inspect:
    """Ask the launcher what is left of a quiet attempt, and believe the kernel."""

    attempt: LiveAttempt


@dataclass(frozen=True)
class NotifyStop:
    """Tell the ranks directly what their agent will hear in its next report."""

    attempt: LiveAttempt


@dataclass(frozen=True)
class Kill:
    """End a killed attempt whose agent does not answer."""

    attempt: LiveAttempt


@dataclass(frozen=True)
class Preempt:
    """Ask a running attempt to save and stop, so that ``job_id`` gets its devices; its own job is queued again."""

    attempt: LiveAttempt
    job_id: str


Action = Start | Restart | Inspect | NotifyStop | Kill | Preempt


def subject(action: Action) -> dict[str, Any]:
    """Which job an action is done to, and which attempt of it: fields of the log's lines."""
    match action:
        case Start() | Restart():
            return {"job_id": action.job_id}
        case Inspect() | NotifyStop() | Kill() | Preempt():
            return action.attempt.name.fields
        case _:
            assert_never(action)


@dataclass(frozen=True)
class Plan:
    """Actions in the order in which they are done, and what each job that stays queued waits for."""

    actions: tuple[Action, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)


def plan(snapshot: Snapshot, now: datetime, timing: Timing = Timing()) -> Plan:
    """Look after what lives, then start what fits."""
    attended = [action for attempt in snapshot.live if (action := _plan_live(attempt, now, timing)) is not None]
    restarts = [Restart(job_id) for job_id in snapshot.restarts_due]
    placed, waiting = _place(snapshot, now)
    return Plan((*attended, *restarts, *placed), waiting)


def _plan_live(attempt: LiveAttempt, now: datetime, timing: Timing) -> Action | None:
    quiet = attempt.last_heartbeat_at is None or _is_older(attempt.last_heartbeat_at, now, timing.quiet)
    if attempt.inspected_at is None:
        return Inspect(attempt)
    if attempt.desired is Desired.KILL and (attempt.tailed or not attempt.placed):
        return Kill(attempt)
    overdue = attempt.stop_requested_at is not None and _is_older(attempt.stop_requested_at, now, timing.kill_grace)
    if attempt.desired is Desired.KILL and quiet and overdue:
        return Kill(attempt)
    if quiet and _is_older(attempt.inspected_at, now, timing.quiet):
        return Inspect(attempt)
    if attempt.desired in (Desired.PAUSE, Desired.CANCEL) and attempt.notified is not attempt.desired:
        return NotifyStop(attempt)
    if (attempt.tailed or not attempt.placed) and _is_older(attempt.inspected_at, now, REINSPECT_AFTER):
        return Inspect(attempt)
    return None


def _is_older(then: datetime, now: datetime, patience: timedelta) -> bool:
    """Whether it is longer ago than that. What lies ahead was before the clock was set back: nobody knows how long."""
    return abs(now - then) > patience


class _Pools:
    """Free devices by kind. Devices are taken in the inventory's order."""

    def __init__(self, devices: Sequence[Device], leases: Mapping[str, str]) -> None:
        self.leases = dict(leases)
        self.total: dict[str, int] = {}
        self.free: dict[str, dict[str, None]] = {"cpu": {}, "cuda": {}}
        for device in devices:
            self.total[device.kind] = self.total.get(device.kind, 0) + 1
            if device.id not in leases and not device.processes:
                self.free[device.kind][device.id] = None

    def fits(self, kind: str, ranks: int) -> bool:
        return ranks <= self.count(kind) if kind in self.free else ranks == self.count(kind) == 1

    def count(self, kind: str) -> int:
        """How many devices of a kind, or of a name, are free."""
        pool = self.free[_pool(kind)]
        return len(pool) if kind in self.free else int(kind in pool)

    def take(self, kind: str, ranks: int, job_id: str) -> tuple[str, ...]:
        pool = self.free[_pool(kind)]
        taken = tuple(islice(pool, ranks)) if kind in self.free else (kind,)
        for device in taken:
            del pool[device]
            self.leases[device] = job_id
        return taken

    def lacks(self, kind: str, ranks: int) -> str:
        """What a job waits for that does not fit."""
        if kind not in NAMES:
            holder = self.leases.get(kind)
            return f"{kind}, " + (f"which {holder} has" if holder else "which is in use or not there")
        one, many = NAMES[kind]
        return f"{ranks} {one if ranks == 1 else many}; {len(self.free[kind])} of {self.total.get(kind, 0)} free"

    def reserve(self, kind: str) -> None:
        """Keep what is free for the job in front: nobody behind it gets any."""
        if kind in self.free:
            self.free[kind] = {}
        else:
            self.free[_pool(kind)].pop(kind, None)


def _pool(kind: str) -> str:
    return kind.partition(":")[0]


def _place(snapshot: Snapshot, now: datetime) -> tuple[list[Start | Preempt], dict[str, str]]:
    """Start by priority, then age. Who does not fit is overtaken for PATIENCE at most, or room is made for it."""
    pools = _Pools(snapshot.devices, snapshot.leases)
    yielding = PreemptionBudget(snapshot)
    auto = kind_for("auto", snapshot.devices)
    placed: list[Start | Preempt] = []
    waiting: dict[str, str] = {}
    for job in sorted(snapshot.queued, key=_turn):
        if job.launcher not in (None, LOCAL):
            placed.append(Start(job.id, ()))  # the cluster has a queue of its own
            continue
        kind = auto if job.device == "auto" else job.device
        if pools.fits(kind, job.ranks):
            placed.append(Start(job.id, pools.take(kind, job.ranks, job.id)))
            continue
        waiting[job.id] = pools.lacks(kind, job.ranks)
        room = yielding.room_for(job, kind, pools.count(kind))
        if room is not None:
            placed += [Preempt(attempt, job.id) for attempt in room.victims]
            waiting[job.id] += f"; {room}"
        else:
            yielding.close(kind)
        if room is not None or now - job.queued_at > BACKFILL_PATIENCE:
            # What is free meanwhile is kept: else who made room would take it again, and make room again.
            pools.reserve(kind)
    return placed, waiting


def _turn(job: QueuedJob) -> tuple[int, datetime, int]:
    return -job.priority, job.queued_at, job.number
