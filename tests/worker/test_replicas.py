"""Silent corruption: a bit that flips in the memory of one rank is found at the next save or verified step."""

import copy
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.worker import rank_runner
from tests.worker.test_saver import IDENTITY, SHAPE, spec
from trainyard.contract.events import Event, RankInfo, Started, WarningEvent
from trainyard.contract.failpoints import arm, armed
from trainyard.contract.rundir import ArtifactDir
from trainyard.contract.status import Reason
from trainyard.worker.checkpoint import files, saver
from trainyard.worker.checkpoint.replicas import DigestSender, ReplicaCheck, corruption_error
from trainyard.worker.checkpoint.saver import Checkpointer
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.data.packing import Batch
from trainyard.worker.digest import COLUMNS, device_digest, tensor_digest
from trainyard.worker.distributed import DistributedContext, FloatRow
from trainyard.worker.errors import TrainingError
from trainyard.worker.training.metrics import MetricsProcessor, MetricsWindow
from trainyard.worker.training.startup import host_device, replica_check
from trainyard.worker.training.state import TrainProgress, TrainState, build_train_state, initial_model
from trainyard.worker.training.step import Verification, seed_dropout
from trainyard.worker.training.verify import StepVerifier

CPU = torch.device("cpu")


def flip(tensor: torch.Tensor, index: int, bit: int) -> None:
    """Flip one bit of one float32, as a fault of the memory does it."""
    tensor.detach().view(-1).view(torch.int32).numpy().view(np.uint32)[index] ^= np.uint32(1 << bit)


@pytest.mark.parametrize("words", [1, 5, COLUMNS - 1, COLUMNS, COLUMNS + 1, 3 * COLUMNS + 17])
def test_any_flipped_bit_changes_the_digest(words: int) -> None:
    tensor = torch.randn(words, generator=torch.Generator().manual_seed(words))
    before = int(tensor_digest(tensor))
    assert int(tensor_digest(tensor.clone())) == before
    chooser = random.Random(words)
    for _ in range(50):
        index, bit = chooser.randrange(words), chooser.randrange(32)
        flip(tensor, index, bit)
        assert int(tensor_digest(tensor)) != before
        flip(tensor, index, bit)
    assert int(tensor_digest(tensor)) == before


def test_flips_at_distances_of_memory_do_not_cancel() -> None:
    for distance in (1, 64, 1024, 16384, 2**18, COLUMNS - 1):
        tensor = torch.zeros(2**18 + 2)
        before = int(tensor_digest(tensor))
        flip(tensor, 1, 30)
        flip(tensor, 1 + distance, 30)
        assert int(tensor_digest(tensor)) != before


