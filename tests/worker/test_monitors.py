"""Warnings about the curve of a run: loss spikes, a flat curve, gradients, and the load of the experts."""

import json
import math
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.worker import rank_runner
from tests.worker.test_step import SHAPE, cut, rows, run, train_state
from trainyard.contract.events import MetricEvent, WarningEvent
from trainyard.model.config import ModelConfig
from trainyard.model.moe import MoE
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.events.trackers import scalars
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow, restore_window
from trainyard.worker.training.monitors import (
    MAX_SPIKE_ROWS,
    NO_SPIKE,
    LearningMonitor,
    LossSpikeDetector,
    Spike,
    spike_warning,
)
from trainyard.worker.training.step import StepMetrics

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))

NOISE: dict[str, Callable[[random.Random], float]] = {
    "none": lambda _: 0.0,
    "normal": lambda dice: dice.gauss(0, 0.15),
    "laplace": lambda dice: dice.choice((-1, 1)) * dice.expovariate(8),
    "two kinds of rows": lambda dice: dice.gauss(0, 0.05) + (0.4 if dice.random() < 0.2 else 0.0),
    "coarse": lambda dice: round(dice.gauss(0, 0.1), 1),
}


def falling(step: int) -> float:
    """A curve as runs have it: from 8.8 down to 1.6."""
    return 1.6 + 7.2 * math.exp(-step / 300)


@pytest.mark.parametrize("noise", NOISE)
def test_noise_is_no_spike(noise: str) -> None:
    seed = 5
    dice, spikes = random.Random(f"{seed} {noise}"), LossSpikeDetector()
    for step in range(1, 5001):
        spikes.observe(step, falling(step) + NOISE[noise](dice), (step,))
        assert spikes.pending is None, f"seed {seed}: false alarm at step {step}: {spikes.pending}"


@pytest.mark.parametrize("noise", NOISE)
def test_a_spike_is_found_in_noise_and_reported_once(noise: str) -> None:
    dice, spikes = random.Random(noise), LossSpikeDetector()
    found = []
    for step in range(1, 1001):
        jumped = 4.0 if 700 <= step < 703 else 0.0
        spikes.observe(step, falling(step) + NOISE[noise](dice) + jumped, (step, step + 1))
        if spikes.pending is not None:
            found.append(Spike.from_row(spikes.take_row()))
    assert [spike.step for spike in found] == [700]
    assert found[0].rows == (700, 701)
    assert found[0].loss == pytest.approx(found[0].typical + 4, abs=1.5)


def test_the_first_steps_are_not_judged_and_a_loss_that_stays_high_becomes_usual() -> None:
    spikes, found = LossSpikeDetector(), []
    for step in range(1, 500):
        spikes.observe(step, 9.0 if step == 20 or step >= 200 else 2.0, ())
        found += [Spike.from_row(spikes.take_row()).step] if spikes.pending is not None else []
    assert found == [200]
    spikes.observe(500, math.nan, ())
    spikes.observe(501, math.inf, ())
    assert spikes.pending is None


def test_spikes_of_all_ranks_are_one_warning() -> None:
    assert spike_warning([NO_SPIKE.to_row(), NO_SPIKE.to_row()]) is None
    few, many = Spike(41, 5.0, 2.0, (7, 9)), Spike(41, 9.5, 2.0, tuple(range(100, 120)))
    assert Spike.from_row(few.to_row()) == few
    assert len(few.to_row()) == len(many.to_row()) == len(NO_SPIKE.to_row())
    warning = spike_warning([few.to_row(), NO_SPIKE.to_row(), many.to_row()])
    assert warning is not None
    assert (warning.code, warning.step) == ("loss_spike", 41)
    assert "jumped to 9.500 at step 41, where 2.000 is usual; its worst micro-batch of rank 2 has rows 100, 101" in (
        warning.message
    )
    assert warning.data == {"loss": 9.5, "usual": 2.0, "rows": list(range(100, 100 + MAX_SPIKE_ROWS)), "rank": 2}
    alone = spike_warning([few.to_row()])
    assert alone is not None
    assert "micro-batch has rows 7, 9." in alone.message


def test_a_spike_is_taken_once() -> None:
    spikes = LossSpikeDetector(pending=Spike(3, 2.0, 1.0, (1,)))
    assert Spike.from_row(spikes.take_row()).step == 3
    assert Spike.from_row(spikes.take_row()) == NO_SPIKE


def line(step: int, loss: float, load: list[float] | None = None) -> MetricEvent:
    return MetricEvent(step=step, epoch=0.0, loss=loss, learning_rate=1e-3, tokens=step, expert_load=load)


def starved(watch: LearningMonitor, loads: dict[int, list[float]], start: int = 1) -> list[WarningEvent]:
    """The warnings of a run whose points have these loads."""
    warnings: list[WarningEvent] = []
    for step in range(start, max(loads) + 1):
        warnings += watch.observe(step, 2.0, 1.0)
        warnings += watch.observe_metrics(line(step, 2.0, loads[step])) if step in loads else ()
    return warnings


