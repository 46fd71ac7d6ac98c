import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import pytest

from tests.client.fake_service import QUICK, URL, FakeService, job, lost, metric, problem, refused
from trainyard.client.api import DEFAULT_URL, Client
from trainyard.client.connection import RetryPolicy
from trainyard.client.errors import (
    AmbiguousName,
    ApiError,
    FieldProblem,
    InvalidSpec,
    InvalidState,
    NotAuthorised,
    NotFound,
    ServiceUnreachable,
    UnexpectedStatus,
    WaitTimedOut,
)

SPEC = {"data": {"data_path": "/data/a.jsonl"}}


def paths(service: FakeService) -> list[str]:
    return [f"{request.method} {request.url.path}" for request in service.requests]


def test_settings_come_from_arguments_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().url == DEFAULT_URL
    monkeypatch.setenv("TRAINYARD_URL", "http://elsewhere:1234/")
    assert Client().url == "http://elsewhere:1234"
    assert Client("http://given").url == "http://given"


def test_the_token_is_sent_as_bearer(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_TOKEN", "from-env\n")
    for token, sent in ((None, "Bearer from-env"), ("given", "Bearer given"), ("", None)):
        Client(URL, token, transport=service.transport).version()
        assert service.requests[-1].headers.get("Authorization") == sent


def test_every_route_has_a_method(service: FakeService, trainyard: Client) -> None:
    trainyard.submit(SPEC)
    list(trainyard.jobs())
    trainyard.job("job_7f3kq9")
    trainyard.update("job_7f3kq9", priority=3)
    for verb in (trainyard.pause, trainyard.save, trainyard.resume, trainyard.cancel, trainyard.kill):
        assert verb("job_7f3kq9")["id"] == "job_7f3kq9"
    list(trainyard.metrics("job_7f3kq9"))
    trainyard.checkpoints("job_7f3kq9")
    list(trainyard.events("job_7f3kq9"))
    trainyard.attempts("job_7f3kq9")
    trainyard.samples("job_7f3kq9")
    trainyard.logs("job_7f3kq9")
    trainyard.devices()
    trainyard.health()
    trainyard.ready()
    trainyard.version()
    trainyard.delete("job_7f3kq9")
    of_job = "/jobs/job_7f3kq9"
    assert paths(service) == [
        "POST /jobs",
        "GET /jobs",
        f"GET {of_job}",
        f"PATCH {of_job}",
        *(f"POST {of_job}/{verb}" for verb in ("pause", "save", "resume", "cancel", "kill")),
        *(f"GET {of_job}/{part}" for part in ("metrics", "checkpoints", "events", "attempts", "samples", "logs")),
        *(f"GET /{part}" for part in ("devices", "health", "ready", "version")),
        f"DELETE {of_job}",
    ]


def test_an_id_cannot_climb_out_of_its_place_in_the_url(service: FakeService, trainyard: Client) -> None:
    with pytest.raises(NotFound):
        trainyard.job("../devices")
    assert service.requests[-1].url.raw_path == b"/jobs/..%2Fdevices"


def test_resume_sends_what_changes(service: FakeService, trainyard: Client) -> None:
    trainyard.resume("job_7f3kq9", max_steps=10)
    assert json.loads(service.requests[-1].content) == {"max_steps": 10}
    trainyard.resume("job_7f3kq9")
    assert service.requests[-1].content == b""


def test_metrics_are_paged_by_step(service: FakeService, trainyard: Client) -> None:
    service.curve = [metric(step) for step in range(1, 8)]
    service.page = 3
    assert [point["step"] for point in trainyard.metrics("job_7f3kq9", after_step=1)] == [2, 3, 4, 5, 6, 7]
    assert [request.url.params["after_step"] for request in service.requests] == ["1", "4"]


def test_metrics_of_one_attempt(service: FakeService, trainyard: Client) -> None:
    service.curve = [metric(1), metric(2, attempt=2)]
    assert [point["step"] for point in trainyard.metrics("job_7f3kq9", attempt=2)] == [2]


def test_lists_are_paged_by_the_last_id_and_stop_at_the_limit() -> None:
    service = FakeService(*(job(id=f"job_{number:03}") for number in range(230)))
    trainyard = Client(URL, transport=service.transport)
    assert len(list(trainyard.jobs())) == 230
    assert [request.url.params.get("after") for request in service.requests] == [None, "job_099", "job_199"]
    service.requests.clear()
    assert len(list(trainyard.jobs(limit=120))) == 120
    assert [request.url.params["limit"] for request in service.requests] == ["100", "20"]


def test_labels_repeat_in_the_query(service: FakeService, trainyard: Client) -> None:
    list(trainyard.jobs(labels=["a=1", "b=2"], status="running"))
    assert service.requests[-1].url.params.get_list("label") == ["a=1", "b=2"]


def test_find_takes_ids_and_unique_names() -> None:
    service = FakeService(
        job(), job(id="job_2", name="twin"), job(id="job_3", name="twin"), job(id="job_4", name="job_x")
    )
    trainyard = Client(URL, transport=service.transport)
    assert trainyard.find("job_7f3kq9")["id"] == "job_7f3kq9"
    assert trainyard.find("pre-12")["id"] == "job_7f3kq9"
    assert trainyard.find("job_x")["id"] == "job_4"
    with pytest.raises(AmbiguousName, match=r"2 jobs are named 'twin'.*job_2 \(running\), job_3"):
        trainyard.find("twin")
    with pytest.raises(NotFound, match="'nobody'"):
        trainyard.find("nobody")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, NotAuthorised),
        (403, NotAuthorised),
        (404, NotFound),
        (409, InvalidState),
        (422, InvalidSpec),
        (413, ApiError),
    ],
)
def test_api_errors_carry_the_problem(service: FakeService, trainyard: Client, status: int, kind: type) -> None:
    errors = [{"pointer": "/training/learning_rate", "message": "must be greater than 0"}]
    service.faults = [lambda _: problem(status, "some_code", "Some detail.", errors=errors)]
    with pytest.raises(ApiError) as caught:
        trainyard.submit(SPEC)
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.code, caught.value.detail) == (status, "some_code", "Some detail.")
    assert caught.value.request_id == "req-1"
    assert caught.value.errors == (FieldProblem("/training/learning_rate", "must be greater than 0"),)
    assert str(caught.value) == "Some detail. [some_code]\n  /training/learning_rate: must be greater than 0"


