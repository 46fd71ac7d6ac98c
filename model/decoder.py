"""The decoder: MiniMind's shape and state-dict keys, dense or with experts.

Legend: ``B`` rows, ``S`` positions, ``V`` vocabulary, ``L`` layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import fits
from model.config import ModelConfig
from model.layers import Attention, FeedForward, LayerCache, Linear, Reach, RMSNorm, Rotary, compute_dtype
from model.loss import cross_entropy_sum
from model.moe import Balance, MoE, Pieces

INITIAL_STD = 0.02


class DecoderOutput(NamedTuple):
    """What a forward pass gives.

    ``loss_sum``: float32 scalar, the sum of cross-entropies over the labels that are not -100; None without labels.
    ``aux_sum``: float32 scalar, the experts' load balance summed over layers and label tokens, without its
    coefficient; 0 for a dense model. ``logits``: [B, S, V] float32; None where labels were given and logits not asked
    for. ``expert_counts`` [E]: tokens that each expert was given, over all layers; None for a dense model.
    """

    loss_sum: Tensor | None
    aux_sum: Tensor
    logits: Tensor | None
    expert_counts: Tensor | None = None


@dataclass
class Cache:
    """Keys and values of every layer, for generation: one per prompt batch. ``length`` positions are filled."""

    layers: list[LayerCache]
    length: int = field(default=0)

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, like: Tensor) -> "Cache":
        """Room for ``capacity`` positions of ``rows`` rows, in the dtype that ``like`` is computed in."""
        assert config.head_dim is not None
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        room = torch.zeros((config.num_hidden_layers, 2, *shape), dtype=compute_dtype(like), device=like.device)
        return cls([LayerCache(*pair.unbind()) for pair in room.unbind()])


class Layer(nn.Module):
    """One pre-norm block: attention, then feed-forward or experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.use_moe else FeedForward(config.hidden_size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        reach: Reach,
        pieces: Pieces | None,
        cache: LayerCache | None,
        cached: int,
    ) -> tuple[Tensor, Balance | None]:
        """[B, S, C] -> ([B, S, C], how its experts were chosen, if it has some)."""
        # The residual stream x keeps its dtype (float32 under autocast); what is multiplied is cast once, here.
        dtype = compute_dtype(x)
        x = x + self.dropout(self.self_attn(self.input_layernorm(x, dtype), rotary, reach, cache, cached))
        normed = self.post_attention_layernorm(x, dtype)
        if isinstance(self.mlp, MoE):
            mixed, balance = self.mlp(normed, pieces)
            return x + self.dropout(mixed), balance
        return x + self.dropout(self.mlp(normed)), None


class Embedding(nn.Embedding):
    """A token embedding whose weight the decoder initialises."""

    def reset_parameters(self) -> None:
        """Leave the weight as it is."""


