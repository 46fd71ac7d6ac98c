"""The formulas of parameters, FLOPs and memory, compared with real models."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.shapes import random_ids, small_config, small_decoder
from trainyard.model.config import ModelConfig
from trainyard.model.costs import active_parameters, checkpoint_bytes, flops_per_token, memory_bytes, parameters
from trainyard.model.decoder import Decoder
from trainyard.model.grouped_gemm import ALIGNMENT

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"qk_norm": False, "num_key_value_heads": 4},
    {"use_moe": True},
    {"use_moe": True, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    {"head_dim": 12},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_parameters_are_those_of_the_module(changes: dict[str, Any]) -> None:
    assert parameters(small_config(**changes)) == sum(p.numel() for p in small_decoder(**changes).parameters())


def test_minimind_has_26_million_parameters() -> None:
    config = ModelConfig(vocab_size=6400)
    per_layer = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1664 + 2 * 512 + 2 * 64
    expected = 6400 * 512 + 8 * per_layer + 512
    assert parameters(config) == active_parameters(config) == expected


def test_active_parameters_count_the_chosen_experts() -> None:
    config = small_config(use_moe=True, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    assert parameters(config) - active_parameters(config) == 2 * 3 * (3 * 32 * 24)


def test_flops_are_six_a_weight_plus_attention() -> None:
    config = small_config()
    matrices = sum(p.numel() for n, p in small_decoder().named_parameters() if p.ndim == 2 and "embed" not in n)
    matrices += 97 * 32  # tied: the embedding matrix makes the logits
    assert flops_per_token(config, 0) == 6 * matrices
    assert flops_per_token(config, 100) - flops_per_token(config, 0) == 6 * 2 * 4 * 8 * 100


def test_flops_of_experts_do_not_grow_with_their_number() -> None:
    few, many = (small_config(use_moe=True, num_experts=n) for n in (4, 40))
    router = 6 * 2 * 32 * 36
    assert flops_per_token(many, 10) - flops_per_token(few, 10) == router


def counted(model: Decoder, ids: torch.Tensor) -> dict[str, float]:
    """Operations of a training pass by torch's own counter, a token: of matrix products, and of those in batches."""
    experts = {
        torch.ops.trainyard.grouped_mm: lambda x, matrices, *_, **__: 2 * x[0] * matrices[1] * matrices[2],
        torch.ops.trainyard.grouped_mm_weight_grad: lambda grad, x, *_, **__: 2 * x[0] * x[1] * grad[1],
    }
    with FlopCounterMode(display=False, custom_mapping=experts) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, labels=ids).loss_sum.backward()
    return {str(name): count / ids.numel() for name, count in counter.get_flop_counts()["Global"].items()}


def of_empty_slots(config: ModelConfig, tokens: int) -> float:
    """Operations per token for empty slots, of which each expert has `ALIGNMENT`."""
    if not config.use_moe:
        return 0.0
    assert config.moe_intermediate_size is not None
    matrices = config.num_hidden_layers * 3 * config.hidden_size * config.moe_intermediate_size
    return 6 * matrices * config.num_experts * ALIGNMENT / tokens


@pytest.mark.parametrize("changes", SHAPES)
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """All products exactly; of attention the half that the causal mask leaves, where the counter sees the whole."""
    config = small_config(**changes)
    found = counted(small_decoder(**changes), random_ids(2, 48))
    products = sum(count for name, count in found.items() if name.startswith(("aten.mm", "trainyard.grouped_mm")))
    assert products == flops_per_token(config, 0) + of_empty_slots(config, tokens=96)
    attention = flops_per_token(config, 48) - flops_per_token(config, 0)
    assert found["aten.bmm"] == pytest.approx(2 * attention, rel=0.05), "the auxiliary loss has a few more"


def test_flops_at_minimind_s_size_are_within_a_tenth_of_all_that_is_counted() -> None:
    config = ModelConfig(vocab_size=6400)
    model = Decoder(config, torch.Generator().manual_seed(1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = sum(counted(model, torch.zeros(2, 340, dtype=torch.long)).values())
    assert found == pytest.approx(flops_per_token(config, 340), rel=0.1)


def kept_for_backward(model: Decoder, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of all distinct storages that autograd keeps, without the parameters."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = random_ids(rows, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(ids, labels=ids)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del out
    return total


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("changes", SHAPES[:5])
def test_activations_are_what_autograd_keeps(changes: dict[str, Any], dtype: Any) -> None:
    config = small_config(**changes)
    expected = memory_bytes(config, batch_size=4, seq_len=64, dtype=dtype)
    copies = expected.weights - 4 * parameters(config)
    measured = kept_for_backward(small_decoder(**changes), 4, 64, getattr(torch, dtype))
    assert expected.activations + copies == pytest.approx(measured, rel=0.08)


def test_memory_of_weights_gradients_and_optimizer() -> None:
    config = small_config()
    memory = memory_bytes(config, batch_size=1, seq_len=8, dtype="float32")
    count = parameters(config)
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)
    assert checkpoint_bytes(config) == 12 * count
    assert memory.total == 16 * count + memory.activations


def test_costs_need_a_vocabulary_size() -> None:
    with pytest.raises(ValueError, match="vocab_size must be set"):
        parameters(ModelConfig())


def test_costs_does_not_import_torch() -> None:
    code = "import sys, trainyard.model.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
