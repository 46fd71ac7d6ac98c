"""Identity of processes, and signals that never reach another process. Linux, standard library only.

A pid alone does not identify a process: it is reused within minutes on a busy host, and at once after a reboot or in a
container. Boot id, pid namespace, pid and start time together do. Signals go through a pidfd that is opened before the
identity is checked, so the pid cannot be reused between the check and the signal.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

MARKER = "TRAINYARD_ATTEMPT_MARK"
"""Environment variable of every process of an attempt: ``<job>/<attempt number>``."""

LEASED_DEVICES = "TRAINYARD_LEASED_DEVICES"
"""Environment variable of an attempt on this host: ids of its devices by rank, such as ``cuda:2,cuda:3``."""

PROC = Path("/proc")

HOST_PID_NAMESPACE = "pid:[4026531836]"
"""The first pid namespace of a kernel has this number on every host."""


@dataclass(frozen=True)
class ProcessIdentity:
    """Identity of one process. ``start_ticks``: its start, in clock ticks since boot."""

    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Return the identity of process ``pid``, or None if it does not run. A zombie does not run."""
        stat = _stat(pid)
        if stat is None or stat.state in "ZX":
            return None
        return cls(boot_id(), pid_namespace(), pid, stat.start_ticks)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the identity that `to_json` has written. Raises KeyError, TypeError or ValueError."""
        return cls(str(value["boot_id"]), str(value["pid_namespace"]), int(value["pid"]), int(value["start_ticks"]))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object for started.json."""
        return asdict(self)

    def variable(self, name: str) -> str | None:
        """Return an environment variable that the process was started with, or None; see `variable_of`."""
        return variable_of(self.pid, name)

    def alive(self) -> bool:
        """Return whether this process still runs."""
        return ProcessIdentity.of(self.pid) == self

    def catches(self, signum: signal.Signals) -> bool:
        """Return whether this process has a handler for the signal."""
        try:
            status = (PROC / str(self.pid) / "status").read_text(errors="replace")
        except OSError:
            return False
        caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
        return self.alive() and bool(int(caught, 16) >> (signum - 1) & 1)

    def send(self, signum: signal.Signals) -> bool:
        """Send a signal. Return False if the process has ended; another one with its pid never gets the signal."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(handle, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


@dataclass(frozen=True)
class _Stat:
    state: str
    parent: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name may contain spaces and brackets, so the fields are counted from the last bracket.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


def boot_id() -> str:
    """Return the kernel's random id of this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """Return the pid namespace of this process, e.g. ``pid:[4026531836]``."""
    return os.readlink(PROC / "self/ns/pid")


def in_container() -> bool:
    """Return whether this process runs in a container, whose end also ends all runs.

    A container with a pid namespace of the host is not recognised. One that systemd has booted is like a host.
    """
    return pid_namespace() != HOST_PID_NAMESPACE and not Path("/run/systemd/system").exists()


def all_pids() -> Iterator[int]:
    """Yield all visible pids, including zombies."""
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            yield int(entry.name)


def find_by_marker(mark: str) -> list[ProcessIdentity]:
    """Return all processes, except this one, whose environment has this attempt's marker."""
    return find_by_variable(MARKER, mark)


def find_by_variable(name: str, value: str) -> list[ProcessIdentity]:
    """Return all processes, except this one, that were started with this environment variable."""
    pids = [pid for pid in all_pids() if pid != os.getpid() and variable_of(pid, name) == value]
    return [identity for pid in pids if (identity := ProcessIdentity.of(pid))]


def live_markers(with_variable: str) -> set[str]:
    """Return the markers of all running processes whose environment also has ``with_variable``."""
    markers = set()
    for pid in all_pids():
        environment = _environment(pid)
        mark = _value(environment, MARKER)
        # A zombie has no environment.
        if mark is not None and pid != os.getpid() and _value(environment, with_variable) is not None:
            markers.add(mark)
    return markers


def variable_of(pid: int, name: str) -> str | None:
    """Return an environment variable that process ``pid`` was started with; None if it has none or is gone."""
    return _value(_environment(pid), name)


def _environment(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # ended, or no permission


def _value(environment: list[bytes], name: str) -> str | None:
    start = name.encode() + b"="
    return next(
        (entry[len(start) :].decode(errors="replace") for entry in environment if entry.startswith(start)), None
    )


def descendants(ancestor: int) -> list[ProcessIdentity]:
    """Return all running processes below ``ancestor``. If it is a subreaper, no descendant can escape."""
    by_parent = _pids_by_parent()
    found: list[int] = []
    frontier = [ancestor]
    while frontier:
        below = by_parent.get(frontier.pop(), [])
        found.extend(below)
        frontier.extend(below)
    return [identity for pid in found if (identity := ProcessIdentity.of(pid))]


def children(parent: int) -> list[ProcessIdentity]:
    """Return the running processes that ``parent`` itself has started."""
    return [identity for pid in _pids_by_parent().get(parent, []) if (identity := ProcessIdentity.of(pid))]


def _pids_by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for pid in all_pids():
        stat = _stat(pid)
        if stat is not None:
            found.setdefault(stat.parent, []).append(pid)
    return found


def signal_all(processes: Iterable[ProcessIdentity], *signums: signal.Signals) -> None:
    """Send the signals, in order, to each process that still runs."""
    for process in processes:
        for signum in signums:
            process.send(signum)


def wait_gone(processes: Iterable[ProcessIdentity], seconds: float) -> list[ProcessIdentity]:
    """Wait at most ``seconds`` until all have ended. Return those that still run."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if process.alive()]
    return left
