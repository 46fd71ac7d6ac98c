"""Job objects: fields, actions, waiting, following, and how they show themselves in a notebook."""

import asyncio
import copy
import json
import pickle
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.client.fake_service import QUICK, URL, FakeService, job, metric, problem, refused
from trainyard.client.api import Client, Job
from trainyard.client.async_client import AsyncClient
from trainyard.client.errors import ApiError, InvalidState, NotFound, UnexpectedStatus, WaitTimedOut
from trainyard.client.job import curve_svg, job_html
from trainyard.client.pages import AsyncPages, Pages
from trainyard.service.streams.sse import KEEPALIVE_SECONDS

JOB = "job_7f3kq9"


@pytest.fixture
def run(trainyard: Client) -> Job:
    return trainyard.job(JOB)


def test_a_job_is_a_dict_with_attributes(run: Job) -> None:
    assert run.status == run["status"] == "running"
    assert run.progress is not None
    assert run.progress["step"] == 12400
    assert json.loads(json.dumps(run)) == run == job()
    assert repr(run) == "<Job job_7f3kq9 'pre-12' running: Step 12,400 of 40,000.>"
    assert {"status", "wait", "learning_rate"} & set(dir(run)) == {"status", "wait"}
    with pytest.raises(AttributeError, match="the job has no field 'loss'"):
        _ = run.loss  # type: ignore[attr-defined]


def test_a_copy_is_a_plain_dict(run: Job) -> None:
    for made in (copy.copy(run), copy.deepcopy(run), pickle.loads(pickle.dumps(run)), run.copy(), run | {}):
        assert type(made) is dict
        assert made == run


def test_an_action_updates_the_job(service: FakeService, run: Job) -> None:
    service.jobs[JOB] = job("pausing")
    assert run.pause() is run
    assert run.status == "pausing"
    service.jobs[JOB] = job("paused", progress=None)
    assert run.wait({"paused"}) is run
    assert (run.status, run.progress) == ("paused", None)
    service.jobs[JOB] = job("queued", learning_rate_before=1e-3)
    assert run.resume(max_steps=10).learning_rate_before == 1e-3
    service.jobs[JOB] = job("running", name="better")
    assert run.update(name="better").name == "better"
    assert "learning_rate_before" not in run, "fields that the service no longer reports are gone"
    service.jobs[JOB] = job("succeeded")
    assert run.refresh().status == "succeeded"
    run.delete()
    with pytest.raises(NotFound):
        run.refresh()


def test_a_fork_is_another_job(run: Job) -> None:
    child = run.fork(400, data="restart")
    assert isinstance(child, Job)
    assert (child.id, run.id) == ("job_fork", JOB)
    assert child.parent is not None
    assert child.parent["step"] == 400


def test_the_jobs_of_a_list_and_of_errors_are_objects(service: FakeService, trainyard: Client) -> None:
    assert [type(each) for each in trainyard.jobs()] == [Job]
    service.jobs[JOB] = job("failed", message="out of memory", reason="out_of_memory")
    with pytest.raises(UnexpectedStatus) as caught:
        trainyard.job(JOB).wait({"succeeded"})
    assert isinstance(caught.value.job, Job)
    assert trainyard.wait(JOB, lambda each: isinstance(each, Job)).status == "failed"


def test_an_evaluation_that_takes_too_long_is_a_timeout_of_the_client(service: FakeService, trainyard: Client) -> None:
    evaluation: Any = {"object": "evaluation", "id": "eval_a", "job_id": JOB, "state": "running"}
    service.faults = [lambda _: httpx2.Response(200, json=evaluation)] * 100
    with pytest.raises(WaitTimedOut, match=r"0\.02 s passed and the evaluation is running") as caught:
        trainyard.wait_evaluation(evaluation, timeout=0.02, interval=0.005)
    assert caught.value.last == evaluation
    service.faults = [lambda _: httpx2.Response(200, json={"object": "corpus", "id": "c", "status": "queued"})] * 100
    with pytest.raises(WaitTimedOut, match="and the corpus is queued"):
        trainyard.wait_for_corpus("c", timeout=0.02, interval=0.005)


# Pages


