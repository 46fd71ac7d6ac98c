"""The failure card: what happened, evidence and hint as reported, and the next actions, most likely first. Pure.

The API, the terminal and webhooks show the same object. Each action is both an API request and a command.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.contract.messages import FailureCard, NextAction
from trainyard.contract.parsing import GROUPS
from trainyard.contract.spec import JobSpec, ResourcesSpec, TrainingSpec, next_memory_saving
from trainyard.contract.status import JobStatus, Reason
from trainyard.service.db.models import JobRow
from trainyard.service.jobs.lifecycle import resume_blocker
from trainyard.service.jobs.queries import job_state

Changes = Mapping[str, Mapping[str, Any]]
"""Group -> leaf -> new value."""

RETRY_CONDITIONS = {
    Reason.OUT_OF_MEMORY: "on a device with more memory",
    Reason.HOST_OUT_OF_MEMORY: "once the host has more memory",
    Reason.DISK_FULL: "once there is room on the disk, or with --save_dir on another one",
    Reason.DATA_INVALID: "once the data is repaired",
    Reason.CHECKPOINT_INVALID: "once the cause is removed",
    Reason.SPEC_INVALID: "once the cause is removed",
    Reason.LAUNCH_FAILED: "once it can be launched",
    Reason.DIVERGED: "as it was: it may diverge again",
    Reason.SILENT_CORRUPTION: "on other devices",
}
"""Reason -> the condition under which the same run may succeed."""

SAME_DATA = "once the data is restored"
"""The condition if there is a checkpoint: a run resumes only with the corpus that it was saved with."""

COMPILE_FAILURE = "training.use_compile:"
"""Start of the message of a model that cannot be compiled."""

AGENT_FAILURES = frozenset({Reason.LAUNCH_FAILED, Reason.AGENT_LOST, Reason.HOST_RESTARTED, Reason.NODE_LOST})
"""Failures of which the ranks' own logs show nothing."""

TAIL_LINES = 50


@dataclass(frozen=True)
class FailureContext:
    """What the next actions depend on. ``step``: of the newest checkpoint; ``inherited``: the job is a fork."""

    job_id: str
    attempt: int
    code: str
    rank: int | None
    spec: Mapping[str, Any]
    step: int | None
    inherited: bool
    resumable: bool
    restarts_itself: bool
    message: str = ""


def failure_card(job: JobRow, step: int | None) -> FailureCard | None:
    """Return the job's failure card, or None if nothing failed. ``step``: of its newest checkpoint."""
    if not job.error:
        return None
    card = FailureCard.model_validate(job.error)
    if JobStatus(job.status) not in (JobStatus.FAILED, JobStatus.INTERRUPTED):
        return card
    context = FailureContext(
        job_id=job.id,
        attempt=job.attempt,
        code=card.code,
        rank=card.rank,
        spec=job.spec,
        step=step,
        inherited=job.parent_step is not None,
        resumable=resume_blocker(job_state(job)) is None,
        restarts_itself=job.restart_at is not None,
        message=card.message,
    )
    return card.model_copy(update={"next": next_actions(context)})


def next_actions(job: FailureContext) -> list[NextAction]:
    """Return what to do now, most likely first."""
    # Without an attempt its corpus could not be prepared, and the card has the end of the log.
    log = [_read_log(job)] if job.attempt else []
    return [*_memory_saving(job), *_changed_run(job), *_resume(job), *log]


def _memory_saving(job: FailureContext) -> Iterator[NextAction]:
    """Yield the same run with the next setting that saves memory. It replaces the resume without changes."""
    saving = _next_saving(job)
    if saving is None or not job.resumable:
        return
    words = " and ".join(f"{leaf} {_format(value)}" for _, leaf, value in _leaves(saving))
    options = " ".join(f"--set {group}.{leaf}={_format(value)}" for group, leaf, value in _leaves(saving))
    yield NextAction(
        action="resume",
        words=f"{_resume_words(job)}, with {words}",
        command=f"trainyard resume {job.job_id} {options}",
        method="POST",
        path=f"/jobs/{job.job_id}/resume",
        body=saving.get("training", saving),
    )


def _next_saving(job: FailureContext) -> Changes | None:
    if job.code not in (Reason.OUT_OF_MEMORY, Reason.HOST_OUT_OF_MEMORY) or "resources" not in job.spec:
        return None
    training = TrainingSpec.model_validate_json(json.dumps(job.spec["training"]))
    return next_memory_saving(training, ResourcesSpec.model_validate_json(json.dumps(job.spec["resources"])))


