"""Runs on directories and weighted mixtures: the same samples on any ranks, exact resume, and what has changed."""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from tests.worker.rank_runner import corpus, new_run, run_to_end
from trainyard.contract.events import Started
from trainyard.contract.failpoints import arm
from trainyard.contract.rundir import RunDir
from trainyard.worker.data.loader import rank_slice

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two directories and a file."""
    root = tmp_path_factory.mktemp("data")
    for name, files in (("web", 5), ("books", 2)):
        (root / name).mkdir()
        for number in range(files):
            corpus(root / name / f"{number}.jsonl", documents=20 + number, seed=number)
    corpus(root / "code.jsonl", documents=3, seed=99)
    return root


def mixture(data: Path, **training: Any) -> dict[str, Any]:
    sources = [
        {"name": "web", "path": str(data / "web"), "weight": 0.6},
        {"name": "books", "path": [str(data / "books" / "0.jsonl"), str(data / "books" / "1.jsonl")], "weight": 0.3},
        {"name": "code", "path": str(data / "*.jsonl"), "weight": 0.1},
    ]
    spec = rank_runner.spec(data, training={"max_steps": 16, **training}, checkpoint={"save_interval": 4})
    spec["data"] = {"sources": sources, "max_seq_len": 32}
    return spec


def losses(run: RunDir) -> dict[int, float]:
    return {
        step: line.loss
        for each in run.attempts()
        for step, line in rank_runner.metrics(run, each.number).items()
        if line.loss
    }


def started(run: RunDir, attempt: int = 1) -> Started:
    return next(event for event in rank_runner.events(run, attempt) if isinstance(event, Started))


def test_a_directory_trains_as_one_file_of_the_same_documents(data: Path, tmp_path: Path) -> None:
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join((data / "web" / f"{number}.jsonl").read_text() for number in range(5)))
    runs = [
        new_run(tmp_path / name, rank_runner.spec(path)) for name, path in (("dir", data / "web"), ("file", joined))
    ]
    for run in runs:
        assert run_to_end(run).outcome == "completed"
    assert losses(runs[0]) == losses(runs[1])
    assert started(runs[0]).documents == started(runs[1]).documents == sum(range(20, 25))


def test_a_mixture_killed_and_resumed_has_the_same_weights(data: Path, tmp_path: Path) -> None:
    untouched, broken = (new_run(tmp_path / name, mixture(data)) for name in ("untouched", "broken"))
    assert run_to_end(untouched, 2).step == 16
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(1, 16), 3)):
        ranks = rank_runner.start(broken, 2, partial(rank_runner.hold_after, step))
        ranks.wait_for_step(step)
        ranks.kill()
    assert run_to_end(broken, 2).step == 16
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)
    last = {name: content for name, content in rank_runner.outputs(broken) if "00000016" in name}
    assert last
    assert last.items() <= dict(rank_runner.outputs(untouched)).items()


def test_a_mixture_has_the_same_samples_on_any_number_of_ranks(data: Path, tmp_path: Path) -> None:
    one, moved = (
        new_run(tmp_path / name, mixture(data, batch_size=6, accumulation_steps=2, dtype="float32")) for name in "ab"
    )
    run_to_end(one)
    ranks = rank_runner.start(moved, patch=partial(rank_runner.hold_after, 8))
    # Without a checkpoint two ranks would start from scratch, with twice the rows in a step.
    ranks.wait_for_save(4)
    ranks.kill()
    for world in (2, 3):
        ranks = rank_runner.start(moved, world, partial(rank_runner.hold_after, 8 + world))
        ranks.wait_for_step(8 + world)
        ranks.kill()
    run_to_end(moved)
    assert losses(moved) == pytest.approx(losses(one), rel=1e-4)


KILLS, STEPS, MAX_KILLED_STEP = 20, 80, 60
Rows = dict[int, list[int]]


def record_rows(folder: Path) -> None:
    """Make this rank write the rows that it takes in each step to ``folder``."""

    def record(trainer: Any, progress: Any) -> None:
        step, ranks = progress.step + 1, trainer.loader.ranks
        rows = rank_slice(trainer.loader.rows_of(step + progress.data_offset), ranks.rank, ranks.world)
        with (folder / f"{ranks.rank}-of-{ranks.world}").open("a") as file:
            file.write(json.dumps([step, rows.tolist()]) + "\n")

    folder.mkdir(parents=True, exist_ok=True)
    arm("train.step", record)


def rows_by_step(folder: Path) -> Rows:
    """Return the rows of each step of one attempt, over all ranks; without steps that not every rank has begun."""
    by_rank: list[Rows] = []
    for file in folder.iterdir():
        whole = file.read_text().rpartition("\n")[0].splitlines()  # without a line that a kill has cut
        by_rank.append(dict(json.loads(line) for line in whole))
    common = set.intersection(*(set(rows) for rows in by_rank)) if by_rank else set()
    return {step: sorted(row for rows in by_rank for row in rows[step]) for step in common}


@pytest.mark.timeout(1800)
def test_twenty_kills_of_a_mixture_that_continues_on_one_to_three_ranks(data: Path, tmp_path: Path) -> None:
    """Every attempt has the losses and the rows of the untouched run, whatever its number of ranks."""
    described = mixture(data, batch_size=6, accumulation_steps=2, dtype="float32", max_steps=STEPS)
    described |= {"checkpoint": {"save_interval": 3}, "reporting": {"log_interval": 1}}
    untouched, broken = (new_run(tmp_path / name, described) for name in ("untouched", "broken"))
    folder = tmp_path / "rows"
    assert run_to_end(untouched, patch=partial(record_rows, folder / "untouched")).step == STEPS
    expected, expected_losses = rows_by_step(folder / "untouched"), losses(untouched)
    assert sorted(expected) == sorted(expected_losses) == list(range(1, STEPS + 1))

    seed = random.randrange(10**6)
    print("seed", seed)
    chooser = random.Random(seed)
    worlds = [*chooser.choices((1, 2, 3), k=KILLS - 3), 1, 2, 3]
    for number, world in enumerate(worlds, start=1):
        saved = max((step for step, _ in broken.artifacts(None).published()), default=0)
        # The first attempt that saves decides how many rows a step has: on one rank, as in the untouched run.
        ranks = rank_runner.start(broken, world if saved else 1, partial(record_rows, folder / str(number)))
        ranks.wait_for_step(min(saved + chooser.randint(1, 6), MAX_KILLED_STEP))
        ranks.kill()
    last = KILLS + 1
    assert run_to_end(broken, 2, partial(record_rows, folder / str(last))).step == STEPS

    compared = 0
    for number in range(1, last + 1):
        found = rows_by_step(folder / str(number))
        assert found == {step: expected[step] for step in found}, f"attempt {number}"
        compared += len(found)
        curve = {step: line.loss for step, line in rank_runner.metrics(broken, number).items()}
        assert curve == pytest.approx({step: expected_losses[step] for step in curve}, rel=1e-4), f"attempt {number}"
    assert compared >= STEPS
    assert sorted(losses(broken)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "changed"])
def test_a_resume_names_the_file_that_changed(change: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "web"
    shutil.copytree(data / "web", folder)
    # Long enough that it cannot end before it is killed.
    described = rank_runner.spec(folder, checkpoint={"save_interval": 4}, training={"max_steps": 10_000})
    run = new_run(tmp_path / "run", described)
    ranks = rank_runner.start(run)
    ranks.wait_for_save(4)
    ranks.kill()
    match change:
        case "added":
            corpus(folder / "sub.jsonl")
        case "removed":
            (folder / "3.jsonl").unlink()
        case "renamed":
            (folder / "3.jsonl").rename(folder / "33.jsonl")
        case "changed":
            corpus(folder / "3.jsonl", documents=23, seed=1234)
    outcome = run_to_end(run)
    assert (outcome.outcome, outcome.reason) == ("failed", "checkpoint_invalid")
    name = "data/sub.jsonl" if change == "added" else "data/3.jsonl"
    assert f"{name} was {change}" in str(outcome.message)
