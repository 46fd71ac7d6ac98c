"""What the scheduler asks of a launcher: start an attempt, find it again, end it, read what it left."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from trainyard.contract.messages import ExitReport, RunSettings
from trainyard.contract.spec import JobSpec

LOCAL = "local"
"""The launcher of this host: the only one whose devices the service leases out itself."""


@dataclass(frozen=True)
class AttemptRef:
    """Names one attempt for ever, also to a service that was restarted in between. ``launcher``: who runs it."""

    job_id: str
    number: int
    launcher: str = field(default=LOCAL, compare=False)

    def __str__(self) -> str:
        return f"{self.job_id}/{self.number}"

    @property
    def fields(self) -> dict[str, Any]:
        """What a line of the log that is about it has."""
        return {"job_id": self.job_id, "attempt": self.number}


@dataclass(frozen=True)
class Launch:
    """All that is needed to start an attempt. ``devices`` are lease ids: ``cuda:0`` or ``cpu:3``; () on a cluster.

    ``resume_step``: the checkpoint to begin at; None: the newest sound one.
    """

    name: AttemptRef
    attempt_id: str
    spec: JobSpec
    devices: tuple[str, ...]
    token: str
    resume_step: int | None = None


class AttemptState(StrEnum):
    """What a launcher found of an attempt."""

    ABSENT = "absent"
    """It was never started: no trace of an agent."""
    ALIVE = "alive"
    """Its agent lives, and speaks for it."""
    ORPHANED = "orphaned"
    """Its agent is gone and some of its processes live."""
    ENDED = "ended"
    """Nothing of it lives."""
    UNKNOWN = "unknown"
    """Who would know does not answer: nothing follows from that."""


@dataclass(frozen=True)
class Placement:
    """Where a cluster has put an attempt, as it says itself.

    ``engine_id``: the cluster's own number of it. ``waiting_for``: why it does not run yet; None where it does.
    ``devices``: ``node1/cuda:0``, or ``node1/cpu:0`` where it has no GPUs there. ``tailed``: its agent cannot reach the
    service, which reads what is written in the run directory instead.
    """

    engine_id: str
    state: str
    waiting_for: str | None = None
    nodes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    tailed: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the attempt's row."""
        return {**asdict(self), "nodes": list(self.nodes), "devices": list(self.devices)}


@dataclass(frozen=True)
class AttemptStatus:
    """``report`` is set exactly where ``state`` is ENDED; where the agent left none, it says what is known, no more.

    ``placement``: a cluster's, while the attempt is ALIVE. ``silence``: why it is UNKNOWN.
    """

    state: AttemptState
    report: ExitReport | None = None
    placement: Placement | None = None
    silence: str | None = None


class LaunchRefused(Exception):
    """The attempt could not be started; the message says why, and nothing of it lives. ``hint``: what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class LauncherUnavailable(Exception):
    """Who would have to do it does not answer: it may have been done or not, and `find` will tell."""


class Launcher(Protocol):
    """One way to run attempts. Every method is bounded in time and safe to call again."""

    def start(self, launch: Launch) -> None:
        """Start the attempt and return once its agent is on its way. Raises LaunchRefused or NoAnswer."""

    def find(self, name: AttemptRef) -> AttemptStatus:
        """Look the attempt up by what is on the host, not by what was remembered."""

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """Those of which one look at the host sees that `find` would say ALIVE and no more; of the others nothing."""

    def stop(self, name: AttemptRef) -> None:
        """Ask for save-and-stop without the agent's next report: the same wish, heard sooner. Raises NoAnswer."""

    def save(self, name: AttemptRef) -> None:
        """Ask for a checkpoint at the next step. A wish: nothing is remembered where nobody is there to hear it."""

    def kill(self, name: AttemptRef) -> None:
        """End every process of an attempt that its agent no longer answers for. Returns when none is left.

        None starts afterwards either, also where a `start` of this attempt is still on its way in another service.
        """

    def settle(self, name: AttemptRef, settings: RunSettings) -> None:
        """Leave the settings that are to hold, for ranks whose agent cannot be told. Raises OSError."""

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Outbox lines behind ``after_seq``, oldest first, at most ``limit``; [] where none is left."""
