"""What queued jobs wait for, told by a service that does not schedule: the plan of the one that does, foreseen.

It reads the same rows, and the devices that the other one has published, and makes the same plan; it carries nothing
out. Where nobody schedules, that is what the jobs wait for.
"""

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from sqlalchemy.orm import Session

from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.leadership import (
    LEASE_SECONDS,
    ROW,
    LeaderMonitor,
    is_dead,
)
from trainyard.service.scheduler.plan import Start, plan
from trainyard.service.scheduler.published_inventory import InventorySnapshot
from trainyard.service.scheduler.snapshot import SchedulerMemory, Snapshot, load_snapshot

FRESH_SECONDS = 1.0
NO_JOBS = "a service that schedules; none answers now"
STARTS_NEXT = "nothing: its devices are free, it starts at the scheduler's next look"


class QueuePreview:
    """Looks at most once a second, however many ask."""

    def __init__(
        self, database: Database, clock: Callable[[], datetime], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._waiting: Mapping[str, str] = {}
        self._looked_at = float("-inf")
        self._leader = LeaderMonitor(monotonic)

    def waiting(self) -> Mapping[str, str]:
        """Job id -> what it waits for, of every queued job."""
        with self._lock:
            if self._monotonic() - self._looked_at > FRESH_SECONDS:
                with self._database.read() as session:
                    self._waiting = self._foresee(session)
                self._looked_at = self._monotonic()
            return self._waiting

    def _foresee(self, session: Session) -> Mapping[str, str]:
        row = session.get(SchedulerLeaseRow, ROW)
        bulletin = InventorySnapshot.of(row)
        now = self._clock()
        if row is None or bulletin is None or self._is_silent(row):
            queued = load_snapshot(session, (), SchedulerMemory(), now).queued
            return dict.fromkeys((job.id for job in queued), NO_JOBS)
        return preview(load_snapshot(session, bulletin.devices, SchedulerMemory(), now, bulletin.preempts), now)

    def _is_silent(self, row: SchedulerLeaseRow) -> bool:
        """Whether the one that schedules is gone, or has not counted on for as long as makes another one follow it."""
        return row.holder is None or is_dead(row.holder) or self._leader.seconds_since_renewal(row) > LEASE_SECONDS


def preview(snapshot: Snapshot, now: datetime) -> Mapping[str, str]:
    """What each queued job waits for by this snapshot."""
    decided = plan(snapshot, now)
    starting = {action.job_id: STARTS_NEXT for action in decided.actions if isinstance(action, Start)}
    return {**starting, **decided.waiting}
