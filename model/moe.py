"""Mixture of experts: each token goes through ``num_experts_per_tok`` of ``num_experts`` feed-forward layers.

Each choice of a token gets a slot. The slots of an expert are adjacent, and grouped matrix products take them expert by
expert. The ends of the experts' slots stay on the device, so nothing waits for it, whatever the number of experts.
Tokens are copied to slots and back, forward and backward, so no sum has an order that differs from run to run.
An expert without tokens has products of no rows, so its weights get a zero gradient and not None:
DistributedDataParallel never finds an unused parameter.

Legend: ``N`` tokens, ``C`` hidden size, ``E`` experts, ``K`` experts of a token, ``P`` segments, ``M`` slots.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainyard.model.config import ModelConfig
from trainyard.model.grouped_gemm import ALIGNMENT, can_group, grouped_mm
from trainyard.model.layers import FeedForward, Linear
from trainyard.model.loss import IGNORED


class TokenDispatch(NamedTuple):
    """The slot in which each choice of each token is computed.

    ``slot`` [N * K]: below ``total``. ``ends`` [E] int32: the end of each expert's slots; unused ones before it hold
    zeros, and the last expert has all that are left. ``counts`` [E]: choices of each expert.
    """

    slot: Tensor
    ends: Tensor
    counts: Tensor
    total: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "TokenDispatch":
        """Assign slots to ``chosen`` [N, K]."""
        choices = chosen.flatten()
        index = torch.arange(len(choices), device=chosen.device)
        ranked, order = choices.sort(stable=True)
        starts = torch.searchsorted(ranked, torch.arange(experts + 1, device=chosen.device))
        counts = starts.diff()
        widths = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        ends = widths.cumsum(0)
        # By how much alignment moves an expert's first slot from its first index in the sorted choices.
        shift = ends - widths - starts[:-1]
        slot = torch.empty_like(choices).scatter_(0, order, index) + shift[choices]
        # Enough for any choice: reading the counts would wait for the device.
        total = -(-len(choices) // ALIGNMENT) * ALIGNMENT + experts * ALIGNMENT
        ends = torch.cat((ends[:-1], ends.new_full((1,), total)))
        return cls(slot, ends.to(torch.int32), counts, total)


class Segments(NamedTuple):
    """The sequences over which the experts' load is balanced, each on its own.

    ``segment`` [N]: the segment of each token, below ``total``. ``counted`` [N]: 1.0 if the token has a label, else
    0.0. ``size`` [P]: tokens with a label in each segment, at least 1.
    """

    segment: Tensor
    counted: Tensor
    size: Tensor
    total: int

    @classmethod
    def of(cls, labels: Tensor, segment_ids: Tensor | None) -> "Segments":
        """Number the segments of ``labels`` [B, S] (-100: no label) by ``segment_ids`` [B, S] (0: padding)."""
        B, S = labels.shape
        rows = torch.arange(B, device=labels.device)[:, None].expand(B, S)
        # Segments of a row are numbered 0 to S. The largest number in use is data, and reading it would be a sync.
        per_row = S + 1 if segment_ids is not None else 1
        segment = (rows * per_row + segment_ids if segment_ids is not None else rows).flatten()
        counted = (labels != IGNORED).float().flatten()
        size = torch.zeros(B * per_row, device=labels.device).scatter_add(0, segment, counted)
        return cls(segment, counted, size.clamp(min=1.0), B * per_row)


class RouterStats(NamedTuple):
    """How the routers of one or more layers chose.

    ``aux``: float32 scalar, see `auxiliary_sum`; 0 without labels. ``counts`` [E]: choices of each expert, padding
    included.
    """

    aux: Tensor
    counts: Tensor

    def add(self, other: "RouterStats") -> "RouterStats":
        """Return the sum over both."""
        return RouterStats(self.aux + other.aux, self.counts + other.counts)


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

    def forward(self, x: Tensor, segments: Segments | None) -> tuple[Tensor, RouterStats]:
        """[B, S, C] -> ([B, S, C], how the router chose)."""
        tokens = x.flatten(0, 1)
        scores = self._router_scores(tokens)
        weights, chosen = scores.topk(self.per_token, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        dispatch = TokenDispatch.of(chosen, len(self.experts))

        # The calls through Callable give mypy a type: autograd.Function.apply has none.
        scatter: Callable[..., Tensor] = _Scatter.apply
        gather: Callable[..., Tensor] = _Gather.apply
        slots = scatter(tokens, dispatch.slot, self.per_token, dispatch.total)
        outputs = gather(self._run_experts(slots, dispatch.ends), dispatch.slot).view(*chosen.shape, -1)
        mixed = torch.einsum("nkc,nk->nc", outputs, weights.to(outputs.dtype))

        aux = scores.new_zeros(()) if segments is None else auxiliary_sum(scores, chosen, segments)
        return mixed.view_as(x), RouterStats(aux, dispatch.counts)

    def _router_scores(self, tokens: Tensor) -> Tensor:
        # In float32 also under autocast: bfloat16 logits tie often, and a tie decides which expert learns.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.gate.weight.float()).softmax(dim=-1)

    def _run_experts(self, x: Tensor, ends: Tensor) -> Tensor:
        """[M, C] -> [M, C], each slot by its expert."""
        gate, up, down = (
            stack_weights([getattr(expert, name).weight for expert in self.experts], x.dtype)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        grouped = can_group(x, gate.shape[2], gate.shape[1])
        # Without grouped products, this is the one device sync of the layer: the sizes of the slices.
        ends = ends if grouped else ends.cpu()
        hidden = F.silu(grouped_mm(x, gate, ends, grouped)) * grouped_mm(x, up, ends, grouped)
        out: Tensor = grouped_mm(hidden, down, ends, grouped)
        return out


def auxiliary_sum(scores: Tensor, chosen: Tensor, segments: Segments) -> Tensor:
    """Return the load-balancing loss, summed over segments and weighted by their labels: float32 scalar.

    For one segment of n labels: ``n * sum_e f_e * p_e``, with ``f_e`` the share of expert e in the choices times E, and
    ``p_e`` its mean score. It is 1 per label at perfect balance, and E / K at worst. ``scores`` [N, E], ``chosen``
    [N, K].

    Source: the sequence-wise auxiliary loss of DeepSeek-V2 (arXiv 2405.04434), which MiniMind uses.
    """
    E, K = scores.shape[1], chosen.shape[1]
    expert_of_segment = (segments.segment[:, None] * E + chosen).flatten()
    # The scatter sums whole numbers only, so the order of summation cannot change the result.
    counts = torch.zeros(segments.total * E, device=scores.device).scatter_add(
        0, expert_of_segment, segments.counted.repeat_interleave(K)
    )
    load = counts.view(segments.total, E) * (E / K) / segments.size[:, None]
    return ((scores * load[segments.segment]).sum(dim=-1) * segments.counted).sum()


def stack_weights(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the experts' matrices, E of [O, I], as one [E, O, I] in ``dtype``."""
    if torch.compiler.is_compiling():
        return torch.stack([weight.to(dtype) for weight in weights])
    stack: Callable[..., Tensor] = _StackedWeights.apply
    return stack(dtype, *weights)


