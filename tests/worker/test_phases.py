"""Everything that a rank does beside its steps has a phase, so that the agent does not mistake it for a hang."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker import rank_runner
from tests.worker.test_resume import stop_after
from trainyard.contract.events import Event, PhaseChanged
from trainyard.contract.failpoints import arm
from trainyard.contract.outbox import OutboxReader
from trainyard.contract.rundir import AttemptDir, RunDir
from trainyard.contract.spec import Timeouts
from trainyard.contract.status import Phase
from trainyard.worker.agent.hang_detector import HangDetector
from trainyard.worker.events.phases import PhaseReporter

ACTIVITIES = {
    "evaluation.batch": {"evaluating"},
    "prepare.open": {"preparing_data"},
    "resume.find": {"loading"},
    "resume_check.score": {"loading", "saving"},
    "samples.prompt": {"evaluating"},
    "trackers.close": {"saving"},
    "train.close": {"saving"},
    "train.roll_back": {"loading"},
    "train.save": {"saving"},
}
"""Failpoint of each activity: the phases that it runs in."""


def walk(run: RunDir, attempt: int) -> None:
    """In a rank: at each activity, ask a hang detector whether a long stay there would be a hang."""
    directory = run.attempt(attempt)
    for name in ACTIVITIES:
        arm(name, partial(note, directory, name))
    if attempt == 1:
        stop_after(run, 1, 6)
        arm("train.step", poison)


def note(directory: AttemptDir, name: str, *_: object) -> None:
    fake = AttemptDir(directory.path / "walk")
    fake.path.mkdir(exist_ok=True)
    fake.outbox.unlink(missing_ok=True)
    detector = HangDetector(fake, OutboxReader(fake.outbox), Timeouts(progress=1.0, preparing=1e6))
    # Quick steps, so that in phase `training` the budget is the smallest.
    for step in (1, 2, 3):
        fake.progress.write_text(str(step))
        detector.poll(step / 100)
    fake.outbox.write_bytes(directory.outbox.read_bytes() if directory.outbox.exists() else b"")
    detector.poll(0.04)
    with (directory.path / "walked").open("a") as walked:
        walked.write(f"{name} {detector.phase} {detector.is_hung(1000.0)}\n")


def poison(trainer: Any, progress: Any) -> None:
    """Make the weights bad at step 3, once: the run rolls back."""
    if progress.step + 1 == 3 and progress.data_offset == 0:
        with torch.no_grad():
            trainer.state.model.model.norm.weight[0] = math.nan


@pytest.mark.long
@pytest.mark.slow
def test_no_activity_beside_a_step_counts_as_a_hang(tmp_path: Path) -> None:
    """Two attempts under a budget of a second, with a clock that says that each activity takes a thousand."""
    described = rank_runner.spec(
        rank_runner.corpus(tmp_path / "corpus.jsonl"),
        data={"eval_fraction": 0.3},
        training={"max_steps": 12, "on_nonfinite": "rollback"},
        checkpoint={"save_interval": 4},
        reporting={"log_interval": 4, "eval_interval": 4, "sample_prompts": ["the cat"], "tensorboard": True},
        resources={"timeouts": {"progress": 1.0}},
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, patch=partial(walk, run, 1)).step == 6
    assert rank_runner.run_to_end(run, patch=partial(walk, run, 2)).step == 12
    walked = [
        line.split() for number in (1, 2) for line in (run.attempt(number).path / "walked").read_text().splitlines()
    ]
    assert [line for line in walked if line[2] == "True"] == []
    assert {name: {line[1] for line in walked if line[0] == name} for name, _, _ in walked} == ACTIVITIES


def phases_of(events: list[Event]) -> list[str]:
    return [event.phase for event in events if isinstance(event, PhaseChanged)]


def test_an_activity_returns_to_the_phase_around_it() -> None:
    said: list[Event] = []
    phases = PhaseReporter(said.append)
    phases.enter(Phase.TRAINING)
    with phases.during(Phase.SAVING), phases.during(Phase.SAVING), phases.during(Phase.EVALUATING):
        assert phases.current is Phase.EVALUATING
    assert phases_of(said) == ["training", "saving", "evaluating", "saving", "training"]
    with pytest.raises(ValueError), phases.during(Phase.LOADING):
        raise ValueError
    assert phases_of(said)[-1] == "loading", "what comes after an error must not have the short budget of a step"


def test_the_compiler_has_its_phase_whenever_it_works() -> None:
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    said: list[Event] = []
    phases = PhaseReporter(said.append)
    with phases.report_compilation():
        phases.enter(Phase.TRAINING)
        for trigger in (CallbackTrigger.DYNAMO, CallbackTrigger.LAZY_BACKWARD):
            with callback_handler.install_callbacks(trigger, "0/0"):
                assert phases.current is Phase.COMPILING
    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/1"):
        assert phases.current is Phase.TRAINING, "the run is over"
    assert phases_of(said) == ["training", "compiling", "training", "compiling", "training"]
