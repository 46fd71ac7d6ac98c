"""Evaluations of checkpoints on request: in side processes, a few at a time, over restarts, removals and deletions."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.test_checkpoints import at_rest, resume_elsewhere, saved
from tests.service.test_evaluations import CHOICE, listed, task_file
from trainyard.contract.status import Reason
from trainyard.service.api.dependencies import AppState
from trainyard.service.db.models import EvaluationRow
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.evaluations import requests, runner

PROCESS = """
import json, os, pathlib, socket, sys, time
link = socket.socket(fileno=int(os.environ["TRAINYARD_SIDECAR_DESCRIPTOR"])).makefile("rwb")
request = json.loads(link.readline())
def send(**line):
    link.write(json.dumps(line).encode() + b"\\n")
    link.flush()
home = pathlib.Path(sys.argv[1])
(home / "requests").open("a").write(json.dumps({**request, "cuda": os.environ["CUDA_VISIBLE_DEVICES"]}) + "\\n")
files = sorted(os.listdir(request["checkpoint"]))
for task in request["tasks"]:
    name = task["name"]
    if "wait" in name:
        (home / "waiting").touch()
        while not (home / "go").exists():
            send(event="progress", done=0, total=2)
            time.sleep(0.02)
    if "die" in name:
        os._exit(1)
    if "refuse" in name:
        send(event="failed", message="the checkpoint cannot be loaded: no")
        os._exit(1)
    if "bad" in name:
        send(event="task_failed", task=name, message="/x has 1 bad line: line 3: not JSON")
        continue
    send(event="scored", step=request["step"], task=name, task_kind=task["kind"], examples=len(files), acc=0.5,
         acc_norm=None, bpb=1.25, truncated=0, file_sha256="e" * 64, seconds=0.5)
