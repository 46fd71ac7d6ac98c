"""Parts of tensors: what each rank holds of a model or optimizer that is split over the ranks.

A checkpoint always holds whole tensors, so that any number of ranks can read it, with any parallelism. At a save each
rank sends its parts to rank 0 in the background; at a load each rank reads its parts of the files.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainyard.worker.distributed import DistributedContext

MAX_MESSAGE = 1 << 26
"""Elements that one rank sends to another at once."""


class TensorPart(NamedTuple):
    """``tensor``: the elements from ``start`` on of a whole tensor of ``shape``, flattened."""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class ParameterPart:
    """The part of a parameter that this rank updates: ``tensor`` shares the memory of the model.

    ``name``, ``shape``: of the whole parameter. ``start``: the first element of the part. It may be empty.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: nn.Parameter

    def of(self, whole: Tensor) -> Tensor:
        """Return the same part of ``whole``, a tensor of ``shape``, in the shape of ``tensor``."""
        return whole.reshape(-1)[self.start : self.start + self.tensor.numel()].view(self.tensor.shape)


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model that this rank has, and the names of all tensors, which a save needs.

    ``names``: the names of each tensor of the state dict; tied ones form one group. ``order``: the keys of the state
    dict. ``weights``: the weights that this rank contributes to a save, by their first name. ``group``: process group
    of all ranks for messages in the background.
    """

    parts: list[ParameterPart]
    names: list[list[str]]
    order: list[str]
    weights: dict[str, TensorPart]
    group: dist.ProcessGroup

    def contribution(self, optimizer: torch.optim.Optimizer) -> dict[str, TensorPart]:
        """Return the parts that this rank contributes to a save: ``model.<name>`` and ``optimizer.<key>.<name>``."""
        found = {f"model.{name}": part for name, part in self.weights.items()}
        for part in self.parts:
            for key, value in optimizer.state.get(part.tensor, {}).items():
                whole = TensorPart(value, (), 0) if value.ndim == 0 else TensorPart(value, part.shape, part.start)
                found[f"optimizer.{key}.{part.name}"] = whole
        return {name: part for name, part in found.items() if part.tensor.numel()}

    def state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole ``weights``, by their first names, as the model's state dict."""
        by_name = {name: weights[names[0]] for names in self.names for name in names}
        return {name: by_name[name] for name in self.order}


class Extent(NamedTuple):
    """The elements ``start`` to ``stop`` of a tensor are on ``rank``."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class SavedTensor:
    """The ranks that have the parts of a tensor of ``shape``. The extents do not overlap."""

    shape: tuple[int, ...]
    extents: list[Extent]


def layout(contributions: list[Mapping[str, tuple[tuple[int, ...], int, int]]]) -> dict[str, SavedTensor]:
    """Return which rank has which part of each tensor. ``contributions``: (shape, start, stop) by name, of each rank.

    If several ranks have an element, such as a number of steps, that of the first rank is used. Raises ValueError if an
    element is on no rank.
    """
    found: dict[str, SavedTensor] = {}
    for rank, parts in enumerate(contributions):
        for name, (shape, start, stop) in parts.items():
            saved = found.setdefault(name, SavedTensor(shape, []))
            if all(stop <= other.start or start >= other.stop for other in saved.extents):
                saved.extents.append(Extent(rank, start, stop))
    for name, saved in found.items():
        if sum(extent.stop - extent.start for extent in saved.extents) != math.prod(saved.shape):
            raise ValueError(f"the ranks do not hold all of {name}: {saved}")
    return dict(sorted(found.items()))


def gather_layout(own: Mapping[str, TensorPart], ranks: DistributedContext) -> dict[str, SavedTensor]:
    """Return the `layout` of what all ranks contribute. All ranks call it together."""
    described = {name: (part.shape, part.start, part.start + part.tensor.numel()) for name, part in own.items()}
    all_described: list[dict[str, tuple[tuple[int, ...], int, int]]] = [{} for _ in range(ranks.world)]
    dist.all_gather_object(all_described, described, group=ranks.control)
    return layout([*all_described])


def gather_parts(
    tensors: Mapping[str, SavedTensor], buffers: Mapping[str, Tensor], rank: int, group: dist.ProcessGroup
) -> None:
    """Send this rank's parts to rank 0, which receives them into whole ``buffers``. All ranks call it together.

    ``buffers``, on the CPU: whole tensors on rank 0, the parts themselves on the others.
    """
    for name, saved in tensors.items():
        for extent in saved.extents:
            if extent.rank == 0:
                continue
            if rank == 0:
                for message in _messages(buffers[name].view(-1)[extent.start : extent.stop]):
                    dist.recv(message, src=extent.rank, group=group)
            elif rank == extent.rank:
                for message in _messages(buffers[name].view(-1)):
                    dist.send(message, dst=0, group=group)


def _messages(tensor: Tensor) -> Iterator[Tensor]:
    yield from torch.split(tensor, MAX_MESSAGE)