EVEN, STARVED = [0.26, 0.24, 0.25, 0.25], [0.41, 0.0, 0.35, 0.24]


def test_an_expert_without_tokens_gives_one_alert() -> None:
    (warning,) = starved(LearningMonitor(None), dict.fromkeys(range(10, 1000, 10), STARVED))
    assert (warning.code, warning.step) == ("experts_starve", 50)
    assert "of the 4 experts get almost no tokens since step 0: 1 (0.0%); an even share is 25%" in warning.message
    assert "router_aux_loss_coef" in warning.message
    assert warning.data == {"experts": [1], "expert_load": STARVED}
    (long_window,) = starved(LearningMonitor(None), {100: STARVED})
    assert long_window.step == 100


def test_an_expert_that_sometimes_gets_tokens_gives_no_alert() -> None:
    loads = {step: STARVED if step % 50 else EVEN for step in range(10, 1000, 10)}
    assert starved(LearningMonitor(None), loads) == []
    assert starved(LearningMonitor(None), {step: [0.1, 0.3, 0.3, 0.3] for step in range(10, 500, 10)}) == []
    other = [0.0, 0.41, 0.35, 0.24]  # each starves for 40 steps
    assert starved(LearningMonitor(None), {s: other if s % 80 < 40 else STARVED for s in range(10, 500, 10)}) == []


def test_experts_are_judged_after_the_warm_up_and_from_the_first_step_of_the_attempt() -> None:
    loads = dict.fromkeys(range(10, 1000, 10), STARVED)
    assert [w.step for w in starved(LearningMonitor(None, warmup_steps=100), loads)] == [150]
    assert [w.step for w in starved(LearningMonitor(None), loads, start=206)] == [260]


def codes(watch: LearningMonitor, losses: Any, norm: float = 1.0) -> list[tuple[str, int]]:
    warnings: list[WarningEvent] = []
    for step, loss in losses:
        warnings += watch.observe(step, loss, norm)
        warnings += watch.observe_metrics(line(step, loss)) if step % 10 == 0 else ()
    return [(warning.code, warning.step or 0) for warning in warnings]


def test_a_run_that_learns_gives_no_warning() -> None:
    assert codes(LearningMonitor(6400), ((step, falling(step)) for step in range(1, 2000))) == []
    # After the loss has fallen once, a flat curve gives no warning.
    assert codes(LearningMonitor(6400), ((step, 8.81 if step < 50 else 3.0) for step in range(1, 2000))) == []


@pytest.mark.parametrize(("vocabulary", "loss", "off"), [(6400, 8.9, 0), (6400, 10.5, 1), (259, 5.6, 0), (259, 3.0, 1)])
def test_the_first_loss_is_compared_with_that_of_a_uniform_guess(vocabulary: int, loss: float, off: int) -> None:
    warnings = list(LearningMonitor(vocabulary).observe(1, loss, 1.0))
    assert [warning.code for warning in warnings] == ["first_loss_off"] * off
    assert all(f"should give {math.log(vocabulary) + 0.05:.2f}" in warning.message for warning in warnings)
    assert list(LearningMonitor(None).observe(1, loss, 1.0)) == []
    assert list(LearningMonitor(vocabulary).observe(2, loss, 1.0)) == []


def test_a_flat_curve_is_reported_once_after_the_warm_up() -> None:
    flat = [(step, 8.8 - 0.0001 * step) for step in range(1, 900)]
    assert codes(LearningMonitor(6400), flat) == [("curve_flat", 300)]
    assert codes(LearningMonitor(6400, warmup_steps=115), flat) == [("curve_flat", 420)]
    # An attempt that starts from a checkpoint does not know the loss of step 1.
    assert codes(LearningMonitor(6400), flat[10:]) == []


def test_gradients_that_vanish_or_blow_up() -> None:
    watch = LearningMonitor(None)
    quiet = [warning for step in range(2, 21) for warning in watch.observe(step, 2.0, 1e-9)]
    assert quiet == []
    (vanished,) = watch.observe(21, 2.0, 1e-9)
    assert "1.0e-09, and was below 1e-06 for 20 steps" in vanished.message
    assert [w.code for step in range(22, 80) for w in watch.observe(step, 2.0, 1e-9 if step % 30 else 1.0)] == []
    assert [w.code for step in range(80, 120) for w in watch.observe(step, 2.0, 5e3)] == ["gradients_blow_up"]
    assert list(watch.observe(121, 2.0, math.nan)) == []


WITH_EXPERTS = ModelConfig(**{**vars(SHAPE), "use_moe": True, "moe_intermediate_size": 32, "num_experts": 4})


def test_the_load_is_what_the_router_chose() -> None:
    student, batch = train_state(WITH_EXPERTS), rows(6, seed=1)
    chosen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, inputs: chosen.append(module._router_scores(inputs[0].flatten(0, 1)).topk(2, dim=-1).indices)
        )
        for layer in student.model.modules()
        if isinstance(layer, MoE)
    ]
    (result,) = run(student, [cut(batch, 2)])
    for handle in handles:
        handle.remove()
    expected = torch.bincount(torch.cat(chosen).flatten(), minlength=4).tolist()
    assert list(result.experts) == expected
    assert sum(expected) == 6 * 12 * 2 * 2, "rows x positions x experts of a token x layers"
    assert run(train_state(), [cut(batch, 2)])[0].experts == ()


