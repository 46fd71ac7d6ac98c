"""User actions on jobs. `lifecycle.decide` decides; these functions act, each inside the caller's transaction."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from sqlalchemy import delete, select
from sqlalchemy.orm import Session, object_session

from trainyard.contract.lr_schedule import LRSchedule
from trainyard.contract.messages import RUN_SETTINGS
from trainyard.contract.parsing import Problem, pointer_to
from trainyard.contract.scopes import Scope
from trainyard.contract.spec import (
    CheckpointSpec,
    JobSpec,
    LimitsSpec,
    ReportingSpec,
    ResourcesSpec,
    TrainingSpec,
    replace_length,
)
from trainyard.contract.spec_reference import NOTES
from trainyard.contract.status import LIVE, TERMINAL, Desired, JobStatus, Reason
from trainyard.contract.units import UNITS
from trainyard.service.auth import quotas
from trainyard.service.auth.principal import ADMIN, LOCAL, Principal
from trainyard.service.bodies import OptionalBody, without_defaults
from trainyard.service.db.models import AttemptRow, CheckpointRow, JobRow, TokenRow
from trainyard.service.errors import Conflict, Forbidden, InvalidState, SpecInvalid, StepUnavailable, with_problems
from trainyard.service.jobs import repository
from trainyard.service.jobs.lifecycle import Action, InProgress, Rejected, Transition, allowed_actions, decide
from trainyard.service.jobs.queries import job_state, newest_step, train_seconds
from trainyard.service.jobs.repository import EventDraft
from trainyard.service.jobs.submission import HostLimits, validate_fields, validate_spec
from trainyard.service.launch.base import AttemptRef

REQUESTED = {"pause": "pause", "cancel": "save and end the job", "kill": "stop now, without a save"}

IDLE_MESSAGE = {
    JobStatus.PAUSED: "paused while it was waiting",
    JobStatus.CANCELLED: "cancelled while nothing was running",
}


def stop(session: Session, job_id: str, action: Action, by: Principal, now: datetime) -> JobRow:
    """Pause, cancel or kill the job. Raises InvalidState if its status does not allow that."""
    job = repository.lock(session, job_id)
    decision = _require_allowed(job, action)
    if isinstance(decision, InProgress):
        return job
    if decision.to is None:
        return _set_desired(session, job, action, decision, by, now)
    changes: dict[str, Any] = {"desired": decision.desired, "restart_at": None, "asked_at": now}
    if job.preempted_by is not None:
        changes |= {"preempted_by": None, "reason": None}
    if decision.to in IDLE_MESSAGE:
        changes |= {"reason": Reason.USER, "message": IDLE_MESSAGE[decision.to], "asked_at": None}
        changes |= {"phase": None, "phase_detail": None}  # of a job whose corpus was being prepared
    if decision.to in TERMINAL:
        changes["finished_at"] = now
    draft = EventDraft(action, f"asked to {REQUESTED[action]}", by.name, data={"action": action})
    repository.transition(session, job, decision.to, draft, now, **changes)
    return job


def _set_desired(
    session: Session, job: JobRow, action: Action, decision: Transition, by: Principal, now: datetime
) -> JobRow:
    # The status does not change: a cancel becomes a kill, or the automatic restart is called off.
    job.desired = decision.desired
    if job.status == JobStatus.INTERRUPTED:
        job.restart_at = None
        job.message = (job.message or "").partition("; restarting")[0] + "; the restart was called off"
        repository.record_event(session, job, EventDraft(action, "the restart was called off", by.name), now)
    else:
        job.asked_at = now
        if job.preempted_by is not None:
            job.preempted_by = job.reason = None  # once paused, it must not be queued again automatically
        repository.record_event(session, job, EventDraft(action, f"asked to {REQUESTED[action]}", by.name), now)
    session.flush()
    return job


def save(session: Session, job_id: str, by: Principal, now: datetime) -> AttemptRef:
    """Record that a save was requested. Return the attempt, to be notified after the commit. Raises InvalidState."""
    job = repository.lock(session, job_id)
    _require_allowed(job, "save")
    repository.record_event(session, job, EventDraft("save", "asked to save", by.name), now)
    current = (AttemptRow.job_id == job.id, AttemptRow.number == job.attempt)
    return AttemptRef(job.id, job.attempt, session.scalars(select(AttemptRow.launcher).where(*current)).one())


def resume_in_progress(session: Session, job_id: str, changed: bool) -> bool:
    """Return whether the same resume is in progress already. ``changed``: the request has changes.

    Raises InvalidState if the job cannot be resumed like that.
    """
    job = repository.find(session, job_id)
    decision = decide("resume", job_state(job))
    if isinstance(decision, InProgress) and not changed:
        return True
    if isinstance(decision, InProgress):
        raise invalid_state(job, "it is being resumed already, without these changes")
    if isinstance(decision, Rejected) and not (job.status == JobStatus.SUCCEEDED and changed):
        raise invalid_state(job, decision.reason)
    return False


@dataclass(frozen=True)
class RateChange:
    """Effect of a resume on the learning rate.

    ``steps``: last step of the resumed run. ``before``: rate of the step of the checkpoint, ``after``: rate of the next
    step. None if unknown, or if there is no checkpoint. ``is_longer``: the resume adds steps.
    """

    steps: int | None
    before: float | None
    after: float | None
    is_longer: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of the plan, the event and the answer."""
        return {"learning_rate_before": self.before, "learning_rate_after": self.after}

    def __str__(self) -> str:
        if not self.is_longer or self.before is None or self.after is None:
            return ""
        return f"; the learning rate is {self.before:.3g} before and {self.after:.3g} after"


