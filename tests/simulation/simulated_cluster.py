"""A service without a database: the applier's and the ingest's semantics in memory, with hosts and a clock that obey.

The plan and the rules are the real ones; the applier, the ingest and the agents are copies that are kept in step by
hand. `SimulatedCluster.step` does one random thing; `SimulatedCluster.check` is called after each.
"""

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal

from tests.simulation.rows import Attempt, Job, Process
from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import (
    LIVE,
    TERMINAL,
    UNCOUNTED_REASONS,
    Desired,
    JobStatus,
    Reason,
    can_transition,
)
from trainyard.service.devices.inventory import Device
from trainyard.service.jobs import lifecycle, restart_policy
from trainyard.service.jobs.lifecycle import InProgress, Rejected, Transition
from trainyard.service.launch.base import AttemptRef
from trainyard.service.scheduler.plan import (
    Action,
    Inspect,
    Kill,
    NotifyStop,
    Preempt,
    Restart,
    Start,
    plan,
)
from trainyard.service.scheduler.snapshot import (
    LiveAttempt,
    QueuedJob,
    Snapshot,
    is_due,
)
from trainyard.service.timing import Timing

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MAX_RESTARTS = 2

Outcome = Literal["completed", "stopped", "failed", "crashed", "killed"]
MOST_JOBS = 8


