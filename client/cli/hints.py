"""Text at the end of a run: the error card, and the commands to type next."""

import shlex
from collections.abc import Mapping
from typing import Any

from trainyard.client.cli.formatting import size
from trainyard.contract.status import JobStatus

MAX_LOG_LINES = 15


def error_card(job: Mapping[str, Any]) -> list[str]:
    """Return the lines of the error card: the error, the last lines of the log, the hint. [] if there is no error."""
    card = job.get("error")
    if not card:
        return []
    where = "" if card.get("rank") is None else f" (rank {card['rank']})"
    lines = [f"error: {card.get('message')}{where} [{card.get('code')}]"]
    # Older services send no log_tail.
    log = card.get("log_tail") or str(card.get("traceback") or "").rstrip().splitlines()
    lines += [f"  | {line}" for line in log[-MAX_LOG_LINES:]]
    if card.get("peak_memory_bytes"):
        lines.append(f"peak memory of a rank: {size(card['peak_memory_bytes'])}")
    if card.get("hint"):
        lines.append(f"hint: {card['hint']}")
    return lines


def next_actions(job: Mapping[str, Any]) -> list[str]:
    """Return the service's suggestions for a failed job, each as a comment and a command. Older services have none."""
    actions = (job.get("error") or {}).get("next") or []
    return [line for action in actions for line in (f"# {action['words']}", action["command"])]


def next_commands(job: Mapping[str, Any], handle: str) -> list[str]:
    """Return commands that are useful in the job's status. ``handle``: the id or name that the user typed."""
    name = shlex.quote(handle)
    match JobStatus(job["status"]):
        case JobStatus.SUCCEEDED:
            return [f"trainyard checkpoints {name}", f"trainyard samples {name}"]
        case JobStatus.FAILED | JobStatus.INTERRUPTED | JobStatus.CANCELLED | JobStatus.PAUSED:
            again = [f"trainyard resume {name}"] if job.get("resumable") else []
            failed = job["status"] in (JobStatus.FAILED, JobStatus.INTERRUPTED)
            return again + ([f"trainyard logs {name} --tail 50"] if failed else [f"trainyard checkpoints {name}"])
        case _:
            return [f"trainyard watch {name}", f"trainyard pause {name}"]


def end_report(job: Mapping[str, Any], handle: str) -> list[str]:
    """Return the lines that are printed when a job has become idle."""
    lines = [f"{job['status']}: {job.get('message') or job.get('summary') or ''}".rstrip(": ")]
    lines += error_card(job)
    if not job.get("resumable") and job.get("resume_blocker") and job["status"] != JobStatus.SUCCEEDED:
        lines.append(f"cannot be resumed: {job['resume_blocker']}")
    return [*lines, "next:", *(f"  {line}" for line in next_actions(job) or next_commands(job, handle))]
