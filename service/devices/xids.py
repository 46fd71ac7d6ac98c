"""XID errors of GPUs: reported by the driver, stored, and counted for 24 hours or until they are cleared.

Two sources, both without root: events of NVML, from the moment that the service starts, and the kernel log, which also
has what happened before. The kernel log is readable only if ``kernel.dmesg_restrict`` is 0 or the service has
CAP_SYSLOG; without it the events alone count.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pynvml
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from trainyard.service.db.models import XidErrorRow
from trainyard.service.devices.inventory import Device, same_pci_address

MAX_AGE = timedelta(hours=24)
SAME_ERROR = timedelta(seconds=10)
"""Both sources report an error, the kernel log again at each start of the service."""

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""Errors of the program that ran and not of the GPU, such as a kernel that wrote out of bounds: the list of NVIDIA's
device plugin for Kubernetes."""

KMSG = Path("/dev/kmsg")
KMSG_RECORD = re.compile(r"\d+,\d+,(?P<microseconds>\d+),[^;]*;NVRM: Xid \(PCI:(?P<pci>[0-9a-fA-F:.]+)\): (?P<xid>\d+)")
WAIT_MILLISECONDS = 1000
RETRY_SECONDS = 5.0
"""Between two attempts to reach a driver that did not answer at the start."""

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class XidError:
    """An error of a GPU, named by its UUID."""

    gpu_uuid: str
    xid: int
    at: datetime


