"""Tasks in real runs: they change nothing, do not depend on the ranks, and survive interruptions and kills."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from trainyard.contract.events import TaskScored
from trainyard.contract.failpoints import arm
from trainyard.contract.rundir import RunDir

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rank_runner.corpus(folder / "corpus.jsonl")
    words = sorted(set(rank_runner.WORDS))
    choices = [
        {"context": f"the {word}", "choices": [f" {other}" for other in words[i : i + 3]], "answer": i % 3}
        for i, word in enumerate(words[:-3])
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in choices))
    continuations = [{"context": f"{word} and", "continuation": f" {words[-i]}"} for i, word in enumerate(words)]
    (folder / "continuations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in continuations))
    return folder


def spec(data: Path, interval: int | None = 4, **changes: dict[str, Any]) -> dict[str, Any]:
    tasks = [
        {"name": "words", "path": str(data / "choices.jsonl"), "kind": "choice"},
        {"name": "ends", "path": str(data / "continuations.jsonl"), "kind": "continuation"},
    ]
    groups: dict[str, dict[str, Any]] = {
        "training": {"max_steps": 10, "dtype": "float32"},
        "model": {"dropout": 0.1},
        "evaluation": {"tasks": tasks, "interval": interval},
    }
    return rank_runner.spec(data / "corpus.jsonl", **{**groups, **changes})


def scores(run: RunDir, attempt: int | None = None) -> list[TaskScored]:
    """The scores that an attempt emitted, or all of them, in order."""
    numbers = [each.number for each in run.attempts()] if attempt is None else [attempt]
    return [event for n in numbers for event in rank_runner.events(run, n) if isinstance(event, TaskScored)]


def numbers(run: RunDir) -> dict[tuple[int, str], tuple[float | None, float | None, float | None]]:
    return {(each.step, each.task): (each.acc, each.acc_norm, each.bpb) for each in scores(run)}


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.long)])
def test_scoring_changes_no_bit(data: Path, tmp_path: Path, world: int) -> None:
    without, scored = (rank_runner.new_run(tmp_path / name, spec(data)) for name in ("without", "scored"))
    without.spec.write_text(json.dumps({**spec(data), "evaluation": {}}))
    for run in (without, scored):
        rank_runner.run_to_end(run, world)
    assert dict(rank_runner.outputs(scored)) == dict(rank_runner.outputs(without)), "weights and optimizer"
    assert rank_runner.curve(scored) == rank_runner.curve(without)
    assert scores(without) == []
    assert [(each.step, each.task) for each in scores(scored)] == [
        (step, task) for step in (4, 8, 10) for task in ("words", "ends")
    ]
    # The same weights on the other number of ranks: the last step again, in a run that has not scored it.
    again = rank_runner.new_run(tmp_path / "again", spec(data))
    (scored.path / "checkpoints").rename(again.path / "checkpoints")
    rank_runner.run_to_end(again, 3 - world)
    expected = {key: value for key, value in numbers(scored).items() if key[0] == 10}
    assert numbers(again).keys() == expected.keys()
    for key, values in numbers(again).items():
        assert values == pytest.approx(expected[key], abs=1e-6)


def at_batch(step: int, task: int, action: Any) -> None:
    """Call ``action`` before the first batch of the ``task``-th task after ``step``."""
    reached, tasks = [0], [0]

    def begin_step(_trainer: Any, progress: Any) -> None:
        reached[0], tasks[0] = progress.step + 1, 0

    def batch(start: int) -> None:
        tasks[0] += start == 0
        if (reached[0], tasks[0], start) == (step, task, 0):
            action()

    arm("train.step", begin_step)

    arm("tasks.batch", batch)


def stop_in_task(run: RunDir) -> None:
    at_batch(4, 2, run.attempt(1).stop.touch)


def die_in_task(run: RunDir) -> None:
    at_batch(8, 2, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_an_interrupted_scoring_is_finished_by_the_next_attempt(data: Path, tmp_path: Path) -> None:
    described = spec(data, checkpoint={"save_interval": 4})
    untouched, broken = (rank_runner.new_run(tmp_path / name, described) for name in ("untouched", "broken"))
    rank_runner.run_to_end(untouched)

    stopped = rank_runner.run_to_end(broken, patch=partial(stop_in_task, broken))
    assert (stopped.outcome, stopped.step) == ("stopped", 4)
    assert [(each.step, each.task) for each in scores(broken, 1)] == [(4, "words")]

    killed = rank_runner.start(broken, patch=partial(die_in_task, broken))
    assert killed.wait() == [-signal.SIGKILL]
    assert [(each.step, each.task) for each in scores(broken, 2)] == [(4, "ends"), (8, "words")]

    assert rank_runner.run_to_end(broken).step == 10
    assert numbers(broken) == numbers(untouched)
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)
    assert rank_runner.run_to_end(broken).step == 10
    assert scores(broken, 4) == [], "nothing is scored twice"


def test_by_default_tasks_are_scored_at_saves(data: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", spec(data, None, checkpoint={"save_interval": 5}))
    rank_runner.run_to_end(run)
    assert [each.step for each in scores(run) if each.task == "ends"] == [5, 10]
    assert {each.examples for each in scores(run)} == {13, 16}


def test_a_bad_task_file_ends_the_run_before_its_first_step(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "continuation": "b"}\n{"context": 3}\n')
    task = {"name": "bad", "path": str(bad), "kind": "continuation"}
    for path, words in (
        (bad, "bad.jsonl has 1 bad line: line 2:"),
        (tmp_path / "none", "cannot be read: No such file"),
    ):
        described = spec(data, evaluation={"tasks": [{**task, "path": str(path)}]})
        run = rank_runner.new_run(tmp_path / f"run-{path.name}", described)
        outcome = rank_runner.run_to_end(run, 2 if path == bad else 1)
        assert (outcome.outcome, outcome.step, outcome.reason) == ("failed", 0, "data_invalid")
        assert words in str(outcome.message)
        assert "evaluation.tasks[0]" in str(outcome.message)
