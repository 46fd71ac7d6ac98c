"""How long the service waits for what. A service started by a user has the defaults; tests build shorter ones."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Timing:
    """Waits of the restart rules, the scheduler's plan and the leader's lease."""

    backoff_seconds: tuple[float, ...] = (5.0, 20.0, 60.0)
    """Wait before restart 1, 2, and 3 and later, if the job is at fault."""

    setback_seconds: tuple[float, ...] = (5.0, 20.0, 60.0, 180.0, 600.0)
    """Wait after so many ends in a row, none of them the job's fault, that let it make no step."""

    quiet: timedelta = timedelta(seconds=5)
    """An attempt that did not report for so long is looked up on the host, repeatedly. Silence alone never ends it."""

    kill_grace: timedelta = timedelta(seconds=10)
    """A silent agent has so long to carry out a kill; then the launcher does."""

    lease_seconds: float = 9.0
    renew_seconds: float = 3.0

    @property
    def max_restart_wait(self) -> float:
        """No restart is further ahead than this, in seconds."""
        return max(*self.backoff_seconds, *self.setback_seconds)
