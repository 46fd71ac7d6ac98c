"""Every error response of the service: the class has status and code, its docstring is the message.

Responses are RFC 9457 ``application/problem+json``. They never echo anything that the client sent.
"""

import errno
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from trainyard.contract.parsing import Problem
from trainyard.service.descriptors import is_exhausted

PROBLEM = "application/problem+json"

READ_ONLY_SERVER = "25006"
"""SQLSTATE of a write to a Postgres server that has become a replica."""


class ServiceError(Exception):
    """The request was rejected."""

    status: int = 500
    code: str = "internal_error"
    default_headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, detail: str | None = None, headers: Mapping[str, str] | None = None, **extra: Any) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.headers = {**dict(self.default_headers), **(headers or {})}
        self.extra = extra
        super().__init__(self.detail)


class Internal(ServiceError):
    """The service made a mistake. It is in the service's log under this request id."""


class DatabaseUnavailable(ServiceError):
    """The database does not answer. Nothing was changed; try again."""

    status, code = 503, "database_unavailable"
    default_headers = (("Retry-After", "1"),)


class OutcomeUnknown(ServiceError):
    """The database went away during the commit, so the outcome is unknown. Check, or retry with the same key."""

    status, code = 503, "outcome_unknown"
    default_headers = (("Retry-After", "1"),)


class NotReady(ServiceError):
    """The service is not ready to take work."""

    status, code = 503, "not_ready"
    default_headers = (("Retry-After", "1"),)


class NotFound(ServiceError):
    """There is nothing at this address."""

    status, code = 404, "not_found"


class JobNotFound(ServiceError):
    """No job has this id. GET /jobs?name=NAME finds jobs by their name."""

    status, code = 404, "job_not_found"


class CorpusNotFound(ServiceError):
    """No corpus has this id."""

    status, code = 404, "corpus_not_found"


class CorpusInUse(ServiceError):
    """A run uses the corpus."""

    status, code = 409, "corpus_in_use"


class DeviceNotFound(ServiceError):
    """The service has no such device."""

    status, code = 404, "device_not_found"


class WebhookNotFound(ServiceError):
    """No webhook has this id."""

    status, code = 404, "webhook_not_found"


class DeliveryNotFound(ServiceError):
    """The webhook has no such delivery. Those that ended are kept for 30 days."""

    status, code = 404, "delivery_not_found"


class TooManyWebhooks(ServiceError):
    """The maximum number of webhooks is reached. Delete some."""

    status, code = 409, "too_many_webhooks"


class PageNotFound(ServiceError):
    """The documentation has no such page. /llms.txt lists its pages."""

    status, code = 404, "page_not_found"


class LogNotFound(ServiceError):
    """The attempt has no log of this rank yet. A log is there once its rank has started."""

    status, code = 404, "log_not_found"


class CheckpointNotFound(ServiceError):
    """The job has no checkpoint of this step."""

    status, code = 404, "checkpoint_not_found"


class FileNotInCheckpoint(ServiceError):
    """The checkpoint's manifest names no such file, or the file is not there any more."""

    status, code = 404, "file_not_found"


class LastCheckpoint(ServiceError):
    """It is the last valid checkpoint of the job: without it the job cannot be resumed."""

    status, code = 409, "last_checkpoint"


class CheckpointInUse(ServiceError):
    """The checkpoint is in use."""

    status, code = 409, "checkpoint_in_use"


class RangeUnsatisfiable(ServiceError):
    """The range begins after the end of the file."""

    status, code = 416, "range_not_satisfiable"


class InvalidState(ServiceError):
    """The action does not fit the job's present status."""

    status, code = 409, "invalid_state"


class Conflict(ServiceError):
    """Another request changed the job at the same time. Read it again."""

    status, code = 409, "conflict"


class StepUnavailable(ServiceError):
    """The job has no full checkpoint of this step."""

    status, code = 409, "step_unavailable"


class CheckpointMismatch(ServiceError):
    """The run cannot be resumed: its corpus, vocabulary or shape differs from the one its checkpoint was saved with."""

    status, code = 409, "run_differs"


class FileNotInExport(ServiceError):
    """There is no such export, or it has no such file."""

    status, code = 404, "export_not_found"


