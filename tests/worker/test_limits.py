"""A limit of time or loss ends a run as completed: with a save, its evaluation, and the same curve over any kill."""

import json
import random
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.worker import rank_runner
from tests.worker.test_resume import stop_after
from trainyard.contract.events import Finished, MetricEvent, Started
from trainyard.contract.messages import RunSettings
from trainyard.contract.rundir import RunDir, write_json
from trainyard.contract.smoothing import HALF_LIFE, Ema
from trainyard.contract.spec import LimitsSpec
from trainyard.contract.status import Phase, Reason
from trainyard.worker.attempt import StepHeartbeat
from trainyard.worker.events.phases import PhaseReporter
from trainyard.worker.training.limits import RunLimits

STEP = 0.05
"""Seconds of a step whose length is fixed."""

SEED = 20261130


def test_only_the_phase_training_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    phases = PhaseReporter(lambda _: None)
    for phase, seconds in ((Phase.LOADING, 5), (Phase.TRAINING, 2), (Phase.SAVING, 7), (Phase.TRAINING, 1)):
        phases.enter(phase)
        now += seconds
    with phases.during(Phase.EVALUATING):
        now += 100
    now += 0.5
    assert phases.training_seconds == 3.5
    phases.enter(Phase.TRAINING)
    assert phases.training_seconds == 3.5


def test_the_time_is_up_at_the_limit_and_is_seen_steps_ahead() -> None:
    own = 0.0
    limits = RunLimits(LimitsSpec(max_minutes=1), 20.0, lambda: own)
    for now in (1.0, 3.0, 5.0, 7.0, 30.0):
        own = now
        limits.end_step()
    assert not limits.is_time_up()
    assert limits.is_time_up(steps_ahead=5), "usually a step takes 2 s"
    assert not limits.is_time_up(steps_ahead=4)
    own = 40.0
    assert limits.is_time_up()
    limits.spec = LimitsSpec()
    assert not limits.is_time_up(steps_ahead=1000)


def test_a_loss_is_reached_at_the_target() -> None:
    limits = RunLimits(LimitsSpec(target_loss=2.5), 0.0, lambda: 0.0)
    assert [limits.is_reached(loss) for loss in (None, 2.51, 2.5, 2.4)] == [False, False, True, True]
    assert not RunLimits(LimitsSpec(), 0.0, lambda: 0.0).is_reached(0.0)


