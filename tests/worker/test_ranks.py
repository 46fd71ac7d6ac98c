"""Several ranks: the split of a step changes no number, and the error of one rank does not hide another's."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.worker import rank_runner
from tests.worker.test_resume import stop_after
from trainyard.contract.failpoints import arm
from trainyard.contract.messages import Outcome
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.data.loader import rank_slice, split_microbatches
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.stop_signal import StopSignal
from trainyard.worker.training.state import initial_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl", documents=50)


FP32 = {"dtype": "float32", "max_steps": 8, "learning_rate": 1e-4}
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "8 x 1": (1, {"batch_size": 8, "accumulation_steps": 1}),
    "4 x 2": (1, {"batch_size": 4, "accumulation_steps": 2}),
    "2 ranks x 4 x 1": (2, {"batch_size": 4, "accumulation_steps": 1}),
    "2 ranks x 2 x 2": (2, {"batch_size": 2, "accumulation_steps": 2}),
}


@pytest.mark.parametrize("kind", ["dense", "moe", "muon"])
def test_another_split_into_ranks_and_micro_batches_gives_the_same_step(kind: str, text: Path, tmp_path: Path) -> None:
    """Over more than an epoch, so that the short last step of an epoch, and ranks without a row, are part of it."""
    results, use_moe = {}, kind == "moe"
    for name, (world, changes) in CUTS.items():
        model = {"use_moe": use_moe, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.05}
        training = {**FP32, **changes, "optimizer": "muon" if kind == "muon" else "adamw"}
        described = rank_runner.spec(text, model=model, training=training, reporting={"log_interval": 1})
        run = rank_runner.new_run(tmp_path / name.replace(" ", ""), described)
        rank_runner.run_to_end(run, world)
        weights = load_file(run.artifacts(None).checkpoint(8) / "model.safetensors")
        results[name] = (rank_runner.metrics(run), weights)
    lines, weights = results["8 x 1"]
    assert len(lines) == 8
    for name, (other_lines, other_weights) in results.items():
        for step, line in lines.items():
            assert other_lines[step].loss == pytest.approx(line.loss, abs=1e-5), name
            assert other_lines[step].aux_loss == (pytest.approx(line.aux_loss, abs=1e-5) if use_moe else None), name
            assert other_lines[step].grad_norm == pytest.approx(line.grad_norm, rel=1e-4), name
            assert other_lines[step].tokens == line.tokens, name
        for key, value in weights.items():
            assert (other_weights[key] - value).abs().max() < 1e-5, (name, key)


AGREE = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 3e-4}
"""Nats by which a loss may differ after a change of the ranks, as documented in docs/guides/resuming.md."""

EXPERTS_AGREE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""With experts: where two score nearly alike, the last bit decides which one a token goes through."""


def largest_differences(
    text: Path, tmp_path: Path, steps: int, worlds: list[int], **groups: dict[str, Any]
) -> dict[str, float]:
    """Compare a run that changes its number of ranks every few steps with one that does not.

    Return the largest difference of their losses, and the largest relative difference of their gradient norms.
    """
    training = {"learning_rate": 1e-3, "max_steps": steps, **groups.pop("training")}
    described = rank_runner.spec(text, training=training, reporting={"log_interval": 1}, **groups)
    untouched, moved = (rank_runner.new_run(tmp_path / kind, described) for kind in ("untouched", "moved"))
    rank_runner.run_to_end(untouched)
    for attempt, world in enumerate(worlds[:-1], start=1):
        stopped = rank_runner.run_to_end(moved, world, partial(stop_after, moved, attempt, 4 * attempt))
        assert stopped.outcome == "stopped"
    assert rank_runner.run_to_end(moved, worlds[-1]).step == steps
    expected, found = rank_runner.curve(untouched), rank_runner.curve(moved)
    assert list(found) == list(expected) == list(range(1, steps + 1))
    assert [line[2:4] for line in found.values()] == [line[2:4] for line in expected.values()], "tokens and rates"
    pairs = [(found[step], expected[step]) for step in expected]
    return {
        "loss": max(abs(float(mine[0] or 0) - float(theirs[0] or 0)) for mine, theirs in pairs),
        "norm": max(abs(float(mine[4] or 0) / float(theirs[4] or math.nan) - 1) for mine, theirs in pairs),
    }


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "float32"), ("muon", "float32"), ("adamw", "bfloat16")])
def test_a_run_resumed_on_another_number_of_ranks_has_the_same_losses(
    optimizer: str, dtype: str, text: Path, tmp_path: Path
) -> None:
    """One rank, then two, then one again."""
    found = largest_differences(text, tmp_path, 12, [1, 2, 1], training={"optimizer": optimizer, "dtype": dtype})
    assert found["loss"] <= AGREE[dtype]
    if dtype == "float32":
        assert found["norm"] <= 1e-4


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", AGREE)
def test_a_hundred_steps_after_a_change_of_ranks_the_losses_are_the_same(
    dtype: str, kind: str, text: Path, tmp_path: Path
) -> None:
    """One rank, then three, then two for a hundred steps."""
    model = {"use_moe": True, "moe_intermediate_size": 32} if kind == "moe" else {}
    found = largest_differences(text, tmp_path, 108, [1, 3, 2], model=model, training={"dtype": dtype})
    print(f"{kind} {dtype}: losses within {found['loss']:.1e}, norms within {found['norm']:.1e} of the untouched run's")
    assert found["loss"] <= (EXPERTS_AGREE if kind == "moe" else AGREE)[dtype]