Schedule = Literal["extend", "continue"]


def with_schedule(job: JobRow, spec: JobSpec, step: int | None, schedule: Schedule) -> tuple[JobSpec, RateChange]:
    """Return ``spec``, which has the changes of a resume at ``step``, with its schedule, and the learning rates.

    If the run is longer than before, "extend" follows the schedule of a run that had this length from the start, and
    "continue" decays from the rate at ``step``. ``step`` is None if there is no checkpoint.
    """
    base = int(job.facts.get("base_step") or 0)
    old = JobSpec.model_validate_json(json.dumps(job.spec))
    ends = [_last_step(job, old.training), _last_step(job, spec.training)]
    if ends[0] is None or ends[1] is None:
        return spec, RateChange(job.facts.get("steps"), None, None)
    before, is_longer = LRSchedule.from_spec(old.training, ends[0], base), ends[1] > ends[0]
    if is_longer:
        continued = before.continuations(step) if schedule == "continue" and step is not None else []
        training = spec.training.model_copy(update={"continued_at": continued})
        spec = spec.model_copy(update={"training": training})
    if not step or step <= base:
        return spec, RateChange(ends[1], None, None)
    after = LRSchedule.from_spec(spec.training, ends[1], base)
    return spec, RateChange(ends[1], before.at(step), after.at(min(step + 1, ends[1])), is_longer)


def _last_step(job: JobRow, training: TrainingSpec) -> int | None:
    """Return the last step of ``job`` with another ``training``, or None if unknown."""
    facts, known = job.facts, job.spec["training"].get("max_tokens")
    per_step, end = facts.get("tokens_per_step"), facts.get("steps")
    if training.max_tokens is not None and known is not None and end is not None:
        # The worker has counted the old length, so only the difference is estimated.
        added = training.max_tokens - known
        return end + math.ceil(added / per_step) if added and per_step else None if added else int(end)
    own = training.run_steps(facts.get("steps_per_epoch"), per_step)
    return int(facts.get("base_step") or 0) + own if own else None


