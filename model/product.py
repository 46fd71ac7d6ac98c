"""The matrix products of experts, each over its own slots.

Operators of their own, because where the slots of an expert end only a run knows: a compiled graph calls them and need
not know.

Legend: ``M`` slots, ``E`` experts, ``I`` and ``O`` sizes of what goes in and comes out.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

ALIGNED = 8
"""Experts begin at multiples of so many slots: CUDA's grouped products read 16 bytes at a time."""


def can_group(x: Tensor, inputs: int, outputs: int) -> bool:
    """Whether grouped products of ``x`` [M, inputs], and back, run without a wait for the device.

    On CUDA the kernel is Hopper's and later cards', knows bfloat16, and wants rows of whole 16 bytes.
    """
    if not x.is_cuda:
        return True
    whole = inputs % ALIGNED == 0 and outputs % ALIGNED == 0
    # Properties and not the capability: a compiled graph takes them for constants.
    return whole and x.dtype is torch.bfloat16 and torch.cuda.get_device_properties(x.device).major >= 9


@torch.library.custom_op("trainyard::product", mutates_args=())
def product(x: Tensor, matrices: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """[M, I] and [E, O, I] -> [M, O]: each slot by the matrix of its expert, whose slots end at ``ends`` [E] int32.

    ``grouped``: by one kernel that reads ``ends`` where ``x`` is. Else one after the other, and ``ends`` is better on
    the CPU, so that nothing waits here.
    """
    if grouped:
        out: Tensor = grouped_mm(x, matrices.transpose(1, 2), offs=ends)
        return out
    out = x.new_empty(len(x), matrices.shape[1])
    for matrix, part in zip(matrices, _slices(ends), strict=True):
        torch.mm(x[part], matrix.t(), out=out[part])
    return out


@torch.library.custom_op("trainyard::product_by_matrices", mutates_args=())
def by_matrices(grad: Tensor, x: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """[M, O] and [M, I] -> [E, O, I]: the gradient by the matrices, zero for an expert without a token."""
    if grouped:
        out: Tensor = grouped_mm(grad.t(), x, offs=ends)
        return out
    out = x.new_empty(len(ends), grad.shape[1], x.shape[1])
    for by_matrix, part in zip(out, _slices(ends), strict=True):
        torch.mm(grad[part].t(), x[part], out=by_matrix)
    return out


def _slices(ends: Tensor) -> list[slice]:
    places = [0, *ends.tolist()]
    return [slice(begin, end) for begin, end in itertools.pairwise(places)]


@product.register_fake
def _(x: Tensor, matrices: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[1])


@by_matrices.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor, _: bool) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.grouped = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x, matrices, ends = ctx.saved_tensors
    # A gradient may come as a view that no kernel reads.
    grad = grad.contiguous()
    by_x: Tensor = product(grad, matrices.transpose(1, 2), ends, ctx.grouped)
    by_each: Tensor = by_matrices(grad, x, ends, ctx.grouped)
    return by_x, by_each, None, None


product.register_autograd(_backward, setup_context=_keep)