class StorageError(ServiceError):
    """The files could not be written on the service's host. Partial files were removed."""

    status, code = 507, "disk_trouble"

    @classmethod
    def from_os_error(cls, error: OSError) -> "StorageError":
        """Return the error with the reason that the system gives."""
        return cls(f"{(cls.__doc__ or '').strip()} Reason: {error.strerror or type(error).__name__}.")


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or the one of the database driver in it, says that a disk or quota is full."""
    if isinstance(error, OSError):
        return error.errno in NO_SPACE
    cause = error.orig if isinstance(error, DBAPIError) else None
    full_sqlite = getattr(cause, "sqlite_errorname", None) == "SQLITE_FULL"
    return full_sqlite or getattr(cause, "sqlstate", None) == POSTGRES_DISK_FULL


POSTGRES_DISK_FULL = "53100"

DISK_FULL = "The disk is full on the service's host: nothing was changed. Free some space, then try again."


class ExportInProgress(ServiceError):
    """An export of this job is in progress. Retry when it is done."""

    status, code = 409, "export_under_way"
    default_headers = (("Retry-After", "5"),)


class ExportFailed(ServiceError):
    """The checkpoint could not be exported."""

    status, code = 409, "export_failed"


class GenerationUnavailable(ServiceError):
    """The server has no torch, so it cannot generate text. Use a service on a host that has."""

    status, code = 501, "generation_unavailable"


class TooManyGenerations(ServiceError):
    """Too many requests generate text or wait for it. Try again."""

    status, code = 429, "too_many_generations"
    default_headers = (("Retry-After", "2"),)


class GenerationBusy(ServiceError):
    """All processes that generate text are in use with other checkpoints. Try again."""

    status, code = 503, "generation_busy"
    default_headers = (("Retry-After", "5"),)


class DeviceReclaimed(ServiceError):
    """A job needed the device, so the text ends early. Try again: it is then generated elsewhere."""

    status, code = 503, "device_reclaimed"
    default_headers = (("Retry-After", "1"),)


class GenerationEnded(ServiceError):
    """The process that generates text ended. The reason is in the service's log. Try again."""

    status, code = 503, "generation_ended"
    default_headers = (("Retry-After", "1"),)


class ServiceStopping(ServiceError):
    """The service is stopping. Try again when it is back."""

    status, code = 503, "service_stopping"
    default_headers = (("Retry-After", "5"),)


class GenerationFailed(ServiceError):
    """The checkpoint cannot be used to generate text."""

    status, code = 409, "generation_failed"


class ModelTooLarge(ServiceError):
    """The checkpoint is too large to generate text here."""

    status, code = 409, "model_too_large"


class ModelNotFound(ServiceError):
    """There is no such model. A model is a job's id or name, @, and the step of a checkpoint or latest."""

    status, code = 404, "model_not_found"


class ExportUnavailable(ServiceError):
    """The server has no torch. Use one that has, or run `python -m trainyard.worker.checkpoint.export` yourself."""

    status, code = 501, "export_unavailable"


class ExportTimedOut(ServiceError):
    """The export exceeded its time limit and was stopped. Partial files were removed."""

    status, code = 504, "export_timeout"


class EvaluationNotFound(ServiceError):
    """The job has no evaluation with this id."""

    status, code = 404, "evaluation_not_found"


class TooManyEvaluations(ServiceError):
    """The maximum number of evaluations waits already. Try again when some have ended."""

    status, code = 429, "too_many_evaluations"
    default_headers = (("Retry-After", "30"),)


class EvaluationUnavailable(ServiceError):
    """The server has no torch, or TRAINYARD_EVALUATION_PROCESSES is 0: it evaluates no checkpoints."""

    status, code = 501, "evaluation_unavailable"


class SpecInvalid(ServiceError):
    """The job spec has mistakes."""

    status, code = 422, "invalid_spec"


class RequestInvalid(ServiceError):
    """The request has mistakes."""

    status, code = 422, "invalid_request"


class KeyReused(ServiceError):
    """The Idempotency-Key was used before, with another body. Use a new key for another request."""

    status, code = 422, "idempotency_key_reused"


class TooManyStreams(ServiceError):
    """The maximum number of streams is open. Close some, or read page by page."""

    status, code = 429, "too_many_streams"


class Overloaded(ServiceError):
    """Too many requests are being served, or the service has no free file descriptor. Try again soon."""

    status, code = 503, "overloaded"


class InvalidJson(ServiceError):
    """The body is not JSON."""

    status, code = 422, "invalid_json"


class BodyTooLarge(ServiceError):
    """The body is larger than this address accepts."""

    status, code = 413, "body_too_large"


class BodyTooSlow(ServiceError):
    """The body did not arrive in time."""

    status, code = 408, "request_timeout"
    default_headers = (("Connection", "close"),)


class UrlTooLong(ServiceError):
    """The URL is longer than this service accepts."""

    status, code = 414, "url_too_long"


class HeadersTooLarge(ServiceError):
    """The headers are larger than this service accepts."""

    status, code = 431, "headers_too_large"


class EncodedBody(ServiceError):
    """The body must be sent without Content-Encoding, as plain JSON: compressed bodies are not accepted."""

    status, code = 415, "unsupported_content_encoding"


