"""Scores on tasks: what runs report, what is listed, and task files that are refused at submit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.launcher import FakeAttempt
from tests.service.harness import ServiceHarness
from trainyard.contract.status import JobStatus, Reason

CHOICE = {"context": "The sky is", "choices": [" blue", " red"], "answer": 0}


def report_score(attempt: FakeAttempt, step: int, task: str = "arc", acc: float | None = 0.5, **fields: Any) -> None:
    values = {"task_kind": "choice", "examples": 10, "acc": acc, "acc_norm": 0.25, "bpb": 1.5, "truncated": 1}
    attempt.say("task", **{**values, "step": step, "task": task, "file_sha256": "f" * 64, "seconds": 2.5, **fields})


def listed(rig: ServiceHarness, job_id: str, **params: Any) -> list[tuple[int, str, float | None]]:
    return [(row["step"], row["task"], row["acc"]) for row in rig.data(job_id, "evaluations", **params)]


def task_file(rig: ServiceHarness, *lines: object, name: str = "task.jsonl") -> str:
    path = rig.home / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def test_scores_are_listed_by_step_and_task(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, attempt = rig.running()
    report_score(attempt, 2, "b", task_kind="continuation", acc_norm=None)
    report_score(attempt, 4, "b")
    report_score(attempt, 4, "a", None, acc_norm=None, bpb=None)
    rig.ship(attempt)
    rig.ship(attempt)
    assert listed(rig, job_id) == [(2, "b", 0.5), (4, "a", None), (4, "b", 0.5)]
    assert listed(rig, job_id, step=4, task="b") == [(4, "b", 0.5)]
    first = rig.data(job_id, "evaluations", limit=1)[0]
    assert listed(rig, job_id, after=first["id"], limit=1) == [(4, "a", None)]
    assert {**first, "id": "", "created_at": "", "finished_at": ""} == {
        "object": "task_score",
        "id": "",
        "evaluation_id": None,
        "job_id": job_id,
        "attempt": 1,
        "step": 2,
        "task": "b",
        "kind": "continuation",
        "state": "done",
        "examples": 10,
        "acc": 0.5,
        "acc_norm": None,
        "bpb": 1.5,
        "truncated": 1,
        "path": None,
        "file_sha256": "f" * 64,
        "seconds": 2.5,
        "device": None,
        "error": None,
        "requested_by": None,
        "created_at": "",
        "started_at": None,
        "finished_at": "",
    }
    assert rig.get("/jobs/job_none/evaluations", 404)["code"] == "job_not_found"
    for after in ("x", "999", "-1"):
        assert rig.get(f"/jobs/{job_id}/evaluations", 422, after=after)["errors"][0]["pointer"] == "/query/after"


def test_each_step_has_the_scores_of_the_newest_attempt(any_rig: ServiceHarness) -> None:
    rig = any_rig
    job_id, first = rig.running(steps=20)
    for step in (4, 8, 12):
        report_score(first, step, acc=0.1)
    # The attempt rolls back to step 6, and scores step 8 again.
    report_score(first, 8, acc=0.2)
    rig.ship(first)
    assert listed(rig, job_id) == [(4, "arc", 0.1), (8, "arc", 0.2)]
    rig.exit(first, "crashed", Reason.WORKER_CRASHED, 12)
    rig.clock.forward(600)
    second = rig.next_attempt(job_id, 2, start_step=4, steps=20)
    assert listed(rig, job_id) == [(4, "arc", 0.1)]
    # The first attempt was killed while it scored step 4: the second one has scored the other task.
    report_score(second, 4, "other", acc=0.3)
    report_score(second, 8, acc=0.3)
    rig.ship(second)
    assert listed(rig, job_id) == [(4, "arc", 0.1), (4, "other", 0.3), (8, "arc", 0.3)]
    assert rig.status(job_id) is JobStatus.RUNNING


def test_bad_task_files_are_refused_with_every_line(rig: ServiceHarness) -> None:
    def task(name: str, path: str, kind: str = "choice") -> dict[str, str]:
        return {"name": name, "path": path, "kind": kind}

    outside = Path("/etc/hostname")
    tasks = [
        task("good", task_file(rig, CHOICE, name="good.jsonl")),
        task("bad", task_file(rig, CHOICE, "{", {**CHOICE, "answer": 2}, name="bad.jsonl")),
        task("kind", task_file(rig, CHOICE, name="kind.jsonl"), "continuation"),
        task("none", str(rig.home / "none.jsonl")),
        task("empty", task_file(rig, name="empty.jsonl")),
        task("blank", task_file(rig, "", name="blank.jsonl")),
        task("folder", str(rig.home)),
        task("outside", str(outside)),
        task("relative", "task.jsonl"),
        task("good", task_file(rig, CHOICE, name="good.jsonl")),
    ]
    answer = rig.client.post("/jobs", json=rig.spec(evaluation={"tasks": tasks}))
    assert answer.status_code == 422
    found = {error["pointer"].removeprefix("/evaluation/tasks/"): error["message"] for error in answer.json()["errors"]}
    assert found.pop("7/path").startswith("lies outside the directories that TRAINYARD_DATA_ROOTS allows")
    assert found.pop("8/path").startswith("must be absolute")
    assert found == {
        "1/path": "has 2 bad lines: line 2: not JSON at character 2; "
        "line 3: 'answer' must be an integer from 0 to 1, the index of the right choice",
        "2/path": "has 1 bad line: line 1: has 'choices' and no 'continuation': kind must be \"choice\"",
        "3/path": "does not exist or cannot be reached",
        "4/path": "is empty",
        "5/path": "holds no example: a task file has one JSON object per line",
        "6/path": "must be a regular file",
        "9/name": "is the name of an earlier task",
    }


def test_the_stored_spec_has_real_paths(rig: ServiceHarness) -> None:
    link = rig.home / "link.jsonl"
    link.symlink_to(task_file(rig, CHOICE))
    job_id = rig.submit(evaluation={"tasks": [{"name": "t", "path": str(link), "kind": "choice"}], "interval": 5})
    assert rig.job(job_id)["spec"]["evaluation"] == {
        "tasks": [{"name": "t", "path": str((rig.home / "task.jsonl").resolve()), "kind": "choice"}],
        "interval": 5,
    }


def test_every_mistake_of_every_task_is_reported(rig: ServiceHarness) -> None:
    tasks: list[Any] = [{"name": "a b", "path": "", "kind": "choise"}, {"x": 1}, 3]
    answer = rig.client.post("/jobs", json=rig.spec(evaluation={"tasks": tasks, "interval": 0}))
    assert {error["pointer"] for error in answer.json()["errors"]} == {
        "/evaluation/interval",
        *(f"/evaluation/tasks/0/{leaf}" for leaf in ("name", "path", "kind")),
        *(f"/evaluation/tasks/1/{leaf}" for leaf in ("name", "path", "kind", "x")),
        "/evaluation/tasks/2",
    }


@pytest.mark.parametrize("step", [-1, 2**53])
def test_a_step_beyond_all_steps_is_no_step(rig: ServiceHarness, step: int) -> None:
    assert rig.get(f"/jobs/{rig.submit()}/evaluations", 422, step=step)["errors"][0]["pointer"] == "/query/step"
