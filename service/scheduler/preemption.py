"""Choice of the attempts that make room for a job of higher priority: a pure part of the plan.

An attempt is asked to save and stop only if that, together with free devices and those becoming free, is enough for the
waiting job; only for a strictly higher priority; and only after it has made a step itself, so that jobs of several
priorities cannot keep it from ever making progress.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainyard.contract.status import Desired
from trainyard.service.scheduler.snapshot import LiveAttempt, QueuedJob, Snapshot


@dataclass(frozen=True)
class Victims:
    """Attempts whose devices a waiting job will get: ``stopping`` already, or ``victims``, to be asked to stop."""

    stopping: tuple[LiveAttempt, ...]
    victims: tuple[LiveAttempt, ...]

    def __str__(self) -> str:
        names = [attempt.name.job_id for attempt in (*self.stopping, *self.victims)]
        if not names:
            return "its devices are being freed"
        names_joined = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        return f"{names_joined} {'makes' if len(names) == 1 else 'make'} room"


class PreemptionBudget:
    """Devices of attempts that stop or can be asked to. A device promised to one job is not offered to the next."""

    def __init__(self, snapshot: Snapshot) -> None:
        usable = {d.id: d.kind for d in snapshot.devices if not d.strangers and d.works}
        self._kinds = usable
        self._freeing: dict[str, LiveAttempt | None] = _devices_being_freed(snapshot)
        self._running: list[LiveAttempt] = []
        self._closed_kinds: set[str] = set()
        self._enabled = snapshot.preempts
        for attempt in snapshot.live if snapshot.preempts else ():
            if attempt.desired is not Desired.RUN:
                self._add_freeing(attempt)
            elif attempt.running and attempt.made_progress and attempt.preemptible:
                self._running.append(attempt)
        # Lowest priority first; of those the youngest, which loses the least progress.
        self._running.sort(key=lambda attempt: (attempt.priority, _youngest_first(attempt)))

    def _add_freeing(self, attempt: LiveAttempt) -> None:
        self._freeing.update({device: attempt for device in attempt.devices if device in self._kinds})

    def find_victims(self, job: QueuedJob, kind: str, free: int) -> Victims | None:
        """Choose the attempts that make room for ``job``, given its ``free`` devices, or None if not possible."""
        if not self._enabled or kind in self._closed_kinds:
            return None
        missing = job.ranks - free
        freeing = [device for device in self._freeing if self._fits(device, kind)][:missing]
        victims = self._choose_victims(job.priority, kind, missing - len(freeing))
        if victims is None:
            return None
        stopping = tuple({holder.id: holder for device in freeing if (holder := self._freeing[device])}.values())
        self._reserve(victims, kind, freeing, missing)
        return Victims(stopping, victims)

    def close(self, kind: str) -> None:
        """Preempt no more attempts of this kind: a job at the front waits for devices that preemption cannot free."""
        self._closed_kinds.add(kind)

    def _choose_victims(self, priority: int, kind: str, missing: int) -> tuple[LiveAttempt, ...] | None:
        chosen: list[LiveAttempt] = []
        for attempt in self._running:
            if self._count(chosen, kind) >= missing:
                break
            if attempt.priority < priority and self._count([attempt], kind):
                chosen.append(attempt)
        if self._count(chosen, kind) < missing:
            return None
        for attempt in reversed(list(chosen)):
            others = [other for other in chosen if other is not attempt]
            if self._count(others, kind) >= missing:
                chosen = others  # a larger attempt, chosen later, frees enough
        return tuple(chosen)

    def _reserve(self, victims: Sequence[LiveAttempt], kind: str, freeing: Sequence[str], missing: int) -> None:
        for attempt in victims:
            self._running.remove(attempt)
            self._add_freeing(attempt)
        freed = [device for attempt in victims for device in attempt.devices if self._fits(device, kind)]
        for device in (*freeing, *freed)[:missing]:
            del self._freeing[device]

    def _count(self, attempts: Sequence[LiveAttempt], kind: str) -> int:
        return sum(self._fits(device, kind) for attempt in attempts for device in attempt.devices)

    def _fits(self, device: str, kind: str) -> bool:
        return kind in (device, self._kinds.get(device)) and device in self._kinds


def _devices_being_freed(snapshot: Snapshot) -> dict[str, LiveAttempt | None]:
    # Devices without a lease on which the processes of an ended attempt are still seen.
    held = {*snapshot.leases, *snapshot.lent}
    return {d.id: None for d in snapshot.devices if d.processes and not d.strangers and d.id not in held}


def _youngest_first(attempt: LiveAttempt) -> float:
    return -attempt.created_at.timestamp() if attempt.created_at is not None else 0.0
