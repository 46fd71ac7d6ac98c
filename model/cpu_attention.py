"""Causal attention within segments on a CPU: an optimization of CPU runs. GPU runs never use this file.

It is 1.14 to 1.25 times as fast as a block-diagonal mask, and calls operators that are private in torch. If a version
of torch lacks one of them, `AVAILABLE` is False and the mask is used (see `model.varlen_attention`).

There are two ways. In bfloat16, segments of up to `MAX_PADDED_LEN` tokens are computed in groups: segments are padded
to a multiple of `PAD_TO`, and all of one padded length form one batch of matrix products. All other segments go
through the CPU's flash kernel in float32, one by one: a kernel call for each short segment costs more than its work,
and the flash kernel's backward pass is twice as slow in bfloat16 as in float32.

The result of a segment depends on its own tokens alone, and so does its padded length.

Legend: ``T`` tokens, ``H`` query heads, ``K`` key-value heads, ``G`` = H / K, ``D`` head size, ``P`` segments, ``L`` a
segment's length (padded, in a group), ``N`` slots: the positions of all padded segments, once for each key-value head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
from torch import Tensor

# The public scaled_dot_product_attention takes only a batch of one length, chooses a kernel again at each call, and
# does not return the log-sums that the backward operator needs.
_FLASH_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_SOFTMAX_BACKWARD = getattr(torch, "_softmax_backward_data", None)

AVAILABLE = None not in (_FLASH_FORWARD, _FLASH_BACKWARD, _SOFTMAX_BACKWARD)
"""Whether this version of torch has the private operators used here."""

PAD_TO = 32
"""Segments in groups are padded to a multiple of this: sizes that CPU matrix products are fast at."""

MAX_PADDED_LEN = 512
"""Longer segments are not grouped: all their scores would be in memory at once."""

MAX_SCORES = 1 << 19
"""Attention scores of a query head in memory at once, so that they stay in the CPU's cache."""


@torch.library.custom_op("trainyard::cpu_varlen_attention", mutates_args=(), device_types="cpu")
def cpu_varlen_attention(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention within segments [T, H, D], and the log-sum of each softmax [K, G, T] float32.

    ``queries`` [T, H, D], ``keys`` and ``values`` [T, K, D]; ``offsets`` as in `model.varlen_attention`. The log-sums
    of grouped segments stay 0, because their backward pass does not need them.
    """
    # A custom operator, because the loop over segments depends on data: a compiled graph calls it as one node.
    assert _FLASH_FORWARD is not None
    heads = keys.shape[1]
    out = torch.empty(queries.shape, dtype=queries.dtype)
    log_sums = torch.zeros(heads, queries.shape[1] // heads, len(queries), dtype=torch.float32)
    groups = _groups_of(queries, offsets, heads)
    if groups.shapes:
        _grouped_forward(queries, keys, values, groups, out)
    q, k, v = (part.float() for part in (queries, keys, values)) if groups.ungrouped else (queries, keys, values)
    for begin, end in groups.ungrouped:
        segment = slice(begin, end)
        attended, log_sums[:, :, segment] = _FLASH_FORWARD(
            _by_kv_head(q[segment], heads),
            _expand_kv(k[segment], log_sums),
            _expand_kv(v[segment], log_sums),
            0.0,  # dropout
            True,  # causal
        )
        _by_kv_head(out[segment], heads).copy_(attended)
    return out, log_sums


@torch.library.custom_op("trainyard::cpu_varlen_attention_backward", mutates_args=(), device_types="cpu")
def cpu_varlen_attention_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, log_sums: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``queries``, ``keys`` and ``values``, in their shapes and dtypes."""
    assert _FLASH_BACKWARD is not None
    heads = keys.shape[1]
    dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype) for part in (queries, keys, values))
    groups = _groups_of(queries, offsets, heads)
    if groups.shapes:
        _grouped_backward(grad, queries, keys, values, groups, (dq, dk, dv))
    inputs = [part.float() for part in (grad, queries, keys, values, out)] if groups.ungrouped else []
    for begin, end in groups.ungrouped:
        segment = slice(begin, end)
        g, q, k, v, o = (part[segment] for part in inputs)
        grads = _FLASH_BACKWARD(
            _by_kv_head(g, heads),
            _by_kv_head(q, heads),
            _expand_kv(k, log_sums),
            _expand_kv(v, log_sums),
            _by_kv_head(o, heads),
            log_sums[:, :, segment].contiguous(),
            0.0,  # dropout
            True,  # causal
        )
        _by_kv_head(dq[segment], heads).copy_(grads[0])
        # The query heads of a group share keys and values, so their gradients add up.
        dk[segment].transpose(0, 1).copy_(grads[1].sum(dim=1))
        dv[segment].transpose(0, 1).copy_(grads[2].sum(dim=1))
    return dq, dk, dv


