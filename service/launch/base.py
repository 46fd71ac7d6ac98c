"""The launcher interface: start an attempt, find it again, end it, and read what it left."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from trainyard.contract.messages import ExitReport, RunSettings
from trainyard.contract.prepared import PrepareTask
from trainyard.contract.spec import JobSpec

LOCAL = "local"  # the launcher of this host, the only one whose devices the service itself leases


@dataclass(frozen=True)
class AttemptRef:
    """Permanent name of an attempt, valid across restarts of the service. ``launcher`` is the one that runs it.

    ``job_id`` is the id of a corpus if the attempt prepares it.
    """

    job_id: str
    number: int
    launcher: str = field(default=LOCAL, compare=False)

    def __str__(self) -> str:
        return f"{self.job_id}/{self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """The attempt's fields in log lines."""
        return {"job_id": self.job_id, "attempt": self.number}


@dataclass(frozen=True)
class Launch:
    """Everything needed to start an attempt.

    ``devices`` are lease ids such as ``cuda:0`` or ``cpu:3``, and () on a cluster. ``resume_step`` is the checkpoint to
    resume from, or None for the newest valid one. ``task``: the attempt prepares a corpus and trains nothing.
    ``cuda_visible``: CUDA_VISIBLE_DEVICES for these devices, see `devices.inventory.cuda_visible`.
    """

    name: AttemptRef
    attempt_id: str
    spec: JobSpec
    devices: tuple[str, ...]
    token: str
    resume_step: int | None = None
    task: PrepareTask | None = None
    cuda_visible: str = ""


class AttemptState(StrEnum):
    """State of an attempt as its launcher finds it."""

    ABSENT = "absent"  # never started: there is no trace of an agent
    ALIVE = "alive"  # its agent is alive and reports
    ORPHANED = "orphaned"  # its agent has ended, and other processes of it are alive
    ENDED = "ended"  # no process of it is alive
    UNKNOWN = "unknown"  # The cluster does not answer. Nothing may be concluded from that.


@dataclass(frozen=True)
class AttemptPlacement:
    """Where a cluster runs an attempt, as the cluster reports it.

    ``engine_id`` is the cluster's job number. ``waiting_for`` is None once it runs. ``devices`` are such as
    ``node1/cuda:0``, or ``node1/cpu:0`` if it has no GPUs there. ``tailed``: its agent cannot reach the service, which
    reads the run directory instead.
    """

    engine_id: str
    state: str
    waiting_for: str | None = None
    nodes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    tailed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object for the attempt's row."""
        return {**asdict(self), "nodes": list(self.nodes), "devices": list(self.devices)}


@dataclass(frozen=True)
class AttemptStatus:
    """State of an attempt.

    ``report`` is set if, and only if, the state is ENDED; without a report from the agent it states only what is known.
    ``placement`` is set by clusters for an attempt that is ALIVE. ``silence`` is why the state is UNKNOWN.
    """

    state: AttemptState
    report: ExitReport | None = None
    placement: AttemptPlacement | None = None
    silence: str | None = None


class LaunchRefused(Exception):
    """The attempt could not be started, and no process of it is alive. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class LauncherUnavailable(Exception):
    """The launcher does not answer. The request may have been carried out or not; `find` shows which."""


class Launcher(Protocol):
    """One way to run attempts. Every method is bounded in time and can be called again safely."""

    def start(self, launch: Launch) -> None:
        """Start the attempt and return once its agent is starting. Raises LaunchRefused or LauncherUnavailable."""

    def find(self, name: AttemptRef) -> AttemptStatus:
        """Return the attempt's state from the host or the cluster, not from memory."""

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """Return the attempts that are certainly alive, from one scan of the host. Absence proves nothing."""

    def stop(self, name: AttemptRef) -> None:
        """Request save-and-stop directly, without waiting for the next heartbeat. Raises LauncherUnavailable."""

    def save(self, name: AttemptRef) -> None:
        """Request a checkpoint at the next step. The request is lost if no rank is running."""

    def kill(self, name: AttemptRef) -> None:
        """Kill every process of an attempt whose agent does not answer, and return when none is left.

        None starts afterwards either, even if a `start` of this attempt is still running in another service.
        """

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        """Write the settings file, for ranks whose agent cannot be reached. Raises OSError."""

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Return up to ``limit`` outbox lines after ``after_seq``, oldest first."""


class LauncherRouter:
    """Routes by ``AttemptRef.launcher``."""

    def __init__(self, launchers: Mapping[str, Launcher]) -> None:
        self._launchers = launchers

    def start(self, launch: Launch) -> None:
        """Start the attempt. Raises LaunchRefused also if the service has no such launcher."""
        launcher = self._launchers.get(launch.name.launcher)
        if launcher is None:
            raise LaunchRefused(f"this service has no launcher called {launch.name.launcher}")
        launcher.start(launch)

    def find(self, name: AttemptRef) -> AttemptStatus:
        launcher = self._launchers.get(name.launcher)
        return launcher.find(name) if launcher is not None else AttemptStatus(AttemptState.UNKNOWN)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        found: set[AttemptRef] = set()
        for key, launcher in self._launchers.items():
            found |= launcher.find_alive([name for name in names if name.launcher == key])
        return found

    def stop(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.stop(name)

    def save(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.save(name)

    def kill(self, name: AttemptRef) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.kill(name)

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        if (launcher := self._launchers.get(name.launcher)) is not None:
            launcher.write_settings(name, settings)

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        launcher = self._launchers.get(name.launcher)
        return launcher.unacked_lines(name, after_seq, limit) if launcher is not None else []
