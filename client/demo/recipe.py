"""The run of the demo: small enough for two cores and three minutes, large enough that it visibly learns."""

import math
from pathlib import Path
from typing import Any

from client.demo.machine import Machine

VOCABULARY = 6400
UNTRAINED_LOSS = math.log(VOCABULARY)
LEARNED_LOSS = 0.6 * UNTRAINED_LOSS
"""The demo fails where the last loss is not below this."""

STEPS = 500
SAVE_INTERVAL = 100
LOG_INTERVAL = 10
PAUSE_AFTER = 130
KILL_AFTER = 240
"""A little behind the save at 200, so that there are steps to be done a second time and compared."""

ROWS = 16
"""Rows of 128 tokens in a step. Eight learn less in the same time, and so do a third layer and a wider model."""

PROMPTS = ("Return the", "Raise")


def spec(machine: Machine, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """The job spec that the demo submits."""
    return {
        "name": "demo",
        "labels": {"made-by": "trainyard-demo"},
        "model": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "data": {"data_path": str(corpus), "tokenizer_path": str(tokenizer), "max_seq_len": 128},
        "training": {
            "max_steps": STEPS,
            "batch_size": ROWS // machine.ranks,
            "accumulation_steps": 1,
            "learning_rate": 4e-3,
            "warmup_steps": 20,
            "dtype": "bfloat16" if machine.bf16 else "float32",
        },
        "checkpoint": {"save_interval": SAVE_INTERVAL},
        "reporting": {"log_interval": LOG_INTERVAL, "sample_prompts": list(PROMPTS)},
        "resources": {"device": "auto" if machine.gpus else "cpu", "nproc_per_node": machine.ranks},
    }