def _by_kv_head(part: Tensor, heads: int) -> Tensor:
    """[L, H, D] -> [K, G, L, D], a view."""
    return part.view(len(part), heads, -1, part.shape[-1]).permute(1, 2, 0, 3)


def _expand_kv(part: Tensor, log_sums: Tensor) -> Tensor:
    """[L, K, D] -> [K, G, L, D], a view: each key-value head repeated for its query heads."""
    return part.transpose(0, 1)[:, None].expand(-1, log_sums.shape[1], -1, -1)


@cpu_varlen_attention.register_fake
def _(queries: Tensor, keys: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    heads = keys.shape[1]
    log_sums = queries.new_empty(heads, queries.shape[1] // heads, queries.shape[0], dtype=torch.float32)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), log_sums


@cpu_varlen_attention_backward.register_fake
def _(_: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *__: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (queries, keys, values))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = cpu_varlen_attention_backward(grad, *ctx.saved_tensors)
    return dq, dk, dv, None


cpu_varlen_attention.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class PaddedGroups:
    """How segments are laid out in batches by their padded lengths.

    A row here is one token's share of one key-value head: row t * K + k. ``rows`` [N]: the row in each slot; the
    padding of a segment repeats its last row. ``tokens`` [M]: the rows that are in any group, and ``slots`` [M]: the
    slot of each. ``shapes``: (segments times K, L) of each group. ``ungrouped``: (begin, end) of the segments that are
    too long for a group.
    """

    rows: Tensor
    tokens: Tensor
    slots: Tensor
    shapes: tuple[tuple[int, int], ...]
    ungrouped: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, offsets: Tensor, heads: int, max_len: int = MAX_PADDED_LEN) -> Self:
        """Group the segments of at most ``max_len`` tokens that begin at ``offsets`` [P + 1], for ``heads`` = K."""
        begins, lengths = offsets[:-1].long(), offsets.diff().long()
        is_grouped = (lengths > 0) & (lengths <= max_len)
        padded = torch.div(lengths + PAD_TO - 1, PAD_TO, rounding_mode="floor") * PAD_TO
        rows, shapes = [torch.empty(0, dtype=torch.int64)], []
        is_token = [torch.empty(0, dtype=torch.bool)]
        for L in sorted(set(padded[is_grouped].tolist())):
            members = is_grouped & (padded == L)
            position = torch.arange(L)
            token = begins[members, None] + torch.minimum(position, lengths[members, None] - 1)
            rows.append((token[:, None] * heads + torch.arange(heads)[:, None]).flatten())
            is_token.append((position < lengths[members, None])[:, None].expand(-1, heads, -1).flatten())
            shapes.append((int(members.sum()) * heads, L))
        all_rows, slots = torch.cat(rows), torch.cat(is_token).nonzero().squeeze(1)
        tokens, order = all_rows[slots].sort()
        long = (lengths > max_len).nonzero().squeeze(1)
        ungrouped = tuple(zip(begins[long].tolist(), (begins + lengths)[long].tolist(), strict=True))
        return cls(all_rows, tokens, slots[order], tuple(shapes), ungrouped)

    def gather(self, part: Tensor, heads: int) -> Tensor:
        """[T, K * X, D] -> [N, X * D]; padding repeats the last token of its segment."""
        return part.reshape(len(part) * heads, -1).index_select(0, self.rows)

    def gather_zero_padded(self, part: Tensor, heads: int) -> Tensor:
        """[T, K * X, D] -> [N, X * D]; padding is 0, so that it adds nothing to a gradient."""
        flat = part.reshape(len(part) * heads, -1)
        return flat.new_zeros(len(self.rows), flat.shape[1]).index_copy_(0, self.slots, flat[self.tokens])

    def scatter(self, padded: Tensor, into: Tensor, heads: int) -> None:
        """Write [N, X * D] to ``into`` [T, K * X, D], at the tokens of these groups."""
        into.view(len(into) * heads, -1).index_copy_(0, self.tokens, padded.index_select(0, self.slots))

    def batches(self) -> Iterator[tuple[slice, int, int]]:
        """Yield (slots, b, L) of products with at most `MAX_SCORES` scores a query head, or of one segment and head."""
        start = 0
        for count, L in self.shapes:
            size = max(1, MAX_SCORES // (L * L))
            for first in range(0, count, size):
                b = min(size, count - first)
                yield slice(start + first * L, start + (first + b) * L), b, L
            start += count * L


def _groups_of(queries: Tensor, offsets: Tensor, heads: int) -> PaddedGroups:
    max_len = MAX_PADDED_LEN if queries.dtype is torch.bfloat16 else 0
    return _cached_groups(offsets.numpy().tobytes(), heads, max_len)


# All layers have the same groups, forward and backward.
@lru_cache(maxsize=4)
def _cached_groups(offsets: bytes, heads: int, max_len: int) -> PaddedGroups:
    return PaddedGroups.of(torch.frombuffer(bytearray(offsets), dtype=torch.int32), heads, max_len)


def _grouped_forward(queries: Tensor, keys: Tensor, values: Tensor, groups: PaddedGroups, out: Tensor) -> None:
    """Write attention within the segments of ``groups`` into ``out`` [T, H, D]."""
    K, D = keys.shape[1:]
    q, k, v = (groups.gather(part, K) for part in (queries, keys, values))
    q.mul_(D**-0.5)
    padded = torch.empty_like(q)
    for slots, b, L in groups.batches():
        weights = _attention_weights(_stack_heads(q[slots], b, L, D), k[slots].view(b, L, D))
        attended = torch.bmm(weights, v[slots].view(b, L, D))
        _by_head(padded[slots], b, L, D).copy_(attended.view(b, -1, L, D))
    groups.scatter(padded, out, K)


def _grouped_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: PaddedGroups,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of the segments of ``groups`` into ``grads``.

    The attention weights are computed again: to keep them takes much memory, and to compute them little time.
    """
    assert _SOFTMAX_BACKWARD is not None
    K, D = keys.shape[1:]
    scale = D**-0.5
    q, k, v = (groups.gather(part, K) for part in (queries, keys, values))
    q.mul_(scale)
    g = groups.gather_zero_padded(grad, K)
    dq, dk, dv = (torch.empty_like(part) for part in (q, k, v))
    for slots, b, L in groups.batches():
        batch_q, batch_g = _stack_heads(q[slots], b, L, D), _stack_heads(g[slots], b, L, D)
        batch_k, batch_v = k[slots].view(b, L, D), v[slots].view(b, L, D)
        weights = _attention_weights(batch_q, batch_k)
        torch.bmm(weights.transpose(1, 2), batch_g, out=dv[slots].view(b, L, D))
        weights_grad = torch.bmm(batch_g, batch_v.transpose(1, 2))
        scores_grad = _SOFTMAX_BACKWARD(weights_grad, weights, -1, weights.dtype)
        _by_head(dq[slots], b, L, D).copy_(torch.bmm(scores_grad, batch_k).view(b, -1, L, D))
        torch.bmm(scores_grad.transpose(1, 2), batch_q, out=dk[slots].view(b, L, D))
    dq.mul_(scale)
    for padded, into in zip((dq, dk, dv), grads, strict=True):
        groups.scatter(padded, into, K)


def _attention_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """[b, G * L, D], scaled, and [b, L, D] -> [b, G * L, L]: causal softmax of the scores."""
    L = keys.shape[1]
    mask = _causal_mask(queries.shape[1] // L, L, queries.dtype)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2)).softmax(-1)


@lru_cache(maxsize=MAX_PADDED_LEN // PAD_TO)
def _causal_mask(group: int, L: int, dtype: torch.dtype) -> Tensor:
    """[1, G * L, L]: 0 if a query sees a key, at or before it, else minus infinity."""
    return torch.full((1, L, L), -torch.inf, dtype=dtype).triu(1).repeat(1, group, 1)


def _by_head(part: Tensor, b: int, L: int, D: int) -> Tensor:
    """[b * L, G * D] -> [b, G, L, D], a view."""
    return part.view(b, L, -1, D).transpose(1, 2)


def _stack_heads(part: Tensor, b: int, L: int, D: int) -> Tensor:
    """[b * L, G * D] -> [b, G * L, D]: the query heads of a group one after another."""
    return _by_head(part, b, L, D).reshape(b, -1, D)
