"""Muon for the hidden matrices: their momentum is orthogonalized before it is applied. AdamW for all other weights.

`torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"`` computes the same update. It is not used, because it does not
know ``found_inf``, the flag on the device with which fused AdamW skips an update after a non-finite gradient.
Without it, each step would have to wait for the device to learn whether it may update.

Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). The scale of the update is that of Liu et al.
2025 (arXiv 2502.16982): as large as AdamW's, so that both take the same learning rate and weight decay.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NS_STEPS = 5
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2

MAX_STACKED = 1 << 24
"""Elements of the matrices that are orthogonalized at once: about 0.4 GB of temporary memory."""


def is_matrix(name: str) -> bool:
    """Return whether the parameter ``name`` is a matrix of attention, of a feed-forward layer or of an expert.

    False for embeddings, head, routers and norms.
    """
    return name.endswith("_proj.weight")


class NewtonSchulz:
    """Orthogonalizes whole matrices. A subclass handles parts of larger matrices.

    ``stacks``: all matrices of one shape are one batch of products. On a GPU that is a tenth of the kernels. The last
    bits may differ from those of one matrix after the other, so a run keeps what it began with.
    """

    def __init__(self, *, stacks: bool = False) -> None:
        self.stacks = stacks

    def batches(self, parameters: Sequence[nn.Parameter]) -> Iterator[Sequence[nn.Parameter]]:
        """Yield ``parameters`` in the groups that are orthogonalized together."""
        if not self.stacks:
            yield from ([parameter] for parameter in parameters)
            return
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, equal in by_shape.items():
            size = max(1, MAX_STACKED // shape.numel())
            yield from (equal[start : start + size] for start in range(0, len(equal), size))

    def shape(self, parameter: Tensor) -> Sequence[int]:
        """Return the shape of the whole matrix."""
        return parameter.shape

    def __call__(self, parameters: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:  # noqa: ARG002
        """Return `newton_schulz` of each of ``matrices``, which belong to ``parameters``: a group of `batches`."""
        if len(matrices) == 1:
            return [newton_schulz(matrices[0])]
        return list(newton_schulz(torch.stack(list(matrices))).unbind())


class Muon(torch.optim.Optimizer):
    """Muon for ``matrices``, AdamW for ``others``, with one float32 state: ``momentum``, or AdamW's moments."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        cautious: bool = False,
        orthogonalizer: NewtonSchulz | None = None,
    ) -> None:
        """Create the optimizer. ``cautious``: the matrices decay as `cautious_decay` says."""
        self.orthogonalizer = orthogonalizer or NewtonSchulz()
        self._cautious = cautious
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        groups = [{"params": list(matrices), "lr": lr, "weight_decay": weight_decay}, *self._adamw.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; none if the attribute ``found_inf`` (a tensor) is 1."""
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        group = self.param_groups[0]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for batch in self.orthogonalizer.batches(parameters):
            self._update(batch, group["lr"], group["weight_decay"], found_inf)
        # load_state_dict replaces state and param_groups, so AdamW gets the present ones at each step.
        self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[1:]
        self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def _update(
        self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, found_inf: Tensor | None
    ) -> None:
        momenta = [self._new_momentum(parameter) for parameter in parameters]
        grads: list[Any] = [parameter.grad for parameter in parameters]
        nesterov = [grad.lerp(momentum, MOMENTUM) for grad, momentum in zip(grads, momenta, strict=True)]
        directions = self.orthogonalizer(parameters, nesterov)
        for parameter, momentum, direction in zip(parameters, momenta, directions, strict=True):
            decay = lr * weight_decay
            new = cautious_decay(parameter, direction, decay) if self._cautious else parameter * (1 - decay)
            rows, columns = self.orthogonalizer.shape(parameter)
            new.add_(direction, alpha=-lr * UPDATE_RMS * math.sqrt(max(rows, columns)))
            for old, updated in ((self.state[parameter]["momentum"], momentum), (parameter, new)):
                # A choice and not a product with 0 or 1: 0 times a non-finite update is NaN, not 0.
                old.copy_(updated if found_inf is None else torch.where(found_inf.bool(), old, updated))

    def _new_momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        return momentum.lerp(parameter.grad, 1 - MOMENTUM)  # type: ignore[arg-type] # `step` has left out None


def cautious_decay(weight: Tensor, direction: Tensor, decay: float) -> Tensor:
    """Return ``weight``, reduced by the share ``decay`` in the elements that a step against ``direction`` reduces too.

    In the others the decay would work against the gradient, so they stay as they are (Chen et al. 2025, arXiv
    2510.12402).
    """
    return torch.where(weight * direction > 0, weight * (1 - decay), weight)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return about U V' of the singular value decomposition U S V' of a float32 matrix: singular values of 0.7 to 1.2.

    ``matrix``: [R, C], or a stack of them [N, R, C]. The iterations run in bfloat16, in which the products are
    cheapest; precision does not matter here.
    """
    a, b, c = NS_COEFFICIENTS
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
    x = (matrix if is_wide else matrix.mT) / (norm + 1e-7)
    x = x.bfloat16()
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    orthogonal: Tensor = (x if is_wide else x.mT).float()
    return orthogonal
