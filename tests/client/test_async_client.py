"""Both clients, method by method: the same names and signatures, the same requests, results and errors."""

import asyncio
import hashlib
import inspect
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.client.fake_service import QUICK, URL, FakeService, job, lost, metric, problem, refused
from tests.client.test_local_peer import TOKEN, Stranger
from tests.client.test_local_peer import stranger as stranger
from trainyard.client.api import Client, Job
from trainyard.client.async_client import AsyncClient, AsyncJob, AsyncWebhooks
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import ApiError, ChecksumMismatch, InvalidSpec, NotFound, ServiceUnreachable, WaitTimedOut
from trainyard.client.webhooks import Webhooks

JOB = "job_7f3kq9"
SPEC = {"data": {"data_path": "/data/a.jsonl"}}
MODEL = bytes(range(256)) * 30
EVALUATION = {"object": "evaluation", "id": "eval_a", "job_id": JOB, "step": 12000, "state": "done", "results": []}
CORPUS = {"object": "corpus", "id": "corpus_a", "status": "ready"}
EXPORT = {
    "object": "export",
    "job_id": JOB,
    "step": 1,
    "format": "hf",
    "files": [{"name": "config.json", "bytes": 300}],
}
STREAM = (
    'id: 1-1\nevent: metric\ndata: {"step": 1, "loss": 3.0}\n\n'
    ': still here\n\nevent: end\ndata: {"status": "succeeded"}\n\n'
)


