"""Is the run getting on? Judged by its steps, never by whether somebody could be reached."""

import statistics
from collections import deque

from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Phase

SUSPENDED_SECONDS = 5.0
"""Two looks further apart than this: it was the agent that slept, so the pause is not held against the ranks."""

UNKNOWN_STEP_TIME_SECONDS = 3600.0
"""Until two steps have been seen nobody knows how long one takes."""


class HangDetector:
    """Watches one attempt's step file and phases. All times are of the monotonic clock, in seconds."""

    def __init__(self, attempt: AttemptDir, events: OutboxReader, timeouts: Timeouts) -> None:
        self.step: int | None = None
        self.phase: Phase = Phase.LOADING
        self._attempt = attempt
        self._events = events
        self._timeouts = timeouts
        self._paces: deque[float] = deque(maxlen=64)
        self._moved_at: float | None = None
        self._looked_at: float | None = None

    def poll(self, now: float) -> None:
        """Read step file and outbox once."""
        if self._moved_at is None or self._looked_at is None:
            self._moved_at = now
        elif now - self._looked_at > SUSPENDED_SECONDS:
            self._moved_at += now - self._looked_at
        self._looked_at = now
        self._follow_step(now)
        for event in self._events.read(1000):
            self._moved_at = now
            if event.get("kind") == "phase" and event.get("phase") in set(Phase):
                self.phase = Phase(event["phase"])

    def _follow_step(self, now: float) -> None:
        step = self._attempt.read_step()
        if step is None or step == self.step:
            return
        assert self._moved_at is not None
        if self.step is not None and step > self.step:
            self._paces.append((now - self._moved_at) / (step - self.step))
        self.step, self._moved_at = step, now

    def is_hung(self, now: float) -> bool:
        """Whether nothing has moved for longer than this phase may take."""
        return self._moved_at is not None and now - self._moved_at > self.budget()

    def budget(self) -> float:
        """Seconds without progress that are still taken for work."""
        if self.phase is not Phase.TRAINING:
            return self._timeouts.preparing
        if len(self._paces) < 2:
            return max(self._timeouts.progress, UNKNOWN_STEP_TIME_SECONDS)
        return max(self._timeouts.progress, 10 * statistics.median(self._paces))