def test_metrics_are_points_pages_or_a_list(service: FakeService, run: Job) -> None:
    service.curve = [metric(step) for step in range(1, 8)]
    service.page = 3
    service.requests.clear()
    assert [[point["step"] for point in page] for page in run.metrics().pages()] == [[1, 2, 3], [4, 5, 6], [7]]
    assert len(service.requests) == 3
    points = run.metrics()
    assert next(points)["step"] == 1
    assert len(service.requests) == 4, "a page is requested when its first row is needed"
    assert [len(page) for page in points.pages()] == [2, 3, 1], "a row is given once"
    assert points.to_list() == []
    assert len(run.metrics().to_list()) == 7


def test_an_empty_page_ends_nothing() -> None:
    assert list(Pages(iter([[], [1], [], [2, 3]]))) == [1, 2, 3]

    async def pages() -> Any:
        for page in ([], [1], [2, 3]):
            yield page

    async def read() -> list[list[int]]:
        rows: AsyncPages[int] = AsyncPages(pages())
        assert await anext(rows) == 1
        return [page async for page in rows.pages()]

    assert asyncio.run(read()) == [[2, 3]]


def test_a_frame(service: FakeService, run: Job) -> None:
    pandas = pytest.importorskip("pandas")
    service.curve = [metric(1, eval={"code": {"loss": 2.0, "bpb": 1.0}}), metric(2, loss=None)]
    table = run.metrics().to_pandas()
    assert list(table["step"]) == [1, 2]
    assert table["loss"].isna().tolist() == [False, True]
    assert table["eval.code.loss"][0] == 2.0
    assert str(table["at"].dt.tz) == "UTC"
    assert pandas.concat([table, table])["step"].sum() == 6
    jobs = run._client.jobs().to_pandas()
    assert list(jobs["progress.step"]) == [12400]
    assert jobs["started_at"].isna().all()


def test_without_pandas_the_error_says_what_to_install(run: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        run.metrics().to_pandas()


# Following


def stream(*steps: int, attempt: int = 1, end: bool = False) -> httpx2.Response:
    points = (
        f"id: {attempt}-{step}\nevent: metric\ndata: {json.dumps(metric(step, attempt=attempt))}\n\n" for step in steps
    )
    ending = 'event: end\ndata: {"status": "succeeded"}\n\n' * end
    return httpx2.Response(200, text="".join(points) + ending, headers={"Content-Type": "text/event-stream"})


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard.client.connection.time.sleep", lambda _: None)


def test_follow_continues_a_stream_that_breaks(service: FakeService, run: Job, no_sleep: None) -> None:
    parts = iter([stream(1, 2), None, stream(3), stream(2, 3, attempt=2, end=True)])
    asked: list[str | None] = []

    def answer(request: httpx2.Request) -> httpx2.Response | None:
        if not request.url.path.endswith("/stream"):
            # The service is away while the second stream would be opened.
            return refused(request) if len(asked) == 2 and next(away, None) else None
        asked.append(request.headers.get("Last-Event-ID"))
        return next(parts) or refused(request)

    away = iter([True] * 3)
    service.faults = [answer] * 40
    points = [(point["attempt"], point["step"]) for point in run.follow()]
    assert points == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]
    assert asked == [None, "1-2", "1-2", "1-3"]
    assert list(away) == []


def cut_off(*steps: int, error: httpx2.TransportError) -> httpx2.Response:
    """Return a stream with these points. Its connection then fails with ``error``."""

    def parts() -> Iterator[bytes]:
        yield stream(*steps).content
        raise error

    return httpx2.Response(200, content=parts(), headers={"Content-Type": "text/event-stream"})


def silent(*steps: int) -> httpx2.Response:
    return cut_off(*steps, error=httpx2.ReadTimeout("timed out"))


def test_follow_ends_when_the_job_is_idle(service: FakeService, run: Job, no_sleep: None) -> None:
    service.jobs[JOB] = job("paused")
    service.faults = [lambda _: None, lambda _: silent(1, 2)]
    assert [point["step"] for point in run.follow(after_step=0)] == [1, 2]
    assert service.faults == []


