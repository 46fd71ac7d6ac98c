from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import URL, FakeService, console, job, problem, refused, written
from tests.client.test_watch import Hurried
from trainyard.client.api import Client
from trainyard.client.cli.commands.logs import LogReader, follow_log
from trainyard.client.connection import RetryPolicy

JOB = "job_7f3kq9"


def options(**changes: Any) -> SimpleNamespace:
    given = {"json": False, "timeout": None, "rank": None, "attempt": None, "tail": None, "job": "pre-12"}
    return SimpleNamespace(**(given | changes))


def follow(service: FakeService, script: Callable[[float], None], **changes: Any) -> tuple[int, str, str]:
    trainyard = Client(URL, retries=RetryPolicy(seconds=0), transport=service.transport)
    args, to = options(**changes), console()
    reader = LogReader(trainyard, trainyard.job(JOB), args)
    code = follow_log(reader, args, to, Hurried(after_sleep=script))
    return (int(code), *written(to))


def test_a_log_is_printed_once_and_as_it_is(run: Run, service: FakeService) -> None:
    service.log = "one\ntwo\n\x1b[2Jthree"
    assert run("logs", "pre-12")[:2] == (0, "one\ntwo\n\N{REPLACEMENT CHARACTER}[2Jthree")


def test_tail_rank_and_attempt_are_asked_of_the_service(run: Run, service: FakeService) -> None:
    service.log = "one\ntwo\n"
    assert run("logs", "pre-12", "--tail", "1", "--rank", "3", "--attempt", "1")[1] == "two\n"
    asked = next(request for request in service.requests if request.url.path.endswith("/logs"))
    assert dict(asked.url.params) == {"attempt": "1", "rank": "3", "tail": "1"}


def no_log(_: object) -> Any:
    return problem(404, "log_not_found", "The attempt has no such log yet.")


def test_no_log_yet_is_no_error(run: Run, service: FakeService) -> None:
    service.faults = [lambda _: None, no_log]
    assert run("logs", "pre-12") == (0, "", "rank 0 of attempt 2 has printed nothing yet\n")


@pytest.mark.parametrize("follow", [[], ["--follow"]])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--rank", "7"], "there is no rank 7 of attempt 2 of job_7f3kq9: it has ranks 0 to 3"),
        (["--attempt", "9"], "there is no attempt 9 of job_7f3kq9: its newest is attempt 2"),
    ],
)
def test_a_log_that_will_never_exist_is_an_error(
    run: Run, service: FakeService, line: list[str], message: str, follow: list[str]
) -> None:
    service.jobs[JOB] = job(spec={"resources": {"nproc_per_node": 2, "nnodes": 2}})
    service.faults = [lambda _: None, *([lambda _: None] if follow else []), no_log]
    assert run("logs", "pre-12", *line, *follow) == (2, "", f"trainyard: {message}\n")


def test_an_ended_attempt_without_the_log(run: Run, service: FakeService) -> None:
    service.jobs[JOB] = job("succeeded")
    service.faults = [lambda _: None, no_log]
    code, out, err = run("logs", "pre-12", "--attempt", "1", "--rank", "3")
    assert (code, out, err) == (2, "", "trainyard: there is no log of rank 3 of attempt 1 of job_7f3kq9\n")


def test_a_job_that_was_never_launched_leads_to_the_reason(run: Run, service: FakeService) -> None:
    service.jobs[JOB] = job("failed", attempt=0)
    service.faults = [lambda _: None, no_log]
    message = f"there is no log of rank 0 of {JOB}: it was never launched; `trainyard show {JOB}` has the reason"
    assert run("logs", "pre-12") == (2, "", f"trainyard: {message}\n")


def test_follow_prints_what_comes_until_the_end(service: FakeService) -> None:
    service.log = "a\n"

    def script(passed: float) -> None:
        service.log += f"{passed:.0f}\n"
        if passed >= 3:
            service.jobs[JOB] = job("failed", message="why")

    code, out, err = follow(service, script)
    assert (code, out) == (10, "a\n1\n2\n3\n")
    assert "failed: why" in err


def test_follow_goes_over_to_a_new_attempt(service: FakeService) -> None:
    service.logs = {"2": "first\n"}

    def script(passed: float) -> None:
        # Between two polls the attempt printed why it ended, and the next one was started.
        service.logs = {"2": "first\nRuntimeError: why\n", "3": "second\n"}
        service.jobs[JOB] = job("succeeded" if passed > 2 else "running", attempt=3)

    assert follow(service, script)[:2] == (0, "first\nRuntimeError: why\nsecond\n")


def test_follow_continues_after_an_attempt_without_a_log(service: FakeService) -> None:
    service.logs = {"3": "second\n"}

    def script(_: float) -> None:
        service.jobs[JOB] = job("succeeded", attempt=3)
        service.faults = [lambda _: None, no_log]

    assert follow(service, script)[:2] == (0, "second\n")


def test_follow_outlives_the_service(service: FakeService) -> None:
    service.log = "a\n"

    def script(passed: float) -> None:
        service.faults = [refused] if passed < 3 else []
        if passed >= 3:
            service.jobs[JOB] = job("succeeded")

    code, out, err = follow(service, script)
    assert (code, out) == (0, "a\n")
    assert "reconnecting: connection refused" in err


@pytest.mark.parametrize(("timeout", "code"), [(None, 3), (5.0, 124)])
def test_a_service_that_stays_away_is_given_up(service: FakeService, timeout: float | None, code: int) -> None:
    def script(_: float) -> None:
        service.faults = [refused] * 5

    found, _, err = follow(service, script, timeout=timeout)
    assert found == code
    assert "The service is lost. Re-attach: trainyard logs --follow" in err


@pytest.mark.parametrize(("timeout", "code"), [(2.0, 124), (None, 130)])
def test_follow_ends_by_timeout_or_ctrl_c(service: FakeService, timeout: float | None, code: int) -> None:
    def script(passed: float) -> None:
        if passed > 5:
            raise KeyboardInterrupt

    found, _, err = follow(service, script, timeout=timeout)
    assert found == code
    assert "Job continues." in err
