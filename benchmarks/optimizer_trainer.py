"""Hugging Face's Trainer with AdamW in the optimizer benchmark, in its own process: prints a JSON object for each run.

Started as ``python -m benchmarks.optimizer_trainer FOLDER RUNS [FIELDS]``, where RUNS is a JSON list of [seed, learning
rate]. With FIELDS, a JSON list of settings of our spec, one step of ours with each of them runs after each step of
Trainer, and the result has all CPU times.
"""

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.optimizer_trials import (
    ALONE,
    ROWS,
    STEPS,
    Trial,
    held_out_loss,
    loader_of,
    new_state,
    prepare_docstrings,
)
from trainyard.model.config import ModelConfig
from trainyard.worker.data.prepare import TrainingData
from trainyard.worker.training.state import TrainState

TIMED_STEPS = 30
EVERY = 25


class InOrder(Trainer):  # type: ignore[misc]
    """A Trainer that takes the rows in their order, which is that of our run."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Measurement(TrainerCallback):  # type: ignore[misc]
    """The CPU time of each step and the held-out loss every `EVERY` steps; ``own`` run between the steps."""

    def __init__(self, data: TrainingData, model: Qwen3ForCausalLM, own: "list[OwnStep]") -> None:
        self._data, self._model, self._own = data, model, own
        self.step_seconds: list[float] = []
        self.curve: list[tuple[float, float]] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.process_time()

    def on_step_end(self, _arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        self.step_seconds.append(time.process_time() - self._began)
        for each in self._own:
            each.run(state.global_step)
        if not self._own and (state.global_step % EVERY == 0 or state.global_step == state.max_steps):
            self.curve.append((float(state.global_step), trained_loss(self._data, self._model)))


class OwnStep:
    """One step of ours at a time, with the settings ``training``. ``seconds``: CPU time of each."""

    def __init__(self, data: TrainingData, seed: int, training: Mapping[str, Any]) -> None:
        trial = Trial("timed", TIMED_STEPS, training)
        self._state, self._rate = new_state(data, trial.spec, seed), trial.spec.learning_rate
        self._loader = loader_of(data, seed, trial.sizes())
        self.seconds: list[float] = []

    def run(self, step: int) -> None:
        began = time.process_time()
        self._state.train_step.run(self._loader.microbatches(step), self._rate, lambda _: None).read()
        self.seconds.append(time.process_time() - began)


def new_qwen3(config: ModelConfig, state: TrainState) -> Qwen3ForCausalLM:
    """Return Qwen3 with the weights of ``state``."""
    assert config.vocab_size is not None
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    model.load_state_dict(state.model.state_dict())
    return model


def rows_of(data: TrainingData, seed: int, steps: int) -> list[dict[str, torch.Tensor]]:
    """Return the rows of the first ``steps`` steps in Trainer's format. Its labels are not shifted."""
    loader, rows = loader_of(data, seed, [ROWS] * steps), []
    for step in range(1, steps + 1):
        for micro in loader.microbatches(step):
            batch = micro.batch
            assert batch.position_ids is not None
            labels = torch.full_like(batch.labels, -100)
            labels[:, 1:] = batch.labels[:, :-1]
            columns = (batch.input_ids, batch.position_ids, labels)
            names = ("input_ids", "position_ids", "labels")
            rows += [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return rows


def trained_loss(data: TrainingData, model: Qwen3ForCausalLM) -> float:
    """Return the held-out loss of ``model``, computed as for our runs."""
    state = new_state(data, Trial("evaluated", 1).spec, 0)
    state.model.load_state_dict(model.state_dict())
    return held_out_loss(data, state)


def require_same_loss(model: Qwen3ForCausalLM, data: TrainingData, state: TrainState, seed: int) -> None:
    """Raise RuntimeError if Qwen3's loss on the first batch is not ours."""
    rows = rows_of(data, seed, 1)
    with torch.no_grad():
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        theirs = float(model.eval()(**columns).loss)
        micro = next(iter(loader_of(data, seed, [ROWS]).microbatches(1)))
        with state.scoring() as loss_sum:
            ours = float(loss_sum(micro.batch)) / micro.tokens
    if abs(ours - theirs) > 1e-4:
        raise RuntimeError(f"the first loss of Qwen3 is {theirs:.6f}, and ours is {ours:.6f}")


def measure(folder: Path, seed: int, rate: float, fields: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    data = prepare_docstrings(folder)
    state = new_state(data, Trial("initial", 1).spec, seed)
    model = new_qwen3(data.spec.model, state)
    require_same_loss(model, data, state, seed)
    own = [OwnStep(data, seed, each) for each in fields]
    measurement, steps = Measurement(data, model, own), TIMED_STEPS if own else STEPS
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        use_cpu=ALONE.device.type == "cpu",
        seed=seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    InOrder(model=model, args=arguments, train_dataset=rows_of(data, seed, steps), callbacks=[measurement]).train()
    return {
        "curve": measurement.curve,
        "step_seconds": statistics.median(measurement.step_seconds),
        "own_step_seconds": [statistics.median(each.seconds) for each in own],
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, runs, *given = sys.argv[1:]
    fields = json.loads(given[0]) if given else []
    for seed, rate in json.loads(runs):
        print(json.dumps(measure(Path(folder), seed, rate, fields)), flush=True)


if __name__ == "__main__":
    main()
