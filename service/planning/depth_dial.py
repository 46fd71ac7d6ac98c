"""A proposal for all sizes of a run from one number, its depth, by published rules. Pure; nothing is applied.

Sources: nanochat (github.com/karpathy/nanochat, scripts/base_train.py, January to March 2026) for the ratio of width to
depth, the ratio of tokens to parameters, the reference batch and the scaling of rate and weight decay; "Power Lines"
(Bergsma et al. 2025, arXiv 2505.13738) for the batch; "How to set AdamW's weight decay" (Wang and Aitchison 2024, arXiv
2405.13698) for the weight decay; GPT-3 (Brown et al. 2020, arXiv 2005.14165) for the rate and weight decay at the
reference; Haegele et al. 2024 (arXiv 2405.18392) for the schedule.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainyard.contract.recipes import fill_recipe
from trainyard.contract.spec import JobSpec
from trainyard.model import costs
from trainyard.model.config import ModelConfig

WIDTH_PER_LAYER = 64
TOKENS_PER_PARAMETER = 10.5
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19
BATCH_EXPONENT = 0.383
REFERENCE_RATE, REFERENCE_WEIGHT_DECAY = 6e-4, 0.1
WARMUP_STEPS = 40
DEFAULT_BATCH_SIZE = 32

ALTERNATIVES = {
    "max_tokens": ("max_tokens", "max_steps", "epochs"),
    "decay_fraction": ("decay_fraction", "decay_steps"),
}
"""Field -> fields of which one, if the client sets it, takes its place."""

NANOCHAT, POWER_LINES = "nanochat, scripts/base_train.py", "arXiv 2505.13738"
GPT3, COOLDOWN, QWEN3 = "arXiv 2005.14165, table 2.1", "arXiv 2405.18392", "Qwen3, arXiv 2505.09388"
WEIGHT_DECAY = "arXiv 2405.13698"


@dataclass(frozen=True)
class Proposed:
    """One number: ``field`` of ``group`` is proposed to be ``value``. ``source`` None: arithmetic."""

    group: str
    field: str
    value: Any
    reason: str
    source: str | None = None


def scaling_parameters(config: ModelConfig) -> int:
    """Return the parameters that are multiplied: the matrices of the layers and the output matrix."""
    return round(costs.flops_per_token(config, 0) / 6)


def model_settings(depth: int) -> Iterator[Proposed]:
    """Yield the shape of a model of ``depth`` layers."""
    width = WIDTH_PER_LAYER * depth
    head = 128 if width % 128 == 0 else 64
    heads = width // head
    pairs = heads // 2 if heads % 2 == 0 else heads
    yield Proposed("model", "num_hidden_layers", depth, "the requested depth")
    yield Proposed("model", "hidden_size", width, f"{WIDTH_PER_LAYER} x depth", NANOCHAT)
    yield Proposed("model", "head_dim", head, "128, or 64 if the width is no multiple of 128", QWEN3)
    yield Proposed("model", "num_attention_heads", heads, f"width / {head}")
    shared = "two query heads share a key and value head" if pairs < heads else "an odd number of heads shares none"
    yield Proposed("model", "num_key_value_heads", pairs, shared, QWEN3)


def reference_tokens(spec: JobSpec) -> float:
    """Return the horizon of the reference: depth 12 with the vocabulary of ``spec``."""
    assert spec.model.vocab_size is not None
    shape = {each.field: each.value for each in model_settings(REFERENCE_DEPTH)}
    config = ModelConfig(**shape, vocab_size=spec.model.vocab_size)
    return TOKENS_PER_PARAMETER * scaling_parameters(config)


def horizon(spec: JobSpec) -> Proposed:
    """Return the number of tokens to train. ``spec`` has the model."""
    count = scaling_parameters(spec.model)
    reason = (
        f"{TOKENS_PER_PARAMETER} tokens for each of the {count:,} parameters of matrices and output; up to 12 is usual"
    )
    return Proposed("training", "max_tokens", round(TOKENS_PER_PARAMETER * count), reason, NANOCHAT)


def batch_tokens(spec: JobSpec, tokens: float) -> int:
    """Return the tokens of a step for a horizon of ``tokens``, a power of two."""
    ratio = tokens / reference_tokens(spec)
    return int(2 ** round(math.log2(REFERENCE_BATCH * ratio**BATCH_EXPONENT)))


def _per_rank(spec: JobSpec, tokens: float) -> int:
    """Return the sequences of a step on one rank."""
    return max(1, round(batch_tokens(spec, tokens) / (spec.data.max_seq_len * spec.resources.ranks)))


def batch_size(spec: JobSpec, tokens: float, largest: int | None) -> Proposed:
    """Return the batch size. ``largest``: the one that fits the memory."""
    per_rank = _per_rank(spec, tokens)
    limit = largest if largest is not None else DEFAULT_BATCH_SIZE
    size = 2 ** int(math.log2(max(1, min(per_rank, limit))))
    fits = "the largest power of two that fits into the free memory" if largest is not None else "memory unknown"
    reason = f"{fits}, at most the {per_rank:,} sequences of a step on a rank"
    return Proposed("training", "batch_size", size, reason)


def accumulation(spec: JobSpec, tokens: float) -> Proposed:
    """Return the number of micro-batches for the batch size of ``spec``."""
    reason = (
        f"a step of about {batch_tokens(spec, tokens):,} tokens: {REFERENCE_BATCH:,} at depth {REFERENCE_DEPTH}, "
        f"x {tokens / reference_tokens(spec):.3g}^{BATCH_EXPONENT} for the horizon, as a power of two"
    )
    count = max(1, round(_per_rank(spec, tokens) / spec.training.batch_size))
    return Proposed("training", "accumulation_steps", count, reason, POWER_LINES)


def optimizer_settings(spec: JobSpec, tokens: float) -> Iterator[Proposed]:
    """Yield rate, weight decay and schedule of a run with the batch of ``spec``."""
    batch = spec.rows_per_step * spec.data.max_seq_len
    ratio, width = batch / REFERENCE_BATCH, spec.model.hidden_size
    reference_width = WIDTH_PER_LAYER * REFERENCE_DEPTH
    rate = REFERENCE_RATE * math.sqrt(ratio * reference_width / width)
    reason = (
        f"{REFERENCE_RATE:g} (GPT-3 Small), x sqrt({ratio:.3g}) for the batch, x sqrt({reference_width} / {width}) for "
        "the width"
    )
    yield Proposed("training", "learning_rate", _short(rate), reason, f"{GPT3}; {NANOCHAT}")
    decay = min(1.0, REFERENCE_WEIGHT_DECAY * math.sqrt(ratio) * reference_tokens(spec) / tokens)
    reason = f"{REFERENCE_WEIGHT_DECAY:g} (GPT-3), x sqrt(batch ratio), / horizon ratio, at most 1"
    yield Proposed("training", "weight_decay", _short(decay), reason, f"{GPT3}; {WEIGHT_DECAY}")
    yield Proposed("training", "weight_decay_on", "matrices", "norms are not decayed")
    yield Proposed("training", "lr_scheduler", "wsd", "a stable rate can be decayed from any checkpoint", COOLDOWN)
    yield Proposed("training", "decay_fraction", 0.2, "a decay over 20 % of the steps matches a cosine", COOLDOWN)
    steps = spec.training.max_steps or tokens / batch
    yield Proposed("training", "min_lr_ratio", 0.0, "the decay ends at zero", COOLDOWN)
    warmup = min(WARMUP_STEPS, int(steps / 10))
    yield Proposed("training", "warmup_steps", warmup, f"{WARMUP_STEPS} steps, at most a tenth of the run", NANOCHAT)


def propose(
    raw: Mapping[str, Any],
    depth: int,
    read: Callable[[Mapping[str, Any]], JobSpec],
    largest: Callable[[JobSpec], int | None],
) -> tuple[dict[str, Any], list[Proposed]]:
    """Return the client's spec ``raw`` with the proposal for ``depth``, and the proposed values with their reasons.

    Values in ``raw`` and those of its recipe are kept, and the others are computed from them. ``read`` validates a
    spec, with the vocabulary's size; ``largest`` returns its largest batch size.
    """
    merged: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in raw.items()}
    kept = fill_recipe(merged)  # the settings of a recipe belong together
    proposed: list[Proposed] = []

    def take(found: Iterable[Proposed]) -> JobSpec:
        for each in found:
            group = merged.setdefault(each.group, {})
            # A group that is no object stays as it is: `read` reports it.
            if isinstance(group, dict) and not is_given(kept, each):
                group[each.field] = each.value
                proposed.append(each)
        return read(merged)

    spec = take(model_settings(depth))
    spec = take([horizon(spec)])
    tokens = spec.training.max_tokens or horizon(spec).value
    spec = take([batch_size(spec, tokens, largest(spec))])
    spec = take([accumulation(spec, tokens)])
    take(optimizer_settings(spec, tokens))
    return merged, proposed


def is_given(raw: Mapping[str, Any], proposed: Proposed) -> bool:
    """Return whether the spec has the field. Any length of the run counts as its horizon."""
    group = raw.get(proposed.group)
    names = ALTERNATIVES.get(proposed.field, (proposed.field,))
    return isinstance(group, Mapping) and any(group.get(name) is not None for name in names)


def _short(value: float) -> float:
    return float(f"{value:.3g}")
