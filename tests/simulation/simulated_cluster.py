"""A simulated service and its hosts, without a database, processes or a real clock.

The plan, the lifecycle and the restart policy are the real ones. The executor, the ingest and the agents are copies in
memory, kept in step by hand: a change of the real ones must be made here too. The real ones are tested by tests/service
(test_scheduler.py and test_state_machine.py: executor and ingest on a real database with a fake launcher) and by
tests/faults and tests/agent (real processes). `SimulatedCluster.step` does one random thing; `SimulatedCluster.check`
is called after each. `replay` does a given list of events again.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from typing import Literal, NamedTuple

from tests.simulation.rows import Attempt, Job, Process
from trainyard.contract.messages import ErrorCard, ExitReport
from trainyard.contract.status import LIVE, TERMINAL, UNCOUNTED_REASONS, Desired, JobStatus, Reason, can_transition
from trainyard.service.devices.inventory import Device
from trainyard.service.jobs import lifecycle
from trainyard.service.jobs.lifecycle import InProgress, Rejected, Transition
from trainyard.service.launch.base import AttemptRef
from trainyard.service.scheduler.plan import Action, Inspect, Kill, NotifyStop, Preempt, Restart, Start, plan
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot
from trainyard.service.timing import Timing

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MAX_RESTARTS = 2

Outcome = Literal["completed", "stopped", "failed", "crashed", "killed"]
MAX_JOBS = 8


class Event(NamedTuple):
    """A method of `SimulatedCluster`, and the seed of everything random in it.

    With a seed of its own an event does the same if an earlier one is left out, as far as there is something to do.
    """

    name: str
    seed: int


class SimulatedCluster:
    """Jobs, leases, processes and a random number generator. ``history`` lists the events so far."""

    timing = Timing()

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.rng = random.Random(seed)
        self.now = EPOCH
        self.devices = tuple(Device(f"cpu:{i}", "cpu") for i in range(self.rng.randint(2, 5)))
        self.preempts = self.rng.random() < 0.5
        self.jobs: dict[str, Job] = {}
        self.leases: dict[str, str] = {}
        self.processes: dict[AttemptRef, Process] = {}
        self.inspected_at: dict[str, datetime] = {}
        self.notified: dict[str, Desired] = {}
        self.late_launches: list[AttemptRef] = []
        self.history: list[Event] = []
        self.counts: Counter[str] = Counter()
        self.submitted = 0

    # Events

    def step(self) -> None:
        """Do one random thing."""
        (event,) = self.dice.choices(EVENT_TYPES, WEIGHTS)
        self.do(Event(event.__name__, self.dice.randrange(10_000)))

    def do(self, event: Event) -> None:
        self.history.append(event)
        self.counts[event.name] += 1
        self.rng.seed(event.seed)
        getattr(self, event.name)()

    def submit(self) -> None:
        if len(self.jobs) < MAX_JOBS:
            self.submitted += 1
            job_id = f"job_{self.submitted}"
            ranks, priority = self.rng.randint(1, len(self.devices)), self.rng.choice((0, 0, 0, 5, 9))
            preemptible = self.rng.random() < 0.8
            self.jobs[job_id] = Job(job_id, ranks, priority, self.submitted, self.now, preemptible)

    def request_action(self) -> None:
        """A user requests an action; what the lifecycle rejects changes nothing."""
        job = self.random_job()
        if job is None:
            return
        action = self.rng.choice(lifecycle.ACTIONS)
        match lifecycle.decide(action, job.state()):
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
                    self.transition(job, to)

    def schedule(self) -> None:
        for action in plan(self.snapshot(), self.now).actions:
            self.execute(action)

    def crash_while_scheduling(self) -> None:
        """The service is killed after some of the actions, perhaps in the middle of a launch, and restarts."""
        actions = plan(self.snapshot(), self.now).actions
        count = self.rng.randint(0, len(actions))
        for action in actions[:count]:
            self.execute(action)
        if count < len(actions) and isinstance(actions[count], Start):
            name = self.claim(actions[count])
            if name is not None and self.rng.random() < 0.5:
                self.spawn(name)
            elif name is not None:
                self.late_launches.append(name)
        self.inspected_at.clear()
        self.notified.clear()

    def late_launch(self) -> None:
        """A service that was suspended between its decision and the spawn resumes, whatever happened meanwhile."""
        if self.late_launches:
            self.spawn(self.late_launches.pop(self.rng.randrange(len(self.late_launches))))

    def agents_send_heartbeats(self) -> None:
        for name, process in list(self.processes.items()):
            if process.agent and self.rng.random() < 0.7:
                self.heartbeat(name, process)

    def heartbeat(self, name: AttemptRef, process: Process) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended or attempt is not job.latest:
            process.requested = Desired.KILL
        else:
            attempt.heartbeat_at, attempt.launched = self.now, True
            attempt.start_step, attempt.step = process.start, process.step
            if job.status is JobStatus.STARTING:
                self.transition(job, JobStatus.RUNNING)
            process.requested = job.desired

    def agents_act(self) -> None:
        """Ranks make steps and save; an agent carries out what was requested; sometimes ranks end by themselves."""
        for name, process in list(self.processes.items()):
            if not process.agent or process.report is not None:
                continue
            self.train(name, process)
            if process.requested is Desired.KILL:
                self.exit_process(name, process, "killed", Reason.USER)
            elif process.requested is not Desired.RUN and self.rng.random() < 0.8:
                self.exit_process(name, process, "stopped", Reason.USER)
            elif self.rng.random() < 0.15:
                self.exit_process(name, process, *self.rng.choice(EXITS))

    def train(self, name: AttemptRef, process: Process) -> None:
        steps = self.rng.choice((0, 0, 1, 3))
        process.step += steps
        job = self.jobs.get(name.job_id)
        if job is not None:
            job.steps_made += steps
            job.attempts[name.number - 1].made_progress |= steps > 0
            if self.rng.random() < 0.3:
                job.checkpoint = process.step

    def exit_process(self, name: AttemptRef, process: Process, outcome: Outcome, reason: Reason | None) -> None:
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
        if self.rng.random() < 0.5:
            self.close(name, process.report)

    def agent_is_killed(self) -> None:
        living = [process for process in self.processes.values() if process.agent]
        if living:
            victim = self.rng.choice(living)
            victim.agent = False
            victim.ranks = self.rng.random() < 0.7

    def time_passes(self) -> None:
        self.now += timedelta(seconds=self.rng.choice((0.5, 1, 6, 30, 120, 700)))

    def clock_is_set(self) -> None:
        self.now += timedelta(hours=self.rng.choice((-1, 1)))

    # The executor

    def execute(self, action: Action) -> None:
        self.counts[type(action).__name__] += 1
        match action:
            case Start():
                name = self.claim(action)
                if name is not None:
                    self.spawn(name)
                    self.rows_of(name).launched = True
                    self.inspected_at[str(name)] = self.now
            case Restart(job_id):
                job = self.jobs[job_id]
                if job.status is JobStatus.INTERRUPTED and job.restart_at is not None:
                    job.restart_at, job.desired, job.trigger = None, Desired.RUN, "restart"
                    self.transition(job, JobStatus.QUEUED)
            case Inspect(live):
                self.inspect(live)
            case NotifyStop(live):
                self.notified[live.id] = live.desired
                process = self.processes.get(live.name)
                if process is not None and process.agent:
                    process.requested = live.desired
            case Kill(live):
                self.kill(live.name)
                self.inspected_at.pop(live.id, None)
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
        self.transition(job, JobStatus.STARTING)
        return name

    def preempt(self, live: LiveAttempt, waiting_id: str) -> None:
        job, waiting = self.jobs[live.name.job_id], self.jobs[waiting_id]
        if job.status is not JobStatus.RUNNING or waiting.status is not JobStatus.QUEUED:
            return
        assert self.preempts, "preempted although preemption is off"
        assert job.preemptible, f"{job.id} must not be preempted"
        assert job.priority < waiting.priority, f"{waiting.id} is not more important than {job.id}"
        assert job.steps_made > job.preempted_after, f"{job.id} is preempted again and has made no step since"
        job.preempted_after, job.preempted_by = job.steps_made, waiting.id
        job.desired, job.asked_at = Desired.PAUSE, self.now
        self.transition(job, JobStatus.PAUSING)

    def spawn(self, name: AttemptRef) -> None:
        """The launcher, and the agent's own checks: closed attempts, later attempts, locks that are held."""
        others = [n for n in self.processes if n.job_id == name.job_id]
        known = self.processes.setdefault(name, Process(agent=False, ranks=False))
        superseded = any(n.number > name.number and not self.processes[n].closed for n in others)
        if known.closed or known.report is not None or known.is_alive or superseded:
            return
        if any(self.processes[n].is_alive for n in others):
            self.exit_process(name, known, "crashed", Reason.LAUNCH_FAILED)
            return
        known.agent = known.ranks = known.started = True
        known.start = known.step = self.jobs[name.job_id].checkpoint if name.job_id in self.jobs else 0

    def inspect(self, live: LiveAttempt) -> None:
        self.inspected_at[live.id] = self.now
        process = self.processes.get(live.name)
        if process is not None and process.agent:
            self.rows_of(live.name).launched = True
            return
        if process is not None and process.ranks:
            self.kill(live.name)
        if process is not None and process.report is not None:
            self.close(live.name, process.report)
        elif live.launched or (process is not None and process.started):
            self.close(live.name, lost_report(self.now, process.step if process is not None else 0))
        else:
            self.kill(live.name)
            self.never_launched(live.name)

    def kill(self, name: AttemptRef) -> None:
        process = self.processes.setdefault(name, Process(agent=False, ranks=False))
        process.closed = True
        if process.is_alive:
            process.agent = process.ranks = False
            process.report = process.report or lost_report(self.now, process.step)

    def never_launched(self, name: AttemptRef) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended:
            return
        self.release(job, attempt)
        to = {JobStatus.STARTING: JobStatus.QUEUED, JobStatus.PAUSING: JobStatus.PAUSED}
        self.transition(job, to.get(job.status, JobStatus.CANCELLED))

    def close(self, name: AttemptRef, report: ExitReport) -> None:
        job, attempt = self.rows(name)
        if job is None or attempt is None or attempt.ended:
            return
        self.release(job, attempt)
        process = self.processes.get(name)
        attempt.start_step = process.start if process is not None and process.started else None
        attempt.step, attempt.outcome, attempt.reason = report.step, report.outcome, report.reason
        if attempt is not job.latest or job.status not in LIVE:
            return
        ended = (each.as_ended() for each in reversed(job.attempts) if each.outcome)
        past = lifecycle.restart_history(job.restarts, ended)
        ending = lifecycle.after_exit(job.status, report, past, MAX_RESTARTS, job.preempted_by, self.timing)
        if not can_transition(job.status, ending.status):
            self.transition(job, JobStatus.RUNNING)
        job.restarts, job.asked_at, job.preempted_by = ending.restarts, None, None
        job.restart_at = None
        if ending.restart_seconds is not None:
            job.restart_at, job.desired = self.now + timedelta(seconds=ending.restart_seconds), Desired.RUN
        job.completed = job.completed or report.outcome == "completed"
        self.transition(job, ending.status)
        self.counts[f"ended {ending.status}: {ending.reason}"] += 1
        if ending.requeue:
            job.desired, job.trigger = Desired.RUN, "preemption"
            self.transition(job, JobStatus.QUEUED)
        self.check_restart(job, ending)

    def check_restart(self, job: Job, ending: lifecycle.ExitDecision) -> None:
        """A job with two fruitless attempts by its own fault is not restarted; for other reasons the waits grow."""
        if ending.restart_seconds is None:
            return
        attempts = [a for a in job.attempts if a.outcome]
        first = max((n for n, a in enumerate(attempts) if a.trigger in ("submit", "resume")), default=0)
        idle = list(takewhile(lambda a: not a.made_progress, reversed(attempts[first:])))
        if ending.reason in UNCOUNTED_REASONS:
            setbacks = sum(lifecycle.fault(a.outcome, a.reason) in UNCOUNTED_REASONS for a in idle)
            assert ending.restart_seconds >= (0, 5, 20, 60, 180, 600)[min(setbacks, 5)], f"{job.id} restarts too soon"
        else:
            faults = [a for a in idle if lifecycle.fault(a.outcome, a.reason) not in UNCOUNTED_REASONS]
            assert len(faults) < 2, f"{job.id} gets nowhere and is started again"

    def release(self, job: Job, attempt: Attempt) -> None:
        attempt.ended = True
        self.leases = {device: holder for device, holder in self.leases.items() if holder != job.id}

    def transition(self, job: Job, to: JobStatus) -> None:
        assert can_transition(job.status, to), f"I5: {job.status} -> {to}"
        job.status = to

    # The snapshot

    def snapshot(self) -> Snapshot:
        queued = [job for job in self.jobs.values() if job.status is JobStatus.QUEUED]
        due = [job.id for job in self.jobs.values() if job.status is JobStatus.INTERRUPTED and self.is_due(job)]
        return Snapshot(
            queued=[QueuedJob(j.id, j.id, "cpu", j.ranks, j.priority, j.queued_at, j.number) for j in queued],
            live=[self.live(job) for job in self.jobs.values() if job.attempts and not job.latest.ended],
            restarts_due=due,
            leases=dict(self.leases),
            devices=self.devices,
            preempts=self.preempts,
        )

    def is_due(self, job: Job) -> bool:
        return job.restart_at is not None and Timing().is_due(job.restart_at, self.now)

    def live(self, job: Job) -> LiveAttempt:
        name, attempt = AttemptRef(job.id, job.latest.number), job.latest
        inspected, notified = self.inspected_at.get(str(name)), self.notified.get(str(name))
        return LiveAttempt(
            id=str(name),
            name=name,
            desired=job.desired,
            launched=attempt.launched,
            stop_requested_at=job.asked_at,
            last_heartbeat_at=attempt.heartbeat_at,
            inspected_at=inspected,
            notified=notified,
            running=job.status is JobStatus.RUNNING,
            made_progress=lifecycle.made_a_step(attempt.start_step, attempt.step),
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

    def random_job(self) -> Job | None:
        return self.rng.choice(list(self.jobs.values())) if self.jobs else None

    # Invariants

    def check(self) -> None:
        living: dict[str, int] = {}
        for name, process in self.processes.items():
            if process.is_alive:
                living[name.job_id] = living.get(name.job_id, 0) + 1
        assert max(living.values(), default=0) <= 1, "I1: two attempts of one job live"
        leased: dict[str, int] = {}
        for holder in self.leases.values():
            leased[holder] = leased.get(holder, 0) + 1
        for job in self.jobs.values():
            live = job.status in LIVE
            assert leased.pop(job.id, 0) == (job.ranks if live else 0), f"I3: {job.id} is {job.status}"
            assert live == bool(job.attempts and not job.latest.ended), f"{job.id} is {job.status}"
            assert job.status is not JobStatus.SUCCEEDED or job.completed, "I9"
        assert leased == {}, "I3: a lease without a job"

    def drain(self) -> None:
        """No more faults: every job ends or becomes idle, no process is left, every device is free."""
        self.rng.seed(self.seed)
        self.late_launches.clear()
        for _ in range(60):
            self.now += timedelta(seconds=31)
            self.schedule()
            self.agents_send_heartbeats()
            for name, process in list(self.processes.items()):
                if process.agent:
                    self.heartbeat(name, process)
                    self.exit_process(name, process, *FINAL_EXITS[process.requested])
            self.check()
            if self.is_idle():
                break
        resting = {JobStatus.PAUSED, JobStatus.INTERRUPTED, *TERMINAL}
        stuck = {job.id: job.status for job in self.jobs.values() if job.status not in resting}
        assert stuck == {}, "a job is stuck"
        waiting = [job.id for job in self.jobs.values() if job.restart_at is not None]
        assert waiting == [], "a restart that never came"
        assert self.leases == {}

    def is_idle(self) -> bool:
        waiting = any(job.restart_at is not None or job.status is JobStatus.QUEUED for job in self.jobs.values())
        return not self.leases and not waiting


def replay(seed: int, events: Iterable[tuple[str, int]]) -> SimulatedCluster:
    """Do ``events`` in a new cluster of ``seed`` and drain it. Raises AssertionError for a broken invariant."""
    cluster = SimulatedCluster(seed)
    for event in events:
        cluster.do(Event(*event))
        cluster.check()
    cluster.drain()
    return cluster


def lost_report(now: datetime, step: int) -> ExitReport:
    """Return a launcher's report of an attempt whose agent left none."""
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


EXITS: tuple[tuple[Outcome, Reason | None], ...] = (
    ("completed", None),
    ("stopped", Reason.USER),
    ("failed", Reason.DIVERGED),
    ("crashed", Reason.WORKER_CRASHED),
    ("crashed", Reason.WORKER_CRASHED),
    ("crashed", Reason.LAUNCH_FAILED),
    ("crashed", Reason.UNKNOWN),
    ("crashed", Reason.HOST_RESTARTED),
)

FINAL_EXITS: dict[Desired, tuple[Outcome, Reason | None]] = {
    Desired.RUN: ("completed", None),
    Desired.PAUSE: ("stopped", Reason.USER),
    Desired.CANCEL: ("stopped", Reason.USER),
    Desired.KILL: ("killed", Reason.USER),
}

EVENT_WEIGHTS: dict[Callable[[SimulatedCluster], None], int] = {
    SimulatedCluster.submit: 3,
    SimulatedCluster.request_action: 4,
    SimulatedCluster.schedule: 10,
    SimulatedCluster.crash_while_scheduling: 2,
    SimulatedCluster.late_launch: 2,
    SimulatedCluster.agents_send_heartbeats: 9,
    SimulatedCluster.agents_act: 9,
    SimulatedCluster.agent_is_killed: 1,
    SimulatedCluster.time_passes: 8,
    SimulatedCluster.clock_is_set: 1,
}
EVENT_TYPES, WEIGHTS = list(EVENT_WEIGHTS), list(EVENT_WEIGHTS.values())
