"""Tells the jobs that run on a disk that is nearly full, once each, and takes it back when there is room again."""

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
    """(job, the disk to tell it of) of each live job that has to hear something; None: it has room again."""
    rows = session.execute(select(JobRow.id, JobRow.spec, JobRow.alerts).where(JobRow.status.in_(LIVE))).all()
    found = []
    for job_id, spec, alerts in rows:
        troubled = next((disk for disk in disks if _concerns(disk, spec["checkpoint"]["save_dir"])), None)
        told = any(alert.get("code") == CODE for alert in alerts)
        if told is (troubled is None):
            found.append((job_id, troubled))
    return found


def _concerns(disk: Disk, save_dir: str | None) -> bool:
    """Every run writes below the home; its checkpoints may go elsewhere."""
    if disk.state not in (DiskState.LOW, DiskState.FULL):
        return False
    if "home" in disk.holds:
        return True
    return save_dir is not None and any(Path(save_dir).is_relative_to(path) for path in disk.paths)


def raise_alerts(session: Session, job_id: str, disk: Disk | None, now: datetime) -> None:
    """An event, and the alert on the job itself."""
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
    """In a sentence that names no path: it is told to those who have no token, too."""
    if disk.usage.read_only:
        return f"the disk of {disk.name} can only be read"
    if disk.state is DiskState.UNREADABLE:
        return f"the disk of {disk.name} does not answer"
    enough = max(disk.limit, FULL_BYTES)
    free, total, limit = map(_size, (disk.usage.free, disk.usage.total, enough))
    if disk.usage.free >= enough:
        return f"the disk of {disk.name} is about to run out of inodes: {disk.usage.files_free:,} are left"
    return f"the disk of {disk.name} is nearly full: {free} of {total} are free, and below {limit} is little"


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
