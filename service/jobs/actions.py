"""What users do to jobs. Each function is one transaction's work; the rules decide, this carries out."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from sqlalchemy import delete, select
from sqlalchemy.orm import Session, object_session

from trainyard.contract.messages import RUN_SETTINGS
from trainyard.contract.parsing import Problem, pointer_to
from trainyard.contract.spec import (
    CheckpointSpec,
    JobSpec,
    ReportingSpec,
    ResourcesSpec,
    TrainingSpec,
)
from trainyard.contract.spec_reference import NOTES
from trainyard.contract.status import (
    LIVE,
    TERMINAL,
    Desired,
    JobStatus,
    Reason,
)
from trainyard.contract.units import UNITS
from trainyard.service.auth import quotas
from trainyard.service.auth.principal import Principal
from trainyard.service.bodies import OptionalBody, without_defaults
from trainyard.service.db.models import AttemptRow, CheckpointRow, JobRow
from trainyard.service.errors import (
    Conflict,
    InvalidState,
    SpecInvalid,
    StepUnavailable,
    with_problems,
)
from trainyard.service.jobs import repository
from trainyard.service.jobs.lifecycle import (
    Action,
    InProgress,
    Rejected,
    Transition,
    allowed_actions,
    decide,
)
from trainyard.service.jobs.queries import newest_step, standing
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.jobs.submission import HostLimits, validate_spec
from trainyard.service.launch.base import AttemptRef

REQUESTED = {"pause": "pause", "cancel": "save and stop for good", "kill": "stop now, without a save"}

IDLE_MESSAGE = {
    JobStatus.PAUSED: "paused while it was waiting",
    JobStatus.CANCELLED: "cancelled while nothing was running",
}


def stop(session: Session, job_id: str, action: Action, by: Principal, now: datetime) -> JobRow:
    """Pause, cancel or kill. Raises InvalidState where that does not fit."""
    job = repository.lock(session, job_id)
    decision = _fitting(job, action)
    if isinstance(decision, InProgress):
        return job
    message = f"asked to {REQUESTED[action]}"
    if decision.to is None:
        return _set_desired(session, job, action, decision, by, now)
    changes: dict[str, Any] = {"desired": decision.desired, "restart_at": None, "asked_at": now}
    if job.preempted_by is not None:
        changes |= {"preempted_by": None, "reason": None}
    if decision.to in IDLE_MESSAGE:
        changes |= {"reason": Reason.USER, "message": IDLE_MESSAGE[decision.to], "asked_at": None}
    if decision.to in TERMINAL:
        changes["finished_at"] = now
    repository.transition(
        session, job, decision.to, EventDraft(action, message, by.name, data={"action": action}), now, **changes
    )
    return job


def _set_desired(
    session: Session, job: JobRow, action: Action, decision: Transition, by: Principal, now: datetime
) -> JobRow:
    """The status stays: a cancel becomes a kill, or a restart that was due is called off."""
    job.desired = decision.desired
    if job.status == JobStatus.INTERRUPTED:
        job.restart_at = None
        job.message = (job.message or "").partition("; restarting")[0] + "; the restart was called off"
        repository.record_event(session, job, EventDraft(action, "the restart was called off", by.name), now)
    else:
        job.asked_at = now
        if job.preempted_by is not None:
            job.preempted_by = job.reason = None  # it stays paused, and is not queued again
        repository.record_event(session, job, EventDraft(action, f"asked to {REQUESTED[action]}", by.name), now)
    session.flush()
    return job


def save(session: Session, job_id: str, by: Principal, now: datetime) -> AttemptRef:
    """Note the wish for a checkpoint, and return the attempt that is to hear of it. Raises InvalidState."""
    job = repository.lock(session, job_id)
    _fitting(job, "save")
    repository.record_event(session, job, EventDraft("save", "asked to save", by.name), now)
    return AttemptRef(job.id, job.attempt, _launcher_of(session, job))


def _launcher_of(session: Session, job: JobRow) -> str:
    which = (AttemptRow.job_id == job.id, AttemptRow.number == job.attempt)
    return session.scalars(select(AttemptRow.launcher).where(*which)).one()


def resume_in_progress(session: Session, job_id: str, changed: bool) -> bool:
    """Whether a resume without changes was asked for already and goes its way. Raises InvalidState."""
    job = repository.find(session, job_id)
    decision = decide("resume", standing(job))
    if isinstance(decision, InProgress) and not changed:
        return True
    if isinstance(decision, InProgress):
        raise invalid_state(job, "it is being resumed already, without these changes")
    if isinstance(decision, Rejected) and not (job.status == JobStatus.SUCCEEDED and changed):
        raise invalid_state(job, decision.reason)
    return False


def resume(
    session: Session, job_id: str, before: dict[str, Any], spec: JobSpec, step: int | None, by: Principal, now: datetime
) -> JobRow:
    """Queue the job again with ``spec``, which is ``before`` with what the user changed. Raises QuotaExceeded."""
    job = _unchanged(session, job_id, before)
    if job.status == JobStatus.SUCCEEDED:
        _require_more_steps(job, spec)
    elif isinstance(_fitting(job, "resume"), InProgress):
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
    quotas.check_quota(session, by, ranks, requeued_job=job.id)
    after = spec.model_dump(mode="json")
    job.spec, job.device, job.priority = after, spec.resources.device, spec.resources.priority
    job.ranks, job.queued_by = ranks, by.name
    note = EventDraft("resume", f"asked to resume; {origin}", by.name, data={"changes": differences(before, after)})
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
    repository.transition(session, job, JobStatus.QUEUED, note, now, **changes, **cleared)
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
    by: Principal,
    now: datetime,
) -> JobRow:
    """Store ``spec``, which is ``before`` with ``changes`` in it."""
    job = _unchanged(session, job_id, before)
    job.spec = spec.model_dump(mode="json")
    job.name, job.priority = spec.name, spec.resources.priority
    if "labels" in changes:
        repository.put_labels(session, job, dict(spec.labels))
    message = f"changed {', '.join(sorted(changes))}" if changes else "nothing was changed"
    if JobStatus(job.status) in LIVE and not RUN_SETTINGS.keys().isdisjoint(changes):
        message += "; the run hears of it with its next report"
    repository.record_event(
        session, job, EventDraft("changed", message, by.name, data={"fields": sorted(changes)}), now
    )
    session.flush()
    return job


def remove(session: Session, job_id: str) -> JobRow:
    """Remove the record; the caller removes the files once that is committed."""
    job = repository.lock(session, job_id)
    _fitting(job, "delete")
    session.execute(delete(JobRow).where(JobRow.id == job.id, JobRow.version == job.version))
    return job


def invalid_state(job: JobRow, why: str) -> InvalidState:
    """The 409 that says the present status and the verbs that fit it."""
    session = object_session(job)
    has_checkpoint = session is not None and newest_step(session, job.id) is not None
    fits = allowed_actions(replace(standing(job), has_checkpoint=has_checkpoint))
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


def _fitting(job: JobRow, action: Action) -> Transition | InProgress:
    decision = decide(action, standing(job))
    if isinstance(decision, Rejected):
        raise invalid_state(job, decision.reason)
    return decision


def own_steps(job: JobRow) -> int | None:
    """The length of the job's own schedule, where that is known: `max_steps` counts behind the base of a fork."""
    steps = job.facts.get("steps")
    return steps - (job.facts.get("base_step") or 0) if steps is not None else None


