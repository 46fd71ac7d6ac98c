"""What can go wrong between a client and the service. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class TrainyardError(Exception):
    """Base of all that this package raises on purpose."""


class ServiceUnreachable(TrainyardError):
    """No Trainyard service answered at the URL within the client's patience."""

    def __init__(self, url: str, cause: str) -> None:
        super().__init__(f"no Trainyard service answers at {url}: {cause}")
        self.url = url
        self.cause = cause


class InvalidUrl(TrainyardError):
    """What was given as the service's URL is none; the message says what one looks like."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url!r} is no address of a service: it must be like http://127.0.0.1:8000")


class WaitTimedOut(TrainyardError):
    """The job did not get where it was waited for in time; ``job`` is how it was last seen, if at all."""

    def __init__(self, seconds: float, job: Mapping[str, Any] | None) -> None:
        status = job["status"] if job else "never seen"
        super().__init__(f"{seconds:g} s passed and the job is {status}")
        self.job = job


class UnexpectedStatus(TrainyardError):
    """The job came to rest in another status than those it was waited for in."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__(f"the job is {job['status']} ({job.get('reason')}): {job.get('message')}")
        self.job = job


class ChecksumMismatch(TrainyardError):
    """A file that was fetched is not what the checkpoint's manifest says; the message names it."""


class AmbiguousName(TrainyardError):
    """Several jobs have the name; the message lists their ids."""


@dataclass(frozen=True)
class FieldProblem:
    """One mistake in a spec: where (an RFC 6901 pointer) and what to do."""

    pointer: str
    message: str


class ApiError(TrainyardError):
    """The service said no. Carries its problem+json: ``code`` for programs, ``detail`` for people."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status = status
        self.problem = dict(problem)
        self.code = str(problem.get("code") or f"http_{status}")
        self.detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        self.request_id: str | None = problem.get("request_id")
        self.errors = tuple(_field_problems(problem.get("errors")))
        super().__init__(f"{self.detail} [{self.code}]")


class NotAuthorised(ApiError):
    """401 or 403: the token is missing, wrong, or not good for this."""


class NotFound(ApiError):
    """404: there is no such job, checkpoint or route."""


class InvalidState(ApiError):
    """409: the action does not fit the present state; ``problem`` names the verbs that do."""


class InvalidSpec(ApiError):
    """422: ``errors`` holds every mistake at once."""


def api_error(status: int, problem: Mapping[str, Any]) -> ApiError:
    """The exception for an answer of 400 and more."""
    kinds = {401: NotAuthorised, 403: NotAuthorised, 404: NotFound, 409: InvalidState, 422: InvalidSpec}
    return kinds.get(status, ApiError)(status, problem)


def _field_problems(errors: object) -> list[FieldProblem]:
    if not isinstance(errors, list):
        return []
    found = [entry for entry in errors if isinstance(entry, dict)]
    return [FieldProblem(str(entry.get("pointer", "")), str(entry.get("message", ""))) for entry in found]
