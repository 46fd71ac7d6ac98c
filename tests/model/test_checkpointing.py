"""Gradient checkpointing: the same gradients, bit for bit, and the planned memory."""

from typing import Any

import pytest
import torch

from tests.live_memory import LiveMemory
from tests.model.shapes import number, random_ids, small_config, small_decoder, train_on
from trainyard.model import costs
from trainyard.model.decoder import Decoder

EXPERTS: dict[str, Any] = {"use_moe": True, "num_experts": 4, "moe_intermediate_size": 24}


def same_gradients(plain: Decoder, recomputing: Decoder, autocast: bool = False, **inputs: Any) -> None:
    results = []
    for model in (plain, recomputing):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(train_on(model, **inputs))
    (loss, aux, expected), (other_loss, other_aux, found) = results
    assert (loss, aux) == (other_loss, other_aux)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "moe"])
def test_gradients_are_equal_to_the_bit(changes: dict[str, Any], dropout: float, packed: bool) -> None:
    plain, recomputing = (small_decoder(dropout=dropout, **changes) for _ in range(2))
    recomputing.recompute_layers()
    ids = random_ids(3, 16)
    segments = torch.tensor([[1] * 7 + [2] * 6 + [0] * 3] * 3) if packed else None
    labels = ids if segments is None else ids.masked_fill(segments == 0, -100)
    same_gradients(plain, recomputing, input_ids=ids, labels=labels, segment_ids=segments)


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "moe"])
def test_gradients_are_equal_under_autocast(changes: dict[str, Any]) -> None:
    plain, recomputing = (small_decoder(**changes) for _ in range(2))
    recomputing.recompute_layers()
    ids = random_ids(3, 16)
    same_gradients(plain, recomputing, autocast=True, input_ids=ids, labels=ids)


def test_the_router_is_counted_once() -> None:
    plain, recomputing = (small_decoder(**EXPERTS) for _ in range(2))
    recomputing.recompute_layers()
    ids = random_ids(3, 16)
    outputs = [model(ids, labels=ids) for model in (plain, recomputing)]
    counts = [output.expert_counts.clone() for output in outputs]
    for output in outputs:
        (output.loss_sum + output.aux_sum).backward()
    assert counts[0].sum() == 2 * 3 * 16 * 2
    assert torch.equal(outputs[1].expert_counts, counts[0])
    assert number(outputs[0].aux_sum) == number(outputs[1].aux_sum)


def test_without_gradients_nothing_is_recomputed() -> None:
    model, calls = small_decoder(), []
    model.recompute_layers()
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.register_forward_hook(lambda *_: calls.append(1))
    ids = random_ids(1, 4)
    with torch.no_grad():
        model(ids, labels=ids)
    assert len(calls) == 1
    model(ids, labels=ids).loss_sum.backward()
    assert len(calls) == 3
    assert model.generate(ids, max_new_tokens=2).shape == (1, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "moe"])
def test_the_saving_is_the_planned_one(changes: dict[str, Any], dtype: Any) -> None:
    """Every storage is counted, so that what is computed again counts as well."""
    shape = {**changes, "hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 64}
    config, rows, length = small_config(**shape), 8, 128
    peaks, planned = [], []
    for recomputes in (False, True):
        model = small_decoder(**shape)
        model.recompute_layers(recomputes)
        ids = random_ids(rows, length, vocab_size=64)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with LiveMemory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=not recomputes):
                loss = model(ids, labels=ids).loss_sum
            loss.backward()
        peaks.append(memory.peak)
        estimate = costs.memory_bytes(
            config, batch_size=rows, seq_len=length, dtype=dtype, gradient_checkpointing=recomputes
        )
        planned.append(estimate.activations + estimate.weights)
    assert peaks[0] - peaks[1] == pytest.approx(planned[0] - planned[1], rel=0.1)
    assert planned[0] - planned[1] > 0.5 * peaks[0]
