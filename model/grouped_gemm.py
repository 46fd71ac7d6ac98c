"""Matrix products of experts, each over its own slots (grouped GEMM), as operators that torch.compile can call.

They are custom operators, because the end of an expert's slots is data: a compiled graph calls each as one node.

Legend: ``M`` slots, ``E`` experts, ``I`` and ``O`` sizes of input and output.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 8
"""An expert's slots begin at a multiple of this: CUDA's grouped products read 16 bytes at a time."""

ROW_BYTES = 16
"""torch's grouped products take only rows of a multiple of this, on a CPU too."""


GROUPED_GENERATIONS = (9, 10)
"""Generations of CUDA cards with a kernel for grouped products: Hopper, and Blackwell cards of data centers.

On Blackwell cards for desktops (12) torch falls back to a loop, which waits for the device.
"""


def can_group(x: Tensor, inputs: int, outputs: int) -> bool:
    """Return whether grouped products of ``x`` [M, inputs], forward and backward, run without a device sync.

    Rows must have a multiple of 16 bytes. CUDA's kernel also needs bfloat16 and a card of `GROUPED_GENERATIONS`.
    """
    if any(size * x.element_size() % ROW_BYTES for size in (inputs, outputs)):
        return False
    if not x.is_cuda:
        return True
    # Read from the properties and not by get_device_capability: torch.compile treats the properties as constants.
    has_kernel = torch.cuda.get_device_properties(x.device).major in GROUPED_GENERATIONS
    return x.dtype is torch.bfloat16 and has_kernel


def grouped_mm(x: Tensor, matrices: Tensor, ends: Tensor, grouped: bool) -> Tensor:
    """[M, I] and [E, O, I] -> [M, O]: multiply each slot by the matrix of its expert.

    ``ends`` [E] int32: the end of each expert's slots. ``grouped``: use one kernel, which reads ``ends`` on the device
    of ``x``. If False, one product an expert; then ``ends`` should be on the CPU, because reading it waits for its
    device.
    """
    product: Callable[..., Tensor] = one_kernel_mm if grouped else loop_mm
    return product(x, matrices, ends)


@torch.library.custom_op("trainyard::grouped_mm", mutates_args=())
def one_kernel_mm(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` by one kernel."""
    out: Tensor = F.grouped_mm(x, matrices.transpose(1, 2), offs=ends)
    return out


@torch.library.custom_op("trainyard::grouped_mm_weight_grad", mutates_args=())
def one_kernel_weight_grad(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[M, O] and [M, I] -> [E, O, I]: the gradient of ``matrices`` in `grouped_mm`, 0 for an expert without tokens."""
    out: Tensor = F.grouped_mm(grad.t(), x, offs=ends)
    return out


# The host reads the sizes of the products. A CUDA graph would keep those of the batch that it was captured with, so the
# tag makes torch.compile call these operators between two CUDA graphs.
@torch.library.custom_op("trainyard::loop_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loop_mm(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` by one product an expert."""
    out = x.new_empty(len(x), matrices.shape[1])
    for matrix, slots in zip(matrices, _expert_slots(ends), strict=True):
        torch.mm(x[slots], matrix.t(), out=out[slots])
    return out


@torch.library.custom_op("trainyard::loop_mm_weight_grad", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def loop_weight_grad(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """`one_kernel_weight_grad` by one product an expert."""
    out = x.new_empty(len(ends), grad.shape[1], x.shape[1])
    for matrix_grad, slots in zip(out, _expert_slots(ends), strict=True):
        torch.mm(grad[slots].t(), x[slots], out=matrix_grad)
    return out


def _expert_slots(ends: Tensor) -> list[slice]:
    return [slice(begin, end) for begin, end in itertools.pairwise([0, *ends.tolist()])]


@one_kernel_mm.register_fake
@loop_mm.register_fake
def _(x: Tensor, matrices: Tensor, _: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], matrices.shape[1])


@one_kernel_weight_grad.register_fake
@loop_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(
    product: Callable[..., Tensor], weight_grad: Callable[..., Tensor], ctx: Any, grad: Tensor
) -> tuple[Tensor, Tensor, None]:
    x, matrices, ends = ctx.saved_tensors
    # The gradient may be an expanded view (of a sum, for example), which no kernel takes.
    grad = grad.contiguous()
    return product(grad, matrices.transpose(1, 2), ends), weight_grad(grad, x, ends), None


one_kernel_mm.register_autograd(partial(_backward, one_kernel_mm, one_kernel_weight_grad), setup_context=_setup_context)
loop_mm.register_autograd(partial(_backward, loop_mm, loop_weight_grad), setup_context=_setup_context)