def resume(
    session: Session,
    job_id: str,
    before: dict[str, Any],
    spec: JobSpec,
    step: int | None,
    by: Principal,
    now: datetime,
    rates: RateChange | None = None,
    corpus_id: str | None = None,
) -> JobRow:
    """Queue the job again with ``spec``, which is ``before`` with the user's changes. ``rates``: `resumed_rates`.

    ``corpus_id``: the corpus that it waits for.

    Raises Conflict, InvalidState, SpecInvalid, StepUnavailable or QuotaExceeded.
    """
    job = _lock_unchanged(session, job_id, before)
    _require_time(job, spec)
    if job.status == JobStatus.SUCCEEDED and job.reason == Reason.LIMIT:
        _require_another_target(job, spec)
    elif job.status == JobStatus.SUCCEEDED:
        _require_more_steps(job, spec)
    elif isinstance(_require_allowed(job, "resume"), InProgress):
        # Another request resumed the job since `resume_in_progress` was called: accept only the same request.
        if spec.model_dump(mode="json") == before and step is None:
            return job
        raise invalid_state(job, "it is being resumed already, without these changes")
    _require_movable(job, spec)
    if step is not None and checkpoint_path(session, job.id, step) is None:
        raise StepUnavailable()
    newest = newest_step(session, job.id)
    origin = _resume_origin(job, newest)
    if step is not None:
        origin = f"goes back to step {step:,}; newer checkpoints are set aside" if step != newest else origin
    ranks = spec.resources.ranks
    quotas.check_quota(session, by, ranks, requeued_job=job.id)
    after = spec.model_dump(mode="json")
    job.spec, job.device, job.priority = after, spec.resources.device, spec.resources.priority
    job.ranks, job.queued_by, job.corpus_id = ranks, by.name, corpus_id
    rates = rates or RateChange(job.facts.get("steps"), None, None)
    job.facts = {**job.facts, "steps": rates.steps, **rates.fields}
    data = {"changes": differences(before, after), **rates.fields}
    draft = EventDraft("resume", f"asked to resume; {origin}{rates}", by.name, data=data)
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
    repository.transition(session, job, JobStatus.QUEUED, draft, now, **changes, **cleared)
    return job


def _resume_origin(job: JobRow, newest: int | None) -> str:
    if newest is not None:
        return f"continues from step {newest:,}"
    if job.parent_step is not None:
        return f"continues from step {job.parent_step:,} of its parent"
    return "there is no checkpoint: it starts from scratch"


def patch(
    session: Session,
    job_id: str,
    before: dict[str, Any],
    changes: dict[str, Any],
    spec: JobSpec,
    by: Principal,
    now: datetime,
) -> JobRow:
    """Store ``spec``, which is ``before`` with ``changes`` applied.

    Raises Conflict; Forbidden if ``changes`` has an owner and the caller is no admin; SpecInvalid if no token has this
    name.
    """
    job = _lock_unchanged(session, job_id, before)
    job.spec = spec.model_dump(mode="json")
    job.name, job.priority = spec.name, spec.resources.priority
    job.description, job.group_name = spec.description, spec.group
    job.discarded = changes.get("discarded", job.discarded)
    if "labels" in changes:
        repository.put_labels(session, job, dict(spec.labels))
    message = f"changed {', '.join(sorted(changes))}" if changes else "nothing was changed"
    if "owner" in changes:
        message += f"; {_change_owner(session, job, changes['owner'], by)}"
    if JobStatus(job.status) in LIVE and not RUN_SETTINGS.keys().isdisjoint(changes):
        message += "; the run receives it with its next report"
    repository.record_event(
        session, job, EventDraft("changed", message, by.name, data={"fields": sorted(changes)}), now
    )
    session.flush()
    return job


def _change_owner(session: Session, job: JobRow, name: str, by: Principal) -> str:
    """Give the job to another owner; return the change as text. The event of its submission keeps who submitted it."""
    if not by.scope.covers(Scope.ADMIN):
        raise Forbidden(f"Only a token of the scope {Scope.ADMIN} changes the owner of a job.")
    valid = select(TokenRow.id).where(TokenRow.name == name, TokenRow.revoked_at.is_(None))
    if name not in (LOCAL.name, ADMIN.name) and session.scalar(valid) is None:
        raise with_problems(SpecInvalid, [Problem("/owner", "no token that is not revoked has this name")])
    before, job.submitted_by = job.submitted_by or LOCAL.name, name
    return f"the owner was {before} and is {name}"


