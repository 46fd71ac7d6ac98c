"""Alerts of jobs that write to a disk that is nearly full: raised once, and removed when the disk has space again."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from trainyard.contract.status import LIVE
from trainyard.service.db.models import JobRow
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.maintenance.disk_monitor import FULL_BYTES, Disk, DiskState

CODE = "disk_low"
MIB, GIB = 1 << 20, 1 << 30


def affected(session: Session, disks: Sequence[Disk]) -> list[tuple[str, Disk | None]]:
    """Return (job id, its low disk or None if it has space again) of each live job whose alert must change."""
    rows = session.execute(select(JobRow.id, JobRow.spec, JobRow.alerts).where(JobRow.status.in_(LIVE))).all()
    changes = []
    for job_id, spec, alerts in rows:
        affecting = next((disk for disk in disks if _affects(disk, spec["checkpoint"]["save_dir"])), None)
        alerted = any(alert.get("code") == CODE for alert in alerts)
        if alerted is (affecting is None):
            changes.append((job_id, affecting))
    return changes


def _affects(disk: Disk, save_dir: str | None) -> bool:
    # Every run writes below the home; its checkpoints may be elsewhere.
    if disk.state not in (DiskState.LOW, DiskState.FULL):
        return False
    if "home" in disk.holds:
        return True
    return save_dir is not None and any(Path(save_dir).is_relative_to(path) for path in disk.paths)


def raise_alerts(session: Session, job_id: str, disk: Disk | None, now: datetime) -> None:
    """Record an event and update the job's alerts."""
    job = repository.lock(session, job_id)
    if disk is None:
        job.alerts = [alert for alert in job.alerts if alert.get("code") != CODE]
        repository.record_event(session, job, EventDraft("disk", "the disk has room again"), now)
        return
    message = to_alert(disk)
    repository.add_alert(job, CODE, message, now)
    data = {"code": CODE, "free_bytes": disk.usage.free, "limit_bytes": disk.limit}
    repository.record_event(session, job, EventDraft("warning", message, data=data), now)


def to_alert(disk: Disk) -> str:
    """Describe the disk in a sentence without a path: it is also shown without a token."""
    if disk.usage.read_only:
        return f"the disk of {disk.name} can only be read"
    if disk.state is DiskState.UNREADABLE:
        return f"the disk of {disk.name} does not answer"
    threshold = max(disk.limit, FULL_BYTES)
    free, total, limit = map(_size, (disk.usage.free, disk.usage.total, threshold))
    if disk.usage.free >= threshold:
        return f"the disk of {disk.name} is about to run out of inodes: {disk.usage.files_free:,} are left"
    return f"the disk of {disk.name} is nearly full: {free} of {total} free (warning threshold: {limit})"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
