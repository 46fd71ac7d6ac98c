"""From release 0.1 to this one: a home, a paused run and a run that an agent of 0.1 still leads.

Needs the history of this repository: release 0.1 is taken out of it. `make test-long` runs this.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import Served, until
from tests.story.test_story import spec
from trainyard.contract.rundir import RunDir

RELEASE_0_1 = "3dc47211ad9d41b04c08c5fedc7407a10f598d4f"
ROOT = Path(__file__).parents[2]
STEPS = 240

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 400) == 400
    return file


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the code of release 0.1."""
    archive = subprocess.run(["git", "archive", RELEASE_0_1], cwd=ROOT, capture_output=True)
    if archive.returncode != 0:
        pytest.skip("release 0.1 is not in this repository's history")
    folder = tmp_path_factory.mktemp("release-0.1")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


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
    old.kill()
    new = Served(home, [corpus.parent])
    new.start()
    at_start = RunDir(home / "runs" / jobs["running"]).attempt(1).read_step() or 0
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
    assert upgraded["step_at_start"] < STEPS, "the run has ended before the new release was up: make it longer"
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
