"""Settings of torch for the device of this process, before the model is built."""

import contextlib
from typing import Any

import torch
import torch.nn.attention
from torch.nn import functional as F

from trainyard.contract.spec import JobSpec
from trainyard.model.varlen_attention import varlen_attention

FLASH_BY_GENERATION = {9: ("FA3", "FA4"), 10: ("FA4",)}
"""Generation of a card -> the implementations of flash attention for it, the preferred one first."""

TOLERANCE = 2e-2
"""Relative difference between bfloat16 attention and that of the mask in float32."""


def set_up_device(spec: JobSpec, device: torch.device) -> None:
    """Choose kernels for the run ``spec`` on ``device``."""
    if spec.training.is_deterministic:
        # The compiler then also chooses no kernel with sums by its speed. Another process, for example that of a
        # resume, could measure other times and keep another order of the sums.
        torch.use_deterministic_algorithms(True)
    if device.type != "cuda":
        return
    if spec.training.dtype == "float32" and spec.training.allow_tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    # With dropout, attention in rows of one segment uses torch's own flash kernel. A newer one takes its place there
    # too, and raises an error for dropout.
    if spec.training.dtype != "float32" and not spec.training.is_deterministic and spec.model.dropout == 0:
        assert spec.model.head_dim is not None
        chosen = activate_flash_attention(device, spec.model.head_dim)
        if chosen is not None:
            print(f"flash attention: {chosen}", flush=True)


def activate_flash_attention(device: torch.device, head_dim: int) -> str | None:
    """Use a newer flash attention than torch's own if it is installed and works here. Return its name, or None.

    Its backward pass sums in no fixed order, so a deterministic run keeps torch's own.
    """
    attention: Any = torch.nn.attention
    known = attention.list_flash_attention_impls()
    for name in FLASH_BY_GENERATION.get(torch.cuda.get_device_properties(device).major, ()):
        if name not in known:
            continue
        try:
            attention.activate_flash_attention_impl(name)
        except (ImportError, RuntimeError, ValueError):
            continue  # its package is not installed
        if computes_attention(device, head_dim):
            return name
        attention.restore_flash_attention_impl()
    return None


def computes_attention(device: torch.device, head_dim: int) -> bool:
    """Return whether attention in a row of two segments has the values and gradients of a mask in float32."""
    generator = torch.Generator(device).manual_seed(1)
    length, heads, half = 128, 4, 48
    shapes = [(1, length, count, head_dim) for count in (heads, heads // 2, heads // 2)]
    exact = [torch.randn(shape, generator=generator, device=device, requires_grad=True) for shape in shapes]
    # Empty segments at the end, as each batch has.
    offsets = torch.tensor([0, half, length, length, length], dtype=torch.int32, device=device)
    number = (torch.arange(length, device=device) >= half).int()
    mask = (number[:, None] == number[None, :]).tril()
    queries, keys, values = (tensor.transpose(1, 2) for tensor in exact)
    expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    with contextlib.suppress(RuntimeError, TypeError, ValueError, NotImplementedError):
        q, k, v = (tensor.bfloat16() for tensor in exact)
        found = varlen_attention(q, k, v, offsets).float()
        seed = torch.randn(expected.shape, generator=generator, device=device)
        pairs = [
            (expected, found),
            *zip(torch.autograd.grad(expected, exact, seed), torch.autograd.grad(found, exact, seed), strict=True),
        ]
        return all(float((a - b).detach().norm() / a.detach().norm()) < TOLERANCE for a, b in pairs)
    return False
