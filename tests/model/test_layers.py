"""Each part against a plain reading of its formula."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.model.shapes import number, small_config
from trainyard.model.layers import (
    Attention,
    AttentionMask,
    FeedForward,
    RMSNorm,
    RMSNormFunction,
    RotaryTables,
    compute_dtype,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=1e-6)
    norm.weight.data = drawn(6, seed=1)
    x = drawn(3, 5, 6)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_eps_keeps_zero_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    out = RMSNorm(4, eps=1e-6)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_gradient_of_the_norm_agrees_with_finite_differences() -> None:
    x = drawn(2, 3, 5).double().requires_grad_()
    weight = drawn(5, seed=1).double().requires_grad_()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        out: Tensor = x / (length.square() / 5 + 1e-6).sqrt() * weight
        return out

    rms_norm: Callable[..., Tensor] = RMSNormFunction.apply
    ours = torch.autograd.grad(rms_norm(x.float(), weight.float(), 1e-6, torch.float32).square().sum(), (x, weight))
    plain = torch.autograd.grad(normed(x, weight).square().sum(), (x, weight))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = (drawn(4, 64) * 100).bfloat16()
    norm = RMSNorm(64, eps=1e-6)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x, torch.float32), norm(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("cached", [1 << 18, 100])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_in_chunks_has_the_bits_of_whole_tensors(
    dtype: torch.dtype, rows: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainyard.model.layers.CACHED", cached)
    tables = RotaryTables.at(torch.arange(14).view(2, 7)[:rows], 8, 100.0)
    x, grad = drawn(2, 7, 3, 8).to(dtype).requires_grad_(), drawn(2, 7, 3, 8, seed=2).bfloat16()
    ours = tables.rotate(x, torch.bfloat16)
    first, second = x.float().chunk(2, dim=-1)
    halves = first * tables.cos - second * tables.sin, second * tables.cos + first * tables.sin
    plain = torch.cat(halves, dim=-1).bfloat16()
    assert torch.equal(ours, plain)
    assert torch.equal(torch.autograd.grad(ours, x, grad)[0], torch.autograd.grad(plain, x, grad)[0])


def test_rotary_turns_pairs_of_halves() -> None:
    D, theta = 8, 100.0
    positions = torch.tensor([[0, 1, 7]])
    x = drawn(1, 3, 2, D)
    out = RotaryTables.at(positions, D, theta).rotate(x, torch.float32)
    for s, position in enumerate(positions[0].tolist()):
        for i in range(D // 2):
            angle = position * theta ** (-2 * i / D)
            first, second = x[0, s, :, i], x[0, s, :, i + D // 2]
            torch.testing.assert_close(out[0, s, :, i], first * math.cos(angle) - second * math.sin(angle))
            torch.testing.assert_close(out[0, s, :, i + D // 2], second * math.cos(angle) + first * math.sin(angle))


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = drawn(1, 1, 1, 16), drawn(1, 1, 1, 16, seed=1)

    def product(at_query: int, at_key: int) -> float:
        tables = [RotaryTables.at(torch.tensor([[position]]), 16, 1e4) for position in (at_query, at_key)]
        turned = [table.rotate(x, torch.float32) for table, x in zip(tables, (q, k), strict=True)]
        return number((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def plain_attention(layer: Attention, x: Tensor, positions: Tensor, qk_norm: bool) -> Tensor:
    """Head by head and query by query."""
    B, S, _ = x.shape
    heads, groups, D = 4, 2, layer.head_dim
    rotary = RotaryTables.at(positions, D, 1e6)
    q, k, v = (p(x).view(B, S, -1, D) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if qk_norm:
        q, k = layer.q_norm(q), layer.k_norm(k)
    q, k = rotary.rotate(q, torch.float32), rotary.rotate(k, torch.float32)
    out = torch.zeros(B, S, heads, D)
    for b in range(B):
        for h in range(heads):
            for s in range(S):
                scores = torch.stack([q[b, s, h] @ k[b, t, h // groups] for t in range(s + 1)]) / math.sqrt(D)
                shares = scores.softmax(0)
                out[b, s, h] = sum(shares[t] * v[b, t, h // groups] for t in range(s + 1))
    mixed: Tensor = layer.o_proj(out.reshape(B, S, -1))
    return mixed


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_is_its_formula(qk_norm: bool) -> None:
    layer = Attention(small_config(qk_norm=qk_norm))
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed) * 0.3
    x, positions = drawn(2, 5, 32, seed=9), torch.arange(5)[None]
    with torch.no_grad():
        out = layer(x, RotaryTables.at(positions, layer.head_dim, 1e6), AttentionMask(None, causal=True))
        torch.testing.assert_close(out, plain_attention(layer, x, positions, qk_norm), rtol=1e-4, atol=1e-5)


def test_feed_forward_is_swiglu() -> None:
    layer = FeedForward(8, 12)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = drawn(*parameter.shape, seed=seed)
    x = drawn(3, 8, seed=5)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.down_proj.weight.T)


def test_compute_dtype_follows_autocast() -> None:
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert compute_dtype(x) == torch.float32
