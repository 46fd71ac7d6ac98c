"""A Hugging Face directory of this model: what its config.json says, and the names of its tensors.

The decoder is Qwen3, or Qwen3-MoE with experts; the keys of its state dict are theirs already. Files hold one matrix
for each expert, as transformers publishes them; what holds all experts of a layer in one tensor is read too.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainyard.model.config import ModelConfig

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
FUSED_GATE_UP, FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)
"""Fields of `ModelConfig` that config.json has under the same name, whatever the architecture."""

DENSE = ("intermediate_size",)
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")

REQUIRED_ABSENT = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
}
"""What an entry that is not there means to transformers, where no shape of a tensor would tell the difference."""

PLAIN = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "rope_scaling": (None,),
}
"""Entries that this decoder has no setting for, and what each must be where it is there."""


class UnsupportedByHF(ValueError):
    """The model has no counterpart in transformers; the message says why."""


def config_json(model: ModelConfig, *, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """What config.json holds. Raises NotExpressible without norms on queries and keys, which Qwen3 always has."""
    if not model.qk_norm:
        raise UnsupportedByHF("qk_norm is off, and Qwen3 always has it: only the minimind format can hold this model")
    kind, moe = ("Qwen3Moe", EXPERTS) if model.use_moe else ("Qwen3", ())
    described = {name: getattr(model, name) for name in (*SHAPE_FIELDS, *DENSE, *moe)}
    if model.use_moe:
        described |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        described["router_aux_loss_coef"] = model.router_aux_loss_coef
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": "qwen3_moe" if model.use_moe else "qwen3",
        **described,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": model.dropout,
        "max_position_embeddings": model.max_position_embeddings,
        # Older releases read the first, newer ones the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def config_problems(described: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    """Every entry of a config.json that makes another function of the same tensors than ``model`` is.

    Sizes are compared too, though the tensors' shapes would tell: this says which setting to change.
    """
    kind = "qwen3_moe" if model.use_moe else "qwen3"
    if described.get("model_type") != kind:
        yield f"model_type is {described.get('model_type')!r} and must be {kind!r}"
    if not model.qk_norm:
        yield "qk_norm is off in the model group, and Qwen3 has it"
    # Newer releases give the number of experts another name.
    entries = {**described, "num_experts": described.get("num_experts", described.get("num_local_experts"))}
    for name in (*SHAPE_FIELDS, *(EXPERTS if model.use_moe else DENSE)):
        theirs, mine = entries.get(name, REQUIRED_ABSENT.get(name)), getattr(model, name)
        if theirs is not None and theirs != mine:
            yield f"{name} is {theirs} and the model group has {mine}"
    yield from _rope_problems(described, model)
    for name, allowed in PLAIN.items():
        if name in described and described[name] not in allowed:
            yield f"{name} is {described[name]!r}, which this decoder does not have"


def _rope_problems(described: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    rope = described.get("rope_parameters") or {}
    theta = rope.get("rope_theta", described.get("rope_theta", 10_000.0))
    if theta != model.rope_theta:
        yield f"rope_theta is {theta} and the model group has {model.rope_theta}"
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type is {rope['rope_type']!r}, which this decoder does not have"


def is_hf_directory(path: Path) -> bool:
    """Whether ``path`` holds weights as Hugging Face names them; a checkpoint of a run does as well."""
    return (path / WEIGHTS).is_file() or (path / INDEX).is_file()


def weight_files(directory: Path) -> list[Path]:
    """The files of its tensors. Raises OSError or ValueError where the index cannot be followed."""
    if not (directory / INDEX).is_file():
        return [directory / WEIGHTS]
    named = json.loads((directory / INDEX).read_bytes())
    names = set(named["weight_map"].values()) if isinstance(named, dict) and "weight_map" in named else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{INDEX} names no files of this directory")
    return [directory / name for name in sorted(names)]


def read_config(directory: Path) -> dict[str, Any] | None:
    """Its config.json, or None where it has none. Raises OSError or ValueError."""
    try:
        described = json.loads((directory / CONFIG).read_bytes())
    except FileNotFoundError:
        return None
    if not isinstance(described, dict):
        raise ValueError(f"{CONFIG} holds no JSON object")
    return described


def split_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with one matrix for each expert.

    ``gate_up_proj`` [E, 2 I, C] holds gate above up, ``down_proj`` is [E, C, I].
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        experts = name.removesuffix(FUSED_GATE_UP).removesuffix(FUSED_DOWN)
        if experts == name or tensor.ndim != 3:
            found[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            key = f"{experts}mlp.experts.{number}"
            if name.endswith(FUSED_DOWN):
                found[f"{key}.down_proj.weight"] = matrix
            else:
                found[f"{key}.gate_proj.weight"], found[f"{key}.up_proj.weight"] = matrix.chunk(2)
    return found