@pytest.mark.parametrize("words", [0, 3, COLUMNS, 10 * COLUMNS + 9])
def test_the_device_computes_the_same_digest_as_the_cpu(words: int) -> None:
    tensor = torch.randn(words, generator=torch.Generator().manual_seed(1))
    assert device_digest(tensor.view(torch.int32)) == tensor_digest(tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same_digest() -> None:
    tensor = torch.randn(3 * COLUMNS + 5)
    assert int(tensor_digest(tensor.cuda())) == int(tensor_digest(tensor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_digests_are_of_the_step() -> None:
    """An update that follows at once waits on the device until the weights are read."""
    model = torch.nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ranks = RecordingRanks(1, 2, 0, 1, torch.device("cuda", 0))
    sender = DigestSender(ranks, model, optimizer)
    for _ in range(20):
        expected = [int(tensor_digest(weight.cpu())) for weight in model.state_dict().values()]
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        sender.start()
        optimizer.step()
        sender.send(sender.read())
        assert ranks.sent.pop() == expected


@dataclass(frozen=True)
class RecordingRanks(DistributedContext):
    """Records what is sent."""

    sent: list[list[int]] = field(default_factory=list)

    def gather_in_background(self, numbers: list[int]) -> list[list[int]]:
        self.sent.append(numbers)
        return []


def test_an_update_waits_until_the_weights_are_read() -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ranks = RecordingRanks(1, 2, 0, 1, CPU)
    sender = DigestSender(ranks, model, optimizer)
    expected = [int(tensor_digest(weight)) for weight in model.state_dict().values()]
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    sender.start()
    update = threading.Thread(target=optimizer.step)
    update.start()
    update.join(0.05)
    assert update.is_alive(), "it waits"
    sender.send(sender.read())
    update.join(60)
    assert not update.is_alive()
    assert ranks.sent == [expected]
    assert [int(tensor_digest(weight)) for weight in model.state_dict().values()] != expected


class Exchange:
    """Gathers a value of each thread; a thread is a rank."""

    def __init__(self, world: int) -> None:
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class ThreadRanks(DistributedContext):
    """A rank that is a thread of this process."""

    exchanges: dict[str, Exchange] = field(default_factory=dict)

    def gather(self, row: FloatRow) -> list[FloatRow]:
        return self.exchanges["training"].gather(self.rank, row)

    def gather_objects(self, own: Any) -> list[Any]:
        return self.exchanges["training"].gather(self.rank, own)

    def gather_in_background(self, numbers: list[int]) -> list[list[int]]:
        return self.exchanges["background"].gather(self.rank, numbers)

    def broadcast_from_rank0(self, work: Callable[[], Any]) -> Any:
        message: Any = None
        if self.is_main_process:
            try:
                message = (work(), None)
            except TrainingError as error:
                message = (None, error)
        result, raised = self.exchanges["training"].gather(self.rank, message)[0]
        if raised is not None:
            raise raised
        return result


PLACES = [RankInfo(rank=rank, host=f"node-{rank}", device=f"cuda:{rank}", name="Card") for rank in range(3)]


class Run:
    """Ranks in threads, each with its own copy of the weights and a checkpointer."""

    def __init__(self, path: Path, world: int) -> None:
        self.world = world
        self.artifacts = ArtifactDir(path)
        self.emitted: list[Event] = []
        exchanges = {name: Exchange(world) for name in ("training", "background")}
        self.states: list[TrainState] = []
        self.savers: list[Checkpointer] = []
        self.metrics: list[MetricsProcessor] = []
        model = initial_model(SHAPE, 1, CPU)
        for rank in range(world):
            ranks = ThreadRanks(rank, world, rank, world, CPU, exchanges=exchanges)
            self.states.append(build_train_state(copy.deepcopy(model), spec().training, 0.0, _alone(rank)))
            self.metrics.append(MetricsProcessor(ranks, MetricsWindow(), 6.0, has_aux=False))
            check = ReplicaCheck(ranks, PLACES)
            self.savers.append(
                Checkpointer(spec(), self.artifacts, IDENTITY, 8, ranks, self.emitted.append, replicas=check)
            )

    def save(self, step: int) -> list[TrainingError]:
        """Save on all ranks, and return the error of each."""
        errors: list[TrainingError] = []

        def rank(number: int) -> None:
            own = self.savers[number]
            own.save(self.states[number], TrainProgress(step=step), self.metrics[number], required=False)
            try:
                own.wait()
            except TrainingError as error:
                errors.append(error)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return errors


def _alone(rank: int) -> DistributedContext:
    return DistributedContext(rank, 1, 0, 1, CPU)


def test_a_flipped_bit_is_found_50_times_of_50(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the writing of files is not tested here
    seed = int(os.environ.get("TRAINYARD_FLIP_SEED", time.time()))
    print(f"TRAINYARD_FLIP_SEED={seed}")
    chooser, found = random.Random(seed), 0
    run = Run(tmp_path, 3)
    for step in range(1, 51):
        rank = chooser.randrange(3)
        names = [name for name, _ in run.states[rank].model.named_parameters()]
        name = chooser.choice(names)
        weight = run.states[rank].model.get_parameter(name)
        index, bit = chooser.randrange(weight.numel()), chooser.randrange(32)
        flip(weight, index, bit)
        errors = run.save(step)
        flip(weight, index, bit)
        assert len(errors) == 3, "every rank ends"
        assert {error.reason for error in errors} == {Reason.SILENT_CORRUPTION}
        assert {error.rank for error in errors} == {rank}
        assert f"rank {rank} (host node-{rank}, cuda:{rank} Card) has other weights" in errors[0].message
        assert name in errors[0].message
        assert not run.artifacts.checkpoint(step).exists(), "the checkpoint is not published"
        assert not list(run.artifacts.out.glob("*.pth"))
        found += 1
    assert found == 50
    assert run.save(51) == [], "equal weights are saved"
    assert run.artifacts.checkpoint(51).exists()
    assert [event for event in run.emitted if isinstance(event, WarningEvent)] == []


def test_with_two_ranks_both_are_named() -> None:
    error = corruption_error(7, [[1, 2], [1, 3]], ["a", "b"], PLACES)
    assert error.message == (
        "silent corruption: rank 1 (host node-1, cuda:1 Card) has other weights at step 7 than "
        "rank 0 (host node-0, cuda:0 Card); it is not known which of them is right. They differ in b; "
        "the step was not saved"
    )
    assert error.rank is None, "the page of the job would call rank 1 the one at fault"


def test_the_advice_is_that_of_the_device() -> None:
    on_gpus = corruption_error(7, [[1], [2]], ["a"], PLACES)
    assert "nvidia-smi" in str(on_gpus.hint)
    on_cpus = corruption_error(7, [[1], [2]], ["a"], [each.model_copy(update={"device": "cpu"}) for each in PLACES])
    assert "nvidia-smi" not in str(on_cpus.hint)
    assert "ras-mc-ctl --errors" in str(on_cpus.hint)


def test_the_ranks_that_differ_from_most_are_named() -> None:
    error = corruption_error(7, [[9, 8], [1, 2], [1, 2]], ["a", "b"], PLACES)
    assert "rank 0 (host node-0, cuda:0 Card) has other weights at step 7 than the other 2 ranks" in error.message
    assert "They differ in a and 1 more tensors" in error.message
    assert error.rank == 0


def test_a_checkpoint_is_published_even_if_another_rank_has_died(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)

    def dead(_: list[int]) -> list[list[int]]:
        raise RuntimeError("Connection closed by peer [10.0.0.2]:41234")

    object.__setattr__(run.savers[0].replicas.ranks, "gather_in_background", dead)  # type: ignore[union-attr]
    assert run.save(3) == []
    assert run.artifacts.checkpoint(3).exists()
    [warning] = [event for event in run.emitted if isinstance(event, WarningEvent)]
    assert (warning.code, warning.step) == ("weights_not_compared", 3)
    assert "Connection closed by peer" in warning.message


def test_a_fault_is_reported_even_if_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, 3)
    weight = next(run.states[2].model.parameters())
    flip(weight, 0, 30)
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_checkpoint", full)
    assert {error.rank for error in run.save(1)} == {2}


def test_devices_of_different_types_are_not_compared() -> None:
    exchange = {"training": Exchange(1)}
    like = ThreadRanks(0, 2, 0, 1, CPU, exchanges=exchange)
    check, warnings = replica_check(like, PLACES)
    assert check is not None
    assert warnings == []

    class Unlike(ThreadRanks):
        def gather_objects(self, own: Any) -> list[Any]:
            return [own, ("Other card", *own[1:])]

    check, [warning] = replica_check(Unlike(0, 2, 0, 1, CPU), PLACES)
    assert check is None
    assert warning.code == "weights_not_compared"
    assert "Card with torch" in warning.message
    assert "Other card" in warning.message
    assert replica_check(_alone(0), PLACES) == (None, [])


@pytest.mark.parametrize(
    ("index", "visible", "expected"),
    [(0, None, "cuda:0"), (1, "2,5", "cuda:5"), (0, "GPU-abc", "cuda:0"), (2, "0", "cuda:2"), (0, " 3", "cuda:3")],
)
def test_a_rank_names_its_gpu_as_the_host_does(index: int, visible: str | None, expected: str) -> None:
    assert host_device(index, visible) == expected


def test_a_rank_names_its_gpu_as_the_service_does() -> None:
    assert host_device(1, "GPU-a,GPU-b", "cuda:2,cuda:5") == "cuda:5"


FLIPPED = "model.layers.1.mlp.down_proj.weight"


def flip_at(step: int) -> None:
    """Flip a bit of a weight of rank 1 before ``step``."""

    def before_step(trainer: Any, progress: Any) -> None:
        if trainer.ranks.rank == 1 and progress.step == step - 1:
            if trainer.state.split is None:
                flip(trainer.state.model.get_parameter(FLIPPED), 5, 13)
            else:  # zero1 gives all ranks the updated weights in each step, so only a flip after that stays
                arm("replicas.read", before_read)

    def before_read(model: Any) -> None:
        flip(model.get_parameter(FLIPPED), 5, 13)

    arm("train.step", before_step)


@pytest.mark.long
@pytest.mark.parametrize(
    ("saved_while_training", "parallelism"),
    [
        pytest.param(True, "ddp", marks=pytest.mark.long),
        (False, "ddp"),
        pytest.param(True, "zero1", marks=pytest.mark.long),
    ],
)
def test_a_run_with_a_flipped_bit_fails_and_resumes_from_the_save_before(
    saved_while_training: bool, parallelism: str, tmp_path: Path
) -> None:
    """The save at step 16 is not required, so training continues; without one, the last save finds the flip."""
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    interval = 8 if saved_while_training else 100
    described = rank_runner.spec(
        text,
        checkpoint={"save_interval": interval},
        training={"dtype": "float32"},
        resources={"parallelism": parallelism},
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    outcome = rank_runner.run_to_end(run, 2, partial(flip_at, 11))
    assert (outcome.outcome, outcome.reason) == ("failed", Reason.SILENT_CORRUPTION)
    assert outcome.error is not None
    assert outcome.error.rank is None, "one of two: it is not known which"
    assert outcome.error.hint is not None
    assert FLIPPED in outcome.error.message
    step = 16 if saved_while_training else 24
    assert f"rank 1 (host {os.uname().nodename}, cpu" in outcome.error.message
    assert f"other weights at step {step} than" in outcome.error.message
    assert rank_runner.saves(run) == ([8] if saved_while_training else [])
    assert not run.artifacts(None).checkpoint(step).exists()
    [started] = [event for event in rank_runner.events(run) if isinstance(event, Started)]
    assert [place.rank for place in started.ranks] == [0, 1]
    if saved_while_training:
        assert outcome.step < 24, "it does not wait for the next save"
        assert rank_runner.run_to_end(run, 2).outcome == "completed"
        assert rank_runner.saves(run, 2) == [16, 24]


class VerifiedStep:
    """A step of a small model in float32 on a few random rows, with its verifier."""

    def __init__(self, dropout: float = 0.0) -> None:
        config = replace(SHAPE, dropout=dropout)
        training = spec().training.model_copy(update={"dtype": "float32"})
        self.state = build_train_state(initial_model(config, 1, CPU), training, 0.0, _alone(0))
        self.verifier = StepVerifier(self.state.model, _alone(0), PLACES)
        generator = torch.Generator().manual_seed(3)
        self.micro_batches = [
            MicroBatch(Batch(rows, None, None, torch.randint(0, 32, (2, 8), generator=generator)), 1 / 32, (i,), 16)
            for i, rows in enumerate(torch.randint(0, 32, (2, 2, 8), generator=generator))
        ]

    def run(self, *, verified: bool) -> float:
        verification = Verification(self.verifier, 4) if verified else None
        pending = self.state.train_step.run(
            iter(self.micro_batches), 1e-2, partial(seed_dropout, 1, 4, 0), verification
        )
        return pending.read().loss_sum

    def bits(self) -> list[int]:
        return [int(tensor_digest(parameter)) for parameter in self.state.model.parameters()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_verified_step_is_the_same_step(dropout: float) -> None:
    plain, verified = VerifiedStep(dropout), VerifiedStep(dropout)
    for _ in range(3):
        assert plain.run(verified=False) == verified.run(verified=True)
    assert plain.bits() == verified.bits()


def test_a_bit_that_flips_within_a_verified_step_is_found_50_times_of_50() -> None:
    seed = int(os.environ.get("TRAINYARD_FLIP_SEED", time.time()))
    print(f"TRAINYARD_FLIP_SEED={seed}")
    chooser, step = random.Random(seed), VerifiedStep()
    names = [name for name, _ in step.state.model.named_parameters()]
    for round_ in range(50):
        name = chooser.choice(names)
        weight = step.state.model.get_parameter(name)
        index, bit, calls = chooser.randrange(weight.numel()), chooser.randrange(32), [0]
        when = 3 if round_ % 2 else 2  # in the second pass, or between the micro-batches of the first one

        def flip_once(*, calls: list[int] = calls, when: int = when, flipped: Any = (weight, index, bit)) -> None:
            calls[0] += 1
            if calls[0] == when:
                flip(*flipped)

        before = step.bits()
        with armed("step.micro_batch", flip_once), pytest.raises(TrainingError) as raised:
            step.run(verified=True)
        flip(weight, index, bit)
        assert step.bits() == before, "the update was not applied"
        assert raised.value.reason is Reason.SILENT_CORRUPTION
        assert (
            "rank 0 (host node-0, cuda:0 Card) computed different bits when the passes of step 4"
            in raised.value.message
        )
        assert raised.value.rank == 0
        step.state.optimizer.zero_grad()


def flip_gradient_in_second_pass() -> None:
    """Flip a bit of a gradient of rank 1 in the second pass of step 6."""
    passes = [0]

    def action(verifier: Any) -> None:
        passes[0] += 1
        if verifier.ranks.rank == 1 and passes[0] == 5:  # steps 2 and 4 were verified before
            verifier.model.get_parameter(FLIPPED).register_hook(FlippedOnce())

    arm("verify.pass_done", action)


class FlippedOnce:
    """Flips a bit of the first gradient that comes: that of a micro-batch."""

    def __init__(self) -> None:
        self.is_done = False

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        wrong = gradient.clone()
        if not self.is_done:
            flip(wrong, 7, 20)
        self.is_done = True
        return wrong


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["ddp", "zero1"])
def test_a_verified_run_names_the_rank_that_computes_wrongly(parallelism: str, tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    training = {"dtype": "float32", "verify_every": 2, "max_steps": 8}
    described = rank_runner.spec(
        text, checkpoint={"save_interval": 4}, training=training, resources={"parallelism": parallelism}
    )
    run = rank_runner.new_run(tmp_path / "run", described)
    outcome = rank_runner.run_to_end(run, 2, flip_gradient_in_second_pass)
    assert (outcome.outcome, outcome.reason, outcome.step) == ("failed", Reason.SILENT_CORRUPTION, 5)
    assert outcome.error is not None
    assert outcome.error.rank == 1
    assert f"rank 1 (host {os.uname().nodename}, cpu" in outcome.error.message
    assert f"the gradient of {FLIPPED}; the update was not applied" in outcome.error.message
    assert "rank 0" not in outcome.error.message
    assert rank_runner.saves(run) == [4]
    assert rank_runner.run_to_end(run, 2).outcome == "completed"
    described["training"] = {**described["training"], "verify_every": None}
    plain = rank_runner.new_run(tmp_path / "plain", described)
    rank_runner.run_to_end(plain, 2)
    assert dict(rank_runner.outputs(run)) == dict(rank_runner.outputs(plain)), "verification changes no bit"


@pytest.mark.long
def test_with_fsdp_there_is_nothing_to_compare_at_a_save_and_a_verified_step_finds_the_fault(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl")
    training = {"dtype": "float32", "verify_every": 2, "max_steps": 6}
    described = rank_runner.spec(text, training=training, resources={"parallelism": "fsdp"})
    run = rank_runner.new_run(tmp_path / "run", described)
    outcome = rank_runner.run_to_end(run, 2, wrong_loss_in_second_pass)
    assert (outcome.outcome, outcome.reason, outcome.step) == ("failed", Reason.SILENT_CORRUPTION, 3)
    assert outcome.error is not None
    assert "rank 0 (" in outcome.error.message, "its part of the exchanged gradient differs too"
    assert "rank 1 (" in outcome.error.message
    assert outcome.error.rank is None
    assert rank_runner.run_to_end(run, 2).outcome == "completed"


def wrong_loss_in_second_pass() -> None:
    """Flip a bit of rank 1's part of a weight between the passes of step 4."""
    passes = [0]

    def action(verifier: Any) -> None:
        passes[0] += 1
        if verifier.ranks.rank == 1 and passes[0] == 3:  # both of step 2 are done, and the first of step 4
            weight: Any = verifier.model.get_parameter(FLIPPED)
            flip(weight.to_local(), 3, 20)

    arm("verify.pass_done", action)