class SimulatedCluster:
    """Jobs, leases, hosts and a die. ``happened`` is what led here."""

    timing = Timing()

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.now = EPOCH
        self.devices = tuple(Device(f"cpu:{i}", "cpu") for i in range(self.dice.randint(2, 5)))
        self.preempts = self.dice.random() < 0.5
        self.jobs: dict[str, Job] = {}
        self.leases: dict[str, str] = {}
        self.hosts: dict[AttemptRef, Process] = {}
        self.looked_at: dict[str, datetime] = {}
        self.told: dict[str, Desired] = {}
        self.late: list[AttemptRef] = []
        self.happened: list[str] = []
        self.done: Counter[str] = Counter()
        self.made = 0

    # What may happen

    def step(self) -> None:
        doing, *rest = self.dice.choices(DOINGS, WEIGHTS)
        assert not rest
        self.happened.append(doing.__name__)
        self.done[doing.__name__] += 1
        doing(self)

    def submit(self) -> None:
        if len(self.jobs) < MOST_JOBS:
            self.made += 1
            job_id = f"job_{self.made}"
            ranks, priority = self.dice.randint(1, len(self.devices)), self.dice.choice((0, 0, 0, 5, 9))
            preemptible = self.dice.random() < 0.8
            self.jobs[job_id] = Job(job_id, ranks, priority, self.made, self.now, preemptible)

    def ask(self) -> None:
        """A user does something; what the rules refuse changes nothing."""
        job = self.some_job()
        if job is None:
            return
        action = self.dice.choice(lifecycle.ACTIONS)
        match lifecycle.decide(action, job.standing()):
            case Rejected() | InProgress():
                return
            case Transition(to, desired):
                if action == "delete":
                    del self.jobs[job.id]
                    return
                job.desired, job.preempted_by = desired, None
                if action == "resume":
                    job.queued_at, job.restarts, job.asked_at, job.trigger = self.now, 0, None, "resume"
                elif to is None or to in LIVE:
                    job.asked_at = self.now
                job.restart_at = None
                if to is not None:
                    self.move(job, to)

    def schedule(self) -> None:
        for action in plan(self.snapshot(), self.now).actions:
            self.apply(action)

    def die_while_scheduling(self) -> None:
        """The service is killed after some of the actions, perhaps in the middle of a launch, and comes back."""
        actions = plan(self.snapshot(), self.now).actions
        done = self.dice.randint(0, len(actions))
        for action in actions[:done]:
            self.apply(action)
        if done < len(actions) and isinstance(actions[done], Start):
            name = self.claim(actions[done])
            if name is not None and self.dice.random() < 0.5:
                self.spawn(name)
            elif name is not None:
                self.late.append(name)
        self.looked_at.clear()
        self.told.clear()

    def late_launch(self) -> None:
        """A service that was stopped between its decision and the spawn goes on, whatever was done meanwhile."""
        if self.late:
            self.spawn(self.late.pop(self.dice.randrange(len(self.late))))

    def agents_speak(self) -> None:
        for name, process in list(self.hosts.items()):
            if process.agent and self.dice.random() < 0.7:
                self.hear(name, process)

    def hear(self, name: AttemptRef, process: Process) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended or attempt is not job.newest:
            process.heard = Desired.KILL
        else:
            attempt.heard_at, attempt.launched = self.now, True
            attempt.start_step, attempt.step = process.start, process.step
            if job.status is JobStatus.STARTING:
                self.move(job, JobStatus.RUNNING)
            process.heard = job.desired

    def agents_act(self) -> None:
        """Ranks make steps and save; an agent carries out what it heard; ranks end by themselves now and then."""
        for name, process in list(self.hosts.items()):
            if not process.agent or process.report is not None:
                continue
            self.train(name, process)
            if process.heard is Desired.KILL:
                self.leave(name, process, "killed", Reason.USER)
            elif process.heard is not Desired.RUN and self.dice.random() < 0.8:
                self.leave(name, process, "stopped", Reason.USER)
            elif self.dice.random() < 0.15:
                self.leave(name, process, *self.dice.choice(ENDS))

    def train(self, name: AttemptRef, process: Process) -> None:
        steps = self.dice.choice((0, 0, 1, 3))
        process.step += steps
        job = self.jobs.get(name.job_id)
        if job is not None:
            job.steps_made += steps
            job.attempts[name.number - 1].moved |= steps > 0
            if self.dice.random() < 0.3:
                job.checkpoint = process.step

    def leave(self, name: AttemptRef, process: Process, outcome: Outcome, reason: Reason | None) -> None:
        """The ranks end, the report is written, and in half of all cases it arrives."""
        process.ranks = process.agent = False
        if outcome == "stopped" and name.job_id in self.jobs:
            self.jobs[name.job_id].checkpoint = process.step
        card = ErrorCard(code=str(reason), message=outcome) if outcome in ("failed", "crashed") else None
        process.report = ExitReport.model_construct(
            outcome=outcome,
            step=process.step,
            reason=reason,
            message=outcome,
            error=card,
            last_seq=0,
            ended_at=self.now,
            ranks=[],
        )
        if self.dice.random() < 0.5:
            self.close(name, process.report)

    def agent_is_killed(self) -> None:
        living = [process for process in self.hosts.values() if process.agent]
        if living:
            victim = self.dice.choice(living)
            victim.agent = False
            victim.ranks = self.dice.random() < 0.7

    def time_passes(self) -> None:
        self.now += timedelta(seconds=self.dice.choice((0.5, 1, 6, 30, 120, 700)))

    def clock_is_set(self) -> None:
        self.now += timedelta(hours=self.dice.choice((-1, 1)))

    # What the applier does

    def apply(self, action: Action) -> None:
        self.done[type(action).__name__] += 1
        match action:
            case Start():
                name = self.claim(action)
                if name is not None:
                    self.spawn(name)
                    self.rows_of(name).launched = True
                    self.looked_at[str(name)] = self.now
            case Restart(job_id):
                job = self.jobs[job_id]
                if job.status is JobStatus.INTERRUPTED and job.restart_at is not None:
                    job.restart_at, job.desired, job.trigger = None, Desired.RUN, "restart"
                    self.move(job, JobStatus.QUEUED)
            case Inspect(live):
                self.look(live)
            case NotifyStop(live):
                self.told[live.id] = live.desired
                process = self.hosts.get(live.name)
                if process is not None and process.agent:
                    process.heard = live.desired
            case Kill(live):
                self.end(live.name)
                self.looked_at.pop(live.id, None)
            case Preempt(live, waiting):
                self.preempt(live, waiting)

    def claim(self, action: Action) -> AttemptRef | None:
        assert isinstance(action, Start)
        job = self.jobs[action.job_id]
        if job.status is not JobStatus.QUEUED:
            return None
        assert not [device for device in action.devices if device in self.leases], "I3: a device that is leased"
        name = AttemptRef(job.id, len(job.attempts) + 1)
        job.attempts.append(Attempt(name.number, action.devices, job.trigger, self.now))
        self.leases.update(dict.fromkeys(action.devices, job.id))
        self.move(job, JobStatus.STARTING)
        return name

    def preempt(self, live: LiveAttempt, waiting_id: str) -> None:
        job, waiting = self.jobs[live.name.job_id], self.jobs[waiting_id]
        if job.status is not JobStatus.RUNNING or waiting.status is not JobStatus.QUEUED:
            return
        assert self.preempts, "nobody is preempted where that is switched off"
        assert job.preemptible, f"{job.id} must not be preempted"
        assert job.priority < waiting.priority, f"{waiting.id} is not more important than {job.id}"
        assert job.steps_made > job.preempted_after, f"{job.id} is preempted again and has made no step since"
        job.preempted_after, job.preempted_by = job.steps_made, waiting.id
        job.desired, job.asked_at = Desired.PAUSE, self.now
        self.move(job, JobStatus.PAUSING)

    def spawn(self, name: AttemptRef) -> None:
        """The launcher and the agent's own refusals: closed attempts, later attempts, locks that are held."""
        others = [n for n in self.hosts if n.job_id == name.job_id]
        known = self.hosts.setdefault(name, Process(agent=False, ranks=False))
        superseded = any(n.number > name.number and not self.hosts[n].closed for n in others)
        if known.closed or known.report is not None or known.lives or superseded:
            return
        if any(self.hosts[n].lives for n in others):
            self.leave(name, known, "crashed", Reason.LAUNCH_FAILED)
            return
        known.agent = known.ranks = known.began = True
        known.start = known.step = self.jobs[name.job_id].checkpoint if name.job_id in self.jobs else 0

    def look(self, live: LiveAttempt) -> None:
        self.looked_at[live.id] = self.now
        process = self.hosts.get(live.name)
        if process is not None and process.agent:
            self.rows_of(live.name).launched = True
            return
        if process is not None and process.ranks:
            self.end(live.name)
        if process is not None and process.report is not None:
            self.close(live.name, process.report)
        elif live.launched or (process is not None and process.began):
            self.close(live.name, lost(self.now, process.step if process is not None else 0))
        else:
            self.end(live.name)
            self.never_launched(live.name)

    def end(self, name: AttemptRef) -> None:
        process = self.hosts.setdefault(name, Process(agent=False, ranks=False))
        process.closed = True
        if process.lives:
            process.agent = process.ranks = False
            process.report = process.report or lost(self.now, process.step)

    def never_launched(self, name: AttemptRef) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended:
            return
        self.free(job, attempt)
        to = {JobStatus.STARTING: JobStatus.QUEUED, JobStatus.PAUSING: JobStatus.PAUSED}
        self.move(job, to.get(job.status, JobStatus.CANCELLED))

    def close(self, name: AttemptRef, report: ExitReport) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended:
            return
        self.free(job, attempt)
        process = self.hosts.get(name)
        attempt.start_step = process.start if process is not None and process.began else None
        attempt.step, attempt.outcome, attempt.reason = report.step, report.outcome, report.reason
        if attempt is not job.newest or job.status not in LIVE:
            return
        ended = (each.as_ended() for each in reversed(job.attempts) if each.outcome)
        past = restart_policy.restart_history(job.restarts, ended)
        ending = lifecycle.after_exit(job.status, report, past, MAX_RESTARTS, job.preempted_by, self.timing)
        if not can_transition(job.status, ending.status):
            self.move(job, JobStatus.RUNNING)
        job.restarts, job.asked_at, job.preempted_by = ending.restarts, None, None
        job.restart_at = None
        if ending.restart_seconds is not None:
            job.restart_at, job.desired = self.now + timedelta(seconds=ending.restart_seconds), Desired.RUN
        job.completed = job.completed or report.outcome == "completed"
        self.move(job, ending.status)
        self.done[f"ended {ending.status}: {ending.reason}"] += 1
        if ending.requeue:
            job.desired, job.trigger = Desired.RUN, "preemption"
            self.move(job, JobStatus.QUEUED)
        self.check_restart(job, ending)

    def check_restart(self, job: Job, ending: lifecycle.ExitDecision) -> None:
        """Who made no step twice in a row by its own fault is not started again, and waits grow for the others."""
        if ending.restart_seconds is None:
            return
        mine = [a for a in job.attempts if a.outcome]
        asked = max((n for n, a in enumerate(mine) if a.trigger in ("submit", "resume")), default=0)
        idle = list(takewhile(lambda a: not a.moved, reversed(mine[asked:])))
        if ending.reason in UNCOUNTED_REASONS:
            setbacks = sum(restart_policy.fault(a.outcome, a.reason) in UNCOUNTED_REASONS for a in idle)
            assert ending.restart_seconds >= (0, 5, 20, 60, 180, 600)[min(setbacks, 5)], f"{job.id} restarts too soon"
        else:
            faults = [a for a in idle if restart_policy.fault(a.outcome, a.reason) not in UNCOUNTED_REASONS]
            assert len(faults) < 2, f"{job.id} gets nowhere and is started again"

    def free(self, job: Job, attempt: Attempt) -> None:
        attempt.ended = True
        self.leases = {device: holder for device, holder in self.leases.items() if holder != job.id}

    def move(self, job: Job, to: JobStatus) -> None:
        assert can_transition(job.status, to), f"I5: {job.status} -> {to}"
        job.status = to

    # What is looked at

    def snapshot(self) -> Snapshot:
        queued = [job for job in self.jobs.values() if job.status is JobStatus.QUEUED]
        due = [job.id for job in self.jobs.values() if job.status is JobStatus.INTERRUPTED and self.is_due(job)]
        return Snapshot(
            queued=[QueuedJob(j.id, j.id, "cpu", j.ranks, j.priority, j.queued_at, j.number) for j in queued],
            live=[self.live(job) for job in self.jobs.values() if job.attempts and not job.newest.ended],
            restarts_due=due,
            leases=dict(self.leases),
            devices=self.devices,
            preempts=self.preempts,
        )

    def is_due(self, job: Job) -> bool:
        return job.restart_at is not None and is_due(job.restart_at, self.now)

    def live(self, job: Job) -> LiveAttempt:
        name, attempt = AttemptRef(job.id, job.newest.number), job.newest
        looked, told = self.looked_at.get(str(name)), self.told.get(str(name))
        return LiveAttempt(
            id=str(name),
            name=name,
            desired=job.desired,
            launched=attempt.launched,
            stop_requested_at=job.asked_at,
            last_heartbeat_at=attempt.heard_at,
            inspected_at=looked,
            notified=told,
            running=job.status is JobStatus.RUNNING,
            made_progress=restart_policy.made_a_step(attempt.start_step, attempt.step),
            preemptible=job.preemptible,
            priority=job.priority,
            devices=attempt.devices,
            created_at=attempt.created_at,
        )

    def rows(self, name: AttemptRef) -> tuple[Job | None, Attempt | None]:
        job = self.jobs.get(name.job_id)
        return job, job.attempts[name.number - 1] if job is not None else None

    def rows_of(self, name: AttemptRef) -> Attempt:
        return self.jobs[name.job_id].attempts[name.number - 1]

    def some_job(self) -> Job | None:
        return self.dice.choice(list(self.jobs.values())) if self.jobs else None

    # What must hold

    def check(self) -> None:
        living: dict[str, int] = {}
        for name, process in self.hosts.items():
            if process.lives:
                living[name.job_id] = living.get(name.job_id, 0) + 1
        assert max(living.values(), default=0) <= 1, "I1: two attempts of one job live"
        held: dict[str, int] = {}
        for holder in self.leases.values():
            held[holder] = held.get(holder, 0) + 1
        for job in self.jobs.values():
            live = job.status in LIVE
            assert held.pop(job.id, 0) == (job.ranks if live else 0), f"I3: {job.id} is {job.status}"
            assert live == bool(job.attempts and not job.newest.ended), f"{job.id} is {job.status}"
            assert job.status is not JobStatus.SUCCEEDED or job.completed, "I9"
        assert held == {}, "I3: a lease of nobody"

    def come_to_rest(self) -> None:
        """Nothing bad happens any more: every job ends or rests, nothing lives, every device is free."""
        self.late.clear()
        for _ in range(60):
            self.now += timedelta(seconds=31)
            self.schedule()
            self.agents_speak()
            for name, process in list(self.hosts.items()):
                if process.agent:
                    self.hear(name, process)
                    self.leave(name, process, *LAST_ENDS[process.heard])
            self.check()
            if self.rests():
                break
        resting = {JobStatus.PAUSED, JobStatus.INTERRUPTED, *TERMINAL}
        stuck = {job.id: job.status for job in self.jobs.values() if job.status not in resting}
        assert stuck == {}, "a job is stuck"
        waiting = [job.id for job in self.jobs.values() if job.restart_at is not None]
        assert waiting == [], "a restart that never came"
        assert self.leases == {}

    def rests(self) -> bool:
        waiting = any(job.restart_at is not None or job.status is JobStatus.QUEUED for job in self.jobs.values())
        return not self.leases and not waiting


