"""The exceptions of the client. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class TrainyardError(Exception):
    """Base class of the exceptions that the client raises."""


class ServiceUnreachable(TrainyardError):
    """No Trainyard service responded at the URL within the time for retries."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"no Trainyard service answers at {url}: {cause}")
        self.url = url
        self.cause = cause


class InvalidUrl(TrainyardError):
    """The given URL is not valid."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url!r} is no address of a service: it must be like http://127.0.0.1:8000")


class WaitTimedOut(TrainyardError):
    """The job did not reach the state in time, or made no progress. ``job``: its last known state, or None."""

    def __init__(self, seconds: float, job: Mapping[str, Any] | None, stalled: bool = False) -> None:
        status = job["status"] if job else "never seen"
        if stalled and job:
            step, phase = (job.get("progress") or {}).get("step"), job.get("phase")
            status += f", phase {phase}" * bool(phase) + f", at step {step or 0:,}"
        super().__init__(f"{seconds:g} s passed {'without progress, ' * stalled}and the job is {status}")
        self.job = job


class UnexpectedStatus(TrainyardError):
    """The job became idle in another status than those that the caller waits for."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__(f"the job is {job['status']} ({job.get('reason')}): {job.get('message')}")
        self.job = job


class ChecksumMismatch(TrainyardError):
    """A downloaded file differs from the checkpoint's manifest. The message names it."""


class AmbiguousName(TrainyardError):
    """Several jobs have the name. The message lists their ids; ``jobs``: these jobs, newest first."""

    def __init__(self, name: str, jobs: Sequence[Mapping[str, Any]]) -> None:
        ids = ", ".join(f"{job['id']} ({job['status']})" for job in jobs[:5])
        super().__init__(f"{len(jobs)} jobs are named {name!r}; give the id of one: {ids}")
        self.jobs = jobs


@dataclass(frozen=True)
class FieldProblem:
    """One problem of a spec: where (an RFC 6901 pointer) and what to do."""

    pointer: str
    message: str


class ApiError(TrainyardError):
    """The service rejected the request. ``problem`` is the response: ``code`` for programs, ``detail`` for people."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        self.code = str(problem.get("code") or f"http_{status}")
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.request_id: str | None = problem.get("request_id")
        self.errors = tuple(_field_problems(problem.get("errors")))
        super().__init__(f"{self.detail} [{self.code}]")


class NotAuthorised(ApiError):
    """401 or 403: the token is missing, invalid, or lacks the scope."""


class NotFound(ApiError):
    """404: there is no such job, checkpoint or route."""


class InvalidState(ApiError):
    """409: the action is not allowed in the present state. ``problem`` lists the allowed ones."""


class InvalidSpec(ApiError):
    """422: the spec is invalid. ``errors`` lists all problems."""


def api_error(status: int, problem: Mapping[str, Any]) -> ApiError:
    """Return the exception for a response with status 400 or more."""
    kinds = {401: NotAuthorised, 403: NotAuthorised, 404: NotFound, 409: InvalidState, 422: InvalidSpec}
    return kinds.get(status, ApiError)(status, problem)


def _field_problems(errors: object) -> list[FieldProblem]:
    if not isinstance(errors, list):
        return []
    problems = [entry for entry in errors if isinstance(entry, dict)]
    return [FieldProblem(str(entry.get("pointer", "")), str(entry.get("message", ""))) for entry in problems]
