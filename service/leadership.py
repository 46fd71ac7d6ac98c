"""Who schedules, where several services share a database: one row, an epoch that only grows, and no clock.

The leader counts ``beat`` up. Whoever sees it stand still for LEASE_SECONDS of its own monotonic clock takes over by
raising the epoch; on the leader's own host the kernel is asked instead, so that a restart waits for nothing. A leader
that was stopped and wakes finds another epoch, and every one of its writes is refused: `Lease.fence`.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.processes import ProcessIdentity, boot_id, pid_namespace
from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.timing import Timing

LEASE_SECONDS = Timing.lease_seconds
RENEW_SECONDS = Timing.renew_seconds
ROW = 1

log = logging.getLogger("trainyard")


class LeadershipLost(Exception):
    """Another service schedules now: what this one was about to write is not written."""


class LeaderLease:
    """A process's claim to be the one that schedules. ``epoch`` is None while it is not."""

    def __init__(
        self, database: Database, monotonic: Callable[[], float] = time.monotonic, timing: Timing = Timing()
    ) -> None:
        self._timing = timing
        self.epoch: int | None = None
        self._database = database
        self._monotonic = monotonic
        self._renewed_at = float("-inf")
        self._seen: tuple[int, int] | None = None
        self._seen_at = 0.0
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        self._holder = json.dumps(me.to_json())

    def keep(self) -> bool:
        """Renew the lease, or take it where nobody has it; whether this process leads."""
        now = self._monotonic()
        if self.epoch is not None and now - self._renewed_at < self._timing.renew_seconds:
            return True
        with self._database.read() as session:
            row = session.get(SchedulerLeaseRow, ROW)
            if not self._may_write(row, now):
                self.epoch = None
                return False
        return self._write(now)

    def fresh(self) -> bool:
        """Whether nobody can have taken over yet, by this process's own clock."""
        return self.epoch is not None and self._monotonic() - self._renewed_at < self._timing.lease_seconds

    def fence(self, session: Session) -> None:
        """Raise Deposed where another one leads. Nobody takes over before this transaction ends."""
        row = select(SchedulerLeaseRow.epoch).where(SchedulerLeaseRow.id == ROW).with_for_update(read=True)
        if self.epoch is None or session.scalar(row) != self.epoch:
            self.epoch = None
            raise LeadershipLost()

    def give_up(self) -> None:
        """Leave the lease to whoever wants it, at once."""
        if self.epoch is None:
            return
        with self._database.write() as session:
            row = session.get(SchedulerLeaseRow, ROW, with_for_update=True)
            if row is not None and row.epoch == self.epoch:
                row.holder = None
        self.epoch = None

    def _may_write(self, row: SchedulerLeaseRow | None, now: float) -> bool:
        if row is None or row.holder is None or self._is_mine(row) or is_dead(row.holder):
            return True
        if self._seen != (row.epoch, row.beat):
            self._seen, self._seen_at = (row.epoch, row.beat), now
        return now - self._seen_at > self._timing.lease_seconds

    def _is_mine(self, row: SchedulerLeaseRow) -> bool:
        return self.epoch is not None and row.epoch == self.epoch

    def _write(self, now: float) -> bool:
        try:
            with self._database.write() as session:
                row = session.get(SchedulerLeaseRow, ROW, with_for_update=True)
                if row is None:
                    row = SchedulerLeaseRow(id=ROW, epoch=0, beat=0)
                    session.add(row)
                if not self._may_write(row, now):
                    self.epoch = None
                    return False  # somebody was faster between the look and the lock
                row.epoch += not self._is_mine(row)
                row.beat += 1
                row.holder = self._holder
                epoch = row.epoch
        except IntegrityError:
            return False  # two made the row at once: the other one's is there
        if self.epoch != epoch:
            log.info("this service schedules from now on, epoch %s", epoch)
        self.epoch, self._renewed_at = epoch, now
        return True


class LeaderMonitor:
    """Whether the one that schedules goes on counting, as another process sees it, by that process's own clock."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last: tuple[int, int] | None = None
        self._since = monotonic()

    def seconds_since_renewal(self, row: SchedulerLeaseRow | None) -> float:
        """Seconds since it was seen to count on; where nobody leads, since somebody did, or since we began to look."""
        found = (row.epoch, row.beat) if row is not None and row.holder is not None else None
        if found is not None and found != self._last:
            self._last, self._since = found, self._monotonic()
        return self._monotonic() - self._since


@contextlib.contextmanager
def fenced(database: Database, lease: LeaderLease | None) -> Iterator[Session]:
    """A transaction that is refused where another service leads; without a lease nobody else can. Raises Deposed."""
    with database.write() as session:
        if lease is not None:
            lease.fence(session)
        yield session


def is_dead(holder: str) -> bool:
    """Whether the holder ran on this host, in this boot and container, and is gone beyond doubt."""
    try:
        process = ProcessIdentity.from_json(json.loads(holder))
    except (ValueError, KeyError, TypeError):
        return False
    here = (process.boot_id, process.pid_namespace) == (boot_id(), pid_namespace())
    return here and not process.alive()
