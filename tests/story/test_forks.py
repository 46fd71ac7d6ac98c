"""Forks, exports, live changes and resumes over the API, with real ranks: what the guides promise, to the last bit."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import REQUEST_SECONDS, Served, until
from tests.story.test_story import spec as story_spec

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    assert write_docstrings(file, 200) == 200
    return file


def spec(corpus: Path, **training: Any) -> dict[str, Any]:
    wanted = story_spec(corpus)
    wanted["training"] = {**wanted["training"], "max_steps": STEPS, **training}
    wanted["checkpoint"] = {"save_interval": 8}
    return wanted


@pytest.fixture(scope="module")
def parent(served: Served, corpus: Path) -> str:
    job_id = served.submit(spec(corpus))
    served.wait(job_id, "succeeded")
    return job_id


def sha256(served: Served, job_id: str, step: int = STEPS) -> str:
    listed = served.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    return str(next(one["sha256"] for one in listed if one["step"] == step))


def fork(served: Served, job_id: str, body: dict[str, Any]) -> str:
    answer = served.post(f"/jobs/{job_id}/fork", body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_a_kept_fork_is_its_parent_to_the_last_bit_and_their_curves_are_one(served: Served, parent: str) -> None:
    made = fork(served, parent, {"step": 8})
    served.wait(made, "succeeded")
    assert sha256(served, made) == sha256(served, parent)
    attempts = served.get(f"/jobs/{made}/attempts").json()["data"]
    assert [attempt["start_step"] for attempt in attempts] == [8]
    rows = served.get(f"/jobs/{made}/metrics?lineage=true&limit=1000").json()["data"]
    assert [row["job_id"] for row in rows] == [parent] * 8 + [made] * (STEPS - 8)
    shown = ("step", "loss", "learning_rate", "grad_norm", "tokens", "epoch")
    assert [[row[key] for key in shown] for row in rows] == [
        [row[key] for key in shown] for row in served.metrics(parent)
    ]
    verified = [e for e in served.get(f"/jobs/{made}/events").json()["data"] if e["kind"] == "resume_verified"]
    assert [event["data"]["difference"] for event in verified] == [0.0]


@pytest.mark.soak
def test_a_restarted_fork_goes_on_counting_and_outlives_its_parent(served: Served, corpus: Path) -> None:
    short = served.submit(spec(corpus, max_steps=8))
    served.wait(short, "succeeded")
    overrides = {"training": {"max_steps": 6, "learning_rate": 1e-3}, "data": {"max_seq_len": 32}}
    made = fork(served, short, {"data": "restart", "overrides": overrides})
    assert httpx2.delete(f"{served.url}/jobs/{short}", timeout=REQUEST_SECONDS).status_code == 204
    job = served.wait(made, "succeeded")
    assert (job["progress"]["step"], job["plan"]["base_step"], job["plan"]["steps"]) == (14, 8, 14)
    assert [row["step"] for row in served.metrics(made)] == list(range(9, 15))
    assert served.metrics(made)[-1]["learning_rate"] == pytest.approx(1e-4)


def test_an_export_is_there_when_the_answer_comes(served: Served, parent: str) -> None:
    for form, name in (("hf", "config.json"), ("minimind", "pretrain_64.pth")):
        url = f"{served.url}/jobs/{parent}/checkpoints/{STEPS}/export"
        answer = httpx2.post(url, json={"format": form}, timeout=120)
        assert answer.status_code == 201, answer.text
        assert (Path(answer.json()["path"]) / name).is_file()
        again = httpx2.post(url, json={"format": form}, timeout=120)
        assert (again.status_code, again.json()) == (200, answer.json())
    fetched = served.get(f"/jobs/{parent}/exports/{STEPS}/hf/files/config.json")
    assert json.loads(fetched.content)["hidden_size"] == 64


def test_a_live_change_is_taken_over_kept_and_changes_no_weight(served: Served, parent: str, corpus: Path) -> None:
    slow = spec(corpus)
    slow["checkpoint"]["keep_last"] = 2
    job_id = served.submit(slow)
    until(lambda: served.step(job_id) >= 2)
    change = {"save_interval": 4, "keep_last": 5}
    answer = httpx2.patch(f"{served.url}/jobs/{job_id}", json=change, timeout=REQUEST_SECONDS)
    assert answer.status_code == 200, answer.text
    served.kill()
    served.start()
    job = served.wait(job_id, "succeeded")
    assert job["attempt"] == 1
    assert job["spec"]["checkpoint"]["save_interval"] == 4
    assert sha256(served, job_id) == sha256(served, parent)
    changes = [e for e in served.get(f"/jobs/{job_id}/events").json()["data"] if e["kind"] == "settings"]
    assert len(changes) <= 1, "a run that ends first reports no change"
    if changes:
        saved = {one["step"] for one in served.get(f"/jobs/{job_id}/checkpoints").json()["data"]}
        due = [step for step in range(changes[0]["data"]["step"] + 1, STEPS + 1) if step % 4 == 0]
        assert set(due[-5:]) <= saved, "the newest five are kept"


@pytest.mark.soak
def test_resumed_with_more_steps_on_one_rank_and_back_at_an_older_step(served: Served, corpus: Path) -> None:
    job_id = served.submit(spec(corpus, max_steps=16))
    finished = served.wait(job_id, "succeeded")
    assert (finished["resumable"], "max_steps" in finished["resume_blocker"]) == (False, True)
    body = {"max_steps": 24, "resources": {"nproc_per_node": 1}}
    assert served.post(f"/jobs/{job_id}/resume", body).status_code == 202
    served.wait(job_id, "succeeded")
    assert [row["step"] for row in served.metrics(job_id)] == list(range(1, 25))
    first = sha256(served, job_id, 24)
    more = {"max_steps": 25, "step": 16}
    assert served.post(f"/jobs/{job_id}/resume", more).status_code == 202
    served.wait(job_id, "succeeded")
    attempts = served.get(f"/jobs/{job_id}/attempts").json()["data"]
    assert [attempt["start_step"] for attempt in attempts] == [0, 16, 16]
    assert sha256(served, job_id, 24) != first, "the schedule is that of a run of 25 steps"
    rows = served.metrics(job_id)
    assert [row["attempt"] for row in rows] == [1] * 16 + [3] * 9
