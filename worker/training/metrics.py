"""What is measured between two metric lines: sums on each rank, gathered only when a line is due."""

import math
import resource
import time
from dataclasses import dataclass, replace
from typing import Self

import torch

from trainyard.contract.events import Metric
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.training.step import StepMetrics

PEAKS: tuple[tuple[str, float], ...] = (
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
    ("RTX 4090", 165.2e12),
    ("RTX 4080", 97.5e12),
    ("RTX 3090", 71e12),
    ("RTX A6000", 154.8e12),
)
"""Part of a card's name -> dense bf16 FLOP/s with float32 sums. Source: NVIDIA's data sheets. First match counts."""


def peak_flops(device_name: str) -> float | None:
    """bf16 FLOP/s of one card, or None where it is not known: then no MFU is told rather than a wrong one."""
    name = device_name.upper()
    return next((peak for part, peak in PEAKS if part in name), None)


@dataclass(frozen=True)
class MetricsWindow:
    """One rank's sums since the last metric line. It is part of every checkpoint: a resumed curve has equal points.

    ``experts``: tokens that each expert was given, over all layers; () for a dense model.
    """

    loss_sum: float = 0.0
    aux_sum: float = 0.0
    tokens: float = 0.0
    nonfinite: float = 0.0
    experts: tuple[float, ...] = ()

    @classmethod
    def of(cls, row: FloatRow) -> Self:
        """The inverse of `row`."""
        loss_sum, aux_sum, tokens, nonfinite = row[:4]
        return cls(loss_sum, aux_sum, tokens, nonfinite, tuple(row[4:]))

    def from_row(self, experts: int) -> Self:
        """With room for so many experts: all ranks' rows must be of one length, also that of one without a step."""
        return self if self.experts else replace(self, experts=(0.0,) * experts)

    def add(self, result: StepMetrics) -> Self:
        """The sums with one more step; what is not finite is counted, not added."""
        if not (math.isfinite(result.loss_sum) and math.isfinite(result.aux_sum)):
            return replace(self, nonfinite=self.nonfinite + 1)
        return replace(
            self,
            loss_sum=self.loss_sum + result.loss_sum,
            aux_sum=self.aux_sum + result.aux_sum,
            tokens=self.tokens + result.tokens,
            experts=_sum_experts(self.experts, result.experts),
        )

    def row(self) -> FloatRow:
        """As numbers, to be gathered or stored."""
        return [self.loss_sum, self.aux_sum, self.tokens, self.nonfinite, *self.experts]


def _sum_experts(before: tuple[float, ...], new: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(before, new, strict=True))


def restore_window(rows: list[FloatRow], ranks: DistributedContext) -> MetricsWindow:
    """What this rank goes on from: its own sums, or, with another number of ranks, rank 0 takes them all."""
    if len(rows) == ranks.world:
        return MetricsWindow.of(rows[ranks.rank])
    if ranks.is_main_process and rows:
        return MetricsWindow.of([sum(column) for column in zip(*rows, strict=True)])
    return MetricsWindow()


@dataclass(frozen=True)
class StepTiming:
    """Where the time of this attempt's steps since the last line went; seconds."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, seconds: float, data_seconds: float) -> Self:
        """With one more step."""
        return replace(
            self,
            steps=self.steps + 1,
            seconds=self.seconds + seconds,
            data_seconds=self.data_seconds + data_seconds,
        )


class MetricsProcessor:
    """The sums of this rank, and how a metric line is made of everybody's."""

    def __init__(
        self,
        ranks: DistributedContext,
        interval: MetricsWindow,
        flops_per_token: float,
        has_aux: bool,
        experts: int = 0,
    ) -> None:
        self.interval = interval.from_row(experts)
        self.pace = StepTiming()
        self.last_loss: float | None = None
        self._ranks = ranks
        self._flops_per_token = flops_per_token
        self._has_aux = has_aux
        self._experts = experts
        self._peak = peak_flops(device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._pace_tokens = 0
        self._began = time.perf_counter()

    def begin_step(self) -> None:
        """Start the clock of a step. What happens between steps (saving, evaluating) is nobody's step time."""
        self._began = time.perf_counter()

    def record(self, result: StepMetrics) -> None:
        """Add what a step measured to the sums."""
        self.interval = self.interval.add(result)

    def end_step(self, step_tokens: int, data_seconds: float) -> None:
        """Stop the clock of a step; ``step_tokens`` are those of all ranks."""
        self.pace = self.pace.add(time.perf_counter() - self._began, data_seconds)
        self._pace_tokens += step_tokens

    def rewind(self, interval: MetricsWindow) -> None:
        """Go on from a checkpoint's sums."""
        self.interval, self.pace, self._pace_tokens = interval.from_row(self._experts), StepTiming(), 0

    def metric_event(
        self, *, step: int, epoch: float, learning_rate: float, tokens: int, grad_norm: float, eval_loss: float | None
    ) -> Metric:
        """The metric line of everything since the last one: the one collective there is. All ranks call it together."""
        own = [self.pace.data_seconds, float(memory_bytes(self._ranks.device)), *self.interval.row()]
        rows = self._ranks.gather(own)
        data_seconds, memory = (max(row[i] for row in rows) for i in range(2))
        loss_sum, aux_sum, counted, nonfinite, *experts = (sum(column) for column in list(zip(*rows, strict=True))[2:])
        loss = loss_sum / counted if counted else None
        steps, seconds = self.pace.steps, self.pace.seconds
        speed = self._pace_tokens / seconds if seconds else None
        self.last_loss = loss
        self.rewind(MetricsWindow())
        return Metric(
            step=step,
            epoch=epoch,
            loss=loss,
            aux_loss=aux_sum / counted if counted and self._has_aux else None,
            learning_rate=learning_rate,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            tokens=tokens,
            tokens_per_second=speed,
            mfu=self._mfu(speed),
            step_seconds=seconds / steps if steps else None,
            data_seconds=data_seconds / steps if steps else None,
            memory_bytes=int(memory),
            eval_loss=eval_loss,
            expert_load=[tokens / sum(experts) for tokens in experts] if sum(experts) else None,
            nonfinite=bool(nonfinite) or not math.isfinite(grad_norm),
        )

    def _mfu(self, tokens_per_second: float | None) -> float | None:
        if tokens_per_second is None or self._peak is None:
            return None
        return tokens_per_second * self._flops_per_token / (self._peak * self._ranks.world)


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name()


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def memory_bytes(device: torch.device) -> int:
    """The most memory this rank has used so far: of the card where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
