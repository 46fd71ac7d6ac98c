"""XID errors of GPUs: reported by the driver, stored, and counted for 24 hours or until they are cleared.

There are two sources, and neither needs root: events of NVML since the start of the service, and the kernel log, which
also has earlier errors. The kernel log is readable only if ``kernel.dmesg_restrict`` is 0 or the service has
CAP_SYSLOG. Otherwise only the events are used.
"""

import contextlib
import ctypes
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pynvml
from sqlalchemy import and_, or_, select, update
from sqlalchemy.orm import Session

from trainyard.service.db.models import XidErrorRow
from trainyard.service.devices.inventory import Device, same_pci_address

MAX_AGE = timedelta(hours=24)
SAME_ERROR = timedelta(seconds=10)
"""Equal errors of a GPU within this time are one: both sources report it, the kernel log at each start again."""

CLOCK_DRIFT = 200e-6
"""How far the clock of the kernel log may be off, per second since boot. It is not disciplined by NTP."""

APPLICATION_XIDS = frozenset({11, 13, 25, 31, 32, 37, 43, 45, 68, 69, 80, 109, 137})
"""Errors of the program that ran and not of the GPU, such as a kernel that wrote out of bounds: those of NVIDIA's
device plugin for Kubernetes, and those for which NVIDIA's catalog recommends to restart or check the program. If the
GPU needs a reset after one of them, the driver reports XID 154 too."""

INFORMATIONAL_XIDS = frozenset({106, 107, 162, 163})
"""Test messages of the management controller, and power smoothing switched on or off."""

RECOVERY_ACTION_CHANGED = 154
"""The driver asks for a reset or a reboot, or no longer asks for it."""

KMSG = Path("/dev/kmsg")
KMSG_RECORD = re.compile(
    r"\d+,\d+,(?P<microseconds>\d+),[^;]*;NVRM: Xid "
    # A GPU in MIG mode adds the instance: "PCI:0000:3b:00 GPU-I:05 GPU-CI:00".
    r"\(PCI:(?P<pci>[0-9a-fA-F:.]+)[^)]*\): (?P<xid>\d+)(?:, GPU recovery action changed from .* to 0x(?P<action>\d+))?"
)
WAIT_MILLISECONDS = 1000
RETRY_SECONDS = 10.0
"""Time between two attempts to watch the events of a driver that fails."""

log = logging.getLogger("trainyard")


@dataclass(frozen=True)
class XidError:
    """An error of a GPU, named by its UUID.

    ``clock_error``: how much ``at`` may be off, if it was computed from the time since boot; else None.
    """

    gpu_uuid: str
    xid: int
    at: datetime
    clock_error: timedelta | None = None


class XidWatcher:
    """Collects the errors of this host's GPUs in a thread, until they are stored."""

    def __init__(self, kmsg: Path = KMSG) -> None:
        self._kernel_log = KernelLog(kmsg)
        self._lock = threading.Lock()
        self._errors: dict[tuple[str, int], XidError] = {}
        self._latest: dict[tuple[str, int], datetime] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._ready = False
        self._logged: str | None = None

    def start(self) -> None:
        """Start the thread. It ends at once on a host without NVML."""
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
            return tuple(self._errors.values())

    def forget(self, stored: Sequence[XidError]) -> None:
        """Remove ``stored``, which `pending` has returned, after they were stored."""
        with self._lock:
            for error in stored:
                if self._errors.get((error.gpu_uuid, error.xid)) == error:
                    del self._errors[error.gpu_uuid, error.xid]

    def _run(self) -> None:
        if not _is_installed():
            return
        with self._kernel_log:
            while True:
                try:
                    seconds = self._watch()
                except pynvml.NVMLError as error:
                    if str(error) != self._logged:
                        log.warning("XID errors of GPUs are not watched: %s", error)
                    self._logged = str(error)
                    seconds = RETRY_SECONDS
                if self._stopping.wait(seconds):
                    return

    def _watch(self) -> float:
        """Collect events until `stop`, or until NVML fails: it may then report nothing else for this set of GPUs.

        Return the seconds until the next attempt.
        """
        if not self._ready:
            pynvml.nvmlInit()
        self._ready = True
        gpus = _gpus()
        self._add(self._kernel_log.errors(gpus))
        events = _event_set(gpus)
        if events is None:
            # None of them can report events, such as virtual ones. Their errors are in the kernel log.
            return RETRY_SECONDS
        try:
            while not self._stopping.is_set():
                event = _next_event(events)
                self._add(_event_errors(event, gpus) if event is not None else [])
                self._add(self._kernel_log.errors(gpus))
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            # The inventory shows the lost GPU. `_run` watches the others in a new set without it.
        finally:
            pynvml.nvmlEventSetFree(events)
        return WAIT_MILLISECONDS / 1000

    def _add(self, errors: Iterable[XidError]) -> None:
        for error in errors:
            key = error.gpu_uuid, error.xid
            # An error may be reported a thousand times in a second.
            is_same = key in self._latest and abs(error.at - self._latest[key]) < SAME_ERROR
            if is_same or error.xid in APPLICATION_XIDS | INFORMATIONAL_XIDS:
                continue
            self._latest[key] = error.at
            with self._lock:
                self._errors[key] = error
            log.warning("a GPU has an error", extra={"gpu": error.gpu_uuid, "xid": error.xid})


