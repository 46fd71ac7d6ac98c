"""Mixture of experts: each token goes through ``num_experts_per_tok`` of ``num_experts`` feed-forward layers.

Tokens are sorted by expert and each expert runs once on its slice, so a layer costs one host sync (the slice sizes)
whatever the number of experts. Sorting is undone by gathers in both directions: nothing is summed in an order that
could differ from run to run. An expert that got no token runs on an empty slice, so its weights get a zero gradient
and not none: DistributedDataParallel never finds an unused parameter.

Legend: ``N`` tokens, ``C`` hidden size, ``E`` experts, ``K`` experts of a token, ``P`` pieces.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import FeedForward, Linear


class Pieces(NamedTuple):
    """The sequences whose experts are balanced, each on its own.

    ``piece`` [N]: the piece a token is of, below ``total``. ``counted`` [N]: 1.0 where the token predicts something,
    else 0.0. ``size`` [P]: predicting tokens of each piece, at least 1.
    """

    piece: Tensor
    counted: Tensor
    size: Tensor
    total: int

    @classmethod
    def of(cls, labels: Tensor, segment_ids: Tensor | None) -> "Pieces":
        """Pieces of rows: ``labels`` [B, S], -100 where nothing is predicted; ``segment_ids`` [B, S], 0 for padding."""
        B, S = labels.shape
        rows = torch.arange(B, device=labels.device)[:, None].expand(B, S)
        widest = S + 1 if segment_ids is not None else 1
        piece = (rows * widest + segment_ids if segment_ids is not None else rows).flatten()
        counted = (labels != -100).float().flatten()
        size = torch.zeros(B * widest, device=labels.device).scatter_add(0, piece, counted)
        return cls(piece, counted, size.clamp(min=1.0), B * widest)


class MoE(nn.Module):
    """Router and experts. ``gate`` is the router, as MiniMind names it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        self.per_token = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(
            FeedForward(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor, pieces: Pieces | None) -> tuple[Tensor, Tensor]:
        """[B, S, C] -> ([B, S, C], auxiliary sum: float32 scalar, 0 without ``pieces``)."""
        tokens = x.flatten(0, 1)
        scores = self._scores(tokens)
        weights, chosen = scores.topk(self.per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        mixed = self._mixed(tokens, weights, chosen)
        aux = scores.new_zeros(()) if pieces is None else auxiliary_sum(scores, chosen, pieces)
        return mixed.view_as(x), aux

    def _scores(self, tokens: Tensor) -> Tensor:
        # In float32 also under autocast: bfloat16 logits tie often, and a tie decides which expert learns.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)

    # The slice sizes are data: a compiled graph would be made anew for each, so the experts stay outside of it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _mixed(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        dispatch: Callable[..., Tensor] = Dispatch.apply
        permute: Callable[..., Tensor] = Permute.apply
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sizes = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        slices = torch.split(dispatch(tokens, order, inverse, self.per_token), sizes)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, slices, strict=True)])
        back = permute(outputs, inverse, order).view(*chosen.shape, -1)
        return torch.einsum("nkc,nk->nc", back, weights.to(back.dtype))


def auxiliary_sum(scores: Tensor, chosen: Tensor, pieces: Pieces) -> Tensor:
    """Load balance, summed over pieces and weighted by their predicting tokens: float32 scalar.

    For one piece of n predicting tokens: ``n * sum_e f_e * p_e``, where ``f_e`` is expert e's share of the choices
    times E and ``p_e`` its mean score. It is 1 per token at perfect balance, E / K at worst. ``scores`` [N, E],
    ``chosen`` [N, K]. Only whole numbers are summed by scatter, so the order of summation cannot show.

    Source: the sequence-wise auxiliary loss of DeepSeek-V2 (arXiv 2405.04434), which MiniMind uses.
    """
    E, K = scores.shape[1], chosen.shape[1]
    slots = (pieces.piece[:, None] * E + chosen).flatten()
    counts = torch.zeros(pieces.total * E, device=scores.device).scatter_add(
        0, slots, pieces.counted.repeat_interleave(K)
    )
    load = counts.view(pieces.total, E) * (E / K) / pieces.size[:, None]
    return ((scores * load[pieces.piece]).sum(dim=-1) * pieces.counted).sum()


class Dispatch(torch.autograd.Function):
    """Copies of tokens [N, C] in the order of their experts, [N * K, C]; the gradient sums a token's copies."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """Slot i of the sorted choices belongs to token ``order[i] // copies``."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return tokens[order // copies]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """[N * K, C] -> [N, C]."""
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse].view(-1, ctx.copies, grads[0].shape[-1]).sum(dim=1), None, None, None


class Permute(torch.autograd.Function):
    """``x[order]``, whose gradient is a gather by the inverse: torch's own would be a slower, unordered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """[M, C] -> [M, C]."""
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None
