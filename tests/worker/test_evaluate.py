"""An evaluation that is interrupted costs nothing: its step is saved before it, and the next attempt does it."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from trainyard.contract.failpoints import arm
from trainyard.contract.rundir import RunDir
from trainyard.worker.attempt import evaluated_loss, scored_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 12 steps that evaluates 41 rows in batches of 4 at steps 4, 8 and 12, and saves at steps 8 and 12."""
    folder = tmp_path_factory.mktemp("data")
    held_out = rank_runner.corpus(folder / "held-out.jsonl", documents=41, seed=9)
    return rank_runner.spec(
        rank_runner.corpus(folder / "corpus.jsonl"),
        data={"eval_data_path": str(held_out), "packing": "none"},
        training={"max_steps": 12},
        reporting={"log_interval": 4, "eval_interval": 4},
    )


def in_evaluation(step: int, batch: int, action: Any) -> None:
    """Call ``action`` before a batch of the evaluation after ``step``."""
    reached = [0]
    arm("train.step", lambda _trainer, progress: reached.append(progress.step + 1))
    arm("evaluation.batch", lambda index: action() if (reached[-1], index) == (step, batch) else None)


def stop_in_evaluation(run: RunDir) -> None:
    in_evaluation(4, 2, run.attempt(1).stop.touch)


def die_once_saved(run: RunDir) -> None:
    """SIGKILL in the evaluation after step 8, once the checkpoint of that step is published."""

    def die() -> None:
        deadline = time.monotonic() + 60
        while not run.artifacts(None).checkpoint(8).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    in_evaluation(8, 1, die)


def evaluations(run: RunDir) -> dict[int, float | None]:
    """The evaluation of each step, by its last attempt."""
    return {
        step: line.eval_loss for each in run.attempts() for step, line in rank_runner.metrics(run, each.number).items()
    }


@pytest.mark.long
def test_an_interrupted_evaluation_is_done_by_the_next_attempt(described: dict[str, Any], tmp_path: Path) -> None:
    untouched, broken = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "broken"))
    rank_runner.run_to_end(untouched)

    stopped = rank_runner.run_to_end(broken, patch=partial(stop_in_evaluation, broken))
    assert (stopped.outcome, stopped.step, stopped.message) == ("stopped", 4, "saved at step 4")
    assert rank_runner.saves(broken) == [4]
    assert rank_runner.metrics(broken)[4].eval_loss is None

    killed = rank_runner.start(broken, patch=partial(die_once_saved, broken))
    assert killed.wait() == [-signal.SIGKILL]
    assert broken.artifacts(None).checkpoint(8).exists(), "saved before the evaluation"
    assert list(rank_runner.metrics(broken, 2)) == [4]

    assert rank_runner.run_to_end(broken).step == 12
    assert list(rank_runner.metrics(broken, 3)) == [8, 12]
    assert evaluations(broken) == evaluations(untouched)
    assert None not in evaluations(broken).values()
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)
    last = {name: data for name, data in rank_runner.outputs(broken) if "00000012" in name or name.startswith("out/")}
    assert last.items() <= dict(rank_runner.outputs(untouched)).items()

    assert rank_runner.run_to_end(broken).step == 12
    assert rank_runner.metrics(broken, 4) == {}, "nothing is evaluated twice"


def test_all_ranks_stop_an_evaluation_together(described: dict[str, Any], tmp_path: Path) -> None:
    """Only rank 0 sees the stop file, and its share has one batch less than the other's."""
    run = rank_runner.new_run(tmp_path / "run", described)
    stopped = rank_runner.run_to_end(run, 2, partial(stop_in_evaluation, run))
    assert (stopped.outcome, stopped.step) == ("stopped", 4)
    assert rank_runner.run_to_end(run, 2).step == 12
    assert list(evaluations(run)) == [4, 8, 12]
    assert None not in evaluations(run).values()


def test_what_was_evaluated_is_read_from_the_outboxes_of_all_attempts(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert evaluated_loss(run, 4) is None
    lines = (
        '{"kind":"metric","step":4,"eval_loss":null}',
        '{"kind":"metric","step":8,"eval_loss":2.5}',
        '{"kind":"met',
    )
    for attempt in (run.attempt(1), run.attempt(2)):
        attempt.path.mkdir()
    run.attempt(2).outbox.write_text("\n".join(lines))
    assert [evaluated_loss(run, step) for step in (4, 8, 80)] == [None, 2.5, None]


def test_evaluations_of_discarded_steps_do_not_count(tmp_path: Path) -> None:
    """If they counted, a repeated step whose evaluation was interrupted would never be evaluated."""
    run = RunDir(tmp_path)
    for attempt in (run.attempt(1), run.attempt(2), run.attempt(3)):
        attempt.path.mkdir()
    lines = [f'{{"kind":"metric","step":{step},"eval_loss":{loss}}}' for step, loss in ((8, 2.5), (12, 2.0))]
    run.attempt(1).outbox.write_text("\n".join([*lines, '{"kind":"task","step":12,"task":"sums"}']))
    run.attempt(2).resume_from.write_text("8\n")
    assert [evaluated_loss(run, step) for step in (8, 12)] == [2.5, None]
    assert scored_tasks(run, 12) == frozenset()
    run.attempt(2).outbox.write_text('{"kind":"metric","step":12,"eval_loss":3.0}\n')
    assert evaluated_loss(run, 12) == 3.0
    run.attempt(3).resume_from.write_text("12\n")
    assert [evaluated_loss(run, step) for step in (8, 12)] == [2.5, 3.0]
