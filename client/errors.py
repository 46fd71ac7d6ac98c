"""The exceptions of the client. Standard library only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class TrainyardError(Exception):
    """Base class of the exceptions that the client raises. ``code``: the kind of error, for programs."""

    code = "client_error"


class ServiceUnreachable(TrainyardError):
    """No Trainyard service responded at the URL within the time for retries."""

    code = "service_unreachable"

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"no Trainyard service answers at {url}: {cause}")
        self.url = url
        self.cause = cause


class InvalidUrl(TrainyardError):
    """The given URL is not valid."""

    code = "invalid_url"

    def __init__(self, url: str) -> None:
        super().__init__(f"{url!r} is no address of a service: it must be like http://127.0.0.1:8000")


class WaitTimedOut(TrainyardError):
    """A job, corpus or evaluation did not reach the state in time, or made no progress.

    ``last``: its last known state, or None if there was none. ``job``: the same.
    """

    code = "wait_timed_out"

    def __init__(self, seconds: float, last: Mapping[str, Any] | None, stalled: bool = False) -> None:
        what = str((last or {}).get("object") or "job")
        status = (last or {}).get("status") or (last or {}).get("state") or "never seen"
        if stalled and last:
            step, phase = (last.get("progress") or {}).get("step"), last.get("phase")
            status += f", phase {phase}" * bool(phase) + f", at step {step or 0:,}"
        super().__init__(f"{seconds:g} s passed {'without progress, ' * stalled}and the {what} is {status}")
        self.last = last
        self.job = last


class UnexpectedStatus(TrainyardError):
    """The job became idle in another status than those that the caller waits for. ``job``: its last state."""

    code = "unexpected_status"

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__(f"the job is {job['status']} ({job.get('reason')}): {job.get('message')}")
        self.job = job


class ChecksumMismatch(TrainyardError):
    """A downloaded file differs from the checkpoint's manifest. The message names it."""

    code = "checksum_mismatch"


class AmbiguousName(TrainyardError):
    """Several jobs have the name. The message lists their ids; ``jobs``: these jobs, newest first."""

    code = "ambiguous_name"

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
    """The service rejected the request. ``problem`` is the response: ``code`` for programs, ``detail`` for people.

    ``status``: the HTTP status. ``errors``: the invalid fields. ``request_id``: the id in the service's log, or None.
    """

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        self.code = str(problem.get("code") or f"http_{status}")
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.request_id: str | None = problem.get("request_id")
        self.errors = tuple(_field_problems(problem.get("errors")))
        lines = [f"  {problem.pointer or '/'}: {problem.message}" for problem in self.errors]
        super().__init__("\n".join([f"{self.detail} [{self.code}]", *lines]))


class NotAuthorised(ApiError):
    """401 or 403: the token is missing, invalid, or lacks the scope."""


class NotFound(ApiError):
    """404: there is no such job, checkpoint or route."""


class InvalidState(ApiError):
    """409: the action is not allowed in the present state. ``problem`` lists the allowed ones."""


class InvalidSpec(ApiError):
    """422: the spec or another body is invalid. ``errors`` and the text of the exception list all problems."""


def api_error(status: int, problem: Mapping[str, Any]) -> ApiError:
    """Return the exception for a response with status 400 or more."""
    kinds = {401: NotAuthorised, 403: NotAuthorised, 404: NotFound, 409: InvalidState, 422: InvalidSpec}
    return kinds.get(status, ApiError)(status, problem)


def _field_problems(errors: object) -> list[FieldProblem]:
    if not isinstance(errors, list):
        return []
    problems = [entry for entry in errors if isinstance(entry, dict)]
    return [FieldProblem(str(entry.get("pointer", "")), str(entry.get("message", ""))) for entry in problems]