class WrongMediaType(ServiceError):
    """The body must be sent as Content-Type: application/json."""

    status, code = 415, "unsupported_media_type"


class Unauthorized(ServiceError):
    """A valid token is needed: Authorization: Bearer <token>."""

    status, code = 401, "unauthorized"
    default_headers = (("WWW-Authenticate", "Bearer"),)


class Forbidden(ServiceError):
    """The token's scope is not enough for this."""

    status, code = 403, "forbidden"


class QuotaExceeded(ServiceError):
    """The token's quota of queued and running jobs or devices is used up."""

    status, code = 429, "quota_exceeded"


class TokenNotFound(ServiceError):
    """No token has this name."""

    status, code = 404, "token_not_found"


class TokenNameTaken(ServiceError):
    """The name is or was in use. Names are never reused, so that each means one token in every event."""

    status, code = 409, "token_name_taken"


class TokenRevoked(ServiceError):
    """The token was revoked for good: create another one."""

    status, code = 409, "token_revoked"


class PathPrefix(ServiceError):
    """The pages do not work below a path prefix, only the API does. Give the service a host name of its own."""

    status, code = 501, "path_prefix"


class HostNotAllowed(ServiceError):
    """The service is not known under the name in the Host header. TRAINYARD_ALLOWED_HOSTS lists its names."""

    status, code = 403, "foreign_host"


class CrossOrigin(ServiceError):
    """Pages of another origin may not change anything here."""

    status, code = 403, "foreign_origin"


def with_problems(kind: type[ServiceError], problems: Sequence[Problem]) -> ServiceError:
    """Return an error that lists every mistake with its pointer."""
    count = len(problems)
    detail = f"{count} mistake{'s' if count != 1 else ''} found; nothing was changed"
    return kind(detail, errors=[{"pointer": p.pointer, "message": p.message} for p in problems])


def problem_response(error: ServiceError, request_id: str | None) -> JSONResponse:
    """Return the error as a problem+json response."""
    return JSONResponse(problem_body(error, request_id), error.status, headers=error.headers, media_type=PROBLEM)


def problem_body(error: ServiceError, request_id: str | None) -> dict[str, Any]:
    """Return the body of a problem+json response."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "code": error.code,
        "detail": error.detail,
        "request_id": request_id,
        **error.extra,
    }


OPENAI_PATH = "/v1/"
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_body(error: ServiceError, request_id: str | None) -> dict[str, Any]:
    """Return the body of an error in OpenAI's format. ``param``: the first field at fault."""
    problems = error.extra.get("errors") or []
    listed = "; ".join(f"{one['pointer'].lstrip('/') or 'the body'} {one['message']}" for one in problems)
    kind = "server_error" if error.status >= 500 else OPENAI_TYPES.get(error.status, "invalid_request_error")
    return {
        "error": {
            "message": f"{listed}." if listed else error.detail,
            "type": kind,
            "param": problems[0]["pointer"].strip("/").partition("/")[0] if problems else None,
            "code": error.code,
            "request_id": request_id,
        }
    }


def error_response(error: ServiceError, path: str, request_id: str | None) -> JSONResponse:
    """Return the error as problem+json, or in OpenAI's format for the paths of its API."""
    if not path.startswith(OPENAI_PATH):
        return problem_response(error, request_id)
    # OpenAI has no 422.
    status = HTTPStatus.BAD_REQUEST if error.status == HTTPStatus.UNPROCESSABLE_ENTITY else error.status
    return JSONResponse(openai_body(error, request_id), status, headers=error.headers)


def from_exception(error: Exception) -> ServiceError:
    """Convert any exception into a ServiceError."""
    match error:
        case ServiceError():
            return error
        case HTTPException():
            return _from_http(error)
        case _ if is_disk_full(error):
            return StorageError(DISK_FULL)
        case OperationalError() | InterfaceError() | PoolTimeout():
            return DatabaseUnavailable()
        case DBAPIError() if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == READ_ONLY_SERVER:
            return DatabaseUnavailable()
        case OSError() if is_exhausted(error):
            return Overloaded(headers={"Retry-After": "5"})
        case _:
            return Internal()


OWN_ERRORS: dict[int, type[ServiceError]] = {404: NotFound, 408: BodyTooSlow, 413: BodyTooLarge}
"""Our class for an HTTPException of the framework with this status."""


def _from_http(error: HTTPException) -> ServiceError:
    if (own := OWN_ERRORS.get(error.status_code)) is not None:
        return own(headers=error.headers)
    phrase = HTTPStatus(error.status_code).phrase
    detail = f"{phrase}."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = "This address does not accept this method; the Allow header lists those it accepts."
    converted = ServiceError(detail, error.headers)
    converted.status = error.status_code
    converted.code = phrase.lower().replace(" ", "_").replace("-", "_")
    return converted
