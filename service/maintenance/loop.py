"""What a service does beside its work, every few seconds: look at its disks, and, where it schedules, keep house."""

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
STEPS_PER_ROUND = 50
STEP_PAUSE_SECONDS = 0.05
"""Between two steps of retention: others who write have their turn."""

log = logging.getLogger("trainyard")


class MaintenanceLoop:
    """Runs rounds in a thread of its own. Tests call `round` themselves."""

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
        self._corpora = corpora
        self._retention = Retention(policy or Policy(), scheduler.reading, scheduler.writing, count)
        self._told: dict[str, DiskState] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End it. A disk that hangs is not waited for."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def round(self) -> None:
        """Look once, and do what is due."""
        disks = self._disks.poll()
        for disk in disks:
            self._log(disk)
        if self._scheduler.leads:
            self._warn(disks)
            self._retain()
        if self._corpora is not None:
            self._corpora.prune_when_due()

    def _log(self, disk: Disk) -> None:
        before = self._told.get(disk.name, DiskState.OK)
        self._told[disk.name] = disk.state
        if disk.state is DiskState.OK and before is not DiskState.OK:
            log.info("the disk of %s has room again", disk.name)
        elif disk.state is not before:
            log.warning("%s", warnings.to_alert(disk))

    def _warn(self, disks: tuple[Disk, ...]) -> None:
        with self._scheduler.reading() as session:
            found = warnings.affected(session, disks)
        for job_id, disk in found:
            with self._scheduler.writing() as session:
                warnings.raise_alerts(session, job_id, disk, self._clock())

    def _retain(self) -> None:
        for _ in range(STEPS_PER_ROUND):
            if not self._retention.step(self._clock()) or self._ending.wait(STEP_PAUSE_SECONDS):
                return

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.round()
            except LeadershipLost:
                log.info("another service schedules now, and keeps house")
            except Exception:
                log.exception("a round of upkeep failed")
            self._ending.wait(ROUND_SECONDS)