def remove(session: Session, job_id: str) -> JobRow:
    """Delete the record; the caller deletes the files after the commit. Raises InvalidState."""
    job = repository.lock(session, job_id)
    _require_allowed(job, "delete")
    session.execute(delete(JobRow).where(JobRow.id == job.id, JobRow.version == job.version))
    return job


def invalid_state(job: JobRow, why: str) -> InvalidState:
    """Return the 409 error with the current status and the actions it allows."""
    session = object_session(job)
    has_checkpoint = session is not None and newest_step(session, job.id) is not None
    actions = allowed_actions(replace(job_state(job), has_checkpoint=has_checkpoint))
    hint = f"Allowed actions: {', '.join(actions) or 'none yet'}."
    return InvalidState(f"{why[:1].upper()}{why[1:]}. {hint}", job_status=job.status, allowed_actions=actions)


def checkpoint_path(session: Session, job_id: str, step: int) -> str | None:
    """Return the path of the full checkpoint of ``step``, or None if none was reported."""
    full = (CheckpointRow.job_id == job_id, CheckpointRow.kind == "full", CheckpointRow.step == step)
    return session.scalar(select(CheckpointRow.path).where(*full).limit(1))


def differences(before: dict[str, Any], after: dict[str, Any], path: str = "") -> list[str]:
    """Return the JSON pointers of the leaves that differ."""
    pointers: list[str] = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            pointers += differences(old, new, f"{path}/{key}")
        elif old != new:
            pointers.append(f"{path}/{key}")
    return pointers


def _require_allowed(job: JobRow, action: Action) -> Transition | InProgress:
    decision = decide(action, job_state(job))
    if isinstance(decision, Rejected):
        raise invalid_state(job, decision.reason)
    return decision


def _length_of_run(job: JobRow) -> dict[str, int]:
    """Return the length of the run by field of the spec, without those that are unknown.

    In a fork, ``max_steps`` and ``max_tokens`` count from its base step.
    """
    facts = job.facts
    if (steps := facts.get("steps")) is None:
        return {}
    own = steps - (facts.get("base_step") or 0)
    per_step = facts.get("tokens_per_step")
    return {"max_steps": own, **({"max_tokens": round(own * per_step)} if per_step else {})}


def _lock_unchanged(session: Session, job_id: str, spec: dict[str, Any]) -> JobRow:
    job = repository.lock(session, job_id)
    if job.spec != spec:  # another request has changed it since it was read, before this transaction
        raise Conflict()
    return job


def _require_movable(job: JobRow, spec: JobSpec) -> None:
    """Raise SpecInvalid if ``save_dir`` changes before a fork's first attempt, which takes over the parent's files."""
    is_changed = spec.checkpoint.save_dir != job.spec["checkpoint"]["save_dir"]
    if is_changed and job.attempt == 0 and job.parent_step is not None:
        message = (
            "cannot change before the fork was launched once: resume it as it is, or fork again with this save_dir"
        )
        raise with_problems(SpecInvalid, [Problem("/save_dir", message)])


def _require_time(job: JobRow, spec: JobSpec) -> None:
    """Raise SpecInvalid if the attempts have used up ``max_minutes``, so that the next one would end at once."""
    minutes, used = spec.limits.max_minutes, train_seconds(job)
    is_asked = job.reason == Reason.LIMIT or minutes != job.spec.get("limits", {}).get("max_minutes")
    if is_asked and minutes is not None and used >= 60 * minutes:
        message = f"must be more, or null: {used / 60:.4g} minutes of training are used up"
        raise with_problems(SpecInvalid, [Problem("/max_minutes", message)])


