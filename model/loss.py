"""Next-token cross-entropy that never holds the logits of a whole micro-batch.

Legend: ``N`` tokens, ``C`` hidden size, ``V`` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.layers import compute_dtype

IGNORED = -100
"""Label of a position that predicts nothing."""

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits held at once: what stays in a CPU's cache, what fills a GPU."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of ``hidden`` @ ``weight``.T against ``labels``: float32 scalar.

    ``hidden`` [N, C], ``weight`` [V, C], ``labels`` [N], -100 where nothing is predicted. The product runs in
    autocast's dtype, the rest in float32. The gradients are made in the forward pass, chunk by chunk,
    while the logits are there.
    """
    hidden = hidden.to(compute_dtype(hidden))
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    chunked: Callable[..., Tensor] = ChunkedCrossEntropy.apply
    rows = max(64, elements // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked(hidden, weight, labels, rows, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, ``rows`` tokens at a time; the gradient is a by-product of the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, needs_grad: bool) -> Tensor:
        """See `cross_entropy_sum`. ``weight`` is float32 and so is the sum of its gradient."""
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight) if needs_grad else None
        # Its parts come in half precision. Without a place of its own for each to be widened in, the sum would make a
        # fresh one every time, and fresh memory costs a CPU more than the sum.
        widened = torch.empty_like(weight) if needs_grad else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            loss, logits_grad = _chunk(hidden[part] @ cast.t(), labels[part], needs_grad)
            total += loss
            if hidden_grad is not None and weight_grad is not None and widened is not None and logits_grad is not None:
                hidden_grad[part] = logits_grad @ cast
                weight_grad += widened.copy_(logits_grad.t() @ hidden[part])
        if hidden_grad is not None and weight_grad is not None:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scale what the forward pass made by the gradient of the sum, in place: a step goes backward once."""
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad.mul_(grads[0].to(hidden_grad.dtype)), weight_grad.mul_(grads[0]), None, None, None


def _chunk(logits: Tensor, labels: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of losses, gradient of it by ``logits`` in their dtype)."""
    counted = labels != IGNORED
    targets = labels.clamp(min=0)[:, None]
    logs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(logs.gather(1, targets).squeeze(1) * counted).sum()
    if not needs_grad:
        return loss, None
    grad = logs.exp_()
    grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
    return loss, (grad * counted[:, None]).to(logits.dtype)
