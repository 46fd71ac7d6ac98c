"""Parameters, floating-point operations and memory of a model, computed from its config. Does not import torch.

Legend: ``B`` rows, ``S`` positions, ``V`` vocabulary, ``L`` layers, ``C`` hidden size, ``I`` intermediate size.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

from trainyard.model.config import ModelConfig
from trainyard.model.regions import matrix_offsets

FLOAT32 = 4
ADAM_MOMENTS = 2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Dtype = Literal["bfloat16", "float16", "float32"]
Optimizer = Literal["adamw", "muon"]
Parallelism = Literal["ddp", "zero1", "fsdp"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


def parameters(config: ModelConfig) -> int:
    """Return the number of trained parameters; tied embeddings count once."""
    embeddings = _vocabulary(config) * config.hidden_size
    return _layers(config, config.num_experts) + (embeddings if config.tie_word_embeddings else 2 * embeddings)


def active_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that one token uses: all of a dense model, else only the chosen experts."""
    return parameters(config) - _layers(config, config.num_experts) + _layers(config, config.num_experts_per_tok)


def flops_per_token(config: ModelConfig, attention_length: float) -> float:
    """Return the training FLOPs of one token, forward and backward.

    Six for each weight that is multiplied (two forward, four backward): all active matrices and the output matrix, but
    not the embedding table, which is only indexed. Attention adds ``6 * L * heads * head_dim * attention_length``, for
    the half of the scores that a causal mask leaves. The usual estimate counts all of them.

    ``attention_length``: the sum of the squared lengths of all segments, divided by the number of tokens. If each row
    is one segment, that is the length of a row. Packed tokens attend to their own document only.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), appendix, without the masked half.
    """
    assert config.head_dim is not None
    matrices = _matrices(config, config.num_experts_per_tok) + _vocabulary(config) * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * attention_length
    return 6.0 * matrices + 6.0 * attention


