"""A model, its data and its training step in this process, which the trials of the doctor measure."""

import json
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from trainyard.contract.events import Event, WarningEvent
from trainyard.contract.rundir import ArtifactDir, RunDir
from trainyard.contract.spec import JobSpec
from trainyard.model.config import ModelConfig
from trainyard.worker.checkpoint import files
from trainyard.worker.checkpoint.saver import Checkpointer, StateDicts
from trainyard.worker.checkpoint.weights import write_weights
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow
from trainyard.worker.training.resume_check import ResumeCheck
from trainyard.worker.training.state import TrainProgress, TrainState, build_train_state, initial_model
from trainyard.worker.training.step import StepMetrics

SEED = 7
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_texts(file: Path, characters: int) -> Path:
    """Write texts of random words as JSONL, the same at each call. A model can learn the words, so the loss falls."""
    chooser = random.Random(SEED)  # noqa: S311 - texts, not secrets
    words = ["".join(chooser.choices(LETTERS, k=chooser.randint(2, 9))) for _ in range(500)]
    with file.open("w", encoding="utf-8") as out:
        while characters > 0:
            # From a sentence to several rows, most of them short, as in a real corpus.
            text = " ".join(chooser.choices(words, k=int(chooser.lognormvariate(4.0, 1.2)) + 2))
            characters -= len(text)
            out.write(json.dumps({"text": text}) + "\n")
    return file


@dataclass(frozen=True)
class TrialSizes:
    """Sizes of the trials: full ones for a GPU, or small ones with which the tests run the same code on a CPU.

    ``compiled``: which models are compiled too. ``speed``: the model whose speed is measured, with rows of
    ``speed_length`` tokens. ``run``: the model of the runs that are killed and compared. ``dtype``: type of training.
    """

    model: ModelConfig
    length: int
    speed: ModelConfig
    speed_length: int
    max_rows: int
    speed_steps: int
    run: dict[str, Any]
    run_length: int
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    compiled: tuple[str, ...] = ("dense", "MoE")
    characters: int = 200_000


GPU_SIZES = TrialSizes(
    model=ModelConfig(hidden_size=512, num_hidden_layers=2, vocab_size=1024),
    length=512,
    speed=ModelConfig(hidden_size=768, num_hidden_layers=8, vocab_size=6400),
    speed_length=1024,
    max_rows=64,
    speed_steps=20,
    run={"hidden_size": 512, "num_hidden_layers": 4},
    run_length=512,
    characters=4_000_000,
)
CPU_SIZES = TrialSizes(
    model=ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=259),
    length=64,
    speed=ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=259),
    speed_length=64,
    max_rows=4,
    speed_steps=4,
    run={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    run_length=64,
    # Many CPUs are slow in bfloat16, and what is tried here does not depend on it.
    dtype="float32",
    compiled=(),
    characters=60_000,
)


@dataclass
class Trial:
    """Device, folder and sizes of the trials. ``name``: of the card or processor."""

    device: torch.device
    folder: Path
    sizes: TrialSizes
    name: str

    def texts(self) -> Path:
        """Return the corpus, which is written by the first call."""
        file = self.folder / "texts.jsonl"
        return file if file.exists() else write_texts(file, self.sizes.characters)

    def bench(self, name: str, config: ModelConfig, **training: Any) -> "TrainBench":
        """Return a bench for the model ``config`` with four rows per step."""
        given = {"dtype": self.sizes.dtype, **training}
        return TrainBench(self.folder / name, self.device, self.texts(), config, 4, self.sizes.length, given)


@dataclass
class TrainBench:
    """A model that is trained step by step, as in the training loop."""

    folder: Path
    device: torch.device
    texts: Path
    model: ModelConfig
    rows: int
    length: int
    training: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ranks = DistributedContext(0, 1, 0, 1, self.device)
        described = {
            "data": {"data_path": str(self.texts), "max_seq_len": self.length},
            "model": self.model,
            "training": {"batch_size": self.rows, "accumulation_steps": 1, **self.training},
        }
        data = prepare_data(
            JobSpec.model_validate(described), RunDir(self.folder), self.ranks, self.require_no_warning, lambda: False
        )
        self.data, self.spec = data, data.spec
        sampler = data.sampler(self.rows, self.spec.training.seed)
        self.loader = MicroBatchLoader(
            data.train_set, sampler, self.ranks, self.rows, "global_tokens", min_rows=self.rows
        )
        coefficient = self.model.router_aux_loss_coef if self.model.use_moe else 0.0
        network = initial_model(self.spec.model, SEED, self.device)
        self.state: TrainState = build_train_state(network, self.spec.training, coefficient, self.ranks)

    def require_no_warning(self, event: Event) -> None:
        """Raise RuntimeError for a warning: it ends the trial."""
        if isinstance(event, WarningEvent):
            raise RuntimeError(event.message)

    def start_step(self, rate: float = 1e-3) -> Any:
        """Dispatch one optimizer step, and return its pending metrics."""
        self.step += 1
        return self.state.train_step.run(self.loader.microbatches(self.step), rate, lambda _: None)

    def train(self, rate: float = 1e-3) -> StepMetrics:
        """Run one optimizer step to its end."""
        metrics: StepMetrics = self.start_step(rate).read()
        return metrics


class SaveBench(TrainBench):
    """A bench that can also save."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.artifacts = ArtifactDir(self.folder)
        self.metrics = MetricsProcessor(self.ranks, MetricsWindow(), 1.0, has_aux=False)
        self.saver = Checkpointer(
            self.spec, self.artifacts, self.data.identity, self.rows, self.ranks, self.require_no_warning
        )
        self.saver.resume_check = ResumeCheck.from_dataset(self.data.train_set, self.spec.training, self.device)

    def save_synchronously(self) -> float:
        """Save without a copy while training waits; return the seconds."""
        began = time.perf_counter()
        state = self.state.run_state(
            TrainProgress(step=self.step), self.saver.identity, rows_per_step=self.rows, interval=[], loss=None
        )
        live = StateDicts.live(self.state.model, self.state.optimizer)
        files.write_checkpoint(self.artifacts, state, files.unique_tensors(live.model), live.optimizer)
        write_weights(self.artifacts.out / "synchronous.pth", live.model)
        return time.perf_counter() - began

    def save_asynchronously(self) -> tuple[float, list[float]]:
        """Save while training continues; return the blocked seconds, and the seconds of each step meanwhile."""
        before, published, began = self._blocked_seconds(), self.artifacts.checkpoint(self.step), time.perf_counter()
        self.saver.save(self.state, TrainProgress(step=self.step), self.metrics, required=False)
        blocked = time.perf_counter() - began
        steps: list[float] = []
        while not (published.exists() and steps):
            began = time.perf_counter()
            self.train()
            steps.append(time.perf_counter() - began)
        self.saver.wait()
        return blocked + self._blocked_seconds() - before, steps

    def _blocked_seconds(self) -> float:
        staging = self.saver._staging  # noqa: SLF001 - a run has no public measure of this
        return staging.gate.blocked_seconds if staging is not None else 0.0


def worker_environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run in ``folder``: without settings of a service, whose roots would forbid it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRAINYARD_")}
    return {**kept, "TRAINYARD_CORPUS_CACHE": str(folder / "cache")}
