"""Who a process is, and how to end it without ever touching a stranger. Linux, standard library only.

A pid alone is not an identity: it is reused within minutes on a busy host, at once after a reboot or in a container.
Boot id, pid namespace, pid and start time together are one. Signals go through a pidfd opened before the identity is
checked, so that the process cannot be swapped between the look and the signal.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

MARKER = "TRAINYARD_ATTEMPT_MARK"
"""Environment variable that every process of an attempt carries: ``<job>/<attempt number>``."""

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, for as long as the host runs. ``start_ticks`` counts clock ticks since boot."""

    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """The identity of a living process, or None where there is none (a zombie is not living)."""
        stat = _stat(pid)
        if stat is None or stat.state in "ZX":
            return None
        return cls(boot_id(), pid_namespace(), pid, stat.start_ticks)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """The inverse of `to_json`; KeyError or ValueError on anything else."""
        return cls(str(value["boot_id"]), str(value["pid_namespace"]), int(value["pid"]), int(value["start_ticks"]))

    def to_json(self) -> dict[str, Any]:
        """A JSON object for started.json."""
        return asdict(self)

    def variable(self, name: str) -> str | None:
        """An environment variable that the process was started with; None where it has none or is gone."""
        return variable_of(self.pid, name)

    def alive(self) -> bool:
        """Whether this very process lives."""
        return ProcessIdentity.of(self.pid) == self

    def send(self, signum: signal.Signals) -> bool:
        """Signal this very process; False where it is gone. Never signals another one that has its pid."""
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
    # The command name may hold spaces and brackets, so the fields are counted from the last bracket.
    fields = text[text.rindex(")") + 2 :].split()
    return _Stat(state=fields[0], parent=int(fields[1]), start_ticks=int(fields[19]))


def boot_id() -> str:
    """The kernel's random id of this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """The pid namespace of this process, e.g. ``pid:[4026531836]``."""
    return os.readlink(PROC / "self/ns/pid")


def all_pids() -> Iterator[int]:
    """The pids visible here, zombies included."""
    for entry in os.scandir(PROC):
        if entry.name.isdigit():
            yield int(entry.name)


def find_by_marker(mark: str) -> list[ProcessIdentity]:
    """Every living process whose environment carries this attempt's marker, this process excepted."""
    carriers = [pid for pid in all_pids() if pid != os.getpid() and variable_of(pid, MARKER) == mark]
    return [identity for pid in carriers if (identity := ProcessIdentity.of(pid))]


def live_markers(besides: str) -> set[str]:
    """The markers of all living processes that were also given the variable ``besides``, by one look at the host."""
    found = set()
    for pid in all_pids():
        environment = _environment(pid)
        mark = _value(environment, MARKER)
        # A zombie, which does not live, shows no environment.
        if mark is not None and pid != os.getpid() and _value(environment, besides) is not None:
            found.add(mark)
    return found


def variable_of(pid: int, name: str) -> str | None:
    """Return an environment variable that process ``pid`` was started with; None if it has none or is gone."""
    return _value(_environment(pid), name)


def _environment(pid: int) -> list[bytes]:
    try:
        return (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # gone, or not ours to read


def _value(environment: list[bytes], name: str) -> str | None:
    start = name.encode() + b"="
    return next(
        (entry[len(start) :].decode(errors="replace") for entry in environment if entry.startswith(start)), None
    )


def descendants(ancestor: int) -> list[ProcessIdentity]:
    """Every living process below ``ancestor``. With a subreaper as ancestor nothing can escape this."""
    children: dict[int, list[int]] = {}
    for pid in all_pids():
        stat = _stat(pid)
        if stat is not None:
            children.setdefault(stat.parent, []).append(pid)
    found: list[int] = []
    frontier = [ancestor]
    while frontier:
        below = children.get(frontier.pop(), [])
        found.extend(below)
        frontier.extend(below)
    return [identity for pid in found if (identity := ProcessIdentity.of(pid))]


def signal_all(processes: Iterable[ProcessIdentity], *signums: signal.Signals) -> None:
    """Send each signal, in order, to each process that still is the one that was found."""
    for process in processes:
        for signum in signums:
            process.send(signum)


def wait_gone(processes: Iterable[ProcessIdentity], seconds: float) -> list[ProcessIdentity]:
    """Wait at most ``seconds`` until all have ended; those that still live are returned."""
    deadline = time.monotonic() + seconds
    left = [process for process in processes if process.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [process for process in left if process.alive()]
    return left
