"""The log: one line per request, ids in their fields, and no secrets."""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from trainyard.service.observability.logging import RedactingFilter, configure_logging, formatter
from trainyard.service.settings import InvalidSettings, Settings

SECRET = "canary-" + "s3cret" * 4


class Log:
    """What is written while a test runs, in one of the formats."""

    def __init__(self, format_: str) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        # What the client of the tests says for itself is no line of the service.
        self.handler.addFilter(lambda record: not record.name.startswith("httpx"))
        self.handler.setFormatter(formatter(format_, [SECRET]))

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self, message: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Lines with this message and these fields."""
        found = [json.loads(line) for line in self.text.splitlines()]
        wanted = {**fields, **({"message": message} if message is not None else {})}
        return [line for line in found if wanted.items() <= line.items()]


@pytest.fixture(params=["json"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    made, root = Log(request.param), logging.getLogger()
    before = root.level
    root.addHandler(made.handler)
    root.setLevel(logging.INFO)
    yield made
    root.setLevel(before)
    root.removeHandler(made.handler)


def test_a_line_for_each_request(rig: ServiceHarness, log: Log) -> None:
    answer = rig.client.post("/jobs", json=rig.spec(), headers={"X-Request-ID": "mine-1"})
    job_id = answer.json()["id"]
    (line,) = log.lines("request", request_id="mine-1")
    assert line["at"].endswith("Z")
    assert line["seconds"] >= 0
    del line["at"], line["seconds"]
    assert line == {
        "level": "info",
        "logger": "trainyard",
        "message": "request",
        "request_id": "mine-1",
        "actor": "local",
        "client": "testclient",
        "job_id": job_id,
        "method": "POST",
        "route": "/jobs",
        "status": 201,
    }


def test_the_route_and_never_the_address(rig: ServiceHarness, log: Log) -> None:
    job_id = rig.submit()
    rig.client.get(f"/jobs/{job_id}?name={SECRET}&x=1")
    rig.client.get(f"/jobs/{SECRET}")
    rig.client.get(f"/nowhere/{SECRET}?token={SECRET}")
    rig.client.request("BREW", "/jobs")
    routes = [(line["route"], line.get("job_id"), line["status"]) for line in log.lines("request")][1:]
    assert routes == [
        ("/jobs/{job_id}", job_id, 422),
        ("/jobs/{job_id}", None, 404),
        ("none", None, 404),
        ("/jobs", None, 405),
    ]
    assert log.lines("request")[-1]["method"] == "other"
    assert "canary" not in log.text
    assert "***" not in log.text, "nothing had to be blacked out: it was never there"


def test_what_happens_in_a_request_has_its_id(rig: ServiceHarness, log: Log) -> None:
    """The line is written in another thread than the one that read the head of the request."""
    job_id = rig.submit()
    rig.client.post(f"/jobs/{job_id}/cancel", headers={"X-Request-ID": "mine-2"})
    (moved,) = log.lines("queued -> cancelled")
    assert (moved["request_id"], moved["job_id"], moved["actor"]) == ("mine-2", job_id, "local")


def test_scheduler_and_launcher_say_which_job(rig: ServiceHarness, log: Log) -> None:
    job_id, _ = rig.running()
    launching = log.lines("launching", job_id=job_id, attempt=1)
    assert [(line["devices"], line["action"]) for line in launching] == [("cpu:0", "start")]
    assert "request_id" not in launching[0]
    assert log.lines("starting -> running", job_id=job_id, attempt=1, actor="agent")
    rig.launcher.of(job_id).lose_agent()
    rig.clock.forward(60)
    rig.reconcile()
    assert log.lines("an attempt has lost its agent", job_id=job_id, attempt=1, level="warning")


@pytest.mark.parametrize("level", ["info", "debug"])
def test_what_programs_ask_every_few_seconds_is_for_level_debug(rig: ServiceHarness, log: Log, level: str) -> None:
    """Of 3,558 lines of a quiet day 2,369 were heartbeats."""
    logging.getLogger("trainyard").setLevel(level.upper())
    try:
        job_id, attempt = rig.running()
        rig.heartbeat(attempt)
        rig.client.get("/health")
        rig.client.get("/metrics")
        rig.report(attempt, "heartbeat", {}, token="wrong")
        rig.client.get("/ready")
    finally:
        logging.getLogger("trainyard").setLevel(logging.NOTSET)
    asked = [(line["level"], line["route"], line["status"]) for line in log.lines("request")]
    lines = [line for line in asked if not line[1].startswith("/jobs")]
    assert len(asked) == len(lines) + 2
    internal = "/internal/attempts/{attempt_id}/"
    periodic = [
        ("debug", f"{internal}events", 200),
        ("debug", f"{internal}heartbeat", 200),
        ("debug", "/health", 200),
        ("debug", "/metrics", 200),
    ]
    # A failure is never hidden: this rig's scheduler does not run.
    failed = [("info", f"{internal}heartbeat", 401), ("info", "/ready", 503)]
    assert lines == [*(periodic if level == "debug" else []), *failed]
    if level == "debug":
        reported = log.lines("request", actor="agent", job_id=job_id, attempt=1)
        assert {line["route"] for line in reported} == {f"{internal}events", f"{internal}heartbeat"}


def test_two_requests_at_once_do_not_mix(rig: ServiceHarness, log: Log) -> None:
    from tests.service.harness import in_threads

    job_ids = [rig.submit() for _ in range(8)]

    def cancel(index: int) -> int:
        headers = {"X-Request-ID": f"r-{index}"}
        return int(rig.client.post(f"/jobs/{job_ids[index]}/cancel", headers=headers).status_code)

    with served(rig):
        assert in_threads(8, cancel) == [202] * 8
    moved = {line["request_id"]: line["job_id"] for line in log.lines("queued -> cancelled")}
    assert moved == {f"r-{index}": job_id for index, job_id in enumerate(job_ids)}


def test_a_token_makes_an_actor(make_rig: MakeHarness, sqlite_url: str, log: Log) -> None:
    rig = make_rig(sqlite_url, token=SECRET)
    rig.client.get("/jobs")
    rig.client.get("/jobs", headers={"Authorization": f"Bearer {SECRET}"})
    assert [(line["status"], line.get("actor")) for line in log.lines("request")] == [(401, None), (200, "admin")]
    assert SECRET not in log.text
    rig.close()


def test_a_failure_has_its_traceback_in_its_line(
    rig: ServiceHarness, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainyard.service.jobs import listing

    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"postgresql://trainyard:{SECRET}@db/x failed: {SECRET}")

    monkeypatch.setattr(listing, "jobs", broken)
    answer = rig.client.get("/jobs", headers={"X-Request-ID": "mine-3"})
    assert answer.status_code == 500
    (line,) = log.lines("a request failed", request_id="mine-3", level="error")
    assert "ZeroDivisionError" in line["traceback"]
    assert "postgresql://trainyard:***@db/x failed: ***" in line["traceback"]
    assert log.lines("request", request_id="mine-3", status=500)
    assert SECRET not in log.text + answer.text


def test_values_of_statements_are_not_logged(any_rig: ServiceHarness, log: Log) -> None:
    from sqlalchemy import text

    for statement in ("SELECT :value FROM nowhere", "SELECT broken(:value)"):
        try:
            with any_rig.database.read() as session:
                session.execute(text(statement), {"value": SECRET})
        except Exception:
            logging.getLogger("trainyard").exception("as the scheduler would")
    assert len(log.lines("as the scheduler would")) == 2
    assert SECRET not in log.text
    assert "***" not in log.text, "the censor had nothing to do"


@pytest.mark.parametrize("said", [f"Bearer {SECRET}", f"authorization: bearer {SECRET}", f"x://user:{SECRET}@host/"])
def test_what_looks_like_a_secret_is_blacked_out(said: str) -> None:
    shown = RedactingFilter([])(said)
    assert SECRET not in shown
    assert "***" in shown


@pytest.mark.parametrize("password", [f"a@{SECRET}", f"{SECRET}/b", f"a@b/{SECRET}", f"{SECRET}:x@", f"%40{SECRET}"])
def test_no_piece_of_a_password_is_left(password: str) -> None:
    shown = RedactingFilter([])(f"cannot reach postgresql://trainyard:{password}@host/name, port 5432")
    assert shown == "cannot reach postgresql://trainyard:***@host/name, port 5432"
    assert RedactingFilter([])("ready at http://127.0.0.1:8000/x") == "ready at http://127.0.0.1:8000/x"


def test_short_words_are_no_secrets() -> None:
    assert RedactingFilter(["", "a"])("a plain line") == "a plain line"
    assert RedactingFilter(["longer", "longer still"])("longer still, longer") == "***, ***"


def test_text_is_one_line_whatever_stands_in_it() -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "two\nlines", "created": 0})
    record.job_id, record.why, record.code = "job_abc", 'a "quoted"\nword', None
    line = formatter("text").format(record)
    assert line == '1970-01-01T00:00:00.000Z INFO x two lines job_id=job_abc why="a \\"quoted\\"\\nword"'


def test_everything_in_the_process_writes_alike(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_logging("json", "info", [SECRET])
        logging.getLogger("some.library").warning("a library says %s", SECRET)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.getLogger("trainyard").debug("not asked for")
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
    written = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["logger"] for line in written] == ["some.library", "py.warnings"]
    assert written[0]["message"] == "a library says ***"


def test_the_settings() -> None:
    assert Settings.read({}).log_format == "text"
    found = Settings.read({"TRAINYARD_LOG_FORMAT": "json", "TRAINYARD_LOG_LEVEL": "warning"})
    assert (found.log_format, found.log_level) == ("json", "warning")
    for name in ("TRAINYARD_LOG_FORMAT", "TRAINYARD_LOG_LEVEL", "TRAINYARD_PREEMPTION"):
        with pytest.raises(InvalidSettings, match=name):
            Settings.read({name: "loud"})
    secret = Settings.read({"TRAINYARD_TOKEN": SECRET, "TRAINYARD_DATABASE_URL": "postgresql://u:p4ssw0rd@h/d"})
    assert secret.secrets() == [SECRET, "p4ssw0rd"]
    beside = Settings.read({"TRAINYARD_DATABASE_URL": "postgresql://h/d?password=p4ssw0rd"})
    assert beside.secrets() == ["p4ssw0rd"]