def _changed_run(job: FailureContext) -> Iterator[NextAction]:
    changes = _suggested_changes(job)
    if changes is None:
        return
    words = " and ".join(f"{leaf} {_format(value)}" for leaves in changes.values() for leaf, value in leaves.items())
    if job.step is not None:
        options = [f"--set {group}.{leaf}={_format(value)}" for group, leaf, value in _leaves(changes)]
        yield NextAction(
            action="fork",
            words=f"Fork from step {job.step:,} with {words}",
            command=" ".join([f"trainyard fork {job.job_id} --step {job.step}", *options]),
            method="POST",
            path=f"/jobs/{job.job_id}/fork",
            body={"step": job.step, "overrides": changes},
        )
    elif not job.inherited:
        yield _submit_again(job, changes, f"with {words}" if words else "with other settings")


def _suggested_changes(job: FailureContext) -> Changes | None:
    """Return settings that are likely to work, or None if other settings do not help."""
    training = TrainingSpec.model_validate_json(json.dumps(job.spec["training"]))
    smaller = training.smaller_batch()
    match job.code:
        case Reason.OUT_OF_MEMORY | Reason.HOST_OUT_OF_MEMORY if smaller is not None:
            return {"training": {"batch_size": smaller[0], "accumulation_steps": smaller[1]}}
        case Reason.DIVERGED:
            return {"training": {"learning_rate": training.learning_rate / 2}}
        case Reason.SPEC_INVALID if job.message.startswith(COMPILE_FAILURE):
            return {"training": {"use_compile": False}}
        case Reason.SPEC_INVALID | Reason.CHECKPOINT_INVALID if job.step is None:
            return {}
        case _:
            return None


def _submit_again(job: FailureContext, changes: Changes, how: str) -> NextAction:
    body = _non_default(job.spec, changes)
    top = [f"--set {name}={shlex.quote(_format(body[name]))}" for name in body if name not in GROUPS]
    options = [f"--set {group}.{leaf}={shlex.quote(_format(value))}" for group, leaf, value in _leaves(body)]
    return NextAction(
        action="submit",
        words=f"Submit it again, {how}",
        command=" ".join(["trainyard submit", *top, *options]),
        method="POST",
        path="/jobs",
        body=body,
    )


def _non_default(spec: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return the changed spec without the values that are defaults."""
    corpus = {leaf: spec["data"][leaf] for leaf in ("data_path", "sources") if spec["data"].get(leaf) is not None}
    defaults = JobSpec.model_validate({"data": corpus}).model_dump(mode="json")
    body: dict[str, Any] = {}
    for name, value in spec.items():
        if name in GROUPS:
            leaves = {**value, **changes.get(name, {})}
            known = defaults[name]
            value = {leaf: leaves[leaf] for leaf in leaves if leaf not in known or leaves[leaf] != known[leaf]}
            if name == "data":
                value = {**corpus, **value}
        if value not in ({}, defaults.get(name)):
            body[name] = value
    return body


def _leaves(body: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    return ((group, leaf, value) for group in body if group in GROUPS for leaf, value in body[group].items())


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _resume(job: FailureContext) -> Iterator[NextAction]:
    if not job.resumable or (job.code == Reason.SPEC_INVALID and job.step is None) or _next_saving(job) is not None:
        return
    words = _resume_words(job)
    condition = RETRY_CONDITIONS.get(Reason(job.code)) if job.code in list(Reason) else None
    if job.code == Reason.DATA_INVALID and job.step is not None:
        condition = SAME_DATA
    how = "now, without waiting for its restart" if job.restarts_itself else condition
    yield NextAction(
        action="resume",
        words=f"{words}, {how}" if how else words,
        command=f"trainyard resume {job.job_id}",
        method="POST",
        path=f"/jobs/{job.job_id}/resume",
        body={},
    )


def _resume_words(job: FailureContext) -> str:
    if job.step is not None:
        return f"Resume from step {job.step:,}"
    return "Resume from its parent's checkpoint" if job.inherited else "Resume from the beginning"


def _read_log(job: FailureContext) -> NextAction:
    path = f"/jobs/{job.job_id}/logs?attempt={job.attempt}"
    command = f"trainyard logs {job.job_id} --attempt {job.attempt}"
    if job.rank is None and job.code in AGENT_FAILURES:
        words, rank = "Read what its agent printed", "agent"
    else:
        rank = str(job.rank or 0)
        words = f"Read the log of rank {rank}"
    return NextAction(
        action="logs",
        words=words,
        command=f"{command} --rank {rank} --tail {TAIL_LINES}",
        method="GET",
        path=f"{path}&rank={rank}&tail={TAIL_LINES}",
        body=None,
    )
