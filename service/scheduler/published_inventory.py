"""The scheduling service's devices, published for the other services on the same database.

Those may run on hosts without the devices. With their own inventory they would reject specs that fit, and report that a
job waits for devices that are free.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any, Self

from sqlalchemy.orm import Session

from trainyard.service.db.engine import Database
from trainyard.service.db.models import SchedulerLeaseRow
from trainyard.service.devices.inventory import CACHE_SECONDS, Device, Inventory
from trainyard.service.leadership import ROW

# Shortest time between two writes if only memory use or temperature have changed, which they always do.
MEMORY_SECONDS = 10.0

VOLATILE = ("memory_used_bytes", "temperature_celsius")
_SETTLED_FIELDS = attrgetter(*(field.name for field in fields(Device) if field.name not in VOLATILE))


@dataclass(frozen=True)
class InventorySnapshot:
    """The devices, and whether jobs of lower priority are preempted."""

    devices: tuple[Device, ...]
    preempts: bool

    def write(self, session: Session) -> None:
        """Write the snapshot to the leader's row, if there is one."""
        row = session.get(SchedulerLeaseRow, ROW)
        if row is not None:
            row.offer = {"preempts": self.preempts, "devices": [asdict(device) for device in self.devices]}

    @classmethod
    def of(cls, row: SchedulerLeaseRow | None) -> Self | None:
        """Return the last published inventory, or None if there is none or its format is unknown."""
        if row is None or row.offer is None:
            return None
        try:
            return cls(tuple(_device(published) for published in row.offer["devices"]), bool(row.offer["preempts"]))
        except (KeyError, TypeError):
            return None

    @property
    def settled(self) -> tuple[bool, tuple[Any, ...]]:
        """Everything except memory use and temperature, which change constantly."""
        return self.preempts, tuple(map(_SETTLED_FIELDS, self.devices))


def _device(published: dict[str, Any]) -> Device:
    lists = {name: tuple(published[name]) for name in ("processes", "strangers")}
    # A service of 0.1 publishes without these.
    lists |= {name: tuple(published.get(name, ())) for name in ("nvlink_peers", "xid_errors")}
    return Device(**{**published, **lists})


class PublishTracker:
    """Decides when the inventory is published again."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last: InventorySnapshot | None = None
        self._published_at = 0.0

    def differs(self, inventory: InventorySnapshot) -> bool:
        """Whether ``inventory`` is worth a commit."""
        if inventory == self._last:
            return False
        if self._last is None or inventory.settled != self._last.settled:
            return True
        return self._monotonic() - self._published_at > MEMORY_SECONDS

    def mark_published(self, inventory: InventorySnapshot) -> None:
        self._last, self._published_at = inventory, self._monotonic()

    def forget(self) -> None:
        """Publish at the next chance: another leader may have overwritten the row."""
        self._last = None


class PublishedInventory:
    """The scheduling service's devices; this host's ``own`` until it has published any. Read once a second."""

    def __init__(self, database: Database, own: Inventory, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._own = own
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._read: InventorySnapshot | None = None
        self._read_at = float("-inf")

    def devices(self) -> Sequence[Device]:
        """Return every device that may be leased."""
        with self._lock:
            if self._monotonic() - self._read_at > CACHE_SECONDS:
                with self._database.read() as session:
                    self._read = InventorySnapshot.of(session.get(SchedulerLeaseRow, ROW))
                self._read_at = self._monotonic()
            published = self._read
        return published.devices if published is not None else self._own.devices()
