"""What is trained: the model, its optimizer and scaler, and the few numbers that say how far it is."""

import dataclasses
from collections.abc import Iterable
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
from trainyard.model.loss import IGNORED
from trainyard.model.muon import Muon, matrix_parameters
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState
from trainyard.worker.data.microbatch import ModelInputs
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.nonfinite import DeviceNonFiniteGuard, NonFiniteCounters
from trainyard.worker.training.step import Precision, TrainStep, forward

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class TrainProgress:
    """How far the run is. ``data_offset``: steps of data that rollbacks left out, less than 0 where data began anew.

    ``base_step``: the step behind which schedule and length of the run are counted, 0 but for some forks.
    """

    step: int = 0
    tokens: int = 0
    data_offset: int = 0
    base_step: int = 0
    trouble: NonFiniteCounters = field(default_factory=NonFiniteCounters)

    def after(self, step_tokens: int, trouble: NonFiniteCounters) -> Self:
        """One step further."""
        return replace(self, step=self.step + 1, tokens=self.tokens + step_tokens, trouble=trouble)

    @classmethod
    def of(cls, state: RunState) -> Self:
        """Where a checkpoint was."""
        return cls(state.step, state.tokens, state.data_offset, state.base_step, NonFiniteCounters(**state.trouble))


@dataclass(frozen=True)
class TrainState:
    """The model, always float32, with optimizer and scaler, and the stepper that trains them."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_step: TrainStep

    @property
    def precision(self) -> Precision:
        """How forward passes compute."""
        return self.train_step.precision

    def defers_metrics(self) -> bool:
        """Whether steps are better read together, later: where reading waits for the device, and the brake holds."""
        return self.train_step.guard.is_latching and self.train_step.guard.device.type == "cuda"

    @torch.no_grad()
    def loss_sum(self, batches: Iterable[ModelInputs]) -> tuple[float, int]:
        """Return the summed cross-entropy of ``batches``, without dropout, and the number of their labels."""
        was_training = self.model.training
        self.model.eval()
        try:
            # In float64: the sum over a whole evaluation split would lose digits in float32.
            total: torch.Tensor | float = 0.0
            labels = 0
            for batch in batches:
                with self.precision.autocast():
                    total = total + forward(self.model, batch).loss_sum.double()
                labels += int((batch.labels != IGNORED).sum())
        finally:
            self.model.train(was_training)
        return float(total), labels

    def loss_scale(self) -> float | None:
        """The fp16 scaler's factor, or None without one."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def state(
        self,
        progress: TrainProgress,
        identity: RunIdentity,
        *,
        rows_per_step: int,
        interval: list[FloatRow],
        loss: float | None,
    ) -> RunState:
        """All that a checkpoint holds beside the tensors."""
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
            trouble=dataclasses.asdict(progress.trouble),
            scaler=self.scaler.state_dict(),
        )

    def load(self, path: Path) -> RunState:
        """Go back, or on, to a verified checkpoint."""
        _require_same_optimizer(path, self.optimizer)
        state = files.load_checkpoint(path, self.model, self.optimizer)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        return state


def initial_model(config: ModelConfig, seed: int, device: torch.device) -> Decoder:
    """Random weights that depend on the seed alone: drawn on the CPU, whatever the device."""
    return Decoder(config, torch.Generator().manual_seed(seed)).to(device)


def build_train_state(
    model: Decoder, training: TrainingSpec, aux_coefficient: float, ranks: DistributedContext
) -> TrainState:
    """Optimizer, scaler and stepper around ``model``."""
    dtype = DTYPES[training.dtype]
    optimizer = _optimizer(model, training)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype is torch.float16)
    stepper = TrainStep(
        module=_wrap_model(model, training.use_compile, ranks),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        precision=Precision(ranks.device.type, dtype),
        aux_coefficient=aux_coefficient,
        grad_clip=training.grad_clip,
        guard=DeviceNonFiniteGuard(training.on_nonfinite, is_latching=not scaler.is_enabled(), device=ranks.device),
    )
    return TrainState(model, optimizer, scaler, stepper)


def _optimizer(model: Decoder, training: TrainingSpec) -> torch.optim.Optimizer:
    lr, betas, weight_decay = training.learning_rate, training.betas, training.weight_decay
    if training.optimizer == "muon":
        matrices = matrix_parameters(model)
        chosen = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        return Muon(matrices, _parameter_groups(others, training), lr=lr, betas=betas, weight_decay=weight_decay)
    # Fused on a CPU as well: several times faster, and elementwise, so its result has no order to depend on.
    groups = _parameter_groups(list(model.parameters()), training)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def _parameter_groups(parameters: list[nn.Parameter], training: TrainingSpec) -> list[dict[str, Any]]:
    """The parameters in groups by whether they decay."""
    if training.weight_decay_on == "all":
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def _require_same_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    theirs = files.optimizer_kind(path)
    own = "muon" if isinstance(optimizer, Muon) else "adamw"
    if theirs not in (None, own):
        hint = f'Set training.optimizer to "{theirs}", or start a new run with from_weight.'
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{path} was trained with {theirs}", hint)


def _wrap_model(model: nn.Module, compiled: bool, ranks: DistributedContext) -> nn.Module:
    # One graph for each shape: with dynamic shapes, which graph runs would depend on the shapes seen before, and a
    # resumed run has seen other ones.
    inner: Any = torch.compile(model, dynamic=False) if compiled else model
    if ranks.world == 1:
        module: nn.Module = inner
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # static_graph would save a little, and fails together with no_sync. Buffers are constants, so none is sent.
    return nn.parallel.DistributedDataParallel(
        inner, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