def memory_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool = False,
    parallelism: Parallelism = "ddp",
    world: int = 1,
) -> MemoryEstimate:
    """Return the bytes of one rank at the peak of a step. Weights, gradients and optimizer state are float32.

    Weights include autocast's copies of the matrices in ``dtype``. Activations are what the layers keep for backward,
    the gradient of the output matrix, which is computed with the loss, and in float32 the experts' stacked matrices,
    which backward needs. Temporary buffers of single operations and the libraries' own memory are not counted.

    With ``gradient_checkpointing`` the layers keep only their inputs. Copies, activations and stacks are those of the
    one layer that is computed again. The peak is in that layer, or at the end of the forward pass.

    On ``world`` ranks, ``zero1`` splits the optimizer state and ``fsdp`` also weights and gradients; then the weights
    include the gathered ones, see `gathered_bytes`, instead of copies. ``zero1`` with Muon keeps each matrix on one
    rank, in regions of the size of the largest: with few matrices for many ranks, these need more than their share.
    """
    count, layers, width = parameters(config), config.num_hidden_layers, DTYPE_BYTES[dtype]
    copies = 0 if dtype == "float32" else width * _matrices(config, config.num_experts)
    stacks = FLOAT32 * _stacked(config) if dtype == "float32" else 0
    head = FLOAT32 * _vocabulary(config) * config.hidden_size
    tokens, layer, tail = batch_size * seq_len, _layer_bytes(config, width), _tail_bytes(config, width)
    if gradient_checkpointing:
        inputs, copies = tokens * layers * FLOAT32 * config.hidden_size, copies // layers
        recomputed = tokens * (layer - FLOAT32 * config.hidden_size) + stacks // layers
        activations = inputs + max(tokens * tail + head, recomputed)
    else:
        activations = tokens * (layers * layer + tail) + head + stacks
    is_fsdp = parallelism == "fsdp" and world > 1
    share = -(-count // world) if is_fsdp else count
    empty = _empty_elements(config, world) if parallelism == "zero1" and optimizer == "muon" else 0
    return MemoryEstimate(
        weights=FLOAT32 * (share + empty) + (gathered_bytes(config, dtype) if is_fsdp else copies),
        gradients=FLOAT32 * share,
        optimizer=-(-(optimizer_bytes(config, optimizer) + FLOAT32 * empty) // (1 if parallelism == "ddp" else world)),
        activations=activations,
    )


MANY_MATRICES = 32
"""With more matrices per rank than this, all regions have about the same size."""


@lru_cache(maxsize=256)
def _empty_elements(config: ModelConfig, world: int) -> int:
    """Return the number of unused elements in the regions of all ranks, see `model.regions.matrix_offsets`."""
    sizes = _matrix_sizes(config)
    if config.num_hidden_layers * len(sizes) > MANY_MATRICES * world:
        return 0
    sizes *= config.num_hidden_layers
    return matrix_offsets(sizes, world)[1] * world - sum(sizes) if world > 1 else 0


def _matrix_sizes(config: ModelConfig) -> list[int]:
    """Return the number of elements of each matrix of a layer, without the router."""
    assert config.head_dim is not None
    C, head = config.hidden_size, config.head_dim
    queries, keys = C * config.num_attention_heads * head, C * config.num_key_value_heads * head
    width = config.moe_intermediate_size if config.use_moe else config.intermediate_size
    assert width is not None
    return [queries, keys, keys, queries] + [C * width] * (3 * config.num_experts if config.use_moe else 3)


def gathered_bytes(config: ModelConfig, dtype: Dtype = "bfloat16") -> int:
    """Return the bytes of gathered weights and gradients at the peak of a step with FSDP.

    Embedding, head and last norm are gathered in float32 during the whole step, and so are their gradients. Two layers
    are gathered in ``dtype``: the one that runs, and the next one. Added to them are the buffer of their exchange and
    the gradients of one layer, which are summed in float32.
    """
    layers = _layers(config, config.num_experts) - config.hidden_size
    layer, rest = layers // config.num_hidden_layers, parameters(config) - layers
    return 2 * FLOAT32 * rest + (4 * DTYPE_BYTES[dtype] + FLOAT32) * layer


def snapshot_bytes(
    config: ModelConfig, optimizer: Optimizer = "adamw", parallelism: Parallelism = "ddp", ranks: int = 1
) -> int:
    """Return the bytes of host memory for the copies from which a save is written.

    Rank 0 has a copy of everything. With ``zero1`` and ``fsdp`` the other ``ranks`` of its host copy their parts first.
    """
    whole = checkpoint_bytes(config, optimizer)
    split = {"ddp": 0, "zero1": optimizer_bytes(config, optimizer), "fsdp": whole}[parallelism]
    return whole + split * (ranks - 1) // ranks


def optimizer_bytes(config: ModelConfig, optimizer: Optimizer = "adamw") -> int:
    """Return the bytes of optimizer state: two moments per parameter, but one for the matrices of Muon."""
    both = ADAM_MOMENTS * FLOAT32 * parameters(config)
    return both if optimizer == "adamw" else both - FLOAT32 * (_matrices(config, config.num_experts) - _routers(config))


def checkpoint_bytes(config: ModelConfig, optimizer: Optimizer = "adamw") -> int:
    """Return the bytes of a full checkpoint: float32 weights and optimizer state, without headers."""
    return FLOAT32 * parameters(config) + optimizer_bytes(config, optimizer)


def _vocabulary(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ValueError("vocab_size must be set: it is the number of tokens of the tokenizer")
    return config.vocab_size


def _routers(config: ModelConfig) -> int:
    return config.num_hidden_layers * config.num_experts * config.hidden_size if config.use_moe else 0


def _stacked(config: ModelConfig) -> int:
    """Elements of the experts' matrices, which are stacked for grouped products."""
    if not config.use_moe:
        return 0
    return _matrices(config, config.num_experts) - _matrices(config, 0)


def _layers(config: ModelConfig, experts: int) -> int:
    """Parameters of all layers and the last norm, with ``experts`` experts in each layer."""
    assert config.head_dim is not None
    head_norms = 2 * config.head_dim if config.qk_norm else 0
    norms = config.num_hidden_layers * (2 * config.hidden_size + head_norms) + config.hidden_size
    return _matrices(config, experts) + norms


def _matrices(config: ModelConfig, experts: int) -> int:
    """Elements of the layers' matrices, with ``experts`` experts in each layer if the model has any."""
    assert config.head_dim is not None
    C = config.hidden_size
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = C * heads * config.head_dim
    if config.use_moe:
        assert config.moe_intermediate_size is not None
        feed_forward = experts * 3 * C * config.moe_intermediate_size + config.num_experts * C
    else:
        assert config.intermediate_size is not None
        feed_forward = 3 * C * config.intermediate_size
    return config.num_hidden_layers * (attention + feed_forward)


def _layer_bytes(config: ModelConfig, width: int) -> int:
    """Bytes that a layer keeps for the backward pass for each token, if products run in a dtype of ``width`` bytes."""
    C = config.hidden_size
    feed_forward = (
        _expert_bytes(config, width) if config.use_moe else _feed_forward_bytes(config.intermediate_size, width)
    )
    # Both norms' inputs, the inputs of the first products, attention, feed-forward.
    return 2 * FLOAT32 * (C + 1) + 2 * width * C + _attention_bytes(config, width) + feed_forward


def _tail_bytes(config: ModelConfig, width: int) -> int:
    """Bytes for each token of the last norm's input and output, and of the output's gradient."""
    return FLOAT32 * (config.hidden_size + 1) + 2 * width * config.hidden_size


def _attention_bytes(config: ModelConfig, width: int) -> int:
    """Queries and keys before and after norm and rotation, values, the output, and one log-sum a head."""
    assert config.head_dim is not None
    heads, pairs = config.num_attention_heads, config.num_attention_heads + config.num_key_value_heads
    normed = FLOAT32 * pairs * (config.head_dim + 1) if config.qk_norm else 0
    return normed + width * 2 * pairs * config.head_dim + FLOAT32 * heads


def _feed_forward_bytes(intermediate_size: int | None, width: int) -> int:
    """Gate, its SiLU, up, and their product."""
    assert intermediate_size is not None
    return 4 * width * intermediate_size


def _expert_bytes(config: ModelConfig, width: int) -> int:
    """The router's input and scores; for each chosen expert a copy of the token, its activations and its output."""
    C, E, K = config.hidden_size, config.num_experts, config.num_experts_per_tok
    through = 2 * width * C + _feed_forward_bytes(config.moe_intermediate_size, width)
    return FLOAT32 * (C + 2 * E) + K * (through + 5 * FLOAT32)
