"""The values of a metric event, and the time of the slowest rank."""

import math
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.worker.test_step import cut, rows, train_state
from trainyard.contract.events import MetricEvent, RankInfo
from trainyard.contract.failpoints import armed
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import (
    MetricsProcessor,
    MetricsWindow,
    RankTimer,
    peak_flops,
    restore_window,
    slowest_rank,
)
from trainyard.worker.training.monitors import StragglerMonitor
from trainyard.worker.training.step import StepMetrics, Verification
from trainyard.worker.training.verify import StepVerifier

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", 147e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla K80", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def result(loss: float, tokens: int, norm: float = 1.0) -> StepMetrics:
    return StepMetrics(grad_norm=norm, loss_sum=loss, aux_sum=2.0, tokens=tokens, applied=True)


def line(metrics: MetricsProcessor, norm: float = 1.0) -> MetricEvent:
    return metrics.metric_event(step=2, epoch=0.5, learning_rate=1e-3, tokens=30, grad_norm=norm, eval_loss=None)


def test_the_loss_of_a_line_is_the_mean_over_tokens_since_the_last_one() -> None:
    metrics = MetricsProcessor(ALONE, MetricsWindow(), 6.0, has_aux=True)
    for loss, tokens in ((30.0, 10), (20.0, 20)):
        metrics.begin_step()
        metrics.record(result(loss, tokens))
        metrics.end_step(tokens, 0.25)
    first = line(metrics)
    assert first.loss == pytest.approx(50 / 30)
    assert first.aux_loss == pytest.approx(4 / 30)
    assert first.data_seconds == pytest.approx(0.25)
    assert metrics.last_loss == first.loss
    metrics.begin_step()
    metrics.record(result(7.0, 7))
    metrics.end_step(7, 0.0)
    assert line(metrics).loss == 1.0


def test_what_is_not_finite_is_counted_and_not_added() -> None:
    metrics = MetricsProcessor(ALONE, MetricsWindow(loss_sum=10.0, tokens=5.0), 6.0, has_aux=False)
    metrics.begin_step()
    metrics.record(result(math.nan, 5))
    metrics.end_step(5, 0.0)
    first = line(metrics, norm=math.inf)
    assert (first.loss, first.grad_norm, first.nonfinite, first.aux_loss) == (2.0, None, True, None)
    assert not line(metrics).nonfinite


def test_each_rank_restores_its_own_sums() -> None:
    rows = [[1.0, 2.0, 3.0, 0.0], [10.0, 20.0, 30.0, 1.0]]
    second = DistributedContext(1, 2, 1, 2, torch.device("cpu"))
    assert restore_window(rows, second, [50.0, 70.0]) == MetricsWindow(10.0, 20.0, 30.0, 1.0, text_bytes=70.0)
    assert restore_window(rows, ALONE, [50.0, 70.0]) == MetricsWindow(11.0, 22.0, 33.0, 1.0, text_bytes=120.0)
    assert restore_window([], ALONE) == MetricsWindow()


class SlowSecondRank(DistributedContext):
    """Two ranks, of which the second computes three times as long."""

    def gather(self, row: list[float]) -> list[list[float]]:
        return [row, [*row[:2], 3 * row[2], *row[3:]]]


def test_a_straggler_is_found_by_its_own_time() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    two = SlowSecondRank(0, 2, 0, 2, torch.device("cpu"))
    metrics = MetricsProcessor(two, MetricsWindow(), 6.0, has_aux=False, timer=RankTimer(weight, two.device))
    for _ in range(3):
        metrics.begin_step()
        for _ in range(2):
            torch.autograd.backward((weight * 2).sum())
        metrics.record(result(1.0, 1))
        metrics.end_step(1, 0.0)
    first = line(metrics)
    assert first.step_seconds_max_rank == 1
    assert first.step_seconds_spread == pytest.approx(3), "3 over 1: a rank of two is not compared with itself"
    assert line(metrics).step_seconds_max_rank is None, "without a step since the last line"


def test_what_a_rank_waits_for_others_is_not_its_own_time() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    timer = RankTimer(weight, torch.device("cpu"))
    began = time.perf_counter()
    timer.begin_step()
    torch.autograd.backward((weight * 2).sum())
    computed = time.perf_counter() - began
    time.sleep(0.05)  # as in the exchange
    timer.end_step()
    assert 0 < timer.seconds() <= computed
    timer.reset()
    assert math.isnan(timer.seconds())
    timer.begin_step()
    timer.end_step()
    assert math.isnan(timer.seconds()), "no gradient: nothing is measured"