def _is_installed() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return bool(error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    return True


@dataclass(frozen=True)
class Gpu:
    """A GPU for which the driver answers."""

    pci: str
    uuid: str
    handle: Any


def _gpus() -> list[Gpu]:
    """Return each GPU for which the driver answers."""
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            bus = pynvml.nvmlDeviceGetPciInfo(handle).busId
            pci = bus.decode() if isinstance(bus, bytes) else str(bus)
            found.append(Gpu(pci, str(pynvml.nvmlDeviceGetUUID(handle)), handle))
    return found


def _event_set(gpus: Sequence[Gpu]) -> Any | None:
    """Return a set of the events of all GPUs that can report them, None if no GPU can."""
    failing: set[str] = set()
    while registrable := [gpu for gpu in gpus if gpu.uuid not in failing]:
        events = pynvml.nvmlEventSetCreate()
        count = 0
        for gpu in registrable:
            try:
                pynvml.nvmlDeviceRegisterEvents(gpu.handle, pynvml.nvmlEventTypeXidCriticalError, events)
                count += 1
            except pynvml.NVMLError as error:
                if error.value == pynvml.NVML_ERROR_UNKNOWN:
                    failing.add(gpu.uuid)
                    break  # the set is undefined now
        else:
            if count > 0:
                return events
            pynvml.nvmlEventSetFree(events)
            return None
        pynvml.nvmlEventSetFree(events)
    return None


def _next_event(events: Any) -> Any | None:
    try:
        return pynvml.nvmlEventSetWait_v2(events, WAIT_MILLISECONDS)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_TIMEOUT:
            return None
        raise


def _event_errors(event: Any, gpus: Sequence[Gpu]) -> list[XidError]:
    xid = int(event.eventData)
    if xid == RECOVERY_ACTION_CHANGED and _needs_no_recovery(event.device):
        return []
    try:
        uuid = str(pynvml.nvmlDeviceGetUUID(event.device))
    except pynvml.NVMLError:  # the GPU has fallen off the bus, and this is the event that reports it
        uuids = [gpu.uuid for gpu in gpus if _address(gpu.handle) == _address(event.device)]
        if not uuids:
            return []
        [uuid] = uuids
    return [XidError(uuid, xid, datetime.now(UTC))]


def _needs_no_recovery(handle: Any) -> bool:
    try:
        [field] = pynvml.nvmlDeviceGetFieldValues(handle, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    except pynvml.NVMLError:
        return False
    is_known = field.nvmlReturn == pynvml.NVML_SUCCESS
    return bool(is_known and field.value.uiVal == pynvml.NVML_GPU_RECOVERY_ACTION_NONE)


def _address(handle: Any) -> int | None:
    """Return what a handle points to. Two ctypes pointers to the same object are not equal."""
    return ctypes.cast(handle, ctypes.c_void_p).value


class KernelLog:
    """The errors in the kernel log. Without the right to read it, there are none."""

    def __init__(self, kmsg: Path = KMSG) -> None:
        self._kmsg = kmsg
        self._descriptor: int | None = None
        self._is_live = False

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self._kmsg, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            log.info("XID errors from before the start of the service are not known: %s", error)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def errors(self, gpus: Sequence[Gpu]) -> list[XidError]:
        """Return the errors since the last call, oldest first. At the first call: those since boot."""
        found, now = [], datetime.now(UTC)
        started_at = now - timedelta(seconds=time.clock_gettime(time.CLOCK_MONOTONIC))
        for record in self._records():
            match = KMSG_RECORD.match(record)
            if match is None or match["action"] == "0":  # a reset is no longer needed
                continue
            uuid = next((gpu.uuid for gpu in gpus if same_pci_address(match["pci"], gpu.pci)), None)
            if uuid is not None:
                age = timedelta(microseconds=int(match["microseconds"]))
                at, clock_error = (now, None) if self._is_live else (started_at + age, age * CLOCK_DRIFT)
                found.append(XidError(uuid, int(match["xid"]), at, clock_error))
        self._is_live = True
        return found

    def _records(self) -> Iterator[str]:
        # Each read of /dev/kmsg returns one record, and fails with EAGAIN after the last one. A file in a test ends.
        while self._descriptor is not None:
            try:
                text = os.read(self._descriptor, 8192)
            except BrokenPipeError:
                continue  # this record was overwritten meanwhile
            except OSError:
                return
            if not text:
                return
            yield from text.decode(errors="replace").splitlines()


def store(session: Session, errors: Iterable[XidError]) -> None:
    """Store errors, each once. An uncleared error of the same number is one error, whose time is the latest."""
    for error in errors:
        same = (XidErrorRow.gpu_uuid == error.gpu_uuid, XidErrorRow.xid == error.xid)
        near = max(SAME_ERROR, error.clock_error or SAME_ERROR)
        is_near = and_(XidErrorRow.at > error.at - near, XidErrorRow.at < error.at + near)
        is_known = is_near if error.clock_error is None else or_(is_near, XidErrorRow.cleared_at > error.at)
        if session.scalar(select(XidErrorRow.id).where(*same, is_known).limit(1)) is not None:
            continue
        row = session.scalar(select(XidErrorRow).where(*same, XidErrorRow.cleared_at.is_(None)).limit(1))
        if row is None:
            session.add(XidErrorRow(gpu_uuid=error.gpu_uuid, xid=error.xid, at=error.at, cleared_at=None))
        else:
            row.at = max(row.at, error.at)
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


def with_xid_errors(devices: Sequence[Device], errors: Mapping[str, Sequence[XidError]]) -> tuple[Device, ...]:
    """Return the devices, each with its errors. A device whose errors have not changed is not copied."""
    # Most devices have none. With many devices, copies of all would take most of the time of a scheduler round.
    found = {uuid: tuple(error.xid for error in each) for uuid, each in errors.items()}
    return tuple(
        device if device.xid_errors == (now := found.get(device.uuid or "", ())) else replace(device, xid_errors=now)
        for device in devices
    )
