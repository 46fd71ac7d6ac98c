"""The decoder, dense or with experts: MiniMind's shape, and its state-dict keys.

Legend: ``B`` rows, ``S`` positions, ``V`` vocabulary, ``L`` layers.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainyard.model.config import ModelConfig
from trainyard.model.kv_cache import BatchKVCache, Cache, KVCache, LayerCache
from trainyard.model.layers import (
    Attention,
    AttentionMask,
    FeedForward,
    Linear,
    RMSNorm,
    RotaryTables,
    compute_dtype,
)
from trainyard.model.loss import CHUNK_ELEMENTS, IGNORED, cross_entropy_sum
from trainyard.model.moe import MoE, RouterStats, Segments
from trainyard.model.varlen_attention import use_flash

INITIAL_STD = 0.02


class DecoderOutput(NamedTuple):
    """The result of a forward pass.

    ``loss_sum``: float32 scalar, the sum of cross-entropies over the labels that are not -100; None without labels.
    ``aux_sum``: float32 scalar, the load-balancing loss summed over layers and labels, without its coefficient; 0 for a
    dense model. ``logits``: [B, S, V] float32; None if labels were given and logits not requested. ``expert_counts``
    [E]: tokens of each expert, over all layers; None for a dense model.
    """

    loss_sum: Tensor | None
    aux_sum: Tensor
    logits: Tensor | None
    expert_counts: Tensor | None = None


class TransformerBlock(nn.Module):
    """One pre-norm block: attention, then feed-forward or experts.

    ``recomputes``: keep only the input for the backward pass, and run the block again there (gradient checkpointing).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else FeedForward(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.recomputes = False

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        segments: Segments | None,
        cache: LayerCache | None,
        cached: int,
    ) -> tuple[Tensor, RouterStats | None]:
        """[B, S, C] -> ([B, S, C], how its router chose, or None without experts)."""
        if not (self.recomputes and torch.is_grad_enabled()):
            return self._forward(x, rotary, mask, segments, cache, cached)
        # Here and not around the block: FSDP's hooks must not run again in the second pass.
        result: tuple[Tensor, RouterStats | None] = checkpoint(
            self._forward,
            *(x, rotary, mask, segments, cache, cached),
            use_reentrant=False,
            # Dropout must draw the same numbers again. Without it, there is no generator state to keep.
            preserve_rng_state=self.dropout.p > 0,
        )
        return result

    def _forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        segments: Segments | None,
        cache: LayerCache | None,
        cached: int,
    ) -> tuple[Tensor, RouterStats | None]:
        # The residual stream x keeps its dtype (float32 under autocast). Inputs of products are cast once, here.
        dtype = compute_dtype(x)
        x = x + self.dropout(self.self_attn(self.input_layernorm(x, dtype), rotary, mask, cache, cached))
        normed = self.post_attention_layernorm(x, dtype)
        if isinstance(self.mlp, MoE):
            mixed, stats = self.mlp(normed, segments)
            return x + self.dropout(mixed), stats
        return x + self.dropout(self.mlp(normed)), None


class Embedding(nn.Embedding):
    """A token embedding. `Decoder` initialises its weight."""

    def reset_parameters(self) -> None:
        """Do nothing, as `model.layers.Linear.reset_parameters`."""


