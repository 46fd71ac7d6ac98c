"""The decoder's config: one frozen dataclass, validated before a model is built from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Gt, Le, Lt

Size = Annotated[int, Ge(1), Le(2**20)]
Count = Annotated[int, Ge(1), Le(4096)]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of MiniMind's decoder, which has the shapes of Qwen3, and of Qwen3-MoE with ``use_moe``.

    Sizes that are None are derived when the object is created: ``head_dim`` = hidden / heads, ``intermediate_size`` =
    ceil(hidden * pi / 64) * 64, ``moe_intermediate_size`` = ``intermediate_size``. ``vocab_size`` None means "as the
    tokenizer"; set it by `with_vocab_size` before a model is built.

    Source of the shape and the defaults: docs/reference/spec.md.
    """

    # Pydantic reads this, because the job spec embeds this class. Plain Python ignores it.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    hidden_size: Size = 512
    num_hidden_layers: Annotated[int, Ge(1), Le(1024)] = 8
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 4
    head_dim: Annotated[int, Ge(2), Le(1024)] | None = None
    intermediate_size: Size | None = None
    vocab_size: Annotated[int, Ge(8), Le(2**24)] | None = None
    max_position_embeddings: Annotated[int, Ge(2), Le(2**24)] = 32768
    rope_theta: Annotated[float, Gt(1.0), Le(1e12)] = 1e6
    rms_norm_eps: Annotated[float, Gt(0.0), Le(1e-1)] = 1e-6
    qk_norm: bool = True
    tie_word_embeddings: bool = True
    dropout: Annotated[float, Ge(0.0), Lt(1.0)] = 0.0
    use_moe: bool = False
    num_experts: Annotated[int, Ge(1), Le(1024)] = 4
    num_experts_per_tok: Annotated[int, Ge(1), Le(1024)] = 2
    moe_intermediate_size: Size | None = None
    norm_topk_prob: bool = True
    router_aux_loss_coef: Annotated[float, Ge(0.0), Le(10.0)] = 5e-4

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self._derive("head_dim", max(2, self.hidden_size // self.num_attention_heads))
        if self.intermediate_size is None:
            self._derive("intermediate_size", math.ceil(self.hidden_size * math.pi / 64) * 64)
        if self.moe_intermediate_size is None:
            self._derive("moe_intermediate_size", self.intermediate_size)

    def _derive(self, name: str, value: int | None) -> None:
        object.__setattr__(self, name, value)

    def problems(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Yield the conflicts between fields: (field at fault, message, all fields involved)."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            message = f"must divide num_attention_heads ({heads}), which {kv_heads} does not"
            yield "num_key_value_heads", message, ("num_attention_heads", "num_key_value_heads")
        if self.hidden_size % heads and self.head_dim == max(2, self.hidden_size // heads):
            message = f"must divide hidden_size ({self.hidden_size}), or head_dim must be given"
            yield "num_attention_heads", message, ("num_attention_heads", "hidden_size", "head_dim")
        if self.head_dim is not None and self.head_dim % 2:
            message = f"must be even for rotary positions, and is {self.head_dim}"
            yield "head_dim", message, ("head_dim", "hidden_size", "num_attention_heads")
        if self.use_moe:
            yield from self._moe_problems()

    def _moe_problems(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        experts, chosen = self.num_experts, self.num_experts_per_tok
        if chosen > experts:
            message = f"must be at most num_experts ({experts})"
            yield "num_experts_per_tok", message, ("num_experts_per_tok", "num_experts")
        if chosen == 1 and experts > 1 and self.norm_topk_prob:
            # The weight of a single renormalised expert is exactly 1, so the router gets no gradient from the loss.
            message = "must be false with num_experts_per_tok 1: a renormalised single expert never trains its router"
            yield "norm_topk_prob", message, ("norm_topk_prob", "num_experts_per_tok", "num_experts")

    def with_vocab_size(self, vocab_size: int) -> Self:
        """Return the config for a tokenizer of ``vocab_size`` tokens; a larger size that is already set is kept."""
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise ValueError(f"vocab_size {self.vocab_size} is smaller than the tokenizer's {vocab_size}")
        return replace(self, vocab_size=self.vocab_size or vocab_size)

    def require_valid(self) -> None:
        """Raise ValueError with every problem, for callers that build a model without a job spec."""
        found = [f"{field}: {message}" for field, message, _ in self.problems()]
        if self.vocab_size is None:
            found.append("vocab_size: must be set before a model is built")
        if found:
            raise ValueError("; ".join(found))
