"""SIGKILL at random moments, again and again: what comes out is what an untouched run leaves, to the last bit."""

import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.worker import rank_runner
from tests.worker.test_saver import kill_in_save
from trainyard.contract.events import ResumeVerified, Started
from trainyard.contract.failpoints import arm
from trainyard.contract.rundir import RunDir
from trainyard.worker.checkpoint.files import read_manifest

SEED = int(os.environ.get("TRAINYARD_KILL_SEED", "20261125"))
STEPS, SAVE_INTERVAL = 30, 4
EXPERTS = {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.05}

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense bf16": ({"dropout": 0.1}, {"dtype": "bfloat16"}),
    "moe bf16": ({"dropout": 0.1, **EXPERTS}, {"dtype": "bfloat16"}),
    "dense fp16": ({"dropout": 0.1}, {"dtype": "float16"}),
    "moe fp16": ({"dropout": 0.1, **EXPERTS}, {"dtype": "float16"}),
    "moe bf16 muon": ({"dropout": 0.1, **EXPERTS}, {"dtype": "bfloat16", "optimizer": "muon"}),
}


@dataclass(frozen=True)
class Kill:
    """Ends an attempt in step ``at``, or in the first save or evaluation from there on. ``depth``: how far into it."""

    kind: str
    at: int
    depth: int

    def patch(self) -> None:
        """Make it happen to this process."""
        {"step": in_step, "save": in_save, "evaluation": in_evaluation}[self.kind](self.at, self.depth)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(at: int, depth: int) -> None:
    """Before the first pass, between micro-batches, after the last one, or after the update that is not counted yet."""
    places = ("step.begin", "step.micro_batch", "step.accumulated", "step.updated")

    def begin(_loop: object, progress: Any) -> None:
        if progress.step + 1 == at:
            arm(places[depth % len(places)], die)

    arm("train.step", begin)


def in_save(at: int, depth: int) -> None:
    """At any write of any file of it, training being further by then."""
    due = -(-at // SAVE_INTERVAL) * SAVE_INTERVAL
    kill_in_save(min(due, STEPS), depth)


def in_evaluation(at: int, depth: int) -> None:
    """Between two of its batches."""
    reached = [0]  # an attempt may begin with an evaluation

    def die_at(index: int) -> None:
        if reached[-1] >= at and index >= depth % 2:
            die()

    arm("train.step", lambda _loop, progress: reached.append(progress.step + 1))
    arm("evaluation.batch", die_at)


def planned(chooser: random.Random, kinds: list[str], per_epoch: int) -> list[Kill]:
    """In the order of their steps: two of the first three in one epoch, all others in the second one or later."""
    early = chooser.sample(range(1, per_epoch + 1), 2)
    late = chooser.sample(range(per_epoch + 1, STEPS - 1), len(kinds) - 2)
    chooser.shuffle(kinds)
    return [Kill(kind, at, chooser.randrange(80)) for kind, at in zip(kinds, sorted(early + late), strict=True)]


def killed_at_each(run: RunDir, kills: list[Kill]) -> int:
    """Run ``kills`` attempts into their ends and one to its own; returns how many steps were done twice."""
    again = 0
    for number, kill in enumerate(kills, start=1):
        ranks = rank_runner.start(run, patch=kill.patch)
        assert ranks.wait() == [-signal.SIGKILL], f"{kill}\n{ranks.logs()}"
        assert not run.attempt(number).outcome.exists()
        again += run.attempt(number).read_step() or 0
    assert rank_runner.run_to_end(run).step == STEPS
    return again - sum(started(run, attempt).start_step for attempt in range(2, len(kills) + 2))


def started(run: RunDir, attempt: int) -> Started:
    return next(event for event in rank_runner.events(run, attempt) if isinstance(event, Started))


def require_the_same(broken: RunDir, untouched: RunDir, kills: int) -> str:
    """Same final files, same points at every step, and each resume proven; returns the weights' sha256."""
    last = f"{STEPS:08d}"
    expected = {name: data for name, data in rank_runner.outputs(untouched) if last in name or name.startswith("out/")}
    found = {name: data for name, data in rank_runner.outputs(broken) if last in name or name.startswith("out/")}
    assert len(expected) == 3
    assert found == expected
    assert rank_runner.curve(broken) == rank_runner.curve(untouched)
    for attempt in range(2, kills + 2):
        proofs = [event for event in rank_runner.events(broken, attempt) if isinstance(event, ResumeVerified)]
        assert [proof.difference for proof in proofs] == [0.0] * (started(broken, attempt).start_step > 0)
    return read_manifest(broken.artifacts(None).checkpoint(STEPS))["model.safetensors"].sha256


def described(text: Path, name: str) -> dict[str, Any]:
    model, training = RUNS[name]
    return rank_runner.spec(
        text,
        model=model,
        data={"eval_fraction": 0.3, "packing": "none"},
        training={**training, "max_steps": STEPS},
        checkpoint={"save_interval": SAVE_INTERVAL},
        reporting={"log_interval": 3, "eval_interval": 3},
    )


def survive(name: str, kinds: list[str], path: Path) -> None:
    chooser = random.Random(f"{SEED} {name}")
    text = rank_runner.corpus(path / "corpus.jsonl")
    untouched, broken = (rank_runner.new_run(path / kind, described(text, name)) for kind in ("untouched", "broken"))
    assert rank_runner.run_to_end(untouched).outcome == "completed"
    per_epoch = started(untouched, 1).steps_per_epoch
    assert per_epoch < STEPS / 2, "the kills must reach a second epoch"
    kills = planned(chooser, kinds, per_epoch)
    print(f"seed {SEED}, {name}, {per_epoch} steps an epoch: {', '.join(f'{k.kind} {k.at}/{k.depth}' for k in kills)}")
    again = killed_at_each(broken, kills)
    sha256 = require_the_same(broken, untouched, len(kills))
    print(f"{len(kills)} kills, {again} of {STEPS} steps done again, weights {sha256[:16]} as untouched")


@pytest.mark.long
@pytest.mark.slow
def test_three_kills_in_a_step_in_a_save_and_in_an_evaluation(tmp_path: Path) -> None:
    survive("moe fp16", ["step", "save", "evaluation"], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", RUNS)
def test_twenty_kills(name: str, tmp_path: Path) -> None:
    """Five for each of the four, and five more with Muon."""
    survive(name, ["step", "step", "save", "save", "evaluation"], tmp_path)


def test_the_plan_covers_what_it_should() -> None:
    for seed in range(50):
        kills = planned(random.Random(seed), ["step", "step", "save", "save", "evaluation"], 8)
        assert len([kill for kill in kills if kill.at <= 8]) == 2, "twice in the first epoch"
        assert len([kill for kill in kills if kill.at > 8]) == 3
        assert kills == sorted(kills, key=lambda kill: kill.at)
