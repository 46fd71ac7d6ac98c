"""The exit codes of the command. They have the same meaning in every subcommand."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from trainyard.client.errors import (
    AmbiguousName,
    InvalidUrl,
    NotAuthorised,
    ServiceUnreachable,
    TrainyardError,
    WaitTimedOut,
)
from trainyard.contract.status import IDLE, JobStatus


class Exit(IntEnum):
    """Exit code of a command."""

    SUCCEEDED = 0
    REJECTED = 1
    USAGE = 2
    NO_SERVICE = 3
    NOT_AUTHORISED = 4
    RUN_FAILED = 10
    RUN_CANCELLED = 11
    RUN_STOPPED = 12
    TIMED_OUT = 124
    DETACHED = 130


class UsageError(Exception):
    """The command line is wrong. The message says why and what to type instead."""


def exit_of_error(error: TrainyardError) -> Exit:
    """Return the exit code for an error that ended a command."""
    match error:
        case ServiceUnreachable():
            return Exit.NO_SERVICE
        case NotAuthorised():
            return Exit.NOT_AUTHORISED
        case AmbiguousName() | InvalidUrl():
            return Exit.USAGE
        case WaitTimedOut():
            return Exit.TIMED_OUT
        case _:
            return Exit.REJECTED


def restart_pending(job: Mapping[str, Any]) -> bool:
    """Return whether the job is interrupted and will be restarted automatically."""
    return job["status"] == JobStatus.INTERRUPTED and job.get("restart_at") is not None


def is_idle(job: Mapping[str, Any]) -> bool:
    """Return whether nothing happens to the job until a user requests it."""
    return job["status"] in IDLE and not restart_pending(job)


def exit_of_job(job: Mapping[str, Any]) -> Exit | None:
    """Return the exit code for a job that is idle, or None if it is not."""
    if not is_idle(job):
        return None
    ends = {
        JobStatus.SUCCEEDED: Exit.SUCCEEDED,
        JobStatus.FAILED: Exit.RUN_FAILED,
        JobStatus.CANCELLED: Exit.RUN_CANCELLED,
    }
    return ends.get(JobStatus(job["status"]), Exit.RUN_STOPPED)
