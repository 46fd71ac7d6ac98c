"""The short forms of responses."""

from typing import Any

import pytest

from trainyard.mcp_tools.answers import as_table, brief_plan, compact, comparison_notes, differences, full_job


def job(name: str, status: str = "succeeded", metric: str | None = "bpb", **more: Any) -> dict[str, Any]:
    score = None if metric is None else {"metric": metric, "value": 1.0, "step": 3}
    return {"id": f"job_{name}", "name": name, "status": status, "score": score, **more}


def test_what_is_unknown_is_left_out_and_numbers_are_short() -> None:
    given: dict[str, Any] = {
        "a": None,
        "b": "",
        "c": [],
        "d": {},
        "e": 0,
        "f": False,
        "g": 1 / 3,
        "h": 123456789.5,
        "i": 123456789,
    }
    assert compact(given) == {"e": 0, "f": False, "g": 0.33333, "h": 1.2346e8, "i": 123456789}


def test_a_table_has_no_column_without_a_value() -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 2.123456, "mfu": None}, {"step": 2, "loss": None}]
    table = as_table(rows, ["step", "loss", "mfu", "absent"])
    assert table == {"columns": ["step", "loss"], "rows": [[1, 2.1235], [2, None]]}
    assert as_table([], ["step"]) == {"columns": [], "rows": []}


def test_a_plan_without_all_parts_of_the_memory_has_no_sum() -> None:
    assert brief_plan({"memory_bytes": {"weights": 1, "gradients": 2}, "steps": 3}) == {"memory_bytes": 3, "steps": 3}
    assert brief_plan({"memory_bytes": {"weights": 1, "gradients": None}}) == {}
    assert brief_plan({}) == {}


def test_only_settings_that_differ_are_compared() -> None:
    one = {"name": "a", "group": "g", "training": {"lr": 1, "betas": [0.9, 0.95]}, "checkpoint": {"save_dir": "/a"}}
    two = {"name": "b", "group": "g", "training": {"lr": 2, "betas": [0.9, 0.95]}, "checkpoint": {"save_dir": "/b"}}
    found = differences({"x": one, "y": {**two, "limits": {"max_minutes": 5}}})
    assert found == {"training.lr": {"x": 1, "y": 2}, "limits.max_minutes": {"x": None, "y": 5}}


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ([job("a"), job("b")], []),
        ([job("a"), job("b", metric="loss")], ["different metrics"]),
        ([job("a", metric="loss"), job("b", metric="loss")], ["training losses"]),
        ([job("a"), job("b", metric=None)], ["No score yet: b"]),
        ([job("a"), job("b", "running")], ["Not at an end: b"]),
        ([job("a"), job("b", "interrupted", restart_at="2026-01-01T00:00:00Z")], ["Not at an end: b"]),
        ([job("a"), job("b", "interrupted", restart_at=None)], []),
    ],
)
def test_what_makes_scores_hard_to_compare_is_noted(jobs: list[dict[str, Any]], words: list[str]) -> None:
    notes = comparison_notes(jobs)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_a_failed_job_has_its_reason_and_the_end_of_its_log() -> None:
    error = {
        "code": "oom",
        "message": "out of memory",
        "hint": "halve the batch",
        "rank": 0,
        "traceback": "long",
        "log_tail": [str(line) for line in range(40)],
        "next": [{"action": "resume", "words": "resume with batch_size 4", "command": "...", "path": "..."}],
    }
    shown = full_job(job("a", "failed", error=error, allowed_actions=[{"action": "resume", "allowed": True}]))
    assert shown["error"] == {
        "code": "oom",
        "message": "out of memory",
        "hint": "halve the batch",
        "rank": 0,
        "log_tail": [str(line) for line in range(25, 40)],
        "next": ["resume with batch_size 4"],
    }
    assert shown["can"] == ["resume"]
