"""The state of `watch`: the job, its curve and checkpoints, and whether the service responds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from trainyard.client.cli.watch.checkpoints import KeptCheckpoints
from trainyard.client.cli.watch.curve import Curve


@dataclass
class WatchState:
    """What is known of a run after the newest poll.

    Attributes:
        handle: the id or name that the user typed.
        url: URL of the service.
        job: the newest record of the job; {} before the first response.
        curve: the points so far.
        new_points: the points that the newest poll has added.
        answered_at: time of the newest response.
        connection_error: why the service does not respond now, or None if it does.
        checkpoints: the checkpoints of the job, or None if they are unknown.
    """

    handle: str
    url: str
    job: Mapping[str, Any] = field(default_factory=dict)
    curve: Curve = field(default_factory=Curve)
    new_points: list[Any] = field(default_factory=list)
    answered_at: datetime | None = None
    connection_error: str | None = None
    checkpoints: KeptCheckpoints | None = None

    @property
    def progress(self) -> Mapping[str, Any]:
        """The job's progress, or {} if there is none yet."""
        return self.job.get("progress") or {}

    @property
    def change_key(self) -> tuple[Any, ...]:
        """Status, phase, message, attempt, checkpoint and connection: a view prints a line when one of them changes."""
        job, saved = self.job, self.job.get("checkpoint") or {}
        values = (job.get("status"), job.get("phase"), job.get("message"), job.get("attempt"), saved.get("step"))
        return (*values, self.connection_error is None)

    def newest(self, name: str) -> Any:
        """Return a value of the newest point, or of the progress if the point has none."""
        value = (self.curve.last or {}).get(name)
        return self.progress.get(name) if value is None else value
