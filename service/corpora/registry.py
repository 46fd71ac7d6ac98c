"""The corpora in the database: which one a job needs, whether it is ready, and what happens to its jobs."""

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from trainyard.contract.corpus_files import CorpusFilesInvalid
from trainyard.contract.events import Event
from trainyard.contract.messages import ExitReport
from trainyard.contract.parsing import Problem
from trainyard.contract.prepared import (
    CorpusPart,
    PreparedCorpus,
    PrepareTask,
    corpus_key,
    corpus_parts,
    find_prepared,
)
from trainyard.contract.spec import JobSpec, ResourcesSpec
from trainyard.contract.status import LIVE, WAITING, CorpusStatus, JobStatus, Phase
from trainyard.contract.tokenizer_info import TokenizerInvalid
from trainyard.service.auth.principal import Principal
from trainyard.service.corpora import rules
from trainyard.service.db.models import CorpusRow, JobRow
from trainyard.service.errors import CorpusInUse, CorpusNotFound, RequestInvalid, with_problems
from trainyard.service.ids import CORPUS_ID, new_id
from trainyard.service.jobs import repository
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.launch.base import LOCAL, AttemptRef, Launch
from trainyard.service.timing import Timing

UNPREPARED = CorpusStatus.QUEUED, CorpusStatus.FAILED, CorpusStatus.STOPPED
"""Statuses in which no process prepares the corpus, and it is not ready."""


@dataclass(frozen=True)
class CorpusCheck:
    """The parts of a spec's corpus, their common key, and their token shards if the cache has all of them."""

    parts: tuple[CorpusPart, ...]
    key: str
    prepared: PreparedCorpus | None


def check_corpus(spec: JobSpec, cache: Path) -> CorpusCheck | None:
    """Check whether the corpus of ``spec`` is prepared. Reads the names and times of its files, not their content.

    Return None if a file is missing: then the run reports it.
    """
    try:
        parts = corpus_parts(spec.data)
        return CorpusCheck(parts, corpus_key(parts), find_prepared(cache, parts))
    except (OSError, CorpusFilesInvalid, TokenizerInvalid):
        return None


def ensure(
    session: Session, check: CorpusCheck, spec: JobSpec, by: Principal, now: datetime, requested: bool = False
) -> CorpusRow:
    """Return the corpus of ``check``, created if it is new.

    If its token shards are gone, it waits to be prepared again. ``requested``: prepare it although no job waits for it.
    """
    row = _by_key(session, check.key) or _insert(session, check, spec, by, now)
    row.deleted = False
    if check.prepared is not None and row.status in UNPREPARED:
        row.status, row.prepared, row.finished_at = CorpusStatus.READY, check.prepared.model_dump(mode="json"), now
        row.reason = row.error = row.message = row.restart_at = None
    elif check.prepared is None and row.status != CorpusStatus.PREPARING:
        if row.status != CorpusStatus.QUEUED:
            row.queued_at, row.progress = now, rules.at_start(row.progress)
            row.restarts = row.fruitless = 0
            row.reason = row.error = row.message = row.finished_at = None
        row.status, row.restart_at = CorpusStatus.QUEUED, None
        row.spec, row.launcher = spec.model_dump(mode="json"), spec.resources.launcher or LOCAL
    row.requested = row.requested or (requested and row.status != CorpusStatus.READY)
    session.flush()
    return row


def _by_key(session: Session, key: str) -> CorpusRow | None:
    return session.scalar(select(CorpusRow).where(CorpusRow.key == key).with_for_update())


def _insert(session: Session, check: CorpusCheck, spec: JobSpec, by: Principal, now: datetime) -> CorpusRow:
    row = CorpusRow(
        id=new_id("corpus"),
        key=check.key,
        parts=[part.model_dump(mode="json") for part in check.parts],
        status=CorpusStatus.QUEUED,
        spec=spec.model_dump(mode="json"),
        launcher=spec.resources.launcher or LOCAL,
        progress={},
        requested=False,
        created_at=now,
        queued_at=now,
        submitted_by=by.name,
    )
    try:
        with session.begin_nested():
            session.add(row)
    except IntegrityError:
        existing = _by_key(session, check.key)
        assert existing is not None
        return existing
    return row


def find_ready(session: Session, check: CorpusCheck) -> str | None:
    """Return the id of the corpus if it is known to be ready."""
    same = (CorpusRow.key == check.key, CorpusRow.status == CorpusStatus.READY, CorpusRow.deleted.is_(False))
    return session.scalar(select(CorpusRow.id).where(*same))


