"""Every "no" the service can say: the class is status and code, the docstring is the message.

All of them leave as RFC 9457 ``application/problem+json``. Nothing that a client sent is ever echoed.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from trainyard.contract.parsing import Problem

PROBLEM = "application/problem+json"


class ServiceError(Exception):
    """The request was refused."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str | None = None, headers: dict[str, str] | None = None, **extra: Any) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.headers = headers or {}
        self.extra = extra
        super().__init__(self.detail)


class Internal(ServiceError):
    """The service made a mistake. It is in the service's log under this request id."""


class DatabaseUnavailable(ServiceError):
    """The database does not answer. Nothing was changed; try again."""

    status, code = 503, "database_unavailable"


class OutcomeUnknown(ServiceError):
    """The database went away at the very end: the change was made, or was not. Look, or send it again with its key."""

    status, code = 503, "outcome_unknown"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"Retry-After": "1"})


class NotReady(ServiceError):
    """The service is not ready to take work."""

    status, code = 503, "not_ready"


class NotFound(ServiceError):
    """There is nothing at this address."""

    status, code = 404, "not_found"


class JobNotFound(ServiceError):
    """No job has this id."""

    status, code = 404, "job_not_found"


class WebhookNotFound(ServiceError):
    """No webhook has this id."""

    status, code = 404, "webhook_not_found"


class DeliveryNotFound(ServiceError):
    """The webhook has no such delivery. Those that ended are kept for 30 days."""

    status, code = 404, "delivery_not_found"


class TooManyWebhooks(ServiceError):
    """There are as many webhooks as this service has room for. Delete some."""

    status, code = 409, "too_many_webhooks"


class LogNotFound(ServiceError):
    """The attempt has no such log yet."""

    status, code = 404, "log_not_found"


class CheckpointNotFound(ServiceError):
    """The job has no checkpoint of this step."""

    status, code = 404, "checkpoint_not_found"


class FileNotInCheckpoint(ServiceError):
    """The checkpoint's manifest names no such file, or the file is not there any more."""

    status, code = 404, "file_not_found"


class LastCheckpoint(ServiceError):
    """It is the last valid checkpoint of the job: without it nothing is left to go on from."""

    status, code = 409, "last_checkpoint"


class CheckpointInUse(ServiceError):
    """The checkpoint is in use."""

    status, code = 409, "checkpoint_in_use"


class RangeUnsatisfiable(ServiceError):
    """The range begins behind the end of the file."""

    status, code = 416, "range_not_satisfiable"


class InvalidState(ServiceError):
    """The action does not fit the job's present status."""

    status, code = 409, "invalid_state"


class Conflict(ServiceError):
    """Somebody else changed the job at the same moment. Look again."""

    status, code = 409, "conflict"


class StepUnavailable(ServiceError):
    """The job has no full checkpoint of this step."""

    status, code = 409, "step_unavailable"


class CheckpointMismatch(ServiceError):
    """The run cannot go on: its corpus, vocabulary or shape is not the one its checkpoint was saved with."""

    status, code = 409, "run_differs"


class FileNotInExport(ServiceError):
    """There is no such export, or it has no such file."""

    status, code = 404, "export_not_found"


class StorageError(ServiceError):
    """The files could not be written on the service's host. Nothing of them is left."""

    status, code = 507, "disk_trouble"

    @classmethod
    def from_os_error(cls, error: OSError) -> "StorageError":
        """With the system's own word."""
        return cls(f"{(cls.__doc__ or '').strip()} It said: {error.strerror or type(error).__name__}.")


class ExportInProgress(ServiceError):
    """An export of this job is being made. Ask again when it is done."""

    status, code = 409, "export_under_way"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"Retry-After": "5"})


class ExportFailed(ServiceError):
    """The checkpoint could not be exported."""

    status, code = 409, "export_failed"


class ExportUnavailable(ServiceError):
    """The server has no torch, so it cannot export. Ask one that has, or run `python -m trainyard.worker.checkpoint.export` yourself."""

    status, code = 501, "export_unavailable"


class ExportTimedOut(ServiceError):
    """The export took longer than it may and was ended. Nothing of it is left."""

    status, code = 504, "export_timeout"


