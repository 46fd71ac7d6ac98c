"""The Python client of a Trainyard service.

with Client() as client:
    job = client.submit({"data": {"data_path": "/data/corpus.jsonl"}})
    job.wait()
    print(job.status, job.checkpoint["path"])

The methods of `Client` and `Webhooks` describe requests, and its connection runs them. `async_client` has the same
methods with a connection that awaits.
"""

import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import quote

import httpx2

from trainyard.client.connection import PAGE, UNAVAILABLE, Connection, RetryPolicy, normalize_url
from trainyard.client.download import download_checkpoint, download_export
from trainyard.client.errors import (
    AmbiguousName,
    ApiError,
    InvalidSpec,
    NotFound,
    ServiceUnreachable,
    TrainyardError,
    UnexpectedStatus,
    WaitTimedOut,
    api_error,
)
from trainyard.client.exit_codes import is_idle
from trainyard.client.flows import Flow, Item, ItemFlow, Sleep
from trainyard.client.job import JobFields, job_html, of_job
from trainyard.client.pages import Pages
from trainyard.client.sse import END, OPENED, StreamEvent
from trainyard.client.types import (
    Checkpoint,
    CurvePoint,
    Evaluation,
    Export,
    GeneratedText,
    HeldOutResult,
    LogChunk,
    Metric,
    NewToken,
    Plan,
    Proposal,
    TaskScore,
    Token,
    TokenizedCorpus,
    Version,
)
from trainyard.client.webhooks import Webhooks
from trainyard.contract.status import CorpusStatus

if TYPE_CHECKING:
    from trainyard.client.async_connection import AsyncConnection

DEFAULT_URL = "http://127.0.0.1:8000"
METRICS_PAGE = 1000
GENERATION_SECONDS = 600.0
RECONNECT_SECONDS = 0.5
MAX_SILENCE_SECONDS = 10.0
"""Less than the 15 s between two comments of a stream: a longer silence never occurs."""