class _StackedWeights(torch.autograd.Function):
    """Cast and stack in one pass: on a GPU one kernel for all experts, forward and backward, in place of one for each.

    The numbers are those of a stack of casts, which writes each matrix twice.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        """E of [O, I] -> [E, O, I]."""
        ctx.dtype = weights[0].dtype
        stacked = weights[0].new_empty((len(weights), *weights[0].shape), dtype=dtype)
        torch._foreach_copy_(list(stacked.unbind()), list(weights))
        return stacked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """[E, O, I] -> E of [O, I]."""
        parts = list(grads[0].unbind())
        if parts[0].dtype != ctx.dtype:
            # Each in its own memory: they are kept as the gradients of parameters.
            cast = [torch.empty_like(part, dtype=ctx.dtype) for part in parts]
            torch._foreach_copy_(cast, parts)
            parts = cast
        return None, *parts


class _Scatter(torch.autograd.Function):
    """Copy tokens [N, C] to slots [total, C], with zeros in between; the gradient sums over the copies of a token."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, slot: Tensor, copies: int, total: int) -> Tensor:
        """Copy token ``i // copies`` to slot ``slot[i]``."""
        ctx.save_for_backward(slot)
        ctx.copies = copies
        copied = tokens.repeat_interleave(copies, dim=0)
        return tokens.new_zeros(total, tokens.shape[1]).index_copy_(0, slot, copied)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """[total, C] -> [N, C]."""
        (slot,) = ctx.saved_tensors
        return grads[0][slot].view(-1, ctx.copies, grads[0].shape[-1]).sum(dim=1), None, None, None


class _Gather(torch.autograd.Function):
    """Return ``x[slot]``, with a copy as its gradient, because no slot occurs twice.

    The gradient of torch's own indexing is a sum, which is slower and has no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor) -> Tensor:
        """[M, C] -> [N * K, C]."""
        ctx.save_for_backward(slot)
        ctx.total = len(x)
        return x[slot]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """[N * K, C] -> [M, C]."""
        (slot,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.total, grads[0].shape[1]).index_copy_(0, slot, grads[0]), None