class Body(nn.Module):
    """Embedding, layers, final norm: what MiniMind's keys call ``model``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, rotary: Rotary, reach: Reach, pieces: Pieces | None, cache: Cache | None
    ) -> tuple[Tensor, Balance | None]:
        """[B, S] token ids -> ([B, S, C] normed hidden states in the compute dtype, the experts' choice in all layers).

        The second is None for a dense model.
        """
        x, total = self.dropout(self.embed_tokens(input_ids)), None
        cached = cache.length if cache is not None else 0
        for number, layer in enumerate(self.layers):
            x, balance = layer(x, rotary, reach, pieces, cache.layers[number] if cache is not None else None, cached)
            total = balance if total is None else total.plus(balance)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x, compute_dtype(x)), total


class Decoder(nn.Module):
    """A causal language model. Weights are float32; the forward pass runs under the caller's autocast.

    Raises ValueError where the config is not valid or has no vocab_size.
    """

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        """Random weights, drawn from ``generator`` (on the CPU), or from torch's global one."""
        super().__init__()
        config.require_valid()
        assert config.vocab_size is not None
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices from a normal distribution of standard deviation 0.02; norms are 1.

        The matrix that makes the logits gets at most 0.32 / sqrt(hidden_size): the last norm makes hidden states of
        length sqrt(hidden_size), so logits start with a standard deviation of at most 0.32, which puts the first loss
        at about ln V + 0.05 whatever the width.
        """
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                makes_logits = parameter is self.lm_head.weight
                std = min(INITIAL_STD, 0.32 / math.sqrt(self.config.hidden_size)) if makes_logits else INITIAL_STD
                parameter.normal_(0.0, std, generator=generator)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        offsets: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        logits: bool = False,
    ) -> DecoderOutput:
        """Run the model on ``input_ids`` [B, S].

        ``position_ids`` [B, S]: 0, 1, 2, ... where not given, behind what the ``cache`` holds. ``segment_ids`` [B, S]:
        0 is padding, 1 and up are pieces that do not see each other; None: each row is one piece, and padding can only
        stand behind it. ``labels`` [B, S], already shifted (labels[t] is the token to predict at t), -100 where
        nothing is predicted. ``offsets`` [P + 1] int32: the same pieces as `model.attention` wants them,
        taken instead of a mask of ``segment_ids`` where it can be.
        """
        rotary = self._rotary(input_ids, position_ids, cache)
        reach = self._reach(input_ids, segment_ids, offsets, cache)
        pieces = Pieces.of(labels, segment_ids) if self.config.use_moe and labels is not None else None
        hidden, balance = self.model(input_ids, rotary, reach, pieces, cache)
        loss_sum = None
        if labels is not None:
            loss_sum = cross_entropy_sum(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
        scores = self.lm_head(hidden).float() if logits or labels is None else None
        aux_sum = balance.aux if balance is not None else torch.zeros((), device=hidden.device)
        return DecoderOutput(loss_sum, aux_sum, scores, balance.counts if balance is not None else None)

    def _rotary(self, input_ids: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Rotary:
        assert self.config.head_dim is not None
        if position_ids is None:
            start = cache.length if cache is not None else 0
            position_ids = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        return Rotary.at(position_ids, self.config.head_dim, self.config.rope_theta)

    def _reach(
        self, input_ids: Tensor, segment_ids: Tensor | None, offsets: Tensor | None, cache: Cache | None
    ) -> Reach:
        S, cached = input_ids.shape[1], cache.length if cache is not None else 0
        if offsets is not None and cache is None and self._takes_pieces():
            return Reach(None, causal=False, offsets=offsets)
        if segment_ids is not None:
            return Reach(additive(block_diagonal(segment_ids), self.model.embed_tokens.weight), causal=False)
        if cached == 0 or S == 1:
            return Reach(None, causal=cached == 0 and S > 1)
        keys = torch.arange(cached + S, device=input_ids.device)
        return Reach((keys <= keys[cached:, None])[None, None], causal=False)

    def _takes_pieces(self) -> bool:
        """Whether attention may go piece by piece: its kernels drop nothing out."""
        weight = self.model.embed_tokens.weight
        drops = self.training and self.config.dropout > 0
        assert self.config.head_dim is not None
        return not drops and fits(weight.device, compute_dtype(weight), self.config.head_dim)

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

        ``temperature`` 0 takes the likeliest token; else tokens are drawn from ``generator``, out of the ``top_k``
        likeliest (0: all) and of those out of the fewest that hold ``top_p`` of the probability. A row that wrote
        ``eos_token_id`` goes on with it until every row did.
        """
        was_training = self.training
        self.eval()
        try:
            steps = self._continue(
                input_ids, max_new_tokens, Choice(temperature, top_p, top_k, generator), eos_token_id
            )
            return torch.cat([input_ids, *steps], dim=1)
        finally:
            self.train(was_training)

    def _continue(self, input_ids: Tensor, steps: int, choice: "Choice", eos: int | None) -> Iterator[Tensor]:
        B, S = input_ids.shape
        cache = Cache.empty(self.config, B, S + steps, self.lm_head.weight)
        done = torch.zeros(B, 1, dtype=torch.bool, device=input_ids.device)
        tokens = input_ids
        for _ in range(steps):
            scores = self._last_logits(tokens, cache)
            tokens = choice.of(scores)
            if eos is not None:
                tokens = tokens.masked_fill(done, eos)
                done = done | (tokens == eos)
            yield tokens
            if eos is not None and bool(done.all()):
                return

    def _last_logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        rotary, reach = self._rotary(tokens, None, cache), self._reach(tokens, None, None, cache)
        hidden, _ = self.model(tokens, rotary, reach, None, cache)
        scores: Tensor = self.lm_head(hidden[:, -1]).float()
        return scores


def block_diagonal(segment_ids: Tensor) -> Tensor:
    """[B, S] -> [B, 1, S, S], true where a query may see a key: of the same segment, at or before it.

    Padding is a segment like any other here: each padded position sees at least itself, so no softmax is over nothing.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """0 where ``allowed``, else minus infinity, in the dtype attention runs in.

    Made once a forward, in rows of a multiple of 8 numbers: attention would make both anew in each layer.
    """
    S = allowed.shape[-1]
    room = torch.zeros((*allowed.shape[:-1], -(-S // 8) * 8), dtype=compute_dtype(like), device=allowed.device)
    return room[..., :S].masked_fill_(~allowed, -torch.inf)


class Choice(NamedTuple):
    """How the next token is chosen."""

    temperature: float
    top_p: float
    top_k: int
    generator: torch.Generator | None

    def of(self, logits: Tensor) -> Tensor:
        """[B, V] -> [B, 1]."""
        if self.temperature <= 0:
            return logits.argmax(dim=-1, keepdim=True)
        ranked, tokens = (logits / self.temperature).sort(dim=-1, descending=True)
        if self.top_k > 0:
            ranked[:, self.top_k :] = -torch.inf
        shares = F.softmax(ranked, dim=-1)
        # A token is left out where those before it hold top_p already, so the first one always stays.
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= self.top_p, 0.0)
        drawn = torch.multinomial(shares, 1, generator=self.generator)
        return tokens.gather(1, drawn)
