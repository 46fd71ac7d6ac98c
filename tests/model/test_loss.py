"""Chunked cross-entropy against torch's own."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.shapes import number
from trainyard.model import loss as loss_module
from trainyard.model.loss import cross_entropy_sum


def inputs(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 16, generator=drawn).requires_grad_()
    weight = (torch.randn(50, 16, generator=drawn) * 0.5).requires_grad_()
    labels = torch.randint(0, 50, (tokens,), generator=drawn)
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_sum_and_gradients_are_those_of_the_whole(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 1)  # 64 rows a chunk
    hidden, weight, labels = inputs(tokens)
    ours = cross_entropy_sum(hidden, weight, labels)
    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(0.37 * ours, (hidden, weight)),
        torch.autograd.grad(0.37 * plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = inputs(10)
    total = cross_entropy_sum(hidden, weight, torch.full_like(labels, -100))
    assert number(total) == 0.0
    for grad in torch.autograd.grad(total, (hidden, weight)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_bfloat16_product_keeps_a_float32_loss() -> None:
    hidden, weight, labels = inputs(300)
    exact = cross_entropy_sum(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cross_entropy_sum(hidden, weight, labels)
    assert rounded.dtype == torch.float32
    assert number(rounded) == pytest.approx(number(exact), rel=2e-3)
    (grad,) = torch.autograd.grad(rounded, weight)
    (expected,) = torch.autograd.grad(exact, weight)
    assert grad.dtype == torch.float32
    assert number((grad - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.bfloat16, 1 / 10_713), (torch.bfloat16, 1 / 3), (torch.float16, 2**16 / 10_713), (torch.float16, 70_000.0)],
)
def test_the_factor_of_the_loss_is_not_rounded(dtype: torch.dtype, factor: float) -> None:
    grads = []
    for scale in (1.0, factor):
        hidden, weight, labels = inputs(300)
        with torch.autocast("cpu", dtype):
            total = cross_entropy_sum(hidden, weight * 2**-6, labels)
        grads.append(torch.autograd.grad(scale * total, (hidden, weight)))
    for plain, scaled in zip(*grads, strict=True):
        found = number((plain * scaled).sum() / (plain * plain).sum())  # least squares: single roundings average out
        assert found == pytest.approx(factor, rel=1e-4), "it reaches the head and the body alike"


def test_without_grad_nothing_is_kept() -> None:
    hidden, weight, labels = inputs(20)
    with torch.no_grad():
        total = cross_entropy_sum(hidden, weight, labels)
    assert not total.requires_grad
    assert number(total) == pytest.approx(number(cross_entropy_sum(hidden, weight, labels)), rel=1e-6)


def test_equal_logits_cost_ln_v() -> None:
    hidden, _, labels = inputs(9)
    total = cross_entropy_sum(hidden, torch.zeros(50, 16), labels)
    assert number(total) / int((labels != -100).sum()) == pytest.approx(math.log(50), rel=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 4), 1e3, requires_grad=True)
    weight = torch.tensor([[1e3] * 4, [-1e3] * 4], requires_grad=True)
    total = cross_entropy_sum(hidden, weight, torch.tensor([0, 1]))
    assert number(total) == pytest.approx(8e6)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(total, (hidden, weight)))


def test_a_nan_in_the_hidden_states_shows() -> None:
    hidden, weight, labels = inputs(6)
    broken = hidden.detach().clone()
    broken[1] = math.nan
    assert math.isnan(number(cross_entropy_sum(broken, weight, labels)))
