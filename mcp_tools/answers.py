"""Short forms of the REST API's responses: what a model needs to decide what to do next. Pure functions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trainyard.contract.status import IDLE, JobStatus

MAX_TEXT = 2000
"""Characters of a text that a user wrote, such as a description."""

LOG_LINES = 15
"""Lines of the log in the error of a job."""

NOT_SETTINGS = frozenset({"name", "labels", "description", "group", "checkpoint.save_dir"})
"""Fields of a spec that do not change what is trained."""

PLAN_FIELDS = (
    "parameters", "steps", "start_step", "tokens", "tokens_per_step", "world_size", "memory_limit_bytes",
    "checkpoint_bytes", "disk_free_bytes", "eta_seconds", "eta_basis", "expected_first_loss", "suggested_batch_size",
    "settings_that_fit", "learning_rate_before", "learning_rate_after", "estimated", "warnings", "queue",
)  # fmt: skip


def compact(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say something: without None, "", [] and {}. Numbers have five significant digits."""
    return {name: rounded(value) for name, value in fields.items() if value is not None and value not in ("", [], {})}


def rounded(value: Any) -> Any:
    """Return a float with five significant digits, and any other value unchanged."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def is_idle(job: Mapping[str, Any]) -> bool:
    """Return whether nothing happens to the job until it is requested."""
    restarts = job["status"] == JobStatus.INTERRUPTED and job.get("restart_at") is not None
    return job["status"] in IDLE and not restarts


def brief_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job as a line of a list."""
    progress = job.get("progress") or {}
    return compact(
        {
            "id": job["id"],
            "name": job["name"],
            "status": job["status"],
            "reason": job.get("reason"),
            "step": progress.get("step"),
            "steps": progress.get("steps"),
            "loss": progress.get("loss"),
            "score": compact(job.get("score") or {}),
            "eta_seconds": progress.get("eta_seconds"),
            "group": job.get("group"),
            "owner": job.get("owner"),
            "discarded": job.get("discarded") or None,
        }
    )


def full_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job without its spec, and with only the main numbers of its plan."""
    progress = job.get("progress") or {}
    numbers = ("tokens", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "eval_loss", "eval_bpb")
    checkpoint = job.get("checkpoint") or {}
    return brief_job(job) | compact(
        {
            "summary": job.get("summary"),
            "phase": job.get("phase"),
            "message": job.get("message"),
            "error": _error(job.get("error") or {}),
            "alerts": [compact({"code": each["code"], "message": each["message"]}) for each in job.get("alerts", ())],
            **{name: progress.get(name) for name in numbers},
            "limits_left": compact(job.get("limits_left") or {}),
            "checkpoint": compact({name: checkpoint.get(name) for name in ("step", "loss", "path", "bytes")}),
            "resume_blocker": job.get("resume_blocker") if is_idle(job) else None,
            "description": (job.get("description") or "")[:MAX_TEXT],
            "labels": job.get("labels"),
            "parent": compact(job.get("parent") or {}),
            "plan": brief_plan(job.get("plan") or {}),
            "can": [each["action"] for each in job.get("allowed_actions", ()) if each["allowed"]],
            "created_at": job.get("created_at"),
            "finished_at": job.get("finished_at"),
        }
    )


def brief_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main numbers of a plan. ``memory_bytes`` is the sum of its parts, if all are known."""
    parts = (plan.get("memory_bytes") or {}).values()
    total = None if not parts or None in parts else sum(parts)
    return compact({**{name: plan.get(name) for name in PLAN_FIELDS}, "memory_bytes": total})


def brief_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint as a line of a list."""
    return compact({name: checkpoint.get(name) for name in ("step", "kind", "loss", "bytes", "path", "created_at")})


def brief_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores on a task as a line of a list."""
    fields = ("evaluation_id", "step", "task", "state", "acc", "acc_norm", "bpb", "examples", "error")
    return compact({name: score.get(name) for name in fields})


def as_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Return the rows as lists of numbers, without columns that have no value at all."""
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    return {"columns": used, "rows": [[rounded(row.get(name)) for name in used] for row in rows]}


def differences(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings that are not the same in all specs: field -> job id -> value."""
    flat = {job_id: dict(_leaves(spec)) for job_id, spec in specs.items()}
    names = dict.fromkeys(name for leaves in flat.values() for name in leaves if name not in NOT_SETTINGS)
    values = {name: {job_id: leaves.get(name) for job_id, leaves in flat.items()} for name in names}
    return {name: of_jobs for name, of_jobs in values.items() if not _all_equal(of_jobs.values())}


def comparison_notes(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what makes the scores of these jobs hard to compare."""
    notes = []
    metrics = sorted({job["score"]["metric"] for job in jobs if job.get("score")})
    if len(metrics) > 1:
        notes.append(f"The scores are of different metrics ({', '.join(metrics)}): compare only those of the same one.")
    if metrics == ["loss"]:
        notes.append("The scores are training losses. A held-out set (data.eval_fraction) compares better.")
    unscored = [job["name"] for job in jobs if not job.get("score")]
    if unscored:
        notes.append(f"No score yet: {', '.join(unscored)}.")
    going = [job["name"] for job in jobs if not is_idle(job)]
    if going:
        notes.append(f"Not at an end: {', '.join(going)}. Wait for them before you decide.")
    return notes


def _error(error: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: error.get(name) for name in ("code", "message", "hint", "rank")}
    shown["log_tail"] = (error.get("log_tail") or [])[-LOG_LINES:]
    shown["next"] = [each["words"] for each in error.get("next") or ()]
    return compact(shown)


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, below in value.items():
        if isinstance(below, Mapping):
            yield from _leaves(below, f"{prefix}{name}.")
        else:
            yield prefix + name, below


def _all_equal(values: Iterable[Any]) -> bool:
    first, *others = values
    return all(value == first for value in others)
