"""State of the simulated database and hosts."""

from dataclasses import dataclass, field
from datetime import datetime

from trainyard.contract.messages import ExitReport
from trainyard.contract.status import Desired, JobStatus, Reason
from trainyard.service.jobs import lifecycle
from trainyard.service.jobs.lifecycle import JobState


@dataclass
class Process:
    """An attempt on its host. ``agent`` False and ``ranks`` True: orphans."""

    agent: bool = True
    ranks: bool = True
    requested: Desired = Desired.RUN
    report: ExitReport | None = None
    closed: bool = False
    started: bool = False
    start: int = 0
    step: int = 0

    @property
    def is_alive(self) -> bool:
        return self.agent or self.ranks


@dataclass
class Attempt:
    """A row. ``start_step`` and ``step`` are as reported; ``made_progress`` is what happened on the host."""

    number: int
    devices: tuple[str, ...]
    trigger: str
    created_at: datetime
    launched: bool = False
    ended: bool = False
    heartbeat_at: datetime | None = None
    start_step: int | None = None
    step: int = 0
    outcome: str = ""
    reason: Reason | None = None
    made_progress: bool = False

    def as_ended(self) -> lifecycle.EndedAttempt:
        made_progress = lifecycle.made_a_step(self.start_step, self.step)
        return lifecycle.EndedAttempt(self.trigger, lifecycle.fault(self.outcome, self.reason), made_progress)


@dataclass
class Job:
    """A row, its attempts, and its newest checkpoint's step."""

    id: str
    ranks: int
    priority: int
    number: int
    queued_at: datetime
    preemptible: bool = True
    status: JobStatus = JobStatus.QUEUED
    desired: Desired = Desired.RUN
    trigger: str = "submit"
    restarts: int = 0
    restart_at: datetime | None = None
    asked_at: datetime | None = None
    preempted_by: str | None = None
    checkpoint: int = 0
    steps_made: int = 0
    preempted_after: int = -1
    attempts: list[Attempt] = field(default_factory=list)
    completed: bool = False

    @property
    def latest(self) -> Attempt:
        return self.attempts[-1]

    def state(self) -> JobState:
        preempted = self.preempted_by is not None
        return JobState(self.status, self.desired, self.restart_at is not None, len(self.attempts), preempted)
