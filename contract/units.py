"""Units of the spec's numbers, for forms, and sizes and counts as text."""


def human_bytes(count: float) -> str:
    """Return e.g. ``2.3 GB``, in powers of ten."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} B"


def counted(count: int, noun: str) -> str:
    """Return e.g. ``1 document`` or ``12,000 documents``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


UNITS = {
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "vocab_size": "tokens",
    "max_position_embeddings": "tokens",
    "num_experts": "experts",
    "num_experts_per_tok": "experts",
    "max_seq_len": "tokens",
    "num_workers": "threads",
    "epochs": "passes",
    "max_steps": "steps",
    "max_tokens": "tokens",
    "batch_size": "sequences",
    "accumulation_steps": "micro-batches",
    "warmup_steps": "steps",
    "decay_steps": "steps",
    "continued_at": "steps",
    "save_interval": "steps",
    "save_minutes": "min",
    "keep_last": "checkpoints",
    "keep_every": "steps",
    "log_interval": "steps",
    "max_minutes": "min",
    "eval_interval": "steps",
    "nproc_per_node": "ranks",
    "nnodes": "nodes",
    "max_restarts": "restarts",
    "stop": "s",
    "term": "s",
    "progress": "s",
    "preparing": "s",
    "collective": "s",
}
"""Leaf -> its unit. Ratios and other numbers without a unit are not included."""
