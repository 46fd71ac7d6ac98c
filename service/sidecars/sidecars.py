"""The side processes of this service: start, device, end. See `contract.sidecar` for their messages.

A side process computes with torch for a request of a user: it generates text, or evaluates a checkpoint. It runs on the
CPU with low priority, or on a GPU that no job needs. The scheduler takes the GPU back when a job waits for one.

No side process outlives its service. It exits when its connection ends, whatever has happened to the service; the next
service of this user also kills those that are stopped (SIGSTOP) and do not see that.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from trainyard.contract.processes import (
    ProcessIdentity,
    all_pids,
    boot_id,
    find_by_variable,
    pid_namespace,
    signal_all,
    variable_of,
    wait_gone,
)
from trainyard.contract.sidecar import DESCRIPTOR, SIDECAR
from trainyard.contract.status import JobStatus
from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.db.models import DeviceLeaseRow, JobRow
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Inventory, cuda_visible
from trainyard.service.launch.environment import IMPORT_ROOT, inherited, roots_environment

CPU = "cpu"
KILL_SECONDS = 5.0
MAX_REASON = 500

log = logging.getLogger("trainyard")


class Sidecar:
    """One side process. The caller of `start` calls `close` at the end.

    ``connection``: the service's end of the socket pair. ``device``: "cpu", or e.g. "cuda:1".
    """

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", connection: socket.socket, device: str) -> None:
        self.name = name
        self.connection = connection
        self.device = device
        self.reclaimed = False
        """Whether it was ended because a job needs its device."""
        self.ended = threading.Event()
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """End the process at once. Thread-safe; does nothing if it has ended."""
        # Not by process group: after `wait` its number may belong to others. It starts no processes of its own.
        self._process.kill()

    def close(self) -> None:
        """End the process, and close the connection. For the thread that reads the connection."""
        self.kill()
        self.connection.close()


class Sidecars:
    """Starts side processes, and ends them.

    ``threads``: CPU threads of each. ``roots``: the directories below which they may read and write.
    """

    def __init__(
        self,
        database: Database,
        inventory: Inventory,
        threads: int,
        data_roots: Sequence[Path] = (),
        save_roots: Sequence[Path] = (),
        schedules: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._inventory = inventory
        self._threads = threads
        self._roots = roots_environment(data_roots, save_roots)
        self._schedules = schedules
        self._live: set[Sidecar] = set()
        self._starting = 0  # processes that are not in `_live` yet, but may have leased a device
        self._lock = threading.Lock()
        self._closing = False

    def start(self, name: str, command: Sequence[str], use_gpu: bool = False) -> Sidecar:
        """Start a side process, on a free GPU if ``use_gpu`` and there is one, else on the CPU. Raises OSError.

        ``command``: the arguments of `python`, such as ``-m trainyard.worker.generation``.
        """
        with self._lock:
            self._starting += 1
        try:
            device = (self._lease_gpu() if use_gpu else None) or CPU
            try:
                return self._spawn(name, command, device)
            except BaseException:
                self._release(device, own_identity())
                raise
        finally:
            with self._lock:
                self._starting -= 1

    def _spawn(self, name: str, command: Sequence[str], device: str) -> Sidecar:
        ours, theirs = socket.socketpair()
        # A file and not a pipe: a pipe that is not read would block the process.
        output = tempfile.TemporaryFile()  # noqa: SIM115 - `_reap` closes it
        try:
            with theirs, self._lock:
                if self._closing:
                    raise OSError("the service is stopping")
                process = subprocess.Popen(
                    # -P: a folder `trainyard/` in the service's working directory must not be imported.
                    [sys.executable, "-P", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._environment(device, theirs.fileno()),
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C in the service's terminal is for the service, which then ends its side processes.
                    start_new_session=True,
                )
                sidecar = Sidecar(name, process, ours, device)
                self._live.add(sidecar)
        except BaseException:
            ours.close()
            output.close()
            raise
        log.info("a side process was started", extra={"sidecar": name, "pid": sidecar.pid, "devices": device})
        threading.Thread(target=self._reap, args=(sidecar, process, output), name="sidecar-reaper", daemon=True).start()
        return sidecar

    def _environment(self, device: str, descriptor: int) -> dict[str, str]:
        threads = str(self._threads)
        return {
            **inherited(dict(os.environ)),
            **self._roots,
            "PYTHONPATH": IMPORT_ROOT,
            # The leased devices have the numbers of NVML, which uses the PCI order.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": cuda_visible([device], self._inventory.devices()) if device != CPU else "",
            "OMP_NUM_THREADS": threads,
            "TRAINYARD_THREADS": threads,
            "RAYON_NUM_THREADS": threads,
            SIDECAR: own_identity(),
            DESCRIPTOR: str(descriptor),
        }

    def _reap(self, sidecar: Sidecar, process: "subprocess.Popen[bytes]", output: IO[bytes]) -> None:
        with output:
            status = process.wait()
            fields = {"sidecar": sidecar.name, "pid": sidecar.pid, "status": status}
            log.info("a side process ended%s", _last_line(output), extra=fields)
        with self._lock:
            self._live.discard(sidecar)
        # Only now: the process may have had memory of the device until its end.
        self._release(sidecar.device, own_identity())
        sidecar.ended.set()

    def reclaim(self, device: str) -> None:
        """End the side process that has ``device``, which a job needs. Return when the device is free."""
        with self._lock:
            holder = next((sidecar for sidecar in self._live if sidecar.device == device), None)
            is_starting = self._starting > 0
        if holder is not None:
            holder.reclaimed = True
            holder.kill()
            holder.ended.wait(KILL_SECONDS)
            return
        with self._database.read() as session:
            row = session.get(DeviceLeaseRow, device)
            owner = row.sidecar if row is not None else None
        if owner is None or (owner == own_identity() and is_starting):
            return  # The process may be starting. The scheduler's next round ends it.
        if owner != own_identity():
            # The lease of another service, which may be dead, or no longer the leader.
            _kill_all(find_by_variable(SIDECAR, owner))
        self._release(device, owner)

    def end_orphans(self) -> None:
        """End the side processes of services that have ended, and release their devices. Call it once, at the start."""
        owners = {owner for pid in all_pids() if (owner := variable_of(pid, SIDECAR)) is not None}
        for owner in owners:
            if _has_ended(owner):
                _kill_all(find_by_variable(SIDECAR, owner))
        with self._database.write() as session:
            held = select(DeviceLeaseRow).where(DeviceLeaseRow.sidecar.is_not(None))
            for row in session.scalars(held).all():
                if _has_ended(row.sidecar or "", elsewhere=True):
                    session.delete(row)

    def close(self) -> None:
        """End all side processes, and start no more."""
        with self._lock:
            self._closing = True
            live = list(self._live)
        for sidecar in live:
            sidecar.kill()
        for sidecar in live:
            sidecar.ended.wait(KILL_SECONDS)

    def _lease_gpu(self) -> str | None:
        """Lease a free GPU, or return None if there is none or a job waits for one."""
        if not self._schedules():
            # The devices of the database's leases are those of the host whose service schedules.
            return None
        gpus = [device for device in self._inventory.devices() if device.kind == "cuda" and not device.processes]
        if not gpus:
            return None
        with contextlib.suppress(IntegrityError), self._database.write() as session:
            leased = set(session.scalars(select(DeviceLeaseRow.device)))
            waits = session.scalar(select(JobRow.id).where(JobRow.status == JobStatus.QUEUED).limit(1))
            usable = [
                device for device in xids.with_xid_errors(gpus, xids.uncleared(session, utc_now())) if device.works
            ]
            free = next((device.id for device in usable if device.id not in leased), None)
            if waits is None and free is not None:
                session.add(DeviceLeaseRow(device=free, sidecar=own_identity()))
                return free
        return None

    def _release(self, device: str, owner: str) -> None:
        """Delete the lease if ``owner`` still has it: another service may have leased the device since."""
        if device == CPU:
            return
        try:
            with self._database.write() as session:
                held = (DeviceLeaseRow.device == device, DeviceLeaseRow.sidecar == owner)
                session.execute(delete(DeviceLeaseRow).where(*held))
        except Exception:
            # The scheduler takes the device back when a job needs it.
            log.exception("the lease of a side process could not be released")


def own_identity() -> str:
    """Return the identity of this process as JSON."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    return json.dumps(identity.to_json())


def _has_ended(owner: str, elsewhere: bool = False) -> bool:
    """Return whether the service with this identity has ended. ``elsewhere``: what to assume of another namespace."""
    try:
        identity = ProcessIdentity.from_json(json.loads(owner))
    except (ValueError, KeyError, TypeError):
        return True
    if identity.boot_id == boot_id() and identity.pid_namespace != pid_namespace():
        # Of a container, or of the host of this container: its process numbers mean nothing here.
        return elsewhere
    return not identity.alive()


def _kill_all(processes: Sequence[ProcessIdentity]) -> None:
    signal_all(processes, signal.SIGCONT, signal.SIGKILL)
    wait_gone(processes, KILL_SECONDS)


def _last_line(output: IO[bytes]) -> str:
    """Return the end of the output as ": text", or "" if there is none."""
    output.seek(max(0, output.seek(0, os.SEEK_END) - 4 * MAX_REASON))
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:MAX_REASON]}" if lines else ""
