"""From release 0.1 to this one and back, on live runs: the services and the agents of both releases side by side.

Needs the history of this repository: release 0.1 is taken out of it. `make test-long` runs this.
"""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import Served, until
from tests.story.test_story import spec
from trainyard.contract.processes import find_by_marker
from trainyard.contract.rundir import RunDir

STEPS = 240
FAKE_STEPS, WAIT_STEP = 60, 30

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 400) == 400
    return file


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory, corpus: Path, old_release: Path) -> Iterator[dict[str, Any]]:
    """Start with 0.1: one run succeeds, one is paused, one trains. Then kill 0.1 and start this release on the home."""
    home = tmp_path_factory.mktemp("home") / "home"
    old = Served(home, [corpus.parent], command=[sys.executable, "-m", "service"], path=old_release)
    old.start()
    jobs = {"untouched": old.submit(described(corpus))}
    old.wait(jobs["untouched"], "succeeded", seconds=240)
    jobs["paused"] = old.submit(described(corpus))
    until(lambda: old.step(jobs["paused"]) >= 10)
    assert old.post(f"/jobs/{jobs['paused']}/pause").status_code == 202
    old.wait(jobs["paused"], "paused")
    jobs["running"] = old.submit(described(corpus))
    until(lambda: old.step(jobs["running"]) >= 5)
    # The run must not end before the new release is up, however long that takes.
    ranks = [process for process in find_by_marker(f"{jobs['running']}/1") if process.variable("RANK") is not None]
    assert ranks, "the run has ended before it was stopped: make it longer"
    assert all(rank.send(signal.SIGSTOP) for rank in ranks)
    old.kill()
    new = Served(home, [corpus.parent])
    new.start()
    at_start = RunDir(home / "runs" / jobs["running"]).attempt(1).read_step() or 0
    assert all(rank.send(signal.SIGCONT) for rank in ranks)
    yield {"service": new, "step_at_start": at_start, **jobs}
    new.stop()


def described(corpus: Path) -> dict[str, Any]:
    wanted = spec(corpus)
    wanted["training"]["max_steps"] = STEPS
    # In bfloat16 the loss factor is exact since 0.2, so weights differ from those of 0.1 by design.
    wanted["training"]["dtype"] = "float32"
    wanted["checkpoint"]["save_interval"] = STEPS // 2
    return wanted


def final_sha256(served: Served, job_id: str) -> str:
    newest = served.get(f"/jobs/{job_id}/checkpoints").json()["data"][0]
    assert newest["step"] == STEPS
    return str(newest["sha256"])


def test_a_run_that_an_agent_of_0_1_leads_is_adopted(upgraded: dict[str, Any]) -> None:
    served, job_id = upgraded["service"], upgraded["running"]
    assert upgraded["step_at_start"] < STEPS
    job = served.wait(job_id, "succeeded", seconds=240)
    assert job["attempt"] == 1
    rows = served.metrics(job_id)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["attempt"] for row in rows} == {1}
    assert final_sha256(served, job_id) == final_sha256(served, upgraded["untouched"])


def test_a_run_that_0_1_paused_resumes_to_the_same_weights(upgraded: dict[str, Any]) -> None:
    served, job_id = upgraded["service"], upgraded["paused"]
    assert served.job(job_id)["status"] == "paused"
    assert served.post(f"/jobs/{job_id}/resume").status_code == 202
    job = served.wait(job_id, "succeeded", seconds=240)
    assert job["attempt"] == 2
    assert [row["step"] for row in served.metrics(job_id)] == list(range(1, STEPS + 1))
    assert final_sha256(served, job_id) == final_sha256(served, upgraded["untouched"])


def test_a_new_run_has_the_weights_that_0_1_computed(upgraded: dict[str, Any], corpus: Path) -> None:
    served = upgraded["service"]
    job_id = served.submit(described(corpus))
    served.wait(job_id, "succeeded", seconds=240)
    assert final_sha256(served, job_id) == final_sha256(served, upgraded["untouched"])


# The way back


@pytest.fixture(scope="module")
def mixed_release(tmp_path_factory: pytest.TempPathFactory, old_release: Path) -> Path:
    """Return a folder with the code of 0.1, except that its service starts the agents of this release."""
    folder = tmp_path_factory.mktemp("release-mixed") / "code"
    shutil.copytree(old_release, folder)
    shutil.rmtree(folder / "worker")
    (folder / "worker" / "agent").mkdir(parents=True)
    (folder / "worker" / "__init__.py").touch()
    (folder / "worker" / "agent" / "__init__.py").touch()
    main = "import sys\nfrom trainyard.worker.agent.__main__ import main\nsys.exit(main())\n"
    (folder / "worker" / "agent" / "__main__.py").write_text(main)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, corpus: Path, mixed_release: Path) -> Iterator[Served]:
    """A service of 0.1 whose agents are of this release."""
    home = tmp_path_factory.mktemp("mixed") / "home"
    served = Served(home, [corpus.parent], command=[sys.executable, "-m", "service"], path=mixed_release)
    served.start()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def mixed_untouched(mixed: Served, corpus: Path) -> str:
    job_id = mixed.submit(described(corpus))
    mixed.wait(job_id, "succeeded", seconds=600)
    return job_id


