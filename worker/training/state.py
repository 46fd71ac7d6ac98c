"""The state of training: model, optimizer and scaler in `TrainState`, and how far the run is in `TrainProgress`."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from trainyard.contract.run_identity import RunIdentity
from trainyard.contract.spec import Parallelism, TrainingSpec
from trainyard.contract.status import Reason
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.model.muon import Muon, is_matrix
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.files import RunState, TensorShapes
from trainyard.worker.data.microbatch import ModelInputs
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.bits_per_byte import ByteCounter
from trainyard.worker.training.nonfinite import DeviceNonFiniteGuard, NonFiniteCounters
from trainyard.worker.training.parallel import FsdpModel, SplitModel, Zero1Model
from trainyard.worker.training.step import Precision, TrainStep, forward

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class TrainProgress:
    """How far the run is.

    ``data_offset``: step + data_offset is the step of the data order. A rollback skips data and increases it; a fork
    that restarts its data begins with a negative one. ``base_step``, ``base_tokens``: where schedule and length of the
    run begin; not 0 only for forks.
    """

    step: int = 0
    tokens: int = 0
    data_offset: int = 0
    base_step: int = 0
    base_tokens: int = 0
    nonfinite: NonFiniteCounters = field(default_factory=NonFiniteCounters)

    def next_step(self, step_tokens: int) -> Self:
        return replace(self, step=self.step + 1, tokens=self.tokens + step_tokens)

    @classmethod
    def from_state(cls, state: RunState) -> Self:
        counters = NonFiniteCounters(**state.trouble)
        return cls(state.step, state.tokens, state.data_offset, state.base_step, state.base_tokens, counters)


@dataclass(frozen=True)
class TrainState:
    """The model (its weights are always float32), optimizer and scaler, and the step that trains them.

    ``shapes``: of the whole model.
    """

    model: Decoder
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_step: TrainStep
    shapes: TensorShapes

    @property
    def precision(self) -> Precision:
        return self.train_step.precision

    @property
    def split(self) -> SplitModel | None:
        """How the ranks share the update, or None if each rank does all of it."""
        return self.train_step.split

    @property
    def gathers_weights(self) -> bool:
        """Whether a forward pass needs all ranks, because each has a part of the weights."""
        return self.split is not None and self.split.gathers_weights

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
            if self.split is not None:
                self.split.release()

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
        """Return everything in a checkpoint except the tensors.

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
            base_tokens=progress.base_tokens,
            loss=loss,
            interval=interval,
            interval_bytes=interval_bytes or [],
            trouble=dataclasses.asdict(progress.nonfinite),
            scaler=self.scaler.state_dict(),
            stacks_matrices=isinstance(self.optimizer, Muon) and self.optimizer.orthogonalizer.stacks,
        )

    def load(self, path: Path) -> RunState:
        """Load a verified checkpoint in place. Raises TrainingError if another optimizer wrote it."""
        _require_same_optimizer(path, self.optimizer)
        if self.split is None:
            state = files.load_checkpoint(path, self.model, self.optimizer)
        else:
            state = files.read_state(path)
            self.split.load_weights(files.load_weights(path, self.split.held.names))
            files.load_optimizer_parts(path, self.split.held.parts, self.optimizer)
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(state.scaler)
        if isinstance(self.optimizer, Muon):
            # A run of 0.1 continues with the bits that it began with.
            self.optimizer.orthogonalizer.stacks = state.stacks_matrices
        return state


def initial_model(
    config: ModelConfig, seed: int, device: torch.device, *, zero_init_projections: bool = False
) -> Decoder:
    # Drawn on the CPU, so that the weights depend on the seed alone and not on the device.
    model = Decoder(config, torch.Generator().manual_seed(seed))
    if zero_init_projections:
        model.zero_projections()
    return model.to(device)


def build_train_state(
    model: Decoder,
    training: TrainingSpec,
    aux_coefficient: float,
    ranks: DistributedContext,
    byte_counter: ByteCounter | None = None,
    parallelism: Parallelism = "ddp",
) -> TrainState:
    """Build optimizer, scaler and train step for ``model``. All ranks call it together."""
    dtype, shapes = DTYPES[training.dtype], TensorShapes.of(model)
    model.recompute_layers(training.gradient_checkpointing)
    split = _split_model(model, training, ranks, parallelism)
    optimizer = _build_optimizer(model, split, training)
    scaler = _build_scaler(ranks.device.type, split, enabled=dtype is torch.float16)
    train_step = TrainStep(
        module=model if isinstance(split, FsdpModel) else _wrap_model(model, training, ranks),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        precision=Precision(ranks.device.type, dtype),
        aux_coefficient=aux_coefficient,
        grad_clip=training.grad_clip,
        peak_rate_of_decay=training.learning_rate if training.weight_decay_schedule == "learning_rate" else None,
        guard=DeviceNonFiniteGuard(training.on_nonfinite, is_latching=not scaler.is_enabled(), device=ranks.device),
        byte_counter=byte_counter,
        split=split,
        recomputes=training.gradient_checkpointing,
        replays_graphs=training.use_compile and training.compile_mode != "default" and ranks.device.type == "cuda",
    )
    return TrainState(model, optimizer, scaler, train_step, shapes)