@pytest.mark.parametrize("body", ["{}", "[]", "null", "5", '"x"', '{"status": "ok"}', '{"data": [{"id": 1}]}'])
def test_json_of_another_service_is_named_and_no_traceback(body: str) -> None:
    answers = httpx2.MockTransport(
        lambda _: httpx2.Response(200, content=body, headers={"Content-Type": "application/json"})
    )
    stranger = Client("http://127.0.0.1:8000", transport=answers)
    calls: list[Callable[[], object]] = [
        lambda: list(stranger.jobs()), lambda: stranger.job("job_x"), lambda: stranger.submit(SPEC),
        lambda: stranger.logs("job_x"), stranger.version, lambda: stranger.checkpoints("job_x"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ServiceUnreachable, match="no Trainyard service"):
            call()


@pytest.mark.parametrize("body", ["", "<html>", "[1]", '{"errors": 5}', '{"errors": [3, {}]}'])
def test_an_error_response_without_a_problem_is_an_api_error(
    service: FakeService, trainyard: Client, body: str
) -> None:
    service.faults = [lambda _: httpx2.Response(418, content=body)]
    with pytest.raises(ApiError, match="HTTP 418"):
        trainyard.job("job_7f3kq9")


def test_an_answer_that_is_no_json_is_no_trainyard(service: FakeService, trainyard: Client) -> None:
    service.faults = [lambda _: httpx2.Response(200, content="<html>hello")]
    with pytest.raises(ServiceUnreachable, match="no Trainyard service"):
        trainyard.health()


@pytest.mark.parametrize("name", ["health", "ready", "version", "logs"])
def test_a_token_may_have_the_name_of_a_route(service: FakeService, trainyard: Client, name: str) -> None:
    service.faults = [lambda _: httpx2.Response(200, json={"object": "token", "name": name})]
    assert trainyard.limit_token(name, max_jobs=1)["name"] == name


@pytest.mark.parametrize("given", ["secret\n", " secret", "secret\r\n"])
def test_a_token_from_a_file_may_have_a_line_end(service: FakeService, given: str) -> None:
    Client(URL, given, transport=service.transport).health()
    assert service.requests[-1].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("given", ["sec\nret", "s\u00e9cret", "secret\u2026", "sec\0ret"])
def test_a_token_with_invalid_characters_is_not_in_the_message(service: FakeService, given: str) -> None:
    with pytest.raises(NotAuthorised, match="printable ASCII") as caught:
        Client(URL, given, transport=service.transport)
    assert "ret" not in str(caught.value).replace("characters", "")
    assert service.requests == []


def test_an_idempotency_key_with_invalid_characters_is_rejected(service: FakeService, trainyard: Client) -> None:
    for key in ("\u952e", "a\n"):
        with pytest.raises(InvalidSpec, match="/header/Idempotency-Key: must be 1 to 255 printable ASCII"):
            trainyard.submit(SPEC, idempotency_key=key)
    assert service.requests == []


# Retries


def test_pauses_double_up_to_the_maximum_within_the_limit() -> None:
    assert list(RetryPolicy(seconds=5, first_pause=0.5, max_pause=2).pauses()) == [0.5, 1.0, 2.0]
    assert list(RetryPolicy(seconds=0).pauses()) == []
    assert sum(RetryPolicy().pauses()) <= RetryPolicy().seconds


@pytest.mark.parametrize(
    ("given", "url"),
    [("localhost:8000", "http://localhost:8000"), ("box", "http://box"), ("https://box/", "https://box")],
)
def test_an_address_may_leave_out_its_scheme(given: str, url: str) -> None:
    with Client(given) as found:
        assert found.url == url


def test_a_lost_answer_to_submit_is_asked_for_again_with_the_same_key(service: FakeService, trainyard: Client) -> None:
    def arrives_but_answer_is_lost(request: httpx2.Request) -> httpx2.Response:
        service._submit(request)
        return lost(request)

    service.faults = [arrives_but_answer_is_lost]
    made = trainyard.submit(SPEC)
    keys = {request.headers["Idempotency-Key"] for request in service.requests}
    assert len(service.requests) == 2
    assert len(keys) == 1
    assert list(service.submitted.values()) == [made]


def test_each_submit_has_a_key_of_its_own(service: FakeService, trainyard: Client) -> None:
    assert trainyard.submit(SPEC)["id"] != trainyard.submit(SPEC)["id"]
    assert trainyard.submit(SPEC, idempotency_key="mine")["id"] == trainyard.submit(SPEC, idempotency_key="mine")["id"]


def test_reads_are_tried_again_after_any_loss(service: FakeService, trainyard: Client) -> None:
    service.faults = [refused, lost, lambda _: problem(503, "database_unavailable", "away")]
    assert trainyard.job("job_7f3kq9")["name"] == "pre-12"
    assert len(service.requests) == 4


def test_an_action_is_sent_again_only_where_it_never_arrived(service: FakeService, trainyard: Client) -> None:
    service.faults = [refused]
    trainyard.pause("job_7f3kq9")
    assert len(service.requests) == 2
    service.faults = [lost]
    with pytest.raises(ServiceUnreachable, match="whether POST /jobs/job_7f3kq9/pause was done is not known"):
        trainyard.pause("job_7f3kq9")
    assert len(service.requests) == 3


def test_patience_ends(service: FakeService, trainyard: Client) -> None:
    service.faults = [refused] * 100
    with pytest.raises(ServiceUnreachable, match="connection refused") as caught:
        trainyard.health()
    assert caught.value.url == URL
    assert len(service.requests) == len(list(QUICK.pauses())) + 1


def test_a_real_refused_connection(refusing_port: int) -> None:
    with Client(f"http://127.0.0.1:{refusing_port}", retries=QUICK) as trainyard, pytest.raises(ServiceUnreachable):
        trainyard.health()


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch, refusing_port: int
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:3128")
    with Client(f"http://127.0.0.1:{refusing_port}", retries=QUICK) as trainyard:
        with pytest.raises(ServiceUnreachable, match="refused"):
            trainyard.health()


# Waiting


def walk(service: FakeService, *statuses: str, **changes: Any) -> None:
    """Each look finds the job one status further."""
    seen = iter(statuses)
    last = statuses[-1]

    def further(_: httpx2.Request) -> None:
        service.jobs["job_7f3kq9"] = job(next(seen, last), **changes)

    service.faults = [further] * len(statuses)


def test_wait_ends_when_the_job_is_idle(service: FakeService, trainyard: Client) -> None:
    walk(service, "queued", "running", "succeeded")
    assert trainyard.wait("job_7f3kq9", interval=0.001)["status"] == "succeeded"


def test_wait_until_a_status_or_a_condition(service: FakeService, trainyard: Client) -> None:
    walk(service, "queued", "starting", "running", "succeeded")
    assert trainyard.wait("job_7f3kq9", {"running"}, interval=0.001)["status"] == "running"
    assert trainyard.wait("job_7f3kq9", lambda seen: seen["status"] == "succeeded", interval=0.001)


def test_wait_fails_if_the_status_cannot_be_reached(service: FakeService, trainyard: Client) -> None:
    walk(service, "running", "failed", message="out of memory", reason="out_of_memory")
    with pytest.raises(UnexpectedStatus, match=r"failed \(out_of_memory\): out of memory"):
        trainyard.wait("job_7f3kq9", {"succeeded"}, interval=0.001)


def test_wait_ends_in_time(service: FakeService, trainyard: Client) -> None:
    with pytest.raises(WaitTimedOut, match="the job is running") as caught:
        trainyard.wait("job_7f3kq9", timeout=0.02, interval=0.005)
    assert caught.value.job is not None


class FakeTime:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("what", ["step", "phase", "attempt", "status"])
def test_wait_lets_a_slow_run_take_its_time(
    service: FakeService, trainyard: Client, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Each poll finds a little progress, for a hundred times the limit."""
    clock = FakeTime()
    for module in ("api", "connection"):
        monkeypatch.setattr(f"trainyard.client.{module}.time", clock)
    polls = iter(range(2000))

    def go_on(_: httpx2.Request) -> None:
        number = next(polls)
        changes: dict[str, dict[str, Any]] = {
            "step": {"progress": {"step": number}},
            "phase": {"phase": ("training", "saving")[number % 2]},
            "attempt": {"attempt": number},
            "status": {},
        }
        status = ("running", "starting")[number % 2 and what == "status"]
        service.jobs["job_7f3kq9"] = job("succeeded" if number == 1999 else status, **changes[what])

    service.faults = [go_on] * 2000
    assert trainyard.wait("job_7f3kq9", interval=1.0, stall_timeout=20.0)["status"] == "succeeded"
    assert clock.now == 1999


def test_wait_ends_if_there_is_no_progress(
    service: FakeService, trainyard: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeTime()
    for module in ("api", "connection"):
        monkeypatch.setattr(f"trainyard.client.{module}.time", clock)
    service.jobs["job_7f3kq9"] = job("running", phase="training", progress={"step": 1430})
    message = "20 s passed without progress, and the job is running, phase training, at step 1,430"
    with pytest.raises(WaitTimedOut, match=message):
        trainyard.wait("job_7f3kq9", lambda _: False, interval=1.0, stall_timeout=20.0)
    assert clock.now == 20


def test_wait_outlives_a_service_that_is_away(service: FakeService, trainyard: Client) -> None:
    looks = len(list(QUICK.pauses())) + 1
    service.faults = [lambda _: None, *([refused] * looks)]
    service.jobs["job_7f3kq9"] = job("running")

    def then_done(_: httpx2.Request) -> None:
        service.jobs["job_7f3kq9"] = job("succeeded")

    service.faults.append(then_done)
    assert trainyard.wait("job_7f3kq9", interval=0.001)["status"] == "succeeded"


def test_an_interrupted_job_is_idle_only_without_a_pending_restart(service: FakeService, trainyard: Client) -> None:
    walk(service, "interrupted", restart_at="2026-01-31T16:31:10Z")
    with pytest.raises(WaitTimedOut):
        trainyard.wait("job_7f3kq9", timeout=0.01, interval=0.002)
    walk(service, "interrupted")
    assert trainyard.wait("job_7f3kq9", interval=0.001)["status"] == "interrupted"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\udcff"])
def test_a_value_that_json_cannot_express_is_named(trainyard: Client, service: FakeService, value: object) -> None:
    body = {"data": {"data_path": "/d"}, "training": {"betas": [0.9, value]}}
    for call in (trainyard.submit, trainyard.plan):
        with pytest.raises(InvalidSpec) as caught:
            call(body)
        assert [problem.pointer for problem in caught.value.errors] == ["/training/betas/1"]
    with pytest.raises(InvalidSpec):
        trainyard.update("job_7f3kq9", labels={"a": value})
    assert service.requests == []


@pytest.mark.parametrize("hours", [-2, 0, 2])
def test_the_time_is_that_of_the_service_if_the_clocks_differ(hours: int) -> None:
    service_time = datetime.now(UTC) + timedelta(hours=hours)

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"status": "ok"}, headers={"date": format_datetime(service_time, usegmt=True)})

    with Client(URL, transport=httpx2.MockTransport(answer)) as client:
        assert abs(client.server_time - datetime.now(UTC)) < timedelta(seconds=30), "before the first response"
        client.health()
        assert abs(client.server_time - service_time) < timedelta(seconds=30)


@pytest.mark.parametrize("date", [None, "yesterday", "Thu, 01 Jan 1970"])
def test_a_response_without_a_valid_date_leaves_the_time_of_this_host(date: str | None) -> None:
    headers = {} if date is None else {"date": date}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json={"status": "ok"}, headers=headers))
    with Client(URL, transport=transport) as client:
        client.health()
        assert abs(client.server_time - datetime.now(UTC)) < timedelta(seconds=30)
