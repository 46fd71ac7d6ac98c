"""Waiting for a run to get somewhere, with a loss line now and then."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from client.api import Trainyard
from client.errors import WaitTimedOut
from client.exits import at_rest
from client.shapes import Job
from client.words import bar, fixed, scientific

EVERY = 50
"""Steps between loss lines: the whole demo fits on one screen."""

BAR = 24
INTERVAL = 0.3


class LossLines:
    """Says the loss of the first point and at each multiple of `EVERY` steps, once, however often the curve is read."""

    def __init__(self, trainyard: Trainyard, job_id: str, untrained_loss: float, say: Callable[[str], None]) -> None:
        self._trainyard = trainyard
        self._job_id = job_id
        self._untrained_loss = untrained_loss
        self._say = say
        self._said = 0

    def until(self, arrived: Callable[[Job], bool], seconds: float) -> Job:
        """Wait until ``arrived`` says so of the job; the job as it then is.

        Raises:
            WaitTimedOut: it took longer than ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while True:
            job = self._trainyard.job(self._job_id)
            self._tell(self._trainyard.metrics(self._job_id, after_step=self._said))
            if arrived(job) or job["status"] == "failed":
                return job
            if time.monotonic() > deadline:
                raise WaitTimedOut(seconds, job)
            time.sleep(INTERVAL)

    def _tell(self, points: Iterable[Any]) -> None:
        for point in points:
            if (point["step"] % EVERY == 0 or not self._said) and point["step"] > self._said:
                self._said = point["step"]
                self._say(loss_line(point, self._untrained_loss))


def loss_line(point: Any, untrained_loss: float) -> str:
    """A step, its loss as a number and as a bar that is full for an untrained model."""
    loss = point["loss"]
    drawn = bar(None if loss is None else loss / untrained_loss, BAR)
    return f"step {point['step']:>4}   loss {fixed(loss)}   {drawn}   lr {scientific(point['learning_rate'])}"


def past(step: int) -> Callable[[Job], bool]:
    """Whether a running job has done ``step``, or will do none any more."""

    def arrived(job: Job) -> bool:
        return ((job.get("progress") or {}).get("step") or 0) >= step or at_rest(job)

    return arrived


def running_again(attempt: int) -> Callable[[Job], bool]:
    """Whether the job trains in a later attempt, or will train no more."""

    def arrived(job: Job) -> bool:
        trains = job["status"] == "running" and job.get("phase") == "training"
        return ((job.get("attempt") or 0) > attempt and trains) or at_rest(job)

    return arrived


def done_again(trainyard: Trainyard, step: int) -> Callable[[Job], bool]:
    """Whether the newest attempt has itself got to ``step``: the job's progress may still be that of the one before."""

    def arrived(job: Job) -> bool:
        own = trainyard.metrics(job["id"], after_step=step - 1, attempt=job.get("attempt"))
        return next(own, None) is not None or at_rest(job)

    return arrived
