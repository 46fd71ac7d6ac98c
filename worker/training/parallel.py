"""Models that are split over the ranks, if ``resources.parallelism`` is ``zero1`` or ``fsdp`` and not ``ddp``.

``zero1``: every rank has all weights and gradients, as with DDP. Each updates its part of the weights with its part of
the optimizer state; then the ranks exchange the new weights. ``fsdp``: every rank has a part of weights, gradients and
optimizer state. A layer's weights are gathered just before it runs.

The optimizer gets plain tensors that share the memory of the model, so it does not depend on the split. With one rank
nothing is split.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainyard.model.decoder import Decoder
from trainyard.model.muon import NewtonSchulz, is_matrix, newton_schulz
from trainyard.model.regions import element_offsets, matrix_offsets
from trainyard.worker.checkpoint.files import shared_names
from trainyard.worker.checkpoint.parts import ModelParts, ParameterPart, TensorPart
from trainyard.worker.distributed import DistributedContext


@dataclass(frozen=True)
class SplitModel(ABC):
    """A model whose optimizer is split over the ranks. ``gathers_weights``: a forward pass needs all ranks."""

    model: Decoder
    held: ModelParts
    ranks: DistributedContext
    gathers_weights: bool

    @property
    def updated(self) -> list[nn.Parameter]:
        """The parts that this rank updates."""
        return [part.tensor for part in self.held.parts]

    @abstractmethod
    def attach_gradients(self) -> None:
        """Set the gradient of each part. Called after the last backward pass of a step."""

    @abstractmethod
    def exchange_weights(self) -> None:
        """Send the updated weights to all ranks that have them. Called after the update, by all ranks together."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Prepare for the next step."""

    @abstractmethod
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take this rank's weights from whole ones, which have all names of the state dict."""

    @abstractmethod
    def orthogonalizer(self) -> NewtonSchulz:
        """Return the object with which Muon orthogonalizes the matrices of this rank's parts."""

    def release(self) -> None:  # noqa: B027 - only FSDP gathers anything
        """Free what forward passes without a backward pass have gathered."""

    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole gradient, equal on all ranks: float32 scalar. All ranks call it together."""
        grads = [tensor.grad for tensor in self.updated if tensor.grad is not None]
        square = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        if grads:
            square += nn.utils.get_total_norm(grads).double().square()
        dist.all_reduce(square)
        return square.sqrt().float()


def _background_group(ranks: DistributedContext) -> dist.ProcessGroup:
    # A separate group: messages of a save must not mix with those of the training thread in the control group.
    assert ranks.control is not None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=ranks.preparing_timeout))


@dataclass(frozen=True)
class FlatBuffer:
    """Parameters in one buffer, of which each rank updates one region. All regions have one size."""

    whole: Tensor
    region: int
    ranks: DistributedContext

    @classmethod
    def of(
        cls, parameters: Sequence[nn.Parameter], offsets: Sequence[int], region: int, ranks: DistributedContext
    ) -> "FlatBuffer":
        """Move ``parameters`` to their ``offsets`` in a new buffer with a region for each rank."""
        whole = torch.zeros(region * ranks.world, device=ranks.device)
        for parameter, offset in zip(parameters, offsets, strict=True):
            view = whole[offset : offset + parameter.numel()].view_as(parameter)
            view.copy_(parameter.data)
            parameter.data = view
        return cls(whole, region, ranks)

    def part(self, name: str, parameter: nn.Parameter, offset: int) -> ParameterPart | None:
        """Return this rank's part of ``parameter``, which begins at ``offset``, or None if it has none."""
        begin = self.ranks.rank * self.region
        start = max(offset, begin)
        stop = min(offset + parameter.numel(), begin + self.region)
        if start >= stop:
            return None
        own = self.whole[start:stop]
        is_whole = stop - start == parameter.numel()
        tensor = nn.Parameter(own.view_as(parameter) if is_whole else own)
        return ParameterPart(name, tuple(parameter.shape), start - offset, tensor)

    def exchange(self) -> None:
        """Send this rank's region to the others, and receive theirs."""
        begin = self.ranks.rank * self.region
        dist.all_gather_single(self.whole, self.whole[begin : begin + self.region])


@dataclass(frozen=True)
class Zero1Model(SplitModel):
    """All weights and gradients on each rank, the optimizer state split over the ranks."""

    buffers: list[FlatBuffer]
    parameters: dict[str, nn.Parameter]

    @classmethod
    @torch.no_grad()
    def split(cls, model: Decoder, ranks: DistributedContext, *, keeps_matrices: bool) -> "Zero1Model":
        """Split the update of ``model``. ``keeps_matrices``: each matrix of a layer is updated by one rank."""
        state, parameters = model.state_dict(), dict(model.named_parameters())
        names, order = list(shared_names(state)), list(state)
        matrices = {name: each for name, each in parameters.items() if keeps_matrices and is_matrix(name)}
        others = {name: each for name, each in parameters.items() if name not in matrices}
        buffers, parts = [], []
        for group, place in ((matrices, matrix_offsets), (others, element_offsets)):
            offsets, region = place([each.numel() for each in group.values()], ranks.world)
            buffers.append(FlatBuffer.of([*group.values()], offsets, region, ranks))
            found = (buffers[-1].part(*each, offset) for each, offset in zip(group.items(), offsets, strict=True))
            parts += [part for part in found if part is not None]
        # Every rank has all weights: rank 0's are saved.
        whole = {name: TensorPart(each.data, tuple(each.shape), 0) for name, each in parameters.items()}
        held = ModelParts(parts, names, order, whole if ranks.is_main_process else {}, _background_group(ranks))
        used = [buffer for buffer in buffers if buffer.region]
        return cls(model, held, ranks, False, used, parameters)

    @torch.no_grad()
    def attach_gradients(self) -> None:
        for part in self.held.parts:
            grad = self.parameters[part.name].grad
            # A view of DDP's buckets, so that clipping it needs no copy.
            part.tensor.grad = part.of(grad) if grad is not None else None

    def exchange_weights(self) -> None:
        for buffer in self.buffers:
            buffer.exchange()

    def clear_gradients(self) -> None:
        # DDP's gradients are views into its buckets: keep them, so that nothing is copied.
        torch._foreach_zero_([each.grad for each in self.parameters.values() if each.grad is not None])
        for part in self.held.parts:
            part.tensor.grad = None  # DDP may replace its buckets, and the old ones must be freed

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights, strict=True)

    def orthogonalizer(self) -> NewtonSchulz:
        return NewtonSchulz()  # each rank has whole matrices


