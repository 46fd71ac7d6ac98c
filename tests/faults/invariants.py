"""I1 to I9, checked on a real home: its database, the process table, the run directories. Usable after every fault.

I1  at most one live attempt of a job at any instant        I6  every listed checkpoint is there and valid
I2  nothing lives once its job is terminal, plus the grace  I7  final weights are the untouched run's
I3  a device is leased to one live attempt, or free         I8  no 5xx for any client
I4  steps 1..N without a gap, a step twice has one value    I9  an unknown outcome is never success
I5  the event log is a path of the transition table

`check_alarms`, where no fault damages bits: neither memory nor a checkpoint is reported as damaged (I10).
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from tests.faults import fake_ranks
from tests.faults.service_home import Home, Member, until
from trainyard.contract.messages import ExitReport, Outcome, read_message
from trainyard.contract.status import LIVE, TERMINAL, JobStatus, Reason, can_transition
from trainyard.service.db.engine import Database
from trainyard.service.db.models import AttemptRow, CheckpointRow, DeviceLeaseRow, EventRow, JobRow, MetricRow
from trainyard.service.launch.base import LOCAL

SAMPLE_SECONDS = 0.03
DAMAGE_REASONS = (Reason.SILENT_CORRUPTION, Reason.CHECKPOINT_INVALID)
DAMAGE_CODES = ("checkpoint_invalid", "resume_differs")

Damage = Callable[[Path], str | None]


class Sampler:
    """Samples the process table all the time, to find what was true only for an instant (I1)."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.found: list[str] = []
        self.samples = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(20)

    def _run(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            self.samples += 1
            for job_id, numbers in self._several().items():
                self.found.append(f"I1: attempts {sorted(numbers)} of {job_id} live at once")

    def _several(self) -> dict[str, set[int]]:
        living: dict[str, list[Member]] = {}
        for member in working(self.home, SAMPLE_SECONDS):
            living.setdefault(member.job, []).append(member)
        several = {job: found for job, found in living.items() if len({m.number for m in found}) > 1}
        # Seen one after the other; only those that are alive now, after all were seen, lived at one instant.
        still = {job: {m.number for m in found if m.process.alive()} for job, found in several.items()}
        return {job: numbers for job, numbers in still.items() if len(numbers) > 1}


def working(home: Home, max_age: float = 0.0) -> list[Member]:
    """Living processes that count: all but an agent that has not begun, or that only delivers its report."""

    def counts(member: Member) -> bool:
        attempt = home.run(member.job).attempt(member.number)
        return member.role != "agent" or (attempt.started.exists() and not attempt.exit.exists())

    return [member for member in home.processes(max_age=max_age) if counts(member)]


@contextmanager
def reading(home: Home) -> Iterator[Session]:
    database = Database(home.database_url)
    try:
        with database.read() as session:
            yield session
    finally:
        database.close()


def check(home: Home, sampler: Sampler | None = None, damage: Damage = fake_ranks.damage) -> None:
    """Raise AssertionError for the first invariant that does not hold."""
    assert sampler is None or sampler.found == []
    assert home.server_errors == [], "I8"
    with reading(home) as session:
        check_leases(session)
        jobs = session.scalars(select(JobRow)).all()
        for job in jobs:
            check_curve(session, job, home.tolerance)
            check_path(session, job)
            check_success(home, job)
        checkpoints = session.scalars(select(CheckpointRow.path).where(CheckpointRow.kind == "full")).all()
    # After the transaction: it takes long on a busy host, and Postgres ends a session that is idle in one.
    check_checkpoints(checkpoints, damage)
    ended = {job.id for job in jobs if job.status in TERMINAL}
    until(lambda: not [m for m in working(home) if m.job in ended], home.grace, "I2: nothing of ended jobs lives")


def check_leases(session: Session) -> None:
    """I3; a device has one row at most by its primary key."""
    held: dict[str, list[str]] = {}
    for lease in session.scalars(select(DeviceLeaseRow).where(DeviceLeaseRow.attempt_id.is_not(None))):
        assert lease.attempt_id is not None
        held.setdefault(lease.attempt_id, []).append(lease.device)
    here = select(AttemptRow).where(AttemptRow.ended_at.is_(None), AttemptRow.launcher == LOCAL)
    live = {row.id: sorted(row.devices) for row in session.scalars(here)}
    assert {attempt: sorted(devices) for attempt, devices in held.items()} == live, "I3"
    for job in session.scalars(select(JobRow)):
        alive = select(AttemptRow.id).where(AttemptRow.job_id == job.id, AttemptRow.ended_at.is_(None))
        assert len(session.scalars(alive).all()) == (job.status in LIVE), f"I3: {job.id} is {job.status}"


def check_curve(session: Session, job: JobRow, tolerance: float = 0.0) -> None:
    """I4. ``tolerance``: relative, for runs whose ranks change in number, and with them the order of sums."""
    columns = select(MetricRow.step, MetricRow.loss, MetricRow.stitched).where(MetricRow.job_id == job.id)
    rows = session.execute(columns.order_by(MetricRow.step)).all()
    stitched = [row.step for row in rows if row.stitched]
    assert stitched == list(range(1, len(stitched) + 1)), f"I4: a gap in {stitched}"
    values: dict[int, set[float | None]] = {}
    for row in rows:
        values.setdefault(row.step, set()).add(row.loss)
    assert [step for step, losses in values.items() if _differ(losses, tolerance)] == [], "I4: a step with two values"
    if job.status == JobStatus.SUCCEEDED:
        assert len(stitched) == job.progress["step"], f"I4: {len(stitched)} of {job.progress['step']} points"


def _differ(losses: set[float | None], tolerance: float) -> bool:
    numbers = [loss for loss in losses if loss is not None]
    return len(losses) > 1 and (None in losses or max(numbers) - min(numbers) > tolerance * abs(min(numbers)))


def check_path(session: Session, job: JobRow) -> None:
    """I5."""
    log = select(EventRow.data).where(EventRow.job_id == job.id, EventRow.kind == "status").order_by(EventRow.number)
    walked = [JobStatus.QUEUED]
    for data in session.scalars(log):
        assert data["from"] == walked[-1], f"I5: {walked} and then {data}"
        walked.append(JobStatus(data["to"]))
        assert can_transition(walked[-2], walked[-1]), f"I5: {walked}"
    assert walked[-1] == job.status, f"I5: {walked}, and the job is {job.status}"


def check_checkpoints(paths: Iterable[str], damage: Damage) -> None:
    """I6."""
    for path in paths:
        found = damage(Path(path))
        assert found is None, f"I6: {found}"


def check_success(home: Home, job: JobRow) -> None:
    """I9."""
    if job.status != JobStatus.SUCCEEDED:
        return
    attempt = home.run(job.id).attempt(job.attempt)
    outcome = read_message(Outcome, attempt.outcome)
    report = read_message(ExitReport, attempt.exit)
    assert outcome is not None, "I9"
    assert outcome.outcome == "completed", "I9"
    assert report is None or report.outcome == "completed", "I9"


def check_alarms(home: Home) -> int:
    """I10. Return how many resumed attempts have compared their weights, each with a difference of 0."""
    with reading(home) as session:
        wrong = [f"{row.job_id}/{row.number}: {row.message}" for row in session.scalars(select(AttemptRow))
                 if row.reason in DAMAGE_REASONS]  # fmt: skip
        events = session.scalars(select(EventRow).where(EventRow.kind.in_(("warning", "resume_verified")))).all()
        wrong += [f"{row.job_id}: {row.message}" for row in events if row.data.get("code") in DAMAGE_CODES]
        verified = [row for row in events if row.kind == "resume_verified"]
        wrong += [f"{row.job_id}: {row.message}" for row in verified if row.data["difference"] != 0]
    assert wrong == [], "I10: damage is reported, and nothing was damaged"
    return len(verified)


def check_weights(home: Home, job_id: str, steps: int) -> None:
    """I7, for the fake ranks."""
    model = home.run(job_id).artifacts(None).checkpoint(steps) / fake_ranks.MODEL
    assert model.read_text() == fake_ranks.weights_after(steps), "I7"