def test_the_worst_micro_batch_is_the_one_with_the_highest_mean_loss() -> None:
    student, batch = train_state(), rows(6, seed=1)
    micros = [type(micro)(micro.batch, micro.factor, (10 * i,), micro.tokens) for i, micro in enumerate(cut(batch, 2))]
    with torch.no_grad():
        means = [float(student.model(m.batch.input_ids, labels=m.batch.labels).loss_sum) / m.tokens for m in micros]
    (result,) = run(student, [micros])
    assert result.max_loss_rows == (10 * means.index(max(means)),)
    assert result.loss == pytest.approx(
        sum(m * x.tokens for m, x in zip(means, micros, strict=True)) / batch.tokens, 1e-5
    )
    assert math.isnan(StepMetrics(1.0, 0.0, 0.0, 0, True).loss)


def line_of(metrics: MetricsProcessor) -> MetricEvent:
    return metrics.metric_event(step=2, epoch=0.5, learning_rate=1e-3, tokens=30, grad_norm=1.0, eval_loss=None)


def test_the_expert_load_is_of_all_steps_since_the_last_line_also_after_a_resume() -> None:
    metrics = MetricsProcessor(ALONE, MetricsWindow(), 6.0, has_aux=True, experts=4)
    step = StepMetrics(1.0, 20.0, 2.0, 10, True, experts=(30.0, 10.0, 0.0, 0.0))
    for _ in range(2):
        metrics.begin_step()
        metrics.record(step)
        metrics.end_step(10, 0.0)
    stored = json.loads(json.dumps([metrics.window.to_row()]))
    line = line_of(metrics)
    assert line.expert_load == [0.75, 0.25, 0.0, 0.0]
    assert scalars(line)["expert_load_most"] == 0.75
    assert scalars(line)["expert_load_least"] == 0.0
    assert line_of(metrics).expert_load is None
    again = MetricsProcessor(ALONE, restore_window(stored, ALONE), 6.0, has_aux=True, experts=4)
    assert line_of(again).expert_load == [0.75, 0.25, 0.0, 0.0]
    # With another number of ranks, rank 0 takes the sums of all. The rows of the others have the same length.
    both = restore_window([stored[0], stored[0]], ALONE)
    assert both.experts == (120.0, 40.0, 0.0, 0.0)
    second = MetricsProcessor(
        DistributedContext(1, 2, 1, 2, ALONE.device), MetricsWindow(), 6.0, has_aux=True, experts=4
    )
    assert len(second.window.to_row()) == len(both.to_row())


def test_a_checkpoint_without_expert_loads_is_accepted() -> None:
    old = restore_window([[1.0, 2.0, 3.0, 0.0]], ALONE)
    metrics = MetricsProcessor(ALONE, old, 6.0, has_aux=True, experts=2)
    metrics.begin_step()
    metrics.record(StepMetrics(1.0, 20.0, 2.0, 10, True, experts=(1.0, 3.0)))
    metrics.end_step(10, 0.0)
    assert line_of(metrics).expert_load == [0.25, 0.75]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_the_metrics_of_a_run_with_experts_have_their_load(world: int, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    model = {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 32}
    described = rank_runner.spec(text, model=model, training={"max_steps": 6}, data={"eval_fraction": 0.2})
    run = rank_runner.new_run(tmp_path / "run", {**described, "reporting": {"log_interval": 2}})
    assert rank_runner.run_to_end(run, world).outcome == "completed"
    loads = [line.expert_load for line in rank_runner.metrics(run).values()]
    assert len(loads) == 3
    for load in loads:
        assert load is not None
        assert len(load) == 4
        assert sum(load) == pytest.approx(1)
        assert min(load) >= 0


def jump(rank: int, at: int) -> None:
    """Raise the loss of one rank by 50 for one step, as after a batch of random tokens."""
    from trainyard.worker.training.monitors import LossSpikeDetector

    observe = LossSpikeDetector.observe

    def jumping(self: LossSpikeDetector, step: int, loss: float, rows: tuple[int, ...]) -> None:
        mine = os.environ["RANK"] == str(rank) and step == at
        observe(self, step, loss + 50.0 * mine, rows)

    mock.patch.object(LossSpikeDetector, "observe", jumping).start()


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_spike_of_any_rank_is_a_warning_with_its_step_and_rows(world: int, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    training = {"max_steps": 44, "batch_size": 2, "accumulation_steps": 1}
    described = rank_runner.spec(text, training=training, checkpoint={"save_interval": 100})
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run, world, partial(jump, world - 1, 40)).outcome == "completed"
    warning = rank_runner.warned(run)["loss_spike"]
    assert (warning.step, warning.data["rank"]) == (40, world - 1)
    assert len(warning.data["rows"]) in (1, 2)
    assert warning.data["loss"] > 50
    assert set(rank_runner.warned(run)) == {"loss_spike"}
