import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from tests.client.conftest import Run
from tests.client.fake_service import NOW, URL, FakeService, Stream, console, job, metric, problem, refused, written
from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.watch.state import WatchState
from trainyard.client.cli.watch.views import JsonView, LinesView, LiveView, log_line, long_texts
from trainyard.client.cli.watch.watcher import Clock, Watcher, follow
from trainyard.client.connection import RetryPolicy

JOB = "job_7f3kq9"
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@dataclass(frozen=True)
class Hurried(Clock):
    """Time that passes only by sleeping."""

    passed: list[float] = field(default_factory=lambda: [0.0])
    after_sleep: Callable[[float], None] = lambda _: None

    def __post_init__(self) -> None:
        object.__setattr__(self, "monotonic", lambda: self.passed[0])
        object.__setattr__(self, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.passed[0] += max(seconds, 0.01)
        self.after_sleep(self.passed[0])

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.passed[0])


def arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"json": False, "timeout": None} | changes))


def watcher(service: FakeService) -> Watcher:
    return Watcher(Client(URL, retries=RetryPolicy(seconds=0), transport=service.transport), JOB, "pre-12")


def play(
    service: FakeService, script: Callable[[float], None], to: Console | None = None, **options: Any
) -> tuple[int, str, str]:
    """Follow while ``script`` changes the service after each pause."""
    to = to or console()
    code = follow(watcher(service), arguments(**options), to, Hurried(after_sleep=script))
    return (int(code), *written(to))


def ending_at(service: FakeService, second: float, **ends: Any) -> Callable[[float], None]:
    def script(passed: float) -> None:
        if passed >= second:
            service.jobs[JOB] = job(**ends)

    return script


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("succeeded", 0, "trainyard samples pre-12"),
        ("failed", 10, "trainyard logs pre-12 --tail 50"),
        ("cancelled", 11, "trainyard checkpoints pre-12"),
        ("paused", 12, "trainyard resume pre-12"),
        ("interrupted", 12, "trainyard resume pre-12"),
    ],
)
def test_the_end_decides_the_exit_code(service: FakeService, status: str, code: int, said: str) -> None:
    found, out, err = play(service, ending_at(service, 2, status=status, resumable=True, message="why"))
    assert found == code
    assert f"status={status}" in out.splitlines()[-1]
    assert f"{status}: why" in err
    assert said in err


def test_a_pending_restart_is_waited_for(service: FakeService) -> None:
    def script(passed: float) -> None:
        service.jobs[JOB] = job("interrupted", restart_at="2026-01-31T16:31:10Z") if passed < 3 else job("succeeded")

    assert play(service, script)[0] == 0


def test_the_error_card_is_shown(service: FakeService) -> None:
    error = {
        "code": "out_of_memory",
        "message": "out of GPU memory",
        "hint": "use batch_size 16",
        "rank": 2,
        "traceback": "\n".join(f"line {number}" for number in range(40)),
    }
    _, _, err = play(service, ending_at(service, 1, status="failed", error=error))
    assert "error: out of GPU memory (rank 2) [out_of_memory]" in err
    assert "| line 39" in err
    assert "| line 24" not in err
    assert "hint: use batch_size 16" in err


def test_timeout(service: FakeService) -> None:
    code, _, err = play(service, lambda _: None, timeout=5.0)
    assert code == 124
    assert "5 s passed. Job continues. Re-attach: trainyard watch pre-12" in err


def test_ctrl_c_detaches(service: FakeService) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    code, _, err = play(service, interrupt)
    assert code == 130
    assert err == "Detached. Job continues. Re-attach: trainyard watch pre-12\n"


def test_it_outlives_the_service(service: FakeService) -> None:
    def script(passed: float) -> None:
        if passed < 30:
            service.faults = [refused]
        else:
            service.jobs[JOB] = job("succeeded")

    code, out, _ = play(service, script)
    lines = out.splitlines()
    assert code == 0
    assert [line for line in lines if "connection=lost" in line]
    assert "step=12400" in next(line for line in lines if "connection=lost" in line)
    assert len(lines) == 5  # running, lost, two more while it is lost, succeeded


def test_503_is_a_lost_service(service: FakeService) -> None:
    def script(passed: float) -> None:
        service.faults = [lambda _: problem(503, "database_unavailable", "The database is away.")]
        if passed > 3:
            service.faults, service.jobs[JOB] = [], job("succeeded")

    assert play(service, script)[0] == 0


