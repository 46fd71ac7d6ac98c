"""Next-token cross-entropy, computed in chunks: the logits of a whole micro-batch are never in memory at once.

Legend: ``N`` tokens, ``C`` hidden size, ``V`` vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainyard.model.layers import compute_dtype

IGNORED = -100
"""Label of a position without a token to predict."""

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Number of logits in memory at once: few enough for the cache of a CPU, enough to occupy a GPU."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of ``hidden`` @ ``weight``.T against ``labels``: float32 scalar.

    ``hidden`` [N, C], ``weight`` [V, C], ``labels`` [N], -100 for none. The product runs in autocast's dtype, the rest
    in float32. The gradients are computed in the forward pass, chunk by chunk, while the logits are in memory.
    """
    hidden = hidden.to(compute_dtype(hidden))
    elements = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    chunked: Callable[..., Tensor] = ChunkedCrossEntropy.apply
    rows = max(64, elements // weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked(hidden, weight, labels, rows, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, ``rows`` tokens at a time, with gradients computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, needs_grad: bool) -> Tensor:
        """Compute `cross_entropy_sum`. ``weight`` is float32, and its gradient is summed in float32."""
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        weight_grad = torch.zeros_like(weight) if needs_grad else None
        # Each chunk's gradient is in half precision. This buffer converts it to float32: without it, each sum would
        # allocate one, and fresh memory costs a CPU more time than the sum.
        buffer = torch.empty_like(weight) if needs_grad else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            loss, logits_grad = _chunk_loss(hidden[chunk] @ cast.t(), labels[chunk], needs_grad)
            total += loss
            if hidden_grad is not None and weight_grad is not None and buffer is not None and logits_grad is not None:
                hidden_grad[chunk] = logits_grad @ cast
                weight_grad += buffer.copy_(logits_grad.t() @ hidden[chunk])
        if hidden_grad is not None and weight_grad is not None:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.rows = rows
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scale the gradients from the forward pass by that of the sum; in place, since backward runs once a step."""
        hidden_grad, weight_grad = ctx.saved_tensors
        for part in hidden_grad.split(ctx.rows):
            # In float32. In bfloat16 the factor itself would be off by up to 0.4 %, and with it the gradient of every
            # parameter but the head's. Large factors (the loss scale of fp16) would overflow.
            part.copy_(part.float() * grads[0])
        return hidden_grad, weight_grad.mul_(grads[0]), None, None, None


def _chunk_loss(logits: Tensor, labels: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum of losses, and its gradient by ``logits`` in their dtype."""
    counted = labels != IGNORED
    targets = labels.clamp(min=0)[:, None]
    log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(log_probs.gather(1, targets).squeeze(1) * counted).sum()
    if not needs_grad:
        return loss, None
    # Softmax minus one-hot.
    grad = log_probs.exp_()
    grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
    return loss, grad.mul_(counted[:, None]).to(logits.dtype)  # in place: fresh memory costs a fifth of this function
