"""Experts against a plain loop over tokens, and the load-balancing loss."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.shapes import number, random_ids, small_config, small_decoder, train_on
from trainyard.model import moe
from trainyard.model.grouped_gemm import loop_mm, one_kernel_mm
from trainyard.model.moe import MoE, Segments, auxiliary_sum, stack_weights


def experts(**changes: Any) -> MoE:
    layer = MoE(small_config(**{"use_moe": True, "moe_intermediate_size": 24, **changes}))
    drawn = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=drawn) * 0.3
    return layer


def hidden(seed: int = 3, rows: int = 2, length: int = 7) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(seed))


def plain(layer: MoE, x: Tensor) -> Tensor:
    """Token by token, through its chosen experts one after another."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            shares = (layer.gate.weight @ x[b, s]).softmax(0)
            chosen = sorted(range(len(shares)), key=lambda e: -number(shares[e]))[: layer.per_token]
            total = sum(number(shares[e]) for e in chosen) if layer.norm_topk_prob else 1.0
            for e in chosen:
                out[b, s] += shares[e] / total * layer.experts[e](x[b, s])
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts": 6, "num_experts_per_tok": 3},
        {"num_experts": 5, "num_experts_per_tok": 5},
        {"norm_topk_prob": False},
        {"num_experts": 1, "num_experts_per_tok": 1},
    ],
)
def test_output_is_the_weighted_sum_of_the_chosen_experts(changes: dict[str, Any]) -> None:
    layer, x = experts(**changes), hidden()
    with torch.no_grad():
        out, _ = layer(x, None)
        torch.testing.assert_close(out, plain(layer, x), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_plain_loop() -> None:
    layer = experts()
    ours, theirs = hidden().requires_grad_(), hidden().requires_grad_()
    out: Tensor = layer(ours, None)[0]
    torch.autograd.backward(out.square().sum())
    mine = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    # The plain loop divides by a number, so the renormalisation is written out for its gradient.
    out = torch.zeros(2, 7, 32)
    for b in range(2):
        for s in range(7):
            shares = (layer.gate.weight @ theirs[b, s]).softmax(0)
            top, chosen = shares.topk(2)
            terms = [w * layer.experts[e](theirs[b, s]) for w, e in zip(top / top.sum(), chosen.tolist(), strict=True)]
            out[b, s] = torch.stack(terms).sum(0)
    torch.autograd.backward(out.square().sum())
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_weights_have_the_bits_of_a_stack_of_casts(dtype: torch.dtype) -> None:
    drawn = torch.Generator().manual_seed(5)
    weights = [torch.randn(6, 4, generator=drawn, requires_grad=True) for _ in range(3)]
    grad = torch.randn(3, 6, 4, generator=drawn).to(dtype)
    ours = stack_weights(weights, dtype)
    plain = torch.stack([weight.to(dtype) for weight in weights])
    assert ours.dtype is dtype
    assert torch.equal(ours, plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, weights, grad), torch.autograd.grad(plain, weights, grad), strict=True
    ):
        assert mine.dtype is torch.float32
        assert torch.equal(mine, theirs)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    layer = experts(num_experts=8)
    with torch.no_grad():
        layer.gate.weight[5:] = 0.0
        layer.gate.weight[:5] *= 100
    x = hidden(rows=1, length=2)
    layer(x, None)[0].sum().backward()
    unused = [
        e for e in range(8) if not any(p.grad is not None and p.grad.any() for p in layer.experts[e].parameters())
    ]
    assert len(unused) >= 4
    assert all(p.grad is not None for p in layer.parameters())


def test_router_learns_from_the_language_loss() -> None:
    """With renormalised weights of two experts; and of one expert where they are not renormalised."""
    for changes in ({}, {"num_experts_per_tok": 1, "norm_topk_prob": False}):
        layer = experts(**changes)
        layer(hidden(), None)[0].square().sum().backward()
        assert layer.gate.weight.grad is not None
        assert number(layer.gate.weight.grad.abs().max()) > 1e-4


def segments_of(labels: list[list[int]], segments: list[list[int]] | None = None) -> Segments:
    return Segments.of(torch.tensor(labels), None if segments is None else torch.tensor(segments))


def test_auxiliary_sum_by_hand() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6]])
    chosen = torch.tensor([[0], [0], [2], [2]])
    # One row of three predicting tokens: shares of the choices 2/3, 0, 1/3; times E = 3: 2, 0, 1.
    # Mean scores over the three: 1.3/3, 0.9/3, 0.8/3. Weighted by three tokens: 2 * 1.3 + 1 * 0.8.
    total = auxiliary_sum(scores, chosen, segments_of([[1, 1, 1, -100]]))
    assert number(total) == pytest.approx(2 * 1.3 + 0.8)


