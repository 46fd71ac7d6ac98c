"""Causal attention in packed rows, where each token sees only the tokens of its own segment, at or before it.

With a mask over whole rows, a kernel also computes the scores that the mask discards. With the segments' offsets,
CUDA's flash attention for variable lengths skips them, and so does `model.cpu_attention`. `use_flash` returns whether
one of them can be used. If not, `model.decoder` passes a block-diagonal mask to
`torch.nn.functional.scaled_dot_product_attention`.

Legend: ``B`` rows, ``S`` positions, ``T`` = B * S tokens, ``H`` query heads, ``K`` key-value heads, ``D`` head size,
``P`` segments.
"""

from typing import Any

import torch
from torch import Tensor

from trainyard.model import cpu_attention


def varlen_attention(queries: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    """Return causal attention within segments: [B, S, H, D] in the dtype of ``queries``.

    ``queries`` [B, S, H, D], ``keys`` and ``values`` [B, S, K, D], all of one dtype. ``offsets`` [P + 1] int32: the
    start of each segment among all T tokens, then T. Segments may be empty (equal neighbours): they pad ``offsets`` to
    a fixed size, so that one compiled graph fits every batch.
    """
    q, k, v = (part.flatten(0, 1) for part in (queries, keys, values))
    if not queries.is_cuda:
        attended: Tensor = cpu_attention.cpu_varlen_attention(q, k, v, offsets)[0]
        return attended.view_as(queries)

    from torch.nn.attention.varlen import varlen_attn

    # A segment is never longer than its row, and the true maximum would have to be read from the device.
    max_len = queries.shape[1]
    # A window without a limit to the left and with nothing to the right is causal attention.
    out: Any = varlen_attn(q, k, v, offsets, offsets, max_len, max_len, window_size=(-1, 0), enable_gqa=True)
    attended = out
    return attended.view_as(queries)


def use_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `varlen_attention` runs on ``device``. If not, a mask over whole rows gives the same result."""
    if device.type != "cuda":
        return device.type == "cpu" and cpu_attention.AVAILABLE
    # Read from the properties and not by get_device_capability: torch.compile treats the properties as constants.
    generation = torch.cuda.get_device_properties(device).major
    return flash_supports(generation, dtype, head_dim)


def flash_supports(generation: int, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether CUDA's variable-length flash kernel supports these inputs.

    It needs half precision, an Ampere (``generation`` 8) or later card, and heads of a multiple of 8 numbers, at most
    256.
    """
    return generation >= 8 and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
