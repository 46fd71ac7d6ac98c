"""Execution of the scheduler's actions. Launchers are called between transactions, never inside one."""

import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
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
from trainyard.service.devices.inventory import Device, cuda_visible
from trainyard.service.errors import Conflict, JobNotFound
from trainyard.service.ids import new_id, token_hash
from trainyard.service.ingest import events, exits
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.launch.base import (
    LOCAL,
    AttemptPlacement,
    AttemptRef,
    AttemptState,
    AttemptStatus,
    Launch,
    Launcher,
    LauncherUnavailable,
    LaunchRefused,
)
from trainyard.service.leadership import LeaderLease, fenced
from trainyard.service.scheduler.plan import Action, Inspect, Kill, NotifyStop, Preempt, Reclaim, Restart, Start
from trainyard.service.scheduler.preparation_executor import PreparationExecutor
from trainyard.service.scheduler.published_inventory import InventorySnapshot
from trainyard.service.scheduler.snapshot import LiveAttempt, SchedulerMemory
from trainyard.service.timing import Timing

MAX_UNACKED_LINES = 2000

log = logging.getLogger("trainyard")


class PlanExecutor:
    """Executes one action at a time.

    ``clock`` returns the time in UTC. ``lease`` is None if no other service uses the database. ``cache``: the corpus
    cache. ``reclaim``: ends the side process that has a device.
    """

    def __init__(
        self,
        database: Database,
        launcher: Launcher,
        memory: SchedulerMemory,
        clock: Callable[[], datetime],
        lease: LeaderLease | None = None,
        timing: Timing = Timing(),
        cache: Path = Path("cache"),
        home: Path = Path("home"),
    ) -> None:
        self._timing = timing
        self._database = database
        self._launcher = launcher
        self._memory = memory
        self._clock = clock
        self._lease = lease
        self._alive: set[AttemptRef] = set()
        self.service_stops = False
        self._preparations = PreparationExecutor(
            self.write, self._still_leads, launcher, memory, clock, cache, home, timing
        )
        self.reclaim: Callable[[str], None] = lambda _: None
        self.inventory: Sequence[Device] = ()
        """The devices of the round's snapshot."""

    def write(self) -> contextlib.AbstractContextManager[Session]:
        """Open a transaction; raise LeadershipLost if another service leads."""
        return fenced(self._database, self._lease)

    def _still_leads(self) -> bool:
        # This process may have been suspended since it read the snapshot.
        return self._lease is None or self._lease.confirm()

    def execute(self, action: Action) -> bool:
        """Execute ``action``.

        Return True if it freed devices or changed jobs, so that the next round is due at once.
        """
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
                case Reclaim():
                    log.info("a side process makes room", extra={"devices": action.device})
                    self.reclaim(action.device)
                    return True
                case _:
                    return self._preparations.execute(action)
        except (Conflict, JobNotFound):
            return True  # the job has changed since the snapshot; the next round reads it again

    @failpoint("launch.scheduler.start")
    def _start(self, action: Start) -> bool:
        launch = self._claim(action)
        if launch is None or not self._still_leads():
            # If another service leads now, it finds that the attempt was never launched, and queues the job again.
            return False
        self._memory.inspected_at[launch.attempt_id] = self._clock()
        where = ",".join(launch.devices) or launch.name.launcher
        log.info("launching", extra={**launch.name.fields, "devices": where})
        try:
            self._launcher.start(launch)
        except LauncherUnavailable as error:
            # It may have been launched. The next inspection finds out, as after a crash at this point.
            log.warning("launch not confirmed: %s", error, extra=launch.name.fields)
            return False
        except Exception as error:
            if not isinstance(error, LaunchRefused):
                log.exception("the launcher failed", extra=launch.name.fields)
                self._launcher.kill(launch.name)  # it may have started the agent
            self._launch_refused(launch, error)
            return True
        with self.write() as session:
            job, attempt = events.lock(session, launch.attempt_id, launch.name.job_id)
            attempt.launched_at = attempt.launched_at or self._clock()
            job.heard_at = job.heard_at or attempt.launched_at
        return False

    @failpoint("launch.scheduler.claim")
    def _claim(self, action: Start) -> Launch | None:
        """Move the job from queued to starting and insert the attempt and its leases, in one transaction."""
        token = secrets.token_urlsafe(32)
        try:
            with self.write() as session:
                job = repository.lock(session, action.job_id)
                return _create_attempt(session, job, action.devices, token, self._clock(), self.inventory)
        except IntegrityError:
            return None  # another transaction has leased a device since the snapshot

    def _launch_refused(self, launch: Launch, error: Exception) -> None:
        hint = error.hint if isinstance(error, LaunchRefused) else None
        card = ErrorCard(code=Reason.LAUNCH_FAILED, message=str(error), hint=hint)
        self._close_crashed(launch.attempt_id, launch.name, Reason.LAUNCH_FAILED, f"the launch failed: {error}", card)

    def _restart(self, job_id: str) -> bool:
        with self.write() as session:
            job = repository.lock(session, job_id)
            if job.status != JobStatus.INTERRUPTED or job.restart_at is None:
                return False
            event = EventDraft("status", "the back-off is over: queued again", "scheduler")
            changes = {"restart_at": None, "trigger": "restart", "desired": Desired.RUN}
            repository.transition(session, job, JobStatus.QUEUED, event, self._clock(), **changes)
        return True

    def probe_agents(self, names: Sequence[AttemptRef]) -> None:
        """Scan the host once for the live agents of ``names``. Those that are found need no inspection of their own."""
        self._alive = self._launcher.find_alive(names) if len(names) > 1 else set()

    def _inspect(self, live: LiveAttempt) -> bool:
        self._memory.inspected_at[live.id] = self._clock()
        # An agent that the scan did not find may be alive: find() inspects the attempt before anything is ended.
        status = AttemptStatus(AttemptState.ALIVE) if live.name in self._alive else self._launcher.find(live.name)
        if not self._still_leads():
            return False
        match status.state:
            case AttemptState.UNKNOWN:
                self._record_silence(live, status.silence)
                return False
            case AttemptState.ALIVE:
                self._adopt(live, status)
                if live.tailed or (status.placement is not None and status.placement.nodes):
                    self._tail(live)
                return False
            case AttemptState.ENDED:
                return self._handle_ended(live, status)
            case AttemptState.ORPHANED:
                log.warning("an attempt has lost its agent", extra=live.name.fields)
                self._launcher.kill(live.name)
                return self._handle_ended(live, self._launcher.find(live.name))
            case AttemptState.ABSENT:
                return self._handle_absent(live)
            case _:
                assert_never(status.state)

    def _adopt(self, live: LiveAttempt, status: AttemptStatus) -> None:
        placement = status.placement.to_json() if status.placement is not None else live.placement
        if live.launched and live.placement == placement:
            return
        with self.write() as session:
            job, attempt = events.lock(session, live.id, live.name.job_id)
            attempt.placement = dict(placement) if placement is not None else None
            if not live.launched:
                attempt.launched_at = attempt.launched_at or self._clock()
                event = EventDraft(
                    "adopted", f"attempt {live.name.number} was found running", "scheduler", live.name.number
                )
                repository.record_event(session, job, event, self._clock())

    def _record_silence(self, live: LiveAttempt, silence: str | None) -> None:
        # Until the nodes of an attempt are known, its placement shows that the cluster does not answer.
        before = live.placement or AttemptPlacement("", "unknown").to_json()
        if live.placed or silence is None or before["waiting_for"] == silence:
            return
        with self.write() as session:
            _, attempt = events.lock(session, live.id, live.name.job_id)
            attempt.placement = {**before, "waiting_for": silence}

    def _tail(self, live: LiveAttempt) -> None:
        # The agent cannot reach the service, so its outbox is read from the run directory. It cannot send heartbeats
        # either: an answer of the cluster that the job runs counts as one.
        self._ingest_remaining(live)
        with self.write() as session:
            job, attempt = events.lock(session, live.id, live.name.job_id)
            if attempt.acked_seq:
                events.record_contact(session, job, attempt, self._clock())
            settings = RunSettings.of(job.spec)
        self._launcher.write_settings(live.name, settings)

    def _handle_ended(self, live: LiveAttempt, status: AttemptStatus) -> bool:
        if status.state is not AttemptState.ENDED or status.report is None:
            return False
        self._ingest_remaining(live)
        self._close(live.id, live.name, status.report)
        return True

    def _ingest_remaining(self, live: LiveAttempt) -> None:
        """Store the outbox lines that the agent has not delivered."""
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

    def _handle_absent(self, live: LiveAttempt) -> bool:
        # A slow process or a former leader may still launch this attempt. kill() closes the attempt first, so that an
        # agent that starts late exits at once.
        self._launcher.kill(live.name)
        status = self._launcher.find(live.name)
        if status.state is not AttemptState.ABSENT:
            return self._handle_ended(live, status)
        if not live.launched and live.last_heartbeat_at is None:
            with self.write() as session:
                job, attempt = events.lock(session, live.id, live.name.job_id)
                exits.never_launched(session, job, attempt, self._clock())
            return True
        message = "nothing is left of the attempt, neither processes nor files"
        self._close_crashed(live.id, live.name, Reason.AGENT_LOST, message)
        return True

    def _close_crashed(
        self, attempt_id: str, name: AttemptRef, reason: Reason, message: str, card: ErrorCard | None = None
    ) -> None:
        now = self._clock()
        report = ExitReport(
            outcome="crashed", step=0, reason=reason, message=message, error=card, last_seq=0, ended_at=now
        )
        self._close(attempt_id, name, report)

    def _close(self, attempt_id: str, name: AttemptRef, report: ExitReport) -> None:
        with self.write() as session:
            job, attempt = events.lock(session, attempt_id, name.job_id)
            exits.close_attempt(
                session, job, attempt, report, self._clock(), self._timing, service_stops=self.service_stops
            )

    def _notify_stop(self, live: LiveAttempt) -> bool:
        # The second of two ways: see NotifyStop.
        try:
            self._launcher.stop(live.name)
        except LauncherUnavailable as error:
            log.warning("stop request not delivered yet: %s", error, extra=live.name.fields)
            return False  # the next round tries again
        self._memory.notified[live.id] = live.desired
        return False

    def _kill(self, live: LiveAttempt) -> bool:
        self._launcher.kill(live.name)
        self._memory.inspected_at.pop(live.id, None)
        return True

    def _preempt(self, action: Preempt) -> bool:
        name = action.attempt.name
        with self.write() as session:
            job = repository.lock(session, name.job_id)
            waiting = repository.find(session, action.job_id)
            if not _may_preempt(job, name.number, waiting):
                return False
            message = (
                f"makes room for {waiting.id} (priority {waiting.priority}): saves, and resumes automatically later"
            )
            event = EventDraft("status", message, "scheduler", name.number, data={"preempted_by": waiting.id})
            changes = {"desired": Desired.PAUSE, "preempted_by": waiting.id, "asked_at": self._clock()}
            repository.transition(
                session, job, JobStatus.PAUSING, event, self._clock(), **changes, reason=Reason.PREEMPTED
            )
            message = f"{job.id} (priority {job.priority}) makes room for this job"
            repository.record_event(
                session, waiting, EventDraft("preempts", message, "scheduler", data={"job_id": job.id}), self._clock()
            )
        return True

    def publish(self, inventory: InventorySnapshot) -> None:
        """Publish the devices and the preemption setting for the services that do not schedule."""
        if self._lease is not None:
            with self.write() as session:
                inventory.write(session)


