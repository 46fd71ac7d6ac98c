"""The subcommands that change a job: pause, resume, save, fork, export, describe, discard, cancel, kill, delete."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client, Job
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job, split_step
from trainyard.client.cli.formatting import count, one_line, size
from trainyard.client.cli.hints import next_commands
from trainyard.client.cli.spec_flags import ABSENT, parse_assignment, with_absolute_paths
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.contract.units import counted


def pause(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        return _report(trainyard.pause(_id(trainyard, args, console)), args, console)


def save(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        return _report(trainyard.save(_id(trainyard, args, console)), args, console)


def resume(args: SimpleNamespace, console: Console) -> int:
    changes = _changes(args)
    with connect(args) as trainyard:
        job = trainyard.resume(_id(trainyard, args, console), **changes)
    if not args.json and {"epochs", "max_steps", "max_tokens"} & changes.keys():
        hint = " (--schedule continue decays from the current rate instead)"
        _report_rates(job, console, hint)
    return _report(job, args, console)


def _report_rates(rates: Mapping[str, Any], console: Console, hint_if_higher: str) -> None:
    """Print the rate at the checkpoint and at the next step. ``rates``: a resumed job or the plan of a fork."""
    before, after = rates.get("learning_rate_before"), rates.get("learning_rate_after")
    if before is None or after is None:
        return
    hint = hint_if_higher if after > 1.01 * before else ""
    console.error(f"learning rate: {before:.3g} at the checkpoint, {after:.3g} at the next step{hint}")


RESUME_SETTINGS = (("checkpoint", "save_dir"), ("training", "gradient_checkpointing"))
"""Fields of other groups than resources that a resume may change, by their own name."""


def _changes(args: SimpleNamespace) -> dict[str, Any]:
    names = ("epochs", "max_steps", "max_tokens", "step", "save_dir", "schedule")
    options = {name: getattr(args, name) for name in names}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    limits = {name: getattr(args, name) for name in ("max_minutes", "target_loss")}
    changes |= {name: _number_or_none(name, text) for name, text in limits.items() if text is not None}
    for assignment in args.set:
        place, value = parse_assignment(assignment)
        if place in RESUME_SETTINGS:
            changes[place[-1]] = value
        elif len(place) == 2 and place[0] == "resources":
            changes.setdefault("resources", {})[place[1]] = value
        else:
            raise UsageError(
                "only resources, checkpoint.save_dir and training.gradient_checkpointing can be changed on resume: "
                f"--set resources.FIELD=JSON, not {assignment!r}"
            )
    if isinstance(changes.get("save_dir"), str):
        changes["save_dir"] = str(Path.cwd() / Path(changes["save_dir"]).expanduser())
    return changes


def _number_or_none(name: str, text: str) -> float | None:
    try:
        return None if text in ABSENT else float(text)
    except ValueError:
        raise UsageError(f"--{name} takes a number or none, not {text!r}") from None


def fork(args: SimpleNamespace, console: Console) -> int:
    overrides: dict[str, Any] = {} if args.name is None else {"name": args.name}
    for assignment in args.set:
        place, value = parse_assignment(assignment)
        if len(place) > 2:
            raise UsageError(f"--set takes GROUP.FIELD=JSON, not {assignment!r}")
        group = overrides.setdefault(place[0], {}) if len(place) == 2 else overrides
        group[place[-1]] = value
    data = "restart" if args.restart_data else "keep"
    if args.decay is not None and (args.restart_data or args.set):
        raise UsageError("--decay continues the data and sets the schedule: give it without --restart-data and --set")
    with connect(args) as trainyard:
        job_id = _id(trainyard, args, console)
        if args.decay is not None:
            job = trainyard.decay(job_id, args.decay, args.step, name=args.name, idempotency_key=args.idempotency_key)
        else:
            overrides = with_absolute_paths(overrides, Path.cwd())
            job = trainyard.fork(job_id, args.step, overrides, data=data, idempotency_key=args.idempotency_key)
    if not args.json:
        parent = job["parent"] or {}
        console.error(f"forked from {parent.get('job_id')} at step {count(parent.get('step'))}")
        if args.decay is not None:
            hint = ": the rate had already decayed there; --step takes an earlier checkpoint"
            _report_rates(job.get("plan") or {}, console, hint)
    # What is next concerns the fork, not the job that was named.
    return _report(job, args, console, job["id"])


def export(args: SimpleNamespace, console: Console) -> int:
    """Export the checkpoint of ``JOB@STEP`` or ``--step``, or the newest; with ``--out`` download it."""
    with connect(args) as trainyard:
        job_id, step = _job_at_step(trainyard, args, console)
        export = trainyard.export(job_id, step, format=args.format)
        if args.out is not None:
            trainyard.download_export(export, args.out)
    if args.json:
        console.json({**export, "out": args.out} if args.out is not None else export)
        return Exit.SUCCEEDED
    console.data(str(export["path"] if args.out is None else args.out))
    files = f"{counted(len(export['files']), 'file')}, {size(export['bytes'])}"
    console.error(f"step {export['step']:,} as {export['format']}: {files}")
    return Exit.SUCCEEDED


def _job_at_step(trainyard: Client, args: SimpleNamespace, console: Console) -> tuple[str, int]:
    """Return the job and the step that ``JOB@STEP`` and ``--step`` name. Raises UsageError."""
    name, text = split_step(args.job)
    if text is None:
        job_id = find_job(trainyard, args.job, console)["id"]
        return job_id, args.step if args.step is not None else _newest(trainyard, job_id)
    if args.step is not None:
        raise UsageError(f"give either {args.job} or --step")
    job_id = find_job(trainyard, name, console)["id"]
    return job_id, _newest(trainyard, job_id) if text == "latest" else int(text)


def _newest(trainyard: Client, job_id: str) -> int:
    checkpoints = trainyard.checkpoints(job_id)
    if not checkpoints:
        raise UsageError("the job has no checkpoint to export yet")
    return int(checkpoints[0]["step"])


def describe(args: SimpleNamespace, console: Console) -> int:
    changes: dict[str, Any] = {"description": args.text}
    if args.group is not None:
        changes["group"] = None if args.group == "none" else args.group
    with connect(args) as trainyard:
        return _report(trainyard.update(_id(trainyard, args, console), **changes), args, console)


def discard(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        job = trainyard.update(_id(trainyard, args, console), discarded=not args.undo)
    if not args.json and not args.undo:
        console.error(f"not listed any more; to undo:  trainyard discard {job['id']} --undo")
    return _report(job, args, console)


def cancel(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        return _report(trainyard.cancel(_id(trainyard, args, console)), args, console)


def kill(args: SimpleNamespace, console: Console) -> int:
    """Kill a job after confirmation: what it computed since its last checkpoint is lost."""
    with connect(args) as trainyard:
        job = trainyard.find(args.job)
        step = (job.get("checkpoint") or {}).get("step")
        lost = "everything it has computed" if step is None else f"what it has computed after step {count(step)}"
        if not console.require_consent(f"Kill {_named(job)} and lose {lost}?", args.yes):
            console.error("nothing was killed")
            return Exit.REJECTED
        return _report(trainyard.kill(job["id"]), args, console)


def delete(args: SimpleNamespace, console: Console) -> int:
    """Delete a job after confirmation: its checkpoints are deleted too."""
    with connect(args) as trainyard:
        job = trainyard.find(args.job)
        question = f"Delete {_named(job)} with its checkpoints, logs and metrics?"
        if not console.require_consent(question, args.yes):
            console.error("nothing was deleted")
            return Exit.REJECTED
        trainyard.delete(job["id"])
    if args.json:
        console.json({"id": job["id"], "deleted": True})
    else:
        console.error(f"deleted {job['id']}")
    return Exit.SUCCEEDED


def _named(job: Job) -> str:
    return f"{one_line(job['name'], 60)} ({job['id']})"


def _id(trainyard: Client, args: SimpleNamespace, console: Console) -> str:
    return find_job(trainyard, args.job, console).id


def _report(job: Job, args: SimpleNamespace, console: Console, handle: str | None = None) -> int:
    if args.json:
        console.json(job)
        return Exit.SUCCEEDED
    console.data(f"{job['id']} {job['status']}")
    console.error(f"next:  {next_commands(job, handle or args.job)[0]}")
    return Exit.SUCCEEDED
