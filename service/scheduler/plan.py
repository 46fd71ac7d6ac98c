"""The scheduling decision: a pure function of the snapshot and the time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, assert_never

from trainyard.contract.status import Desired
from trainyard.service.devices.inventory import Device, kind_for
from trainyard.service.devices.placement import choose, differ
from trainyard.service.launch.base import LOCAL
from trainyard.service.scheduler.preemption import PreemptionBudget
from trainyard.service.scheduler.preparations import (
    InspectPreparation,
    KillPreparation,
    MoveWaitingJob,
    PreparationAction,
    Prepare,
    StopPreparation,
    log_fields,
    plan_live_preparations,
    plan_new_preparations,
)
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot
from trainyard.service.timing import Timing

# How often an attempt is inspected that waits on its cluster, which alone knows the reason, or whose agent cannot
# report, so that its outbox is read.
REINSPECT_AFTER = timedelta(seconds=1)

# How long smaller jobs may overtake one that does not fit. After that, free devices are kept for it.
BACKFILL_PATIENCE = timedelta(minutes=5)

DEVICE_NAMES = {"cpu": ("CPU slot", "CPU slots"), "cuda": ("GPU", "GPUs")}


@dataclass(frozen=True)
class Start:
    """Lease the devices to a queued job and launch its next attempt. A cluster's devices are not leased."""

    job_id: str
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Restart:
    """Queue an interrupted job again after its back-off."""

    job_id: str


@dataclass(frozen=True)
class Inspect:
    """Ask the launcher for the state of an attempt that does not report."""

    attempt: LiveAttempt


@dataclass(frozen=True)
class NotifyStop:
    """Write the stop file for the ranks.

    A stop request travels two ways: this file, and the answer to the agent's next heartbeat. The file is faster; the
    heartbeat also reaches an attempt whose directory or cluster command is not available.
    """

    attempt: LiveAttempt


@dataclass(frozen=True)
class Kill:
    """Kill an attempt that is to be killed and whose agent does not answer."""

    attempt: LiveAttempt


@dataclass(frozen=True)
class Preempt:
    """Ask a running attempt to save and stop, so that ``job_id`` gets its devices. Its own job is queued again."""

    attempt: LiveAttempt
    job_id: str


@dataclass(frozen=True)
class Reclaim:
    """End the side process that has ``device``, so that ``job_id`` gets it. Runs always go first."""

    device: str
    job_id: str


Action = Start | Restart | Inspect | NotifyStop | Kill | Preempt | Reclaim | PreparationAction


def subject(action: Action) -> dict[str, Any]:
    """Return the log fields of the job, and of the attempt if there is one, that ``action`` applies to."""
    match action:
        case Start() | Restart() | Reclaim():
            return {"job_id": action.job_id}
        case Inspect() | NotifyStop() | Kill() | Preempt():
            return action.attempt.name.fields
        case Prepare() | InspectPreparation() | StopPreparation() | KillPreparation() | MoveWaitingJob():
            return log_fields(action)
        case _:
            assert_never(action)


@dataclass(frozen=True)
class SchedulingPlan:
    """Actions in the order of execution, and what each job that stays queued waits for."""

    actions: tuple[Action, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)


def plan(snapshot: Snapshot, now: datetime, timing: Timing = Timing()) -> SchedulingPlan:
    """Attend to live attempts first, then restart and start jobs."""
    live_actions = [action for attempt in snapshot.live if (action := _plan_live(attempt, now, timing)) is not None]
    restarts = [Restart(job_id) for job_id in snapshot.restarts_due]
    preparing = plan_live_preparations(snapshot.preparations, snapshot.waiting_jobs, now, timing)
    placed, waiting = _place(snapshot, now, timing)
    return SchedulingPlan((*live_actions, *restarts, *preparing, *placed), waiting)


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
    # A time in the future was written before the clock was set back; how long ago is unknown, so it counts as old.
    return abs(now - then) > patience


