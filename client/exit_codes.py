"""The exit codes of the command: one meaning each, the same for every subcommand."""

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
    """What the shell gets."""

    SUCCEEDED = 0
    REFUSED = 1
    USAGE = 2
    NO_SERVICE = 3
    NOT_AUTHORISED = 4
    RUN_FAILED = 10
    RUN_CANCELLED = 11
    RUN_STOPPED = 12
    TIMED_OUT = 124
    DETACHED = 130


class UsageError(Exception):
    """The command line makes no sense; the message says why and what to type instead."""


def exit_of_error(error: TrainyardError) -> Exit:
    """The code for an error that ended a command."""
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
            return Exit.REFUSED


def restart_pending(job: Mapping[str, Any]) -> bool:
    """Whether an interrupted job is waiting for its own restart, so that there is something to wait for."""
    return job["status"] == JobStatus.INTERRUPTED and job.get("restart_at") is not None


def is_idle(job: Mapping[str, Any]) -> bool:
    """Whether nothing more happens to the job until somebody asks for it."""
    return job["status"] in IDLE and not restart_pending(job)


def exit_of_job(job: Mapping[str, Any]) -> Exit | None:
    """The code for a job that is at rest; None while there is something to wait for."""
    if not is_idle(job):
        return None
    ends = {
        JobStatus.SUCCEEDED: Exit.SUCCEEDED,
        JobStatus.FAILED: Exit.RUN_FAILED,
        JobStatus.CANCELLED: Exit.RUN_CANCELLED,
    }
    return ends.get(JobStatus(job["status"]), Exit.RUN_STOPPED)
