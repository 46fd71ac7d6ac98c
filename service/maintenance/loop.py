"""Periodic maintenance: disk polling, corpus cache pruning and, on the leader, disk alerts and retention."""

import logging
import threading
from collections.abc import Callable
from datetime import datetime

from trainyard.service.clock import utc_now
from trainyard.service.leadership import LeadershipLost
from trainyard.service.maintenance import warnings
from trainyard.service.maintenance.corpus_cache import CorpusCachePruner
from trainyard.service.maintenance.disk_monitor import Disk, DiskMonitor, DiskState
from trainyard.service.maintenance.retention import Policy, Retention
from trainyard.service.scheduler.loop import Scheduler

ROUND_SECONDS = 10.0
MAX_STEPS_PER_ROUND = 50
STEP_PAUSE_SECONDS = 0.05  # pause between two retention steps, so that other writers get the lock
log = logging.getLogger("trainyard")


class MaintenanceLoop:
    """Runs rounds in its own thread. Tests call `round` directly."""

    def __init__(
        self,
        scheduler: Scheduler,
        disks: DiskMonitor,
        clock: Callable[[], datetime] = utc_now,
        corpora: CorpusCachePruner | None = None,
        policy: Policy | None = None,
        count: Callable[[str, int], None] = lambda _what, _rows: None,
    ) -> None:
        self._scheduler = scheduler
        self._disks = disks
        self._clock = clock
        self._corpus_cache = corpora
        self._retention = Retention(policy or Policy(), scheduler.reading, scheduler.writing, count)
        self._last_state: dict[str, DiskState] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. Do not wait for a disk that hangs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def round(self) -> None:
        """Poll the disks and do what is due."""
        disks = self._disks.poll()
        for disk in disks:
            self._log_change(disk)
        if self._scheduler.leads:
            self._raise_alerts(disks)
            self._apply_retention()
        if self._corpus_cache is not None:
            self._corpus_cache.prune_when_due()

    def _log_change(self, disk: Disk) -> None:
        before = self._last_state.get(disk.name, DiskState.OK)
        self._last_state[disk.name] = disk.state
        if disk.state is DiskState.OK and before is not DiskState.OK:
            log.info("the disk of %s has room again", disk.name)
        elif disk.state is not before:
            log.warning("%s", warnings.to_alert(disk))

    def _raise_alerts(self, disks: tuple[Disk, ...]) -> None:
        with self._scheduler.reading() as session:
            affected = warnings.affected(session, disks)
        for job_id, disk in affected:
            with self._scheduler.writing() as session:
                warnings.raise_alerts(session, job_id, disk, self._clock())

    def _apply_retention(self) -> None:
        for _ in range(MAX_STEPS_PER_ROUND):
            if not self._retention.step(self._clock()) or self._stopping.wait(STEP_PAUSE_SECONDS):
                return

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.round()
            except LeadershipLost:
                log.info("another service schedules now and does the maintenance")
            except Exception:
                log.exception("a round of maintenance failed")
            self._stopping.wait(ROUND_SECONDS)
