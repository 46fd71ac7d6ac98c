"""What the service that schedules leases out, told to those on the same database that only answer.

They may run on hosts without its devices: by their own they would refuse specs that fit, and say that a job waits for
devices which are free.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from sqlalchemy.orm import Session

from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.devices.inventory import CACHE_SECONDS, Device, Inventory
from trainyard.service.leadership import ROW

MEMORY_SECONDS = 10.0
"""The memory that is in use changes all the time: it is told no more often than this."""


@dataclass(frozen=True)
class InventorySnapshot:
    """The devices, and whether jobs of lower priority make room."""

    devices: tuple[Device, ...]
    preempts: bool

    def write(self, session: Session) -> None:
        """Put it where the others look; where nobody leads there is nothing to say."""
        row = session.get(SchedulerLeaseRow, ROW)
        if row is not None:
            row.offer = {"preempts": self.preempts, "devices": [asdict(device) for device in self.devices]}

    @classmethod
    def of(cls, row: SchedulerLeaseRow | None) -> Self | None:
        """What was said last, or None where nothing was, or by a release that speaks otherwise."""
        if row is None or row.offer is None:
            return None
        try:
            return cls(tuple(_device(said) for said in row.offer["devices"]), bool(row.offer["preempts"]))
        except (KeyError, TypeError):
            return None

    def without_volatile(self) -> Self:
        """It without what changes all the time."""
        still = (replace(device, memory_used_bytes=None, temperature_celsius=None) for device in self.devices)
        return replace(self, devices=tuple(still))


def _device(said: dict[str, Any]) -> Device:
    lists = {name: tuple(said[name]) for name in ("processes", "strangers")}
    return Device(**{**said, **lists})


class PublishTracker:
    """Whether there is something new to tell."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last: InventorySnapshot | None = None
        self._at = 0.0

    def differs(self, bulletin: InventorySnapshot) -> bool:
        """Whether ``bulletin`` is worth a commit."""
        if self._last is None or bulletin.without_volatile() != self._last.without_volatile():
            return True
        return bulletin != self._last and self._monotonic() - self._at > MEMORY_SECONDS

    def mark_published(self, bulletin: InventorySnapshot) -> None:
        """It is out."""
        self._last, self._at = bulletin, self._monotonic()

    def forget(self) -> None:
        """Another one may have spoken since."""
        self._last = None


class PublishedInventory:
    """The devices of the service that schedules; this host's ``own`` until one has spoken. Read once a second."""

    def __init__(self, database: Database, own: Inventory, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._own = own
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._read: InventorySnapshot | None = None
        self._read_at = float("-inf")

    def devices(self) -> Sequence[Device]:
        """Every device that may be leased."""
        with self._lock:
            if self._monotonic() - self._read_at > CACHE_SECONDS:
                with self._database.read() as session:
                    self._read = InventorySnapshot.of(session.get(SchedulerLeaseRow, ROW))
                self._read_at = self._monotonic()
            found = self._read
        return found.devices if found is not None else self._own.devices()
