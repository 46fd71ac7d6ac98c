"""Waits and timeouts of the service. A service in use has the defaults; tests shorten them."""

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Timing:
    """Waits of the restart policy, the scheduler's plan and the leader lease."""

    backoff_seconds: tuple[float, ...] = (5.0, 20.0, 60.0)
    """Wait before restart 1, 2, and 3 and later, if the job is at fault."""

    setback_seconds: tuple[float, ...] = (5.0, 20.0, 60.0, 180.0, 600.0)
    """Wait after that many consecutive attempts that made no step and failed without the job's fault."""

    quiet: timedelta = timedelta(seconds=5)
    """The scheduler probes the host for an attempt that has not reported for so long. Silence alone never ends it."""

    kill_grace: timedelta = timedelta(seconds=10)
    """Time for a silent agent to carry out a kill, before the launcher kills the processes itself."""

    lease_seconds: float = 9.0
    renew_seconds: float = 3.0

    @property
    def max_restart_wait(self) -> float:
        """The longest possible wait before a restart, in seconds."""
        return max(*self.backoff_seconds, *self.setback_seconds)

    def is_due(self, restart_at: datetime, now: datetime) -> bool:
        """Return whether the back-off is over. A time after the longest back-off means that the clock was set back."""
        return restart_at <= now or restart_at - now > timedelta(seconds=self.max_restart_wait)
