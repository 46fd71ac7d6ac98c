"""The update split over ranks: the steps are those of DDP, whatever the number of ranks and the optimizer."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.live_memory import LiveMemory
from tests.worker.gloo_ranks import on_ranks
from tests.worker.test_step import SHAPE, cut, rows, unseeded
from trainyard.contract.spec import Parallelism, TrainingSpec
from trainyard.model import costs
from trainyard.model.config import ModelConfig
from trainyard.model.muon import newton_schulz
from trainyard.model.regions import element_offsets, matrix_offsets
from trainyard.worker.checkpoint.parts import Extent, ParameterPart, SavedTensor, layout
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.parallel import ShardedNewtonSchulz
from trainyard.worker.training.state import TrainState, build_train_state, initial_model

EXPERTS = ModelConfig(**{**vars(SHAPE), "use_moe": True, "num_experts": 3, "moe_intermediate_size": 24})
SPLIT: list[Parallelism] = ["zero1", "fsdp"]
MORE_OPTIONS = {
    "optimizer": "muon",
    "weight_decay": 20.0,
    "cautious_weight_decay": True,
    "weight_decay_schedule": "learning_rate",
    "embedding_lr_multiplier": 3.0,
    "norm_lr_multiplier": 0.5,
    "matrix_lr_multiplier": 2.0,
}


def test_a_layout_names_each_element_once() -> None:
    first: dict[str, Any] = {"a": ((4, 2), 0, 5), "step": ((), 0, 1)}
    found = layout([first, {"a": ((4, 2), 5, 8), "step": ((), 0, 1), "b": ((3,), 0, 3)}])
    assert list(found) == ["a", "b", "step"]
    assert found["a"] == SavedTensor((4, 2), [Extent(0, 0, 5), Extent(1, 5, 8)])
    assert found["b"].extents == [Extent(1, 0, 3)]
    assert found["step"].extents == [Extent(0, 0, 1)]
    with pytest.raises(ValueError, match="do not hold all of a"):
        layout([first])


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_matrices_are_in_one_region_each_and_the_regions_are_balanced(world: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    sizes = [random.Random(seed).randrange(1, 5000) for _ in range(40)]
    offsets, region = matrix_offsets(sizes, world)
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert all(offset // region == (end - 1) // region for offset, end in zip(offsets, ends, strict=True))
    assert region * world <= sum(sizes) + world * (max(sizes) + 64) + 64 * len(sizes)
    offsets, region = element_offsets(sizes, world)
    assert offsets[-1] + sizes[-1] <= region * world < offsets[-1] + sizes[-1] + 64 * (world + 1)
    for own in (offsets, matrix_offsets(sizes, world)[0]):
        spans = sorted((offset, offset + size) for offset, size in zip(own, sizes, strict=True))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(offset % 64 == 0 for offset in own)


def train_state(ranks: DistributedContext, shape: ModelConfig, parallelism: Parallelism, **training: Any) -> TrainState:
    spec = TrainingSpec.model_validate({"dtype": "float32", **training})
    model = initial_model(shape, spec.seed, ranks.device)
    return build_train_state(model, spec, shape.router_aux_loss_coef, ranks, parallelism=parallelism)


def own_share(ranks: DistributedContext, seed: int) -> list[MicroBatch]:
    """Two micro-batches of a step of 12 rows."""
    batch = rows(12, seed)
    own = batch[12 // ranks.world * ranks.rank : 12 // ranks.world * (ranks.rank + 1)]
    factor = ranks.world / batch.tokens
    return [replace(micro, factor=factor) for micro in cut(own, 6 // ranks.world)]


def losses_and_norms(
    ranks: DistributedContext, shape: ModelConfig, parallelism: Parallelism, training: dict[str, Any], poison: bool
) -> list[tuple[float, float, bool]]:
    state, found = train_state(ranks, shape, parallelism, **training), []
    for step in range(4):
        micros = own_share(ranks, step)
        if poison and step == 2 and ranks.rank == ranks.world - 1:
            micros[0] = replace(micros[0], factor=math.nan)
        metrics = state.train_step.run(micros, 1e-4, unseeded).read()
        sums = [sum(column) for column in zip(*ranks.gather([metrics.loss_sum, metrics.tokens]), strict=True)]
        found.append((sums[0] / sums[1], metrics.grad_norm, metrics.applied))
    return found


@pytest.mark.long
@pytest.mark.parametrize("parallelism", SPLIT)
@pytest.mark.parametrize(
    ("shape", "options", "world"),
    [(SHAPE, {"optimizer": "adamw"}, 2), (EXPERTS, {"optimizer": "muon"}, 3), (SHAPE, MORE_OPTIONS, 2)],
    ids=["adamw", "moe-muon", "muon-options"],
)
def test_steps_are_those_of_ddp(
    shape: ModelConfig, options: dict[str, Any], world: int, parallelism: Parallelism, tmp_path: Path
) -> None:
    """A bad gradient of one rank is in the third step: no rank applies it, and the fourth step continues."""
    training = {"on_nonfinite": "skip", "grad_clip": 0.5, "weight_decay_on": "matrices", **options}
    work, arguments = losses_and_norms, (training, True)
    expected = on_ranks(world, tmp_path / "ddp", work, shape, "ddp", *arguments)[0]
    assert [applied for *_, applied in expected] == [True, True, False, True]
    for found in on_ranks(world, tmp_path / parallelism, work, shape, parallelism, *arguments):
        for (loss, norm, applied), (expected_loss, expected_norm, expected_applied) in zip(
            found, expected, strict=True
        ):
            assert loss == pytest.approx(expected_loss, abs=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4, nan_ok=True)
            assert applied == expected_applied


def overflow(ranks: DistributedContext, parallelism: Parallelism) -> tuple[bool, float | None, bool]:
    state = train_state(ranks, SHAPE, parallelism, dtype="float16")
    state.scaler.load_state_dict({**state.scaler.state_dict(), "scale": 2.0**40})
    metrics = state.train_step.run(own_share(ranks, 1), 1e-3, unseeded).read()
    return metrics.applied, state.loss_scale(), isinstance(state.optimizer, torch.optim.AdamW)


@pytest.mark.long
@pytest.mark.parametrize("parallelism", SPLIT)
def test_an_overflow_lowers_the_scale_of_all_ranks(parallelism: Parallelism, tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "ranks", overflow, parallelism) == [(False, 2.0**39, True)] * 2


def orthogonal(ranks: DistributedContext, shapes: list[tuple[int, int]]) -> list[bool]:
    generator = torch.Generator().manual_seed(5)
    wholes = [torch.randn(*shape, generator=generator) for shape in shapes]
    parts, own = {}, []
    for whole in wholes:
        share = -(-len(whole) // ranks.world)
        local = torch.nn.Parameter(whole[ranks.rank * share : (ranks.rank + 1) * share])
        parts[local] = ParameterPart("x", tuple(whole.shape), ranks.rank * share * whole.shape[1], local)
        own.append(local)
    sharded, found = ShardedNewtonSchulz(parts, ranks), []
    for chunk in sharded.batches(own):
        found += sharded(chunk, [each.detach() for each in chunk])
    expected = [part.of(newton_schulz(whole)) for part, whole in zip(parts.values(), wholes, strict=True)]
    return [torch.equal(each, other) for each, other in zip(found, expected, strict=True)]


@pytest.mark.long
def test_rows_on_several_ranks_become_orthogonal_as_one_matrix(tmp_path: Path) -> None:
    """Also with rows that are no multiple of the ranks, fewer than them, and an incomplete last batch."""
    shapes = [(6, 4), (7, 5), (2, 9), (1, 3), (5, 5)]
    assert on_ranks(3, tmp_path / "ranks", orthogonal, shapes) == [[True] * 5] * 3


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's class is not annotated
    """Names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func._opname)  # noqa: SLF001
        return func(*args, **(kwargs or {}))


