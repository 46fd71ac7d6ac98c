"""What queued jobs wait for, as a service reports it that does not schedule.

It reads the same rows and the published devices, makes the same plan as the leader, and executes nothing.
"""

import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from sqlalchemy.orm import Session

from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.leadership import LEASE_SECONDS, ROW, LeaderMonitor, is_dead
from trainyard.service.scheduler.plan import Start, plan
from trainyard.service.scheduler.published_inventory import InventorySnapshot
from trainyard.service.scheduler.snapshot import SchedulerMemory, Snapshot, load_snapshot

FRESH_SECONDS = 1.0
NO_JOBS = "a service that schedules; none answers now"
STARTS_NEXT = "nothing: its devices are free, it starts in the scheduler's next round"


class QueuePreview:
    """Cached preview, computed at most once a second."""

    def __init__(
        self, database: Database, clock: Callable[[], datetime], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._waiting: Mapping[str, str] = {}
        self._loaded_at = float("-inf")
        self._leader = LeaderMonitor(monotonic)

    def waiting(self) -> Mapping[str, str]:
        """Job id -> what it waits for, for every queued job."""
        with self._lock:
            if self._monotonic() - self._loaded_at > FRESH_SECONDS:
                with self._database.read() as session:
                    self._waiting = self._load_waiting(session)
                self._loaded_at = self._monotonic()
            return self._waiting

    def _load_waiting(self, session: Session) -> Mapping[str, str]:
        row = session.get(SchedulerLeaseRow, ROW)
        inventory = InventorySnapshot.of(row)
        now = self._clock()
        if row is None or inventory is None or self._has_no_leader(row):
            queued = load_snapshot(session, (), SchedulerMemory(), now).queued
            return dict.fromkeys((job.id for job in queued), NO_JOBS)
        return preview(load_snapshot(session, inventory.devices, SchedulerMemory(), now, inventory.preempts), now)

    def _has_no_leader(self, row: SchedulerLeaseRow) -> bool:
        return row.holder is None or is_dead(row.holder) or self._leader.seconds_since_renewal(row) > LEASE_SECONDS


def preview(snapshot: Snapshot, now: datetime) -> Mapping[str, str]:
    """Return what each queued job waits for, given this snapshot."""
    decision = plan(snapshot, now)
    starting = {action.job_id: STARTS_NEXT for action in decision.actions if isinstance(action, Start)}
    return {**starting, **decision.waiting}