def test_a_service_of_0_1_takes_the_run_of_an_agent_of_this_release(mixed: Served, mixed_untouched: str) -> None:
    """It does not know the agent's proof, so it reads the events from the run directory when the run has ended."""
    assert mixed.job(mixed_untouched)["attempt"] == 1
    assert [row["step"] for row in mixed.metrics(mixed_untouched)] == list(range(1, STEPS + 1))
    assert final_sha256(mixed, mixed_untouched)
    events = mixed.get(f"/jobs/{mixed_untouched}/events?limit=100").json()["data"]
    assert [each for each in events if "cannot be read" in str(each)] == []
    agent_log = RunDir(mixed.home / "runs" / mixed_untouched).attempt(1).agent_log.read_text()
    assert "training continues, the report is kept" in agent_log


def test_a_service_of_0_1_pauses_and_resumes_the_run_of_an_agent_of_this_release(
    mixed: Served, mixed_untouched: str, corpus: Path
) -> None:
    job_id = mixed.submit(described(corpus))
    first = RunDir(mixed.home / "runs" / job_id).attempt(1)
    until(lambda: (first.read_step() or 0) >= 10)
    assert mixed.post(f"/jobs/{job_id}/pause").status_code == 202
    mixed.wait(job_id, "paused")
    assert mixed.post(f"/jobs/{job_id}/resume").status_code == 202
    assert mixed.wait(job_id, "succeeded", seconds=600)["attempt"] == 2
    assert [row["step"] for row in mixed.metrics(job_id)] == list(range(1, STEPS + 1))
    assert final_sha256(mixed, job_id) == final_sha256(mixed, mixed_untouched)


@pytest.fixture(scope="module")
def old_release_with_fake_ranks(tmp_path_factory: pytest.TempPathFactory, old_release: Path) -> Path:
    """Return a folder with the code of 0.1, whose agents start the fake ranks of its own tests."""
    folder = tmp_path_factory.mktemp("release-fake") / "code"
    shutil.copytree(old_release, folder)
    file = folder / "service" / "launch" / "environment.py"
    code = file.read_text()
    assert '"-m", "worker.agent"' in code
    file.write_text(code.replace('"-m", "worker.agent"', '"-m", "tests.faults.driver"'))
    return folder


def test_a_service_of_0_1_refuses_the_database_of_this_release_and_continues_with_the_backup(
    tmp_path: Path, corpus: Path, old_release_with_fake_ranks: Path
) -> None:
    """0.1, backup, this release, back to 0.1: one run that an agent of 0.1 leads lives through all of it."""
    home, backup, code = tmp_path / "home", tmp_path / "before-upgrade.db", old_release_with_fake_ranks
    old = Served(home, [corpus.parent], command=[sys.executable, "-m", "service"], path=code)
    old.start()
    # The ranks wait at step WAIT_STEP for a file.
    labels = {"steps": str(FAKE_STEPS), "pace": "0.2", "fault": f"file_at_{WAIT_STEP}"}
    wanted = spec(corpus, timeouts={"progress": 3600})  # ranks that wait are not hung
    job_id = old.submit({"labels": labels, "data": wanted["data"], "resources": wanted["resources"]})
    run = RunDir(home / "runs" / job_id)
    until(lambda: old.step(job_id) >= 3)
    old.kill()
    command = [str(Path(sys.executable).parent / "trainyard"), "db", "backup", str(backup)]
    subprocess.run(command, check=True, env={**os.environ, "TRAINYARD_HOME": str(home)})

    new = Served(home, [corpus.parent])
    new.start()
    until(lambda: new.step(job_id) >= WAIT_STEP - 1)
    new.kill()

    before = database_content(home)
    refused = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0"],
        env={**os.environ, "TRAINYARD_HOME": str(home), "PYTHONPATH": str(code)},
        cwd=code,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode != 0
    assert "which this version does not know; nothing was changed. Start the version that made it" in refused.stderr
    assert "restore the backup from before the upgrade" in refused.stderr
    assert database_content(home) == before

    for file in home.glob("trainyard.db*"):
        file.unlink()
    shutil.copyfile(backup, home / "trainyard.db")
    old.start()
    assert old.job(job_id)["status"] == "running"
    (run.path / "go").touch()
    assert old.wait(job_id, "succeeded", seconds=300)["attempt"] == 1
    assert [row["step"] for row in old.metrics(job_id)] == list(range(1, FAKE_STEPS + 1))
    old.stop()


def database_content(home: Path) -> str:
    """Return a digest of every row and table of the home's database."""
    with closing(sqlite3.connect(home / "trainyard.db")) as database:
        return hashlib.sha256("\n".join(database.iterdump()).encode()).hexdigest()
