"""Corpora are prepared while other jobs train, by the real service, agents and workers."""

import json
import random
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.story.service_process import Served, until
from trainyard.contract.processes import find_by_marker

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

DOCUMENTS = 400_000


@pytest.fixture
def one_slot(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path / "home", [tmp_path], slots=1)
    service.start()
    yield service
    service.stop()


def write_corpus(path: Path, documents: int) -> Path:
    chance = random.Random(path.name)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "all", "of", "it"]
    lines = (json.dumps({"text": " ".join(chance.choices(words, k=30))}) for _ in range(documents))
    path.write_text("\n".join(lines) + "\n")
    return path


def spec(corpus: Path, steps: int) -> dict[str, Any]:
    model = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    training = {"max_steps": steps, "batch_size": 2, "accumulation_steps": 1}
    data = {"data_path": str(corpus), "max_seq_len": 64}
    resources = {"device": "cpu"}
    return {
        "model": model,
        "data": data,
        "training": training,
        "reporting": {"log_interval": 1},
        "resources": resources,
    }


def time_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def statuses(service: Served, job_id: str) -> list[str]:
    events = service.get(f"/jobs/{job_id}/events?limit=100").json()["data"]
    return [event["data"]["to"] for event in events if event["kind"] == "status"]


def written_tokens(service: Served) -> dict[str, int]:
    """Return each file of tokens, and when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in service.home.rglob("tokens.bin")}


def test_the_second_job_is_prepared_while_the_first_trains(one_slot: Served, tmp_path: Path) -> None:
    service = one_slot
    first = service.submit(spec(write_corpus(tmp_path / "a.jsonl", 200), 100_000))
    second = service.submit(spec(write_corpus(tmp_path / "b.jsonl", 100_000), 2))
    until(lambda: service.step(first) > 0)

    def ready() -> bool:
        job = service.job(second)
        assert job["attempt"] is None
        return job["status"] == "queued" and "CPU slot" in job["queue"]["waiting_for"]

    until(ready)
    assert service.job(first)["status"] == "running"
    tokens = written_tokens(service)
    assert len(tokens) == 2
    service.post(f"/jobs/{first}/cancel")
    ended = service.wait(first, "cancelled")
    done = service.wait(second, "succeeded")
    assert statuses(service, second)[:3] == ["preparing", "queued", "starting"]
    # How soon the first step comes depends on the machine; that nothing is tokenized before it does not.
    assert written_tokens(service) == tokens
    first_step = service.get(f"/jobs/{second}/metrics?limit=1").json()["data"][0]
    gap = time_of(first_step["at"]) - time_of(ended["finished_at"])
    print(f"first step {gap:.1f} s after the end of the first job")
    assert done["progress"]["step"] == 2


def test_killed_processes_and_services_end_in_the_same_run(one_slot: Served, tmp_path: Path) -> None:
    service = one_slot
    # Ten seconds of work on two quick cores, so that it is still being prepared when it is killed.
    job_id = service.submit(spec(write_corpus(tmp_path / "a.jsonl", DOCUMENTS), 2))
    corpus_id = until(lambda: service.job(job_id)["corpus_id"])

    def done() -> int:
        return int(((service.job(job_id)["preparation"] or {}).get("done_bytes")) or 0)

    until(lambda: done() > 0)
    for process in find_by_marker(f"{corpus_id}/1"):
        process.send(signal.SIGKILL)  # the agent as well, like a host that lost power
    service.kill()
    service.start()
    until(lambda: find_by_marker(f"{corpus_id}/2"))  # not only its number: an attempt that never began is replaced
    service.kill()  # the process of the second attempt goes on without a service
    service.start()
    job = service.wait(job_id, "succeeded", seconds=600)
    assert job["progress"]["step"] == 2
    assert statuses(service, job_id)[:3] == ["preparing", "queued", "starting"]
    assert service.get(f"/corpora/{corpus_id}").json()["attempt"] == 2
    report = service.get(f"/corpora/{corpus_id}").json()["report"]
    assert report["documents"] == DOCUMENTS
    assert [source["name"] for source in report["sources"]] == ["data"]
