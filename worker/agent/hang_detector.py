"""Detects hangs by a lack of progress of the ranks, never by whether the service can be reached."""

import statistics
from collections import deque

from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Phase

SUSPENDED_SECONDS = 5.0
"""If two polls are further apart, the agent itself was suspended: the gap does not count as a lack of progress."""

UNKNOWN_STEP_TIME_SECONDS = 3600.0
"""Minimum budget until two steps were measured."""


class HangDetector:
    """Watches one attempt's step file and phases. All times are of the monotonic clock, in seconds."""

    def __init__(self, attempt: AttemptDir, events: OutboxReader, timeouts: Timeouts) -> None:
        self.step: int | None = None
        self.phase: Phase = Phase.LOADING
        self._attempt = attempt
        self._events = events
        self._timeouts = timeouts
        self._step_seconds: deque[float] = deque(maxlen=64)
        self._progress_at: float | None = None
        self._step_began_at = 0.0
        self._polled_at: float | None = None

    def poll(self, now: float) -> None:
        if self._progress_at is None or self._polled_at is None:
            self._progress_at = self._step_began_at = now
        elif now - self._polled_at > SUSPENDED_SECONDS:
            self._progress_at += now - self._polled_at
            self._step_began_at += now - self._polled_at
        self._polled_at = now
        self._poll_step(now)
        for event in self._events.read(1000):
            self._progress_at = now
            if event.get("kind") == "phase" and event.get("phase") in set(Phase):
                phase, self.phase = self.phase, Phase(event["phase"])
                if self.phase is not phase:
                    # Time in another phase does not count as time of a step. Reports of finished micro-batches repeat
                    # the phase, so they do not restart the measurement.
                    self._step_began_at = now

    def _poll_step(self, now: float) -> None:
        step = self._attempt.read_step()
        if step is None or step == self.step:
            return
        if self.step is not None and step > self.step:
            self._step_seconds.append((now - self._step_began_at) / (step - self.step))
        self.step, self._progress_at, self._step_began_at = step, now, now

    def is_hung(self, now: float) -> bool:
        """Return whether there was no progress for longer than the budget."""
        return self._progress_at is not None and now - self._progress_at > self.budget()

    def budget(self) -> float:
        """Return the seconds without progress that the current phase may take."""
        if self.phase is not Phase.TRAINING:
            return self._timeouts.preparing
        if len(self._step_seconds) < 2:
            return max(self._timeouts.progress, UNKNOWN_STEP_TIME_SECONDS)
        return max(self._timeouts.progress, 10 * statistics.median(self._step_seconds))