def lost(now: datetime, step: int) -> ExitReport:
    """What a launcher says of an attempt whose agent left nothing."""
    card = ErrorCard(code=Reason.AGENT_LOST, message="lost")
    return ExitReport.model_construct(
        outcome="crashed",
        step=step,
        reason=Reason.AGENT_LOST,
        message="lost",
        error=card,
        last_seq=0,
        ended_at=now,
        ranks=[],
    )


ENDS: tuple[tuple[Outcome, Reason | None], ...] = (
    ("completed", None),
    ("stopped", Reason.USER),
    ("failed", Reason.DIVERGED),
    ("crashed", Reason.WORKER_CRASHED),
    ("crashed", Reason.WORKER_CRASHED),
    ("crashed", Reason.LAUNCH_FAILED),
    ("crashed", Reason.UNKNOWN),
    ("crashed", Reason.HOST_RESTARTED),
)

LAST_ENDS: dict[Desired, tuple[Outcome, Reason | None]] = {
    Desired.RUN: ("completed", None),
    Desired.PAUSE: ("stopped", Reason.USER),
    Desired.CANCEL: ("stopped", Reason.USER),
    Desired.KILL: ("killed", Reason.USER),
}

CHANCES: dict[Callable[[SimulatedCluster], None], int] = {
    SimulatedCluster.submit: 3,
    SimulatedCluster.ask: 4,
    SimulatedCluster.schedule: 10,
    SimulatedCluster.die_while_scheduling: 2,
    SimulatedCluster.late_launch: 2,
    SimulatedCluster.agents_speak: 9,
    SimulatedCluster.agents_act: 9,
    SimulatedCluster.agent_is_killed: 1,
    SimulatedCluster.time_passes: 8,
    SimulatedCluster.clock_is_set: 1,
}
DOINGS, WEIGHTS = list(CHANCES), list(CHANCES.values())
