"""A Trainyard service in memory: enough of api.md to drive the client, with faults on demand."""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx2

from trainyard.client.cli.console import Console
from trainyard.client.connection import RetryPolicy

URL = "http://127.0.0.1:8000"
QUICK = RetryPolicy(seconds=0.06, first_pause=0.01, max_pause=0.02)
NOW = datetime(2026, 1, 31, 16, 31, 5, tzinfo=UTC)

Fault = Callable[[httpx2.Request], httpx2.Response | None]


class Stream(io.StringIO):
    """A text stream whose isatty() is given."""

    def __init__(self, text: str = "", *, terminal: bool = False) -> None:
        super().__init__(text)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def console(typed: str = "", *, terminal: bool = False) -> Console:
    return Console(Stream(terminal=terminal), Stream(terminal=terminal), Stream(typed, terminal=terminal))


def written(to: Console) -> tuple[str, str]:
    assert isinstance(to.out, Stream)
    assert isinstance(to.err, Stream)
    return to.out.getvalue(), to.err.getvalue()


def job(status: str = "running", **changes: Any) -> dict[str, Any]:
    """A job as the service would show it."""
    made: dict[str, Any] = {
        "object": "job",
        "id": "job_7f3kq9",
        "name": "pre-12",
        "labels": {},
        "status": status,
        "desired": "run",
        "phase": "training" if status == "running" else None,
        "reason": None,
        "message": None,
        "error": None,
        "spec": {"checkpoint": {"save_interval": 1000}, "reporting": {"log_interval": 100}},
        "plan": {"tokens_per_step": 32768.0},
        "progress": {
            "step": 12400,
            "steps": 40000,
            "percent": 31.0,
            "eta_seconds": 7800.0,
            "loss": 2.887,
            "learning_rate": 2.61e-4,
            "grad_norm": 0.48,
            "tokens": 406_000_000,
            "tokens_per_second": 118240.0,
            "mfu": 0.41,
            "updated_at": "2026-01-31T16:31:04Z",
        },
        "attempt": 2,
        "resumable": False,
        "resume_blocker": f"the job is {status}",
        "checkpoint": {
            "step": 12000,
            "path": "/runs/step-00012000",
            "bytes": 766_000_000,
            "created_at": "2026-01-31T16:28:05Z",
        },
        "queue": None,
        "allowed_actions": [{"action": "pause", "allowed": True, "why_not": None}],
        "summary": "Step 12,400 of 40,000.",
        "alerts": [],
        "restart_at": None,
        "created_at": "2026-01-31T14:31:05Z",
        "queued_at": None,
        "started_at": None,
        "finished_at": None,
    }
    return made | changes


def metric(step: int, loss: float | None = 3.0, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "step": step,
        "attempt": 1,
        "epoch": 0.1,
        "loss": loss,
        "learning_rate": 2.61e-4,
        "grad_norm": 0.48,
        "tokens": step * 32768,
        "tokens_per_second": 118240.0,
        "mfu": 0.41,
        "step_seconds": 0.277,
        "eval_loss": None,
        "nonfinite": loss is None,
        "at": "2026-01-31T16:31:04Z",
    }
    return made | changes


PROPOSAL: dict[str, Any] = {
    "object": "proposal",
    "depth": 12,
    "parameters": 85_000_000,
    "spec": {"model": {"hidden_size": 768}, "training": {"learning_rate": 6e-4}},
    "settings": [
        {"pointer": "/model/hidden_size", "value": 768, "reason": "64 x depth", "source": "nanochat"},
        {"pointer": "/training/learning_rate", "value": 6e-4, "reason": "as it is", "source": None},
    ],
}


def plan(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "object": "plan",
        "parameters": 25_830_000,
        "active_parameters": 25_830_000,
        "tokens": 1_310_000,
        "samples": 4000,
        "bad_lines": 0,
        "steps": 1200,
        "tokens_per_step": 32768.0,
        "world_size": 1,
        "device": "cuda",
        "memory_bytes": {"weights": 100_000_000, "gradients": 100_000_000, "optimizer": 200_000_000, "activations": 5},
        "memory_limit_bytes": 80_000_000_000,
        "checkpoint_bytes": 309_000_000,
        "disk_free_bytes": 40_000_000_000,
        "flops": 6.1e15,
        "eta_seconds": 7800.0,
        "eta_basis": "118,240 tokens/s in job_0 on H100",
        "expected_first_loss": 8.764,
        "estimated": True,
        "warnings": [],
        "advice": [],
        "queue": {"position": 1, "waiting_for": "nothing: it would start immediately"},
    }
    return made | changes


def problem(status: int, code: str, detail: str, **more: Any) -> httpx2.Response:
    body = {"title": detail, "status": status, "code": code, "detail": detail, "request_id": "req-1", **more}
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


def listed(rows: list[Any], has_more: bool = False) -> httpx2.Response:
    return httpx2.Response(200, json={"object": "list", "data": rows, "has_more": has_more})


