"""The memory and disk space of a plan, compared with the tensors and files of a run."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.data.texts import docstrings, write_jsonl
from tests.worker import rank_runner
from trainyard.contract.spec import JobSpec
from trainyard.model import costs
from trainyard.model.config import ModelConfig
from trainyard.worker.data.corpus import open_corpus
from trainyard.worker.data.loader import MicroBatchLoader
from trainyard.worker.data.packing import PackedDataset, Packing
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.data.tokenizers import ByteTokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
DENSE: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {**DENSE, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
ROWS, LENGTH = 4, 128


def feed(path: Path, packing: Packing, accumulation: int) -> MicroBatchLoader:
    """Micro-batches of ``ROWS`` rows of docstrings."""
    file = write_jsonl(path / "c.jsonl", random.Random(3).sample(docstrings(), 400))
    table = PackedDataset.open(
        open_corpus(file, ByteTokenizer(), cache=path / "cache"), max_seq_len=LENGTH, packing=packing
    )
    return MicroBatchLoader(table, StepSampler(len(table), ROWS * accumulation, 1), ALONE, ROWS, "global_tokens")


def train_state(model: ModelConfig, **training: Any) -> TrainState:
    spec = JobSpec.model_validate({"data": {"data_path": "x"}, "training": training}).training
    return build_train_state(initial_model(model, 1, ALONE.device), spec, 0.01 if model.use_moe else 0.0, ALONE)


class Kept:
    """Storages that autograd keeps at once, and their highest sum. Those of parameters do not count."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._held: dict[int, int] = {}
        self._uses: dict[int, int] = {}
        self.most = 0

    def pack(self, tensor: torch.Tensor) -> "Held":
        return Held(self, tensor)

    def take(self, tensor: torch.Tensor) -> int:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._owned:
            self._held[place] = tensor.untyped_storage().nbytes()
            self._uses[place] = self._uses.get(place, 0) + 1
            self.most = max(self.most, sum(self._held.values()))
        return place

    def give_back(self, place: int) -> None:
        if place in self._uses:
            self._uses[place] -= 1
            if not self._uses[place]:
                del self._uses[place], self._held[place]


class Held:
    """One tensor that autograd keeps; forgotten when autograd forgets it."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.tensor, self._kept = tensor, kept
        self._place = kept.take(tensor)

    def __del__(self) -> None:
        self._kept.give_back(self._place)


def most_kept(student: TrainState, rows: MicroBatchLoader) -> int:
    """Bytes at the peak of one whole step, micro-batch after micro-batch."""
    kept = Kept(student.model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        student.train_step.run(rows.microbatches(1), 1e-3, lambda _: None)
    return kept.most


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("shape", "packing"), [(DENSE, "document"), (DENSE, "none"), (EXPERTS, "document")])
def test_activations_of_a_real_step(shape: dict[str, Any], packing: Packing, dtype: Any, tmp_path: Path) -> None:
    model = ModelConfig(**shape).with_vocab_size(259)
    planned = costs.memory_bytes(model, batch_size=ROWS, seq_len=LENGTH, dtype=dtype)
    copies = planned.weights - 4 * costs.parameters(model)
    found = {}
    for accumulation in (1, 3):
        rows = feed(tmp_path, packing, accumulation)
        found[accumulation] = most_kept(train_state(model, dtype=dtype), rows)
    assert found[1] == pytest.approx(planned.activations + copies, rel=0.1)
    # One micro-batch is let go before the next one: accumulation costs no activations.
    assert found[3] == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [DENSE, EXPERTS])
def test_weights_gradients_and_optimizer_by_tensors(shape: dict[str, Any], optimizer: Any, tmp_path: Path) -> None:
    model = ModelConfig(**shape).with_vocab_size(259)
    student = train_state(model, dtype="float32", optimizer=optimizer)
    gradients: list[int] = []
    student.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(sum(p.grad.nbytes for p in student.model.parameters() if p.grad is not None))
    )
    student.train_step.run(feed(tmp_path, "document", 2).microbatches(1), 1e-3, lambda _: None)
    state = [value for one in student.optimizer.state.values() for value in one.values() if value.ndim]
    planned = costs.memory_bytes(model, batch_size=ROWS, seq_len=LENGTH, dtype="float32", optimizer=optimizer)
    assert planned.weights == sum(parameter.nbytes for parameter in student.model.parameters())
    assert [planned.gradients] == gradients
    assert planned.optimizer == sum(value.nbytes for value in state)


@pytest.mark.parametrize(("shape", "optimizer"), [(DENSE, "adamw"), (DENSE, "muon"), (EXPERTS, "muon")])
def test_a_checkpoint_has_the_bytes_that_were_planned(shape: dict[str, Any], optimizer: Any, tmp_path: Path) -> None:
    described = rank_runner.spec(
        rank_runner.corpus(tmp_path / "c.jsonl"), model=shape, training={"max_steps": 1, "optimizer": optimizer}
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    assert rank_runner.run_to_end(run).outcome == "completed"
    model = ModelConfig(**shape).with_vocab_size(259)
    directory = run.artifacts(None).checkpoint(1)
    held = {name: tensors_in(directory / name) for name in ("model.safetensors", "optimizer.safetensors")}
    assert sum(held.values()) == costs.checkpoint_bytes(model, optimizer)
    assert sum(file.stat().st_size for file in directory.iterdir()) == pytest.approx(sum(held.values()), rel=0.1)


def tensors_in(file: Path) -> int:
    """Bytes of the tensors of a file, without AdamW's counts of steps."""
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if not name.startswith("step.")]  # noqa: SIM118 # it is no dict
        return sum(tensors.get_tensor(name).nbytes for name in names)


def test_with_weight_decay_on_matrices_norms_do_not_decay() -> None:
    model = ModelConfig(**DENSE).with_vocab_size(259)
    for optimizer in ("adamw", "muon"):
        for where, norms in (("matrices", {0.0}), ("all", {0.5})):
            made = train_state(model, weight_decay=0.5, weight_decay_on=where, optimizer=optimizer).optimizer
            decays = {p.ndim: group["weight_decay"] for group in made.param_groups for p in group["params"]}
            assert (decays[2], {decays[1]}) == (0.5, norms)
            assert sum(len(group["params"]) for group in made.param_groups) == 24


def test_a_norm_without_a_gradient_stays_as_it_is() -> None:
    student = train_state(ModelConfig(**DENSE).with_vocab_size(259), weight_decay=0.5, weight_decay_on="matrices")
    norm, matrix = student.model.model.norm.weight, student.model.lm_head.weight
    before = norm.detach().clone(), matrix.detach().clone()
    for parameter in student.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    student.optimizer.step()
    assert torch.equal(norm, before[0])
    assert not torch.equal(matrix, before[1])