@dataclass(frozen=True)
class Given:
    """A call of a method. ``answer``: what the service returns to each of its requests, if not as the fake does."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    answer: object = None


def given(*args: Any, answer: object = None, **kwargs: Any) -> Given:
    return Given(args, kwargs, answer)


CALLS = {
    "submit": given(SPEC, idempotency_key="mine"),
    "propose": given(12, SPEC),
    "plan": given(SPEC),
    "jobs": given(status="running", labels=["a=1"], limit=150, discarded=True),
    "job": given(JOB),
    "find": given("pre-12"),
    "update": given(JOB, priority=3),
    "pause": given(JOB),
    "save": given(JOB),
    "resume": given(JOB, max_steps=10),
    "fork": given(JOB, 400, {"training": {"max_steps": 3}}, idempotency_key="mine"),
    "decay": given(JOB, 100, 400, name="branch"),
    "cancel": given(JOB),
    "kill": given(JOB),
    "delete": given(JOB),
    "wait": given(JOB, {"running"}, timeout=5.0),
    "build_corpus": given({"data_path": "/d"}, answer=CORPUS),
    "wait_for_corpus": given("corpus_a", answer=CORPUS),
    "corpora": given(limit=3),
    "corpus": given("corpus_a", answer=CORPUS),
    "delete_corpus": given("corpus/a"),
    "metrics": given(JOB, after_step=1, attempt=1),
    "follow": given(JOB, answer=STREAM),
    "curve": given(JOB, max_points=10),
    "held_out": given(JOB),
    "metric_stream": given(JOB, last_event_id="1-0", answer=STREAM),
    "log_stream": given(JOB, rank=1, answer=STREAM),
    "checkpoints": given(JOB),
    "manifest": given(JOB, 12000),
    "export": given(JOB, 12000, format="minimind"),
    "download": given(JOB, 12000, "to"),
    "download_export": given(EXPORT, "to"),
    "exports": given(JOB),
    "evaluations": given(JOB, task="arc", newest=True),
    "evaluate": given(JOB, 12000, [{"name": "arc", "path": "/a", "kind": "choice"}], answer=EVALUATION),
    "evaluation": given(JOB, "eval_a", answer=EVALUATION),
    "wait_evaluation": given({**EVALUATION, "state": "running"}, interval=0.001, answer=EVALUATION),
    "generate": given(JOB, "Once", step=12000, seed=1, answer={"object": "generation", "text": " upon"}),
    "generate_stream": given(JOB, messages=[{"role": "user", "content": "a"}], answer=STREAM),
    "delete_checkpoint": given(JOB, 12000),
    "events": given(JOB),
    "attempts": given(JOB),
    "samples": given(JOB),
    "logs": given(JOB, tail=3, rank="agent"),
    "devices": given(),
    "clear_device": given("GPU/1"),
    "health": given(),
    "ready": given(),
    "version": given(),
    "create_token": given("ci", "submit", expires_in=60, max_jobs=2),
    "tokens": given(),
    "limit_token": given("ci", max_devices=1),
    "rotate_token": given("ci", overlap=5),
    "revoke_token": given("ci"),
}
WEBHOOK_CALLS = {
    "create": given("https://a.example", events=["job.failed"]),
    "list": given(),
    "get": given("hook_a"),
    "change": given("hook_a", enabled=True),
    "delete": given("hook_a"),
    "rotate": given("hook_a"),
    "test": given("hook_a"),
    "deliveries": given("hook_a", state="failed", limit=3),
    "delivery": given("hook_a", "d_1"),
    "redeliver": given("hook_a", "d_1"),
}


@pytest.fixture
def filled(service: FakeService) -> FakeService:
    """A service with a curve of two pages, lists, and a checkpoint with its files."""
    files = {"model.safetensors": MODEL, "state.json": b"{}\n"}
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    service.files = {12000: {**files, "manifest.json": json.dumps({"files": listed}).encode()}}
    service.curve = [metric(step) for step in range(1, 6)]
    service.page = 3
    for name in ("checkpoints", "exports", "evaluations", "events", "attempts", "samples", "devices", "tokens"):
        service.rows[name] = [{"id": f"{name}_1", "step": 400, "kind": "full"}]
    return service


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(kind, callable) if not name.startswith("_")}


def shape(value: Any) -> Any:
    """What a call gave: a list if it was an iterator."""
    return list(value) if isinstance(value, Iterator) else value


async def awaited_shape(value: Any) -> Any:
    if isinstance(value, AsyncIterator):
        return [each async for each in value]
    return await value


def answer_all(service: FakeService, call: Given) -> None:
    if call.answer is None:
        service.faults = []
        return

    def answer(request: httpx2.Request) -> httpx2.Response | None:
        if isinstance(call.answer, str):
            if "text/event-stream" not in request.headers.get("accept", ""):
                return None
            return httpx2.Response(200, text=call.answer, headers={"Content-Type": "text/event-stream"})
        return httpx2.Response(200, json=call.answer)

    service.faults = [answer] * 20


def sent(service: FakeService) -> list[tuple[Any, ...]]:
    """Method, URL, body and headers of each request; a key that was made up is left out."""
    names = ("authorization", "idempotency-key", "range", "if-range", "last-event-id", "accept")
    requests, service.requests = service.requests, []
    return [
        (
            each.method,
            str(each.url),
            each.content,
            {name: each.headers.get(name) for name in names if each.headers.get(name) and len(each.headers[name]) < 36},
        )
        for each in requests
    ]


def both(
    service: FakeService, call: Given, of_client: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """Call a method of each client; return what the blocking one gave and sent, and what the other one did."""
    state = json.loads(json.dumps(service.jobs)), dict(service.files)

    def begin(folder: str) -> None:
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        service.jobs, service.files = json.loads(json.dumps(state[0])), dict(state[1])
        service.submitted.clear()
        answer_all(service, call)

    begin("blocking")
    with Client(URL, "secret", retries=QUICK, transport=service.transport) as client:
        first = shape(of_client(client)(*call.args, **call.kwargs)), sent(service)
    begin("async")

    async def run() -> Any:
        async with AsyncClient(URL, "secret", retries=QUICK, transport=service.transport) as client:
            return await awaited_shape(of_client(client)(*call.args, **call.kwargs))

    return first, (asyncio.run(run()), sent(service))


def test_every_method_is_called_here() -> None:
    assert set(CALLS) == set(public(Client)) - {"close"}
    assert set(WEBHOOK_CALLS) == set(public(Webhooks))


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_send_and_return_the_same(
    filled: FakeService, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocking, other = both(filled, CALLS[name], lambda client: getattr(client, name), tmp_path, monkeypatch)
    assert blocking == other
    assert blocking[1], "nothing was sent"


@pytest.mark.parametrize("name", WEBHOOK_CALLS)
def test_both_send_the_same_for_webhooks(
    filled: FakeService, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = WEBHOOK_CALLS[name]
    blocking, other = both(filled, call, lambda client: getattr(client.webhooks, name), tmp_path, monkeypatch)
    assert blocking == other
    assert blocking[1], "nothing was sent"


@pytest.mark.parametrize(("blocking", "other"), [(Client, AsyncClient), (Job, AsyncJob), (Webhooks, AsyncWebhooks)])
def test_names_and_arguments_are_the_same(blocking: type, other: type) -> None:
    assert public(blocking).keys() == public(other).keys()
    for name, method in public(blocking).items():
        if name not in vars(dict) or name == "update":
            mine, its = inspect.signature(method), inspect.signature(public(other)[name])
            assert mine.parameters == its.parameters, name
            assert inspect.getdoc(public(other)[name]), name


def asynchronous(service: FakeService, use: Callable[[AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        async with AsyncClient(URL, retries=QUICK, transport=service.transport) as client:
            return await use(client)

    return asyncio.run(run())


def test_errors_and_retries_are_the_same(service: FakeService) -> None:
    service.faults = [refused, lost, lambda _: problem(503, "database_unavailable", "away")]
    assert asynchronous(service, lambda client: client.job(JOB))["name"] == "pre-12"
    service.faults = [lost]
    with pytest.raises(ServiceUnreachable, match="whether POST /jobs/job_7f3kq9/pause was done is not known"):
        asynchronous(service, lambda client: client.pause(JOB))
    errors = [{"pointer": "/training/learning_rate", "message": "must be greater than 0"}]
    service.faults = [lambda _: problem(422, "spec_invalid", "It is invalid.", errors=errors)]
    with pytest.raises(InvalidSpec, match="/training/learning_rate: must be greater than 0") as caught:
        asynchronous(service, lambda client: client.submit(SPEC))
    assert caught.value.code == "spec_invalid"
    with pytest.raises(NotFound):
        asynchronous(service, lambda client: client.find("nobody"))
    with pytest.raises(InvalidSpec, match="finite"):
        asynchronous(service, lambda client: client.plan({"a": float("nan")}))


def test_an_error_of_a_stream_is_raised(service: FakeService) -> None:
    async def read(client: AsyncClient) -> list[Any]:
        return [event async for event in client.generate_stream(JOB, "a")]

    failing = 'event: error\ndata: {"status": 503, "code": "busy", "detail": "No room."}\n\n'
    service.faults = [lambda _: httpx2.Response(200, text=failing, headers={"Content-Type": "text/event-stream"})]
    with pytest.raises(ApiError, match=r"No room. \[busy\]"):
        asynchronous(service, read)
    service.faults = [lambda _: problem(409, "invalid_state", "Not now.")]
    with pytest.raises(ApiError, match="Not now"):
        asynchronous(service, read)


def test_waiting_ends_in_time(service: FakeService) -> None:
    with pytest.raises(WaitTimedOut, match="the job is running") as caught:
        asynchronous(service, lambda client: client.wait(JOB, timeout=0.02, interval=0.005))
    assert caught.value.job is not None
    assert caught.value.code == "wait_timed_out"


def test_several_requests_at_once(service: FakeService) -> None:
    service.jobs |= {f"job_{number}": job(id=f"job_{number}") for number in range(20)}

    async def read(client: AsyncClient) -> list[str]:
        jobs = await asyncio.gather(*(client.job(f"job_{number}") for number in range(20)))
        return [each.id for each in jobs]

    assert asynchronous(service, read) == [f"job_{number}" for number in range(20)]


def test_a_download_hashes_in_a_thread_and_keeps_nothing_damaged(filled: FakeService, tmp_path: Path) -> None:
    threads = []

    def digest(path: Path) -> str:
        threads.append(threading.current_thread() is threading.main_thread())
        return hashlib.sha256(path.read_bytes()).hexdigest()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainyard.client.download.sha256", digest)
        names = asynchronous(filled, lambda client: client.download(JOB, 12000, tmp_path / "new"))
    assert names == ["model.safetensors", "state.json", "manifest.json"]
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == MODEL
    assert threads == [False, False]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors.part").write_bytes(b"x" * 1000)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors"):
        asynchronous(filled, lambda client: client.download(JOB, 12000, tmp_path / "bad"))
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_job_is_updated_by_its_own_methods(service: FakeService) -> None:
    async def use(client: AsyncClient) -> None:
        run = await client.job(JOB)
        service.jobs[JOB] = job("succeeded")
        assert await run.wait() is run
        assert run.status == "succeeded"
        child = await run.fork(400)
        assert isinstance(child, AsyncJob)
        assert child.id == "job_fork"
        assert run.id == JOB
        service.curve = [metric(step) for step in range(1, 4)]
        assert [point["step"] for point in await run.metrics().to_list()] == [1, 2, 3]
        assert isinstance(await anext(client.jobs()), AsyncJob)

    asynchronous(service, use)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_stranger_gets_no_token_of_an_asynchronous_client(stranger: Stranger, address: str) -> None:
    url, process = stranger(address)

    async def run() -> None:
        async with AsyncClient(url, TOKEN, retries=RetryPolicy(seconds=0)) as client:
            calls: list[Callable[[], Awaitable[object]]] = [
                lambda: client.job("job_a"),
                lambda: anext(client.metric_stream("job_a")),
            ]
            for call in calls:
                with pytest.raises(ServiceUnreachable, match="so the token was not sent"):
                    await call()

    asyncio.run(run())
    process.kill()
    assert TOKEN not in process.communicate()[0]
