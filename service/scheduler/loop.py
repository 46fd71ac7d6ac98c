"""The scheduler loop: read a snapshot, plan, execute. A round runs after each wake-up, and at least once a second."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from http import HTTPStatus
from pathlib import Path

from sqlalchemy.orm import Session

from trainyard.service.clock import utc_now
from trainyard.service.db.engine import Database
from trainyard.service.devices import xids
from trainyard.service.devices.inventory import Inventory
from trainyard.service.devices.xids import XidWatcher
from trainyard.service.errors import from_exception
from trainyard.service.launch.base import AttemptRef, Launcher
from trainyard.service.leadership import LeaderLease, LeadershipLost
from trainyard.service.observability.logging import log_context
from trainyard.service.scheduler.executor import PlanExecutor
from trainyard.service.scheduler.plan import Action, Inspect, Preempt, Restart, Start, plan, subject
from trainyard.service.scheduler.preparations import Prepare
from trainyard.service.scheduler.published_inventory import InventorySnapshot, PublishTracker
from trainyard.service.scheduler.queue_preview import QueuePreview
from trainyard.service.scheduler.snapshot import SchedulerMemory, Snapshot, load_snapshot
from trainyard.service.timing import Timing

ROUND_SECONDS = 1.0
PAUSE_SECONDS = 0.1  # shortest time between two rounds, so that a burst of requests causes one round and not one each
MAX_ROUNDS = 20

log = logging.getLogger("trainyard")


def log_round_failure(error: Exception) -> None:
    """Log a failed round: one line if the database is unavailable, which may last for hours, else a traceback."""
    if from_exception(error).status == HTTPStatus.SERVICE_UNAVAILABLE:
        cause = str(error.__cause__ or error).partition("\n")[0]
        log.warning("a round of the scheduler was not possible: %s", cause)
    else:
        log.error("a round of the scheduler failed", exc_info=error)


class Scheduler:
    """Runs rounds in its own thread. Tests call `reconcile` directly.

    With a ``lease`` it acts only while it leads; ``on_lead`` is called each time it becomes the leader. If not
    ``enabled``, the thread never starts: another service on the same database schedules. With ``preempts``, jobs of
    lower priority are paused for those of higher priority. ``corpora``: the corpus cache and the home, if corpora are
    prepared before jobs get devices; None if each run prepares its own. ``xid_watcher``: the source of errors of this
    host's GPUs.
    """

    def __init__(
        self,
        database: Database,
        launcher: Launcher,
        inventory: Inventory,
        clock: Callable[[], datetime] = utc_now,
        lease: LeaderLease | None = None,
        enabled: bool = True,
        preempts: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
        timing: Timing = Timing(),
        corpora: tuple[Path, Path] | None = None,
        xid_watcher: XidWatcher | None = None,
    ) -> None:
        self.timing = timing
        self.prepares = corpora is not None
        self._xid_watcher = xid_watcher
        self._database = database
        self._inventory = inventory
        self._launcher = launcher
        self._clock = clock
        self._memory = SchedulerMemory()
        cache, home = corpora or (Path(), Path())
        self._executor = PlanExecutor(database, launcher, self._memory, clock, lease, timing, cache, home)
        self._lease = lease
        self._enabled = enabled
        self._preempts = preempts
        self._was_leader = False
        self._led_epoch: int | None = None
        self._monotonic = monotonic
        self._last_round_at = monotonic()
        self._publish_tracker = PublishTracker()
        self._preview = QueuePreview(database, clock)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._launching = threading.Lock()
        self._launches = True
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._waiting: Mapping[str, str] = {}
        self.waiting_version = 0
        """Changes with `waiting`, if this service schedules."""
        self.on_lead: Callable[[], None] = lambda: None

    def reclaim_devices_by(self, reclaim: Callable[[str], None]) -> None:
        """Set what ends the side process that has a device, when a job needs it."""
        self._executor.reclaim = reclaim

    def start(self) -> None:
        """Start the thread. The first round inspects every attempt that is live in the database."""
        if self._enabled:
            if self._xid_watcher is not None:
                self._xid_watcher.start()
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current round. Attempts keep running."""
        self._stopping.set()
        self._wake.set()
        if self._xid_watcher is not None:
            self._xid_watcher.stop()
        if self._thread.is_alive():
            self._thread.join(30)
            self._release_lease()

    def stop_launching(self) -> None:
        """Start no further attempt. When this returns, none is being started."""
        with self._launching:
            self._launches = False
            self._executor.service_stops = True

    @property
    def launches(self) -> bool:
        """Whether it may start attempts. Not while the service waits for its runs to save and end."""
        return self._launches

    def wake(self) -> None:
        """Request a round now, or as soon as PAUSE_SECONDS since the last one are over."""
        self._wake.set()

    def save_now(self, name: AttemptRef) -> None:
        """Request a checkpoint. It changes no state, so it needs no round."""
        self._launcher.save(name)

    @property
    def waiting(self) -> Mapping[str, str]:
        """Job id -> what the queued job waits for: by the last plan, or by a preview of the leader's plan."""
        return self._waiting if self._lease is None or self._was_leader else self._preview.waiting()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() or not self._enabled

    @property
    def leads(self) -> bool:
        """Whether this service is the one that schedules."""
        return self._enabled and (self._lease is None or self._was_leader)

    @property
    def seconds_since_round(self) -> float:
        """Seconds since the last round ended, or since the scheduler was created."""
        return self._monotonic() - self._last_round_at

    def reading(self) -> AbstractContextManager[Session]:
        """Return a read session of the scheduler's database."""
        return self._database.read()

    def writing(self) -> AbstractContextManager[Session]:
        """Return a transaction that only the leader may use. Raises LeadershipLost."""
        return self._executor.write()

    def reconcile_until_stable(self) -> None:
        """Run rounds until one changes nothing that the next could build on."""
        for _ in range(MAX_ROUNDS):
            if not self.reconcile():
                return

    def reconcile(self) -> bool:
        """Run one round. Return True if another one is due at once."""
        self._store_xid_errors()
        snapshot = self._snapshot()
        decision = plan(snapshot, self._clock(), self.timing)
        if decision.waiting != self._waiting:
            self._waiting = decision.waiting
            self.waiting_version += 1
        self._executor.inventory = snapshot.devices
        self._publish(InventorySnapshot(tuple(snapshot.devices), self._preempts))
        self._executor.probe_agents([action.attempt.name for action in decision.actions if isinstance(action, Inspect)])
        outcomes = [self._renew_lease() and self._execute(action) for action in decision.actions]
        return any(outcomes)

    def _store_xid_errors(self) -> None:
        errors = self._xid_watcher.pending() if self._xid_watcher is not None else ()
        if self._xid_watcher is not None and errors:
            with self._executor.write() as session:
                xids.store(session, errors)
            self._xid_watcher.forget(errors)  # Only now: the write may have failed.

    def _publish(self, inventory: InventorySnapshot) -> None:
        if not self._publish_tracker.differs(inventory):
            return
        try:
            self._executor.publish(inventory)
            self._publish_tracker.mark_published(inventory)
        except LeadershipLost:
            log.warning("another service schedules now and publishes its own devices")

    def _renew_lease(self) -> bool:
        leads = self._lease is None or self._lease.renew()
        epoch = self._lease.epoch if self._lease is not None else None
        if leads and not (self._was_leader and epoch == self._led_epoch):
            # Another leader may have acted since: what this process remembers may be wrong.
            self._memory.inspected_at.clear()
            self._memory.notified.clear()
            self._publish_tracker.forget()
            self.on_lead()
        self._was_leader, self._led_epoch = leads, epoch
        return leads

    def _release_lease(self) -> None:
        try:
            if self._lease is not None:
                self._lease.release()
        except Exception:
            log.exception("the lease could not be released; it expires on its own")

    def _execute(self, action: Action) -> bool:
        if not isinstance(action, Start | Restart | Preempt | Prepare):
            return self._try(action)
        with self._launching:
            return self._launches and self._try(action)

    def _try(self, action: Action) -> bool:
        with log_context(action=type(action).__name__.lower(), **subject(action)):
            try:
                return self._executor.execute(action)
            except LeadershipLost:
                log.warning("another service schedules now; the action is left to it")
            except Exception:
                # One job's failure must not stop the others.
                log.exception("an action of the scheduler failed")
        return False

    def _snapshot(self) -> Snapshot:
        devices = self._inventory.devices()
        with self._database.read() as session:
            snapshot = load_snapshot(session, devices, self._memory, self._clock(), self._preempts, self.timing)
        self._memory.forget_ended(snapshot.live, snapshot.preparations)
        return snapshot

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._renew_lease():
                    self.reconcile_until_stable()
                self._last_round_at = self._monotonic()
            except Exception as error:
                log_round_failure(error)
            self._stopping.wait(PAUSE_SECONDS)
            self._wake.wait(ROUND_SECONDS - PAUSE_SECONDS)
            self._wake.clear()
