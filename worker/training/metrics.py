"""Metrics since the last metric line: sums on each rank, which are gathered only for a line."""

import math
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from trainyard.contract.events import MetricEvent
from trainyard.contract.smoothing import HALF_LIFE, Ema
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.training.bits_per_byte import bits_per_byte
from trainyard.worker.training.step import StepMetrics
from trainyard.worker.training.verify import on_accumulated

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 6000 ADA", 364e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090 D", 147e12),
    ("RTX 4090", 165.2e12),
    ("RTX 4080", 97.5e12),
    ("RTX 3090", 71e12),
    ("RTX A6000", 154.8e12),
)
"""Part of a GPU's name -> dense bf16 FLOP/s with float32 sums. Source: NVIDIA's data sheets. The first match counts."""


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of one GPU, or None if it is unknown: no MFU is better than a wrong one."""
    name = device_name.upper()
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


@dataclass(frozen=True)
class MetricsWindow:
    """One rank's sums since the last metric line. Part of every checkpoint, so that a resumed curve has equal points.

    ``nonfinite``: steps with a non-finite loss. ``experts``: tokens per expert over all layers, () for a dense model.
    ``text_bytes``: of the text that the tokens stand for; None if a release without bits per byte has begun the window.
    """

    loss_sum: float = 0.0
    aux_sum: float = 0.0
    tokens: float = 0.0
    nonfinite: float = 0.0
    experts: tuple[float, ...] = ()
    text_bytes: float | None = 0.0

    @classmethod
    def from_row(cls, row: FloatRow, text_bytes: float | None) -> Self:
        """Return the window that `to_row` gave."""
        loss_sum, aux_sum, tokens, nonfinite = row[:4]
        return cls(loss_sum, aux_sum, tokens, nonfinite, tuple(row[4:]), text_bytes)

    def with_experts(self, experts: int) -> Self:
        """Return the window with ``experts`` counts: `gather` needs equal lengths, also before the first step."""
        return self if self.experts else replace(self, experts=(0.0,) * experts)

    def add(self, result: StepMetrics) -> Self:
        """Return the window with one more step. A non-finite loss is counted, not added."""
        if not (math.isfinite(result.loss_sum) and math.isfinite(result.aux_sum)):
            return replace(self, nonfinite=self.nonfinite + 1)
        return replace(
            self,
            loss_sum=self.loss_sum + result.loss_sum,
            aux_sum=self.aux_sum + result.aux_sum,
            tokens=self.tokens + result.tokens,
            experts=tuple(a + b for a, b in zip(self.experts, result.experts, strict=True)),
            text_bytes=None if self.text_bytes is None else self.text_bytes + result.text_bytes,
        )

    def to_row(self) -> FloatRow:
        """Return the window without its bytes as numbers, to be gathered or stored."""
        return [self.loss_sum, self.aux_sum, self.tokens, self.nonfinite, *self.experts]


def _with_bytes(window: MetricsWindow) -> FloatRow:
    # NaN makes the sum of all ranks unknown.
    return [math.nan if window.text_bytes is None else window.text_bytes, *window.to_row()]


def restore_window(
    rows: list[FloatRow], ranks: DistributedContext, text_bytes: Sequence[float | None] = ()
) -> MetricsWindow:
    """Return this rank's saved window. If the number of ranks has changed, rank 0 takes the sum of all.

    ``text_bytes``: those of each row, or () if they were not saved.
    """
    text_bytes = text_bytes or [None] * len(rows)
    if len(rows) == ranks.world:
        return MetricsWindow.from_row(rows[ranks.rank], text_bytes[ranks.rank])
    if ranks.is_main_process and rows:
        known = [each for each in text_bytes if each is not None]
        whole = sum(known) if len(known) == len(rows) else None
        return MetricsWindow.from_row([sum(column) for column in zip(*rows, strict=True)], whole)
    return MetricsWindow()


MAX_TIMED_STEPS = 256
"""Number of steps between two metric lines whose time is measured: each keeps two CUDA events."""


class RankTimer:
    """Measures a rank's own time in a step: until its gradient is complete, without waiting for the other ranks.

    The whole step takes equally long on all ranks, because they exchange gradients, so only this time shows a slow
    rank. On CUDA, events on the device measure it without a sync. ``last``: the parameter whose gradient comes last.
    """

    def __init__(self, last: Tensor, device: torch.device) -> None:
        self._device = device
        self._start: Any = None
        self._end: Any = None
        self._steps: list[tuple[Any, Any]] = []
        on_accumulated(last, lambda _: self._mark_end())

    def begin_step(self) -> None:
        self._start, self._end = self._now(), None

    def end_step(self) -> None:
        if self._end is not None and len(self._steps) < MAX_TIMED_STEPS:
            self._steps.append((self._start, self._end))

    def reset(self) -> None:
        self._steps = []

    def seconds(self) -> float:
        """Return the mean over the steps since `reset`, or NaN if there are none. Read their metrics first."""
        return sum(map(self._between, self._steps)) / len(self._steps) if self._steps else math.nan

    def _mark_end(self) -> None:
        # Called in each micro-batch. The last call of a step counts.
        if self._device.type == "cuda" and self._end is not None:
            self._end.record()
        else:
            self._end = self._now()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        cuda: Any = torch.cuda  # its events are unannotated
        event = cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, step: tuple[Any, Any]) -> float:
        start, end = step
        if self._device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class MetricsProcessor:
    """Sums up this rank's steps, and makes metric lines from the sums of all ranks.

    ``unevaluated``: the line of the current step, if its evaluation is still to be done. ``smoothed``: the moving
    average of the losses of all lines. ``timer``: None for one rank.
    """

    def __init__(
        self,
        ranks: DistributedContext,
        window: MetricsWindow,
        flops_per_token: float,
        has_aux: bool,
        experts: int = 0,
        timer: RankTimer | None = None,
    ) -> None:
        self.window = window
        self.last_loss: float | None = None
        self.unevaluated: MetricEvent | None = None
        self.smoothed = Ema(HALF_LIFE)
        self._ranks = ranks
        self._flops_per_token = flops_per_token
        self._has_aux = has_aux
        self._experts = experts
        self._timer = timer
        self._peak_flops = peak_flops(device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._step_start = time.perf_counter()
        self.rewind(window)

    def begin_step(self) -> None:
        """Start the clock of a step. Time between steps (saving, evaluating) does not count as step time."""
        self._step_start = time.perf_counter()
        if self._timer is not None:
            self._timer.begin_step()

    def restart_rank_clock(self) -> None:
        """Measure only the second pass of a verified step. In the first one the rank has waited for the others."""
        if self._timer is not None:
            self._timer.begin_step()

    def record(self, result: StepMetrics) -> None:
        """Add a step to the window."""
        self.window = self.window.add(result)

    def end_step(self, step_tokens: int, data_seconds: float) -> None:
        """Stop the clock of a step. ``step_tokens``: of all ranks."""
        self._steps += 1
        self._seconds += time.perf_counter() - self._step_start
        self._data_seconds += data_seconds
        self._timed_tokens += step_tokens
        if self._timer is not None:
            self._timer.end_step()

    def rewind(self, window: MetricsWindow) -> None:
        """Continue from the window of a checkpoint, with timing reset."""
        self.window = window.with_experts(self._experts)
        # Of this attempt's steps since the last metric line.
        self._steps, self._seconds, self._data_seconds, self._timed_tokens = 0, 0.0, 0.0, 0
        if self._timer is not None:
            self._timer.reset()

    def gather_windows(self) -> tuple[list[FloatRow], list[float | None]]:
        """Return the rows of all ranks' windows, and the bytes of text in each. All ranks call it together."""
        rows = self._ranks.gather(_with_bytes(self.window))
        return [row[1:] for row in rows], [None if math.isnan(row[0]) else row[0] for row in rows]

    def metric_event(
        self, *, step: int, epoch: float, learning_rate: float, tokens: int, grad_norm: float, eval_loss: float | None
    ) -> MetricEvent:
        """Return the metric line of the steps since the last one, and reset the window. All ranks call it together."""
        own_seconds = self._timer.seconds() if self._timer is not None else math.nan
        own = [self._data_seconds, float(peak_memory_bytes(self._ranks.device)), own_seconds, *_with_bytes(self.window)]
        columns = list(zip(*self._ranks.gather(own), strict=True))
        data_seconds, memory = max(columns[0]), max(columns[1])
        slowest, spread = slowest_rank(columns[2])
        text_bytes, loss_sum, aux_sum, counted, nonfinite, *experts = map(sum, columns[3:])
        loss = loss_sum / counted if counted else None
        steps, seconds = self._steps, self._seconds
        tokens_per_second = self._timed_tokens / seconds if seconds else None
        self.last_loss = loss
        if loss is not None and math.isfinite(loss):
            self.smoothed.add(step, loss)
        self.rewind(MetricsWindow())
        return MetricEvent(
            step=step,
            epoch=epoch,
            loss=loss,
            aux_loss=aux_sum / counted if counted and self._has_aux else None,
            learning_rate=learning_rate,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            tokens=tokens,
            tokens_per_second=tokens_per_second,
            mfu=self._mfu(tokens_per_second),
            step_seconds=seconds / steps if steps else None,
            step_seconds_max_rank=slowest,
            step_seconds_spread=spread,
            data_seconds=data_seconds / steps if steps else None,
            memory_bytes=int(memory),
            eval_loss=eval_loss,
            expert_load=[tokens / sum(experts) for tokens in experts] if sum(experts) else None,
            nonfinite=bool(nonfinite) or not math.isfinite(grad_norm),
            bpb=bits_per_byte(loss_sum, text_bytes),
        )

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self._peak_flops is None:
            return None
        return tokens_per_second * self._flops_per_token / (self._peak_flops * self._ranks.world)


def slowest_rank(seconds: Sequence[float]) -> tuple[int | None, float | None]:
    """Return the rank with the most ``seconds``, and its seconds divided by the median of all ranks.

    (None, None) for one rank, or if the time of a rank is unknown.
    """
    if len(seconds) == 1 or not all(math.isfinite(each) and each > 0 for each in seconds):
        return None, None
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    # The lower of the middle two, if their number is even: the slower of two ranks is compared with the other one.
    return rank, seconds[rank] / statistics.median_low(seconds)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: allocated on the GPU if there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