class FakeService:
    """Answers from ``jobs`` and the other lists. ``faults`` are tried first, one a request."""

    def __init__(self, *jobs: dict[str, Any]) -> None:
        self.jobs = {made["id"]: made for made in jobs}
        self.curve: list[dict[str, Any]] = []
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.log = ""
        self.logs: dict[str, str] = {}
        """Logs by the number of their attempt. All other attempts have ``log``."""
        self.plan = plan()
        self.files: dict[int, dict[str, bytes]] = {}
        self.requests: list[httpx2.Request] = []
        self.faults: list[Fault] = []
        self.submitted: dict[str, dict[str, Any]] = {}
        self.page = 1000

    @property
    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self.answer)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.faults:
            response = self.faults.pop(0)(request)
            if response is not None:
                return response
        parts = request.url.path.strip("/").split("/")
        if parts == ["jobs", "proposal"]:
            return httpx2.Response(200, json=PROPOSAL)
        if parts == ["jobs", "plan"]:
            return httpx2.Response(200, json=self.plan)
        if parts == ["jobs"]:
            return self._submit(request) if request.method == "POST" else self._list(request)
        if parts[0] == "jobs":
            return self._job(request, *parts[1:])
        if parts[0] in ("health", "ready"):
            return httpx2.Response(200, json={"status": "ok", "parts": []})
        if parts[0] == "version":
            return httpx2.Response(200, json={"name": "trainyard", "version": "9.9"})
        return listed(self.rows.get(parts[0], []))

    def _submit(self, request: httpx2.Request) -> httpx2.Response:
        key = request.headers["Idempotency-Key"]
        status = 200 if key in self.submitted else 201
        made = self.submitted.setdefault(key, job("queued", id=f"job_{len(self.submitted)}", spec=body_of(request)))
        self.jobs[made["id"]] = made
        return httpx2.Response(status, json=made)

    def _list(self, request: httpx2.Request) -> httpx2.Response:
        name, limit = request.url.params.get("name"), int(request.url.params.get("limit", 100))
        found = [made for made in self.jobs.values() if name in (None, made["name"])]
        after = request.url.params.get("after")
        ids = [made["id"] for made in found]
        rest = found[ids.index(after) + 1 :] if after else found
        return listed(rest[:limit], len(rest) > limit)

    def _job(self, request: httpx2.Request, job_id: str, *below: str) -> httpx2.Response:
        if job_id not in self.jobs:
            return problem(404, "job_not_found", "No job has this id.")
        if below[-1:] == ("export",):
            return httpx2.Response(201, json=self._export(job_id, int(below[1]), body_of(request)["format"]))
        if below[:1] == ("exports",) and len(below) == 5:
            return httpx2.Response(200, content=b"x" * 300)
        if below == ("fork",):
            asked = body_of(request)
            parent = {"job_id": job_id, "step": asked["step"] or 400, "data": asked["data"]}
            return httpx2.Response(201, json={**self.jobs[job_id], "id": "job_fork", "parent": parent})
        if below[:1] == ("checkpoints",) and len(below) > 1:
            return self._checkpoint(request, int(below[1]), *below[2:])
        if request.method == "DELETE":
            del self.jobs[job_id]
            return httpx2.Response(204)
        if not below or request.method == "POST":
            return httpx2.Response(200 if not below else 202, json=self.jobs[job_id])
        if below == ("metrics",):
            return self._metrics(request)
        if below == ("logs",):
            return self._logs(request)
        return listed(self.rows.get(below[0], []))

    def _export(self, job_id: str, step: int, form: str) -> dict[str, Any]:
        path = f"/runs/{job_id}/exports/step-{step:08d}-{form}"
        files = [{"name": "config.json", "bytes": 300}]
        return {
            "object": "export",
            "job_id": job_id,
            "step": step,
            "format": form,
            "path": path,
            "bytes": 300,
            "files": files,
        }

    def _checkpoint(self, request: httpx2.Request, step: int, *below: str) -> httpx2.Response:
        if step not in self.files:
            return problem(404, "checkpoint_not_found", "The job has no checkpoint of this step.")
        if request.method == "DELETE":
            del self.files[step]
            return httpx2.Response(204)
        data = self.files[step][below[1]]
        asked = request.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        return httpx2.Response(206 if asked else 200, content=data[begin:])

    def _metrics(self, request: httpx2.Request) -> httpx2.Response:
        if "max_points" in request.url.params:
            return listed([row for row in self.curve if row.get("eval")][-1:])
        after = int(request.url.params["after_step"])
        attempt = request.url.params.get("attempt")
        rows = [row for row in self.curve if row["step"] > after and attempt in (None, str(row["attempt"]))]
        return listed(rows[: self.page], len(rows) > self.page)

    def _logs(self, request: httpx2.Request) -> httpx2.Response:
        tail, offset = request.url.params.get("tail"), int(request.url.params.get("offset", 0))
        log = self.logs.get(request.url.params.get("attempt", ""), self.log)
        data = "".join(log.splitlines(keepends=True)[-int(tail) :]) if tail else log[offset:]
        return httpx2.Response(200, json={"data": data, "next_offset": len(log)})


def body_of(request: httpx2.Request) -> Any:
    return json.loads(request.content)


def refused(request: httpx2.Request) -> httpx2.Response:
    """Nobody listens."""
    raise httpx2.ConnectError("connection refused", request=request)


def lost(request: httpx2.Request) -> httpx2.Response:
    """The request arrived; its answer did not."""
    raise httpx2.ReadError("connection reset", request=request)