def _unchanged(session: Session, job_id: str, spec: dict[str, Any]) -> JobRow:
    """The job, locked. Raises Conflict where its spec is no longer the one that was worked on."""
    job = repository.lock(session, job_id)
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


MAX_STEP = 2**53 - 1

RESUME_FIELDS: dict[str, tuple[str, ...]] = {
    "epochs": ("training", "epochs"),
    "max_steps": ("training", "max_steps"),
    "resources": ("resources",),
    "step": (),
}

PATCH_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "labels": ("labels",),
    "priority": ("resources", "priority"),
    **RUN_SETTINGS,
}

"""Name in the body -> place in the spec."""


def _as_in(group: type[BaseModel], leaf: str) -> Any:
    """Return a field that takes any value, described as in the job spec."""
    schema = group.model_json_schema()["properties"][leaf]

    def describe(found: dict[str, Any]) -> None:
        found.clear()
        found.update(schema)
        found.setdefault("description", NOTES.get(leaf, ""))
        found |= {"x-unit": UNITS[leaf]} if leaf in UNITS else {}

    return Field(default=None, json_schema_extra=describe)


class PatchJobBody(OptionalBody):
    """What is to change of a job. `changed_spec` checks the values, as part of the whole spec."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    name: Any = _as_in(JobSpec, "name")
    labels: Any = _as_in(JobSpec, "labels")
    priority: Any = _as_in(ResourcesSpec, "priority")
    log_interval: Any = _as_in(ReportingSpec, "log_interval")
    save_interval: Any = _as_in(CheckpointSpec, "save_interval")
    keep_last: Any = _as_in(CheckpointSpec, "keep_last")


class ResumeBody(OptionalBody):
    """What is to change as the run continues; ``step``: at which checkpoint, the newest if None."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    epochs: Any = _as_in(TrainingSpec, "epochs")
    max_steps: Any = _as_in(TrainingSpec, "max_steps")
    resources: SkipValidation[ResourcesSpec] = Field(default_factory=ResourcesSpec)
    step: Annotated[int, Field(ge=0, le=MAX_STEP)] | None = None


