"""Hugging Face's Trainer with Qwen3 on our rows, in its own process; prints tokens a second.

Started by benchmarks.trainer as ``python -m benchmarks.huggingface FOLDER eager|compiled``.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.step_profile import packed_dataset
from benchmarks.trainer import BATCH, LEARNING_RATE, LENGTH, STEPS, VOCABULARY, WARMUP_STEPS
from trainyard.contract.spec import TrainingSpec
from trainyard.worker.data.sampler import StepSampler


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def child(root: Path, *, compiled: bool) -> None:
    """Train Qwen3 with Trainer on our rows and print its tokens a second."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1664,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    clock = StepClock()
    arguments = TrainingArguments(
        output_dir=str(root / "hf"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        bf16=True,
        use_cpu=True,
        torch_compile=compiled,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    torch.set_num_threads(os.cpu_count() or 1)
    Trainer(model=Qwen3ForCausalLM(config), args=arguments, train_dataset=our_rows(root), callbacks=[clock]).train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)][WARMUP_STEPS - 1 :]
    print(BATCH * LENGTH / statistics.median(seconds))


def our_rows(root: Path) -> list[dict[str, Any]]:
    """Return the rows of the worker's first steps in Trainer's format."""
    dataset = packed_dataset(root)
    sampler = StepSampler(len(dataset), BATCH, TrainingSpec().seed)
    batch = dataset.batch(np.concatenate([sampler.rows_of(step) for step in range(1, STEPS + 1)]))
    return [{"input_ids": ids, "labels": ids} for ids in batch.input_ids]


if __name__ == "__main__":
    child(Path(sys.argv[1]), compiled=sys.argv[2] == "compiled")
