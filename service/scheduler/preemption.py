"""Which attempts make room for a job of higher priority: a pure part of the plan.

An attempt is asked to save and stop only where that, together with what is free or comes free anyway, is enough for the
job that waits; only for strictly higher priority; and only once it has made a step of its own, so that jobs of several
priorities that come and go cannot keep it from ever getting on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.contract.status import Desired
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot


@dataclass(frozen=True)
class Victims:
    """Attempts whose devices a waiting job will get: ``stopping`` already, and ``victims``, which are to be asked."""

    stopping: tuple[LiveAttempt, ...]
    victims: tuple[LiveAttempt, ...]

    def __str__(self) -> str:
        names = [attempt.name.job_id for attempt in (*self.stopping, *self.victims)]
        if not names:
            return "what ran there is just leaving"
        who = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        return f"{who} {'makes' if len(names) == 1 else 'make'} room"


class PreemptionBudget:
    """The devices of attempts that stop, or that can be asked to. What one job is promised, the next is not."""

    def __init__(self, snapshot: Snapshot) -> None:
        usable = {device.id: device.kind for device in snapshot.devices if not device.strangers}
        self._kinds = usable
        self._coming: dict[str, LiveAttempt | None] = _emptying(snapshot)
        self._running: list[LiveAttempt] = []
        self._closed: set[str] = set()
        self._enabled = snapshot.preempts
        for attempt in snapshot.live if snapshot.preempts else ():
            self._sort_in(attempt)
        # The least important first; of those the youngest, which has the least to load again.
        self._running.sort(key=_youngest_first)
        self._running.sort(key=lambda attempt: attempt.priority)

    def _sort_in(self, attempt: LiveAttempt) -> None:
        if attempt.desired is not Desired.RUN:
            self._coming.update({device: attempt for device in attempt.devices if device in self._kinds})
        elif attempt.running and attempt.made_progress and attempt.preemptible:
            self._running.append(attempt)

    def room_for(self, job: QueuedJob, kind: str, free: int) -> Victims | None:
        """Who makes room for ``job``, which finds ``free`` devices of its kind; None where nobody can."""
        if not self._enabled or kind in self._closed:
            return None
        lack = job.ranks - free
        coming = [device for device in self._coming if self._fits(device, kind)][:lack]
        victims = self._victims(job.priority, kind, lack - len(coming))
        if victims is None:
            return None
        stopping = tuple({holder.id: holder for device in coming if (holder := self._coming[device])}.values())
        self._promise(victims, kind, coming, lack)
        return Victims(stopping, victims)

    def close(self, kind: str) -> None:
        """A job in front waits for devices of this kind that nobody can give it: none is emptied for those behind."""
        self._closed.add(kind)

    def _victims(self, priority: int, kind: str, lack: int) -> tuple[LiveAttempt, ...] | None:
        chosen: list[LiveAttempt] = []
        for attempt in self._running:
            if self._count(chosen, kind) >= lack:
                break
            if attempt.priority < priority and self._count([attempt], kind):
                chosen.append(attempt)
        if self._count(chosen, kind) < lack:
            return None
        for attempt in reversed(list(chosen)):
            others = [other for other in chosen if other is not attempt]
            if self._count(others, kind) >= lack:
                chosen = others  # a larger one that was chosen after it frees enough
        return tuple(chosen)

    def _promise(self, victims: Sequence[LiveAttempt], kind: str, coming: Sequence[str], lack: int) -> None:
        for attempt in victims:
            self._running.remove(attempt)
            self._coming.update({device: attempt for device in attempt.devices if device in self._kinds})
        freed = [device for attempt in victims for device in attempt.devices if self._fits(device, kind)]
        for device in (*coming, *freed)[:lack]:
            del self._coming[device]

    def _count(self, attempts: Sequence[LiveAttempt], kind: str) -> int:
        return sum(self._fits(device, kind) for attempt in attempts for device in attempt.devices)

    def _fits(self, device: str, kind: str) -> bool:
        return kind in (device, self._kinds.get(device)) and device in self._kinds


def _emptying(snapshot: Snapshot) -> dict[str, LiveAttempt | None]:
    """Devices that no attempt has any more, while its processes are still seen on them."""
    return {d.id: None for d in snapshot.devices if d.processes and not d.strangers and d.id not in snapshot.leases}


def _youngest_first(attempt: LiveAttempt) -> float:
    return -attempt.created_at.timestamp() if attempt.created_at is not None else 0.0