def lost_for_good(service: FakeService) -> Callable[[float], None]:
    def script(_: float) -> None:
        service.faults = [refused] * 5

    return script


def test_on_a_terminal_a_lost_service_is_bounded_by_the_timeout_alone(service: FakeService) -> None:
    code, _, err = play(service, lost_for_good(service), console(terminal=True), timeout=4000.0)
    assert code == 124
    assert "4000 s passed. The service is lost: connection refused. Re-attach: trainyard watch pre-12" in err


@pytest.mark.parametrize("as_json", [False, True])
def test_off_a_terminal_a_service_that_stays_away_is_given_up(service: FakeService, as_json: bool) -> None:
    code, _, err = play(service, lost_for_good(service), timeout=4000.0, json=as_json)
    assert code == 3
    assert err == "The service is lost: connection refused. Re-attach: trainyard watch pre-12\n"


@pytest.mark.parametrize(("status", "code"), [(401, 4), (404, 1)])
def test_a_rejection_ends_it(run: Run, service: FakeService, status: int, code: int) -> None:
    service.faults = [lambda _: None, lambda _: problem(status, "no", "No.")]
    assert run("watch", JOB)[0] == code


def test_no_service_at_the_start_is_exit_3(run: Run, service: FakeService) -> None:
    service.faults = [refused] * 50
    code, _, err = run("watch", "pre-12")
    assert code == 3
    assert "trainyard serve" in err


def test_an_unknown_job_is_an_error(run: Run) -> None:
    code, _, err = run("watch", "nobody")
    assert code == 1
    assert "'nobody'" in err


# Requests to the service


def test_points_are_fetched_once(service: FakeService) -> None:
    service.curve = [metric(step) for step in (11000, 11100)]
    look = watcher(service)
    assert [point["step"] for point in look.poll(NOW).new_points] == [11000, 11100]
    service.curve.append(metric(11200))
    assert [point["step"] for point in look.poll(NOW).new_points] == [11200]
    assert look.poll(NOW).new_points == []


def test_a_long_curve_is_not_fetched_from_its_beginning(service: FakeService) -> None:
    service.jobs[JOB] = job(progress={"step": 1_000_000}, spec={"reporting": {"log_interval": 10}})
    watcher(service).poll(NOW)
    assert service.requests[-1].url.params["after_step"] == str(1_000_000 - 2000 * 10)


def test_a_new_attempt_brings_its_own_points(service: FakeService) -> None:
    service.curve = [metric(11900, attempt=2), metric(12100, 5.0, attempt=2)]
    look = watcher(service)
    look.poll(NOW)
    service.jobs[JOB] = job(attempt=3)
    service.curve = [metric(11900, attempt=2), metric(12100, 4.0, attempt=3)]
    assert [point["attempt"] for point in look.poll(NOW).new_points] == [3]
    assert look.state.curve.losses == [3.0, 4.0]


# The three outputs


def test_lines_come_every_ten_seconds_or_with_a_change() -> None:
    to = console()
    view, scene = LinesView(to), WatchState("pre-12", URL, job())
    for second in range(25):
        if second == 13:
            scene.job = job(message="a, b")
        view.show(scene, NOW + timedelta(seconds=second))
    times = [line.split()[0] for line in written(to)[0].splitlines()]
    assert times == [
        "at=2026-01-31T16:31:05Z",
        "at=2026-01-31T16:31:15Z",
        "at=2026-01-31T16:31:18Z",
        "at=2026-01-31T16:31:28Z",
    ]


def test_lines_continue_if_the_clock_is_set_back() -> None:
    to = console()
    view, scene = LinesView(to), WatchState("pre-12", URL, job())
    for second in (0, 1, 3600, 3601, -5, -4, 5):
        view.show(scene, NOW + timedelta(seconds=second))
    assert [line.split()[0][-9:] for line in written(to)[0].splitlines()] == [
        "16:31:05Z",
        "17:31:05Z",
        "16:31:00Z",
        "16:31:10Z",
    ]


def test_an_alert_is_on_one_line_and_not_on_each() -> None:
    to = console()
    view, scene = LinesView(to), WatchState("pre-12", URL, job(alerts=[{"message": "x" * 110}], message="why"))
    for second in range(45):
        if second == 25:
            scene.job = job(alerts=[{"message": "x" * 110}, {"message": "flat"}], message="why")
        view.show(scene, NOW + timedelta(seconds=second))
    found = [[word for word in line.split() if "=" in word] for line in written(to)[0].splitlines()]
    texts = [[word for word in words if word.startswith(("alerts=", "message="))] for words in found]
    assert texts == [["alerts=" + "x" * 110, "message=why"], [], [], ["alerts=flat"], []]