def _require_another_target(job: JobRow, spec: JobSpec) -> None:
    """Raise SpecInvalid if the loss that has ended the run would end it again."""
    limits = job.spec.get("limits", {})  # a stored spec of 0.1 has none
    minutes, reached = limits.get("max_minutes"), limits.get("target_loss")
    if reached is None or spec.limits.target_loss is None:
        return  # a PATCH after the end may have removed the limit that ended the run
    ended_by_loss = minutes is None or train_seconds(job) < 60 * minutes
    if ended_by_loss and spec.limits.target_loss >= reached:
        raise with_problems(
            SpecInvalid, [Problem("/target_loss", f"must be less than {reached:g}, which is reached, or null")]
        )


def _require_more_steps(job: JobRow, spec: JobSpec) -> None:
    leaf = next((name for name in ("max_steps", "max_tokens") if getattr(spec.training, name) is not None), "epochs")
    old, new = job.spec["training"].get(leaf) or _length_of_run(job).get(leaf), getattr(spec.training, leaf)
    if old is not None and new <= old:
        message = "must be more than before: the job has finished all of it"
        if leaf != "epochs":
            message += f"; if {leaf} is given, epochs has no effect"
        raise with_problems(SpecInvalid, [Problem(f"/{leaf}", message)])


MAX_STEP = 2**53 - 1

RESUME_FIELDS: dict[str, tuple[str, ...]] = {
    "epochs": ("training", "epochs"),
    "max_steps": ("training", "max_steps"),
    "max_tokens": ("training", "max_tokens"),
    "max_minutes": ("limits", "max_minutes"),
    "target_loss": ("limits", "target_loss"),
    "save_dir": ("checkpoint", "save_dir"),
    "gradient_checkpointing": ("training", "gradient_checkpointing"),
    "resources": ("resources",),
    "step": (),
    "schedule": (),
}

PATCH_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "labels": ("labels",),
    "description": ("description",),
    "group": ("group",),
    "discarded": (),
    "owner": (),
    "priority": ("resources", "priority"),
    **RUN_SETTINGS,
}
"""Name in the body -> path in the spec, or () if it is not a field of the spec."""


def _spec_field(group: type[BaseModel], leaf: str) -> Any:
    """Return a field that accepts any value, with the schema of the job spec's leaf."""
    leaf_schema = group.model_json_schema()["properties"][leaf]

    def describe(schema: dict[str, Any]) -> None:
        schema.clear()
        schema.update(leaf_schema)
        schema.setdefault("description", NOTES.get(leaf, ""))
        schema |= {"x-unit": UNITS[leaf]} if leaf in UNITS else {}

    return Field(default=None, json_schema_extra=describe)


