"""Mixture of experts: each token goes through ``num_experts_per_tok`` of ``num_experts`` feed-forward layers.

Each choice of a token gets a slot; those of an expert lie together, and grouped matrix products take them expert by
expert. Where an expert's slots end stays on the device: nothing waits for it, whatever the number of experts.
Slots are filled and left by copies in both directions: nothing is summed in an order that could differ from run to run.
An expert that got no token has products of no rows, so its weights get a zero gradient and not none:
DistributedDataParallel never finds an unused parameter.

Legend: ``N`` tokens, ``C`` hidden size, ``E`` experts, ``K`` experts of a token, ``P`` pieces, ``M`` slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.layers import FeedForward, Linear
from model.product import ALIGNED, can_group, product


class Slots(NamedTuple):
    """Where each choice of each token is computed.

    ``of`` [N * K]: its slot, below ``total``. ``ends`` [E] int32: where the slots of each expert end; empty ones before
    that hold zeros, and the last expert has all that are left over. ``counts`` [E]: choices of each expert.
    """

    of: Tensor
    ends: Tensor
    counts: Tensor
    total: int

    @classmethod
    def found(cls, chosen: Tensor, experts: int) -> "Slots":
        """Slots for ``chosen`` [N, K]: so many that any choice fits, since how many it takes only the device knows."""
        choices = chosen.flatten()
        places = torch.arange(len(choices), device=chosen.device)
        ranked, order = choices.sort(stable=True)
        begun_before = torch.searchsorted(ranked, torch.arange(experts + 1, device=chosen.device))
        counts = begun_before.diff()
        widths = (counts + ALIGNED - 1) // ALIGNED * ALIGNED
        ends = widths.cumsum(0)
        # How far an expert's slots lie behind where its choices would lie without empty slots.
        shift = ends - widths - begun_before[:-1]
        of = torch.empty_like(choices).scatter_(0, order, places) + shift[choices]
        total = -(-len(choices) // ALIGNED) * ALIGNED + experts * ALIGNED
        ends = torch.cat((ends[:-1], ends.new_full((1,), total)))
        return cls(of, ends.to(torch.int32), counts, total)


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


class Balance(NamedTuple):
    """How the experts of one layer, or of all, were chosen.

    ``aux``: float32 scalar, see `auxiliary_sum`; 0 where nothing is predicted. ``counts`` [E]: choices of each expert,
    padding's among them.
    """

    aux: Tensor
    counts: Tensor

    def plus(self, other: "Balance") -> "Balance":
        """Of several layers together."""
        return Balance(self.aux + other.aux, self.counts + other.counts)


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

    def forward(self, x: Tensor, pieces: Pieces | None) -> tuple[Tensor, "Balance"]:
        """[B, S, C] -> ([B, S, C], how the experts were chosen)."""
        tokens = x.flatten(0, 1)
        scores = self._scores(tokens)
        weights, chosen = scores.topk(self.per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        slots = Slots.found(chosen, len(self.experts))
        mixed = self._mixed(tokens, weights, chosen, slots)
        aux = scores.new_zeros(()) if pieces is None else auxiliary_sum(scores, chosen, pieces)
        return mixed.view_as(x), Balance(aux, slots.counts)

    def _scores(self, tokens: Tensor) -> Tensor:
        # In float32 also under autocast: bfloat16 logits tie often, and a tie decides which expert learns.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)

    def _mixed(self, tokens: Tensor, weights: Tensor, chosen: Tensor, slots: Slots) -> Tensor:
        filled: Callable[..., Tensor] = Filled.apply
        taken: Callable[..., Tensor] = Taken.apply
        outputs = self._computed(filled(tokens, slots.of, self.per_token, slots.total), slots.ends)
        back = taken(outputs, slots.of).view(*chosen.shape, -1)
        return torch.einsum("nkc,nk->nc", back, weights.to(back.dtype))

    def _computed(self, x: Tensor, ends: Tensor) -> Tensor:
        """[M, C] -> [M, C], each slot by its expert."""
        gate, up, down = (
            torch.stack([getattr(expert, name).weight.to(x.dtype) for expert in self.experts])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        grouped = can_group(x, gate.shape[2], gate.shape[1])
        # Where products are not grouped: the one wait a layer, for the sizes of its slices.
        ends = ends if grouped else ends.cpu()
        hidden = F.silu(product(x, gate, ends, grouped)) * product(x, up, ends, grouped)
        out: Tensor = product(hidden, down, ends, grouped)
        return out


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


class Filled(torch.autograd.Function):
    """Slots [total, C] with copies of tokens [N, C], zeros in between; the gradient sums a token's copies."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slots: Tensor, copies: int, total: int) -> Tensor:
        """Slot ``slots[i]`` holds token ``i // copies``."""
        ctx.save_for_backward(slots)
        ctx.copies = copies
        spread = tokens.repeat_interleave(copies, dim=0)
        return tokens.new_zeros(total, tokens.shape[1]).index_copy_(0, slots, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """[total, C] -> [N, C]."""
        (slots,) = ctx.saved_tensors
        return grads[0][slots].view(-1, ctx.copies, grads[0].shape[-1]).sum(dim=1), None, None, None


class Taken(torch.autograd.Function):
    """``x[slots]``, whose gradient is a copy, since no slot is taken twice: torch's own is a slower, unordered sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        """[M, C] -> [N * K, C]."""
        ctx.save_for_backward(slots)
        ctx.total = len(x)
        return x[slots]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """[N * K, C] -> [M, C]."""
        (slots,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.total, grads[0].shape[1]).index_copy_(0, slots, grads[0]), None
