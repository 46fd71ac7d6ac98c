"""Carries out what the plan decided. Launchers are called between transactions, never inside one."""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import assert_never

from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.failpoints import failpoint
from trainyard.contract.messages import ErrorCard, ExitReport, RunSettings
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Desired, JobStatus, Reason
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow, DeviceLeaseRow, JobRow
from trainyard.service.errors import Conflict, JobNotFound
from trainyard.service.ids import new_id, token_hash
from trainyard.service.ingest import events, exits
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.launch.base import (
    LOCAL,
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    Launcher,
    LauncherUnavailable,
    LaunchRefused,
    Placement,
)
from trainyard.service.leadership import LeaderLease, fenced
from trainyard.service.scheduler.plan import (
    Action,
    Inspect,
    Kill,
    NotifyStop,
    Preempt,
    Restart,
    Start,
)
from trainyard.service.scheduler.published_inventory import InventorySnapshot
from trainyard.service.scheduler.snapshot import LiveAttempt, SchedulerMemory
from trainyard.service.timing import Timing

MAX_UNACKED_LINES = 2000

log = logging.getLogger("trainyard")


class PlanExecutor:
    """Does one action at a time. ``clock`` gives the time in UTC. Without a ``lease`` it is alone on its database."""

    def __init__(
        self,
        database: Database,
        launcher: Launcher,
        memory: SchedulerMemory,
        clock: Callable[[], datetime],
        lease: LeaderLease | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self._timing = timing
        self._database = database
        self._launcher = launcher
        self._memory = memory
        self._clock = clock
        self._lease = lease
        self._living: set[AttemptRef] = set()

    def write(self) -> contextlib.AbstractContextManager[Session]:
        """A transaction that is refused where another service schedules. Raises Deposed."""
        return fenced(self._database, self._lease)

    def _leads(self) -> bool:
        """Whether what was looked at is still ours to act on: this process may have been stopped since."""
        return self._lease is None or self._lease.fresh()

    def execute(self, action: Action) -> bool:
        """Carry ``action`` out. True where devices or jobs were freed, so that another look is worth it at once."""
        try:
            match action:
                case Start():
                    return self._start(action)
                case Restart():
                    return self._restart(action.job_id)
                case Inspect():
                    return self._inspect(action.attempt)
                case NotifyStop():
                    return self._notify_stop(action.attempt)
                case Kill():
                    return self._kill(action.attempt)
                case Preempt():
                    return self._preempt(action)
                case _:
                    assert_never(action)
        except (Conflict, JobNotFound):
            return True  # somebody was faster; the next snapshot shows what is true now

    @failpoint("launch.scheduler.start")
    def _start(self, action: Start) -> bool:
        launch = self._claim(action)
        if launch is None or not self._leads():
            return False  # stopped right here for long: whoever leads now finds that it was never launched
        self._memory.inspected_at[launch.attempt_id] = self._clock()
        where = ",".join(launch.devices) or launch.name.launcher
        log.info("launching", extra={**launch.name.fields, "devices": where})
        try:
            self._launcher.start(launch)
        except LauncherUnavailable as trouble:
            # Whether it was launched is found out by looking, as after a death of ours at this point.
            log.warning("not known to be launched: %s", trouble, extra=launch.name.fields)
            return False
        except Exception as error:
            if not isinstance(error, LaunchRefused):
                log.exception("the launcher failed", extra=launch.name.fields)
            self._launch_refused(launch, error)
            return True
        with self.write() as session:
            job, attempt = events.lock(session, launch.attempt_id, launch.name.job_id)
            attempt.launched_at = attempt.launched_at or self._clock()
            job.heard_at = job.heard_at or attempt.launched_at
        return False

    @failpoint("launch.scheduler.claim")
    def _claim(self, action: Start) -> Launch | None:
        """Queued -> starting, the attempt's row and its leases, all or nothing."""
        token = secrets.token_urlsafe(32)
        try:
            with self.write() as session:
                job = repository.lock(session, action.job_id)
                return _claimed(session, job, action.devices, token, self._clock())
        except IntegrityError:
            return None  # a device was leased in between

    def _launch_refused(self, launch: Launch, why: Exception) -> None:
        hint = why.hint if isinstance(why, LaunchRefused) else None
        report = ExitReport(
            outcome="crashed",
            step=0,
            reason=Reason.LAUNCH_FAILED,
            message=f"the launch failed: {why}",
            error=ErrorCard(code=Reason.LAUNCH_FAILED, message=str(why), hint=hint),
            last_seq=0,
            ended_at=self._clock(),
        )
        self._close(launch.attempt_id, launch.name, report)

    def _restart(self, job_id: str) -> bool:
        with self.write() as session:
            job = repository.lock(session, job_id)
            if job.status != JobStatus.INTERRUPTED or job.restart_at is None:
                return False
            note = EventDraft("status", "the back-off is over: queued again", "scheduler")
            changes = {"restart_at": None, "trigger": "restart", "desired": Desired.RUN}
            repository.transition(session, job, JobStatus.QUEUED, note, self._clock(), **changes)
        return True

    def probe_agents(self, names: Sequence[AttemptRef]) -> None:
        """Before many are looked at one by one: see which of them live by one look at the host for all of them."""
        self._living = self._launcher.find_alive(names) if len(names) > 1 else set()

    def _inspect(self, live: LiveAttempt) -> bool:
        self._memory.inspected_at[live.id] = self._clock()
        # That it lived a moment ago is all that is taken from the glance. Whatever ends something is looked at anew.
        found = AttemptStatus(AttemptState.ALIVE) if live.name in self._living else self._launcher.find(live.name)
        if not self._leads():
            return False
        match found.state:
            case AttemptState.UNKNOWN:
                self._wait_for_answer(live, found.silence)
                return False
            case AttemptState.ALIVE:
                self._adopt(live, found)
                if live.tailed or (found.placement is not None and found.placement.nodes):
                    self._tail(live)
                return False
            case AttemptState.ENDED:
                return self._ended(live, found)
            case AttemptState.ORPHANED:
                log.warning("an attempt has lost its agent", extra=live.name.fields)
                self._launcher.kill(live.name)
                return self._ended(live, self._launcher.find(live.name))
            case AttemptState.ABSENT:
                return self._absent(live)
            case _:
                assert_never(found.state)

    def _adopt(self, live: LiveAttempt, found: AttemptStatus) -> None:
        placement = found.placement.to_json() if found.placement is not None else live.placement
        if live.launched and live.placement == placement:
            return
        with self.write() as session:
            job, attempt = events.lock(session, live.id, live.name.job_id)
            attempt.placement = dict(placement) if placement is not None else None
            if not live.launched:
                attempt.launched_at = attempt.launched_at or self._clock()
                note = EventDraft(
                    "adopted", f"attempt {live.name.number} was found running", "scheduler", live.name.number
                )
                repository.record_event(session, job, note, self._clock())

    def _wait_for_answer(self, live: LiveAttempt, silence: str | None) -> None:
        """Have a job whose cluster says nothing tell why it stands still, until it is known where it runs."""
        before = live.placement or Placement("", "unknown").to_json()
        if live.placed or silence is None or before["waiting_for"] == silence:
            return
        with self.write() as session:
            _, attempt = events.lock(session, live.id, live.name.job_id)
            attempt.placement = {**before, "waiting_for": silence}

    def _tail(self, live: LiveAttempt) -> None:
        """Read what an agent has shipped to nobody: it cannot reach us, or has not for a while.

        That the cluster runs it is its sign of life then.
        """
        self._ingest_remaining(live)
        with self.write() as session:
            job, attempt = events.lock(session, live.id, live.name.job_id)
            if attempt.acked_seq:
                events.record_contact(session, job, attempt, self._clock())
            settings = RunSettings.of(job.spec)
        self._launcher.settle(live.name, settings)

    def _ended(self, live: LiveAttempt, found: AttemptStatus) -> bool:
        if found.state is not AttemptState.ENDED or found.report is None:
            return False
        self._ingest_remaining(live)
        self._close(live.id, live.name, found.report)
        return True

    def _ingest_remaining(self, live: LiveAttempt) -> None:
        """Store the lines that the agent could not deliver any more."""
        acked = self._acked(live)
        while lines := self._launcher.unacked_lines(live.name, acked, MAX_UNACKED_LINES):
            with self.write() as session:
                job, attempt = events.lock(session, live.id, live.name.job_id)
                new = events.ingest(session, job, attempt, lines)
                acked = attempt.acked_seq
            if not new:
                return

    def _acked(self, live: LiveAttempt) -> int:
        with self._database.read() as session:
            attempt = session.get(AttemptRow, live.id)
            return attempt.acked_seq if attempt is not None else 0

    def _absent(self, live: LiveAttempt) -> bool:
        # Whoever was about to start it may only be slow: from here on it cannot begin any more.
        self._launcher.kill(live.name)
        found = self._launcher.find(live.name)
        if found.state is not AttemptState.ABSENT:
            return self._ended(live, found)
        if not live.launched and live.last_heartbeat_at is None:
            with self.write() as session:
                job, attempt = events.lock(session, live.id, live.name.job_id)
                exits.never_launched(session, job, attempt, self._clock())
            return True
        message = "nothing is left of the attempt, neither processes nor files"
        report = ExitReport(
            outcome="crashed",
            step=0,
            reason=Reason.AGENT_LOST,
            message=message,
            last_seq=0,
            ended_at=self._clock(),
        )
        self._close(live.id, live.name, report)
        return True

    def _close(self, attempt_id: str, name: AttemptRef, report: ExitReport) -> None:
        with self.write() as session:
            job, attempt = events.lock(session, attempt_id, name.job_id)
            exits.close_attempt(session, job, attempt, report, self._clock(), self._timing)

    def _notify_stop(self, live: LiveAttempt) -> bool:
        try:
            self._launcher.stop(live.name)
        except LauncherUnavailable as trouble:
            log.warning("not told to stop yet: %s", trouble, extra=live.name.fields)
            return False  # told again in the next round
        self._memory.notified[live.id] = live.desired
        return False

    def _kill(self, live: LiveAttempt) -> bool:
        self._launcher.kill(live.name)
        self._memory.inspected_at.pop(live.id, None)
        return True

    def _preempt(self, action: Preempt) -> bool:
        """Running -> pausing, for a job of higher priority that still waits."""
        name = action.attempt.name
        with self.write() as session:
            job = repository.lock(session, name.job_id)
            waiting = repository.find(session, action.job_id)
            if not _yields(job, name.number, waiting):
                return False
            message = f"makes room for {waiting.id} (priority {waiting.priority}): saves, and goes on by itself later"
            note = EventDraft("status", message, "scheduler", name.number, data={"preempted_by": waiting.id})
            changes = {"desired": Desired.PAUSE, "preempted_by": waiting.id, "asked_at": self._clock()}
            repository.transition(
                session, job, JobStatus.PAUSING, note, self._clock(), **changes, reason=Reason.PREEMPTED
            )
            told = f"{job.id} (priority {job.priority}) makes room for this job"
            repository.record_event(
                session, waiting, EventDraft("preempts", told, "scheduler", data={"job_id": job.id}), self._clock()
            )
        return True

    def publish(self, bulletin: InventorySnapshot) -> None:
        """Say to the other services what is leased out here. Alone on its database there is nobody to tell."""
        if self._lease is not None:
            with self.write() as session:
                bulletin.write(session)


def _yields(job: JobRow, attempt: int, waiting: JobRow) -> bool:
    """Whether what the plan saw is still so."""
    runs = (job.status, job.desired, job.attempt) == (JobStatus.RUNNING, Desired.RUN, attempt)
    return runs and waiting.status == JobStatus.QUEUED and waiting.priority > job.priority


@failpoint("launch.scheduler.insert")
def _claimed(session: Session, job: JobRow, devices: Sequence[str], token: str, now: datetime) -> Launch | None:
    if job.status != JobStatus.QUEUED:
        return None
    spec = _attempt_spec(job, devices)
    name = AttemptRef(job.id, job.attempt + 1, spec.resources.launcher or LOCAL)
    attempt = AttemptRow(
        id=new_id("att", 16),
        job_id=job.id,
        number=name.number,
        token_sha256=token_hash(token),
        trigger=job.trigger,
        devices=list(devices),
        launcher=name.launcher,
        created_at=now,
    )
    session.add(attempt)
    session.flush()
    leases = [{"device": device, "attempt_id": attempt.id, "job_id": job.id} for device in devices]
    if leases:
        session.execute(insert(DeviceLeaseRow), leases)
    where = ", ".join(devices) or name.launcher
    note = EventDraft("status", f"starting attempt {name.number} on {where}", "scheduler", name.number)
    changes = {"attempt": name.number, "reason": None, "message": None, "error": None, "heard_at": None}
    repository.transition(session, job, JobStatus.STARTING, note, now, **changes, phase=None, phase_detail=None)
    return Launch(name, attempt.id, spec, tuple(devices), token, job.resume_step)


def _attempt_spec(job: JobRow, devices: Sequence[str]) -> JobSpec:
    """The job's spec for this attempt. Which GPU is the lease's business: the worker sees only those it has."""
    spec = JobSpec.model_validate_json(json.dumps(job.spec))
    if not devices or not spec.resources.device.startswith("cuda:"):
        return spec
    kind = devices[0].partition(":")[0]
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"device": kind})})
