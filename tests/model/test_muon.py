"""Muon: orthogonal updates, which parameters get them, and a comparison with AdamW on real text."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.data.texts import docstrings
from tests.model.shapes import random_ids, small_decoder
from trainyard.model.decoder import Decoder
from trainyard.model.muon import UPDATE_RMS, Muon, NewtonSchulz, is_matrix, newton_schulz

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (8, 1)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    values = torch.linalg.svdvals(newton_schulz(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(newton_schulz(matrix).flatten(), (u @ vh).flatten(), dim=0) > 0.95
    assert torch.equal(newton_schulz(torch.zeros(4, 4)), torch.zeros(4, 4))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_a_stack_gives_the_result_of_each_matrix(device: str, shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(3)).to(device)
    # Each has its own norm: one far larger than the others does not reduce them.
    stack[1] *= 1e4
    single = torch.stack([newton_schulz(matrix) for matrix in stack])
    # The rounding of bfloat16 in five iterations; the values are up to 0.4.
    torch.testing.assert_close(newton_schulz(stack), single, atol=0.02, rtol=0.02)


def test_matrices_of_one_shape_are_updated_together_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(4, 6), (6, 4), (4, 6), (4, 6), (4, 6), (2, 2)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    order = {id(parameter): number for number, parameter in enumerate(parameters)}

    def batches(*, stacks: bool) -> list[list[int]]:
        return [[order[id(each)] for each in batch] for batch in NewtonSchulz(stacks=stacks).batches(parameters)]

    assert batches(stacks=False) == [[0], [1], [2], [3], [4], [5]]
    assert batches(stacks=True) == [[0, 2, 3, 4], [1], [5]]
    monkeypatch.setattr("trainyard.model.muon.MAX_STACKED", 50)
    assert batches(stacks=True) == [[0, 2], [3, 4], [1], [5]]


def test_a_run_that_stacks_learns_the_same() -> None:
    models, losses = [small_decoder() for _ in range(2)], []
    for model, stacks in zip(models, (False, True), strict=True):
        optimizer = muon(model, lr=0.02)
        optimizer.orthogonalizer.stacks = stacks
        ids = random_ids(2, 13)
        for _ in range(3):
            loss = model(ids[:, :-1], labels=ids[:, 1:].contiguous()).loss_sum
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-2)
    assert losses[2] < losses[0] - 0.1


def muon(model: Decoder, lr: float, weight_decay: float = 0.0) -> Muon:
    matrices = [parameter for name, parameter in model.named_parameters() if is_matrix(name)]
    others = [parameter for name, parameter in model.named_parameters() if not is_matrix(name)]
    return Muon(matrices, others, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


def test_the_matrices_of_layers_and_experts_are_chosen() -> None:
    model = small_decoder(use_moe=True, num_experts=3, tie_word_embeddings=False)
    names = {name for name, _ in model.named_parameters() if not is_matrix(name)}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"} <= names
    assert all("norm" in name for name in names - {"model.embed_tokens.weight", "lm_head.weight"} if "gate" not in name)
    assert len(list(model.parameters())) - len(names) == 2 * (4 + 3 * 3)


def test_an_update_is_as_large_as_adamws_and_decay_is_decoupled() -> None:
    weight = nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
    norm, before = nn.Parameter(torch.ones(5)), weight.detach().clone()
    optimizer = Muon([weight], [norm], lr=0.01, betas=(0.9, 0.999), weight_decay=0.5)
    weight.grad, norm.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(2)), torch.ones(5)
    optimizer.step()
    change = (weight.detach() - before * (1 - 0.01 * 0.5)) / 0.01
    assert 0.6 * UPDATE_RMS < float(change.square().mean().sqrt()) < 1.2 * UPDATE_RMS
    assert torch.allclose(norm.detach(), torch.full((5,), 1 - 0.01 * 0.5 - 0.01))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_updates_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    drawn = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=drawn)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Muon([ours], [nn.Parameter(torch.ones(1))], lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        grad = torch.randn(shape, generator=drawn)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()  # type: ignore[no-untyped-call]
    moved = (theirs - start).norm()
    # torch normalises the matrix in bfloat16 and we do in float32, so the two differ by rounding.
    assert (ours - theirs).norm() < 0.02 * moved


def test_found_inf_leaves_weights_and_state_as_they_are() -> None:
    weight, norm = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(5))
    optimizer = Muon([weight], [norm], lr=0.01, betas=(0.9, 0.999), weight_decay=0.5)
    weight.grad, norm.grad = torch.full((4, 6), torch.inf), torch.full((5,), torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 6))
    assert torch.equal(norm.detach(), torch.ones(5))
    assert torch.equal(optimizer.state[weight]["momentum"], torch.zeros(4, 6))


def test_cautious_decay_only_goes_where_the_update_goes() -> None:
    drawn = torch.Generator().manual_seed(1)
    start, grad = torch.randn(24, 40, generator=drawn), torch.randn(24, 40, generator=drawn)

    def updated(**options: Any) -> torch.Tensor:
        weight = nn.Parameter(start.clone())
        optimizer = Muon([weight], [nn.Parameter(torch.ones(1))], lr=0.01, betas=(0.9, 0.999), **options)
        weight.grad = grad.clone()
        optimizer.step()
        return weight.detach()

    plain = updated(weight_decay=0.0)
    step = plain - start
    expected = plain - 0.01 * 0.5 * start * (step * start < 0)
    assert 0.4 < float((step * start < 0).float().mean()) < 0.6
    torch.testing.assert_close(updated(weight_decay=0.5, cautious=True), expected)
    torch.testing.assert_close(updated(weight_decay=0.5), plain - 0.01 * 0.5 * start)


def rows_of_text(count: int) -> torch.Tensor:
    data = "\n".join(docstrings()).encode()[: count * 8 * 49]
    return torch.tensor(list(data)).clamp(max=127).view(count, 8, 49)


def last_loss(optimizer: torch.optim.Optimizer, model: Decoder, rows: torch.Tensor, rate: float) -> float:
    """Mean of the last 20 steps."""
    found = []
    for number, batch in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - number / len(rows))
        loss = model(batch[:, :-1], labels=batch[:, 1:].contiguous()).loss_sum / batch[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return sum(found[-20:]) / 20


@pytest.mark.long
def test_its_loss_on_docstrings_is_lower_than_adamws() -> None:
    """Each at the better of two rates, after equally many steps."""
    rows, adamw, ours = rows_of_text(150), [], []
    for rate in (5e-3, 1e-2):
        models = [small_decoder(vocab_size=128, hidden_size=64) for _ in range(2)]
        plain = torch.optim.AdamW(models[0].parameters(), betas=(0.9, 0.999), weight_decay=0.0)
        adamw.append(last_loss(plain, models[0], rows, rate))
        ours.append(last_loss(muon(models[1], 1.0), models[1], rows, rate))
    print(f"mean loss of steps 131 to 150: adamw {adamw}, muon {ours}")
    assert min(ours) < min(adamw) - 0.05
