"""The client for asyncio: the methods of `trainyard.client.api`, to be awaited.

async with AsyncClient() as client:
    job = await client.submit({"data": {"data_path": "/data/corpus.jsonl"}})
    await job.wait()
    print(job.status, job.checkpoint["path"])
"""

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import wraps
from inspect import formatannotation, iscoroutine, signature
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast, overload

import httpx2

from trainyard.client.api import Client, ClientBase, Job
from trainyard.client.async_connection import AsyncConnection
from trainyard.client.connection import RetryPolicy
from trainyard.client.job import JobFields, job_html, of_job
from trainyard.client.pages import AsyncPages, Pages
from trainyard.client.types import CurvePoint
from trainyard.client.webhooks import WebhookRequests, Webhooks

P = ParamSpec("P")
T = TypeVar("T")


AsyncMethod = Callable[Concatenate[Any, P], T]


@overload
def awaited(method: Callable[Concatenate[Any, P], Job]) -> AsyncMethod[P, Coroutine[Any, Any, "AsyncJob"]]: ...
@overload
def awaited(method: Callable[Concatenate[Any, P], T]) -> AsyncMethod[P, Coroutine[Any, Any, T]]: ...
def awaited(method: Any) -> Any:
    """Return a method of `Client` for `AsyncClient`, whose connection makes its result one to be awaited."""

    @wraps(method)
    def async_method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    shown = signature(method)
    awaited_type = _awaited_type(shown.return_annotation)
    async_method.__signature__ = shown.replace(return_annotation=awaited_type)  # type: ignore[attr-defined]
    return async_method


@overload
def paged(method: Callable[Concatenate[Any, P], Pages[Job]]) -> AsyncMethod[P, AsyncPages["AsyncJob"]]: ...
@overload
def paged(method: Callable[Concatenate[Any, P], Pages[T]]) -> AsyncMethod[P, AsyncPages[T]]: ...
def paged(method: Any) -> Any:
    """Do the same as `awaited` for a method that returns pages."""
    return awaited(method)


def streamed(method: Callable[Concatenate[Any, P], Iterator[T]]) -> AsyncMethod[P, AsyncIterator[T]]:
    """Do the same as `awaited` for a method that returns an iterator."""
    return cast(AsyncMethod[P, AsyncIterator[T]], awaited(method))


def _awaited_type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else formatannotation(annotation)
    text = re.sub(r"\bJob\b", "AsyncJob", re.sub(r"[\w.]+\.(?=\w)", "", text))
    if text.startswith(("Pages[", "Iterator[")):
        return f"Async{text}"
    return f"Coroutine[Any, Any, {text}]"


class AsyncWebhooks(WebhookRequests):
    """The methods of `Webhooks`, to be awaited; `list` and `deliveries` are iterated with ``async for``."""

    create = awaited(Webhooks.create)
    list = paged(Webhooks.list)
    get = awaited(Webhooks.get)
    change = awaited(Webhooks.change)
    delete = awaited(Webhooks.delete)
    rotate = awaited(Webhooks.rotate)
    test = awaited(Webhooks.test)
    deliveries = paged(Webhooks.deliveries)
    delivery = awaited(Webhooks.delivery)
    redeliver = awaited(Webhooks.redeliver)


