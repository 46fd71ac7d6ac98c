"""Hugging Face directories of this model: their config.json, and the files and names of their tensors.

The decoder is Qwen3, or Qwen3-MoE with experts, and its state dict has their keys already. Files are written with one
matrix per expert, as transformers publishes them; files with all experts of a layer in one tensor can be read too.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainyard.contract.allowed_paths import open_regular_inside
from trainyard.model.config import ModelConfig

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
FUSED_GATE_UP, FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

MAX_JSON_BYTES = 16 << 20

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
"""Fields of `ModelConfig` that config.json has under the same name, dense or MoE."""

DENSE_FIELDS = ("intermediate_size",)
MOE_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "norm_topk_prob": False}
"""Defaults of transformers for entries whose value no tensor shape shows."""

REQUIRED_VALUES = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "rope_scaling": (None,),
}
"""Entries that this decoder has no setting for: the values that it supports, if the entry exists."""


class UnsupportedByHF(ValueError):
    """The model has no class in transformers. The message says why."""


def config_json(model: ModelConfig, *, bos_id: int, eos_id: int, pad_id: int) -> dict[str, Any]:
    """Return the content of config.json. Raises UnsupportedByHF without qk_norm, which Qwen3 always has."""
    if not model.qk_norm:
        raise UnsupportedByHF("qk_norm is off, and Qwen3 always has it: only the minimind format can hold this model")
    kind, moe = ("Qwen3Moe", MOE_FIELDS) if model.use_moe else ("Qwen3", ())
    fields = {name: getattr(model, name) for name in (*SHAPE_FIELDS, *DENSE_FIELDS, *moe)}
    if model.use_moe:
        fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        fields["router_aux_loss_coef"] = model.router_aux_loss_coef
    return {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": "qwen3_moe" if model.use_moe else "qwen3",
        **fields,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": model.dropout,
        "max_position_embeddings": model.max_position_embeddings,
        # Older releases of transformers read the first entry, newer ones the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "use_sliding_window": False,
        "use_cache": True,
        "dtype": "float32",
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


def config_problems(config: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    """Yield each entry of a config.json with which the same tensors would compute something else than ``model`` does.

    Sizes are compared too. The tensor shapes would show them, but this says which setting to change.
    """
    kind = "qwen3_moe" if model.use_moe else "qwen3"
    if config.get("model_type") != kind:
        yield f"model_type is {config.get('model_type')!r} and must be {kind!r}"
    if not model.qk_norm:
        yield "qk_norm is off in the model group, and Qwen3 has it"
    # Newer releases call the number of experts num_local_experts.
    entries = {**config, "num_experts": config.get("num_experts", config.get("num_local_experts"))}
    for name in (*SHAPE_FIELDS, *(MOE_FIELDS if model.use_moe else DENSE_FIELDS)):
        value, own = entries.get(name, DEFAULTS.get(name)), getattr(model, name)
        if value is not None and value != own:
            yield f"{name} is {value} and the model group has {own}"
    yield from _rope_problems(config, model)
    for name, allowed in REQUIRED_VALUES.items():
        if name in config and config[name] not in allowed:
            yield f"{name} is {config[name]!r}, which this decoder does not have"


def _rope_problems(config: Mapping[str, Any], model: ModelConfig) -> Iterator[str]:
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if theta != model.rope_theta:
        yield f"rope_theta is {theta} and the model group has {model.rope_theta}"
    if rope.get("rope_type", "default") != "default":
        yield f"rope_type is {rope['rope_type']!r}, which this decoder does not have"


def is_hf_directory(path: Path) -> bool:
    """Return whether ``path`` holds weights under Hugging Face's file names. A checkpoint of a run does too."""
    return (path / WEIGHTS).is_file() or (path / INDEX).is_file()


def weight_files(directory: Path, roots: Sequence[Path] = ()) -> list[Path]:
    """Return the files with the tensors of a directory. Raises OSError or ValueError if its index is invalid."""
    if not (directory / INDEX).is_file():
        return [directory / WEIGHTS]
    index = _read_json(directory / INDEX, roots)
    names = set(index["weight_map"].values()) if isinstance(index, dict) and "weight_map" in index else set()
    # A name with a folder in it could lead out of the directory.
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{INDEX} names no files of this directory")
    return [directory / name for name in sorted(names)]


def read_config(directory: Path, roots: Sequence[Path] = ()) -> dict[str, Any] | None:
    """Return config.json, or None if there is none. Raises OSError or ValueError."""
    try:
        config = _read_json(directory / CONFIG, roots)
    except FileNotFoundError:
        return None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds no JSON object")
    return config


def _read_json(path: Path, roots: Sequence[Path]) -> Any:
    with open_regular_inside(path, roots) as file:
        if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES >> 20} MiB")
        return json.loads(file.readall())


def split_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same tensors with one matrix per expert.

    Shapes of fused tensors: ``gate_up_proj`` [E, 2 I, C] with gate above up, ``down_proj`` [E, C, I].
    """
    split: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(FUSED_GATE_UP).removesuffix(FUSED_DOWN)
        if layer == name or tensor.ndim != 3:
            split[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            key = f"{layer}mlp.experts.{number}"
            if name.endswith(FUSED_DOWN):
                split[f"{key}.down_proj.weight"] = matrix
            else:
                split[f"{key}.gate_proj.weight"], split[f"{key}.up_proj.weight"] = matrix.chunk(2)
    return split
