"""One optimizer step: micro-batches, one gradient exchange, clipping, and the update if the gradient is finite."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from trainyard.contract.failpoints import hit
from trainyard.worker.data.microbatch import MicroBatch, ModelInputs
from trainyard.worker.splitmix import GAMMA, splitmix64
from trainyard.worker.training.bits_per_byte import ByteCounter
from trainyard.worker.training.nonfinite import DeviceNonFiniteGuard
from trainyard.worker.training.parallel import SplitModel
from trainyard.worker.training.verify import StepVerifier


@dataclass(frozen=True)
class Precision:
    """The data type of the forward pass. The weights are always float32."""

    device_type: str
    dtype: torch.dtype

    def autocast(self, *, keep_copies: bool = True) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a forward pass. ``keep_copies``: keep the weights in ``dtype`` until its end."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=keep_copies)


@dataclass(frozen=True)
class StepMetrics:
    """What a step measured on this rank.

    ``grad_norm`` is the norm of the summed gradient, equal on all ranks. ``nonfinite_rows``: rows of the micro-batches
    whose loss was not finite. ``max_loss_rows``: rows of the micro-batch with the highest mean loss. ``experts``:
    tokens per expert, () for a dense model. ``text_bytes``: of the text that the tokens stand for, 0 if unknown.
    """

    grad_norm: float
    loss_sum: float
    aux_sum: float
    tokens: int
    applied: bool
    text_bytes: float = 0.0
    nonfinite_rows: tuple[int, ...] = ()
    max_loss_rows: tuple[int, ...] = ()
    experts: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss over this rank's tokens, NaN if it had none."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def finite(self) -> bool:
        """Whether the gradient was finite. Equal on all ranks: a NaN of one rank is in the sum of all."""
        return math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class PendingMetrics:
    """The metrics of a step, still on the device: reading them waits until the step is done.

    ``values`` float64: loss sum and auxiliary loss sum of each micro-batch, then the gradient norm, 1 if the update was
    skipped, the bytes of text, and the tokens of each expert. ``micro_batches``: (rows, tokens) of each.
    """

    values: torch.Tensor
    micro_batches: list[tuple[tuple[int, ...], int]]

    def read(self) -> StepMetrics:
        """Wait for the step and return its metrics, in one transfer from the device."""
        return self.parse(self.values.tolist())

    def parse(self, values: list[float]) -> StepMetrics:
        """Return the metrics, given ``values`` on the host."""
        count = 2 * len(self.micro_batches)
        sums, (grad_norm, skipped, text_bytes, *experts) = values[:count], values[count:]
        losses, aux = sums[::2], sums[1::2]
        bad = [rows for (rows, _), loss in zip(self.micro_batches, losses, strict=True) if not math.isfinite(loss)]
        means = [loss / max(1, tokens) for (_, tokens), loss in zip(self.micro_batches, losses, strict=True)]
        return StepMetrics(
            grad_norm=grad_norm,
            loss_sum=sum(losses),
            aux_sum=sum(aux),
            tokens=sum(tokens for _, tokens in self.micro_batches),
            applied=not skipped,
            text_bytes=text_bytes,
            nonfinite_rows=tuple(row for rows in bad for row in rows),
            max_loss_rows=self.micro_batches[means.index(max(means))][0],
            experts=tuple(experts),
        )


def read_metrics(steps: list[PendingMetrics]) -> list[StepMetrics]:
    """Wait for all of ``steps`` and return their metrics, in one transfer from the device."""
    sizes = [len(step.values) for step in steps]
    values = torch.cat([step.values for step in steps]).tolist()
    ends = list(itertools.accumulate(sizes))
    return [step.parse(values[end - size : end]) for step, size, end in zip(steps, sizes, ends, strict=True)]


class Verification(NamedTuple):
    """A request to verify a step. ``on_second_pass`` is called before the passes are repeated."""

    verifier: StepVerifier
    step: int
    on_second_pass: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class TrainStep:
    """Runs optimizer steps. ``module`` is ``model`` as it is called: compiled, or wrapped in DDP.

    ``split``: how the ranks share the update, None if each rank does all of it. ``recomputes``: with gradient
    checkpointing the copies of the weights in half precision are not kept for the backward pass. ``byte_counter``: None
    if the bytes of the tokens are unknown.
    """

    module: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    aux_coefficient: float
    grad_clip: float
    guard: DeviceNonFiniteGuard
    byte_counter: ByteCounter | None = None
    split: SplitModel | None = None
    recomputes: bool = False
    peak_rate_of_decay: float | None = None
    """The learning rate at which the weight decay is the spec's: it changes in proportion. None: it is constant."""
    replays_graphs: bool = False
    """Whether the compiled model is a CUDA graph."""

    def run(
        self,
        micro_batches: Iterable[MicroBatch],
        learning_rate: float,
        seed_micro_batch: Callable[[int], None],
        verification: "Verification | None" = None,
    ) -> PendingMetrics:
        """Run one step. The weights change only if the whole gradient is finite and the guard allows updates.

        ``seed_micro_batch(i)`` is called before micro-batch i. With ``verification`` the passes run twice. Without it
        nothing here waits for the device.
        """
        hit("step.begin")
        if verification is None:
            sums, expert_counts, done = self._accumulate(micro_batches, seed_micro_batch)
        else:
            sums, expert_counts, done = self._accumulate_twice(micro_batches, seed_micro_batch, verification)
        hit("step.accumulated")
        if self.split is not None:
            self.split.attach_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        found_inf = self.guard.found_inf(norm)
        self._update(norm, learning_rate, found_inf)
        hit("step.updated")
        if self.scaler.is_enabled():
            self.scaler.update()  # unscale_ has recorded whether the gradient overflowed
        self._clear_gradients()
        scalars = torch.stack([*sums, norm.to(torch.float64), found_inf.to(torch.float64), self._text_bytes(done)])
        experts = [sum(expert_counts[1:], start=expert_counts[0]).double()] if expert_counts else []
        return PendingMetrics(torch.cat([scalars, *experts]), [(micro.rows, micro.tokens) for micro in done])

    def warm_up(self, micro_batch: MicroBatch) -> None:
        """Run a micro-batch without labels, to compile the model and to fix the order of DDP's buckets."""
        # DDP orders its buckets by the first backward pass, and the last bits of sums over three or more ranks depend
        # on that order. Every attempt makes its first pass with the same batch, so a resumed run is bit-identical to
        # an uninterrupted one.
        self._accumulate([micro_batch], lambda _: None)
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        if self.split is not None:
            self.split.clear_gradients()
        else:
            # DDP's gradients are views into its buckets: keep them, so that nothing is copied.
            self.optimizer.zero_grad(set_to_none=not (self.is_ddp or self.replays_graphs))

    def _allocate_gradients(self) -> None:
        """Allocate a zero gradient for each parameter that has none."""
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _text_bytes(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Return the bytes of text that the step predicts: float64 scalar on the device."""
        total = torch.zeros((), dtype=torch.float64, device=self.guard.device)
        if self.byte_counter is not None:
            for micro in micro_batches:
                total += self.byte_counter.count(micro.batch)
        return total

    @property
    def is_ddp(self) -> bool:
        return isinstance(self.module, nn.parallel.DistributedDataParallel)

    def _accumulate_twice(
        self,
        micro_batches: Iterable[MicroBatch],
        seed_micro_batch: Callable[[int], None],
        verification: "Verification",
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[MicroBatch]]:
        """Run `_accumulate` twice, and raise TrainingError if the bits differ. Keep the second gradient."""
        # Only dropout draws random numbers, and it is seeded for each micro-batch. So both passes draw the same ones.
        verification.verifier.begin()
        first = self._accumulate(micro_batches, seed_micro_batch, verification.verifier)
        digests = verification.verifier.take_digests(first[0])
        self._clear_gradients()
        verification.on_second_pass()
        second = self._accumulate(first[2], seed_micro_batch, verification.verifier)
        verification.verifier.require_equal(verification.step, digests, verification.verifier.take_digests(second[0]))
        return second

    def _accumulate(
        self,
        micro_batches: Iterable[MicroBatch],
        seed_micro_batch: Callable[[int], None],
        verifier: StepVerifier | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[MicroBatch]]:
        """Run forward and backward of all micro-batches. Ranks exchange gradients in the last one, with FSDP in each.

        Return loss sum and auxiliary loss sum of each, tokens per expert of each (MoE only), and the micro-batches.
        """
        sums: list[torch.Tensor] = []
        expert_counts: list[torch.Tensor] = []
        done: list[MicroBatch] = []
        if self.replays_graphs and self.split is None and not self.is_ddp:
            # Without this, the gradients of the first backward pass are in memory of the CUDA graph, which reuses it
            # for the next micro-batch. DDP, and so zero1, copies gradients to its buckets.
            self._allocate_gradients()
        for index, (micro, is_last) in enumerate(_with_last(micro_batches)):
            seed_micro_batch(index)
            hit("step.micro_batch")
            if self.replays_graphs:
                compiler: Any = torch.compiler  # unannotated
                compiler.cudagraph_mark_step_begin()  # what the last micro-batch returned may be overwritten
            with self._no_sync_unless(is_last):
                with self.precision.autocast(keep_copies=not self.recomputes):
                    output = forward(self.module, micro.batch)
                    loss = (output.loss_sum + self.aux_coefficient * output.aux_sum) * micro.factor
                if is_last and verifier is not None:
                    verifier.record_next()
                self.scaler.scale(loss).backward()
            sums += [output.loss_sum.detach().to(torch.float64), output.aux_sum.detach().to(torch.float64)]
            # A copy: a CUDA graph writes to the same memory in the next micro-batch.
            expert_counts += [output.expert_counts.clone()] if output.expert_counts is not None else []
            done.append(micro)
        return sums, expert_counts, done

    def _no_sync_unless(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        if is_last or not isinstance(self.module, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def _gradient_norm(self) -> torch.Tensor:
        if self.split is not None:
            return self.split.gradient_norm()
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _update(self, norm: torch.Tensor, learning_rate: float, found_inf: torch.Tensor) -> None:
        if self.grad_clip > 0:
            updated = self.split.updated if self.split is not None else self.model.parameters()
            nn.utils.clip_grads_with_norm_(updated, self.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_multiplier", 1.0)
            if self.peak_rate_of_decay is not None:
                peak = group.setdefault("peak_weight_decay", group["weight_decay"])
                group["weight_decay"] = peak * (learning_rate / self.peak_rate_of_decay)
        # GradScaler passes this to fused optimizers: if it is 1, their kernels change nothing. No sync is needed.
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.split is not None:
            self.split.exchange_weights()


def forward(module: nn.Module, batch: ModelInputs) -> Any:
    """Run one forward pass. Return a `model.decoder.DecoderOutput`."""
    return module(
        batch.input_ids,
        position_ids=batch.position_ids,
        segment_ids=batch.segment_ids,
        offsets=batch.offsets,
        labels=batch.labels,
    )


def _with_last(micro_batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, bool]]:
    """Yield each micro-batch and whether it is the last one, which is known after loading one ahead."""
    iterator = iter(micro_batches)
    current = next(iterator)
    for following in iterator:
        yield current, False
        current = following
    yield current, True


def seed_dropout(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch's generators from these numbers alone, so that a checkpoint needs no generator state."""
    state = np.array([seed % 2**64], dtype=np.uint64)
    for part in (step, rank, micro):
        state = splitmix64(state ^ np.uint64(part), int(GAMMA))
    torch.manual_seed(int(state[0]))