class AsyncClient(ClientBase):
    """The client for asyncio, with the arguments and methods of `Client`.

    A method that returns a result is awaited, one that returns an iterator is iterated with ``async for``. Jobs are
    `AsyncJob` objects. The errors are the same. Use it in one event loop.
    """

    _connection: AsyncConnection

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        timeout: float = 10.0,
        retries: RetryPolicy | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, token)
        self._connection = AsyncConnection(self.url, self._token, timeout, retries or RetryPolicy(), transport)
        self.webhooks = AsyncWebhooks(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the open connections."""
        await self._connection.close()

    def _job(self, fields: Mapping[str, Any]) -> "AsyncJob":
        return AsyncJob(self, fields)

    # Jobs

    submit = awaited(Client.submit)
    propose = awaited(Client.propose)
    plan = awaited(Client.plan)
    jobs = paged(Client.jobs)
    job = awaited(Client.job)
    find = awaited(Client.find)
    update = awaited(Client.update)
    pause = awaited(Client.pause)
    save = awaited(Client.save)
    resume = awaited(Client.resume)
    fork = awaited(Client.fork)
    decay = awaited(Client.decay)
    cancel = awaited(Client.cancel)
    kill = awaited(Client.kill)
    delete = awaited(Client.delete)
    wait = awaited(Client.wait)

    # Corpora

    build_corpus = awaited(Client.build_corpus)
    wait_for_corpus = awaited(Client.wait_for_corpus)
    corpora = paged(Client.corpora)
    corpus = awaited(Client.corpus)
    delete_corpus = awaited(Client.delete_corpus)

    # Metrics, logs, checkpoints and events of a job

    metrics = paged(Client.metrics)
    follow = streamed(Client.follow)
    curve = awaited(Client.curve)
    held_out = awaited(Client.held_out)
    metric_stream = streamed(Client.metric_stream)
    log_stream = streamed(Client.log_stream)
    checkpoints = awaited(Client.checkpoints)
    manifest = awaited(Client.manifest)
    download = awaited(Client.download)
    export = awaited(Client.export)
    download_export = awaited(Client.download_export)
    exports = awaited(Client.exports)
    evaluations = awaited(Client.evaluations)
    evaluate = awaited(Client.evaluate)
    evaluation = awaited(Client.evaluation)
    wait_evaluation = awaited(Client.wait_evaluation)
    generate = awaited(Client.generate)
    generate_stream = streamed(Client.generate_stream)
    delete_checkpoint = awaited(Client.delete_checkpoint)
    events = paged(Client.events)
    attempts = awaited(Client.attempts)
    samples = awaited(Client.samples)
    logs = awaited(Client.logs)

    # The service

    devices = awaited(Client.devices)
    clear_device = awaited(Client.clear_device)
    health = awaited(Client.health)
    ready = awaited(Client.ready)
    version = awaited(Client.version)

    # Named tokens, for admins

    create_token = awaited(Client.create_token)
    tokens = awaited(Client.tokens)
    limit_token = awaited(Client.limit_token)
    rotate_token = awaited(Client.rotate_token)
    revoke_token = awaited(Client.revoke_token)


class AsyncJob(JobFields):
    """A pretraining run, with the methods of `Job`, to be awaited or iterated with ``async for``."""

    def __init__(self, client: AsyncClient, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._client = client
        self._points: Sequence[CurvePoint] = ()

    async def update(self, **changes: Any) -> "AsyncJob":  # type: ignore[override]  # not the `update` of a dict
        """Change fields of the job, as `Client.update`."""
        return cast(AsyncJob, await self._adopt(self._client.update(self["id"], **changes)))

    refresh = of_job(AsyncClient.job)
    wait = of_job(AsyncClient.wait)
    pause = of_job(AsyncClient.pause)
    resume = of_job(AsyncClient.resume)  # type: ignore[arg-type]
    save = of_job(AsyncClient.save)
    fork = of_job(AsyncClient.fork)
    decay = of_job(AsyncClient.decay)
    cancel = of_job(AsyncClient.cancel)
    kill = of_job(AsyncClient.kill)
    delete = of_job(AsyncClient.delete)

    metrics = of_job(AsyncClient.metrics)
    follow = of_job(AsyncClient.follow)
    held_out = of_job(AsyncClient.held_out)
    metric_stream = of_job(AsyncClient.metric_stream)
    logs = of_job(AsyncClient.logs)
    log_stream = of_job(AsyncClient.log_stream)
    events = of_job(AsyncClient.events)
    attempts = of_job(AsyncClient.attempts)
    samples = of_job(AsyncClient.samples)

    checkpoints = of_job(AsyncClient.checkpoints)
    manifest = of_job(AsyncClient.manifest)
    download = of_job(AsyncClient.download)
    delete_checkpoint = of_job(AsyncClient.delete_checkpoint)
    export = of_job(AsyncClient.export)
    exports = of_job(AsyncClient.exports)

    generate = of_job(AsyncClient.generate)  # type: ignore[arg-type]
    generate_stream = of_job(AsyncClient.generate_stream)  # type: ignore[arg-type]
    evaluate = of_job(AsyncClient.evaluate)
    evaluation = of_job(AsyncClient.evaluation)
    evaluations = of_job(AsyncClient.evaluations)

    async def curve(self, *, max_points: int = 200, lineage: bool = False) -> "list[CurvePoint]":
        """Return the whole curve in at most ``max_points`` points, as `Client.curve`. A notebook shows it."""
        self._points = await self._client.curve(self["id"], max_points=max_points, lineage=lineage)
        return list(self._points)

    def _adopt(self, result: Any) -> Any:
        return self._adopt_later(result) if iscoroutine(result) else result

    async def _adopt_later(self, pending: Coroutine[Any, Any, Any]) -> Any:
        result = await pending
        if isinstance(result, AsyncJob) and result["id"] == self["id"]:
            self._replace(result)
            return self
        return result

    def _repr_html_(self) -> str:
        """Return a card with the sentence of the job and the curve that `curve` returned last, for notebooks."""
        return job_html(self, self._points)