class SpecInvalid(ServiceError):
    """The job spec has mistakes."""

    status, code = 422, "invalid_spec"


class RequestInvalid(ServiceError):
    """The request has mistakes."""

    status, code = 422, "invalid_request"


class KeyReused(ServiceError):
    """The Idempotency-Key was used before, with another body."""

    status, code = 422, "idempotency_key_reused"


class TooManyStreams(ServiceError):
    """More streams are open than this service serves. Close some, or read page by page."""

    status, code = 429, "too_many_streams"


class InvalidJson(ServiceError):
    """The body is not JSON."""

    status, code = 422, "invalid_json"


class BodyTooLarge(ServiceError):
    """The body is larger than this address takes."""

    status, code = 413, "body_too_large"


class BodyTooSlow(ServiceError):
    """The body did not arrive in time."""

    status, code = 408, "request_timeout"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"Connection": "close"})


class UrlTooLong(ServiceError):
    """The address is longer than this service takes."""

    status, code = 414, "url_too_long"


class HeadersTooLarge(ServiceError):
    """The headers are larger than this service takes."""

    status, code = 431, "headers_too_large"


class WrongMediaType(ServiceError):
    """The body must be sent as Content-Type: application/json."""

    status, code = 415, "unsupported_media_type"


class Unauthorized(ServiceError):
    """A valid token is needed: Authorization: Bearer <token>."""

    status, code = 401, "unauthorized"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(ServiceError):
    """The token's scope is not enough for this."""

    status, code = 403, "forbidden"


class QuotaExceeded(ServiceError):
    """The token has as many jobs or devices queued or running as it may have."""

    status, code = 429, "quota_exceeded"


class TokenNotFound(ServiceError):
    """No token has this name."""

    status, code = 404, "token_not_found"


class TokenNameTaken(ServiceError):
    """The name is taken, or was: a name is given once, so that it means one token in every event."""

    status, code = 409, "token_name_taken"


class TokenRevoked(ServiceError):
    """The token was revoked, and stays so: make another one."""

    status, code = 409, "token_revoked"


class HostNotAllowed(ServiceError):
    """The service is not known under the name in the Host header. TRAINYARD_ALLOWED_HOSTS lists its names."""

    status, code = 403, "foreign_host"


class CrossOrigin(ServiceError):
    """A page of another origin must not change anything here."""

    status, code = 403, "foreign_origin"


def with_problems(kind: type[ServiceError], problems: Sequence[Problem]) -> ServiceError:
    """An error that lists every mistake with its pointer."""
    count = len(problems)
    detail = f"{count} mistake{'s' if count != 1 else ''} found; nothing was changed"
    return kind(detail, errors=[{"pointer": p.pointer, "message": p.message} for p in problems])


def problem_response(error: ServiceError, request_id: str | None) -> JSONResponse:
    """The error as problem+json."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id,
        **error.extra,
    }
    return JSONResponse(body, error.status, headers=error.headers, media_type=PROBLEM)


def from_exception(error: Exception) -> ServiceError:
    """Whatever was raised, as one of ours."""
    match error:
        case ServiceError():
            return error
        case HTTPException():
            return _from_http(error)
        case OperationalError() | InterfaceError() | PoolTimeout():
            return DatabaseUnavailable(headers={"Retry-After": "1"})
        case DBAPIError() if error.connection_invalidated:
            return DatabaseUnavailable(headers={"Retry-After": "1"})
        case _:
            return Internal()


OWN_ERRORS: dict[int, type[ServiceError]] = {404: NotFound, 408: BodyTooSlow, 413: BodyTooLarge}
"""For errors that leave the framework as HTTPException."""


def _from_http(error: HTTPException) -> ServiceError:
    if (own := OWN_ERRORS.get(error.status_code)) is not None:
        found = own()
        found.headers |= dict(error.headers or {})
        return found
    phrase = HTTPStatus(error.status_code).phrase
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    kind = type("Refused", (ServiceError,), {"status": error.status_code, "code": code})
    made = kind(_plain_detail(error.status_code), headers=dict(error.headers or {}))
    assert isinstance(made, ServiceError)
    return made


def _plain_detail(status: int) -> str:
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return "This address does not take this method; the Allow header lists those it takes."
    return f"{HTTPStatus(status).phrase}."
