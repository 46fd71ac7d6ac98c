"""Small decoders and inputs, from fixed seeds."""

from typing import Any

import torch
from torch import Tensor

from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, **changes})


def small_decoder(seed: int = 0, **changes: Any) -> Decoder:
    return Decoder(small_config(**changes), torch.Generator().manual_seed(seed))


def random_ids(rows: int, length: int, seed: int = 1, vocab_size: int = 97) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, _ in model.named_parameters()}, "a parameter took no part"
    return {name: grad.clone() for name, grad in found.items()}


def number(tensor: Tensor) -> float:
    return float(tensor.detach())


def train_on(model: Decoder, **inputs: Any) -> tuple[float, float, dict[str, Tensor]]:
    """(sum of losses, auxiliary sum, gradients of the first plus a hundredth of the second)."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    assert out.loss_sum is not None
    (out.loss_sum + 0.01 * out.aux_sum).backward()
    return number(out.loss_sum), number(out.aux_sum), gradients(model)