def test_the_time_of_all_attempts_is_read_from_what_each_has_left(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.train_seconds() == 0.0
    first, second, third = (run.attempt(number) for number in (1, 2, 3))
    for attempt in (first, second, third):
        attempt.path.mkdir()
    first.outbox.write_text(json.dumps({"kind": "metric", "train_seconds": 4.5}) + '\n{"train_seconds": 9')
    assert run.train_seconds() == 4.5, "of 0.1, or of a host that lost its progress file"
    heartbeat = StepHeartbeat(second.progress)
    heartbeat.beat(7)
    assert (second.read_step(), second.read_train_seconds()) == (7, None)
    heartbeat.train_seconds = lambda: 1234567.25
    heartbeat.beat(8)
    assert (second.read_step(), second.read_train_seconds()) == (8, 1234567.25)
    heartbeat.train_seconds = lambda: 5.0
    heartbeat.beat(9)
    assert (second.read_step(), second.read_train_seconds()) == (9, 5.0), "no digits of a longer number are left"
    third.progress.write_text("10\nnan\n")
    assert run.train_seconds() == 5.0


def limited(text: Path, path: Path, world: int = 1, **limits: Any) -> RunDir:
    described = rank_runner.spec(text, training={"max_steps": 100_000}, reporting={"log_interval": 1}, limits=limits)
    described["checkpoint"] = {"save_interval": 2, "keep_last": 3}
    if world > 1:
        described["resources"] = {"device": "cpu", "nproc_per_node": world}
    return rank_runner.new_run(path, described)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rank_runner.corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


def slow_steps(seconds: float) -> None:
    """Make each step take at least this long, so that its length is not that of a busy machine."""
    import time

    from trainyard.worker.training.step import TrainStep

    step = TrainStep.run

    def slowed(self: TrainStep, *args: Any) -> Any:
        time.sleep(seconds)
        return step(self, *args)

    mock.patch.object(TrainStep, "run", slowed).start()


def fixed_steps(seconds: float) -> None:
    """Make each step take exactly this long by the clock of the training time."""
    from types import SimpleNamespace

    from trainyard.worker.events import phases
    from trainyard.worker.training.step import TrainStep

    step, steps = TrainStep.run, 0

    def counted_step(self: TrainStep, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, *args)

    mock.patch.object(TrainStep, "run", counted_step).start()
    mock.patch.object(phases, "time", SimpleNamespace(monotonic=lambda: seconds * steps)).start()


def kill_at(run: RunDir, seconds: float, own: float) -> None:
    """SIGKILL this rank, between two steps, once this attempt has trained for ``own`` seconds."""
    import os

    slow_steps(seconds)
    beat, begun = StepHeartbeat.beat, run.train_seconds()

    def killing(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if self.train_seconds is not None and self.train_seconds() - begun >= own:
            os.kill(os.getpid(), signal.SIGKILL)

    mock.patch.object(StepHeartbeat, "beat", killing).start()


def counted(run: RunDir) -> list[tuple[int, float]]:
    """Return (step, seconds counted) of each metric line, in the order in which they were written."""
    events = [event for attempt in run.attempts() for event in rank_runner.events(run, attempt.number)]
    return [(e.step, e.train_seconds) for e in events if isinstance(e, MetricEvent) and e.train_seconds is not None]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kills", "seconds"),
    [(1, 4.0), pytest.param(5, 12.0, marks=pytest.mark.long), pytest.param(5, 60.0, marks=pytest.mark.soak)],
)
def test_killed_on_the_way_it_ends_within_a_step_of_the_limit(
    kills: int, seconds: float, text: Path, tmp_path: Path
) -> None:
    chooser = random.Random(SEED)
    print(f"seed {SEED}")
    pace, part = 0.05, seconds / (kills + 1)
    run = limited(text, tmp_path / "run", max_minutes=seconds / 60)
    for _ in range(kills):
        ranks = rank_runner.start(run, 1, partial(kill_at, run, pace, chooser.uniform(0.5 * part, 0.95 * part)))
        assert ranks.wait() == [-signal.SIGKILL]
    outcome = rank_runner.run_to_end(run, 1, partial(slow_steps, pace))
    assert (outcome.outcome, outcome.reason) == ("completed", Reason.LIMIT)
    assert "minutes of training are used up" in str(outcome.message)
    lines = counted(run)
    longest = max(after - before for (_, before), (_, after) in pairwise(lines))
    assert seconds <= run.train_seconds() <= seconds + longest
    assert lines == sorted(lines, key=lambda line: line[1]), "the count never falls"
    begun = [event for event in rank_runner.events(run, kills + 1) if isinstance(event, Started)]
    # What an attempt has trained after its last line is part of the first line of the next one.
    assert abs(begun[0].train_seconds - max(s for n in range(1, kills + 1) for _, s in of_attempt(run, n))) <= longest
    # The curve has each step, always with the same values. What a kill has thrown away may be beyond the last one.
    assert [step for step in sorted(rank_runner.curve(run)) if step <= outcome.step] == [*range(1, outcome.step + 1)]
    assert run.artifacts(None).checkpoint(outcome.step).is_dir()
    ended = [event for event in rank_runner.events(run, kills + 1) if isinstance(event, Finished)]
    assert ended[0].train_seconds == pytest.approx(run.train_seconds(), abs=max(0.2, longest))


def of_attempt(run: RunDir, number: int) -> list[tuple[int, float]]:
    return [(step, line.train_seconds or 0.0) for step, line in rank_runner.metrics(run, number).items()]


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_the_last_step_is_logged_evaluated_and_saved(world: int, text: Path, tmp_path: Path) -> None:
    run = limited(text, tmp_path / "run", world, max_minutes=1.5 / 60)
    described = json.loads(run.spec.read_text())
    described["data"]["eval_fraction"] = 0.2
    described["reporting"]["log_interval"] = 1000
    run.spec.write_text(json.dumps(described))
    outcome = rank_runner.run_to_end(run, world, partial(fixed_steps, STEP))
    assert (outcome.outcome, outcome.reason) == ("completed", Reason.LIMIT)
    line = rank_runner.metrics(run)[outcome.step]
    assert line.eval_loss is not None
    assert rank_runner.saves(run)[-1] == outcome.step
    # With two ranks, rank 0 decides two steps ahead by the usual length of a step.
    assert abs(run.train_seconds() - 1.5) <= world * STEP + 1e-6
    assert len(list(run.path.glob("out/*.pth"))) == 1

    # Without more time the next attempt ends at once, or with the steps that the estimate left; with more it continues.
    again = rank_runner.run_to_end(run, world, partial(fixed_steps, STEP))
    assert (again.outcome, again.reason) == ("completed", Reason.LIMIT)
    assert abs(run.train_seconds() - 1.5) <= world * STEP + 1e-6
    described["limits"] = {"max_minutes": 2.5 / 60}
    run.spec.write_text(json.dumps(described))
    longer = rank_runner.run_to_end(run, world, partial(fixed_steps, STEP))
    assert (longer.outcome, longer.reason) == ("completed", Reason.LIMIT)
    assert longer.step > again.step
    assert abs(run.train_seconds() - 2.5) <= world * STEP + 1e-6


@pytest.mark.long
def test_a_limit_that_is_used_up_before_the_first_save_is_no_success(text: Path, tmp_path: Path) -> None:
    run = limited(text, tmp_path / "run", max_minutes=1 / 60)
    described = json.loads(run.spec.read_text())
    described["checkpoint"]["save_interval"] = 10_000
    run.spec.write_text(json.dumps(described))
    assert rank_runner.start(run, 1, partial(kill_at, run, 0.02, 0.9)).wait() == [-signal.SIGKILL]
    run.attempt(1).progress.write_text("40\n1.5\n")
    outcome = rank_runner.run_to_end(run)
    assert (outcome.outcome, outcome.reason) == ("failed", Reason.LIMIT)
    assert "no checkpoint was saved" in str(outcome.message)


@pytest.mark.long
def test_the_smoothed_loss_ends_the_run_at_its_target_over_a_pause(text: Path, tmp_path: Path) -> None:
    """The checkpoint stores the average: a paused run ends at the step of an uninterrupted one."""
    runs = [limited(text, tmp_path / name, target_loss=4.2) for name in ("whole", "paused")]
    whole, paused = runs
    outcome = rank_runner.run_to_end(whole)
    assert (outcome.outcome, outcome.reason) == ("completed", Reason.LIMIT)
    assert "target_loss 4.2 is reached" in str(outcome.message)
    average, reached = Ema(HALF_LIFE), []
    for step, line in rank_runner.metrics(whole).items():
        average.add(step, line.loss or 0.0)
        reached += [step] if average.value <= 4.2 else []
    assert reached == [outcome.step]
    assert outcome.step > 6
    rank_runner.run_to_end(paused, 1, partial(stop_after, paused, 1, 5))
    assert rank_runner.run_to_end(paused).step == outcome.step
    assert dict(rank_runner.outputs(paused)).keys() >= {f"checkpoints/step-{outcome.step:08d}/model.safetensors"}
    assert rank_runner.run_to_end(paused).step == outcome.step, "another attempt does not train on"


@pytest.mark.long
def test_with_held_out_data_its_loss_decides(text: Path, tmp_path: Path) -> None:
    run = limited(text, tmp_path / "run", target_loss=4.2)
    described = json.loads(run.spec.read_text())
    described["data"]["eval_fraction"] = 0.2
    described["reporting"]["eval_interval"] = 3
    run.spec.write_text(json.dumps(described))
    outcome = rank_runner.run_to_end(run)
    assert "the eval_loss is" in str(outcome.message)
    evaluated = {step: line.eval_loss for step, line in rank_runner.metrics(run).items() if line.eval_loss is not None}
    assert [step for step, loss in evaluated.items() if loss <= 4.2] == [outcome.step]
    assert outcome.step % 3 == 0
    assert rank_runner.saves(run)[-1] == outcome.step


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
def test_a_limit_may_be_set_while_the_run_trains(world: int, text: Path, tmp_path: Path) -> None:
    run = limited(text, tmp_path / "run", world)
    outcome = rank_runner.run_to_end(run, world, partial(limit_after, run, 5))
    assert (outcome.outcome, outcome.reason) == ("completed", Reason.LIMIT)
    assert 6 <= outcome.step <= 9


def limit_after(run: RunDir, step: int) -> None:
    beat = StepHeartbeat.beat

    def request_at(self: StepHeartbeat, done: int) -> None:
        beat(self, done)
        if done == step and self._descriptor is not None:
            settings = RunSettings(log_interval=1, save_interval=10, keep_last=3, max_minutes=1e-6)
            write_json(run.attempt(1).settings, settings.model_dump())

    mock.patch.object(StepHeartbeat, "beat", request_at).start()


def kill_at_the_limit() -> None:
    """SIGKILL this rank after the evaluation that reaches the target."""
    import os

    from trainyard.worker.train import Trainer

    def killing(self: Trainer, _: object) -> bool:
        if self.limit is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    mock.patch.object(Trainer, "_score_tasks", killing).start()


def test_a_target_that_was_reached_before_a_crash_ends_the_next_attempt(text: Path, tmp_path: Path) -> None:
    """The evaluation is not repeated, so its loss is read from the outbox."""
    run = limited(text, tmp_path / "run", target_loss=100.0)
    described = json.loads(run.spec.read_text())
    described["data"]["eval_fraction"] = 0.2
    run.spec.write_text(json.dumps(described))
    assert rank_runner.start(run, 1, kill_at_the_limit).wait() == [-signal.SIGKILL]
    outcome = rank_runner.run_to_end(run)
    assert (outcome.outcome, outcome.reason, outcome.step) == ("completed", Reason.LIMIT, 2)
    assert "target_loss 100 is reached at step 2: the eval_loss is " in str(outcome.message)
    assert rank_runner.metrics(run, 2) == {}, "nothing is evaluated twice"
