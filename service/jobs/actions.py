"""What users do to jobs. Each function is one transaction's work; the rules decide, this carries out."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, object_session

from trainyard.contract.parsing import Problem
from trainyard.contract.report import RUN_SETTINGS
from trainyard.contract.spec import JobSpec
from trainyard.contract.status import LIVE, TERMINAL, Desired, JobStatus, Reason
from trainyard.service.access import quotas
from trainyard.service.access.callers import Caller
from trainyard.service.errors import Conflict, InvalidState, SpecInvalid, StepUnavailable, with_problems
from trainyard.service.jobs import store
from trainyard.service.jobs.gathering import newest_step, standing
from trainyard.service.jobs.rules import Action, Move, Refusal, UnderWay, decide, fitting
from trainyard.service.jobs.store import Note
from trainyard.service.launch.base import AttemptName
from trainyard.service.tables import AttemptRow, CheckpointRow, JobRow

ASKED = {"pause": "pause", "cancel": "save and stop for good", "kill": "stop now, without a save"}

RESTING_MESSAGE = {
    JobStatus.PAUSED: "paused while it was waiting",
    JobStatus.CANCELLED: "cancelled while nothing was running",
}


def stop(session: Session, job_id: str, action: Action, by: Caller, now: datetime) -> JobRow:
    """Pause, cancel or kill. Raises InvalidState where that does not fit."""
    job = store.lock(session, job_id)
    decision = _fitting(job, action)
    if isinstance(decision, UnderWay):
        return job
    message = f"asked to {ASKED[action]}"
    if decision.to is None:
        return _wish(session, job, action, decision, by, now)
    changes: dict[str, Any] = {"desired": decision.desired, "restart_at": None, "asked_at": now}
    if job.preempted_by is not None:
        changes |= {"preempted_by": None, "reason": None}
    if decision.to in RESTING_MESSAGE:
        changes |= {"reason": Reason.USER, "message": RESTING_MESSAGE[decision.to], "asked_at": None}
    if decision.to in TERMINAL:
        changes["finished_at"] = now
    store.move(session, job, decision.to, Note(action, message, by.name, data={"action": action}), now, **changes)
    return job


def _wish(session: Session, job: JobRow, action: Action, decision: Move, by: Caller, now: datetime) -> JobRow:
    """The status stays: a cancel becomes a kill, or a restart that was due is called off."""
    job.desired = decision.desired
    if job.status == JobStatus.INTERRUPTED:
        job.restart_at = None
        job.message = (job.message or "").partition("; restarting")[0] + "; the restart was called off"
        store.tell(session, job, Note(action, "the restart was called off", by.name), now)
    else:
        job.asked_at = now
        if job.preempted_by is not None:
            job.preempted_by = job.reason = None  # it stays paused, and is not queued again
        store.tell(session, job, Note(action, f"asked to {ASKED[action]}", by.name), now)
    session.flush()
    return job


def save(session: Session, job_id: str, by: Caller, now: datetime) -> AttemptName:
    """Note the wish for a checkpoint, and return the attempt that is to hear of it. Raises InvalidState."""
    job = store.lock(session, job_id)
    _fitting(job, "save")
    store.tell(session, job, Note("save", "asked to save", by.name), now)
    return AttemptName(job.id, job.attempt, _launcher_of(session, job))


def _launcher_of(session: Session, job: JobRow) -> str:
    which = (AttemptRow.job_id == job.id, AttemptRow.number == job.attempt)
    return session.scalars(select(AttemptRow.launcher).where(*which)).one()


def resume_under_way(session: Session, job_id: str, changed: bool) -> bool:
    """Whether a resume without changes was asked for already and goes its way. Raises InvalidState."""
    job = store.find(session, job_id)
    decision = decide("resume", standing(job))
    if isinstance(decision, UnderWay) and not changed:
        return True
    if isinstance(decision, UnderWay):
        raise invalid_state(job, "it is being resumed already, without these changes")
    if isinstance(decision, Refusal) and not (job.status == JobStatus.SUCCEEDED and changed):
        raise invalid_state(job, decision.why)
    return False


def resume(
    session: Session, job_id: str, before: dict[str, Any], spec: JobSpec, step: int | None, by: Caller, now: datetime
) -> JobRow:
    """Queue the job again with ``spec``, which is ``before`` with what the user changed. Raises QuotaExceeded."""
    job = _unchanged(session, job_id, before)
    if job.status == JobStatus.SUCCEEDED:
        _require_more_steps(job, spec)
    elif isinstance(_fitting(job, "resume"), UnderWay):
        # Another request was faster since this one looked; it is the same wish, or one that comes too late.
        if spec.model_dump(mode="json") == before and step is None:
            return job
        raise invalid_state(job, "it is being resumed already, without these changes")
    if step is not None and checkpoint_path(session, job.id, step) is None:
        raise StepUnavailable()
    newest = newest_step(session, job.id)
    origin = _origin(job, newest)
    if step is not None:
        origin = f"goes back to step {step:,}; newer checkpoints are set aside" if step != newest else origin
    ranks = spec.resources.ranks
    quotas.require_room(session, by, ranks, but=job.id)
    after = spec.model_dump(mode="json")
    job.spec, job.device, job.priority = after, spec.resources.device, spec.resources.priority
    job.ranks, job.queued_by = ranks, by.name
    note = Note("resume", f"asked to resume; {origin}", by.name, data={"changes": differences(before, after)})
    changes = {
        "desired": Desired.RUN,
        "trigger": "resume",
        "queued_at": now,
        "restart_at": None,
        "restarts": 0,
        "finished_at": None,
        "asked_at": None,
        "resume_step": step,
    }
    cleared = {"reason": None, "message": None, "error": None}
    store.move(session, job, JobStatus.QUEUED, note, now, **changes, **cleared)
    return job


def _origin(job: JobRow, newest: int | None) -> str:
    if newest is not None:
        return f"goes on from step {newest:,}"
    if job.parent_step is not None:
        return f"goes on from step {job.parent_step:,} of its parent"
    return "there is no checkpoint: it starts anew"


def patch(
    session: Session,
    job_id: str,
    before: dict[str, Any],
    changes: dict[str, Any],
    spec: JobSpec,
    by: Caller,
    now: datetime,
) -> JobRow:
    """Store ``spec``, which is ``before`` with ``changes`` in it."""
    job = _unchanged(session, job_id, before)
    job.spec = spec.model_dump(mode="json")
    job.name, job.priority = spec.name, spec.resources.priority
    if "labels" in changes:
        store.put_labels(session, job, dict(spec.labels))
    message = f"changed {', '.join(sorted(changes))}" if changes else "nothing was changed"
    if JobStatus(job.status) in LIVE and not RUN_SETTINGS.keys().isdisjoint(changes):
        message += "; the run hears of it with its next report"
    store.tell(session, job, Note("changed", message, by.name, data={"fields": sorted(changes)}), now)
    session.flush()
    return job


def remove(session: Session, job_id: str) -> JobRow:
    """Remove the record; the caller removes the files once that is committed."""
    job = store.lock(session, job_id)
    _fitting(job, "delete")
    session.execute(delete(JobRow).where(JobRow.id == job.id, JobRow.version == job.version))
    return job


def invalid_state(job: JobRow, why: str) -> InvalidState:
    """The 409 that says the present status and the verbs that fit it."""
    session = object_session(job)
    has_checkpoint = session is not None and newest_step(session, job.id) is not None
    fits = fitting(replace(standing(job), has_checkpoint=has_checkpoint))
    hint = f"; what fits: {', '.join(fits)}" if fits else "; nothing fits but waiting"
    return InvalidState(f"{why[:1].upper()}{why[1:]}{hint}.", job_status=job.status, allowed_actions=fits)


def checkpoint_path(session: Session, job_id: str, step: int) -> str | None:
    """Where the full checkpoint of ``step`` is, as far as it was reported."""
    which = (CheckpointRow.job_id == job_id, CheckpointRow.kind == "full", CheckpointRow.step == step)
    return session.scalar(select(CheckpointRow.path).where(*which).limit(1))


def differences(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    """Pointers of the leaves that differ."""
    found: list[str] = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{path}/{key}")
        elif old != new:
            found.append(f"{path}/{key}")
    return found


def _fitting(job: JobRow, action: Action) -> Move | UnderWay:
    decision = decide(action, standing(job))
    if isinstance(decision, Refusal):
        raise invalid_state(job, decision.why)
    return decision


def own_steps(job: JobRow) -> int | None:
    """The length of the job's own schedule, where that is known: `max_steps` counts behind the base of a fork."""
    steps = job.facts.get("steps")
    return steps - (job.facts.get("base_step") or 0) if steps is not None else None


def _unchanged(session: Session, job_id: str, spec: dict[str, Any]) -> JobRow:
    """The job, locked. Raises Conflict where its spec is no longer the one that was worked on."""
    job = store.lock(session, job_id)
    if job.spec != spec:
        raise Conflict()
    return job


def _require_more_steps(job: JobRow, spec: JobSpec) -> None:
    """A finished job goes on only where there is more to do."""
    was, now = job.spec["training"], spec.training
    leaf = "max_steps" if now.max_steps is not None else "epochs"
    old, new = was[leaf], getattr(now, leaf)
    if leaf == "max_steps":
        old = old or own_steps(job)
    if old is not None and new <= old:
        message = "must be more than it was: the job has finished all of it"
        if leaf == "max_steps":
            message += "; max_steps, where given, decides alone"
        raise with_problems(SpecInvalid, [Problem(f"/{leaf}", message)])
