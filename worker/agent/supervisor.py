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
    Action,
    Cause,
    Seen,
    decide,
)
from trainyard.worker.agent.exit_report import at_the_limit, gather, verdict
from trainyard.worker.agent.follower import OtherNodes
from trainyard.worker.agent.hang_detector import ProgressWatch
from trainyard.worker.agent.oom import MemoryWatch, of_this_agent
from trainyard.worker.agent.processes import Children
from trainyard.worker.agent.rendezvous import ALONE, Place
from trainyard.worker.agent.uploader import Shipper

STACKS_SECONDS = 1.0


@dataclass
class Supervisor:
    """What is known of the attempt, and the one loop step that acts on it."""

    attempt: AttemptDir
    children: Children
    spec: JobSpec
    shipper: Shipper
    watch: ProgressWatch
    memory: MemoryWatch
    settings: RunSettings
    place: Place
    others: OtherNodes
    parent: int = field(default_factory=os.getppid)
    signalled: threading.Event = field(default_factory=threading.Event)
    asked_at: float | None = None
    termed_at: float | None = None
    cause: Cause | None = None
    report: ExitReport | None = None
    trouble: str | None = None

    @classmethod
    def of(cls, attempt: AttemptDir, children: Children, place: Place = ALONE) -> Self:
        """Start shipping and watching ``attempt``, whose torchrun has just been started."""
        spec = JobSpec.model_validate_json(attempt.spec.read_bytes())
        shipper = Shipper.from_environment(attempt)
        shipper.start()
        watch = ProgressWatch(attempt, OutboxReader(attempt.outbox), spec.resources.timeouts)
        others = OtherNodes(attempt, place)
        settings = RunSettings.of(spec.model_dump())
        return cls(attempt, children, spec, shipper, watch, of_this_agent(), settings, place, others)

    def on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        """SIGTERM to the agent is a wish to save and stop: it comes from a host that shuts down, or from a person.

        So is SIGURG on a cluster, by which the service has it look for what was left in the attempt's directory.
        """
        self.signalled.set()

    def goes_on(self, now: float) -> bool:
        """`step`, on a host in trouble too: a disk that is full or away for a while must not cost a good run."""
        try:
            running = self.step(now)
        except OSError as trouble:
            if self.trouble != str(trouble):
                print(f"agent: {trouble}; training goes on", flush=True)
            self.trouble = str(trouble)
            return True
        self.trouble = None
        return running

    def step(self, now: float) -> bool:
        """Look once and act once; False as soon as nothing of the attempt lives."""
        seen = self._look(now)
        action, cause = decide(seen, self.spec.resources.timeouts, now)
        self.cause = self.cause or cause
        match action:
            case Action.WAIT:
                self._pass_settings_on()
            case Action.ASK:
                self.asked_at = now
                self._ask()
            case Action.TERMINATE:
                self.children.ask_to_end()
                self.termed_at = now
            case Action.KILL:
                self._keep_stacks(cause)
                return not self.children.end()
        return True

    def _pass_settings_on(self) -> None:
        """Leave what the user has changed where rank 0 looks for it. Raises OSError, and is tried again then."""
        settings = self.shipper.settings
        if settings is not None and settings != self.settings:
            write_json(self.attempt.settings, settings.model_dump())
            self.settings = settings

    def _ask(self) -> None:
        try:
            self.attempt.stop.touch()
        except OSError:
            self.children.ask_to_end()  # no room even for an empty file: SIGTERM is the same wish

    def _look(self, now: float) -> Seen:
        self.watch.look(now)
        self.memory.look(now)
        self.others.look(now)
        return Seen(
            torchrun_ended=self.children.torchrun_status() is not None,
            desired=Desired.KILL if self._given_up() else self.shipper.desired,
            signalled=self.signalled.is_set() or self._limit_near() or self._stop_left(),
            asked_at=self.asked_at,
            termed_at=self.termed_at,
            stuck=self.watch.stuck(now),
            deserted=self.others.deserted(now) or self._abandoned(),
        )

    def _limit_near(self) -> bool:
        """Whether the cluster will end the attempt soon."""
        return self.place.clustered and self.attempt.time_limit.exists()

    def _stop_left(self) -> bool:
        """Whether a stop was asked for where this agent may not have been there to hear the signal."""
        return self.place.clustered and self.attempt.stop.exists()

    def _given_up(self) -> bool:
        """Whether the service has the cluster end the attempt: to the ranks that begins as a wish to stop does."""
        return self.place.clustered and self.attempt.closed.exists()

    def _abandoned(self) -> bool:
        """Whether what the cluster had put above this agent is gone: to the cluster nothing runs here any more."""
        return self.place.clustered and os.getppid() != self.parent

    def _keep_stacks(self, cause: Cause | None) -> None:
        """Where it hangs is in the ranks' logs before anything is killed: the ranks print their stacks on SIGUSR2."""
        if cause is not Cause.HUNG:
            return
        for process in self.children.living():
            if process.pid != self.children.torchrun.pid:
                process.send(signal.SIGUSR2)
        time.sleep(STACKS_SECONDS)

    def write_report(self) -> None:
        """Publish exit.json: from here on the attempt's end is on disk, whatever happens to agent and service."""
        shortage = self.memory.shortage(time.monotonic())
        if self.place.nodes > 1:
            self.attempt.over.touch()
            self.others.wait()
        evidence = gather(self.attempt, self.children.torchrun.returncode, shortage, self.others)
        self.report = verdict(
            evidence, self.cause, last_seq=OutboxReader(self.attempt.outbox).skip_to_end(), now=datetime.now(UTC)
        )
        if self._limit_near() and self.shipper.desired is Desired.RUN:
            self.report = at_the_limit(self.report)
        write_json(self.attempt.exit, self.report.model_dump(mode="json"))

    def deliver(self) -> None:
        """Ship what is left and the report, within a bounded time: the service also finds both on disk."""
        assert self.report is not None
        self.shipper.finish(self.report)
