"""A launcher in memory: attempts do exactly what a test says, when it says so."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from trainyard.contract.messages import ErrorCard, ExitReport, RunSettings
from trainyard.contract.status import Reason
from trainyard.service.launch.base import (
    AttemptPlacement,
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    LauncherUnavailable,
    LaunchRefused,
)


class ServiceKilled(BaseException):
    """Stands for a SIGKILL of the service at this very point; nothing in the service may catch it."""


Failpoint = Literal["before_spawn", "after_spawn", "refuse", "no_answer", "no_answer_but_done", "error_after_spawn"]


@dataclass
class FakeAttempt:
    """One launched attempt: what its ranks wrote, and what became of it.

    ``placement``, ``silence``: what a cluster says of it, or why it says nothing.
    """

    launch: Launch
    lines: list[dict[str, Any]] = field(default_factory=list)
    state: AttemptState = AttemptState.ALIVE
    report: ExitReport | None = None
    stop_asked: int = 0
    save_asked: int = 0
    ended_by_launcher: int = 0
    placement: AttemptPlacement | None = None
    silence: str | None = None

    def say(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append a line to the outbox, and return it."""
        line = {"kind": kind, "seq": len(self.lines) + 1, "at": _now().isoformat(), **fields}
        self.lines.append(line)
        return line

    def started(self, start_step: int = 0, steps: int = 10, **fields: Any) -> dict[str, Any]:
        """Say what a worker says first."""
        return self.say("started", **STARTED, start_step=start_step, steps=steps, **fields)

    def metric(self, step: int, loss: float | None = 2.0, **fields: Any) -> dict[str, Any]:
        """Say a point of the curve."""
        point = {"epoch": step / 10, "loss": loss, "learning_rate": 1e-3, "tokens": step * 100}
        return self.say("metric", **{**point, "step": step, "tokens_per_second": 1000.0, "step_seconds": 0.1, **fields})

    def end(
        self,
        outcome: Literal["completed", "stopped", "failed", "crashed", "killed"],
        reason: Reason | None = None,
        step: int = 0,
        message: str | None = None,
    ) -> ExitReport:
        """End it, and return the report that the agent leaves behind."""
        message = message or f"{outcome} at step {step}"
        card = ErrorCard(code=reason, message=message) if reason and outcome in ("failed", "crashed") else None
        self.report = ExitReport(
            outcome=outcome,
            reason=reason,
            step=step,
            message=message,
            error=card,
            last_seq=len(self.lines),
            ended_at=_now(),
        )
        self.state = AttemptState.ENDED
        return self.report

    def lose_agent(self) -> None:
        """The agent is gone and left nothing; ranks still live."""
        self.state = AttemptState.ORPHANED


STARTED: dict[str, Any] = {
    "world_size": 1,
    "device": "cpu",
    "device_name": "fake CPU",
    "dtype": "float32",
    "torch_version": "0",
    "parameters": 1000,
    "active_parameters": 1000,
    "vocab_size": 259,
    "samples": 100,
    "documents": 90,
    "tokens": 12345,
    "bad_lines": 1,
    "global_batch": 8,
    "tokens_per_step": 100.0,
    "steps_per_epoch": 10,
    "flops_per_token": 6000.0,
}


class FakeLauncher:
    """Keeps what it was told. ``fail_next`` makes the next start fail in one way."""

    def __init__(self) -> None:
        self.attempts: dict[AttemptRef, FakeAttempt] = {}
        self.starts: list[AttemptRef] = []
        self.looks: list[AttemptRef] = []
        self.lookups = 0
        self.closed: set[AttemptRef] = set()
        self.fail_next: Failpoint | None = None

    def of(self, job_id: str, number: int = 1) -> FakeAttempt:
        """The attempt with this number."""
        return self.attempts[AttemptRef(job_id, number)]

    def living(self, job_id: str) -> list[FakeAttempt]:
        """The job's attempts that have processes."""
        alive = (AttemptState.ALIVE, AttemptState.ORPHANED)
        return [a for name, a in self.attempts.items() if name.job_id == job_id and a.state in alive]

    def start(self, launch: Launch) -> None:
        """Start it, or fail as asked."""
        failpoint, self.fail_next = self.fail_next, None
        self.starts.append(launch.name)
        if failpoint == "refuse":
            raise LaunchRefused("no room in the test", "make room in the test")
        if failpoint == "before_spawn":
            raise ServiceKilled()
        if failpoint == "no_answer":
            raise LauncherUnavailable("the test does not answer")
        if launch.name not in self.closed:
            self.attempts.setdefault(launch.name, FakeAttempt(launch))
        if failpoint == "after_spawn":
            raise ServiceKilled()
        if failpoint == "error_after_spawn":
            raise RuntimeError("can't start new thread")
        if failpoint == "no_answer_but_done":
            raise LauncherUnavailable("the test does not answer")

    def find(self, name: AttemptRef) -> AttemptStatus:
        """What became of it."""
        self.looks.append(name)
        attempt = self.attempts.get(name)
        if attempt is None:
            return AttemptStatus(AttemptState.ABSENT)
        report = attempt.report if attempt.state is AttemptState.ENDED else None
        return AttemptStatus(attempt.state, report, attempt.placement, attempt.silence)

    def find_alive(self, names: Sequence[AttemptRef]) -> set[AttemptRef]:
        """Those that run."""
        self.lookups += 1
        return {name for name in names if name in self.attempts and self.attempts[name].state is AttemptState.ALIVE}

    def stop(self, name: AttemptRef) -> None:
        """Count the wish."""
        if name in self.attempts:
            self.attempts[name].stop_asked += 1

    def save(self, name: AttemptRef) -> None:
        """Count the wish."""
        if name in self.attempts:
            self.attempts[name].save_asked += 1

    def kill(self, name: AttemptRef) -> None:
        """End it as the kernel would: without a word. What did not begin yet never will."""
        self.closed.add(name)
        attempt = self.attempts.get(name)
        if attempt is None or attempt.state is AttemptState.ENDED:
            return
        attempt.ended_by_launcher += 1
        attempt.end("crashed", Reason.AGENT_LOST, message="the attempt's agent is gone and left no report")

    def write_settings(self, name: AttemptRef, settings: RunSettings) -> None:
        """Its agents hear of them in the answers to their reports."""

    def unacked_lines(self, name: AttemptRef, after_seq: int, limit: int) -> list[dict[str, Any]]:
        """Lines behind ``after_seq``."""
        attempt = self.attempts.get(name)
        return attempt.lines[after_seq : after_seq + limit] if attempt is not None else []


def _now() -> datetime:
    return datetime.now(UTC)
