"""The database goes away or is blocked at the worst moment: 503 with Retry-After, and nothing is lost."""

import errno
import functools
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from tests.service.commit_fault_proxy import CommitFaultProxy, When, commit_fault_proxy
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads, path_of
from tests.service.live_server import served
from tests.service.test_checkpoints import saved
from tests.soak_report import SoakReport
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import JobStatus
from trainyard.service.db import engine
from trainyard.service.db.engine import Database
from trainyard.service.db.models import EvaluationRow, JobRow
from trainyard.service.errors import from_exception
from trainyard.worker.agent.uploader import EventUploader, ReportEndpoint, Unreachable

ENDS: list[When] = ["before", "after"]


def submit(rig: ServiceHarness, key: str) -> Any:
    return rig.client.post("/jobs", json=rig.spec(name=key), headers={"Idempotency-Key": key})


def jobs_in(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


def require_503(answer: Any) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["code"] in ("database_unavailable", "outcome_unknown")


# A day without the service


@dataclass(frozen=True)
class RigEndpoint(ReportEndpoint):
    """Sends the reports of job ``attempt_id`` to the last service of ``rigs``, or nowhere if there is none."""

    rigs: list[ServiceHarness] = field(default_factory=list)

    def post(self, resource: str, body: bytes) -> dict[str, Any]:
        if not self.rigs:
            raise Unreachable("the service is away")
        answer = self.rigs[-1].report(self.rigs[-1].launcher.of(self.attempt_id), resource, body.decode())
        return dict(answer.json()) if answer.status_code == 200 else {}


@pytest.mark.long
def test_a_day_without_the_service_costs_a_run_nothing(rig: ServiceHarness, tmp_path: Path) -> None:
    """The real uploader and a virtual clock; the run makes a step a minute, and ends after the service is back."""
    job_id, fake = rig.running(steps=1442)
    attempt = RunDir(tmp_path / "run").attempt(1)
    attempt.path.mkdir(parents=True)
    seconds, written = 0.0, 0
    endpoint = RigEndpoint("http://127.0.0.1:1", job_id, fake.launch.token, None, [rig])
    uploader = EventUploader(attempt, endpoint, lambda: seconds)

    def train_until(end: float) -> None:
        nonlocal seconds, written
        while seconds < end:
            seconds += uploader.poll()
            if len(fake.lines) - 1 < seconds // 60:
                fake.metric(len(fake.lines))
            if written < len(fake.lines):
                with attempt.outbox.open("a") as outbox:
                    outbox.writelines(json.dumps(line) + "\n" for line in fake.lines[written:])
                written = len(fake.lines)

    train_until(60)
    endpoint.rigs.clear()
    train_until(60 + 86_400)
    rig.clock.forward(86_400)
    later = rig.restart()
    try:
        later.reconcile()
        assert later.status(job_id) is JobStatus.RUNNING, "a run that was silent for a day is alive"
        endpoint.rigs.append(later)
        train_until(seconds + 60)
        steps = len(fake.lines) - 1
        assert uploader.acked == steps + 1 == 1443
        later.exit(fake, "completed", step=steps)
        job = later.job(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1)
        assert [point["step"] for point in later.data(job_id, "metrics", limit=10_000)] == list(range(1, steps + 1))
    finally:
        later.close()


# A full disk


def full_disk(*_: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorname = "SQLITE_FULL"
    raise error


@pytest.mark.parametrize("when", ["do_execute", "do_commit"])
def test_a_full_disk_is_507_and_nothing_is_changed(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """In 0.1 it was 503 `outcome_unknown`, and clients tried again and again."""
    rig.submit()
    with monkeypatch.context() as patched:
        patched.setattr(rig.database.engine.dialect, when, full_disk)
        answer = rig.client.post("/jobs", json=rig.spec())
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_trouble"), answer.text
    assert "Free some space" in answer.json()["detail"]
    assert jobs_in(rig.database) == 1
    assert submit(rig, "again").status_code == 201


def test_a_checkpoint_stays_if_its_deletion_cannot_be_stored(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The typical case: a user deletes a checkpoint because the disk is full."""
    job_id, attempt = saved(rig, 4, 8)
    rig.exit(attempt, "completed", step=10)
    directory = rig.home / "runs" / job_id / "checkpoints"
    with monkeypatch.context() as patched:
        patched.setattr(rig.database.engine.dialect, "do_commit", full_disk)
        answer = rig.client.delete(f"/jobs/{job_id}/checkpoints/4")
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_trouble"), answer.text
    assert sorted(path.name for path in directory.iterdir()) == ["step-00000004", "step-00000008"]
    assert [one["step"] for one in rig.data(job_id, "checkpoints")] == [8, 4], "nothing was changed"
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/4").status_code == 204
    assert [path.name for path in directory.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/home/secret"), 507),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 507),
        (OSError(errno.EIO, "Input/output error"), 500),
        (OperationalError("INSERT", {}, psycopg.errors.DiskFull("could not extend file")), 507),
        (OperationalError("INSERT", {}, psycopg.errors.AdminShutdown("shutting down")), 503),
    ],
)
def test_which_errors_are_a_full_disk(error: Exception, status: int) -> None:
    found = from_exception(error)
    assert found.status == status
    assert "secret" not in found.detail


# One key, many threads


def one_key_a_round(rig: ServiceHarness, rounds: int, threads: int = 50) -> Counter[int]:
    seen: Counter[int] = Counter()
    with served(rig) as (host, port):
        plain: dict[str, Any] = {"timeout": 60, "trust_env": False, "verify": False}  # certificates take long to load
        clients = [httpx2.Client(base_url=f"http://{host}:{port}", **plain) for _ in range(threads)]
        for number in range(rounds):
            headers = {"Idempotency-Key": f"round-{number}"}

            def post(index: int, headers: dict[str, str] = headers, number: int = number) -> tuple[int, str]:
                answer = clients[index].post("/jobs", json=rig.spec(name=f"n{number}"), headers=headers)
                return answer.status_code, answer.json().get("id")

            answers = in_threads(threads, post)
            assert Counter(code for code, _ in answers) == {201: 1, 200: threads - 1}, answers
            assert len({job_id for _, job_id in answers}) == 1
            seen.update(code for code, _ in answers)
        for client in clients:
            client.close()
    assert jobs_in(rig.database) == rounds, "one job a round"
    return seen


def test_fifty_threads_with_one_key_are_one_job(any_rig: ServiceHarness) -> None:
    one_key_a_round(any_rig, 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_two_hundred_rounds_of_fifty_threads_with_one_key(account: SoakReport, any_rig: ServiceHarness) -> None:
    begun = time.monotonic()
    seen = one_key_a_round(any_rig, 200)
    account.faults["submission with a shared key"] += seen.total()
    account.figure("a round of 50, s", (time.monotonic() - begun) / 200)
    account.invariants.append("each of 200 rounds made one job, and answered 201 once and 200 to all others")


# The connection is lost inside COMMIT


@pytest.fixture
def cut(make_rig: MakeHarness, request: pytest.FixtureRequest) -> Iterator[tuple[ServiceHarness, CommitFaultProxy]]:
    """A service whose way to Postgres can be cut at a COMMIT."""
    if "any_url" not in request.fixturenames:
        raise AssertionError
    folder = Path(tempfile.mkdtemp(prefix="trainyard-cut-", dir="/tmp"))
    with commit_fault_proxy(request.getfixturevalue("any_url"), folder) as (url, cutter):
        rig = make_rig(url)
        yield rig, cutter
        rig.close()
        rig.database.close()
    shutil.rmtree(folder, ignore_errors=True)


only_postgres = pytest.mark.parametrize("any_url", ["postgres"], indirect=True)


@only_postgres
@pytest.mark.parametrize("when", ENDS)
def test_a_submission_whose_commit_was_lost_is_made_once(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str, when: When
) -> None:
    rig, cutter = cut
    before = rig.submit()
    cutter.cut(when)
    answer = submit(rig, "lost")
    require_503(answer)
    assert answer.json()["code"] == "outcome_unknown", "it is not said that nothing was changed"
    direct = Database(any_url)
    assert jobs_in(direct) == (2 if when == "after" else 1), "the database knows"
    direct.close()
    again = submit(rig, "lost")
    assert again.status_code == (200 if when == "after" else 201)
    assert submit(rig, "lost").json()["id"] == again.json()["id"]
    assert [job["id"] for job in rig.get("/jobs")["data"]] == [again.json()["id"], before]
    assert cutter.cuts == 1


@only_postgres
@pytest.mark.parametrize("when", ENDS)
def test_a_report_whose_commit_was_lost_counts_once(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str, when: When
) -> None:
    rig, cutter = cut
    job_id, attempt = rig.running()
    for step in range(1, 21):
        attempt.metric(step)
    attempt.say("sample", step=3, prompt="p", text="t")
    cutter.cut(when)
    require_503(rig.report(attempt, "events", {"events": attempt.lines}))
    acked = rig.ship(attempt)
    assert acked["acked"] == len(attempt.lines)
    assert [row["step"] for row in rig.data(job_id, "metrics")] == list(range(1, 21))
    assert len(rig.data(job_id, "samples")) == 1
    assert cutter.cuts == 1


@only_postgres
@pytest.mark.parametrize("when", ENDS)
def test_a_launch_whose_commit_was_lost_happens_once(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str, when: When
) -> None:
    """The claim may stand without anybody knowing: it is found, given back, and made anew. Never two at once."""
    rig, cutter = cut
    job_id = rig.submit()
    cutter.cut(when)
    for _ in range(5):
        rig.reconcile()
        assert len(rig.launcher.living(job_id)) <= 1
        rig.clock.forward(30)
    assert cutter.cuts == 1
    [attempt] = rig.launcher.living(job_id)
    attempt.started(steps=5)
    rig.ship(attempt)
    assert rig.status(job_id) == "running"
    path_of(rig.data(job_id, "events"))


@only_postgres
@pytest.mark.parametrize("when", ENDS)
def test_a_fork_whose_commit_was_lost_keeps_its_checkpoint(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str, when: When
) -> None:
    rig, cutter = cut
    parent, attempt = saved(rig, 4)
    rig.exit(attempt, "completed", step=10)
    cutter.cut(when)
    lost = rig.client.post(f"/jobs/{parent}/fork", headers={"Idempotency-Key": "lost"})
    require_503(lost)
    again = rig.client.post(f"/jobs/{parent}/fork", headers={"Idempotency-Key": "lost"})
    assert again.status_code == (200 if when == "after" else 201), again.text
    origin = RunDir(rig.home / "runs" / again.json()["id"]).artifacts(None).origin
    assert (origin / "model.safetensors").is_file(), "the fork cannot start without its parent's checkpoint"
    later = rig.restart()
    assert (origin / "model.safetensors").is_file()
    kept = {parent, again.json()["id"]}
    assert {path.name for path in (later.home / "runs").iterdir()} == kept, "files without a record are removed"


@only_postgres
@pytest.mark.parametrize("when", ENDS)
def test_a_deletion_whose_commit_was_lost_is_finished_by_the_next_service(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str, when: When
) -> None:
    rig, cutter = cut
    job_id, attempt = saved(rig, 4)
    rig.exit(attempt, "completed", step=10)
    cutter.cut(when)
    require_503(rig.client.delete(f"/jobs/{job_id}"))
    run = rig.home / "runs" / job_id
    assert run.is_dir()
    later = rig.restart()
    assert later.client.get(f"/jobs/{job_id}").status_code == (404 if when == "after" else 200)
    assert run.exists() == (when == "before"), "the files go with the record"
    assert list(later.settings.trash.iterdir()) == []


@only_postgres
def test_an_evaluation_whose_commit_was_lost_keeps_its_weights(
    cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str
) -> None:
    rig, cutter = cut
    job_id, _ = saved(rig, 4)
    (rig.home / "task.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    body = {"tasks": [{"name": "t", "path": str(rig.home / "task.jsonl"), "kind": "choice"}]}
    cutter.cut("after")
    require_503(rig.client.post(f"/jobs/{job_id}/checkpoints/4/evaluate", json=body))
    with rig.database.read() as session:
        evaluation_id = session.scalars(select(EvaluationRow.evaluation_id)).one()
    assert evaluation_id is not None
    weights = RunDir(rig.home / "runs" / job_id).artifacts(None).evaluation(evaluation_id)
    assert (weights / "model.safetensors").is_file()


@only_postgres
def test_every_commit_of_a_life_is_lost_once(cut: tuple[ServiceHarness, CommitFaultProxy], any_url: str) -> None:
    """Pause, resume, cancel, ends: each is asked for again until it is answered, and is done once."""
    rig, cutter = cut
    job_id, attempt = rig.running()

    def insist(path: str) -> Any:
        for when in ENDS:
            cutter.cut(when)
            answer = rig.client.post(path)
            if answer.status_code != 503:
                return answer  # there was nothing left to be done, and nothing to commit
            require_503(answer)
        return rig.client.post(path)

    assert insist(f"/jobs/{job_id}/pause").status_code == 202
    cutter.disarm()
    rig.exit(attempt, "stopped", step=3)
    assert rig.status(job_id) == "paused"
    assert insist(f"/jobs/{job_id}/resume").status_code == 202
    assert insist(f"/jobs/{job_id}/cancel").status_code == 409, "it was cancelled when the answer was lost"
    cutter.disarm()
    assert rig.status(job_id) == "cancelled"
    assert path_of(rig.data(job_id, "events"))[2:] == ["pausing", "paused", "queued", "cancelled"]


# Somebody else has the SQLite file


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
connection.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
"""


class Holder:
    """Another process that has the file for itself until it is told to let go."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-c", HOLDER, url.removeprefix("sqlite:///")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def let_go(self) -> None:
        self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0


class Held:
    """Writers insist, readers read and an agent reports while the file is held; what they saw."""

    def __init__(self, rig: ServiceHarness) -> None:
        self.rig = rig
        self.seen: Counter[str] = Counter()
        self._counting = threading.Lock()
        self.reads: list[float] = []
        self.failed: list[int] = []
        self.job_id, self.attempt = rig.running(steps=1000)
        self._stop, self._released = threading.Event(), threading.Event()

    def hold(self, seconds: float, writers: int = 12) -> None:
        threads = [threading.Thread(target=work) for work in (self._read, self._report)]
        threads += [threading.Thread(target=self._write, args=(number,)) for number in range(writers)]
        holder = Holder(self.rig.url)
        for thread in threads:
            thread.start()
        self._stop.wait(seconds)
        self._until(lambda: self.reads and all(self.seen[f"503 to a {what}"] for what in ("submission", "report")))
        self._released.set()
        holder.let_go()
        made = self.seen["submission"] + writers
        self._until(lambda: self.seen["submission"] >= made)
        self._stop.set()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def require_whole(self) -> None:
        """Each submission is one job, and each step is there once."""
        assert self.failed == []
        assert jobs_in(self.rig.database) == self.seen["submission"] + 1
        steps = [row["step"] for row in self.rig.data(self.job_id, "metrics", limit=10_000)]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == self.seen["report"] > 0

    def _until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.02)

    def _count(self, what: str) -> None:
        # A Counter loses counts if two threads add to it at once.
        with self._counting:
            self.seen[what] += 1

    def _insist(self, what: str, send: Callable[[], Any]) -> None:
        while (answer := send()).status_code not in (200, 201):
            self._count(f"503 to a {what}")
            require_503(answer)
            time.sleep(0.05)
        self._count(what)

    def _write(self, writer: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            self._insist("submission", functools.partial(submit, self.rig, f"w{writer}-{number}"))

    def _report(self) -> None:
        step = 0
        while not self._stop.is_set():
            step += 1
            self.attempt.metric(step)
            body = {"events": self.attempt.lines[-50:]}
            self._insist("report", functools.partial(self.rig.report, self.attempt, "events", body))

    def _read(self) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            status = self.rig.client.get(f"/jobs/{self.job_id}").status_code
            self.failed += [status] if status != 200 else []
            if not self._released.is_set():
                self.reads.append(time.monotonic() - begun)
            self._stop.wait(0.05)


def test_a_file_that_somebody_else_holds(
    rig: ServiceHarness, make_rig: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.2)
    impatient = make_rig(rig.url)
    held = Held(impatient)
    held.hold(1.5)
    held.require_whole()
    impatient.close()
    assert held.seen["503 to a submission"] > 0
    assert held.seen["503 to a report"] > 0
    assert held.reads, "readers go on meanwhile"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_file_that_somebody_else_holds_for_a_minute(account: SoakReport, rig: ServiceHarness) -> None:
    """With the patience that the service has: a writer waits half a minute, and is then told to come again."""
    held = Held(rig)
    held.hold(60.0)
    held.require_whole()
    account.faults.update(held.seen)
    account.faults["seconds that the file was held"] += 60
    for seconds in held.reads:
        account.figure("a read while the file was held, s", seconds)
    assert held.seen["503 to a submission"] > 0
    account.invariants.append(
        "readers were answered, writers heard 503 with Retry-After, nothing was lost or made twice"
    )