def collectives(ranks: DistributedContext, parallelism: Parallelism, micro_batches: int) -> dict[str, int]:
    state = train_state(ranks, SHAPE, parallelism)
    state.train_step.run(own_share(ranks, 1), 1e-4, unseeded)
    counted, micros = Collectives(), own_share(ranks, 2)
    with counted:
        state.train_step.run([micros[0]] * micro_batches, 1e-4, unseeded)
    return {name: counted.names.count(name) for name in sorted(set(counted.names))}


@pytest.mark.long
def test_accumulation_costs_zero1_no_communication(tmp_path: Path) -> None:
    found = [on_ranks(2, tmp_path / str(count), collectives, "zero1", count)[0] for count in (1, 4)]
    assert found[0] == found[1]
    # DDP's one bucket and the sum of the norms; the new weights. DDP broadcasts when it orders its buckets.
    assert (found[0]["allreduce_"], found[0]["_allgather_base_"]) == (2, 1)
    assert set(found[0]) <= {"allreduce_", "_allgather_base_", "broadcast_"}


@pytest.mark.long
def test_fsdp_gathers_each_layer_twice_a_micro_batch(tmp_path: Path) -> None:
    """Once for each pass; the embedding once. Gradients are split at once: whole ones would need the memory of DDP."""
    for count in (1, 4):
        (found, _) = on_ranks(2, tmp_path / str(count), collectives, "fsdp", count)
        gathers = sum(number for name, number in found.items() if "allgather" in name)
        reduces = sum(number for name, number in found.items() if "reduce_scatter" in name)
        assert gathers == count * (2 * SHAPE.num_hidden_layers + 1), found
        assert reduces == count * (SHAPE.num_hidden_layers + 1), found


