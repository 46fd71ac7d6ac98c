"""Leader election of the services that share a database: one row with an epoch that only grows, and no wall clock.

The leader increments ``beat``. A service that sees it unchanged for LEASE_SECONDS of its own monotonic clock takes over
by raising the epoch. On the leader's own host it asks the kernel instead, so that a restart need not wait. A leader
that was suspended and resumes finds another epoch, and `LeaderLease.fence` rejects each of its writes.
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
    """Another service leads: the transaction was not written."""


class LeaderLease:
    """A process's claim to leadership. ``epoch`` is None while it does not lead."""

    def __init__(
        self, database: Database, monotonic: Callable[[], float] = time.monotonic, timing: Timing = Timing()
    ) -> None:
        self._timing = timing
        self.epoch: int | None = None
        self._database = database
        self._monotonic = monotonic
        self._renewed_at = float("-inf")
        self._last_renewal: tuple[int, int] | None = None
        self._last_renewal_at = 0.0
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        self._holder = json.dumps(me.to_json())

    def renew(self) -> bool:
        """Renew the lease, or acquire it if it is free. Return whether this process leads."""
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
        """Whether no other service can have taken over yet, by this process's own clock."""
        return self.epoch is not None and self._monotonic() - self._renewed_at < self._timing.lease_seconds

    def confirm(self) -> bool:
        """Return whether this process still leads, also after a step that took longer than its lease.

        If no other service has taken over, the lease is renewed: else a step that is slow each time, as on a busy host,
        would never be completed.
        """
        if self.fresh():
            return True
        epoch, now = self.epoch, self._monotonic()
        with self._database.read() as session:
            if epoch is None or not self._is_mine(session.get(SchedulerLeaseRow, ROW)):
                return False
        return self._write(now) and self.epoch == epoch and self.fresh()

    def fence(self, session: Session) -> None:
        """Raise LeadershipLost if another service leads. No takeover is possible before this transaction ends."""
        row = select(SchedulerLeaseRow.epoch).where(SchedulerLeaseRow.id == ROW).with_for_update(read=True)
        if self.epoch is None or session.scalar(row) != self.epoch:
            self.epoch = None
            raise LeadershipLost()

    def release(self) -> None:
        """Release the lease at once, for any other service."""
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
        if self._last_renewal != (row.epoch, row.beat):
            self._last_renewal, self._last_renewal_at = (row.epoch, row.beat), now
        return now - self._last_renewal_at > self._timing.lease_seconds

    def _is_mine(self, row: SchedulerLeaseRow | None) -> bool:
        return row is not None and self.epoch is not None and row.epoch == self.epoch

    def _write(self, now: float) -> bool:
        try:
            with self._database.write() as session:
                row = session.get(SchedulerLeaseRow, ROW, with_for_update=True)
                if row is None:
                    row = SchedulerLeaseRow(id=ROW, epoch=0, beat=0)
                    session.add(row)
                if not self._may_write(row, now):
                    self.epoch = None
                    return False  # another service has taken the lease since the read
                row.epoch += not self._is_mine(row)
                row.beat += 1
                row.holder = self._holder
                epoch = row.epoch
                # No other service sees this renewal before the commit. The wait for the lock is no part of the lease.
                now = self._monotonic()
        except IntegrityError:
            return False  # another service has inserted the row at the same time
        if self.epoch != epoch:
            log.info("scheduler started (leader epoch %s)", epoch)
        self.epoch, self._renewed_at = epoch, now
        return True


class LeaderMonitor:
    """Measures how long the leader has not renewed its lease, by this process's own clock."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._renewal: tuple[int, int] | None = None
        self._renewal_at = monotonic()

    def seconds_since_renewal(self, row: SchedulerLeaseRow | None) -> float:
        """Return the seconds since the last renewal was seen, or since the monitor was created if none was."""
        renewal = (row.epoch, row.beat) if row is not None and row.holder is not None else None
        if renewal is not None and renewal != self._renewal:
            self._renewal, self._renewal_at = renewal, self._monotonic()
        return self._monotonic() - self._renewal_at


@contextlib.contextmanager
def fenced(database: Database, lease: LeaderLease | None) -> Iterator[Session]:
    """Open a transaction that raises LeadershipLost if another service leads. No lease means no other service."""
    with database.write() as session:
        if lease is not None:
            lease.fence(session)
        yield session


def is_dead(holder: str) -> bool:
    """Whether the holder ran on this host, in this boot and container, and has certainly ended."""
    try:
        process = ProcessIdentity.from_json(json.loads(holder))
    except (ValueError, KeyError, TypeError):
        return False
    here = (process.boot_id, process.pid_namespace) == (boot_id(), pid_namespace())
    return here and not process.alive()
