"""What `watch` knows at one moment: the job, its curve, and whether the service still answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from trainyard.client.cli.watch.checkpoints import KeptCheckpoints
from trainyard.client.cli.watch.curve import Curve


@dataclass
class WatchState:
    """One look at a run. ``fresh`` are the points that came with the newest look.

    Attributes:
        handle: how the user names the job.
        url: where the service is.
        job: as last seen; {} before the first look.
        seen_at: when the service last answered.
        lost: why it does not answer now, or None.
        kept: the checkpoints there are, None where that is not known.
    """

    handle: str
    url: str
    job: Mapping[str, Any] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    fresh: list[Any] = field(default_factory=list)
    seen_at: datetime | None = None
    lost: str | None = None
    kept: KeptCheckpoints | None = None

    @property
    def progress(self) -> Mapping[str, Any]:
        """The job's progress, {} before there is some."""
        return self.job.get("progress") or {}

    @property
    def state(self) -> tuple[Any, ...]:
        """What makes a change worth a line of its own: status, phase, message, attempt, checkpoint, connection."""
        job, saved = self.job, self.job.get("checkpoint") or {}
        told = (job.get("status"), job.get("phase"), job.get("message"), job.get("attempt"), saved.get("step"))
        return (*told, self.lost is None)

    def newest(self, name: str) -> Any:
        """A number from the newest point, or from the progress where the points have none."""
        found = (self.curve.last or {}).get(name)
        return self.progress.get(name) if found is None else found