def _split_model(
    model: Decoder, training: TrainingSpec, ranks: DistributedContext, parallelism: Parallelism
) -> SplitModel | None:
    if parallelism == "ddp" or ranks.world == 1:
        return None
    if parallelism == "zero1":
        return Zero1Model.split(model, ranks, keeps_matrices=training.optimizer == "muon")
    return FsdpModel.split(model, ranks, DTYPES[training.dtype], compiled=training.use_compile)


def _build_scaler(device: str, split: SplitModel | None, *, enabled: bool) -> torch.amp.GradScaler:
    if split is None or not enabled:
        return torch.amp.GradScaler(device, enabled=enabled)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    # This scaler shares an overflow in the part of one rank with all ranks.
    return ShardedGradScaler(device)


class UpdatedTensor(NamedTuple):
    """What the optimizer updates: a parameter, or a part of one. ``name``, ``ndim``: of the whole parameter."""

    name: str
    ndim: int
    tensor: nn.Parameter


def _updated_tensors(model: Decoder, split: SplitModel | None) -> Iterator[UpdatedTensor]:
    if split is None:
        yield from (UpdatedTensor(name, each.ndim, each) for name, each in model.named_parameters())
    else:
        yield from (UpdatedTensor(part.name, len(part.shape), part.tensor) for part in split.held.parts)


def _build_optimizer(model: Decoder, split: SplitModel | None, training: TrainingSpec) -> torch.optim.Optimizer:
    lr, betas, weight_decay = training.learning_rate, training.betas, training.weight_decay
    updated = list(_updated_tensors(model, split))
    if training.optimizer == "muon":
        # Also empty parts: all ranks must orthogonalize a matrix together.
        matrices = [each.tensor for each in updated if is_matrix(each.name)]
        others = _parameter_groups([each for each in updated if not is_matrix(each.name)], training)
        muon = Muon(
            matrices,
            others,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            cautious=training.cautious_weight_decay,
            orthogonalizer=split.orthogonalizer() if split is not None else None,
        )
        muon.param_groups[0]["lr_multiplier"] = training.matrix_lr_multiplier
        # For a new run; `TrainState.load` restores the choice of an old one. On a CPU stacking saves little, and runs
        # there keep the bits of 0.1.
        muon.orthogonalizer.stacks = all(matrix.is_cuda for matrix in matrices)
        return muon
    # Fused on a CPU too: several times faster, and elementwise, so that its result does not depend on any order.
    groups = _parameter_groups(updated, training)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def _parameter_groups(updated: list[UpdatedTensor], training: TrainingSpec) -> list[dict[str, Any]]:
    """Return one group for each learning rate and weight decay; `TrainStep` sets the rate of each step."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for each in updated:
        if each.tensor.numel():
            key = (_lr_multiplier(each, training), training.weight_decay_on == "all" or each.ndim >= 2)
            groups.setdefault(key, []).append(each.tensor)
    return [
        {"params": tensors, "lr_multiplier": multiplier, **({} if decays else {"weight_decay": 0.0})}
        for (multiplier, decays), tensors in groups.items()
    ] or [{"params": []}]  # this rank has no part of them


def _lr_multiplier(updated: UpdatedTensor, training: TrainingSpec) -> float:
    if updated.name == "model.embed_tokens.weight":
        return training.embedding_lr_multiplier
    if updated.name == "lm_head.weight":
        return training.head_lr_multiplier
    if is_matrix(updated.name):
        return training.matrix_lr_multiplier
    return training.norm_lr_multiplier if updated.ndim < 2 else 1.0  # a router keeps the rate


def _require_same_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    saved = files.optimizer_kind(path)
    own = "muon" if isinstance(optimizer, Muon) else "adamw"
    if saved not in (None, own):
        hint = f'Set training.optimizer to "{saved}", or start a new run with from_weight.'
        raise TrainingError(Reason.CHECKPOINT_INVALID, f"{path} was trained with {saved}", hint)


def _wrap_model(model: nn.Module, training: TrainingSpec, ranks: DistributedContext) -> nn.Module:
    # One graph for each shape. With dynamic shapes the graph would depend on the shapes seen before, and a resumed run
    # has seen others.
    inner: Any = torch.compile(model, dynamic=False, mode=training.compile_mode) if training.use_compile else model
    if ranks.world == 1:
        module: nn.Module = inner
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # static_graph would save a little, but fails together with no_sync. Buffers are constants and need no broadcast.
    return nn.parallel.DistributedDataParallel(
        inner, device_ids=devices, forward_sync_buffers=False, gradient_as_bucket_view=True
    )