class _Pools:
    """Free devices by kind. A faulty device is not free. ``lent``: devices that side processes have leased."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.leases = dict(snapshot.leases)
        self.total: dict[str, int] = {}
        self.free: dict[str, dict[str, Device]] = {"cpu": {}, "cuda": {}}
        self.lent: dict[str, None] = {}
        self.faulty = {device.id: device for device in snapshot.devices if not device.works}
        self.faulty_count = Counter(device.kind for device in self.faulty.values())
        self.has_places = differ(snapshot.devices)
        for device in snapshot.devices:
            self.total[device.kind] = self.total.get(device.kind, 0) + 1
            if device.id in self.faulty:
                continue
            if device.id in snapshot.lent:
                self.lent[device.id] = None
            elif device.id not in snapshot.leases and not device.processes:
                self.free[device.kind][device.id] = device

    def can_ever_fit(self, kind: str, ranks: int) -> bool:
        """Return whether the host has enough working devices of this kind, free or not."""
        return kind not in self.free or ranks <= self.total.get(kind, 0) - self.faulty_count[kind]

    def fits(self, kind: str, ranks: int) -> bool:
        return ranks <= self.count(kind) if kind in self.free else ranks == self.count(kind) == 1

    def count(self, kind: str) -> int:
        """Return how many devices of a kind (``cuda``) or of a name (``cuda:1``) are free."""
        pool = self.free[_pool(kind)]
        return len(pool) if kind in self.free else int(kind in pool)

    def take(self, kind: str, ranks: int, job_id: str) -> tuple[str, ...]:
        pool = self.free[_pool(kind)]
        devices = self._choose(kind, ranks) if kind in self.free else (kind,)
        for device in devices:
            del pool[device]
            self.leases[device] = job_id
        return devices

    def lent_to_sidecars(self, kind: str, ranks: int) -> tuple[str, ...]:
        """Return the lent devices that ``ranks`` ranks need besides the free ones, as many as there are."""
        fitting = (device for device in self.lent if kind in (device, _pool(device)))
        return tuple(islice(fitting, max(0, ranks - self.count(kind))))

    def reclaim(self, devices: Sequence[str], job_id: str) -> list["Reclaim"]:
        """Take lent devices, so that no later job reclaims them too."""
        for device in devices:
            del self.lent[device]
        return [Reclaim(device, job_id) for device in devices]

    def _choose(self, kind: str, ranks: int) -> tuple[str, ...]:
        pool = self.free[kind]
        # A job must not cost a pass over all devices if nothing is known of their places.
        return choose(list(pool.values()), ranks) if self.has_places else tuple(islice(pool, ranks))

    def waiting_reason(self, kind: str, ranks: int) -> str:
        if kind not in DEVICE_NAMES:
            holder = self.leases.get(kind)
            if holder is None and (device := self.faulty.get(kind)) is not None:
                if device.fault is not None:
                    return f"{kind}, which cannot be used ({device.fault})"
                return f"{kind}, which has XID errors; `trainyard devices --clear {kind}` clears them"
            return f"{kind}, " + (f"which {holder} has" if holder else "which is in use or not there")
        one, many = DEVICE_NAMES[kind]
        faulty = [device for device in self.faulty.values() if device.kind == kind]
        unusable = ", ".join(f"{device.id} ({device.fault})" for device in faulty if device.fault is not None)
        with_xids = ", ".join(device.id for device in faulty if device.fault is None)
        errors = f", and {with_xids} with XID errors" if with_xids else ""
        errors += f", and {unusable} cannot be used" if unusable else ""
        return (
            f"{ranks} {one if ranks == 1 else many}; {len(self.free[kind])} of {self.total.get(kind, 0)} free{errors}"
        )

    def reserve(self, kind: str) -> None:
        """Keep the free devices for the job at the front of the queue: no later job gets any."""
        if kind in self.free:
            self.free[kind] = {}
        else:
            self.free[_pool(kind)].pop(kind, None)


def _pool(kind: str) -> str:
    return kind.partition(":")[0]


def _place(
    snapshot: Snapshot, now: datetime, timing: Timing
) -> tuple[list[Start | Preempt | Reclaim | Prepare], dict[str, str]]:
    """Start jobs by priority, then age. A job that does not fit is overtaken or has others preempted.

    A job whose corpus is not ready takes no part. Corpora are prepared with the CPU slots that are left.
    """
    pools = _Pools(snapshot)
    budget = PreemptionBudget(snapshot)
    auto_kind = kind_for("auto", snapshot.devices)
    placed: list[Start | Preempt | Reclaim | Prepare] = []
    waiting: dict[str, str] = {}
    for job in sorted((job for job in snapshot.queued if job.corpus_id is None), key=_queue_order):
        if job.launcher not in (None, LOCAL):
            placed.append(Start(job.id, ()))  # the cluster has its own queue
            continue
        kind = auto_kind if job.device == "auto" else job.device
        if pools.fits(kind, job.ranks):
            placed.append(Start(job.id, pools.take(kind, job.ranks, job.id)))
            continue
        waiting[job.id] = pools.waiting_reason(kind, job.ranks)
        if not pools.can_ever_fit(kind, job.ranks):
            continue  # A GPU has failed since the submission. Devices that are reserved now would stay idle.
        lent = pools.lent_to_sidecars(kind, job.ranks)
        room = pools.count(kind) + len(lent)
        if room >= job.ranks:
            # They are free in the next round. Until then no later job gets what is free now.
            placed += pools.reclaim(lent, job.id)
            pools.reserve(kind)
            continue
        victims = budget.find_victims(job, kind, room)
        if victims is not None:
            placed += pools.reclaim(lent, job.id)
            placed += [Preempt(attempt, job.id) for attempt in victims.victims]
            waiting[job.id] += f"; {victims}"
        else:
            budget.close(kind)
        if victims is not None or now - job.queued_at > BACKFILL_PATIENCE:
            # Free devices are kept meanwhile: else the preempted job would take them and be preempted again.
            pools.reserve(kind)
    prepared, before = plan_new_preparations(
        snapshot.preparations, len(pools.free["cpu"]), pools.total.get("cpu", 0), now, timing
    )
    for job in snapshot.queued:
        if job.corpus_id is not None:
            count = before.get(job.corpus_id, 0)
            others = f", after {count} other{'' if count == 1 else 's'}" if count else ""
            waiting[job.id] = f"the preparation of its corpus{others}"
    return [*placed, *prepared], waiting


def _queue_order(job: QueuedJob) -> tuple[int, datetime, int]:
    return -job.priority, job.queued_at, job.number
