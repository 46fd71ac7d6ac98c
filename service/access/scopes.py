"""What each route asks of a token. A test holds this against the routes there are; one that is missing needs admin."""

from fastapi import Request
from starlette.routing import compile_path

from contract.access import Scope
from service.access.callers import Caller
from service.errors import Forbidden

OPEN = "open"
"""For everybody, without a token."""

ATTEMPT = "attempt"
"""For the agent of an attempt, whose own token the route looks at itself."""

JOB = "/jobs/{job_id}"
WEBHOOK = "/webhooks/{webhook_id}"
READ, SUBMIT, ADMIN = Scope.READ, Scope.SUBMIT, Scope.ADMIN

NEEDS: dict[tuple[str, str], str] = {
    ("GET", "/health"): OPEN,
    ("GET", "/ready"): OPEN,
    ("GET", "/version"): READ,
    ("GET", "/status"): READ,
    ("GET", "/metrics"): READ,
    ("GET", "/devices"): READ,
    ("GET", "/jobs"): READ,
    ("POST", "/jobs"): SUBMIT,
    ("POST", "/jobs/plan"): SUBMIT,
    ("GET", JOB): READ,
    ("PATCH", JOB): SUBMIT,
    ("DELETE", JOB): SUBMIT,
    ("POST", f"{JOB}/pause"): SUBMIT,
    ("POST", f"{JOB}/resume"): SUBMIT,
    ("POST", f"{JOB}/save"): SUBMIT,
    ("POST", f"{JOB}/fork"): SUBMIT,
    ("POST", f"{JOB}/fork/plan"): SUBMIT,
    ("POST", f"{JOB}/cancel"): SUBMIT,
    ("POST", f"{JOB}/kill"): SUBMIT,
    ("GET", f"{JOB}/metrics"): READ,
    ("GET", f"{JOB}/metrics/stream"): READ,
    ("GET", f"{JOB}/logs"): READ,
    ("GET", f"{JOB}/logs/lines"): READ,
    ("GET", f"{JOB}/logs/search"): READ,
    ("GET", f"{JOB}/logs/stream"): READ,
    ("GET", f"{JOB}/events"): READ,
    ("GET", f"{JOB}/attempts"): READ,
    ("GET", f"{JOB}/samples"): READ,
    ("GET", f"{JOB}/checkpoints"): READ,
    ("GET", f"{JOB}/checkpoints/{{step}}/files/{{name}}"): READ,
    ("DELETE", f"{JOB}/checkpoints/{{step}}"): SUBMIT,
    ("POST", f"{JOB}/checkpoints/{{step}}/export"): SUBMIT,
    ("GET", f"{JOB}/exports"): READ,
    ("GET", f"{JOB}/exports/{{step}}/{{form}}/files/{{name}}"): READ,
    ("GET", "/tokens"): ADMIN,
    ("POST", "/tokens"): ADMIN,
    ("PATCH", "/tokens/{name}"): ADMIN,
    ("POST", "/tokens/{name}/rotate"): ADMIN,
    ("DELETE", "/tokens/{name}"): ADMIN,
    # For many receivers the address alone lets in whoever knows it, so that readers do not see it.
    ("GET", "/webhooks"): SUBMIT,
    ("POST", "/webhooks"): SUBMIT,
    ("GET", WEBHOOK): SUBMIT,
    ("PATCH", WEBHOOK): SUBMIT,
    ("DELETE", WEBHOOK): SUBMIT,
    ("POST", f"{WEBHOOK}/rotate"): SUBMIT,
    ("POST", f"{WEBHOOK}/test"): SUBMIT,
    ("GET", f"{WEBHOOK}/deliveries"): SUBMIT,
    ("GET", f"{WEBHOOK}/deliveries/{{delivery_id}}"): SUBMIT,
    ("POST", f"{WEBHOOK}/deliveries/{{delivery_id}}/redeliver"): SUBMIT,
    ("POST", "/internal/attempts/{attempt_id}/events"): ATTEMPT,
    ("POST", "/internal/attempts/{attempt_id}/heartbeat"): ATTEMPT,
    ("POST", "/internal/attempts/{attempt_id}/exit"): ATTEMPT,
}


PATTERNS = [(method, compile_path(path)[0]) for method, path in NEEDS]


def methods_at(path: str) -> list[str]:
    """The methods that an address takes; [] where there is none, or a page."""
    return sorted(method for method, pattern in PATTERNS if pattern.match(path))


async def authorise(request: Request) -> None:
    """In front of every route: raise Forbidden where the caller's scope is not enough."""
    need = NEEDS.get((request.method, request.scope["route"].path), ADMIN)
    caller: Caller = request.scope["caller"]
    if need not in (OPEN, ATTEMPT) and not caller.scope.covers(Scope(need)):
        raise Forbidden(f"This needs the scope {need}; the token {caller.name} has {caller.scope}.")
