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
from trainyard.service.db.models import LeaderRow
from trainyard.service.leadership import (
    LEASE_SECONDS,
    ROW,
    LeaderWatch,
    is_dead,
)
from trainyard.service.scheduler.plan import Start, plan
from trainyard.service.scheduler.published_inventory import Bulletin
from trainyard.service.scheduler.snapshot import Memory, Snapshot, take

FRESH_SECONDS = 1.0
NOBODY = "a service that schedules; none answers now"
AT_ONCE = "nothing: its devices are free, it starts at the scheduler's next look"


class Outlook:
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
        self._leader = LeaderWatch(monotonic)

    def waiting(self) -> Mapping[str, str]:
        """Job id -> what it waits for, of every queued job."""
        with self._lock:
            if self._monotonic() - self._looked_at > FRESH_SECONDS:
                with self._database.read() as session:
                    self._waiting = self._foresee(session)
                self._looked_at = self._monotonic()
            return self._waiting

    def _foresee(self, session: Session) -> Mapping[str, str]:
        row = session.get(LeaderRow, ROW)
        bulletin = Bulletin.of(row)
        now = self._clock()
        if row is None or bulletin is None or self._is_silent(row):
            queued = take(session, (), Memory(), now).queued
            return dict.fromkeys((job.id for job in queued), NOBODY)
        return foreseen(take(session, bulletin.devices, Memory(), now, bulletin.preempts), now)

    def _is_silent(self, row: LeaderRow) -> bool:
        """Whether the one that schedules is gone, or has not counted on for as long as makes another one follow it."""
        return row.holder is None or is_dead(row.holder) or self._leader.silence(row) > LEASE_SECONDS


def foreseen(snapshot: Snapshot, now: datetime) -> Mapping[str, str]:
    """What each queued job waits for by this snapshot."""
    decided = plan(snapshot, now)
    starting = {action.job_id: AT_ONCE for action in decided.actions if isinstance(action, Start)}
    return {**starting, **decided.waiting}
