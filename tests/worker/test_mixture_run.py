"""Runs on directories and weighted mixtures: the same samples on any ranks, exact resume, and what has changed."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from tests.worker.rank_runner import corpus, new_run, run_to_end
from trainyard.contract.events import Started
from trainyard.contract.rundir import RunDir

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
        ranks = rank_runner.start(broken, 2)
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
    ranks = rank_runner.start(moved)
    # Without a checkpoint two ranks would start from scratch, with twice the rows in a step.
    ranks.wait_for_save(4)
    ranks.kill()
    for world in (2, 3):
        ranks = rank_runner.start(moved, world)
        ranks.wait_for_step(8 + world)
        ranks.kill()
    run_to_end(moved)
    assert losses(moved) == pytest.approx(losses(one), rel=1e-4)


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