class Transformer(nn.Module):
    """Embedding, blocks and final norm. MiniMind's state-dict keys call it ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        rotary: RotaryTables,
        mask: AttentionMask,
        segments: Segments | None,
        cache: Cache | None,
    ) -> tuple[Tensor, RouterStats | None]:
        """[B, S] token ids -> ([B, S, C] normed hidden states in the compute dtype, how all routers chose).

        The second is None for a dense model.
        """
        x, total = self.dropout(self.embed_tokens(input_ids)), None
        cached = cache.length if cache is not None else 0
        caches = cache.layers if cache is not None else [None] * len(self.layers)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x, stats = layer(x, rotary, mask, segments, layer_cache, cached)
            total = stats if total is None else total.add(stats)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.norm(x, compute_dtype(x)), total


class Decoder(nn.Module):
    """A causal language model. Weights are float32; the forward pass runs under the caller's autocast.

    Raises ValueError if the config is not valid or has no vocab_size.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        """Draw random weights from ``generator`` (on the CPU), or from torch's global one."""
        super().__init__()
        config.require_valid()
        assert config.vocab_size is not None
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialise(generator)

    def recompute_layers(self, enabled: bool = True) -> None:
        """Switch gradient checkpointing of all layers on or off. Gradients are the same, bit for bit."""
        for layer in self.model.layers:
            assert isinstance(layer, TransformerBlock)
            layer.recomputes = enabled

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices from a normal distribution of standard deviation 0.02; norms are 1.

        The output matrix gets at most 0.32 / sqrt(hidden_size). The last norm makes hidden states of length
        sqrt(hidden_size), so logits start with a standard deviation of at most 0.32, and the first loss is about
        ln V + 0.05 at any width.
        """
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                is_output = parameter is self.lm_head.weight
                std = min(INITIAL_STD, 0.32 / math.sqrt(self.config.hidden_size)) if is_output else INITIAL_STD
                parameter.normal_(0.0, std, generator=generator)

    @torch.no_grad()
    def zero_projections(self) -> None:
        """Set the output projections of attention, feed-forward layers and experts to 0: each block adds nothing."""
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        offsets: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits: bool = False,
    ) -> DecoderOutput:
        """Run the model on ``input_ids`` [B, S].

        ``position_ids`` [B, S]: by default 0, 1, 2, ..., counted on from the ``cache``. ``segment_ids`` [B, S]: 0 is
        padding; segments 1 and up do not see each other. Without it each row is one segment, and padding may only
        follow it. ``offsets`` [P + 1] int32: the same segments as offsets, used in place of a mask if
        `model.varlen_attention` can. ``labels`` [B, S]: already shifted (labels[t] is the token to predict at t), -100
        for none. ``logits``: return the logits even with labels.
        """
        rotary = self._rotary(input_ids, position_ids, cache)
        mask = self._mask(input_ids, segment_ids, offsets, cache)
        segments = Segments.of(labels, segment_ids) if self.config.use_moe and labels is not None else None
        hidden, stats = self.model(input_ids, rotary, mask, segments, cache)
        loss_sum = None
        if labels is not None:
            loss_sum = cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
        scores = self.lm_head(hidden).float() if logits or labels is None else None
        aux_sum = stats.aux if stats is not None else torch.zeros((), device=hidden.device)
        return DecoderOutput(loss_sum, aux_sum, scores, stats.counts if stats is not None else None)

    def _rotary(self, input_ids: Tensor, position_ids: Tensor | None, cache: KVCache | None) -> RotaryTables:
        assert self.config.head_dim is not None
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        return RotaryTables.at(position_ids, self.config.head_dim, self.config.rope_theta)

    def _mask(
        self, input_ids: Tensor, segment_ids: Tensor | None, offsets: Tensor | None, cache: KVCache | None
    ) -> AttentionMask:
        S, cached = input_ids.shape[1], cache.length if cache is not None else 0
        if offsets is not None and cache is None and self._uses_offsets():
            return AttentionMask(None, causal=False, offsets=offsets)
        if segment_ids is not None:
            return AttentionMask(additive(block_diagonal(segment_ids), self.model.embed_tokens.weight), causal=False)
        if cached == 0 or S == 1:
            # A single new token sees the whole cache. torch's is_causal would let it see only the first key.
            return AttentionMask(None, causal=cached == 0 and S > 1)
        keys = torch.arange(cached + S, device=input_ids.device)
        return AttentionMask((keys <= keys[cached:, None])[None, None], causal=False)

    def _uses_offsets(self) -> bool:
        weight = self.model.embed_tokens.weight
        # The kernels for variable lengths have no dropout.
        drops_out = self.training and self.config.dropout > 0
        assert self.config.head_dim is not None
        return not drops_out and use_flash(weight.device, compute_dtype(weight), self.config.head_dim)

    @torch.no_grad()
    def score_tokens(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score the ``labels`` [B, S] that are not -100; there are N. Return N log-probabilities, float32, in nats.

        The second result [N] is True if no other token is likelier. Each row is one segment; padding may follow it.
        Logits are computed for these positions alone, and in chunks.
        """
        mask = self._mask(input_ids, None, None, None)
        hidden, _ = self.model(input_ids, self._rotary(input_ids, None, None), mask, None, None)
        scored = labels != IGNORED
        positions, targets = hidden[scored], labels[scored]
        chunk = max(64, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // self.lm_head.weight.shape[0])
        log_probs, likeliest = [], []
        for start in range(0, len(targets), chunk):
            some, wanted = positions[start : start + chunk], targets[start : start + chunk]
            logits = self.lm_head(some).float()
            log_probs.append(F.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).squeeze(1))
            likeliest.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(log_probs), torch.cat(likeliest)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts of equal length, [B, S] -> [B, S + at most ``max_new_tokens``], with a key-value cache.

        ``temperature`` 0 takes the likeliest token. Else tokens are sampled with ``generator`` from the ``top_k``
        likeliest (0: all), and from the fewest of those that have ``top_p`` of the probability. A row repeats its
        ``eos_token_id`` until all rows have one.
        """
        was_training = self.training
        self.eval()
        try:
            sampling = SamplingParams(temperature, top_p, top_k, generator)
            new_tokens = self._generate(input_ids, max_new_tokens, sampling, eos_token_id)
            return torch.cat([input_ids, *new_tokens], dim=1)
        finally:
            self.train(was_training)

    def _generate(self, input_ids: Tensor, steps: int, sampling: "SamplingParams", eos: int | None) -> Iterator[Tensor]:
        B, S = input_ids.shape
        cache = self.new_cache(B, S + steps)
        done = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
        tokens = input_ids
        for _ in range(steps):
            tokens = sampling.sample(self.next_logits(tokens, cache))
            if eos is not None:
                tokens = tokens.masked_fill(done, eos)
                done = done | (tokens == eos)
            yield tokens
            if eos is not None and bool(done.all()):
                return

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """Return an empty cache for ``rows`` rows of at most ``capacity`` positions."""
        weight = self.lm_head.weight
        return KVCache.empty(self.config, rows, capacity, compute_dtype(weight), weight.device)

    def new_batch_cache(self) -> BatchKVCache:
        """Return an empty cache for rows of different lengths."""
        weight = self.lm_head.weight
        return BatchKVCache(self.config, compute_dtype(weight), weight.device)

    @torch.no_grad()
    def decode_batch(self, tokens: Tensor, cache: BatchKVCache) -> Tensor:
        """Append the next token of each row of ``cache``, [B, 1], and return the logits of the one after it, [B, V]."""
        assert self.config.head_dim is not None
        positions = torch.tensor(cache.lengths, device=tokens.device)[:, None]
        rotary = RotaryTables.at(positions, self.config.head_dim, self.config.rope_theta)
        visible = torch.arange(cache.length + 1, device=tokens.device) <= positions
        mask = AttentionMask(visible[:, None, None], causal=False)
        hidden, _ = self.model(tokens, rotary, mask, None, cache)
        logits: Tensor = self.lm_head(hidden[:, -1]).float()
        return logits

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append ``tokens`` [B, S] to ``cache``, and return the logits of the token after them, [B, V]."""
        rotary, mask = self._rotary(tokens, None, cache), self._mask(tokens, None, None, cache)
        hidden, _ = self.model(tokens, rotary, mask, None, cache)
        logits: Tensor = self.lm_head(hidden[:, -1]).float()
        return logits


