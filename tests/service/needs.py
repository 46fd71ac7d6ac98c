"""The scope of each route, as a table: a change at a route has to be made here too, so that it is seen."""

from trainyard.contract.scopes import Scope

OPEN, ATTEMPT = "open", "attempt"

JOB = "/jobs/{job_id}"
WEBHOOK = "/webhooks/{webhook_id}"
READ, SUBMIT, OPERATE, ADMIN = Scope

NEEDS: dict[tuple[str, str], str] = {
    ("GET", "/health"): OPEN,
    ("GET", "/ready"): OPEN,
    ("GET", "/version"): READ,
    ("GET", "/status"): READ,
    ("GET", "/metrics"): READ,
    ("GET", "/openapi.json"): READ,
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
    ("GET", "/webhooks"): OPERATE,
    ("POST", "/webhooks"): OPERATE,
    ("GET", WEBHOOK): OPERATE,
    ("PATCH", WEBHOOK): OPERATE,
    ("DELETE", WEBHOOK): OPERATE,
    ("POST", f"{WEBHOOK}/rotate"): OPERATE,
    ("POST", f"{WEBHOOK}/test"): OPERATE,
    ("GET", f"{WEBHOOK}/deliveries"): OPERATE,
    ("GET", f"{WEBHOOK}/deliveries/{{delivery_id}}"): OPERATE,
    ("POST", f"{WEBHOOK}/deliveries/{{delivery_id}}/redeliver"): OPERATE,
    ("POST", "/internal/attempts/{attempt_id}/events"): ATTEMPT,
    ("POST", "/internal/attempts/{attempt_id}/heartbeat"): ATTEMPT,
    ("POST", "/internal/attempts/{attempt_id}/exit"): ATTEMPT,
}
