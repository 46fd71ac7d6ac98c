"""The state of training: model, optimizer and scaler in `TrainState`, and how far the run is in `TrainProgress`."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.spec import TrainingSpec
from trainyard.contract.status import Reason
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.model.muon import Muon, matrix_parameters
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.data.microbatch import ModelInputs
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.bits_per_byte import ByteCounter
from trainyard.worker.training.nonfinite import DeviceNonFiniteGuard, NonFiniteCounters
from trainyard.worker.training.step import Precision, TrainStep, forward

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class TrainProgress:
    """How far the run is.

    ``data_offset``: step + data_offset is the step of the data order; rollbacks skip data and add to it, a fork that
    restarts its data makes it negative. ``base_step``: schedule and length of the run count from here; not 0 only for
    forks.
    """

    step: int = 0
    tokens: int = 0
    data_offset: int = 0
    base_step: int = 0
    nonfinite: NonFiniteCounters = field(default_factory=NonFiniteCounters)

    def next_step(self, step_tokens: int) -> Self:
        return replace(self, step=self.step + 1, tokens=self.tokens + step_tokens)

    @classmethod
    def from_state(cls, state: RunState) -> Self:
        return cls(state.step, state.tokens, state.data_offset, state.base_step, NonFiniteCounters(**state.trouble))


@dataclass(frozen=True)
class TrainState:
    """The model (its weights are always float32), optimizer and scaler, and the step that trains them."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_step: TrainStep

    @property
    def precision(self) -> Precision:
        return self.train_step.precision

    def defers_metrics(self) -> bool:
        """Return True if metric reads may be deferred: on CUDA, if the device guard latches after a bad step."""
        return self.train_step.guard.is_latching and self.train_step.guard.device.type == "cuda"

    @contextmanager
    def scoring(self) -> Iterator[Callable[[ModelInputs], torch.Tensor]]:
        """Yield a function that returns the summed cross-entropy of a batch, without dropout: float64 scalar."""

        def loss_sum(batch: ModelInputs) -> torch.Tensor:
            with self.precision.autocast():
                loss: torch.Tensor = forward(self.model, batch).loss_sum.double()
            return loss

        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield loss_sum
        finally:
            self.model.train(was_training)

    def loss_scale(self) -> float | None:
        """Return the fp16 loss scale, or None without a scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def run_state(
        self,
        progress: TrainProgress,
        identity: RunIdentity,
        *,
        rows_per_step: int,
        interval: list[FloatRow],
        loss: float | None,
        interval_bytes: list[float | None] | None = None,
    ) -> RunState:
        """Return all that a checkpoint holds besides the tensors.

        ``interval``: the metrics window of each rank; ``interval_bytes``: the bytes of text in it.
        """
        return RunState(
            step=progress.step,
            tokens=progress.tokens,
            rows_per_step=rows_per_step,
            world_size=len(interval),
            identity=identity,
            data_offset=progress.data_offset,
            base_step=progress.base_step,
            loss=loss,
            interval=interval,
            interval_bytes=interval_bytes or [],
            trouble=dataclasses.asdict(progress.nonfinite),
            scaler=self.scaler.state_dict(),
        )

    def load(self, path: Path) -> RunState:
        """Load a verified checkpoint in place. Raises TrainingError if another optimizer wrote it."""
        _require_same_optimizer(path, self.optimizer)
        state = files.load_checkpoint(path, self.model, self.optimizer)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        return state


def initial_model(config: ModelConfig, seed: int, device: torch.device) -> Decoder:
    # Drawn on the CPU, so that the weights depend on the seed alone and not on the device.
    return Decoder(config, torch.Generator().manual_seed(seed)).to(device)


def build_train_state(
    model: Decoder,
    training: TrainingSpec,
    aux_coefficient: float,
    ranks: DistributedContext,
    byte_counter: ByteCounter | None = None,
) -> TrainState:
    """Build optimizer, scaler and train step for ``model``."""
    dtype = DTYPES[training.dtype]
    optimizer = _build_optimizer(model, training)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16)
    train_step = TrainStep(
        module=_wrap_model(model, training.use_compile, ranks),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        precision=Precision(ranks.device.type, dtype),
        aux_coefficient=aux_coefficient,
        grad_clip=training.grad_clip,
        guard=DeviceNonFiniteGuard(training.on_nonfinite, is_latching=not scaler.is_enabled(), device=ranks.device),
        byte_counter=byte_counter,
    )
    return TrainState(model, optimizer, scaler, train_step)


def _build_optimizer(model: Decoder, training: TrainingSpec) -> torch.optim.Optimizer:
    lr, betas, weight_decay = training.learning_rate, training.betas, training.weight_decay
    if training.optimizer == "muon":
        matrices = matrix_parameters(model)
        matrix_ids = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in matrix_ids]
        return Muon(matrices, _parameter_groups(others, training), lr=lr, betas=betas, weight_decay=weight_decay)
    # Fused on a CPU too: several times faster, and elementwise, so that its result does not depend on any order.
    groups = _parameter_groups(list(model.parameters()), training)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def _parameter_groups(parameters: list[nn.Parameter], training: TrainingSpec) -> list[dict[str, Any]]:
    if training.weight_decay_on == "all":
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _require_same_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    saved = files.optimizer_kind(path)
    own = "muon" if isinstance(optimizer, Muon) else "adamw"
    if saved not in (None, own):
        hint = f'Set training.optimizer to "{saved}", or start a new run with from_weight.'
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{path} was trained with {saved}", hint)


def _wrap_model(model: nn.Module, compiled: bool, ranks: DistributedContext) -> nn.Module:
    # One graph for each shape. With dynamic shapes the graph would depend on the shapes seen before, and a resumed run
    # has seen others.
    inner: Any = torch.compile(model, dynamic=False) if compiled else model
    if ranks.world == 1:
        module: nn.Module = inner
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # static_graph would save a little, but fails together with no_sync. Buffers are constants and need no broadcast.
    return nn.parallel.DistributedDataParallel(
        inner, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