def block_diagonal(segment_ids: Tensor) -> Tensor:
    """[B, S] -> [B, 1, S, S], True if the query may see the key: of the same segment, at or before it."""
    # Padding is a segment too: each padded position sees itself, because a softmax over no key is NaN.
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same_segment.tril()[:, None]


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """Return 0 where ``allowed`` is True, else minus infinity, in the dtype that products of ``like`` run in."""
    # Rows have a multiple of 8 numbers in memory, which CUDA's kernel requires. Attention would otherwise convert and
    # pad the mask again in each layer.
    S = allowed.shape[-1]
    padded = torch.zeros((*allowed.shape[:-1], -(-S // 8) * 8), dtype=compute_dtype(like), device=allowed.device)
    return padded[..., :S].masked_fill_(~allowed, -torch.inf)


class SamplingParams(NamedTuple):
    """How the next token is chosen, see `Decoder.generate`."""

    temperature: float
    top_p: float
    top_k: int
    generator: torch.Generator | None

    def sample(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B, 1] token ids."""
        if self.temperature <= 0:
            return logits.argmax(dim=-1, keepdim=True)
        ranked, tokens = (logits / self.temperature).sort(dim=-1, descending=True)
        if self.top_k > 0:
            ranked[:, self.top_k :] = -torch.inf
        probs = F.softmax(ranked, dim=-1)
        # A token is removed if those before it already have top_p together, so the first one always stays.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= self.top_p, 0.0)
        sampled = torch.multinomial(probs, 1, generator=self.generator)
        return tokens.gather(1, sampled)
