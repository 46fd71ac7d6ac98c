"""Supervises one attempt: observe, decide, act. `next_step` decides, a pure function of the observation."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from types import FrameType
from typing import Self, assert_never

from trainyard.contract.messages import ExitReport, RunSettings
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir, write_json
from trainyard.contract.spec import JobSpec, Timeouts
from trainyard.contract.status import Desired
from trainyard.worker.agent.exit_report import (
    StopCause,
    apply_time_limit,
    collect_evidence,
    diagnose,
    diagnose_preparation,
)
from trainyard.worker.agent.follower import PeerNodes
from trainyard.worker.agent.hang_detector import HangDetector
from trainyard.worker.agent.oom import OomMonitor, monitor_own_processes
from trainyard.worker.agent.rendezvous import SINGLE_NODE, NodeInfo
from trainyard.worker.agent.torchrun import ProcessTree
from trainyard.worker.agent.uploader import EventUploader


class EscalationStep(StrEnum):
    """One step of the escalation. KILL also removes what is left once torchrun has ended."""

    WAIT = "wait"
    REQUEST_STOP = "request_stop"
    TERMINATE = "terminate"
    KILL = "kill"


@dataclass(frozen=True)
class Observation:
    """What the agent knows at one moment; times are of the monotonic clock, in seconds."""

    torchrun_ended: bool
    desired: Desired
    received_signal: bool
    stop_requested_at: float | None
    terminated_at: float | None
    is_hung: bool
    peer_lost: bool = False


def next_step(observed: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    """Return the next action, and the cause if it ends the ranks."""
    if observed.torchrun_ended:
        # After our SIGTERM or a kill request, an exit without an outcome of rank 0 was caused by us: no crash.
        cause = StopCause.KILLED if observed.desired is Desired.KILL else None
        return EscalationStep.KILL, cause if observed.terminated_at is None else StopCause.OVERDUE
    if observed.peer_lost:
        return EscalationStep.KILL, StopCause.PEER_LOST
    match observed.desired:
        case Desired.KILL:
            return EscalationStep.KILL, StopCause.KILLED
        case Desired.PAUSE | Desired.CANCEL:
            return _escalate(observed, timeouts, now)
        case Desired.RUN:
            if observed.received_signal or observed.stop_requested_at is not None:
                # A stop is never withdrawn: the ranks may be in the middle of their last save.
                return _escalate(observed, timeouts, now)
            return (EscalationStep.KILL, StopCause.HUNG) if observed.is_hung else (EscalationStep.WAIT, None)
        case _:
            assert_never(observed.desired)


def _escalate(observed: Observation, timeouts: Timeouts, now: float) -> tuple[EscalationStep, StopCause | None]:
    if observed.stop_requested_at is None:
        return EscalationStep.REQUEST_STOP, None
    if observed.terminated_at is None:
        overdue = now - observed.stop_requested_at >= timeouts.stop
        return EscalationStep.TERMINATE if overdue else EscalationStep.WAIT, None
    overdue = now - observed.terminated_at >= timeouts.term
    return (EscalationStep.KILL, StopCause.OVERDUE) if overdue else (EscalationStep.WAIT, None)


STACK_DUMP_SECONDS = 1.0


@dataclass
class Supervisor:
    """The state of one supervised attempt, and one round of the loop (`step`)."""

    attempt: AttemptDir
    processes: ProcessTree
    spec: JobSpec
    uploader: EventUploader
    hang_detector: HangDetector
    oom_monitor: OomMonitor
    settings: RunSettings
    node: NodeInfo
    peers: PeerNodes
    parent: int = field(default_factory=os.getppid)
    received_signal: threading.Event = field(default_factory=threading.Event)
    stop_requested_at: float | None = None
    terminated_at: float | None = None
    cause: StopCause | None = None
    outcome_is_late: bool = False
    report: ExitReport | None = None
    last_error: str | None = None

    @classmethod
    def of(cls, attempt: AttemptDir, processes: ProcessTree, node: NodeInfo = SINGLE_NODE) -> Self:
        """Start to watch ``attempt``, whose torchrun has just been started, and to upload its events."""
        spec = JobSpec.model_validate_json(attempt.spec.read_bytes())
        uploader = EventUploader.from_environment(attempt)
        uploader.start()
        hang_detector = HangDetector(attempt, OutboxReader(attempt.outbox), spec.resources.timeouts)
        settings, peers = RunSettings.of(spec.model_dump()), PeerNodes(attempt, node)
        return cls(attempt, processes, spec, uploader, hang_detector, monitor_own_processes(), settings, node, peers)

    def on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        """Request a stop with a save: SIGTERM comes from a host that shuts down, or from a person.

        On a cluster the service sends SIGURG after it has written a file into the attempt's directory.
        """
        self.received_signal.set()

    def try_step(self, now: float) -> bool:
        """Run `step`; return True after an OSError: a full or unavailable disk must not end a run."""
        try:
            running = self.step(now)
        except OSError as error:
            if self.last_error != str(error):
                print(f"agent: {error}; training continues", flush=True)
            self.last_error = str(error)
            return True
        self.last_error = None
        return running

    def step(self, now: float) -> bool:
        """Observe and act once. Return False once no process of the attempt is left."""
        observed = self._observe(now)
        action, cause = next_step(observed, self.spec.resources.timeouts, now)
        self.cause = self.cause or cause
        match action:
            case EscalationStep.WAIT:
                self._write_settings()
            case EscalationStep.REQUEST_STOP:
                self.stop_requested_at = now
                self._request_stop()
            case EscalationStep.TERMINATE:
                self.processes.terminate()
                self.terminated_at = now
            case EscalationStep.KILL:
                if cause is StopCause.HUNG:
                    # What a rank reports from here on may be the effect of our signals, and not the cause.
                    self.outcome_is_late = self.outcome_is_late or not self.attempt.outcome.exists()
                    self._dump_stacks()
                return not self.processes.kill()
        return True

    def _write_settings(self) -> None:
        """Write changed settings to the file that rank 0 polls. After an OSError the next step tries again."""
        settings = self.uploader.settings
        if settings is not None and settings != self.settings:
            write_json(self.attempt.settings, settings.model_dump(exclude_unset=True))
            self.settings = settings

    def _request_stop(self) -> None:
        # The service's launcher also touches this file itself: that is faster than the agent's next report.
        try:
            self.attempt.stop.touch()
        except OSError:
            self.processes.terminate()  # a full disk rejects even an empty file; SIGTERM requests the same

    def _observe(self, now: float) -> Observation:
        self.hang_detector.poll(now)
        self.oom_monitor.poll(now)
        self.peers.poll(now)
        clustered = self.node.clustered
        # No service answers the agent of a cluster's attempt or of a preparation in time: both read files.
        by_files = clustered or not self.processes.has_ranks
        return Observation(
            torchrun_ended=self.processes.torchrun_status() is not None,
            # ``closed`` requests a kill. The cluster's first signal alone would look like a stop request.
            desired=Desired.KILL if by_files and self.attempt.closed.exists() else self.uploader.desired,
            # Also read the file ``stop``: its signal may have come before this agent could receive one.
            received_signal=self.received_signal.is_set()
            or self._near_time_limit()
            or (by_files and self.attempt.stop.exists()),
            stop_requested_at=self.stop_requested_at,
            terminated_at=self.terminated_at,
            is_hung=self.hang_detector.is_hung(now),
            # An agent whose parent has changed is no longer tracked by the cluster.
            peer_lost=self.peers.lost(now) or (clustered and os.getppid() != self.parent),
        )

    def _near_time_limit(self) -> bool:
        return self.node.clustered and self.attempt.time_limit.exists()

    def _dump_stacks(self) -> None:
        self.processes.dump_stacks()
        time.sleep(STACK_DUMP_SECONDS)

    def write_report(self) -> None:
        """Write exit.json. From then on the attempt's end is on disk, whatever happens to agent and service.

        If the file cannot be written, the report is only uploaded.
        """
        oom_report = self.oom_monitor.report(time.monotonic())
        if self.node.nodes > 1:
            with suppress(OSError):
                self.attempt.over.touch()
            self.peers.wait_for_exits()
        evidence = collect_evidence(self.attempt, self.processes.torchrun.returncode, oom_report, self.peers)
        if self.outcome_is_late:
            evidence = replace(evidence, outcome=None)
        decide = diagnose if self.processes.has_ranks else diagnose_preparation
        self.report = decide(
            evidence, self.cause, last_seq=OutboxReader(self.attempt.outbox).skip_to_end(), now=datetime.now(UTC)
        )
        if self._near_time_limit() and self.uploader.desired is Desired.RUN:
            self.report = apply_time_limit(self.report)
        try:
            write_json(self.attempt.exit, self.report.model_dump(mode="json"))
        except OSError as error:
            print(f"agent: {error}; the report is only uploaded", flush=True)

    def deliver(self) -> None:
        """Upload the last events and the report within a bounded time. Else the service reads both from disk."""
        assert self.report is not None
        self.uploader.finish(self.report)