def test_a_line_is_key_value() -> None:
    scene = WatchState("pre-12", URL, job(message='it said "no"', alerts=["flat"]))
    scene.curve.extend([metric(12400, 2.887)])
    assert log_line(scene, NOW, long_texts(scene)) == (
        "at=2026-01-31T16:31:05Z job=job_7f3kq9 status=running phase=training attempt=2 step=12400 steps=40000 "
        "percent=31.0 loss=2.8870 ema=2.8870 lr=0.000261 grad_norm=0.4800 tokens_per_second=118240 "
        'eta_seconds=7800 checkpoint=12000 alerts=flat message="it said \\"no\\""'
    )


def test_a_line_has_the_progress_of_the_preparation() -> None:
    preparation = {"percent": 7.504, "eta_seconds": 86.2}
    made = job(status="preparing", phase="preparing_data", preparation=preparation)
    state = WatchState("pre-12", URL, made)
    assert " percent=7.5 " in log_line(state, NOW, {})
    assert " eta_seconds=86 " in log_line(state, NOW, {})


def test_json_is_one_document_a_line(service: FakeService) -> None:
    service.curve = [metric(12300), metric(12400, None)]

    def script(passed: float) -> None:
        if passed < 2:
            service.faults = [refused]
        else:
            service.jobs[JOB] = job("succeeded")

    code, out, _ = play(service, script, json=True)
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [event["event"] for event in events] == ["metric", "metric", "job", "connection", "connection", "job"]
    assert [event["metric"]["step"] for event in events[:2]] == [12300, 12400]
    assert events[-1]["job"]["status"] == "succeeded"
    assert (events[3]["lost"], events[4]["lost"]) == ("connection refused", None)


def test_json_repeats_nothing() -> None:
    to = console()
    view, scene = JsonView(to), WatchState("p", URL, job())
    for _ in range(3):
        view.show(scene, NOW)
    assert len(written(to)[0].splitlines()) == 1


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    return Console(Stream(terminal=True), Stream(), Stream())


def test_the_display_is_redrawn_in_place_and_its_last_state_stays(service: FakeService, screen: Console) -> None:
    code, out, _ = play(service, ending_at(service, 3, status="succeeded", message="done"), screen)
    assert code == 0
    assert "\x1b[?1049h" not in out  # no alternate screen
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1
    shown = ANSI.sub("", out)
    assert shown.rstrip().endswith(f"{URL}/jobs/{JOB}")
    assert "= SUCCEEDED" in shown


def test_ctrl_c_leaves_the_display_and_the_cursor(service: FakeService, screen: Console) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    code, out, err = play(service, interrupt, screen)
    assert code == 130
    assert "\x1b[?25h" in out
    assert "RUNNING" in out
    assert err.startswith("Detached.")


def test_no_color_is_honoured(screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    view = LiveView(screen)
    view.show(WatchState("p", URL, job()), NOW)
    view.close()
    assert "\x1b[1;32m" in written(screen)[0]
    monkeypatch.setenv("NO_COLOR", "1")
    plainly = Console(Stream(terminal=True), Stream(), Stream())
    view = LiveView(plainly)
    view.show(WatchState("p", URL, job()), NOW)
    view.close()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", written(plainly)[0])


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert not Console(Stream(terminal=True), Stream(), Stream()).can_redraw


# The real process, a real socket, a real Ctrl-C


@pytest.fixture
def served(service: FakeService) -> Iterator[str]:
    """The fake service on a real port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            response = service.answer(httpx2.Request("GET", f"{URL}{self.path}"))
            self.send_response(response.status_code)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_real_ctrl_c_exits_130(served: str) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from trainyard.client.cli.main import main; sys.exit(main())",
        "watch",
        "pre-12",
    ]
    with subprocess.Popen(
        [*command, "--url", served],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert "status=running" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "Detached. Job continues. Re-attach: trainyard watch pre-12\n"


def test_a_reader_that_went_away_ends_the_command_quietly(served: str) -> None:
    read, write = os.pipe()
    command = [
        sys.executable,
        "-c",
        "import sys; from trainyard.client.cli.main import main; sys.exit(main())",
        "list",
        "--url",
        served,
    ]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, b"")


def test_streams_default_to_the_process_s_own() -> None:
    assert isinstance(Console().out, io.TextIOBase)
