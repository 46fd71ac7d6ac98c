"""Attention of many short pieces on a CPU: those of about one length go together, as batched matrix products.

A kernel that is called for each piece spends most of its time on being called, and the CPU's flash kernel is slow in
bfloat16. Pieces are padded to a multiple of `STEP`, and all of one padded length are one batch; a piece's result
depends on its own tokens alone, and so does its padded length.

Legend: ``T`` tokens, ``H`` query heads, ``K`` key-value heads, ``G`` = H / K, ``D`` head size, ``L`` a padded length,
``N`` slots: the places of all padded pieces, once for each key-value head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

STEP = 32
"""Pieces are padded to a multiple of this: what the matrix product of a CPU is quick at."""

LONGEST = 512
"""Of longer pieces the scores, which are all held at once, are better not held."""

SCORES = 1 << 19
"""Scores held at once: what stays in a CPU's cache."""


@dataclass(frozen=True)
class Groups:
    """How tokens are laid out by the padded lengths of their pieces. A row is one token's share of a key-value head.

    ``rows`` [N]: the row, of T * K, that stands in each slot; behind the end of a piece its last one again.
    ``tokens`` [M]: the rows that are in these groups at all, and ``slots`` [M] where each stands. ``shapes``: of each
    group (pieces times K, L). ``others``: (begin, end) of the pieces that are too long for this.
    """

    rows: Tensor
    tokens: Tensor
    slots: Tensor
    shapes: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, offsets: Tensor, heads: int, longest: int = LONGEST) -> Self:
        """Groups of the pieces that begin at ``offsets`` [P + 1], for ``heads`` = K."""
        begins, lengths = offsets[:-1].long(), offsets.diff().long()
        chosen = (lengths > 0) & (lengths <= longest)
        padded = torch.div(lengths + STEP - 1, STEP, rounding_mode="floor") * STEP
        rows, shapes = [torch.empty(0, dtype=torch.int64)], []
        real = [torch.empty(0, dtype=torch.bool)]
        for L in sorted(set(padded[chosen].tolist())):
            own = chosen & (padded == L)
            place = torch.arange(L)
            token = begins[own, None] + torch.minimum(place, lengths[own, None] - 1)
            rows.append((token[:, None] * heads + torch.arange(heads)[:, None]).flatten())
            real.append((place < lengths[own, None])[:, None].expand(-1, heads, -1).flatten())
            shapes.append((int(own.sum()) * heads, L))
        all_rows, slots = torch.cat(rows), torch.cat(real).nonzero().squeeze(1)
        tokens, order = all_rows[slots].sort()
        long = (lengths > longest).nonzero().squeeze(1)
        others = tuple(zip(begins[long].tolist(), (begins + lengths)[long].tolist(), strict=True))
        return cls(all_rows, tokens, slots[order], tuple(shapes), others)

    def laid_out(self, part: Tensor, heads: int) -> Tensor:
        """[T, K * X, D] -> [N, X * D]."""
        return part.reshape(len(part) * heads, -1).index_select(0, self.rows)

    def laid_out_zero_padded(self, part: Tensor, heads: int) -> Tensor:
        """The same with zeros behind the end of each piece."""
        flat = part.reshape(len(part) * heads, -1)
        return flat.new_zeros(len(self.rows), flat.shape[1]).index_copy_(0, self.slots, flat[self.tokens])

    def put_back(self, laid_out: Tensor, into: Tensor, heads: int) -> None:
        """[N, X * D] -> [T, K * X, D], where the tokens of these groups are."""
        into.view(len(into) * heads, -1).index_copy_(0, self.tokens, laid_out.index_select(0, self.slots))

    def batches(self) -> Iterator[tuple[slice, int, int]]:
        """(slots, b, L) of products that hold at most `SCORES` scores a query head, or those of one piece and head."""
        start = 0
        for count, L in self.shapes:
            most = max(1, SCORES // (L * L))
            for first in range(0, count, most):
                b = min(most, count - first)
                yield slice(start + first * L, start + (first + b) * L), b, L
            start += count * L


def groups_of(offsets: Tensor, heads: int, longest: int = LONGEST) -> Groups:
    """`Groups.of` for ``offsets`` int32, remembered: all layers, forward and backward, have the same."""
    return _remembered(offsets.numpy().tobytes(), heads, longest)


@lru_cache(maxsize=4)
def _remembered(offsets: bytes, heads: int, longest: int) -> Groups:
    return Groups.of(torch.frombuffer(bytearray(offsets), dtype=torch.int32), heads, longest)


def forward(queries: Tensor, keys: Tensor, values: Tensor, groups: Groups, out: Tensor) -> None:
    """Attend within the pieces of ``groups``, into ``out`` [T, H, D]. The others have their shapes in `attention`."""
    K, D = keys.shape[1:]
    q, k, v = (groups.laid_out(part, K) for part in (queries, keys, values))
    q.mul_(D**-0.5)
    laid_out = torch.empty_like(q)
    for slots, b, L in groups.batches():
        shares = _shares(_by_group(q[slots], b, L, D), k[slots].view(b, L, D))
        attended = torch.bmm(shares, v[slots].view(b, L, D))
        _of_group(laid_out[slots], b, L, D).copy_(attended.view(b, -1, L, D))
    groups.put_back(laid_out, out, K)


def backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, groups: Groups, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """The gradients, into ``grads``. The shares are computed once more: they are many, and cost little."""
    K, D = keys.shape[1:]
    scale = D**-0.5
    q, k, v = (groups.laid_out(part, K) for part in (queries, keys, values))
    q.mul_(scale)
    g = groups.laid_out_zero_padded(grad, K)
    dq, dk, dv = (torch.empty_like(part) for part in (q, k, v))
    for slots, b, L in groups.batches():
        own_q, own_g = _by_group(q[slots], b, L, D), _by_group(g[slots], b, L, D)
        own_k, own_v = k[slots].view(b, L, D), v[slots].view(b, L, D)
        shares = _shares(own_q, own_k)
        torch.bmm(shares.transpose(1, 2), own_g, out=dv[slots].view(b, L, D))
        by_shares = torch.bmm(own_g, own_v.transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_shares, shares, -1, shares.dtype)  # noqa: SLF001
        _of_group(dq[slots], b, L, D).copy_(torch.bmm(by_scores, own_k).view(b, -1, L, D))
        torch.bmm(by_scores.transpose(1, 2), own_q, out=dk[slots].view(b, L, D))
    dq.mul_(scale)
    for laid_out, into in zip((dq, dk, dv), grads, strict=True):
        groups.put_back(laid_out, into, K)


def _shares(queries: Tensor, keys: Tensor) -> Tensor:
    """[b, G * L, D], scaled, and [b, L, D] -> [b, G * L, L]: what each query takes of each key."""
    L = keys.shape[1]
    mask = _mask(queries.shape[1] // L, L, queries.dtype)
    return torch.baddbmm(mask, queries, keys.transpose(1, 2)).softmax(-1)


@lru_cache(maxsize=LONGEST // STEP)
def _mask(group: int, L: int, dtype: torch.dtype) -> Tensor:
    """[1, G * L, L]: 0 where a query sees a key, at or before it, else minus infinity."""
    return torch.full((1, L, L), -torch.inf, dtype=dtype).triu(1).repeat(1, group, 1)


def _of_group(part: Tensor, b: int, L: int, D: int) -> Tensor:
    """[b * L, G * D] -> [b, G, L, D], a view."""
    return part.view(b, L, -1, D).transpose(1, 2)


def _by_group(part: Tensor, b: int, L: int, D: int) -> Tensor:
    """[b * L, G * D] -> [b, G * L, D]: the query heads of a group below each other."""
    return _of_group(part, b, L, D).reshape(b, -1, D)