BIG = ModelConfig(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=259,
    intermediate_size=160,
)
BIG_EXPERTS = ModelConfig(**{**vars(BIG), "use_moe": True, "num_experts": 4, "moe_intermediate_size": 96})


def bytes_per_rank(
    ranks: DistributedContext, shape: ModelConfig, parallelism: Parallelism, optimizer: str
) -> dict[str, int]:
    """Bytes of the storages of weights, gradients and optimizer state, just before the update and after it."""
    state = train_state(ranks, shape, parallelism, optimizer=optimizer)
    gradients: list[int] = []

    def storage_bytes(tensors: Any) -> int:
        local = [getattr(each, "_local_tensor", each).untyped_storage() for each in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in local}.values())

    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(storage_bytes(p.grad for p in state.model.parameters() if p.grad is not None))
    )
    state.train_step.run(own_share(ranks, 1), 1e-4, unseeded)
    moments = [value for one in state.optimizer.state.values() for value in one.values() if value.ndim]
    return {
        "weights": storage_bytes(state.model.parameters()),
        "gradients": gradients[0],
        "optimizer": storage_bytes(moments),
    }


@pytest.mark.long
@pytest.mark.parametrize("parallelism", SPLIT)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [BIG, BIG_EXPERTS], ids=["dense", "moe"])
def test_memory_of_each_rank_is_the_planned_one(
    shape: ModelConfig, optimizer: Any, parallelism: Parallelism, tmp_path: Path
) -> None:
    planned = costs.memory_bytes(
        shape, batch_size=1, seq_len=1, dtype="float32", optimizer=optimizer, parallelism=parallelism, world=2
    )
    gathered = costs.gathered_bytes(shape, "float32") if parallelism == "fsdp" else 0
    for found in on_ranks(2, tmp_path / "ranks", bytes_per_rank, shape, parallelism, optimizer):
        assert found["weights"] == pytest.approx(planned.weights - gathered, rel=0.1)
        assert found["gradients"] == pytest.approx(planned.gradients, rel=0.1)
        assert found["optimizer"] == pytest.approx(planned.optimizer, rel=0.1)


@pytest.mark.long
def test_matrices_that_do_not_fill_the_regions_are_in_the_plan(tmp_path: Path) -> None:
    """The regions have the size of the largest one: with few matrices, others are partly or wholly empty."""
    shape, world = replace(BIG, num_hidden_layers=1, vocab_size=61), 6
    planned = costs.memory_bytes(
        shape, batch_size=1, seq_len=1, dtype="float32", optimizer="muon", parallelism="zero1", world=world
    )
    assert planned.weights > 1.3 * 4 * costs.parameters(shape)
    found = on_ranks(world, tmp_path / "ranks", bytes_per_rank, shape, "zero1", "muon")
    assert [each["weights"] for each in found] == pytest.approx([planned.weights] * world, rel=0.05)
    assert max(each["optimizer"] for each in found) == pytest.approx(planned.optimizer, rel=0.05)


def peak_bytes(ranks: DistributedContext, parallelism: Parallelism, recomputes: bool, dtype: str) -> int:
    """The peak of the third step: the first one allocates moments, and in the second one DDP orders its buckets."""
    state = train_state(ranks, TALL, parallelism, gradient_checkpointing=recomputes, dtype=dtype)
    micros = [replace(micro, factor=1.0) for micro in cut(rows(8, ranks.rank, 128), 8)]
    for _ in range(2):
        state.train_step.run(micros, 1e-4, unseeded)
    parameters = list(state.model.parameters())
    held = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    held += [value for one in state.optimizer.state.values() for value in one.values()]
    memory = LiveMemory(held)
    with memory:
        state.train_step.run(micros, 1e-4, unseeded)
    return memory.peak


TALL = replace(SHAPE, hidden_size=128, head_dim=32, num_hidden_layers=6, intermediate_size=384)


@pytest.mark.long
@pytest.mark.parametrize("parallelism", ["ddp", *SPLIT])
@pytest.mark.parametrize(("recomputes", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_the_peak_of_a_step_is_the_planned_one(
    recomputes: bool, dtype: Any, parallelism: Parallelism, tmp_path: Path
) -> None:
    """With gathered layers, and with temporary buffers, which the plan does not include."""
    planned = costs.memory_bytes(
        TALL,
        batch_size=8,
        seq_len=128,
        dtype=dtype,
        gradient_checkpointing=recomputes,
        parallelism=parallelism,
        world=2,
    )
    for found in on_ranks(2, tmp_path / "ranks", peak_bytes, parallelism, recomputes, dtype):
        print(f"{found:,} bytes, planned {planned.total:,}")
        assert found == pytest.approx(planned.total, rel=0.1)