class PatchJobBody(OptionalBody):
    """Changes to a job. `changed_spec` validates the values, as part of the whole spec."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    name: Any = _spec_field(JobSpec, "name")
    labels: Any = _spec_field(JobSpec, "labels")
    description: Any = _spec_field(JobSpec, "description")
    group: Any = _spec_field(JobSpec, "group")
    discarded: bool = Field(
        default=False, description="hide the job from lists; the record and the files stay, and false shows it again"
    )
    owner: str = Field(
        default="", max_length=64, description="name of a token, or local; only a token of the scope admin changes it"
    )
    priority: Any = _spec_field(ResourcesSpec, "priority")
    log_interval: Any = _spec_field(ReportingSpec, "log_interval")
    save_interval: Any = _spec_field(CheckpointSpec, "save_interval")
    keep_last: Any = _spec_field(CheckpointSpec, "keep_last")
    max_minutes: Any = _spec_field(LimitsSpec, "max_minutes")
    target_loss: Any = _spec_field(LimitsSpec, "target_loss")


class ResumeBody(OptionalBody):
    """Changes to a run that is resumed.

    ``step``: the checkpoint to resume from, the newest if None. ``save_dir``: the next attempt moves the checkpoints
    and weights there. ``gradient_checkpointing`` does not change the result.
    """

    model_config = ConfigDict(json_schema_extra=without_defaults)

    epochs: Any = _spec_field(TrainingSpec, "epochs")
    max_steps: Any = _spec_field(TrainingSpec, "max_steps")
    max_tokens: Any = _spec_field(TrainingSpec, "max_tokens")
    max_minutes: Any = _spec_field(LimitsSpec, "max_minutes")
    target_loss: Any = _spec_field(LimitsSpec, "target_loss")
    save_dir: Any = _spec_field(CheckpointSpec, "save_dir")
    gradient_checkpointing: Any = _spec_field(TrainingSpec, "gradient_checkpointing")
    resources: SkipValidation[ResourcesSpec] = Field(default_factory=ResourcesSpec)
    step: Annotated[int, Field(ge=0, le=MAX_STEP)] | None = None
    schedule: Schedule = Field(
        default="extend",
        description="learning rate of a longer run; extend: as if it had this length from the start; "
        "continue: it decays from the current rate",
    )


def resumed_spec(job: JobRow, changes: Mapping[str, Any], host: HostLimits) -> JobSpec:
    """Return the spec with the changes of a resume: a given ``max_steps`` replaces ``max_tokens``, and vice versa.

    Raises SpecInvalid with every mistake; epochs, max_steps and max_tokens may only grow.
    """
    training, known = job.spec["training"], _length_of_run(job)
    before = {"epochs": training["epochs"]}
    before |= {name: training.get(name) or known.get(name) for name in ("max_steps", "max_tokens")}
    spec = {**job.spec, "training": replace_length(training, changes)}
    problems = [
        Problem(f"/{name}", f"may only be raised: it is {old:,}" if old is not None else "may only be raised")
        for name, old in before.items()
        if name in changes and _is_lowered(old, changes[name])
    ]
    try:
        resumed = changed_spec(spec, changes, RESUME_FIELDS, host)
    except SpecInvalid as error:
        reported = {problem.pointer for problem in problems}
        others = [Problem(e["pointer"], e["message"]) for e in error.extra["errors"] if e["pointer"] not in reported]
        raise with_problems(SpecInvalid, [*problems, *others]) from None
    if problems:
        raise with_problems(SpecInvalid, problems)
    return resumed


def _is_lowered(old: int | None, new: object) -> bool:
    return new is None or (old is not None and type(new) is int and new < old)


def changed_spec(
    spec: dict[str, Any], changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]], host: HostLimits | None
) -> JobSpec:
    """Return ``spec`` with ``changes`` applied, validated again. Raises SpecInvalid with pointers into the body.

    If ``host`` is None, its files and devices are not checked. They may be gone, and the changes do not need them.
    """
    merged = {group: dict(value) if isinstance(value, dict) else value for group, value in spec.items()}
    for name, value in changes.items():
        path = fields[name]
        if len(path) == 1:
            is_partial = path[0] == "resources" and isinstance(value, dict)
            merged[path[0]] = {**merged[path[0]], **value} if is_partial else value
        elif path:
            merged.setdefault(path[0], {})[path[1]] = value  # a stored spec of 0.1 has no limits
    try:
        return validate_spec(merged, host) if host is not None else validate_fields(merged)
    except SpecInvalid as error:
        raise _with_body_pointers(error, changes, fields) from None


def _with_body_pointers(
    error: SpecInvalid, changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]
) -> Exception:
    in_body = {pointer_to(*fields[name]): pointer_to(name) for name in changes if fields[name]}
    problems = []
    for problem in error.extra["errors"]:
        pointer = problem["pointer"]
        prefix = next((p for p in in_body if pointer == p or pointer.startswith(p + "/")), None)
        if prefix is not None:
            pointer = in_body[prefix] + pointer[len(prefix) :]
        problems.append(Problem(pointer, problem["message"]))
    return with_problems(SpecInvalid, problems)