def test_follow_gives_all_points_of_an_idle_job(service: FakeService, run: Job, no_sleep: None) -> None:
    service.jobs[JOB] = job("paused")
    reset = httpx2.RemoteProtocolError("peer closed connection without sending complete message body")

    def slow(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("timed out", request=request)

    # The service closes a stream, a connection breaks, the service does not respond, and then it continues.
    streams = [lambda _: stream(1, 2), lambda _: cut_off(3, error=reset), slow, lambda _: silent(4)]
    service.faults = [fault for answer in streams for fault in (lambda _: None, answer)]
    assert [point["step"] for point in run.follow()] == [1, 2, 3, 4]


@pytest.mark.parametrize("status", [502, 503, 504])
def test_follow_waits_for_a_service_behind_a_proxy(service: FakeService, run: Job, no_sleep: None, status: int) -> None:
    answers = [lambda _: stream(1), lambda _: httpx2.Response(status, text="restarting"), lambda _: stream(2, end=True)]
    service.faults = [fault for answer in answers for fault in (lambda _: None, answer)]
    assert [point["step"] for point in run.follow()] == [1, 2]


def test_comments_of_the_stream_do_not_keep_follow_waiting(service: FakeService, run: Job, no_sleep: None) -> None:
    """The service sends a comment every 15 s, so the stream is never silent for longer."""
    service.jobs[JOB] = job("paused")
    service.faults = [lambda _: None, lambda _: silent(1)]
    list(run.follow(interval=60.0))
    assert service.requests[-1].extensions["timeout"]["read"] < KEEPALIVE_SECONDS


def test_follow_raises_what_waiting_does_not_help(service: FakeService, run: Job) -> None:
    service.faults = [lambda _: None, lambda _: problem(429, "too_many_streams", "Too many.")]
    with pytest.raises(ApiError, match="too_many_streams"):
        list(run.follow())
    with pytest.raises(NotFound):
        list(run._client.follow("job_none"))


# Notebooks


def svg_of(html: str) -> ET.Element:
    tree = ET.fromstring(html)
    found = tree.find(".//svg")
    assert found is not None
    return found


def test_a_notebook_shows_the_sentence_and_the_curve(service: FakeService, run: Job) -> None:
    losses = {10: 9.0, 20: None, 30: 5.0, 40: 3.0, 50: 2.5}
    page = {"object": "list", "data": [{"step": step, "loss_mean": loss} for step, loss in losses.items()]}
    service.faults = [lambda _: httpx2.Response(200, json=page)]
    html = run._repr_html_()
    assert service.requests[-1].url.params["max_points"] == "200"
    assert "Step 12,400 of 40,000." in html
    path = svg_of(html).find("path")
    assert path is not None
    assert path.get("d", "").count("M") == 2, "a loss that was not finite is a gap"
    assert svg_of(html).get("aria-label") == "Loss from step 10 to 50: highest 9, lowest 2.5, now 2.5"


def test_text_of_a_job_is_escaped() -> None:
    hostile = '<script>alert(1)</script>"&'
    points = [{"step": 1, "loss_mean": 2.0}, {"step": 2, "loss_mean": 1.0}]
    html = job_html(job(hostile, name=hostile, summary=hostile, id=hostile), points)
    assert "<script" not in html
    assert hostile in "".join(ET.fromstring(html).itertext())


def test_a_card_without_a_curve(service: FakeService, run: Job) -> None:
    service.faults = [refused] * 100
    assert "<svg" not in run._repr_html_(), "no service: the fields that are known"
    assert "pre-12" in run._repr_html_()
    assert curve_svg([]) == curve_svg([{"step": 1, "loss_mean": 2.0}]) == ""
    flat = curve_svg([{"step": 1, "loss_mean": 2.0}, {"step": 2, "loss_mean": 2.0}])
    assert "nan" not in flat.lower()


def test_an_asynchronous_job_shows_the_curve_that_was_read(service: FakeService) -> None:
    async def show() -> tuple[str, str]:
        async with AsyncClient(URL, retries=QUICK, transport=service.transport) as client:
            shown = await client.job(JOB)
            before = shown._repr_html_()
            page = {"object": "list", "data": [{"step": step, "loss_mean": 1.0} for step in (1, 2)]}
            service.faults = [lambda _: httpx2.Response(200, json=page)]
            await shown.curve()
            return before, shown._repr_html_()

    before, after = asyncio.run(show())
    assert "<svg" not in before
    assert "<svg" in after


def test_an_action_that_the_state_forbids(service: FakeService, run: Job) -> None:
    service.faults = [lambda _: problem(409, "invalid_state", "The job is running.", allowed_actions=["pause"])]
    with pytest.raises(InvalidState) as caught:
        run.resume()
    assert (caught.value.code, caught.value.problem["allowed_actions"]) == ("invalid_state", ["pause"])