def _may_preempt(job: JobRow, number: int, waiting: JobRow) -> bool:
    is_running = (job.status, job.desired, job.attempt) == (JobStatus.RUNNING, Desired.RUN, number)
    return is_running and waiting.status == JobStatus.QUEUED and waiting.priority > job.priority


@failpoint("launch.scheduler.insert")
def _create_attempt(
    session: Session, job: JobRow, devices: Sequence[str], token: str, now: datetime, inventory: Sequence[Device]
) -> Launch | None:
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
    event = EventDraft("status", f"starting attempt {name.number} on {where}", "scheduler", name.number)
    changes = {"attempt": name.number, "reason": None, "message": None, "error": None, "heard_at": None}
    repository.transition(session, job, JobStatus.STARTING, event, now, **changes, phase=None, phase_detail=None)
    visible = cuda_visible(devices, inventory)
    return Launch(name, attempt.id, spec, tuple(devices), token, job.resume_step, cuda_visible=visible)


def _attempt_spec(job: JobRow, devices: Sequence[str]) -> JobSpec:
    # The lease decides which GPU the job gets: CUDA_VISIBLE_DEVICES hides the others, so "cuda:1" would not exist.
    spec = JobSpec.model_validate_json(json.dumps(job.spec))
    if not devices or not spec.resources.device.startswith("cuda:"):
        return spec
    kind = devices[0].partition(":")[0]
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"device": kind})})