@dataclass(frozen=True)
class FsdpModel(SplitModel):
    """Weights, gradients and optimizer state split over the ranks, by torch's ``fully_shard``.

    ``sharded``: the parameter of each part, a DTensor that is split by its first dimension.
    """

    sharded: list[Any]

    @classmethod
    @torch.no_grad()
    def split(cls, model: Decoder, ranks: DistributedContext, dtype: torch.dtype, *, compiled: bool) -> "FsdpModel":
        """Split ``model``, which may still be on the CPU. ``dtype``: of the layers' weights while they are in use."""
        # Imported here: it takes a second, and no other parallelism needs it.
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        state = model.state_dict()
        names, order = list(shared_names(state)), list(state)
        del state
        mesh = DeviceMesh.from_group(cast(dist.ProcessGroup, dist.group.WORLD), ranks.device.type)
        # Inputs stay as they are: the residual stream and the angles of the positions are float32.
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        if compiled:
            # The compiler itself reads the gradients of a layer's inputs.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
        for layer in model.model.layers:
            if compiled:
                layer.compile(dynamic=False)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        # Embedding, head and last norm stay float32: rounding errors in them affect every token.
        fully_shard(model, mesh=mesh)
        for method in ("generate", "score_tokens"):
            register_fsdp_forward_method(model, method)
        sharded = dict(model.named_parameters())
        parts = [_fsdp_part(name, parameter, ranks) for name, parameter in sharded.items()]
        own = {part.name: TensorPart(part.tensor.data, part.shape, part.start) for part in parts}
        return cls(
            model, ModelParts(parts, names, order, own, _background_group(ranks)), ranks, True, [*sharded.values()]
        )

    @torch.no_grad()
    def attach_gradients(self) -> None:
        for part, parameter in zip(self.held.parts, self.sharded, strict=True):
            part.tensor.grad = parameter.grad.to_local() if parameter.grad is not None else None

    def exchange_weights(self) -> None:
        """Do nothing: the next forward pass gathers the weights."""

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for part in self.held.parts:
            part.tensor.grad = None

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        # After a forward pass without a backward pass, the embedding is still gathered, with its old values.
        self.release()
        for part in self.held.parts:
            part.tensor.copy_(part.of(weights[part.name]))

    def release(self) -> None:
        cast(Any, self.model).reshard()

    def orthogonalizer(self) -> NewtonSchulz:
        return ShardedNewtonSchulz({part.tensor: part for part in self.held.parts}, self.ranks)


def _fsdp_part(name: str, parameter: Any, ranks: DistributedContext) -> ParameterPart:
    rows, shape = parameter.shape[0], tuple(parameter.shape)
    first = min(ranks.rank * -(-rows // ranks.world), rows)
    return ParameterPart(name, shape, first * (parameter.numel() // rows), nn.Parameter(parameter.to_local()))


class ShardedNewtonSchulz(NewtonSchulz):
    """Orthogonalizes matrices whose rows are split over the ranks: each rank does one of ``world`` at a time.

    A rank gets the rows of its matrix from all ranks, and sends the rows of the result back. That is as much traffic as
    gathering each matrix on all ranks, but each matrix is computed once.
    """

    def __init__(self, parts: dict[nn.Parameter, ParameterPart], ranks: DistributedContext) -> None:
        super().__init__()
        self._parts = parts
        self._ranks = ranks

    def batches(self, parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
        world = self._ranks.world
        yield from (parameters[start : start + world] for start in range(0, len(parameters), world))

    def shape(self, parameter: Tensor) -> Sequence[int]:
        return self._parts[cast(nn.Parameter, parameter)].shape

    def __call__(self, parameters: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        world, rank = self._ranks.world, self._ranks.rank
        own = [matrix.numel() for matrix in matrices] + [0] * (world - len(matrices))
        rows_of_mine = [0] * world
        shape = self.shape(parameters[rank]) if rank < len(parameters) else (0, 0)
        if rank < len(parameters):
            share = -(-shape[0] // world)
            rows_of_mine = [max(0, min(share, shape[0] - each * share)) for each in range(world)]
        mine = [rows * shape[1] for rows in rows_of_mine]
        sent = torch.cat([matrix.reshape(-1) for matrix in matrices])
        received = sent.new_empty(sum(mine))
        dist.all_to_all_single(received, sent, mine, own)
        if rank < len(parameters):
            received = newton_schulz(received.view(*shape)).reshape(-1)
        dist.all_to_all_single(sent, received, own, mine)
        pieces = torch.split(sent, own)
        return [piece.view_as(matrix) for piece, matrix in zip(pieces, matrices, strict=False)]
