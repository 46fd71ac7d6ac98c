"""`trainyard evaluate` and `trainyard evaluations`, against a fake service."""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, body_of
from trainyard.client.api import Client

JOB = "job_7f3kq9"


def score(**changes: Any) -> dict[str, Any]:
    made = {"task": "arc", "step": 12000, "state": "done", "acc": 0.5, "acc_norm": None, "bpb": 1.25, "examples": 1000}
    return {**made, "evaluation_id": "eval_a", "device": "cpu", "error": None, "id": "1"} | changes


def evaluation(state: str, *results: dict[str, Any]) -> dict[str, Any]:
    return {
        "object": "evaluation",
        "id": "eval_a",
        "job_id": JOB,
        "step": 12000,
        "state": state,
        "results": list(results or [score()]),
    }


@pytest.fixture
def evaluator(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> FakeService:
    """Pending, then running, then done."""
    states = iter(["running", "done"])
    answered = service._job  # noqa: SLF001

    def job(request: httpx2.Request, job_id: str, *below: str) -> httpx2.Response:
        if below[-1:] == ("evaluate",):
            return httpx2.Response(202, json=evaluation("pending", score(state="pending", acc=None, bpb=None)))
        if below[:1] == ("evaluations",) and len(below) == 2:
            return httpx2.Response(200, json=evaluation(next(states)))
        return answered(request, job_id, *below)

    monkeypatch.setattr(service, "_job", job)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return service


def task_file(tmp_path: Path, name: str, content: object) -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else f"\n{json.dumps(content)}\n")
    return path


def test_evaluate_waits_and_prints_the_scores(evaluator: FakeService, run: Run, tmp_path: Path) -> None:
    arc = task_file(tmp_path, "arc.jsonl", {"context": "", "choices": ["a", "b"], "answer": 0})
    facts = task_file(tmp_path, "facts.jsonl", {"context": "", "continuation": "a"})
    code, out, err = run("evaluate", "pre-12@12000", "--task", f"arc={arc}", "--task", f"facts={facts}")
    assert code == 0, err
    asked = next(request for request in evaluator.requests if request.method == "POST")
    assert asked.url.path == f"/jobs/{JOB}/checkpoints/12000/evaluate"
    assert body_of(asked) == {
        "tasks": [
            {"name": "arc", "path": str(arc), "kind": "choice"},
            {"name": "facts", "path": str(facts), "kind": "continuation"},
        ]
    }
    assert out.splitlines()[1].split() == ["12,000", "arc", "0.5000", "1.2500", "1,000", "on", "cpu"]
    assert "evaluating step 12,000" in err


def test_evaluate_without_waiting_takes_the_newest_checkpoint_and_the_spec_s_tasks(
    evaluator: FakeService, run: Run
) -> None:
    code, out, err = run("evaluate", "pre-12", "--no-wait", "--json")
    assert code == 0, err
    assert json.loads(out)["state"] == "pending"
    assert evaluator.requests[-1].url.path == f"/jobs/{JOB}/checkpoints/latest/evaluate"
    assert evaluator.requests[-1].content in (b"", b"null")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "arc"], "--task takes NAME=FILE"),
        (["--task", "arc=none.jsonl"], "cannot be read: No such file or directory; give --kind"),
        (["--task", "arc={bad}"], "the first line must be a JSON object"),
        (["--task", "arc={other}"], "has neither 'choices' nor 'continuation'"),
        (["--step", "3"], "give either pre-12@5 or --step"),
    ],
)
def test_wrong_usage(evaluator: FakeService, run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    places = {"bad": task_file(tmp_path, "bad", "["), "other": task_file(tmp_path, "other", {"text": ""})}
    code, _, err = run("evaluate", "pre-12@5", *(word.format(**places) for word in words))
    assert code == 2
    assert message in err


def test_a_failed_evaluation_has_its_own_exit_code(
    service: FakeService, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = evaluation("failed", score(state="failed", acc=None, bpb=None, error="out of memory"))
    monkeypatch.setattr(Client, "evaluate", lambda *_: failed)
    code, out, _ = run("evaluate", "pre-12")
    assert code == 10
    assert out.rstrip().endswith("failed: out of memory")


def test_scores_are_listed_and_shown(service: FakeService, run: Run) -> None:
    service.rows = {"evaluations": [score(evaluation_id=None, device=None), score(task="b", acc=None, bpb=None)]}
    lines = run("evaluations", "pre-12", "--task", "arc")[1].splitlines()
    assert lines[1].split() == ["12,000", "arc", "0.5000", "1.2500", "1,000", "in", "training"]
    assert service.requests[-1].url.params["task"] == "arc"
    shown = run("show", "pre-12")[1]
    assert "  task arc: acc 0.5000, bpb 1.2500, step 12,000\n" in shown
    assert "  task b: not finite, step 12,000\n" in shown