class ClientBase:
    """What both clients share: the settings, and the conversations of several requests."""

    _connection: "Connection | AsyncConnection"

    def __init__(self, url: str | None, token: str | None) -> None:
        self.url = normalize_url(url or os.environ.get("TRAINYARD_URL") or DEFAULT_URL)
        # A variable that was set from a secret often ends with a newline, which a header cannot contain.
        self._token = os.environ.get("TRAINYARD_TOKEN", "").strip() if token is None else token

    @property
    def server_time(self) -> datetime:
        """The time by the clock of the service, as its last response showed it, in UTC.

        Ages of times in results are right with it, even if the clock of this host is wrong by a minute or more.
        """
        return datetime.now(UTC) + self._connection.clock_offset

    def _job(self, fields: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def _act(self, job_id: str, verb: str, body: Mapping[str, Any] | None = None) -> Any:
        return self._connection.request("POST", _path(job_id, verb), body=body, parse=self._job)

    def _pages(self, path: str, params: Mapping[str, Any] | None = None, limit: int | None = None) -> Any:
        return self._connection.each(self._connection.list_pages(path, params, limit))

    def _list(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return self._pages(path, params).to_list()

    def _find(self, id_or_name: str) -> Flow[Any]:
        if id_or_name.startswith("job_"):
            try:
                return self._job((yield from self._connection.call("GET", _path(id_or_name))))
            except NotFound:
                pass
        matches: list[Any] = []
        for discarded in (None, "true"):
            params = {"name": id_or_name, "limit": PAGE, "discarded": discarded}
            page = yield from self._connection.call("GET", "/jobs", params=params)
            matches = [self._job(job) for job in page["data"] if job["name"] == id_or_name]
            if matches:
                break
        if not matches:
            raise NotFound(404, {"code": "job_not_found", "detail": f"no job has the id or name {id_or_name!r}"})
        if len(matches) > 1:
            raise AmbiguousName(id_or_name, matches)
        return matches[0]

    def _decay(
        self, job_id: str, steps: int, step: int | None, shape: str, name: str | None, key: str | None
    ) -> Flow[Any]:
        job = yield from self._connection.call("GET", _path(job_id))
        if step is None:
            step = yield from self._newest_full_step(job_id)
        base = (job.get("plan") or {}).get("base_step") or 0
        training = {"lr_scheduler": "wsd", "decay_steps": steps, "decay_shape": shape, "max_steps": step - base + steps}
        overrides: dict[str, Any] = {"training": training} | ({} if name is None else {"name": name})
        body = {"step": step, "overrides": overrides, "data": "keep"}
        path, headers = _path(job_id, "fork"), _idempotent(key)
        return self._job((yield from self._connection.call("POST", path, body=body, headers=headers)))

    def _newest_full_step(self, job_id: str) -> Flow[int]:
        after = None
        while True:
            params = {"limit": PAGE, "after": after}
            page = yield from self._connection.call("GET", _path(job_id, "checkpoints"), params=params)
            for checkpoint in page["data"]:
                if checkpoint["kind"] == "full":
                    return int(checkpoint["step"])
            if not page["has_more"]:
                return 0  # the service rejects the fork, with the reason
            after = page["data"][-1]["id"]

    def _wait(
        self,
        job_id: str,
        until: Collection[str] | Callable[[Any], bool] | None,
        timeout: float | None,
        interval: float,
        stall_timeout: float | None,
    ) -> Flow[Any]:
        deadline = None if timeout is None else time.monotonic() + timeout
        progress, progress_at = None, time.monotonic()
        fields: Mapping[str, Any] | None = None
        while True:
            fields = yield from self._poll(job_id, fields)
            job = self._job(fields)
            if progress != (progress := _progress_of(job)):
                progress_at = time.monotonic()
            if _reached(job, until):
                return job
            if not callable(until) and is_idle(job):
                raise UnexpectedStatus(job)
            if deadline is not None and time.monotonic() + interval > deadline:
                raise WaitTimedOut(timeout or 0.0, job)
            if stall_timeout is not None and time.monotonic() + interval > progress_at + stall_timeout:
                raise WaitTimedOut(stall_timeout, job, stalled=True)
            yield Sleep(interval)

    def _poll(self, job_id: str, before: Mapping[str, Any] | None) -> Flow[Mapping[str, Any]]:
        try:
            fields: Mapping[str, Any] = yield from self._connection.call("GET", _path(job_id))
        except ServiceUnreachable:
            if before is None:
                raise
            return before
        return fields

    def _wait_for_corpus(
        self,
        corpus_id: str,
        timeout: float | None,
        interval: float,
        on_progress: Callable[[TokenizedCorpus], None] | None,
    ) -> Flow[TokenizedCorpus]:
        deadline = None if timeout is None else time.monotonic() + timeout
        corpus: TokenizedCorpus | None = None
        while True:
            try:
                corpus = cast(TokenizedCorpus, (yield from self._connection.call("GET", _corpus(corpus_id))))
                if on_progress is not None:
                    on_progress(corpus)
                if corpus["status"] not in (CorpusStatus.QUEUED, CorpusStatus.PREPARING):
                    return corpus
            except ServiceUnreachable:
                if corpus is None:
                    raise
            if deadline is not None and time.monotonic() + interval > deadline:
                raise WaitTimedOut(timeout or 0.0, corpus)
            yield Sleep(interval)

    def _wait_evaluation(self, evaluation: Evaluation, timeout: float | None, interval: float) -> Flow[Evaluation]:
        deadline = None if timeout is None else time.monotonic() + timeout
        path = _path(evaluation["job_id"], "evaluations", evaluation["id"])
        while evaluation["state"] in ("pending", "running"):
            if deadline is not None and time.monotonic() + interval > deadline:
                raise WaitTimedOut(timeout or 0.0, evaluation)
            yield Sleep(interval)
            evaluation = cast(Evaluation, (yield from self._connection.call("GET", path)))
        return evaluation

    def _metric_pages(self, job_id: str, after_step: int, attempt: int | None, lineage: bool) -> ItemFlow[list[Metric]]:
        while True:
            params = {"after_step": after_step, "limit": METRICS_PAGE, "attempt": attempt, "lineage": lineage or None}
            page = yield from self._connection.call("GET", _path(job_id, "metrics"), params=params)
            yield Item(page["data"])
            if not page["has_more"] or not page["data"]:
                return
            after_step = page["data"][-1]["step"]

    def _follow(self, job_id: str, after_step: int, interval: float) -> ItemFlow[Metric]:
        fields: Mapping[str, Any] | None = None
        position = _Position()
        path, params = _path(job_id, "metrics", "stream"), {"after_step": after_step}
        timeout = min(interval, MAX_SILENCE_SECONDS)
        while True:
            # First the job, then its points: so all points of an idle job are read.
            fields = yield from self._poll(job_id, fields)
            position.opened = is_silent = False
            try:
                last_id, accept = position.last_id, position.point_of
                yield from self._connection.events(path, params, last_id, timeout=timeout, accept=accept)
            except ServiceUnreachable as error:
                # Silence means that all points were sent. After a broken connection, even an idle job may have more.
                is_silent = position.opened and isinstance(error.__cause__, httpx2.ReadTimeout)
            except ApiError as error:
                if error.status not in UNAVAILABLE:
                    raise
            if position.ended or (is_silent and is_idle(fields)):
                return
            yield Sleep(RECONNECT_SECONDS)


class _Position:
    """The position in a stream of metrics. ``opened``: whether the service has responded on the current connection."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.ended = False
        self.opened = False

    def point_of(self, event: StreamEvent) -> Metric | None:
        """Return the point of an event, or None if it has none."""
        self.last_id = event.id or self.last_id
        self.ended = self.ended or event.kind == END
        self.opened = self.opened or event.kind == OPENED
        return cast(Metric, event.data) if event.kind == "metric" else None


class Client(ClientBase):
    """A client of one service, with one method for each route. The routes of webhooks are methods of ``webhooks``.

    Args:
        url: URL of the service; the scheme may be left out. Default: ``TRAINYARD_URL``, else http://127.0.0.1:8000.
        token: bearer token. Default: ``TRAINYARD_TOKEN``, else none. "" means none and ignores the environment.
        timeout: seconds for one try of a request.
        retries: how a request is retried, if that is safe, see `RetryPolicy`.
        transport: replaces the network in tests.

    Raises:
        InvalidUrl: the URL cannot be that of a service.

    Every method raises `ServiceUnreachable` if there is no response, and `ApiError` if the service rejects the request:
    `NotAuthorised` if the token does not allow it, `NotFound` if there is no such job, `InvalidState` if the state of
    the job does not allow it. All errors have a ``code``. `AsyncClient` has the same methods.
    """

    _connection: Connection

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 10.0,
        retries: RetryPolicy | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, token)
        self._connection = Connection(self.url, self._token, timeout, retries or RetryPolicy(), transport)
        self.webhooks = Webhooks(self._connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open connections."""
        self._connection.close()

    def _job(self, fields: Mapping[str, Any]) -> "Job":
        return Job(self, fields)

    # Jobs

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> "Job":
        """Submit a job. A retry with the same key never creates a second job; by default each call has a new key.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the spec.
        """
        headers = _idempotent(idempotency_key)
        return cast(Job, self._connection.request("POST", "/jobs", body=spec, headers=headers, parse=self._job))

    def propose(self, depth: int, spec: Mapping[str, Any] | None = None) -> Proposal:
        """Return a spec for a model of ``depth`` layers by published rules, to be edited, and the reason of each value.

        ``spec``: the values that are set, which are kept; it may lack the corpus. Nothing is stored.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the spec.
        """
        body = {"depth": depth, "spec": spec or {}}
        return cast(Proposal, self._connection.request("POST", "/jobs/proposal", body=body))

    def plan(self, spec: Mapping[str, Any]) -> Plan:
        """Return the size, memory, disk, time and warnings of a run of ``spec``. Nothing is stored.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the spec.
        """
        return cast(Plan, self._connection.request("POST", "/jobs/plan", body=spec))

    def jobs(
        self,
        *,
        status: str | None = None,
        labels: Collection[str] = (),
        name: str | None = None,
        order: str | None = None,
        limit: int | None = None,
        group: str | None = None,
        discarded: bool = False,
        owner: str | None = None,
    ) -> "Pages[Job]":
        """Iterate over the jobs that match all filters, at most ``limit``. ``labels`` are texts ``key=value``.

        ``order``: "newest" (the default), "oldest", "score" (the best first) or "-score". ``discarded``: list only the
        jobs that were discarded, which are left out otherwise. ``owner``: the name of the token that submitted them, or
        "local".
        """
        params = {
            "status": status,
            "label": list(labels) or None,
            "name": name,
            "order": order,
            "group": group,
            "owner": owner,
        }
        params["discarded"] = "true" if discarded else None
        return self._connection.each(self._connection.list_pages("/jobs", params, limit, self._job))

    def job(self, job_id: str) -> "Job":
        """Return the job with this id.

        Raises:
            NotFound: there is none.
        """
        return cast(Job, self._connection.request("GET", _path(job_id), parse=self._job))

    def find(self, id_or_name: str) -> "Job":
        """Return the job with this id, or with this name.

        Raises:
            NotFound: no job has this id or name.
            AmbiguousName: several jobs have this name; the message lists their ids.
        """
        return cast(Job, self._connection.run(self._find(id_or_name)))

    def update(self, /, job_id: str, **changes: Any) -> "Job":
        """Change fields of a job: ``name``, ``labels``, ``description``, ``group``, ``discarded``, ``priority``, ...

        ``log_interval``, ``save_interval`` and ``keep_last`` reach a live run. ``discarded=True`` hides the job from
        lists, and False shows it again. ``owner`` needs a token of the scope ``admin``.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the changes.
        """
        return cast(Job, self._connection.request("PATCH", _path(job_id), body=changes, parse=self._job))

    def pause(self, job_id: str) -> "Job":
        """Request a checkpoint and a stop. Returns at once; the job can be resumed when it is ``paused``.

        Raises:
            InvalidState: the job has ended, or is ending.
        """
        return cast(Job, self._act(job_id, "pause"))

    def save(self, job_id: str) -> "Job":
        """Request a checkpoint at the next step. Returns at once; the run continues.

        Raises:
            InvalidState: the job is not running.
        """
        return cast(Job, self._act(job_id, "save"))

    def resume(self, /, job_id: str, **changes: Any) -> "Job":
        """Continue from the newest valid checkpoint, or from that of ``step``.

        ``changes`` may raise ``epochs``, ``max_steps`` or ``max_tokens``, and change ``max_minutes``, ``target_loss``,
        ``resources``, ``gradient_checkpointing`` and ``save_dir`` (the checkpoints and weights are moved there).
        ``schedule`` of a longer run: "extend" (as if it had this length from the start) or "continue" (decays from the
        current learning rate).

        Raises:
            InvalidState: the job is live, or has no valid checkpoint; ``problem`` lists the allowed actions.
            InvalidSpec: a change is not allowed.
        """
        return cast(Job, self._act(job_id, "resume", changes or None))

    def fork(
        self,
        job_id: str,
        step: int | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        data: str = "keep",
        idempotency_key: str | None = None,
    ) -> "Job":
        """Create a job that starts from the checkpoint of ``step``, by default the newest.

        ``overrides``: the part of the job spec that differs from the parent's. ``data``: "keep" continues the parent's
        order of samples, "restart" starts the data and the schedule from the beginning. A retry with the same
        ``idempotency_key`` never creates a second job.

        Raises:
            InvalidState: the job has no checkpoint.
            InvalidSpec: ``errors`` lists all problems of the spec.
        """
        body = {"step": step, "overrides": overrides or {}, "data": data}
        path, headers = _path(job_id, "fork"), _idempotent(idempotency_key)
        return cast(Job, self._connection.request("POST", path, body=body, headers=headers, parse=self._job))

    def decay(
        self,
        job_id: str,
        steps: int,
        step: int | None = None,
        *,
        shape: str = "sqrt",
        name: str | None = None,
        idempotency_key: str | None = None,
    ) -> "Job":
        """Fork a decay branch: from the checkpoint of ``step``, by default the newest, the rate falls over ``steps``.

        The branch sees the data that the job would see next. ``shape``: "sqrt", "linear" or "cosine".

        Raises:
            InvalidState: the job has no checkpoint.
        """
        return cast(Job, self._connection.run(self._decay(job_id, steps, step, shape, name, idempotency_key)))

    def cancel(self, job_id: str) -> "Job":
        """Request a checkpoint and end the job. Returns at once.

        Raises:
            InvalidState: the job has ended.
        """
        return cast(Job, self._act(job_id, "cancel"))

    def kill(self, job_id: str) -> "Job":
        """End the job now, without a checkpoint. Returns at once.

        Raises:
            InvalidState: the job has ended.
        """
        return cast(Job, self._act(job_id, "kill"))

    def delete(self, job_id: str) -> None:
        """Delete a job that has ended, with its files.

        Raises:
            InvalidState: the job has not ended.
        """
        return cast(None, self._connection.request("DELETE", _path(job_id)))

    def wait(
        self,
        job_id: str,
        until: Collection[str] | Callable[[Any], bool] | None = None,
        timeout: float | None = None,
        interval: float = 0.5,
        stall_timeout: float | None = None,
    ) -> "Job":
        """Poll until the job has one of the statuses ``until``, or until ``until(job)``; by default until it is idle.

        Idle is succeeded, failed, cancelled, paused, or interrupted without a restart. Waits for the service too if it
        stops responding after the first response. All times are in seconds: ``interval`` between two polls,
        ``stall_timeout`` without progress: without a new step, phase, attempt or status. Unlike ``timeout`` it does not
        depend on the speed of the machine. A job that waits for devices makes no progress.

        Raises:
            WaitTimedOut: ``timeout`` seconds passed, or ``stall_timeout`` seconds without progress.
            UnexpectedStatus: the job became idle in another status.
        """
        flow = self._wait(job_id, until, timeout, interval, stall_timeout)
        return cast(Job, self._connection.run(flow))

    # Corpora

    def build_corpus(self, data: Mapping[str, Any]) -> TokenizedCorpus:
        """Tokenize a corpus without a job. ``data``: the fields of a job spec's ``data``. Returns at once.

        Raises:
            InvalidSpec: ``errors`` lists all problems of the fields.
        """
        return cast(TokenizedCorpus, self._connection.request("POST", "/corpora", body=data))

    def wait_for_corpus(
        self,
        corpus_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        on_progress: Callable[[TokenizedCorpus], None] | None = None,
    ) -> TokenizedCorpus:
        """Poll until the corpus is ``ready``, ``failed`` or ``stopped``, and return it. Waits for the service too.

        ``on_progress`` is called with the corpus after each poll, every ``interval`` seconds.

        Raises:
            WaitTimedOut: ``timeout`` seconds passed.
        """
        return self._connection.run(self._wait_for_corpus(corpus_id, timeout, interval, on_progress))

    def corpora(self, limit: int | None = None) -> Pages[TokenizedCorpus]:
        """Iterate over the corpora, newest first."""
        return cast(Pages[TokenizedCorpus], self._pages("/corpora", {}, limit))

    def corpus(self, corpus_id: str) -> TokenizedCorpus:
        """Return the corpus with this id.

        Raises:
            NotFound: there is none.
        """
        return cast(TokenizedCorpus, self._connection.request("GET", _corpus(corpus_id)))

    def delete_corpus(self, corpus_id: str) -> None:
        """Delete a corpus from the cache; the files that it was made of stay.

        Raises:
            InvalidState: a job uses it.
        """
        return cast(None, self._connection.request("DELETE", _corpus(corpus_id)))

    # Metrics, logs, checkpoints and events of a job

    def metrics(
        self, job_id: str, *, after_step: int = 0, attempt: int | None = None, lineage: bool = False
    ) -> Pages[Metric]:
        """Iterate over the points of the curve after ``after_step``, oldest first; a page has 1,000.

        ``points.to_list()``, ``points.pages()`` or ``points.to_pandas()`` take them otherwise. Losses are in nats per
        token. ``attempt``: only the points of this one, otherwise each step is there once. ``lineage``: for a fork, the
        points of its ancestors come first, and each point has the ``job_id`` that it is of.
        """
        return self._connection.each(self._metric_pages(job_id, after_step, attempt, lineage))

    def follow(self, job_id: str, *, after_step: int = 0, interval: float = 5.0) -> Iterator[Metric]:
        """Yield the points of the curve after ``after_step``, and then each new one, until the job is idle.

        Points come within a second, from a stream. If it breaks it is opened again, also after a restart of the
        service: no point is lost or repeated. If it is silent for ``interval`` seconds, at most 10, the job is read to
        see whether it is idle. If a restarted run goes back to an earlier step, its points follow with a higher
        ``attempt``; those of the earlier attempt after that step are void.

        Raises:
            StreamUnsupported: the service is older than its streams.
        """
        return self._connection.iterate(self._follow(job_id, after_step, interval))

    def curve(self, job_id: str, *, max_points: int = 200, lineage: bool = False) -> list[CurvePoint]:
        """Return the whole curve in at most ``max_points`` points, each of the same number of steps.

        ``lineage``: for a fork, the curves of its ancestors come first.
        """
        params = {"max_points": max_points, "lineage": lineage or None}
        path = _path(job_id, "metrics")
        return cast(
            list[CurvePoint], self._connection.request("GET", path, params=params, parse=lambda page: page["data"])
        )

    def held_out(self, job_id: str) -> dict[str, HeldOutResult]:
        """Return the newest loss and bits per byte of each held-out set, by its name; {} before an evaluation."""
        params = {"max_points": 1, "fields": "eval"}
        path = _path(job_id, "metrics")
        newest = self._connection.request("GET", path, params=params, parse=_newest_evaluation)
        return cast(dict[str, HeldOutResult], newest)

    def metric_stream(
        self, job_id: str, *, after_step: int = 0, last_event_id: str | None = None
    ) -> Iterator[StreamEvent]:
        """Yield ``metric`` events as they come, ``attempt`` if a later one resumes from an earlier step, then ``end``.

        Uses one connection. If it breaks, `ServiceUnreachable` is raised or the iterator ends without ``end``; continue
        with the id of the last event.
        """
        path, params = _path(job_id, "metrics", "stream"), {"after_step": after_step}
        return self._connection.iterate(self._connection.events(path, params, last_event_id))

    def log_stream(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int | str | None = None,
        offset: int | None = None,
        last_event_id: str | None = None,
    ) -> Iterator[StreamEvent]:
        """Yield ``log`` events ``{attempt, offset, data, next_offset}``, then ``end``, over one connection."""
        params = {"attempt": attempt, "rank": rank, "offset": offset}
        path = _path(job_id, "logs", "stream")
        return self._connection.iterate(self._connection.events(path, params, last_event_id))

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """Return the checkpoints, newest first."""
        return cast(list[Checkpoint], self._list(_path(job_id, "checkpoints")))

    def manifest(self, job_id: str, step: int) -> dict[str, Any]:
        """Return the manifest of a checkpoint: ``{"files": {name: {"bytes", "sha256"}}}``."""
        path = _path(job_id, "checkpoints", str(step), "files", "manifest.json")
        return cast(dict[str, Any], self._connection.request("GET", path))

    def download(self, job_id: str, step: int, into: str | os.PathLike[str]) -> list[str]:
        """Download a checkpoint into the folder ``into`` and return the names of its files.

        Continues an earlier download that was interrupted.

        Raises:
            ChecksumMismatch: a file differs from the manifest. It is deleted.
        """
        path = _path(job_id, "checkpoints", str(step), "files")
        return self._connection.run(download_checkpoint(self._connection, path, Path(into)))

    def export(self, job_id: str, step: int, *, format: str = "hf", timeout: float = 900.0) -> Export:  # noqa: A002 - as the API has it
        """Write a checkpoint on the service's host in the format "hf" or "minimind", and return its path and files.

        The same export again returns the same path. ``timeout`` is in seconds: the response comes when it is written.
        """
        path = _path(job_id, "checkpoints", str(step), "export")
        return cast(Export, self._connection.request("POST", path, body={"format": format}, timeout=timeout))

    def download_export(self, export: Export, into: str | os.PathLike[str]) -> list[str]:
        """Download the files of an export, as `export` returns it, into the folder ``into``; return their names.

        Raises:
            ChecksumMismatch: a file does not have the size that the service lists. It is deleted.
        """
        path = _path(export["job_id"], "exports", str(export["step"]), export["format"], "files")
        return self._connection.run(download_export(self._connection, path, export["files"], Path(into)))

    def exports(self, job_id: str) -> list[Export]:
        """Return the exports, newest step first."""
        return cast(list[Export], self._list(_path(job_id, "exports")))

    def evaluations(
        self, job_id: str, *, step: int | None = None, task: str | None = None, newest: bool = False
    ) -> list[TaskScore]:
        """Return the scores on tasks, by step and task. ``newest``: only the newest one on each task."""
        params = {"step": step, "task": task, "newest": newest or None}
        return cast(list[TaskScore], self._list(_path(job_id, "evaluations"), params))

    def evaluate(
        self, job_id: str, step: int | str = "latest", tasks: Collection[Mapping[str, Any]] | None = None
    ) -> Evaluation:
        """Request the evaluation of the checkpoint of ``step`` on ``tasks``, by default those of the job's spec.

        A task is ``{"name", "path", "kind"}``; the service reads ``path``. Returns at once, see `wait_evaluation`.

        Raises:
            InvalidSpec: ``errors`` lists the bad lines of the files too.
        """
        path = _path(job_id, "checkpoints", str(step), "evaluate")
        body = None if tasks is None else {"tasks": [dict(task) for task in tasks]}
        return cast(Evaluation, self._connection.request("POST", path, body=body))

    def evaluation(self, job_id: str, evaluation_id: str) -> Evaluation:
        """Return an evaluation that was requested, with its state and scores."""
        return cast(Evaluation, self._connection.request("GET", _path(job_id, "evaluations", evaluation_id)))

    def wait_evaluation(
        self, evaluation: Evaluation, timeout: float | None = None, interval: float = 0.5
    ) -> Evaluation:
        """Poll until the evaluation is done or failed, and return it. ``timeout`` and ``interval`` are in seconds.

        Raises:
            WaitTimedOut: ``timeout`` seconds passed; ``last`` is the evaluation.
        """
        return self._connection.run(self._wait_evaluation(evaluation, timeout, interval))

    def generate(
        self,
        /,
        job_id: str,
        prompt: str | None = None,
        *,
        step: int | str = "latest",
        messages: Sequence[Mapping[str, str]] | None = None,
        timeout: float = GENERATION_SECONDS,
        **options: Any,
    ) -> GeneratedText:
        """Continue a prompt, or the conversation ``messages``, with a checkpoint.

        ``options``: ``max_new_tokens`` (128), ``temperature`` (0.85; 0: the most likely), ``top_p`` (0.95),
        ``top_k`` (0: all), ``seed``, ``stop`` (texts that end it). ``timeout`` is in seconds: the first request waits
        until the checkpoint is loaded.
        """
        body = _generation(prompt, messages, options)
        path = _path(job_id, "checkpoints", str(step), "generate")
        return cast(GeneratedText, self._connection.request("POST", path, body=body, timeout=timeout))

    def generate_stream(
        self,
        /,
        job_id: str,
        prompt: str | None = None,
        *,
        step: int | str = "latest",
        messages: Sequence[Mapping[str, str]] | None = None,
        timeout: float = GENERATION_SECONDS,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """Do the same as `generate`, but yield the events ``start``, ``text`` for each part, and ``end``.

        Closing the iterator ends the generation.

        Raises:
            ApiError: also if it fails after its beginning.
        """
        body = {**_generation(prompt, messages, options), "stream": True}
        path = _path(job_id, "checkpoints", str(step), "generate")
        return self._connection.iterate(
            self._connection.events(path, body=body, timeout=timeout, accept=_generated_event)
        )

    def delete_checkpoint(self, job_id: str, step: int) -> None:
        """Delete a full checkpoint with its files.

        Raises:
            InvalidState: it is the last valid one, or in use.
        """
        return cast(None, self._connection.request("DELETE", _path(job_id, "checkpoints", str(step))))

    def events(self, job_id: str) -> Pages[dict[str, Any]]:
        """Iterate over the job's events: transitions, warnings, saves, restarts, and who requested them."""
        return cast(Pages[dict[str, Any]], self._pages(_path(job_id, "events")))

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        """Return the attempts: why each was launched, from which step, and how it ended."""
        return cast(list[dict[str, Any]], self._list(_path(job_id, "attempts")))

    def samples(self, job_id: str) -> list[dict[str, Any]]:
        """Return the texts that the model generated, by step."""
        return cast(list[dict[str, Any]], self._list(_path(job_id, "samples")))

    def logs(
        self,
        job_id: str,
        *,
        attempt: int | None = None,
        rank: int | str | None = None,
        tail: int | None = None,
        offset: int | None = None,
    ) -> LogChunk:
        """Return a part of a log: the last ``tail`` lines, or the text from byte ``offset``."""
        params = {"attempt": attempt, "rank": rank, "tail": tail, "offset": offset}
        return cast(LogChunk, self._connection.request("GET", _path(job_id, "logs"), params=params))

    # The service

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices, each with its model, memory and the job that leases it."""
        return cast(list[dict[str, Any]], self._list("/devices"))

    def clear_device(self, device_id: str) -> dict[str, Any]:
        """Clear the XID errors of a GPU that was checked or repaired, so that it may be leased again; return it."""
        return cast(dict[str, Any], self._connection.request("POST", f"/devices/{quote(device_id, safe='')}/clear"))

    def health(self) -> dict[str, Any]:
        """Return whether the service's process responds."""
        return cast(dict[str, Any], self._connection.request("GET", "/health"))

    def ready(self) -> dict[str, Any]:
        """Return the state of the service's components.

        Raises:
            ApiError: it cannot run jobs; ``problem`` has the components.
        """
        return cast(dict[str, Any], self._connection.request("GET", "/ready"))

    def version(self) -> Version:
        """Return the version of the service."""
        return cast(Version, self._connection.request("GET", "/version"))

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
        """Create a token with scope read, submit or admin; ``token`` in the result is its secret.

        ``expires_in``: lifetime in seconds. ``max_jobs``, ``max_devices``: quotas of its live jobs.
        """
        quotas = {"max_jobs": max_jobs, "max_devices": max_devices}
        body = {"name": name, "scope": scope, "expires_in": expires_in, **quotas}
        return cast(NewToken, self._connection.request("POST", "/tokens", body=body))

    def tokens(self) -> list[Token]:
        """Return all named tokens, oldest first, without their secrets."""
        return cast(list[Token], self._list("/tokens"))

    def limit_token(self, name: str, *, max_jobs: int | None = None, max_devices: int | None = None) -> Token:
        """Set the quotas of a token; None means no limit."""
        body = {"max_jobs": max_jobs, "max_devices": max_devices}
        return cast(Token, self._connection.request("PATCH", _token(name), body=body))

    def rotate_token(self, name: str, *, overlap: int = 0, expires_in: int | None = None) -> NewToken:
        """Replace the secret of a token; the old one stays valid for ``overlap`` seconds."""
        body = {"overlap": overlap, "expires_in": expires_in}
        return cast(NewToken, self._connection.request("POST", f"{_token(name)}/rotate", body=body))

    def revoke_token(self, name: str) -> None:
        """Make a token invalid for good."""
        return cast(None, self._connection.request("DELETE", _token(name)))


class Job(JobFields):
    """A pretraining run: its fields as the service last reported them, and its actions.

    The methods are those of `Client` without the job's id, and `refresh`, which reads the fields again. One that
    returns the job updates this object and returns it: after ``job.wait()``, ``job.status`` is the status at the end.
    `fork` and `decay` return the new job.
    """

    def __init__(self, client: Client, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._client = client

    def update(self, **changes: Any) -> "Job":  # type: ignore[override]  # not the `update` of a dict
        """Change fields of the job, as `Client.update`."""
        return cast(Job, self._adopt(self._client.update(self["id"], **changes)))

    refresh = of_job(Client.job)
    wait = of_job(Client.wait)
    pause = of_job(Client.pause)
    resume = of_job(Client.resume)  # type: ignore[arg-type]
    save = of_job(Client.save)
    fork = of_job(Client.fork)
    decay = of_job(Client.decay)
    cancel = of_job(Client.cancel)
    kill = of_job(Client.kill)
    delete = of_job(Client.delete)

    metrics = of_job(Client.metrics)
    follow = of_job(Client.follow)
    curve = of_job(Client.curve)
    held_out = of_job(Client.held_out)
    metric_stream = of_job(Client.metric_stream)
    logs = of_job(Client.logs)
    log_stream = of_job(Client.log_stream)
    events = of_job(Client.events)
    attempts = of_job(Client.attempts)
    samples = of_job(Client.samples)

    checkpoints = of_job(Client.checkpoints)
    manifest = of_job(Client.manifest)
    download = of_job(Client.download)
    delete_checkpoint = of_job(Client.delete_checkpoint)
    export = of_job(Client.export)
    exports = of_job(Client.exports)

    generate = of_job(Client.generate)  # type: ignore[arg-type]
    generate_stream = of_job(Client.generate_stream)  # type: ignore[arg-type]
    evaluate = of_job(Client.evaluate)
    evaluation = of_job(Client.evaluation)
    evaluations = of_job(Client.evaluations)

    def _adopt(self, result: Any) -> Any:
        if isinstance(result, Job) and result["id"] == self["id"]:
            self._replace(result)
            return self
        return result

    def _repr_html_(self) -> str:
        """Return a card with the sentence and the loss curve of the job, for notebooks."""
        try:
            points = self._client.curve(self["id"], max_points=200)
        except TrainyardError:
            points = []
        return job_html(self, points)


def _path(job_id: str, *below: str) -> str:
    return "/".join(["/jobs", quote(job_id, safe=""), *below])


def _corpus(corpus_id: str) -> str:
    return f"/corpora/{quote(corpus_id, safe='')}"


def _idempotent(key: str | None) -> dict[str, str]:
    given = key or str(uuid.uuid4())
    if not (given.isascii() and given.isprintable()):
        # A header cannot contain this key. The error is the one with which the service rejects such a key.
        error = {"pointer": "/header/Idempotency-Key", "message": "must be 1 to 255 printable ASCII characters"}
        raise InvalidSpec(422, {"code": "invalid_request", "detail": "The request was not sent.", "errors": [error]})
    return {"Idempotency-Key": given}


def _generated_event(event: StreamEvent) -> StreamEvent | None:
    if event.kind == "error":
        raise api_error(int(event.data["status"]), event.data)
    return event if event.kind != OPENED else None


def _newest_evaluation(page: Mapping[str, Any]) -> Any:
    return page["data"][-1].get("eval") or {} if page["data"] else {}


def _generation(
    prompt: str | None, messages: Sequence[Mapping[str, str]] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    given = {"prompt": prompt, "messages": messages, **options}
    return {name: value for name, value in given.items() if value is not None}


def _token(name: str) -> str:
    return f"/tokens/{quote(name, safe='')}"


def _reached(job: Job, until: Collection[str] | Callable[[Any], bool] | None) -> bool:
    if until is None:
        return is_idle(job)
    return until(job) if callable(until) else job["status"] in until


def _progress_of(job: Job) -> tuple[object, ...]:
    """Return what changes whenever the job makes progress."""
    step = (job.get("progress") or {}).get("step")
    prepared = (job.get("preparation") or {}).get("done_bytes")
    return job["status"], job.get("attempt"), job.get("phase"), job.get("phase_detail"), step, prepared
