"""The one acting loop: snapshot, plan, apply; woken at once, and once a second anyway."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from http import HTTPStatus

from sqlalchemy.orm import Session

from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import Inventory
from trainyard.service.errors import from_exception
from trainyard.service.launch.base import AttemptRef, Launcher
from trainyard.service.leadership import LeaderLease, LeadershipLost
from trainyard.service.observability.logging import log_context
from trainyard.service.scheduler.executor import PlanExecutor
from trainyard.service.scheduler.plan import (
    Action,
    Inspect,
    plan,
    subject,
)
from trainyard.service.scheduler.published_inventory import InventorySnapshot, PublishTracker
from trainyard.service.scheduler.queue_preview import QueuePreview
from trainyard.service.scheduler.snapshot import SchedulerMemory, Snapshot, load_snapshot
from trainyard.service.timing import Timing

ROUND_SECONDS = 1.0
PAUSE_SECONDS = 0.1
"""Between two rounds at least: what a burst of requests has changed is looked at together, not once for each."""

MAX_ROUNDS = 20

log = logging.getLogger("trainyard")


def note_failure(error: Exception) -> None:
    """Write a failed round down: in a line where the database is away or its disk full, for it may be so for hours."""
    if from_exception(error).status == HTTPStatus.SERVICE_UNAVAILABLE:
        why = str(error.__cause__ or error).partition("\n")[0]
        log.warning("a round of the scheduler was not possible: %s", why)
    else:
        log.error("a round of the scheduler failed", exc_info=error)


class Scheduler:
    """Runs rounds in a thread of its own. Tests call `round` themselves.

    With a ``lease`` it acts only while it leads, and ``on_lead`` is called each time it begins to. One that is not
    ``wanted`` never starts: another service on the same database schedules. One that ``preempts`` makes jobs of lower
    priority pause for those of higher priority.
    """

    def __init__(
        self,
        database: Database,
        launcher: Launcher,
        inventory: Inventory,
        clock: Callable[[], datetime] = utc_now,
        lease: LeaderLease | None = None,
        wanted: bool = True,
        preempts: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        timing: Timing = Timing(),
    ) -> None:
        self.timing = timing
        self._database = database
        self._inventory = inventory
        self._launcher = launcher
        self._clock = clock
        self._memory = SchedulerMemory()
        self._applier = PlanExecutor(database, launcher, self._memory, clock, lease, timing)
        self._lease = lease
        self._wanted = wanted
        self._preempts = preempts
        self._led = False
        self._monotonic = monotonic
        self._rounded_at = monotonic()
        self._news = PublishTracker()
        self._outlook = QueuePreview(database, clock)
        self._wake = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._waiting: Mapping[str, str] = {}
        self.on_lead: Callable[[], None] = _nothing

    def start(self) -> None:
        """Begin. The first round looks at every attempt that the database believes alive."""
        if self._wanted:
            self._thread.start()

    def stop(self) -> None:
        """End the loop after the round that is going on. Attempts are left alone."""
        self._ending.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(30)
            self._give_up()

    def wake(self) -> None:
        """Something has changed: look at once, or as soon as the pause after the last look is over."""
        self._wake.set()

    def save_now(self, name: AttemptRef) -> None:
        """Pass on the wish for a checkpoint: it changes no state, so it waits for no round."""
        self._launcher.save(name)

    @property
    def waiting(self) -> Mapping[str, str]:
        """What each queued job waits for: by the newest plan, or by the one foreseen of the service that schedules."""
        return self._waiting if self._lease is None or self._led else self._outlook.waiting()

    @property
    def alive(self) -> bool:
        """Whether the loop runs, as far as it should."""
        return self._thread.is_alive() or not self._wanted

    @property
    def leads(self) -> bool:
        """Whether this is the service that schedules now."""
        return self._wanted and (self._lease is None or self._led)

    @property
    def seconds_since_round(self) -> float:
        """Seconds since it last finished a round, or was begun."""
        return self._monotonic() - self._rounded_at

    def reading(self) -> AbstractContextManager[Session]:
        """A session to look at what the rounds look at."""
        return self._database.read()

    def writing(self) -> AbstractContextManager[Session]:
        """A transaction for what only the one that schedules may do. Raises Deposed where that is another one."""
        return self._applier.write()

    def reconcile_until_stable(self) -> None:
        """Rounds until one changes nothing that another could build on."""
        for _ in range(MAX_ROUNDS):
            if not self.reconcile():
                return

    def reconcile(self) -> bool:
        """One look and what follows from it; True where another look is worth it at once."""
        snapshot = self._snapshot()
        decided = plan(snapshot, self._clock(), self.timing)
        self._waiting = decided.waiting
        self._publish(InventorySnapshot(tuple(snapshot.devices), self._preempts))
        self._applier.probe_agents([action.attempt.name for action in decided.actions if isinstance(action, Inspect)])
        outcomes = [self._leads() and self._do(action) for action in decided.actions]
        return any(outcomes)

    def _publish(self, bulletin: InventorySnapshot) -> None:
        if not self._news.differs(bulletin):
            return
        try:
            self._applier.publish(bulletin)
            self._news.mark_published(bulletin)
        except LeadershipLost:
            log.warning("another service schedules now, and says itself what it has")

    def _leads(self) -> bool:
        """Keep the lease, or try for it. One who begins to lead knows nothing of what the one before did."""
        leads = self._lease is None or self._lease.keep()
        if leads and not self._led:
            self._memory.inspected_at.clear()
            self._memory.notified.clear()
            self._news.forget()
            self.on_lead()
        self._led = leads
        return leads

    def _give_up(self) -> None:
        try:
            if self._lease is not None:
                self._lease.give_up()
        except Exception:
            log.exception("the lease could not be given up; it runs out by itself")

    def _do(self, action: Action) -> bool:
        with log_context(action=type(action).__name__.lower(), **subject(action)):
            try:
                return self._applier.execute(action)
            except LeadershipLost:
                log.warning("another service schedules now; the action is left to it")
            except Exception:
                # One job's trouble must not keep the others from being looked after.
                log.exception("an action of the scheduler failed")
        return False

    def _snapshot(self) -> Snapshot:
        devices = self._inventory.devices()
        with self._database.read() as session:
            snapshot = load_snapshot(session, devices, self._memory, self._clock(), self._preempts, self.timing)
        self._memory.forget_ended(snapshot.live)
        return snapshot

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                if self._leads():
                    self.reconcile_until_stable()
                self._rounded_at = self._monotonic()
            except Exception as error:
                note_failure(error)
            self._ending.wait(PAUSE_SECONDS)
            self._wake.wait(ROUND_SECONDS - PAUSE_SECONDS)
            self._wake.clear()


def _nothing() -> None:
    """Nobody wants to know."""