def test_auxiliary_sum_is_one_a_token_in_balance_and_most_when_one_expert_takes_all() -> None:
    even = torch.full((4, 4), 0.25)
    labels = segments_of([[1, 1, 1, 1]])
    assert number(auxiliary_sum(even, torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]]), labels)) == pytest.approx(4.0)
    all_to_first = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    assert number(auxiliary_sum(all_to_first, torch.tensor([[0]] * 4), labels)) == pytest.approx(4 * 4.0)


def test_each_segment_is_balanced_on_its_own() -> None:
    drawn = torch.Generator().manual_seed(4)
    scores = torch.rand(6, 3, generator=drawn).softmax(-1)
    chosen = scores.topk(2).indices
    together = auxiliary_sum(scores, chosen, segments_of([[1, 1, -100, 1, -100, -100]], [[1, 1, 1, 2, 2, 0]]))
    first = auxiliary_sum(scores[:3], chosen[:3], segments_of([[1, 1, -100]]))
    second = auxiliary_sum(scores[3:5], chosen[3:5], segments_of([[1, -100]]))
    assert number(together) == pytest.approx(number(first + second), rel=1e-6)


def test_router_is_float32_under_autocast() -> None:
    layer, x = experts(), hidden()
    with torch.no_grad():
        exact = layer._router_scores(x.flatten(0, 1))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer._router_scores(x.flatten(0, 1)), exact, rtol=0, atol=0)


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host wait for a device: numbers that are read, and shapes that depend on numbers."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")

    count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split(".")[0] in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number_of_experts", [2, 16])
@pytest.mark.parametrize("grouped", [True, False])
def test_the_host_waits_for_the_device_once_without_grouped_products_and_never_with_them(
    number_of_experts: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = experts(num_experts=number_of_experts), hidden().requires_grad_()
    fetched: list[Tensor] = []
    listed: list[Tensor] = []

    def cpu(tensor: Tensor) -> Tensor:
        fetched.append(tensor.clone())
        return fetched[-1]

    def tolist(tensor: Tensor, whole: Any = torch.Tensor.tolist) -> Any:
        listed.append(tensor)
        return whole(tensor)

    monkeypatch.setattr(moe, "can_group", lambda *_: grouped)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with Syncs() as syncs:  # type: ignore[no-untyped-call]
        layer(x, None)[0].sum().backward()
    assert [tuple(tensor.shape) for tensor in fetched] == ([] if grouped else [(number_of_experts,)])
    assert {tensor.data_ptr() for tensor in listed} == {tensor.data_ptr() for tensor in fetched}
    assert syncs.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_slices_equal_grouped_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = experts(num_experts=6), hidden()
    found = []
    for grouped in (True, False):
        monkeypatch.setattr(moe, "can_group", lambda *_, grouped=grouped: grouped)
        layer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            out: Tensor = layer(x.to(dtype), None)[0]
        torch.autograd.backward(out.float().square().sum())
        found.append([out, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + len(list(layer.parameters()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "size"), [(32, 7), (32, 12), (30, 10), (30, 24)])
def test_experts_may_have_any_size(width: int, size: int, dtype: torch.dtype) -> None:
    """torch's grouped products need rows of a multiple of 16 bytes, on a CPU too."""
    layer = experts(hidden_size=width, head_dim=8, moe_intermediate_size=size)
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        out: Tensor = layer(x.to(dtype), None)[0]
    torch.autograd.backward(out.float().square().sum())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    if dtype is torch.float32:
        torch.testing.assert_close(out, plain(layer, x), rtol=1e-4, atol=1e-5)


def test_the_product_passes_torchs_own_checks_of_operators() -> None:
    drawn = torch.Generator().manual_seed(1)
    x, matrices = (torch.randn(shape, generator=drawn).requires_grad_() for shape in ((24, 8), (3, 16, 8)))
    for operator in (one_kernel_mm, loop_mm):
        torch.library.opcheck(operator, (x, matrices, torch.tensor([8, 8, 24], dtype=torch.int32)))


class OperatorsWithoutCudaGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects which of the operators of experts were called, and whether torch.compile leaves each out of graphs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "trainyard":
            self.found[func.name()] = torch.Tag.cudagraph_unsafe in func.tags
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grouped", [True, False])
def test_products_whose_sizes_the_host_reads_are_not_part_of_a_cuda_graph(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "can_group", lambda *_: grouped)
    with OperatorsWithoutCudaGraph() as operators:
        experts()(hidden().requires_grad_(), None)[0].sum().backward()
    assert len(operators.found) == 2, "forward and backward"
    assert set(operators.found.values()) == {not grouped}


def test_same_weights_same_bits() -> None:
    model = small_decoder(use_moe=True)
    ids = random_ids(3, 20)
    first, second = (train_on(model, input_ids=ids, labels=ids) for _ in range(2))
    assert first[:2] == second[:2]
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