@pytest.mark.soak
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_compiled_ranks_have_the_losses_of_others(kind: str, parallelism: str, text: Path, tmp_path: Path) -> None:
    """DDP cuts the compiled graph at its buckets. With FSDP each layer is one graph, also if it runs again."""
    model = {"use_moe": True, "moe_intermediate_size": 32} if kind == "moe" else {}
    curves = []
    for compiled in (False, True):
        training = {**FP32, "max_steps": 5, "use_compile": compiled, "gradient_checkpointing": parallelism == "fsdp"}
        resources = {"parallelism": parallelism, "device": "cpu"}
        described = rank_runner.spec(
            text, model=model, training=training, reporting={"log_interval": 1}, resources=resources
        )
        run = rank_runner.new_run(tmp_path / f"compiled-{compiled}", described)
        rank_runner.run_to_end(run, world=2)
        curves.append([line.loss for line in rank_runner.metrics(run).values()])
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def test_micro_batch_mean_is_minimind_s_loop(text: Path, tmp_path: Path) -> None:
    """Two ranks of ours against one plain loop that does what MiniMind does on both, rank by rank."""
    training = {
        **FP32,
        "batch_size": 3,
        "accumulation_steps": 2,
        "loss_normalization": "micro_batch_mean",
        "max_steps": 6,
    }
    described = rank_runner.spec(text, data={"packing": "none"}, training=training, reporting={"log_interval": 1})
    run = rank_runner.new_run(tmp_path / "run", described)
    rank_runner.run_to_end(run, world=2)
    ours = [line.loss for line in rank_runner.metrics(run).values()]
    assert ours == pytest.approx(minimind(run, JobSpec.model_validate_json(json.dumps(described))), abs=1e-5)


def minimind(run: RunDir, spec: JobSpec) -> list[float]:
    """Mean of each micro-batch, divided by the number of micro-batches, backward, clip, AdamW with torch's defaults."""
    alone = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    material = prepare_data(spec, run, alone, lambda _: None, StopSignal(None).requested)
    order = StepSampler(len(material.train_set), 12, 42)
    model = initial_model(material.spec.model, 42, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    curve = []
    for step in range(1, 7):
        micros = [part for rank in range(2) for part in split_microbatches(rank_slice(order.rows_of(step), rank, 2), 3)]
        losses, tokens = 0.0, 0
        for part in micros:
            batch = material.train_set.batch(part)
            logits = model(batch.input_ids, logits=True).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
            torch.autograd.backward(loss / len(micros))
            counted = int((batch.labels != -100).sum())
            losses, tokens = losses + loss.item() * counted, tokens + counted
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 6)))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(losses / tokens)
    return curve