send(event="done")
"""


@pytest.fixture
def evaluator(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceHarness]:
    """A service whose evaluations run a process that needs no torch."""
    script = rig.home / "process.py"
    script.write_text(PROCESS)
    monkeypatch.setattr(runner, "PROGRAM", (str(script), str(rig.home)))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    yield rig
    (rig.home / "go").touch()
    state_of(rig).evaluations.stop()
    state_of(rig).sidecars.close()


def state_of(rig: ServiceHarness) -> AppState:
    state: AppState = rig.app.state.app_state
    return state


def run_all(rig: ServiceHarness) -> None:
    """Start pending evaluations, and wait for their end."""
    evaluations = state_of(rig).evaluations
    for _ in range(10):
        evaluations.round()
        evaluations.join(60)


def tasks(rig: ServiceHarness, *names: str) -> list[dict[str, str]]:
    path = task_file(rig, CHOICE)
    return [{"name": name, "path": path, "kind": "choice"} for name in names]


def evaluate(rig: ServiceHarness, job_id: str, step: object, status: int = 202, **body: Any) -> dict[str, Any]:
    answer = rig.client.post(f"/jobs/{job_id}/checkpoints/{step}/evaluate", json=body or None)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def again(rig: ServiceHarness, evaluation: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rig.get(f"/jobs/{evaluation['job_id']}/evaluations/{evaluation['id']}")
    return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_is_evaluated_on_request(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10, 20, training={"dtype": "float32", "batch_size": 4})
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "b", "a"))
    assert (asked["state"], asked["step"], asked["requested_by"], asked["device"]) == ("pending", 10, "local", None)
    assert [(row["task"], row["state"], row["acc"]) for row in asked["results"]] == [
        ("b", "pending", None),
        ("a", "pending", None),
    ]
    newest = evaluate(rig, job_id, "latest", tasks=tasks(rig, "a"))
    assert newest["step"] == 20
    run_all(rig)
    done = again(rig, asked)
    assert (done["state"], done["device"], done["error"]) == ("done", "cpu", None)
    assert done["started_at"] is not None
    assert done["finished_at"] is not None
    assert listed(rig, job_id) == [(10, "a", 0.5), (10, "b", 0.5), (20, "a", 0.5)]
    row = rig.data(job_id, "evaluations", task="b")[0]
    assert (row["evaluation_id"], row["attempt"], row["examples"], row["bpb"]) == (asked["id"], None, 3, 1.25)
    assert row["path"] == str((rig.home / "task.jsonl").resolve())
    request = json.loads((rig.home / "requests").read_text().splitlines()[0])
    assert (request["dtype"], request["batch_tokens"], request["tokenizer_path"]) == ("float32", 4 * 340, "byte")
    assert request["cuda"] == ""
    events = [event["message"] for event in rig.data(job_id, "events") if event["kind"] == "evaluation"]
    assert events[0] == "requested an evaluation of the checkpoint of step 10 on b, a"
    assert "evaluated the checkpoint of step 10 on b: acc 0.5000, bpb 1.2500" in events
    assert not (rig.home / "runs" / job_id / "evaluations").exists(), "the links are gone"


def test_after_an_internal_error_the_weights_are_released(
    evaluator: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10)
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "a"))

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(state_of(rig).evaluations, "_store", fail)
    run_all(rig)
    failed = again(rig, asked)
    assert (failed["state"], failed["error"]) == ("failed", runner.BROKEN)
    assert not (rig.home / "runs" / job_id / "evaluations").exists()


def test_without_tasks_those_of_the_spec_are_taken(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10, evaluation={"tasks": tasks(rig, "own")})
    assert [row["task"] for row in evaluate(rig, job_id, 10)["results"]] == ["own"]
    other, _ = saved(rig, 10)
    assert evaluate(rig, other, 10, 422)["errors"][0]["pointer"] == "/tasks"


def test_bad_requests_are_refused_with_every_mistake(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10)
    bad = {"name": "c", "path": task_file(rig, "{", name="bad.jsonl"), "kind": "choice"}
    answer = evaluate(rig, job_id, 10, 422, tasks=[*tasks(rig, "a", "a"), bad])
    assert {error["pointer"]: error["message"] for error in answer["errors"]} == {
        "/tasks/1/name": "is the name of an earlier task",
        "/tasks/2/path": "has 1 bad line: line 1: not JSON at character 2",
    }
    answer = evaluate(rig, job_id, 10, 422, tasks=[{"name": "a b", "kind": 3}], more=1)
    assert {error["pointer"] for error in answer["errors"]} == {
        "/more",
        *(f"/tasks/0/{leaf}" for leaf in ("name", "path", "kind")),
    }
    for step in ("newest", "-1", "1.5", "9" * 16):
        assert evaluate(rig, job_id, step, 422, tasks=tasks(rig, "a"))["errors"][0]["pointer"] == "/path/step"
    assert evaluate(rig, job_id, 11, 404, tasks=tasks(rig, "a"))["code"] == "checkpoint_not_found"
    assert evaluate(rig, "job_none", 10, 404, tasks=tasks(rig, "a"))["code"] == "job_not_found"
    assert evaluate(rig, rig.submit(), "latest", 404, tasks=tasks(rig, "a"))["code"] == "checkpoint_not_found"
    assert rig.get(f"/jobs/{job_id}/evaluations/eval_none", 404)["code"] == "evaluation_not_found"
    assert not (rig.home / "runs" / job_id / "evaluations").exists()
    assert rig.data(job_id, "evaluations") == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("die", "the process ended before it was done"),
        ("refuse", "the checkpoint cannot be loaded: no"),
        ("bad", "/x has 1 bad line: line 3: not JSON"),
    ],
)
def test_a_failure_has_its_reason_and_keeps_earlier_scores(evaluator: ServiceHarness, name: str, reason: str) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10)
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "first", name))
    run_all(rig)
    done = again(rig, asked)
    assert (done["state"], [row["state"] for row in done["results"]]) == ("failed", ["done", "failed"])
    assert done["error"].startswith(reason)
    assert not (rig.home / "runs" / job_id / "evaluations").exists()


def test_a_checkpoint_that_is_removed_meanwhile_is_still_evaluated(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10, 20)
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "a"))
    shutil.rmtree(rig.home / "runs" / job_id / "checkpoints" / "step-00000010")
    assert evaluate(rig, job_id, 10, 404, tasks=tasks(rig, "a"))["code"] == "checkpoint_not_found"
    run_all(rig)
    assert again(rig, asked)["state"] == "done"
    other = evaluate(rig, job_id, 20, tasks=tasks(rig, "a"))
    shutil.rmtree(rig.home / "runs" / job_id / "evaluations")
    run_all(rig)
    assert again(rig, other)["error"] == runner.GONE


def test_an_evaluation_finds_its_weights_after_a_resume_with_another_save_dir(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id = at_rest(rig, 10)
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "a"))
    resume_elsewhere(rig, job_id)
    run_all(rig)
    assert again(rig, asked)["state"] == "done"
    assert not (rig.home / "runs" / job_id / "evaluations").exists()
    assert again(rig, evaluate(rig, job_id, 10, tasks=tasks(rig, "b")))["state"] == "pending"


def test_a_job_that_is_deleted_meanwhile_ends_its_evaluation(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, attempt = saved(rig, 10)
    rig.exit(attempt, "completed", None, 10)
    evaluate(rig, job_id, 10, tasks=tasks(rig, "wait"))
    state_of(rig).evaluations.round()
    until((rig.home / "waiting").exists)
    assert rig.client.delete(f"/jobs/{job_id}").status_code == 204
    rig.clock.forward(10)
    state_of(rig).evaluations.join(60)
    with rig.database.read() as session:
        assert session.scalars(select(EvaluationRow)).all() == []
    assert not (rig.home / "runs" / job_id).exists()


def test_few_run_at_once_and_few_wait(evaluator: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = evaluator
    monkeypatch.setattr(requests, "MAX_OPEN", 3)
    job_id, _ = saved(rig, 10)
    asked = [evaluate(rig, job_id, 10, tasks=tasks(rig, name)) for name in ("wait", "b", "c")]
    assert evaluate(rig, job_id, 10, 429, tasks=tasks(rig, "d"))["code"] == "too_many_evaluations"
    state_of(rig).evaluations.round()
    until((rig.home / "waiting").exists)
    state_of(rig).evaluations.round()
    assert [again(rig, one)["state"] for one in asked] == ["running", "pending", "pending"]
    (rig.home / "go").touch()
    run_all(rig)
    assert [again(rig, one)["state"] for one in asked] == ["done", "done", "done"]
    assert len(list((rig.home / "runs" / job_id).glob("evaluations/*"))) == 0


def test_a_restart_of_the_service_continues(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, _ = saved(rig, 10)
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "first", "wait"))
    state_of(rig).evaluations.round()
    until((rig.home / "waiting").exists)
    # The process has sent the first score. That the service has stored it comes later.
    until(lambda: again(rig, asked)["results"][0]["state"] == "done")
    rig = rig.restart()
    found = again(rig, asked)
    assert (found["state"], [row["state"] for row in found["results"]]) == ("running", ["done", "running"])
    (rig.home / "go").touch()
    run_all(rig)
    assert again(rig, asked)["state"] == "done"
    requests_made = [json.loads(line) for line in (rig.home / "requests").read_text().splitlines()]
    assert [[task["name"] for task in one["tasks"]] for one in requests_made] == [["first", "wait"], ["wait"]]
    rig.close()


def test_a_gpu_is_used_if_it_is_free_and_given_back_to_a_job(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(sqlite_url, devices=(Device("cuda:0", "cuda"), *cpu_slots(2)))
    script = rig.home / "process.py"
    script.write_text(PROCESS)
    monkeypatch.setattr(runner, "PROGRAM", (str(script), str(rig.home)))
    job_id, attempt = saved(rig, 10, resources={"device": "cpu"})
    asked = evaluate(rig, job_id, 10, tasks=tasks(rig, "wait"))
    state_of(rig).evaluations.round()
    until((rig.home / "waiting").exists)
    assert again(rig, asked)["device"] == "cuda:0"
    waiting = rig.submit(resources={"device": "cuda"})
    rig.reconcile()
    rig.reconcile()
    assert rig.status(waiting).value in ("starting", "running"), "the job goes first"
    until(lambda: again(rig, asked)["device"] == "cpu")
    (rig.home / "go").touch()
    state_of(rig).evaluations.join(60)
    assert again(rig, asked)["state"] == "done"
    assert attempt.report is None
    lines = (rig.home / "requests").read_text().splitlines()
    assert [json.loads(line)["cuda"] for line in lines] == ["0", ""]


@pytest.mark.parametrize("missing", ["torch", "room"])
def test_a_service_without_torch_or_processes_rejects_evaluations(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    rig = make_rig(sqlite_url, TRAINYARD_EVALUATION_PROCESSES="0" if missing == "room" else "1")
    found = importlib.util.find_spec
    if missing == "torch":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    job_id, _ = saved(rig, 10)
    assert evaluate(rig, job_id, 10, 501, tasks=tasks(rig, "a"))["code"] == "evaluation_unavailable"


def test_a_rewound_run_hides_the_scores_of_what_it_left(evaluator: ServiceHarness) -> None:
    rig = evaluator
    job_id, attempt = saved(rig, 10, 20)
    evaluate(rig, job_id, 20, tasks=tasks(rig, "a"))
    run_all(rig)
    assert listed(rig, job_id) == [(20, "a", 0.5)]
    rig.exit(attempt, "crashed", Reason.WORKER_CRASHED, 20)
    rig.clock.forward(600)
    rig.next_attempt(job_id, 2, start_step=10, steps=1000)
    assert listed(rig, job_id) == []
