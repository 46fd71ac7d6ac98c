"""Attention in rows that hold several pieces: each token sees the tokens of its own piece, at or before it.

A mask over whole rows makes every kernel compute what it then throws away. Here the pieces are computed one by one:
on CUDA by flash attention for sequences of variable length, on a CPU by its own flash kernel, piece after piece, or
many short ones at once (`model.grouped`).

Legend: ``B`` rows, ``S`` positions, ``T`` = B * S tokens, ``H`` query heads, ``K`` key-value heads, ``G`` = H / K,
``D`` head size, ``P`` pieces.
"""

from typing import Any

import torch
from torch import Tensor

from model import grouped
from model.grouped import Groups

# torch's public function takes a whole batch of one length, and looks anew at each call for the kernel to use.
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


def within_pieces(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Causal attention within pieces: [B, S, H, D] of the dtype of ``queries``.

    ``queries`` [B, S, H, D], ``keys`` and ``values`` [B, S, K, D], all of one dtype. ``offsets`` [P + 1] int32: where
    each piece begins among all T tokens, then T; equal neighbours are pieces of no token, and fill it up to a fixed
    size, so that a compiled graph fits every batch.
    """
    parts = queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    if queries.is_cuda:
        return _variable_length(*parts, offsets, queries.shape[1]).view_as(queries)
    attended: Tensor = piecewise_attention(*parts, offsets)[0]
    return attended.view_as(queries)


def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `within_pieces` runs there. Where it does not, a mask over whole rows gives the same."""
    if device.type != "cuda":
        return device.type == "cpu"
    # Properties and not the capability: a compiled graph takes them for constants.
    generation = torch.cuda.get_device_properties(device).major
    return flash_knows(generation, dtype, head_dim)


def flash_knows(generation: int, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether CUDA's flash kernel of variable length can do it: half precision, on Ampere (8) and later cards.

    Its heads have a multiple of 8 numbers, at most 256.
    """
    return generation >= 8 and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def _variable_length(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # A window without an end to the left and of nothing to the right is causal attention.
    attended: Any = varlen_attn(
        queries, keys, values, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=True
    )
    out: Tensor = attended
    return out


@torch.library.custom_op("trainyard::piecewise_attention", mutates_args=(), device_types="cpu")
def piecewise_attention(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """(attended [T, H, D], log of each softmax's sum [K, G, T] float32) of [T, H, D], [T, K, D], [T, K, D].

    An operator of its own, because its loop over pieces is data: a compiled graph calls it and need not know. In
    bfloat16 short pieces go together, by matrix products (and have no sums); all others are computed in float32, one
    by one: the CPU's flash kernel is twice as slow backward in bfloat16.
    """
    heads = keys.shape[1]
    out = torch.empty(queries.shape, dtype=queries.dtype)
    sums = torch.zeros(heads, queries.shape[1] // heads, len(queries), dtype=torch.float32)
    groups = _groups(queries, offsets, heads)
    if groups.shapes:
        grouped.forward(queries, keys, values, groups, out)
    wide = [part.float() for part in (queries, keys, values)] if groups.others else []
    for begin, end in groups.others:
        piece = slice(begin, end)
        attended, sums[:, :, piece] = FORWARD(
            _grouped(wide[0][piece], heads),
            _shared(wide[1][piece], sums),
            _shared(wide[2][piece], sums),
            0.0,
            True,
        )
        _grouped(out[piece], heads).copy_(attended)
    return out, sums


@torch.library.custom_op("trainyard::piecewise_attention_backward", mutates_args=(), device_types="cpu")
def piecewise_attention_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, sums: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by ``queries``, ``keys`` and ``values``, in their shapes and dtypes, from that by ``out``."""
    heads = keys.shape[1]
    by_queries, by_keys, by_values = (torch.empty(part.shape, dtype=part.dtype) for part in (queries, keys, values))
    groups = _groups(queries, offsets, heads)
    if groups.shapes:
        grouped.backward(grad, queries, keys, values, groups, (by_queries, by_keys, by_values))
    wide = [part.float() for part in (grad, out, queries, keys, values)] if groups.others else []
    for begin, end in groups.others:
        piece = slice(begin, end)
        grads = BACKWARD(
            _grouped(wide[0][piece], heads),
            _grouped(wide[2][piece], heads),
            _shared(wide[3][piece], sums),
            _shared(wide[4][piece], sums),
            _grouped(wide[1][piece], heads),
            sums[:, :, piece].contiguous(),
            0.0,
            True,
        )
        _grouped(by_queries[piece], heads).copy_(grads[0])
        # The heads of a group share their keys: what each wants of them adds up.
        by_keys[piece].transpose(0, 1).copy_(grads[1].sum(dim=1))
        by_values[piece].transpose(0, 1).copy_(grads[2].sum(dim=1))
    return by_queries, by_keys, by_values


def _groups(queries: Tensor, offsets: Tensor, heads: int) -> Groups:
    longest = grouped.LONGEST if queries.dtype is torch.bfloat16 else 0
    return grouped.groups_of(offsets, heads, longest)


def _grouped(part: Tensor, heads: int) -> Tensor:
    """[L, H, D] -> [K, G, L, D], a view: query heads by the key-value head they share."""
    return part.view(len(part), heads, -1, part.shape[-1]).permute(1, 2, 0, 3)


def _shared(part: Tensor, sums: Tensor) -> Tensor:
    """[L, K, D] -> [K, G, L, D], a view: each key-value head, seen by its group."""
    return part.transpose(0, 1)[:, None].expand(-1, sums.shape[1], -1, -1)


@piecewise_attention.register_fake
def _(queries: Tensor, keys: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    heads = keys.shape[1]
    sums = queries.new_empty(heads, queries.shape[1] // heads, queries.shape[0], dtype=torch.float32)
    return torch.empty_like(queries, memory_format=torch.contiguous_format), sums


@piecewise_attention_backward.register_fake
def _(_: Tensor, queries: Tensor, keys: Tensor, values: Tensor, *__: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_queries, by_keys, by_values = (
        torch.empty_like(part, memory_format=torch.contiguous_format) for part in (queries, keys, values)
    )
    return by_queries, by_keys, by_values


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    by_queries, by_keys, by_values = piecewise_attention_backward(grad, *ctx.saved_tensors)
    return by_queries, by_keys, by_values, None


piecewise_attention.register_autograd(_backward, setup_context=_keep)