def test_evaluation_does_not_depend_on_the_number_of_ranks(text: Path, tmp_path: Path) -> None:
    held_out = rank_runner.corpus(tmp_path / "held-out.jsonl", documents=7, seed=9)
    losses = []
    for world in (1, 2):
        training = {**FP32, "batch_size": 8 // world, "accumulation_steps": 1, "max_steps": 3}
        described = rank_runner.spec(text, data={"eval_data_path": str(held_out)}, training=training)
        run = rank_runner.new_run(tmp_path / f"run-{world}", described)
        rank_runner.run_to_end(run, world)
        losses.append(rank_runner.metrics(run)[3].eval_loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def torchrun(run: RunDir, world: int, **environment: str) -> "subprocess.Popen[str]":
    """Start torchrun as a user does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.Popen(
        [*command, "--log-dir", str(run.path / "torchrun"), "-m", "trainyard.worker", str(run.path)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_torchrun_stops_on_sigterm_and_goes_on_by_hand(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"max_steps": 100_000}, checkpoint={"save_interval": 100_000})
    run = rank_runner.new_run(tmp_path / "run", described)
    process = torchrun(run, 2)
    rank_runner.wait_for_step(run.attempt(1), 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=rank_runner.DEADLINE)
    outcome = Outcome.model_validate_json(run.attempt(1).outcome.read_bytes())
    assert outcome.outcome == "stopped", output
    assert outcome.step >= 3
    assert rank_runner.saves(run) == [outcome.step]
    assert (
        json.loads((run.artifacts(None).checkpoint(outcome.step) / "state.json").read_bytes())["step"] == outcome.step
    )


def short_of_memory() -> None:
    """Rank 1 runs out of memory in the second step: its fourth pass, as one without labels comes before the first."""
    from trainyard.worker.training import step

    forward, calls = step.forward, iter(range(1000))

    def limited(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*arguments)

    mock.patch.object(step, "forward", limited).start()


def test_the_rank_that_failed_is_named(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    ranks = rank_runner.start(run, 2, short_of_memory)
    assert ranks.wait() == [1, 1]
    outcome = Outcome.model_validate_json(run.attempt(1).outcome.read_bytes())
    assert (outcome.outcome, outcome.reason) == ("failed", "out_of_memory")
    assert outcome.error is not None
    assert outcome.error.rank == 1
    assert "out of memory on rank 1 in step 2 with 4 rows" in outcome.error.message


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_bad_gradient_of_one_rank_stops_all_ranks(dtype: str, text: Path, tmp_path: Path) -> None:
    """With float16 also at the first step: a non-finite loss is no overflow of the scaled gradient."""
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text, training={"dtype": dtype}))
    failed = rank_runner.run_to_end(run, 2, partial(poison_rank, 1, 6))
    assert (failed.reason, failed.step) == ("diverged", 5)
    assert "the loss is not finite at step 6, in row" in str(failed.message)


def poison_rank(rank: int, at: int) -> None:
    """Make a weight of one rank NaN before one step: its loss is NaN, and so is the gradient of all ranks."""

    def poison(loop: Any, progress: Any) -> None:
        if loop.ranks.rank == rank and progress.step + 1 == at:
            with torch.no_grad():
                loop.state.model.model.norm.weight[0] = math.nan

    arm("train.step", poison)


def test_a_second_launch_is_refused_while_the_first_lives(text: Path, tmp_path: Path) -> None:
    described = rank_runner.spec(text, training={"max_steps": 100_000}, checkpoint={"save_interval": 100_000})
    run = rank_runner.new_run(tmp_path / "run", described)
    first = rank_runner.start(run)
    try:
        first.wait_for_step(1)
        second = rank_runner.start(run)
        assert second.wait() == [1]
        assert "another attempt of this run is alive" in second.logs()
        assert [attempt.number for attempt in run.attempts()] == [1]
    finally:
        first.kill()


@pytest.mark.long
def test_a_rank_of_a_superseded_attempt_ends(text: Path, tmp_path: Path) -> None:
    run = rank_runner.new_run(tmp_path / "run", rank_runner.spec(text))
    rank_runner.run_to_end(run)
    run.current.write_text("7")
    late = subprocess.run(
        [sys.executable, "-m", "trainyard.worker", str(run.path), "--attempt", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert late.returncode == 1
    assert "attempt 1 of" in late.stderr
    assert "is not the current one, which is 7" in late.stderr
