"""Whole runs with the update split over ranks: DDP's losses, bit-exact resume, and checkpoints that all can read."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import rank_runner
from tests.worker.test_resume import stop_after
from trainyard.contract.events import SampleEvent, TaskScored
from trainyard.contract.failpoints import arm
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import RunDir
from trainyard.worker.checkpoint.export import export_huggingface, export_minimind, find_export_source, tokenizer_of

KINDS: dict[str, dict[str, Any]] = {
    "dense-adamw": {"training": {"optimizer": "adamw"}},
    "moe-adamw": {"training": {"optimizer": "adamw"}, "model": {"use_moe": True, "moe_intermediate_size": 32}},
    "dense-muon": {"training": {"optimizer": "muon"}},
    "moe-muon": {"training": {"optimizer": "muon"}, "model": {"use_moe": True, "moe_intermediate_size": 32}},
}
SHORT = ["dense-adamw", "moe-muon"]
"""The others are in `make soak`."""


def kinds(short: list[str] = SHORT) -> list[Any]:
    return [pytest.param(kind, marks=[pytest.mark.soak] if kind not in short else []) for kind in KINDS]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=50)


def new_run(path: Path, text: Path, kind: str, parallelism: str, world: int, **training: Any) -> RunDir:
    """A run whose steps have 12 rows on any number of ranks: more than an epoch, with short last steps."""
    groups = {
        "model": KINDS[kind].get("model", {}),
        "data": {"eval_fraction": 0.1},
        "training": {
            "dtype": "float32",
            "max_steps": 8,
            "learning_rate": 1e-4,
            "accumulation_steps": 2,
            "batch_size": 6 // world,
            **KINDS[kind]["training"],
            **training,
        },
        "checkpoint": {"save_interval": 4},
        "reporting": {"log_interval": 1, "sample_prompts": ["the cat"]},
        "evaluation": {"tasks": [{"name": "words", "path": str(task_file(text)), "kind": "choice"}]},
        "resources": {"parallelism": parallelism},
    }
    return rank_runner.new_run(path, rank_runner.spec(text, **groups))


def task_file(text: Path) -> Path:
    """Three examples: with several ranks one of them has no batch of its own."""
    file = text.with_name("words.jsonl")
    example = {"context": "the cat", "choices": [" sat on a mat", " xyz"], "answer": 0}
    file.write_text("".join(json.dumps({**example, "context": context}) + "\n" for context in ("the", "dogs", "a cat")))
    return file


def scores(run: RunDir) -> list[tuple[int, float | None, float | None]]:
    return [(event.step, event.acc, event.bpb) for event in rank_runner.events(run) if isinstance(event, TaskScored)]


def change(run: RunDir, parallelism: str) -> None:
    described = json.loads(run.spec.read_text())
    described["resources"]["parallelism"] = parallelism
    run.spec.write_text(json.dumps(described))


def samples(run: RunDir) -> list[str]:
    return [event.text for event in rank_runner.events(run) if isinstance(event, SampleEvent)]


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds())
def test_losses_and_samples_are_those_of_one_rank(kind: str, text: Path, tmp_path: Path) -> None:
    expected = None
    for parallelism, world in [
        ("ddp", 1),
        ("zero1", 1),
        ("fsdp", 1),
        ("ddp", 2),
        ("zero1", 2),
        ("fsdp", 2),
        ("ddp", 3),
        ("zero1", 3),
        ("fsdp", 3),
    ]:
        run = new_run(tmp_path / f"{parallelism}-{world}", text, kind, parallelism, world)
        assert rank_runner.run_to_end(run, world).outcome == "completed"
        found = rank_runner.metrics(run), samples(run), scores(run)
        expected = expected or found
        assert list(found[0]) == list(expected[0]) == list(range(1, 9))
        for step, line in expected[0].items():
            assert found[0][step].loss == pytest.approx(line.loss, abs=1e-5), (parallelism, world)
            assert found[0][step].eval_loss == pytest.approx(line.eval_loss, abs=1e-5)
            assert found[0][step].grad_norm == pytest.approx(line.grad_norm, rel=1e-4)
            assert found[0][step].tokens == line.tokens
        assert found[1] == expected[1]
        assert len(found[2]) == len(expected[2]) == 2
        assert [score[:2] for score in found[2]] == [score[:2] for score in expected[2]]
        assert [score[2] for score in found[2]] == pytest.approx([score[2] for score in expected[2]], abs=1e-5)


def die_at(step: int, outbox: Path) -> None:
    """End all ranks without cleanup before ``step``, as if the host had lost its power, once a save was reported."""

    def die(_: Any, progress: Any) -> None:
        if progress.step + 1 == step:
            deadline = time.monotonic() + rank_runner.DEADLINE
            while not any(line.get("kind") == "checkpoint" for line in OutboxReader(outbox).read(1000)):
                assert time.monotonic() < deadline, "no save was reported"
                time.sleep(0.01)
            os._exit(9)

    arm("train.step", die)


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["zero1", "fsdp"])
@pytest.mark.parametrize("kind", kinds())
def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(
    kind: str, parallelism: str, text: Path, tmp_path: Path
) -> None:
    """Three ranks are enough for the order of sums to matter; in bfloat16, with layers that are computed again."""
    world = 2 if kind == "moe-muon" else 3  # a long test takes less than a minute
    training = {"dtype": "bfloat16", "gradient_checkpointing": True, "learning_rate": 1e-3}
    untouched, killed = (
        new_run(tmp_path / name, text, kind, parallelism, world, **training) for name in ("untouched", "killed")
    )
    rank_runner.run_to_end(untouched, world)
    ranks = rank_runner.start(killed, world, partial(die_at, 7, killed.attempt(1).outbox))
    ranks.wait()
    assert rank_runner.saves(killed) == [4]
    assert rank_runner.run_to_end(killed, world).outcome == "completed"
    assert dict(rank_runner.outputs(killed)) == dict(rank_runner.outputs(untouched))
    assert rank_runner.curve(killed) == rank_runner.curve(untouched)


MOVES = [("ddp", 2), ("fsdp", 2), ("zero1", 3), ("fsdp", 1), ("zero1", 2)]


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds(["moe-muon"]))
def test_a_run_may_change_ranks_and_parallelism_at_each_resume(kind: str, text: Path, tmp_path: Path) -> None:
    untouched, moved = (new_run(tmp_path / name, text, kind, "ddp", 2, max_steps=15) for name in ("untouched", "moved"))
    rank_runner.run_to_end(untouched, 2)
    for attempt, (parallelism, world) in enumerate(MOVES, start=1):
        change(moved, parallelism)
        end = partial(stop_after, moved, attempt, 3 * attempt) if attempt < len(MOVES) else None
        outcome = rank_runner.run_to_end(moved, world, end)
        # With several ranks a stop takes effect a step after its request.
        assert 3 * attempt <= outcome.step <= 3 * attempt + 1, outcome
        assert not [code for code in rank_runner.warned(moved, attempt) if code.startswith("resume")]
    found, expected = rank_runner.curve(moved), rank_runner.curve(untouched)
    assert list(found) == list(expected)
    for step, line in expected.items():
        assert found[step][0] == pytest.approx(line[0], abs=1e-5), step
        assert found[step][2:4] == line[2:4]
    checkpoints = [run.artifacts(None).checkpoint(15) for run in (moved, untouched)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        own, others = (load_file(path / name) for path in checkpoints)
        assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in others.items()}


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["zero1", "fsdp"])
def test_exports_are_of_the_whole_model(parallelism: str, text: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", text, "dense-adamw", parallelism, 2, max_steps=4)
    rank_runner.run_to_end(run, 2)
    weights = load_file(run.artifacts(None).checkpoint(4) / "model.safetensors")
    source = find_export_source(run.path)
    out = export_huggingface(source, tmp_path / "hf", *tokenizer_of(source, None))
    assert all((load_file(out / "model.safetensors")[name] == value).all() for name, value in weights.items())
    pth = export_minimind(source, tmp_path)
    exported, published = (torch.load(each) for each in (pth, run.artifacts(None).out / "pretrain_32.pth"))
    assert set(exported) == set(published) == {*weights, "lm_head.weight"}
    assert all(torch.equal(exported[name], value) for name, value in published.items())


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["zero1", "fsdp"])
def test_a_bad_step_rolls_all_ranks_back(parallelism: str, text: Path, tmp_path: Path) -> None:
    described = new_run(tmp_path / "run", text, "dense-adamw", parallelism, 2, on_nonfinite="rollback")
    failed = rank_runner.run_to_end(described, 2, partial(poison_head, 1, 6))
    assert failed.outcome == "completed"
    warning = rank_runner.warned(described)["rolled_back"]
    assert warning.data["to_step"] == 4
    assert sorted(rank_runner.metrics(described)) == list(range(1, 9))


def poison_head(rank: int, at: int) -> None:
    """Let one rank see a loss that is not a number, once."""
    from trainyard.worker.training import step

    forward, steps = step.forward, {"now": 0}
    done: list[int] = []

    def bad(*arguments: Any) -> Any:
        output = forward(*arguments)
        if steps["now"] == at and not done:
            done.append(at)
            return output._replace(loss_sum=output.loss_sum * float("nan"))
        return output

    def count(trainer: Any, progress: Any) -> None:
        steps["now"] = progress.step + 1 if trainer.ranks.rank == rank else 0

    mock.patch.object(step, "forward", bad).start()
    arm("train.step", count)


@pytest.mark.long
def test_without_memory_for_the_parts_of_others_the_save_is_skipped(text: Path, tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", text, "dense-adamw", "zero1", 2)
    failed = rank_runner.run_to_end(run, 2, short_of_memory)
    assert (failed.outcome, failed.reason) == ("failed", "host_out_of_memory")
    assert (
        "the checkpoint of step 4 was not saved: the host is out of memory"
        in rank_runner.warned(run)["save_failed"].message
    )
    assert rank_runner.saves(run) == []


def short_of_memory() -> None:
    from trainyard.worker.checkpoint.saver import StagingBuffers

    if os.environ["RANK"] == "1":
        mock.patch.object(StagingBuffers, "_allocate", side_effect=MemoryError()).start()
