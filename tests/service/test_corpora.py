"""Corpora are prepared before jobs get devices: the real service with a fake launcher, on SQLite and Postgres."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.launcher import FakeAttempt, ServiceKilled
from tests.service.harness import ServiceHarness, in_threads, path_of
from trainyard.contract.cache import CorpusCache
from trainyard.contract.locks import FileLock
from trainyard.contract.prepared import corpus_key, corpus_parts, find_prepared, mark_prepared
from trainyard.contract.spec import DataSpec, JobSpec
from trainyard.contract.status import JobStatus, Reason
from trainyard.service.api.routers import corpora
from trainyard.service.corpora import registry
from trainyard.service.devices.inventory import cpu_slots
from trainyard.service.launch.base import AttemptRef, AttemptState

MakeRig = Callable[..., ServiceHarness]


@pytest.fixture
def preparing(make_rig: MakeRig, any_url: str) -> Iterator[ServiceHarness]:
    rig = make_rig(any_url, prepares=True)
    yield rig
    rig.close()


def process(rig: ServiceHarness, corpus_id: str, number: int = 1) -> FakeAttempt:
    return rig.launcher.attempts[AttemptRef(corpus_id, number)]


def corpus_of(rig: ServiceHarness, job_id: str) -> str:
    found: str = rig.job(job_id)["corpus_id"]
    return found


def progress(attempt: FakeAttempt, done: int, total: int = 1000) -> None:
    attempt.say("phase", phase="preparing_data", done=done, total=total)


def put_into_cache(rig: ServiceHarness, attempt: FakeAttempt, shards: str = "a" * 32) -> None:
    cache = CorpusCache(rig.settings.corpus_cache)
    cache.directory(shards).mkdir(parents=True, exist_ok=True)
    (cache.directory(shards) / "meta.json").write_text("{}")
    assert attempt.launch.task is not None
    mark_prepared(cache.path, attempt.launch.task.parts, {("data", False): shards})


def finish(rig: ServiceHarness, attempt: FakeAttempt) -> None:
    put_into_cache(rig, attempt)
    attempt.end("completed", message="prepared 1 document with 5 tokens")
    rig.clock.forward(1)
    rig.reconcile()


def look(rig: ServiceHarness) -> None:
    """Let the scheduler read what the processes have reported."""
    rig.clock.forward(1)
    rig.reconcile()


def statuses(rig: ServiceHarness, job_id: str) -> list[str]:
    return path_of(rig.data(job_id, "events"))


def test_a_job_is_prepared_then_queued_then_started(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    assert rig.status(job_id) is JobStatus.QUEUED
    rig.reconcile()
    job = rig.job(job_id)
    assert (job["status"], job["phase"], job["attempt"], job["queue"]) == ("preparing", "preparing_data", None, None)
    assert [device["job_id"] for device in rig.get("/devices")["data"]] == [None, None]
    attempt = process(rig, job["corpus_id"])
    assert (attempt.launch.devices, attempt.launch.spec.resources.device) == ((), "cpu")
    progress(attempt, 100)
    progress(attempt, 250)
    look(rig)
    job = rig.job(job_id)
    assert (job["preparation"]["done_bytes"], job["preparation"]["percent"]) == (250, 25.0)
    assert "250 B of 1.0 kB (25 %)" in job["summary"]
    assert rig.get(f"/corpora/{job['corpus_id']}")["progress"] == job["preparation"]
    finish(rig, attempt)
    job = rig.job(job_id)
    assert (job["status"], job["phase"], job["preparation"]) == ("starting", None, None)
    assert statuses(rig, job_id) == ["preparing", "queued", "starting"]
    assert rig.launcher.of(job_id).launch.devices


def test_a_cached_corpus_never_shows_it(preparing: ServiceHarness) -> None:
    rig = preparing
    first = rig.submit()
    rig.reconcile()
    finish(rig, process(rig, corpus_of(rig, first)))
    second = rig.submit(model={"hidden_size": 64}, data={"data_path": str(rig.corpus), "max_seq_len": 64})
    rig.reconcile()
    assert statuses(rig, second) == ["starting"]
    assert corpus_of(rig, second) == corpus_of(rig, first)
    assert len(rig.launcher.starts) == 3


def test_two_jobs_share_one_process(preparing: ServiceHarness) -> None:
    rig = preparing
    jobs = [rig.submit(), rig.submit()]
    rig.reconcile()
    third = rig.submit()
    look(rig)
    everyone = [*jobs, third]
    assert [rig.status(job_id) for job_id in everyone] == [JobStatus.PREPARING] * 3
    [corpus_id] = {corpus_of(rig, job_id) for job_id in everyone}
    assert rig.launcher.starts == [AttemptRef(corpus_id, 1)]
    assert rig.get(f"/corpora/{corpus_id}")["jobs"] == everyone
    finish(rig, process(rig, corpus_id))
    assert [rig.status(job_id) for job_id in jobs] == [JobStatus.STARTING] * 2


def test_jobs_submitted_at_once_share_one_corpus(preparing: ServiceHarness) -> None:
    rig = preparing
    jobs = in_threads(6, lambda _: rig.submit())
    assert len({corpus_of(rig, job_id) for job_id in jobs}) == 1
    assert len(rig.get("/corpora")["data"]) == 1


@pytest.mark.parametrize(("verb", "status"), [("pause", "paused"), ("cancel", "cancelled"), ("kill", "cancelled")])
def test_stop_actions_work_at_once_and_the_process_stops(preparing: ServiceHarness, verb: str, status: str) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    job = rig.post_action(job_id, verb)
    assert (job["status"], job["phase"], job["preparation"]) == (status, None, None)
    look(rig)
    attempt = process(rig, corpus_id)
    assert attempt.stop_asked == 1
    attempt.end("stopped", Reason.USER, message="stopped; the finished part is kept")
    look(rig)
    assert rig.get(f"/corpora/{corpus_id}")["status"] == "stopped"
    rig.post_action(job_id, "resume")
    rig.reconcile()
    assert rig.status(job_id) is JobStatus.PREPARING
    finish(rig, process(rig, corpus_id, 2))
    assert rig.status(job_id) is JobStatus.STARTING


def test_a_pause_of_one_of_two_jobs_leaves_the_process_alone(preparing: ServiceHarness) -> None:
    rig = preparing
    jobs = [rig.submit(), rig.submit()]
    rig.reconcile()
    rig.post_action(jobs[0], "pause")
    look(rig)
    attempt = process(rig, corpus_of(rig, jobs[1]))
    assert attempt.stop_asked == 0
    finish(rig, attempt)
    assert [rig.status(job_id) for job_id in jobs] == [JobStatus.PAUSED, JobStatus.STARTING]


def test_a_process_that_does_not_stop_is_killed(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    attempt = process(rig, corpus_of(rig, job_id))
    rig.post_action(job_id, "cancel")
    look(rig)
    assert (attempt.stop_asked, attempt.ended_by_launcher) == (1, 0)
    rig.clock.forward(11)
    rig.reconcile()
    assert attempt.ended_by_launcher == 1
    assert rig.get("/corpora")["data"][0]["status"] == "stopped"


def test_a_failure_is_that_of_the_job(preparing: ServiceHarness) -> None:
    rig = preparing
    jobs = [rig.submit(), rig.submit()]
    rig.reconcile()
    attempt = process(rig, corpus_of(rig, jobs[0]))
    attempt.end("failed", Reason.DATA_INVALID, message="c.jsonl has 3 bad lines")
    look(rig)
    for job_id in jobs:
        job = rig.job(job_id)
        assert (job["status"], job["reason"], job["message"]) == ("failed", "data_invalid", "c.jsonl has 3 bad lines")
        assert job["error"]["message"] == "c.jsonl has 3 bad lines"
        assert [action["action"] for action in job["error"]["next"]] == ["resume"]
        assert job["finished_at"] is not None
    rig.post_action(jobs[0], "resume")
    rig.reconcile()
    finish(rig, process(rig, corpus_of(rig, jobs[0]), 2))
    assert [rig.status(job_id) for job_id in jobs] == [JobStatus.STARTING, JobStatus.FAILED]


def test_a_killed_process_continues_and_the_job_shows_why(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    progress(process(rig, corpus_id), 500)
    look(rig)
    process(rig, corpus_id).end("crashed", Reason.WORKER_CRASHED, message="killed by SIGKILL")
    look(rig)  # it made progress, so the next one starts at once
    assert process(rig, corpus_id, 2).state is AttemptState.ALIVE
    assert rig.status(job_id) is JobStatus.PREPARING
    process(rig, corpus_id, 2).end("crashed", Reason.WORKER_CRASHED, message="killed by SIGKILL")
    look(rig)
    assert "continues in 5 s" in rig.job(job_id)["summary"]
    assert rig.get(f"/corpora/{corpus_id}")["restart_at"] is not None
    assert rig.status(job_id) is JobStatus.PREPARING
    rig.clock.forward(6)
    rig.reconcile()
    finish(rig, process(rig, corpus_id, 3))
    assert rig.status(job_id) is JobStatus.STARTING
    assert statuses(rig, job_id) == ["preparing", "queued", "starting"]


def test_an_orphaned_process_is_ended_before_the_next_one(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    process(rig, corpus_id).lose_agent()
    look(rig)
    assert process(rig, corpus_id).ended_by_launcher == 1
    rig.clock.forward(6)
    rig.reconcile()
    assert process(rig, corpus_id, 2).state is AttemptState.ALIVE


@pytest.mark.parametrize(
    "point", ["before_spawn", "after_spawn", "no_answer", "no_answer_but_done", "refuse", "error_after_spawn"]
)
def test_every_failed_launch_is_found(preparing: ServiceHarness, point: Any) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.launcher.fail_next = point
    try:
        rig.reconcile()
    except ServiceKilled:
        rig = rig.restart()
    corpus_id = corpus_of(rig, job_id)
    for _ in range(8):
        rig.clock.forward(5)
        rig.reconcile()
    living = rig.launcher.living(corpus_id)
    assert len(living) == 1
    finish(rig, living[0])
    assert rig.status(job_id) is JobStatus.STARTING


def test_a_restarted_service_finds_the_process_and_what_it_did(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    attempt = process(rig, corpus_id)
    progress(attempt, 100)
    rig = rig.restart()
    progress(attempt, 200)
    look(rig)
    assert rig.job(job_id)["preparation"]["done_bytes"] == 200
    assert len(rig.launcher.starts) == 1
    rig = rig.restart()
    put_into_cache(rig, attempt)
    attempt.end("completed")
    look(rig)
    assert rig.status(job_id) is JobStatus.STARTING


@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("restarts", [True, False])
def test_a_process_that_continued_for_days_without_the_service_is_not_killed(
    preparing: ServiceHarness, restarts: bool, reports: bool
) -> None:
    """The service was stopped for a weekend, or the whole host was suspended, with the process."""
    rig = preparing
    job_id = rig.submit(resources={"timeouts": {"preparing": 100}})
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    attempt = process(rig, corpus_id)
    progress(attempt, 100)
    look(rig)
    rig.clock.forward(3 * 86400)
    if reports:
        progress(attempt, 900)
    rig = rig.restart() if restarts else rig
    for _ in range(3):
        look(rig)
    found = rig.get(f"/corpora/{corpus_id}")
    assert (found["status"], found["attempt"]) == ("preparing", 1)
    assert found["progress"]["done_bytes"] == (900 if reports else 100)
    for _ in range(6):  # Now the service observes that there are no reports.
        rig.clock.forward(30)
        rig.reconcile()
    assert rig.get(f"/corpora/{corpus_id}")["attempt"] == 2


def test_the_second_job_is_prepared_while_the_first_trains(make_rig: MakeRig, any_url: str) -> None:
    rig = make_rig(any_url, devices=cpu_slots(1), prepares=True)
    first = rig.submit()
    rig.reconcile()
    finish(rig, process(rig, corpus_of(rig, first)))
    running = rig.launcher.of(first)
    running.started()
    rig.ship(running)
    other = rig.home / "other.jsonl"
    other.write_text('{"text": "two"}\n')
    second = rig.submit(data={"data_path": str(other)})
    rig.reconcile()
    assert [rig.status(job_id) for job_id in (first, second)] == [JobStatus.RUNNING, JobStatus.PREPARING]
    finish(rig, process(rig, corpus_of(rig, second)))
    assert rig.status(second) is JobStatus.QUEUED
    rig.exit(running, "completed", step=10)
    rig.reconcile()
    assert rig.status(second) is JobStatus.STARTING


def test_a_changed_file_is_another_corpus(preparing: ServiceHarness) -> None:
    rig = preparing
    first = rig.submit()
    rig.corpus.write_text('{"text": "other"}\n')
    assert corpus_of(rig, rig.submit()) != corpus_of(rig, first)


def test_a_corpus_that_was_pruned_is_prepared_again(preparing: ServiceHarness) -> None:
    rig = preparing
    first = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, first)
    finish(rig, process(rig, corpus_id))
    (CorpusCache(rig.settings.corpus_cache).directory("a" * 32) / "meta.json").unlink()
    assert rig.get(f"/corpora/{corpus_id}")["cached"] is False
    second = rig.submit()
    rig.reconcile()
    assert rig.status(second) is JobStatus.PREPARING
    assert corpus_of(rig, second) == corpus_id


def test_preparing_counts_for_the_quota(make_rig: MakeRig, any_url: str) -> None:
    rig = make_rig(any_url, prepares=True, token="admin")
    rig.client.headers["Authorization"] = "Bearer admin"
    token = rig.client.post("/tokens", json={"name": "ci", "scope": "submit", "max_jobs": 1}).json()["token"]
    rig.client.headers["Authorization"] = f"Bearer {token}"
    rig.submit()
    rig.reconcile()
    assert rig.client.post("/jobs", json=rig.spec()).json()["code"] == "quota_exceeded"


# Corpora without jobs


def test_a_corpus_is_prepared_without_a_job(preparing: ServiceHarness) -> None:
    rig = preparing
    answer = rig.client.post("/corpora", json={"data_path": str(rig.corpus)})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    corpus_id = answer.json()["id"]
    assert answer.headers["Location"] == f"/corpora/{corpus_id}"
    rig.reconcile()
    assert rig.get(f"/corpora/{corpus_id}")["status"] == "preparing"
    assert rig.client.post("/corpora", json={"data_path": str(rig.corpus)}).json()["id"] == corpus_id
    finish(rig, process(rig, corpus_id))
    corpus = rig.get(f"/corpora/{corpus_id}")
    assert (corpus["status"], corpus["cached"], corpus["progress"]) == ("ready", True, None)
    again = rig.client.post("/corpora", json={"data_path": str(rig.corpus)})
    assert (again.status_code, again.json()["status"]) == (202, "ready")
    job_id = rig.submit()
    rig.reconcile()
    assert statuses(rig, job_id) == ["starting"]
    assert len(rig.launcher.starts) == 2


def test_all_mistakes_of_a_body_at_once_with_its_own_pointers(preparing: ServiceHarness) -> None:
    rig = preparing
    body = {"data_path": "/etc/passwd", "tokenizer_path": "/nowhere", "text_feld": "x", "max_bad_lines": 2}
    answer = rig.client.post("/corpora", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    errors = {error["pointer"]: error["message"] for error in answer.json()["errors"]}
    assert set(errors) == {"/data_path", "/tokenizer_path", "/text_feld", "/max_bad_lines"}
    assert "did you mean text_field" in errors["/text_feld"]
    assert "TRAINYARD_DATA_ROOTS" in errors["/data_path"]
    broken: object
    for broken in ([], None, "x", {}):
        assert rig.client.post("/corpora", json=broken).status_code == 422
    assert rig.get("/corpora")["data"] == []


def test_a_mixture_needs_no_length(preparing: ServiceHarness) -> None:
    rig = preparing
    sources = [{"name": "a", "path": str(rig.corpus), "weight": 1.0}]
    assert rig.client.post("/corpora", json={"sources": sources}).status_code == 202


def test_delete(preparing: ServiceHarness) -> None:
    rig = preparing
    job_id = rig.submit()
    rig.reconcile()
    corpus_id = corpus_of(rig, job_id)
    refused = rig.client.delete(f"/corpora/{corpus_id}")
    assert (refused.status_code, refused.json()["code"], refused.json()["jobs"]) == (409, "corpus_in_use", [job_id])
    attempt = process(rig, corpus_id)
    finish(rig, attempt)
    assert rig.client.delete(f"/corpora/{corpus_id}").status_code == 409  # it is starting
    running = rig.launcher.of(job_id)
    running.started()
    rig.ship(running)
    rig.exit(running, "completed", step=10)
    cache = CorpusCache(rig.settings.corpus_cache)
    with FileLock(cache.used("a" * 32)).take(shared=True):
        assert rig.client.delete(f"/corpora/{corpus_id}").json()["code"] == "corpus_in_use"
    assert rig.client.delete(f"/corpora/{corpus_id}").status_code == 204
    assert not cache.directory("a" * 32).exists()
    assert attempt.launch.task is not None
    assert find_prepared(cache.path, attempt.launch.task.parts) is None
    assert rig.client.get(f"/corpora/{corpus_id}").json()["code"] == "corpus_not_found"
    assert rig.client.delete("/corpora/corpus_nothere").status_code == 404


def test_shards_that_another_corpus_has_stay(preparing: ServiceHarness) -> None:
    rig = preparing
    ids = []
    for fraction in (0.01, 0.5):  # two corpora of the same file, and so with the same shards
        body = {"data_path": str(rig.corpus), "max_bad_lines": fraction}
        ids.append(rig.client.post("/corpora", json=body).json()["id"])
        rig.reconcile()
        finish(rig, process(rig, ids[-1]))
    directory = CorpusCache(rig.settings.corpus_cache).directory("a" * 32)
    assert rig.client.delete(f"/corpora/{ids[0]}").status_code == 204
    assert directory.exists()
    assert rig.client.delete(f"/corpora/{ids[1]}").status_code == 204
    assert not directory.exists()


def test_delete_stops_a_preparation_that_no_job_waits_for(preparing: ServiceHarness) -> None:
    rig = preparing
    corpus_id = rig.client.post("/corpora", json={"data_path": str(rig.corpus)}).json()["id"]
    rig.reconcile()
    assert rig.client.delete(f"/corpora/{corpus_id}").status_code == 204
    assert rig.get("/corpora")["data"] == []
    look(rig)
    attempt = process(rig, corpus_id)
    assert attempt.stop_asked == 1
    attempt.end("stopped", Reason.USER)
    look(rig)
    other = rig.client.post("/corpora", json={"data_path": str(rig.corpus)}).json()["id"]
    assert other != corpus_id


def test_delete_of_one_that_has_just_been_deleted(preparing: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = preparing
    corpus_id = rig.client.post("/corpora", json={"data_path": str(rig.corpus)}).json()["id"]
    rig.reconcile()
    finish(rig, process(rig, corpus_id))

    def delete_first(*_: object) -> bool:
        monkeypatch.undo()
        assert rig.client.delete(f"/corpora/{corpus_id}").status_code == 204
        return False

    monkeypatch.setattr(corpora, "is_open", delete_first)
    assert rig.client.delete(f"/corpora/{corpus_id}").json()["code"] == "corpus_not_found"


@pytest.mark.parametrize("outcome", ["completed", "failed"])
def test_a_job_that_is_cancelled_or_deleted_meanwhile_is_left_alone(
    preparing: ServiceHarness, monkeypatch: pytest.MonkeyPatch, outcome: Any
) -> None:
    rig = preparing
    cancelled, deleted, waiting = (rig.submit() for _ in range(3))
    corpus_id = corpus_of(rig, waiting)
    rig.post_action(cancelled, "cancel")
    rig.post_action(deleted, "cancel")
    assert rig.client.delete(f"/jobs/{deleted}").status_code == 204
    # As if both were read before: without locks, a request may change them until each is locked.
    monkeypatch.setattr(registry, "jobs_of", lambda *_: [cancelled, deleted, waiting])
    rig.reconcile()
    assert statuses(rig, waiting) == ["preparing"]
    put_into_cache(rig, process(rig, corpus_id))
    process(rig, corpus_id).end(outcome, Reason.DATA_INVALID if outcome == "failed" else None)
    look(rig)
    assert statuses(rig, cancelled) == ["cancelled"]
    assert statuses(rig, waiting) == (
        ["preparing", "queued", "starting"] if outcome == "completed" else ["preparing", "failed"]
    )


def test_pages(preparing: ServiceHarness) -> None:
    rig = preparing
    made = [
        rig.client.post("/corpora", json={"data_path": str(rig.corpus), "max_bad_lines": number / 10}).json()["id"]
        for number in range(3)
    ]
    first = rig.get("/corpora", limit=2)
    assert ([corpus["id"] for corpus in first["data"]], first["has_more"]) == (made[:0:-1], True)
    rest = rig.get("/corpora", after=made[1])
    assert ([corpus["id"] for corpus in rest["data"]], rest["has_more"]) == (made[:1], False)


# The key of a corpus


def data(path: object, **fields: Any) -> DataSpec:
    given = path if isinstance(path, list) else str(path)
    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": given, **fields}})).data


def key_of(path: object, **fields: Any) -> str:
    return corpus_key(corpus_parts(data(path, **fields)))


def test_the_key_has_what_decides_the_tokens_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "one"}\n')
    key = key_of(file)
    for same in ({"max_seq_len": 64}, {"packing": "none"}, {"eval_fraction": 0.1}, {"num_workers": 2}):
        assert key_of(file, **same) == key, same
    for path in (tmp_path, [str(file)], tmp_path / "*.jsonl"):
        assert key_of(path) == key, path
    for other in ({"text_field": "t"}, {"special_tokens": "tokens"}, {"eval_data_path": str(file)}):
        assert key_of(file, **other) != key, other
    os.utime(file, (1, 1))
    assert key_of(file) != key
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        key_of(file)


def test_a_mixture_of_prepared_parts_is_prepared(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    sources = []
    for number, file in enumerate(files):
        file.write_text('{"text": "one"}\n')
        sources.append({"name": f"s{number}", "path": str(file), "weight": number + 1.0})
    spec = {
        "data": {"sources": sources, "eval_sources": [{"name": "held", "path": str(files[0]), "max_tokens": 5}]},
        "training": {"max_steps": 1},
    }
    mixture = corpus_parts(JobSpec.model_validate_json(json.dumps(spec)).data)
    for number, file in enumerate(files):
        assert find_prepared(tmp_path, mixture) is None
        shards = str(number) * 32
        (tmp_path / shards).mkdir()
        (tmp_path / shards / "meta.json").write_text("{}")
        mark_prepared(tmp_path, corpus_parts(data(file)), {("data", False): shards})
    found = find_prepared(tmp_path, mixture)
    assert found is not None
    assert [source.key for source in (*found.sources, *found.held_out)] == ["0" * 32, "1" * 32, "0" * 32]


class History:
    """Random actions, crashes and restarts. ``step`` does one and lets the scheduler act."""

    def __init__(self, rig: ServiceHarness, seed: int) -> None:
        self.rig, self.chance, self.jobs = rig, random.Random(seed), list[str]()
        self.files = [rig.home / f"c{number}.jsonl" for number in range(3)]
        for number, file in enumerate(self.files):
            file.write_text(json.dumps({"text": str(number)}) + "\n")

    def living(self) -> list[FakeAttempt]:
        alive = (AttemptState.ALIVE, AttemptState.ORPHANED)
        attempts = self.rig.launcher.attempts.items()
        return [a for name, a in attempts if name.job_id.startswith("corpus") and a.state in alive]

    def step(self) -> None:
        living = self.living()
        events: list[Callable[[], object]] = [self.act, self.restart, self.wait]
        events += [self.submit] if len(self.jobs) < 8 else []
        if living:
            one = self.chance.choice(living)
            events += [
                lambda: progress(one, self.chance.randint(1, 1000)),
                lambda: one.end("crashed", Reason.WORKER_CRASHED),
                one.lose_agent,
                lambda: self.complete(one),
                lambda: one.end("stopped", Reason.USER) if one.stop_asked else None,
            ]
        self.chance.choice(events)()
        self.rig.reconcile()

    def submit(self) -> None:
        self.jobs.append(self.rig.submit(data={"data_path": str(self.chance.choice(self.files))}))

    def act(self) -> None:
        if self.jobs:
            verb = self.chance.choice(["pause", "cancel", "kill", "resume"])
            self.rig.client.post(f"/jobs/{self.chance.choice(self.jobs)}/{verb}")

    def complete(self, attempt: FakeAttempt) -> None:
        put_into_cache(self.rig, attempt, str(self.chance.randint(0, 1)) * 32)
        attempt.end("completed")

    def restart(self) -> None:
        self.rig = self.rig.restart()

    def wait(self) -> None:
        self.rig.clock.forward(self.chance.choice([0.1, 1, 30]))


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_leave_no_job_behind(make_rig: MakeRig, seed: int, any_url: str) -> None:
    print("seed", seed)
    history = History(make_rig(any_url, prepares=True), seed)
    for _ in range(60):
        history.step()
        names = [attempt.launch.name.job_id for attempt in history.living()]
        assert len(names) == len(set(names)), "two processes of one corpus"
    rig = history.rig
    for _ in range(20):
        for attempt in history.living():
            history.complete(attempt)
        rig.clock.forward(70)
        rig.reconcile()
    now = {job_id: rig.job(job_id) for job_id in history.jobs}
    assert JobStatus.PREPARING not in {job["status"] for job in now.values()}
    waiting = [job["queue"]["waiting_for"] for job in now.values() if job["status"] == "queued"]
    assert all("CPU slot" in text for text in waiting), waiting
    rig.close()