class XidWatcher:
    """Collects the errors of this host's GPUs in a thread, until they are stored."""

    def __init__(self, kmsg: Path = KMSG) -> None:
        self._kmsg = kmsg
        self._lock = threading.Lock()
        self._errors: list[XidError] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless this host has no NVML."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                return
        self._thread = threading.Thread(target=self._run, name="xids", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread within about a second."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)

    def pending(self) -> tuple[XidError, ...]:
        """Return the errors that are not stored yet. `forget` removes them."""
        with self._lock:
            return tuple(self._errors)

    def forget(self, stored: Sequence[XidError]) -> None:
        """Remove ``stored``, which `pending` has returned, after they were stored."""
        with self._lock:
            del self._errors[: len(stored)]

    def _run(self) -> None:
        while not _driver_answers():
            if self._stopping.wait(RETRY_SECONDS):
                return
        try:
            gpus = _gpus()
            self._add(kernel_log_errors(self._kmsg, {pci: uuid for pci, uuid, _ in gpus}))
            can_report = self._watch(gpus)
            while can_report and not self._stopping.wait(WAIT_MILLISECONDS / 1000):
                self._watch(_gpus())
        except pynvml.NVMLError as error:
            log.warning("XID errors of GPUs are no longer watched: %s", error)

    def _watch(self, gpus: "list[tuple[str, str, Any]]") -> bool:
        """Collect events until `stop`, or until a GPU is lost: from then on NVML may report nothing else for their set.

        Return whether any of these cards can report events.
        """
        events = pynvml.nvmlEventSetCreate()
        # A card that cannot report them, such as a virtual one, is left out.
        registered = [uuid for _, uuid, handle in gpus if _register(handle, events)]
        try:
            while registered and not self._stopping.is_set():
                event = _next_event(events)
                if event is not None:
                    with contextlib.suppress(pynvml.NVMLError):  # it is of the GPU that is lost
                        uuid = str(pynvml.nvmlDeviceGetUUID(event.device))
                        self._add([XidError(uuid, int(event.eventData), datetime.now(UTC))])
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            # The inventory shows it. The others are watched again, in a set without it.
        finally:
            pynvml.nvmlEventSetFree(events)
        return bool(registered)

    def _add(self, errors: Iterable[XidError]) -> None:
        found = [error for error in errors if error.xid not in APPLICATION_XIDS]
        for error in found:
            log.warning("a GPU has an error", extra={"gpu": error.gpu_uuid, "xid": error.xid})
        with self._lock:
            self._errors += found


def _driver_answers() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def _gpus() -> "list[tuple[str, str, Any]]":
    """Return PCI address, UUID and handle of each GPU for which the driver answers."""
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            bus = pynvml.nvmlDeviceGetPciInfo(handle).busId
            pci = bus.decode() if isinstance(bus, bytes) else str(bus)
            found.append((pci, str(pynvml.nvmlDeviceGetUUID(handle)), handle))
    return found


def _register(handle: Any, events: Any) -> bool:
    try:
        pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
    except pynvml.NVMLError:
        return False
    return True


def _next_event(events: Any) -> Any | None:
    try:
        return pynvml.nvmlEventSetWait_v2(events, WAIT_MILLISECONDS)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_TIMEOUT:
            return None
        raise


def kernel_log_errors(kmsg: Path, uuids: Mapping[str, str]) -> list[XidError]:
    """Return the errors in the kernel log, oldest first; [] if it may not be read. ``uuids``: PCI address -> UUID."""
    started_at = datetime.now(UTC) - timedelta(seconds=time.clock_gettime(time.CLOCK_MONOTONIC))
    found = []
    for record in _kernel_log(kmsg):
        match = KMSG_RECORD.match(record)
        if match is None:
            continue
        uuid = next((uuid for pci, uuid in uuids.items() if same_pci_address(match["pci"], pci)), None)
        if uuid is not None:
            at = started_at + timedelta(microseconds=int(match["microseconds"]))
            found.append(XidError(uuid, int(match["xid"]), at))
    return found


def _kernel_log(kmsg: Path) -> Iterator[str]:
    # Each read of /dev/kmsg returns one record, and fails with EAGAIN after the last one. A file in a test ends.
    with contextlib.suppress(OSError):
        descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while True:
                try:
                    text = os.read(descriptor, 8192)
                except BrokenPipeError:
                    continue  # this record was overwritten meanwhile
                if not text:
                    return
                yield from text.decode(errors="replace").splitlines()
        finally:
            os.close(descriptor)


def store(session: Session, errors: Iterable[XidError]) -> None:
    """Store errors, each once."""
    for error in errors:
        near = (XidErrorRow.at > error.at - SAME_ERROR, XidErrorRow.at < error.at + SAME_ERROR)
        same = (XidErrorRow.gpu_uuid == error.gpu_uuid, XidErrorRow.xid == error.xid)
        if session.scalar(select(XidErrorRow.id).where(*same, *near).limit(1)) is None:
            session.add(XidErrorRow(gpu_uuid=error.gpu_uuid, xid=error.xid, at=error.at, cleared_at=None))
            session.flush()


def uncleared(session: Session, now: datetime) -> dict[str, list[XidError]]:
    """Return the errors that keep a GPU from being leased, by its UUID, oldest first."""
    open_ = (XidErrorRow.cleared_at.is_(None), XidErrorRow.at > now - MAX_AGE)
    found: dict[str, list[XidError]] = {}
    for row in session.scalars(select(XidErrorRow).where(*open_).order_by(XidErrorRow.at, XidErrorRow.id)):
        found.setdefault(row.gpu_uuid, []).append(XidError(row.gpu_uuid, row.xid, row.at))
    return found


def clear(session: Session, gpu_uuid: str, now: datetime) -> int:
    """Clear the errors of a GPU, and return how many there were."""
    rows = update(XidErrorRow).where(XidErrorRow.gpu_uuid == gpu_uuid, XidErrorRow.cleared_at.is_(None))
    return int(session.execute(rows.values(cleared_at=now)).rowcount)  # type: ignore[attr-defined]


def marked(devices: Sequence[Device], errors: Mapping[str, Sequence[XidError]]) -> tuple[Device, ...]:
    """Return the devices, each with its errors. A device whose errors are the same is the same object."""
    # Most devices of most rounds have none: a copy of each would be the largest part of a round of many devices.
    found = {uuid: tuple(error.xid for error in each) for uuid, each in errors.items()}
    return tuple(
        device if device.xid_errors == (now := found.get(device.uuid or "", ())) else replace(device, xid_errors=now)
        for device in devices
    )
