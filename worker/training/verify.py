"""Verification of a step: its forward and backward pass run twice, and every bit is compared before the update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainyard.contract.events import RankInfo
from trainyard.contract.failpoints import hit
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint.replicas import corruption_hint
from trainyard.worker.digest import tensor_digest
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import TrainingError

MAX_NAMED = 8
"""How many ranks a message names."""


def on_accumulated(parameter: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call ``hook`` each time a gradient of ``parameter`` is complete on this rank, before DDP exchanges it."""
    register: Any = parameter.register_post_accumulate_grad_hook  # unannotated
    register(hook)


@dataclass
class StepVerifier:
    """Compares two passes of a step on each rank: losses, gradients before the exchange, and weights.

    Exchanged gradients would not show which rank is wrong, because its number is in the sum of all. With FSDP, which
    exchanges gradients in the backward pass, shards of the sum are compared, so several ranks may differ. ``places``:
    host and device of each rank.
    """

    model: nn.Module
    ranks: DistributedContext
    places: Sequence[RankInfo]
    _weights: Tensor | None = None
    _records: bool = False
    _gradients: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parameter in self.model.parameters():
            on_accumulated(parameter, self._record)

    def begin(self) -> None:
        """Take the digests of the weights before the first pass: a low bit may change no loss and no gradient."""
        self._weights = torch.stack(self._weight_digests())

    def record_next(self) -> None:
        """Record the gradients of the next backward pass, which must be the last one of the step."""
        self._records, self._gradients = True, {}

    def take_digests(self, losses: Sequence[Tensor]) -> Tensor:
        """Return the digests of a pass, int64 on the device: losses, gradients, weights, in the order of `names`."""
        self._records = False
        hit("verify.pass_done", self)
        gradients, self._gradients = self._gradients, {}
        nothing = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        return torch.stack(
            [
                *(loss.view(torch.int64).reshape(()) for loss in losses),
                *(gradients.get(id(parameter), nothing) for parameter in self.model.parameters()),
                *self._weight_digests(),
            ]
        )

    def require_equal(self, step: int, first: Tensor, second: Tensor) -> None:
        """Compare the digests of both passes, and the weights with those before. All ranks call it together.

        Raises TrainingError on every rank if they differ on any one. It has a rank if only one differs.
        """
        assert self._weights is not None, "begin was not called"
        parameters = [name for name, _ in self.model.named_parameters()]
        losses = len(first) - 2 * len(parameters)
        before, after = torch.cat([first, self._weights]), torch.cat([second, second[-len(parameters) :]])
        differing = (before != after).nonzero().reshape(-1).tolist()
        first_index = differing[0] if differing else -1
        rows = self.ranks.gather([float(len(differing)), float(first_index)])
        wrong = [rank for rank, row in enumerate(rows) if row[0]]
        if not wrong:
            return
        names = ["a loss"] * losses + [
            f"{what} of {name}" for what in ("the gradient", "the weight", "the weight") for name in parameters
        ]
        where = " and ".join(str(self.places[rank]) for rank in wrong[:MAX_NAMED])
        count, index = (int(number) for number in rows[wrong[0]])
        more = f" and {count - 1} more numbers or tensors" if count > 1 else ""
        message = (
            f"silent corruption: {where} computed different bits when the passes of step {step} were repeated with the "
            f"same data: {names[index]}{more}; the update was not applied"
        )
        hint = corruption_hint(self.places[wrong[0]].device)
        raise TrainingError(Reason.SILENT_CORRUPTION, message, hint, wrong[0] if len(wrong) == 1 else None)

    def _weight_digests(self) -> list[Tensor]:
        return [tensor_digest(_local(parameter)) for parameter in self.model.parameters()]

    def _record(self, parameter: Tensor) -> None:
        if self._records and parameter.grad is not None:
            self._gradients[id(parameter)] = tensor_digest(_local(parameter.grad))


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
