"""The Python client of a Trainyard service.

with Trainyard() as trainyard:
    job = trainyard.submit({"data": {"data_path": "/data/corpus.jsonl"}})
    job = trainyard.wait(job["id"])
    print(job["status"], job["checkpoint"]["path"])
"""

import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import quote

import httpx2

from trainyard.client.connection import Connection, RetryPolicy, address_of
from trainyard.client.download import fetch
from trainyard.client.errors import (
    AmbiguousName,
    NotFound,
    ServiceUnreachable,
    UnexpectedStatus,
    WaitTimedOut,
)
from trainyard.client.exit_codes import is_idle
from trainyard.client.sse import StreamEvent
from trainyard.client.types import (
    Checkpoint,
    Export,
    Job,
    LogChunk,
    Metric,
    NewToken,
    Plan,
    Token,
    Version,
)
from trainyard.client.webhooks import Webhooks

DEFAULT_URL = "http://127.0.0.1:8000"
PAGE = 100
METRICS_PAGE = 1000


class Client:
    """A service, as an object: one method for each route.

    Args:
        url: where it is, "http://" where it says no scheme; else ``TRAINYARD_URL``, else http://127.0.0.1:8000.
        token: bearer token; else ``TRAINYARD_TOKEN``, else none; "" is none whatever the environment says.
        timeout: seconds for one try of one call.
        patience: how long a call whose answer was lost is tried again, where that is safe.
        transport: stands in for the network in tests.

    Every method raises `ServiceUnreachable` where nothing answers and `Refused` where the service says no. The routes
    of webhooks are methods of ``webhooks``.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 10.0,
        patience: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.url = address_of(url or os.environ.get("TRAINYARD_URL") or DEFAULT_URL)
        token = os.environ.get("TRAINYARD_TOKEN") if token is None else token
        self._connection = Connection(self.url, token, timeout, patience or RetryPolicy(), transport)
        self.webhooks = Webhooks(self._connection, self._pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the sockets back."""
        self._connection.close()

    # Jobs

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Launch a run. The key makes a lost answer harmless: the same key never makes a second job.

        Raises:
            InvalidSpec: with every mistake at once in ``errors``.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return cast(Job, self._connection.call("POST", "/jobs", body=spec, headers=headers))

    def plan(self, spec: Mapping[str, Any]) -> Plan:
        """What the run of ``spec`` would be: size, memory, disk, time, warnings. Nothing is stored.

        Raises:
            InvalidSpec: with every mistake at once in ``errors``.
        """
        return cast(Plan, self._connection.call("POST", "/jobs/plan", body=spec))

    def jobs(
        self,
        *,
        status: str | None = None,
        labels: Collection[str] = (),
        name: str | None = None,
        order: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Jobs, page by page; ``labels`` are ``key=value``; at most ``limit`` in all."""
        params = {"status": status, "label": list(labels) or None, "name": name, "order": order}
        return cast(Iterator[Job], self._pages("/jobs", params, limit))

    def job(self, job_id: str) -> Job:
        """One job by its id."""
        return cast(Job, self._connection.call("GET", _path(job_id)))

    def find(self, id_or_name: str) -> Job:
        """One job by its id or by its name.

        Raises:
            NotFound: no job has this id or name.
            NameShared: several jobs have this name; the message lists their ids.
        """
        if id_or_name.startswith("job_"):
            try:
                return self.job(id_or_name)
            except NotFound:
                pass
        found = [job for job in self.jobs(name=id_or_name, limit=PAGE) if job["name"] == id_or_name]
        if not found:
            raise NotFound(404, {"code": "job_not_found", "detail": f"no job has the id or name {id_or_name!r}"})
        if len(found) > 1:
            ids = ", ".join(f"{job['id']} ({job['status']})" for job in found[:5])
            raise AmbiguousName(f"{len(found)} jobs are named {id_or_name!r}; say which by id: {ids}")
        return found[0]

    def update(self, job_id: str, **changes: Any) -> Job:
        """Change ``name``, ``labels``, ``priority``, ``log_interval``, ``save_interval`` or ``keep_last``."""
        return cast(Job, self._connection.call("PATCH", _path(job_id), body=changes))

    def pause(self, job_id: str) -> Job:
        """Save and stop; the job can be resumed."""
        return self._act(job_id, "pause")

    def save(self, job_id: str) -> Job:
        """Ask for a checkpoint at the next step; the run goes on."""
        return self._act(job_id, "save")

    def resume(self, job_id: str, **changes: Any) -> Job:
        """Go on from the newest valid checkpoint, or from that of ``step``.

        May raise ``epochs`` or ``max_steps``, and change ``resources``.
        """
        return self._act(job_id, "resume", changes or None)

    def fork(
        self,
        job_id: str,
        step: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        data: str = "keep",
        idempotency_key: str | None = None,
    ) -> Job:
        """A new job that begins at the checkpoint of ``step``, or the newest; ``overrides`` are a part of a job spec.

        ``data``: "keep" goes on with the parent's order of samples, "restart" begins data and schedule anew.

        Raises:
            InvalidSpec: with every mistake at once in ``errors``.
        """
        body = {"step": step, "overrides": overrides or {}, "data": data}
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return cast(Job, self._connection.call("POST", _path(job_id, "fork"), body=body, headers=headers))

    def cancel(self, job_id: str) -> Job:
        """Save and stop for good."""
        return self._act(job_id, "cancel")

    def kill(self, job_id: str) -> Job:
        """Stop now; nothing is saved."""
        return self._act(job_id, "kill")

    def delete(self, job_id: str) -> None:
        """Remove the record and the files of a job that has ended."""
        self._connection.call("DELETE", _path(job_id))

    def wait(
        self,
        job_id: str,
        until: Collection[str] | Callable[[Job], bool] | None = None,
        timeout: float | None = None,
        interval: float = 0.5,
    ) -> Job:
        """Wait until the job has one of the statuses ``until``, or until it is at rest where that is None.

        A service that is away is waited for as well, once it was seen.

        Raises:
            WaitTimedOut: ``timeout`` seconds passed.
            WaitedInVain: the job came to rest in another status.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        job: Job | None = None
        while True:
            job = self._poll(job_id, job)
            if _reached(job, until):
                return job
            if not callable(until) and is_idle(job):
                raise UnexpectedStatus(job)
            if deadline is not None and time.monotonic() + interval > deadline:
                raise WaitTimedOut(timeout or 0.0, job)
            time.sleep(interval)

    # What a job leaves behind

    def metrics(
        self, job_id: str, *, after_step: int = 0, attempt: int | None = None, lineage: bool = False
    ) -> Iterator[Metric]:
        """Every point of the curve behind ``after_step``, oldest first, fetched page by page.

        ``lineage``: a fork's curve begins with those of its ancestors; ``job_id`` in each point says whose it is.
        """
        while True:
            params = {"after_step": after_step, "limit": METRICS_PAGE, "attempt": attempt, "lineage": lineage or None}
            page = self._connection.call("GET", _path(job_id, "metrics"), params=params)
            yield from page["data"]
            if not page["has_more"] or not page["data"]:
                return
            after_step = page["data"][-1]["step"]

    def metric_stream(
        self, job_id: str, *, after_step: int = 0, last_event_id: str | None = None
    ) -> Iterator[StreamEvent]:
        """``metric`` events as they come, ``attempt`` where another one goes on from an earlier step, then ``end``.

        One connection: where it breaks, `ServiceUnreachable` is raised, or the iterator ends without ``end``; go on
        with the id of the last event.
        """
        return self._connection.stream(_path(job_id, "metrics", "stream"), {"after_step": after_step}, last_event_id)

    def log_stream(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int | str | None = None,
        offset: int | None = None,
        last_event_id: str | None = None,
    ) -> Iterator[StreamEvent]:
        """``log`` events ``{attempt, offset, data, next_offset}`` as they come, then ``end``. One connection."""
        params = {"attempt": attempt, "rank": rank, "offset": offset}
        return self._connection.stream(_path(job_id, "logs", "stream"), params, last_event_id)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """The checkpoints, newest first."""
        return list(cast(Iterator[Checkpoint], self._pages(_path(job_id, "checkpoints"))))

    def manifest(self, job_id: str, step: int) -> dict[str, Any]:
        """What a checkpoint's manifest says of each of its files: ``{"files": {name: {"bytes", "sha256"}}}``."""
        path = _path(job_id, "checkpoints", str(step), "files", "manifest.json")
        return cast(dict[str, Any], self._connection.call("GET", path))

    def download(self, job_id: str, step: int, into: str | os.PathLike[str]) -> list[str]:
        """Fetch every file of a checkpoint into the folder ``into``; what an earlier try left is gone on with.

        Returns the names. Raises `Damaged` where a file is not what the manifest says, beside what every call raises.
        """
        return fetch(self._connection, _path(job_id, "checkpoints", str(step), "files"), Path(into))

    def export(self, job_id: str, step: int, *, format: str = "hf", timeout: float = 900.0) -> Export:  # noqa: A002 - as the API has it
        """Write a checkpoint beside the run as others load it: "hf" or "minimind". Returns where it is.

        The same export again is answered with the same path. ``timeout``: seconds, for it is written meanwhile.
        """
        path = _path(job_id, "checkpoints", str(step), "export")
        return cast(Export, self._connection.call("POST", path, body={"format": format}, timeout=timeout))

    def exports(self, job_id: str) -> list[Export]:
        """What was exported, newest step first."""
        return list(cast(Iterator[Export], self._pages(_path(job_id, "exports"))))

    def delete_checkpoint(self, job_id: str, step: int) -> None:
        """Remove a full checkpoint with its files; the service refuses for the last valid one."""
        self._connection.call("DELETE", _path(job_id, "checkpoints", str(step)))

    def events(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Transitions, warnings, saves, restarts, and who asked."""
        return self._pages(_path(job_id, "events"))

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        """One row a launch: why it began, from which step, how it ended."""
        return list(self._pages(_path(job_id, "attempts")))

    def samples(self, job_id: str) -> list[dict[str, Any]]:
        """Texts the model wrote, by step."""
        return list(self._pages(_path(job_id, "samples")))

    def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int | str | None = None,
        tail: int | None = None,
        offset: int | None = None,
    ) -> LogChunk:
        """A piece of a log: the last ``tail`` lines, or what stands behind byte ``offset``."""
        params = {"attempt": attempt, "rank": rank, "tail": tail, "offset": offset}
        return cast(LogChunk, self._connection.call("GET", _path(job_id, "logs"), params=params))

    # The service itself

    def devices(self) -> list[dict[str, Any]]:
        """Every device: model, memory, who leases it."""
        return list(self._pages("/devices"))

    def health(self) -> dict[str, Any]:
        """Whether the process lives."""
        return cast(dict[str, Any], self._connection.call("GET", "/health"))

    def ready(self) -> dict[str, Any]:
        """Whether it can take work; `Refused` or `ServiceUnreachable` where it cannot."""
        return cast(dict[str, Any], self._connection.call("GET", "/ready"))

    def version(self) -> Version:
        """What is running there."""
        return cast(Version, self._connection.call("GET", "/version"))

    # Named tokens, for admins

    def create_token(
        self,
        name: str,
        scope: str = "read",
        *,
        expires_in: int | None = None,
        max_jobs: int | None = None,
        max_devices: int | None = None,
    ) -> NewToken:
        """Make a token: scope read, submit or admin; ``expires_in`` seconds. ``token`` in the answer is its secret."""
        quotas = {"max_jobs": max_jobs, "max_devices": max_devices}
        body = {"name": name, "scope": scope, "expires_in": expires_in, **quotas}
        return cast(NewToken, self._connection.call("POST", "/tokens", body=body))

    def tokens(self) -> list[Token]:
        """All named tokens, oldest first, without their secrets."""
        return cast(list[Token], self._connection.call("GET", "/tokens")["data"])

    def limit_token(self, name: str, *, max_jobs: int | None = None, max_devices: int | None = None) -> Token:
        """Change its quotas; None is no limit."""
        body = {"max_jobs": max_jobs, "max_devices": max_devices}
        return cast(Token, self._connection.call("PATCH", _token(name), body=body))

    def rotate_token(self, name: str, *, overlap: int = 0, expires_in: int | None = None) -> NewToken:
        """Another secret for the token; the one it had stays good for ``overlap`` seconds."""
        body = {"overlap": overlap, "expires_in": expires_in}
        return cast(NewToken, self._connection.call("POST", f"{_token(name)}/rotate", body=body))

    def revoke_token(self, name: str) -> None:
        """Let nobody in by it any more."""
        self._connection.call("DELETE", _token(name))

    def _act(self, job_id: str, verb: str, body: Mapping[str, Any] | None = None) -> Job:
        return cast(Job, self._connection.call("POST", _path(job_id, verb), body=body))

    def _poll(self, job_id: str, before: Job | None) -> Job:
        try:
            return self.job(job_id)
        except ServiceUnreachable:
            if before is None:
                raise
            return before

    def _pages(
        self, path: str, params: Mapping[str, Any] | None = None, limit: int | None = None
    ) -> Iterator[dict[str, Any]]:
        after: object = None
        left = limit
        while left is None or left > 0:
            wanted = {**(params or {}), "limit": PAGE if left is None else min(left, PAGE), "after": after}
            page = self._connection.call("GET", path, params=wanted)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            after = page["data"][-1]["id"]
            left = None if left is None else left - len(page["data"])


def _path(job_id: str, *below: str) -> str:
    return "/".join(["/jobs", quote(job_id, safe=""), *below])


def _token(name: str) -> str:
    return f"/tokens/{quote(name, safe='')}"


def _reached(job: Job, until: Collection[str] | Callable[[Job], bool] | None) -> bool:
    if until is None:
        return is_idle(job)
    return until(job) if callable(until) else job["status"] in until