def resumed_spec(spec: dict[str, Any], steps: int | None, changes: Mapping[str, Any], host: HostLimits) -> JobSpec:
    """The spec with the changes of a resume; epochs and max_steps may only grow. ``steps``: the run's, where known."""
    before = {"epochs": spec["training"]["epochs"], "max_steps": spec["training"]["max_steps"] or steps}
    problems = [
        Problem(f"/{name}", f"may only be raised: it is {old:,}" if old is not None else "may only be raised")
        for name, old in before.items()
        if name in changes and _lowered(old, changes[name])
    ]
    try:
        resumed = changed_spec(spec, changes, RESUME_FIELDS, host)
    except SpecInvalid as error:
        known = {problem.pointer for problem in problems}
        others = [Problem(e["pointer"], e["message"]) for e in error.extra["errors"] if e["pointer"] not in known]
        raise with_problems(SpecInvalid, [*problems, *others]) from None
    if problems:
        raise with_problems(SpecInvalid, problems)
    return resumed


def _lowered(old: int | None, new: object) -> bool:
    return new is None or (old is not None and type(new) is int and new < old)


def changed_spec(
    spec: dict[str, Any], changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]], host: HostLimits
) -> JobSpec:
    """``spec`` with ``changes`` in their places, held against the host again. Pointers are those of the body."""
    merged = {group: dict(value) if isinstance(value, dict) else value for group, value in spec.items()}
    for name, value in changes.items():
        place = fields[name]
        if len(place) == 1:
            old = merged[place[0]]
            keep = place[0] == "resources" and isinstance(value, dict)
            merged[place[0]] = {**old, **value} if keep else value
        elif place:
            merged[place[0]][place[1]] = value
    try:
        return validate_spec(merged, host)
    except SpecInvalid as error:
        raise _repointed(error, changes, fields) from None


def _repointed(error: SpecInvalid, changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]) -> Exception:
    ours = {pointer_to(*fields[name]): pointer_to(name) for name in changes if fields[name]}
    problems = []
    for found in error.extra["errors"]:
        pointer = found["pointer"]
        place = next((place for place in ours if pointer == place or pointer.startswith(place + "/")), None)
        if place is not None:
            pointer = ours[place] + pointer[len(place) :]
        problems.append(Problem(pointer, found["message"]))
    return with_problems(SpecInvalid, problems)
