"""What is known of a run before anything has run: a function of the spec alone. Pure."""

import math
from dataclasses import asdict
from typing import Any

from trainyard.contract.spec import JobSpec
from trainyard.model import costs


def known_at_submit(spec: JobSpec, device: str) -> dict[str, Any]:
    """The plan's fields that do not need the corpus. ``device`` is what the spec's device means on this host."""
    model, training = spec.model, spec.training
    assert model.vocab_size is not None
    memory = costs.memory_bytes(
        model,
        batch_size=training.batch_size,
        seq_len=spec.data.max_seq_len,
        dtype=training.dtype,
        optimizer=training.optimizer,
    )
    saved = costs.checkpoint_bytes(model, training.optimizer)
    return {
        "parameters": costs.parameters(model),
        "active_parameters": costs.active_parameters(model),
        "steps": training.max_steps,
        "world_size": spec.resources.ranks,
        "global_batch": spec.rows_per_step,
        "device": device,
        "dtype": training.dtype,
        "vocab_size": model.vocab_size,
        "flops_per_token": costs.flops_per_token(model, spec.data.max_seq_len),
        "memory_bytes": asdict(memory),
        "checkpoint_bytes": saved,
        "snapshot_bytes": saved,
        # An untrained model gives every token the same probability.
        "expected_first_loss": math.log(model.vocab_size),
    }
