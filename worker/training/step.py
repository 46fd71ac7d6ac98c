"""One optimizer step: micro-batches, one gradient exchange, clipping, and the gate before the update."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from trainyard.contract.failpoints import hit
from trainyard.worker.data.microbatch import MicroBatch, ModelInputs
from trainyard.worker.splitmix import GAMMA, splitmix64
from trainyard.worker.training.nonfinite import DeviceNonFiniteGuard


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes; the weights are float32 in any case."""

    device_type: str
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured on this rank. ``grad_norm`` is that of the exchanged gradient, equal on all ranks.

    ``suspects``: rows of the micro-batches whose loss was not finite; ``worst``: rows of the one with the highest mean
    loss. ``experts``: tokens that each expert was given, () for a dense model.
    """

    grad_norm: float
    loss_sum: float
    aux_sum: float
    tokens: int
    applied: bool
    nonfinite_rows: tuple[int, ...] = field(default=())
    max_loss: tuple[int, ...] = field(default=())
    experts: tuple[float, ...] = field(default=())

    @property
    def loss(self) -> float:
        """Mean over this rank's tokens; not a number where it had none."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def finite(self) -> bool:
        """Whether the gradient was finite. Equal on all ranks: a NaN of one rank is in the sum that all have."""
        return math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class PendingMetrics:
    """What a step measured, on the device still: reading it waits until the step is done.

    ``values`` float64: loss and auxiliary sum of each micro-batch, the gradient's norm, 1 where the update was held
    back, and the experts' tokens. ``micros``: (rows, tokens) of each micro-batch.
    """

    values: torch.Tensor
    micros: list[tuple[tuple[int, ...], int]]

    def read(self) -> StepMetrics:
        """Wait for the step, in one transfer from the device."""
        return self.of(self.values.tolist())

    def of(self, values: list[float]) -> StepMetrics:
        """The result that these ``values`` are."""
        sums, (grad_norm, held, *experts) = values[: 2 * len(self.micros)], values[2 * len(self.micros) :]
        losses, aux = sums[::2], sums[1::2]
        bad = [rows for (rows, _), loss in zip(self.micros, losses, strict=True) if not math.isfinite(loss)]
        means = [loss / max(1, tokens) for (_, tokens), loss in zip(self.micros, losses, strict=True)]
        return StepMetrics(
            grad_norm=grad_norm,
            loss_sum=sum(losses),
            aux_sum=sum(aux),
            tokens=sum(tokens for _, tokens in self.micros),
            applied=not held,
            nonfinite_rows=tuple(row for rows in bad for row in rows),
            max_loss=self.micros[means.index(max(means))][0],
            experts=tuple(experts),
        )


def read(steps: list[PendingMetrics]) -> list[StepMetrics]:
    """Wait for all of ``steps``, in one transfer."""
    sizes = [len(step.values) for step in steps]
    values = torch.cat([step.values for step in steps]).tolist()
    ends = list(itertools.accumulate(sizes))
    return [step.of(values[end - size : end]) for step, size, end in zip(steps, sizes, ends, strict=True)]


@dataclass(frozen=True)
class TrainStep:
    """Everything a step works on. ``module`` is ``model`` as it is run: compiled, or wrapped to exchange gradients."""

    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    aux_coefficient: float
    grad_clip: float
    guard: DeviceNonFiniteGuard

    def run(self, micros: Iterable[MicroBatch], learning_rate: float, seed_of: Callable[[int], None]) -> PendingMetrics:
        """Run one step; the weights change only if the whole gradient is finite, and the brake lets them.

        ``seed_of(i)`` seeds the dropout of micro-batch i. Nothing here waits for the device.
        """
        hit("step.begin")
        sums, loads, run = self._accumulate(micros, seed_of)
        hit("step.accumulated")
        norm = self._clip_gradients()
        held = self.guard.found_inf(norm)
        self._update(norm, learning_rate, held)
        hit("step.updated")
        self._update_scaler()
        # With DDP the gradients are views into its buckets, and worth keeping: nothing is copied then.
        self.optimizer.zero_grad(set_to_none=not self.is_ddp)
        scalars = torch.stack([*sums, norm.to(torch.float64), held.to(torch.float64)])
        values = torch.cat([scalars, *([sum(loads[1:], start=loads[0]).double()] if loads else [])])
        return PendingMetrics(values, [(micro.rows, micro.tokens) for micro in run])

    def warm_up(self, micro: MicroBatch) -> None:
        """Run a micro-batch without labels: compiles what is compiled, and lets DDP settle on its buckets.

        DDP orders its buckets anew after the first backward pass, and sums over three or more ranks depend on that
        order in their last bits. Every attempt settles it on the same batch before its first step, so a resumed run
        never differs from an untouched one.
        """
        self._accumulate([micro], lambda _: None)
        self.optimizer.zero_grad(set_to_none=not self.is_ddp)

    @property
    def is_ddp(self) -> bool:
        """Whether ranks exchange gradients."""
        return isinstance(self.module, nn.parallel.DistributedDataParallel)

    def _accumulate(
        self, micros: Iterable[MicroBatch], seed_of: Callable[[int], None]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[MicroBatch]]:
        """Backward through all micro-batches; ranks exchange gradients in the last one only.

        The results: loss and auxiliary sum of each, the experts' tokens in each (none for a dense model), and they.
        """
        sums: list[torch.Tensor] = []
        loads: list[torch.Tensor] = []
        run: list[MicroBatch] = []
        for index, (micro, last) in enumerate(_with_last(micros)):
            seed_of(index)
            hit("step.micro_batch")
            with self._no_sync_unless_last(last):
                with self.precision.autocast():
                    output = forward(self.module, micro.batch)
                    loss = (output.loss_sum + self.aux_coefficient * output.aux_sum) * micro.factor
                self.scaler.scale(loss).backward()
            sums += [output.loss_sum.detach().to(torch.float64), output.aux_sum.detach().to(torch.float64)]
            loads += [output.expert_counts] if output.expert_counts is not None else []
            run.append(micro)
        return sums, loads, run

    def _no_sync_unless_last(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _clip_gradients(self) -> torch.Tensor:
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _update(self, norm: torch.Tensor, learning_rate: float, held: torch.Tensor) -> None:
        if self.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # What GradScaler tells fused optimizers by: their kernels leave everything as it is where it is 1.
        self.optimizer.found_inf = held  # type: ignore[attr-defined]
        self.optimizer.step()

    def _update_scaler(self) -> None:
        """Let the fp16 scaler learn from this step; it has seen in unscale_ whether the gradient overflowed."""
        if self.scaler.is_enabled():
            self.scaler.update()


def forward(module: nn.Module, batch: ModelInputs) -> Any:
    """One forward pass; what comes out is a `model.decoder.DecoderOutput`."""
    return module(
        batch.input_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        offsets=batch.offsets,
        labels=batch.labels,
    )


def _with_last(micros: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Each micro-batch, and whether it is the last, looking one ahead."""
    iterator = iter(micros)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def seed_dropout(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch's generators as a pure function of where in the run we are, so that no generator needs saving."""
    state = np.array([seed % 2**64], dtype=np.uint64)
    for part in (step, rank, micro):
        state = splitmix64(state ^ np.uint64(part), int(GAMMA))
    torch.manual_seed(int(state[0]))
