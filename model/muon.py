"""Muon: momentum whose matrix is made orthogonal before it is applied, for the hidden matrices; AdamW for all others.

Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); the scale of the update is that of Liu et al.
2025 (arXiv 2502.16982), which makes it as large as AdamW's, so that both take the same learning rate and weight decay.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of attention, feed-forward layers and experts; not embeddings, head, router or norms."""
    return [parameter for name, parameter in model.named_parameters() if name.endswith("_proj.weight")]


class Muon(torch.optim.Optimizer):
    """Muon for ``matrices``, AdamW for ``others``. One state, float32: ``momentum``, or AdamW's moments."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        groups = [{"params": list(matrices), "lr": lr, "weight_decay": weight_decay}, *self._adamw.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; none where ``found_inf`` is set to 1, as in fused AdamW."""
        assert closure is None
        held: Tensor | None = getattr(self, "found_inf", None)
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._update(parameter, parameter.grad, group["lr"], group["weight_decay"], held)
        # Loading a state makes new objects of both, so they are handed over each time.
        self._adamw.state, self._adamw.param_groups = self.state, self.param_groups[1:]
        self._adamw.found_inf = held  # type: ignore[attr-defined]
        self._adamw.step()

    def _update(
        self, parameter: nn.Parameter, grad: Tensor, lr: float, weight_decay: float, held: Tensor | None
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        moved = momentum.lerp(grad, 1 - MOMENTUM)
        direction = orthogonal(grad.lerp(moved, MOMENTUM))
        updated = parameter * (1 - lr * weight_decay)
        updated.add_(direction, alpha=-lr * UPDATE_RMS * math.sqrt(max(parameter.shape)))
        for place, value in ((momentum, moved), (parameter, updated)):
            # A choice and no product: what is held back is not finite, and 0 times that is not 0.
            place.copy_(value if held is None else torch.where(held.bool(), place, value))


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V' of the singular value decomposition U S V' of a float32 matrix: singular values of 0.7 to 1.2.

    Newton-Schulz iterations in bfloat16, where the products cost least and precision does not matter.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.t()) / (matrix.norm() + 1e-7)
    x = x.bfloat16()
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    found: Tensor = (x if wide else x.t()).float()
    return found
