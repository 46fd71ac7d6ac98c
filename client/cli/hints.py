"""What a person is told at the end of a run: the error card, and what to type next. Pure."""

import shlex
from collections.abc import Mapping
from typing import Any

from trainyard.client.cli.formatting import size
from trainyard.contract.status import JobStatus

EVIDENCE_LINES = 15


def error_card(job: Mapping[str, Any]) -> list[str]:
    """Why the job failed: what, the evidence, the hint. [] where nothing is known to be wrong."""
    card = job.get("error")
    if not card:
        return []
    where = "" if card.get("rank") is None else f" (rank {card['rank']})"
    lines = [f"error: {card.get('message')}{where} [{card.get('code')}]"]
    lines += [f"  | {line}" for line in _evidence(card)[-EVIDENCE_LINES:]]
    if card.get("peak_memory_bytes"):
        lines.append(f"peak memory of a rank: {size(card['peak_memory_bytes'])}")
    if card.get("hint"):
        lines.append(f"hint: {card['hint']}")
    return lines


def _evidence(card: Mapping[str, Any]) -> list[str]:
    """What its rank printed last; from an older service the end of the traceback."""
    return card.get("log_tail") or str(card.get("traceback") or "").rstrip().splitlines()


def next_actions(job: Mapping[str, Any]) -> list[str]:
    """What the service says helps a job that failed: words as a comment, and the command below. [] of an older one."""
    found = (job.get("error") or {}).get("next") or []
    return [line for one in found for line in (f"# {one['words']}", one["command"])]


def what_next(job: Mapping[str, Any], handle: str) -> list[str]:
    """Commands that make sense now; ``handle`` is how the user names the job."""
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


def ending(job: Mapping[str, Any], handle: str) -> list[str]:
    """The last words on a job that is at rest."""
    lines = [f"{job['status']}: {job.get('message') or job.get('summary') or ''}".rstrip(": ")]
    lines += error_card(job)
    if not job.get("resumable") and job.get("resume_blocker") and job["status"] != JobStatus.SUCCEEDED:
        lines.append(f"cannot be resumed: {job['resume_blocker']}")
    return [*lines, "next:", *(f"  {line}" for line in next_actions(job) or what_next(job, handle))]
