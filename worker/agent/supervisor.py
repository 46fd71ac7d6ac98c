"""One attempt under supervision: look, decide, act. The decision is `worker.agent.escalation.decide`."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FrameType
from typing import Self

from trainyard.contract.messages import ExitReport, RunSettings
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir, write_json
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import Desired
from trainyard.worker.agent.escalation import (
    EscalationStep,
    Observation,
    StopCause,
    next_step,
)
from trainyard.worker.agent.exit_report import apply_time_limit, collect_evidence, diagnose
from trainyard.worker.agent.follower import PeerNodes
from trainyard.worker.agent.hang_detector import HangDetector
from trainyard.worker.agent.oom import OomMonitor, of_this_agent
from trainyard.worker.agent.processes import ProcessTree
from trainyard.worker.agent.rendezvous import SINGLE_NODE, NodeInfo
from trainyard.worker.agent.uploader import EventUploader

STACKS_SECONDS = 1.0


@dataclass
class Supervisor:
    """What is known of the attempt, and the one loop step that acts on it."""

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
    termed_at: float | None = None
    cause: StopCause | None = None
    report: ExitReport | None = None
    supervisor_error: str | None = None

    @classmethod
    def of(cls, attempt: AttemptDir, children: ProcessTree, place: NodeInfo = SINGLE_NODE) -> Self:
        """Start shipping and watching ``attempt``, whose torchrun has just been started."""
        spec = JobSpec.model_validate_json(attempt.spec.read_bytes())
        shipper = EventUploader.from_environment(attempt)
        shipper.start()
        watch = HangDetector(attempt, OutboxReader(attempt.outbox), spec.resources.timeouts)
        others = PeerNodes(attempt, place)
        settings = RunSettings.of(spec.model_dump())
        return cls(attempt, children, spec, shipper, watch, of_this_agent(), settings, place, others)

    def on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        """SIGTERM to the agent is a wish to save and stop: it comes from a host that shuts down, or from a person.

        So is SIGURG on a cluster, by which the service has it look for what was left in the attempt's directory.
        """
        self.received_signal.set()

    def is_running(self, now: float) -> bool:
        """`step`, on a host in trouble too: a disk that is full or away for a while must not cost a good run."""
        try:
            running = self.step(now)
        except OSError as trouble:
            if self.supervisor_error != str(trouble):
                print(f"agent: {trouble}; training goes on", flush=True)
            self.supervisor_error = str(trouble)
            return True
        self.supervisor_error = None
        return running

    def step(self, now: float) -> bool:
        """Look once and act once; False as soon as nothing of the attempt lives."""
        seen = self._poll(now)
        action, cause = next_step(seen, self.spec.resources.timeouts, now)
        self.cause = self.cause or cause
        match action:
            case EscalationStep.WAIT:
                self._write_settings()
            case EscalationStep.ASK:
                self.stop_requested_at = now
                self._request_stop()
            case EscalationStep.TERMINATE:
                self.processes.terminate()
                self.termed_at = now
            case EscalationStep.KILL:
                self._keep_stacks(cause)
                return not self.processes.kill()
        return True

    def _write_settings(self) -> None:
        """Leave what the user has changed where rank 0 looks for it. Raises OSError, and is tried again then."""
        settings = self.uploader.settings
        if settings is not None and settings != self.settings:
            write_json(self.attempt.settings, settings.model_dump())
            self.settings = settings

    def _request_stop(self) -> None:
        try:
            self.attempt.stop.touch()
        except OSError:
            self.processes.terminate()  # no room even for an empty file: SIGTERM is the same wish

    def _poll(self, now: float) -> Observation:
        self.hang_detector.poll(now)
        self.oom_monitor.poll(now)
        self.peers.poll(now)
        return Observation(
            torchrun_ended=self.processes.torchrun_status() is not None,
            desired=Desired.KILL if self._grace_is_over() else self.uploader.desired,
            received_signal=self.received_signal.is_set() or self._limit_near() or self._stop_left(),
            stop_requested_at=self.stop_requested_at,
            termed_at=self.termed_at,
            is_hung=self.hang_detector.is_hung(now),
            peer_lost=self.peers.lost(now) or self._is_orphaned(),
        )

    def _limit_near(self) -> bool:
        """Whether the cluster will end the attempt soon."""
        return self.node.clustered and self.attempt.time_limit.exists()

    def _stop_left(self) -> bool:
        """Whether a stop was asked for where this agent may not have been there to hear the signal."""
        return self.node.clustered and self.attempt.stop.exists()

    def _grace_is_over(self) -> bool:
        """Whether the service has the cluster end the attempt: to the ranks that begins as a wish to stop does."""
        return self.node.clustered and self.attempt.closed.exists()

    def _is_orphaned(self) -> bool:
        """Whether what the cluster had put above this agent is gone: to the cluster nothing runs here any more."""
        return self.node.clustered and os.getppid() != self.parent

    def _keep_stacks(self, cause: StopCause | None) -> None:
        """Where it hangs is in the ranks' logs before anything is killed: the ranks print their stacks on SIGUSR2."""
        if cause is not StopCause.HUNG:
            return
        for process in self.processes.alive():
            if process.pid != self.processes.torchrun.pid:
                process.send(signal.SIGUSR2)
        time.sleep(STACKS_SECONDS)

    def write_report(self) -> None:
        """Publish exit.json: from here on the attempt's end is on disk, whatever happens to agent and service."""
        shortage = self.oom_monitor.report(time.monotonic())
        if self.node.nodes > 1:
            self.attempt.over.touch()
            self.peers.wait_for_exits()
        evidence = collect_evidence(self.attempt, self.processes.torchrun.returncode, shortage, self.peers)
        self.report = diagnose(
            evidence, self.cause, last_seq=OutboxReader(self.attempt.outbox).skip_to_end(), now=datetime.now(UTC)
        )
        if self._limit_near() and self.uploader.desired is Desired.RUN:
            self.report = apply_time_limit(self.report)
        write_json(self.attempt.exit, self.report.model_dump(mode="json"))

    def deliver(self) -> None:
        """Ship what is left and the report, within a bounded time: the service also finds both on disk."""
        assert self.report is not None
        self.uploader.finish(self.report)