def test_a_verified_step_measures_its_second_pass() -> None:
    """In the first one a rank has waited for the others, at the exchange of the gradient."""
    state, clock, waited = train_state(), [0.0], 1000.0
    verifier = StepVerifier(state.model, ALONE, [RankInfo(rank=0, host="node-0", device="cpu", name="CPU")])
    timer = RankTimer(state.model.model.embed_tokens.weight, ALONE.device)
    metrics = MetricsProcessor(ALONE, MetricsWindow(), 6.0, has_aux=False, timer=timer)

    def compute(_: int) -> None:
        clock[0] += 1.0

    def wait(*_: object) -> None:
        clock[0] += waited

    with mock.patch("time.perf_counter", side_effect=lambda: clock[0]), armed("verify.pass_done", wait):
        metrics.begin_step()
        verification = Verification(verifier, 1, metrics.restart_rank_clock)
        state.train_step.run(cut(rows(6, 1), 3), 1e-3, compute, verification)
        metrics.end_step(1, 0.0)
    assert timer.seconds() == pytest.approx(2.0), "two micro-batches"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_events_measure_a_ranks_own_time() -> None:
    weight = torch.nn.Parameter(torch.ones(2048, 2048, device="cuda"))
    timer = RankTimer(weight, weight.device)
    for _ in range(3):
        timer.begin_step()
        for _ in range(2):
            torch.autograd.backward((weight @ weight).sum())
        timer.end_step()
    assert 0 < timer.seconds() < 10


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1.0], (None, None)),
        ([1.0, 1.0, 1.5, 1.0], (2, 1.5)),
        ([2.0, 1.0], (0, 2.0)),
        ([1.0, 1.3], (1, 1.3)),
        ([1.0, 3.0, 1.2, 2.0], (1, pytest.approx(2.5))),
        ([1.0, math.nan], (None, None)),
    ],
)
def test_the_slowest_rank(seconds: list[float], expected: tuple[int | None, float | None]) -> None:
    assert slowest_rank(seconds) == expected


def test_a_straggler_is_reported_once_by_name() -> None:
    places = [RankInfo(rank=rank, host=f"node-{rank}", device="cuda:0", name="Card") for rank in range(2)]
    monitor = StragglerMonitor(places)
    point = MetricEvent(step=1, epoch=0, loss=1, learning_rate=1, tokens=1)

    def warned(count: int, rank: int, spread: float) -> list[str]:
        slow = point.model_copy(update={"step_seconds_max_rank": rank, "step_seconds_spread": spread})
        return [warning.message for _ in range(count) for warning in monitor.observe(slow)]

    assert warned(9, 1, 1.1) == [], "less than a fifth"
    assert warned(4, 1, 1.5) + warned(1, 0, 1.5) + warned(4, 1, 1.5) == [], "not five in a row"
    [message] = warned(9, 1, 1.5)
    assert message.startswith("rank 1 (host node-1, cuda:0 Card) computes 1.50 times as long as the median rank")
    assert list(monitor.observe(point)) == [], "one rank has no spread"


def test_a_window_from_a_checkpoint_without_bytes_has_no_bits_per_byte() -> None:
    old = restore_window([[10.0, 0.0, 5.0, 0.0]], ALONE)
    assert old.text_bytes is None
    metrics = MetricsProcessor(ALONE, old, 6.0, has_aux=False)
    assert metrics.gather_windows() == ([[10.0, 0.0, 5.0, 0.0]], [None])
    assert restore_window([[10.0, 0.0, 5.0, 0.0]] * 2, ALONE, [30.0, None]).text_bytes is None
    metrics.record(replace(result(4.0, 5), text_bytes=20.0))
    assert (line(metrics).bpb, line(metrics).loss) == (None, None)
    metrics.record(replace(result(4.0, 5), text_bytes=20.0))
    assert metrics.gather_windows()[1] == [20.0]
    first = line(metrics)
    assert first.loss == 0.8
    assert first.bpb == pytest.approx(4.0 / math.log(2) / 20)
