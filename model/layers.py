"""The parts of a decoder block: norm, rotary positions, attention, feed-forward.

Legend: ``B`` rows, ``S`` positions, ``C`` hidden size, ``H`` query heads, ``K`` key-value heads, ``D`` head size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainyard.model.config import ModelConfig
from trainyard.model.kv_cache import LayerCache
from trainyard.model.varlen_attention import varlen_attention


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that matrix products of ``x`` run in: autocast's if it is enabled, else that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """A linear layer without bias. `model.decoder.Decoder` initialises its weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: torch's own initialisation would be overwritten, and costs start-up time."""


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in float32, returned in ``dtype`` or that of ``x``."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[..., size] -> [..., size]."""
        dtype, weight = dtype or x.dtype, self.weight.float()
        if x.is_cuda or torch.compiler.is_compiling():
            out: Tensor = F.rms_norm(x.float(), weight.shape, weight, self.eps).to(dtype)
            return out
        # On a CPU torch has no fused kernel for this and runs four; ours takes half the time and half the memory.
        rms_norm: Callable[..., Tensor] = RMSNormFunction.apply
        return rms_norm(x.float(), weight, self.eps, dtype)


class RMSNormFunction(torch.autograd.Function):
    """RMS norm with a gradient written by hand: it keeps only ``x`` and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """``x`` [..., size] and ``weight`` [size], both float32 -> [..., size] in ``dtype``."""
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """With n = x * scale: dx = scale * (g * weight - n * mean(g * weight * n)), dweight = sum(g * n)."""
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0].float(), x * scale
        product = grad * normed
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        weight_grad = product.flatten(0, -2).sum(dim=0)
        return torch.addcmul(grad * weight, normed, mean, value=-1).mul_(scale), weight_grad, None, None


class RotaryTables(NamedTuple):
    """Cosines and sines of the angles of each position: float32 [B or 1, S, 1, D / 2]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_dim: int, theta: float) -> "RotaryTables":
        """Compute the tables for ``positions`` [B or 1, S], once per forward pass: DDP would broadcast a buffer."""
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        angles = positions[..., None, None].float() * theta**-exponents
        return cls(angles.cos(), angles.sin())

    def rotate(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rotate [B, S, heads, D] in float32, and return it in ``dtype``.

        Element i of the first half of D pairs with element i of the second.
        """
        if x.is_cuda or torch.compiler.is_compiling():
            first, second = x.float().chunk(2, dim=-1)
            halves = first * self.cos - second * self.sin, second * self.cos + first * self.sin
            return torch.cat(halves, dim=-1).to(dtype)
        rotate: Callable[..., Tensor] = RotaryFunction.apply
        return rotate(x, self.cos, self.sin, dtype)


CACHED = 1 << 18
"""Elements of a chunk that several operators process in turn on a CPU: few enough to stay in the cache of a core."""


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Yield slices of ``rows`` rows of ``size`` elements, each of about `CACHED` elements."""
    step = max(1, CACHED // size)
    return (slice(start, start + step) for start in range(0, rows, step))


class RotaryFunction(torch.autograd.Function):
    """`RotaryTables.rotate` on a CPU, in chunks that stay in the cache; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, S, heads, D] -> the same in ``dtype``."""
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return rotate_chunks(x, cos, sin, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """[B, S, heads, D] -> the same in the dtype of ``x``."""
        cos, sin = ctx.saved_tensors
        return rotate_chunks(grads[0], cos, -sin, ctx.dtype), None, None, None


def rotate_chunks(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate [B, S, heads, D] by ``cos`` and ``sin`` [B or 1, S, 1, D / 2]; return it in ``dtype``."""
    B, S, heads, D = x.shape
    half, out = D // 2, x.new_empty(x.shape, dtype=dtype)
    cos, sin = cos.expand(B, -1, -1, -1), sin.expand(B, -1, -1, -1)
    for row in range(B):
        for chunk in chunks(S, heads * D):
            part, c, s = x[row, chunk].float(), cos[row, chunk], sin[row, chunk]
            first, second = part[..., :half], part[..., half:]
            torch.sub(first * c, second * s, out=out[row, chunk, :, :half])
            torch.add(second * c, first * s, out=out[row, chunk, :, half:])
    return out


class AttentionMask(NamedTuple):
    """Which keys a query sees. With ``offsets``, ``tensor`` and ``causal`` are not used.

    ``tensor`` [B or 1, 1, S, keys]: boolean, or added to the scores. ``causal``: only keys at or before the query.
    ``offsets`` [P + 1]: the same, and only of its own segment, see `model.varlen_attention`.
    """

    tensor: Tensor | None
    causal: bool
    offsets: Tensor | None = None


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, with ``qk_norm``, a norm on each query and key head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x: Tensor, rotary: RotaryTables, mask: AttentionMask, cache: LayerCache | None = None, cached: int = 0
    ) -> Tensor:
        """[B, S, C] -> [B, S, C]. Append S positions to ``cache``, if given, after the ``cached`` ones that it has."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        queries, keys = self.q_proj(x).view(per_head), self.k_proj(x).view(per_head)
        values = self.v_proj(x).view(per_head)
        if self.qk_norm:
            queries, keys = self.q_norm(queries, torch.float32), self.k_norm(keys, torch.float32)
        queries, keys = rotary.rotate(queries, values.dtype), rotary.rotate(keys, values.dtype)
        if mask.offsets is not None:
            attended = varlen_attention(queries, keys, values, mask.offsets)
        else:
            heads_first = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            attended = self._masked_attention(*heads_first, mask, cache, cached).transpose(1, 2)
        out: Tensor = self.o_proj(attended.flatten(2))
        return out

    def _masked_attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: AttentionMask,
        cache: LayerCache | None,
        cached: int,
    ) -> Tensor:
        """[B, H, S, D] and twice [B, K, S, D] -> [B, H, S, D]."""
        if cache is not None:
            keys, values = cache.append(cached, keys, values)
        if keys.is_cuda and mask.tensor is not None:
            # The only fast CUDA kernel with a mask has no grouped heads: without this, torch takes the slow path.
            groups = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask.tensor,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask.causal,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out