def find(session: Session, corpus_id: str) -> CorpusRow:
    """Return the corpus. Raises CorpusNotFound, also for text that is no id of a corpus."""
    query = select(CorpusRow).where(CorpusRow.id == corpus_id, CorpusRow.deleted.is_(False))
    row = session.scalar(query) if CORPUS_ID.fullmatch(corpus_id) else None
    if row is None:
        raise CorpusNotFound()
    return row


def lock(session: Session, corpus_id: str) -> CorpusRow | None:
    """Return the corpus, locked until this transaction ends. Lock order: a corpus before a job."""
    query = select(CorpusRow).where(CorpusRow.id == corpus_id).with_for_update()
    return session.scalar(query) if CORPUS_ID.fullmatch(corpus_id) else None


def list_corpora(session: Session, after: str | None, limit: int) -> tuple[list[CorpusRow], bool]:
    """Return a page of the corpora, newest first, and whether there are more."""
    query = select(CorpusRow).where(CorpusRow.deleted.is_(False)).order_by(CorpusRow.number.desc())
    if after is not None:
        number = session.scalar(select(CorpusRow.number).where(CorpusRow.id == after))
        if number is None:
            raise with_problems(RequestInvalid, [Problem("/query/after", "must be the id of an existing corpus")])
        query = query.where(CorpusRow.number < number)
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def jobs_of(session: Session, corpus_id: str, statuses: Iterable[JobStatus] | None = None) -> list[str]:
    """Return the ids of the jobs with this corpus, oldest first; ``statuses``: only those in one of them."""
    query = select(JobRow.id).where(JobRow.corpus_id == corpus_id).order_by(JobRow.number)
    if statuses is not None:
        query = query.where(JobRow.status.in_(sorted(statuses)))
    return list(session.scalars(query))


def _lock_jobs(session: Session, corpus_id: str, statuses: Iterable[JobStatus]) -> Iterator[JobRow]:
    """Yield the jobs with this corpus in one of ``statuses``, each locked until this transaction ends."""
    query = select(JobRow).where(JobRow.corpus_id == corpus_id, JobRow.status.in_(sorted(statuses)))
    for job_id in jobs_of(session, corpus_id, statuses):
        # The conditions again: until it is locked, a request may cancel, pause or delete it.
        job = session.scalar(query.where(JobRow.id == job_id).with_for_update())
        if job is not None:
            yield job


def ref(row: CorpusRow) -> AttemptRef:
    """Return the name of the newest attempt to prepare the corpus."""
    return AttemptRef(row.id, row.attempt, row.launcher)


def is_wanted(session: Session, row: CorpusRow) -> bool:
    """Return whether a job or a request waits for the corpus."""
    return not row.deleted and (row.requested or bool(jobs_of(session, row.id, WAITING)))


def claim(session: Session, row: CorpusRow, processes: int | None, now: datetime) -> Launch | None:
    """Begin the next attempt of a corpus that is not ready, and return its launch. Its jobs change to preparing."""
    if row.status not in UNPREPARED or not is_wanted(session, row):
        return None
    row.status, row.attempt, row.acked_seq = CorpusStatus.PREPARING, row.attempt + 1, 0
    row.launched_at = row.heard_at = row.asked_at = row.restart_at = row.finished_at = None
    row.progress = rules.at_start(row.progress)
    for job in _lock_jobs(session, row.id, [JobStatus.QUEUED]):
        begin(session, job, row, now)
    session.flush()
    spec = JobSpec.model_validate_json(json.dumps(row.spec))
    # No service checks this token. It marks the agent among the processes of its attempt.
    token = secrets.token_urlsafe(32)
    task = PrepareTask(parts=parts_of(row), processes=processes)
    return Launch(ref(row), row.id, _without_devices(spec), (), token, task=task)


def parts_of(row: CorpusRow) -> tuple[CorpusPart, ...]:
    """Return the parts of the corpus."""
    return tuple(CorpusPart.model_validate(part) for part in row.parts)


def _without_devices(spec: JobSpec) -> JobSpec:
    given = spec.resources
    resources = ResourcesSpec(
        device="cpu",
        nproc_per_node=max(1, spec.data.num_workers or 1),
        launcher=given.launcher,
        timeouts=given.timeouts,
        slurm=given.slurm,
    )
    return spec.model_copy(update={"resources": resources})


def begin(session: Session, job: JobRow, row: CorpusRow, now: datetime) -> None:
    """Change a queued job whose corpus is being prepared to preparing."""
    draft = EventDraft(
        "status", "its corpus is prepared on CPUs; no device is used", "scheduler", data={"corpus": row.id}
    )
    phase = {"phase": Phase.PREPARING_DATA, "phase_detail": rules.phase_detail(row.progress)}
    repository.transition(session, job, JobStatus.PREPARING, draft, now, **phase)


def record_progress(session: Session, row: CorpusRow, events: Sequence[Event], now: datetime) -> None:
    """Store what the process has reported, and show it in its jobs."""
    row.acked_seq, row.heard_at = events[-1].seq, now
    row.started_at = row.started_at or now
    row.progress = rules.after_events(row.progress, events)
    _show(session, row, rules.phase_detail(row.progress))


def _show(session: Session, row: CorpusRow, detail: dict[str, Any]) -> None:
    preparing = (JobRow.corpus_id == row.id, JobRow.status == JobStatus.PREPARING)
    statement = update(JobRow).where(*preparing).values(phase_detail=detail)
    session.execute(statement.execution_options(synchronize_session=False))


def close(
    session: Session, row: CorpusRow, report: ExitReport, prepared: PreparedCorpus | None, now: datetime, timing: Timing
) -> None:
    """Record the end of the attempt, and move the jobs that wait for it. Idempotent.

    ``prepared``: the token shards that the cache has, if the attempt was completed.
    """
    if row.status != CorpusStatus.PREPARING:
        return
    end = rules.after_preparation(
        report,
        wanted=is_wanted(session, row),
        restarts=row.restarts,
        fruitless=row.fruitless,
        made_progress=rules.made_progress(row.progress),
        max_restarts=int(row.spec["resources"]["max_restarts"]),
        timing=timing,
    )
    row.status, row.reason, row.message = end.status, end.reason, end.message
    row.error = end.error.model_dump(mode="json") if end.error is not None else None
    row.restarts, row.fruitless, row.asked_at = end.restarts, end.fruitless, None
    row.restart_at = now + timedelta(seconds=end.restart_seconds) if end.restart_seconds else None
    if end.status is CorpusStatus.QUEUED:
        row.progress = rules.at_start(row.progress)
        when = f"; it continues in {end.restart_seconds:g} s" if end.restart_seconds else "; it continues"
        _show(session, row, rules.phase_detail(row.progress, end.message + when))
        return
    row.requested, row.finished_at = False, now
    if prepared is not None:
        row.prepared = prepared.model_dump(mode="json")
    for job in _lock_jobs(session, row.id, WAITING):
        _release(session, job, row, end, now)


def _release(session: Session, job: JobRow, row: CorpusRow, end: rules.PreparationEnd, now: datetime) -> None:
    cleared = {"phase": None, "phase_detail": None}
    data = {"corpus": row.id}
    if end.status is CorpusStatus.FAILED:
        ended = {"reason": end.reason, "message": end.message, "error": row.error, "finished_at": now}
        draft = EventDraft("status", end.message, "scheduler", data=data)
        repository.transition(session, job, JobStatus.FAILED, draft, now, **ended, **cleared)
    elif job.status == JobStatus.PREPARING:
        draft = EventDraft("status", f"its corpus is ready: {end.message}", "scheduler", data=data)
        repository.transition(session, job, JobStatus.QUEUED, draft, now, **cleared)


def release_stray(session: Session, job: JobRow, now: datetime) -> None:
    """Queue a job again that is preparing a corpus which was removed, or became ready without it."""
    if job.status == JobStatus.PREPARING:
        draft = EventDraft("status", "queued again: its corpus is not being prepared", "scheduler")
        repository.transition(session, job, JobStatus.QUEUED, draft, now, phase=None, phase_detail=None)


def require_unused(session: Session, row: CorpusRow) -> None:
    """Raise CorpusInUse if a run has the corpus open, or waits for it."""
    users = jobs_of(session, row.id, {*LIVE, *WAITING})
    if users:
        more = ", ..." if len(users) > 5 else ""
        raise CorpusInUse(f"{', '.join(users[:5])}{more} uses it: wait for its end, or cancel it.", jobs=users[:5])


def unshared(session: Session, row: CorpusRow) -> PreparedCorpus | None:
    """Return the token shards of the corpus that no other one has, or None if it was never ready."""
    if row.prepared is None:
        return None
    others: set[str] = set()
    for other in session.scalars(select(CorpusRow.prepared).where(CorpusRow.id != row.id)):
        others |= PreparedCorpus.model_validate(other).keys if other is not None else set()
    prepared = PreparedCorpus.model_validate(row.prepared)
    return PreparedCorpus(
        sources=tuple(s for s in prepared.sources if s.key not in others),
        held_out=tuple(s for s in prepared.held_out if s.key not in others),
    )
