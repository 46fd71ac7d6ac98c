import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from trainyard.contract.spec import TrainingSpec
from trainyard.model.config import ModelConfig
from trainyard.model.decoder import Decoder
from trainyard.worker.data.microbatch import MicroBatch
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.nonfinite import NonFiniteCounters
from trainyard.worker.training.state import TrainState, build_train_state, initial_model
from trainyard.worker.training.step import StepMetrics, seed_dropout

SHAPE = ModelConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=61,
    intermediate_size=64,
)
ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.input_ids[part], self.labels[part], self.position_ids[part])

    @property
    def tokens(self) -> int:
        return int((self.labels != -100).sum())


def rows(count: int, seed: int, length: int = 12) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (count, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for row in range(count):
        labels[row, int(torch.randint(4, length + 1, (1,), generator=generator)) :] = -100
    return Rows(ids[:, :-1], labels, torch.arange(length).expand(count, length))


def train_state(shape: ModelConfig = SHAPE, **training: object) -> TrainState:
    spec = TrainingSpec.model_validate({"dtype": "float32", **training})
    return build_train_state(initial_model(shape, spec.seed, CPU), spec, shape.router_aux_loss_coef, ALONE)


def cut(batch: Rows, size: int) -> list[MicroBatch]:
    parts = [batch[i : i + size] for i in range(0, len(batch.input_ids), size)]
    return [MicroBatch(part, 1 / batch.tokens, tokens=part.tokens) for part in parts]


def unseeded(_: int) -> None:
    """No dropout, nothing to seed."""


def run(student: TrainState, batches: list[list[MicroBatch]], rate: float = 1e-2) -> list[StepMetrics]:
    return [student.train_step.run(micros, rate, unseeded).read() for micros in batches]


def test_a_step_equals_a_plain_implementation() -> None:
    batch, ours, plain = rows(6, seed=1), train_state(grad_clip=0.5), initial_model(SHAPE, 42, CPU)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        logits = plain(batch.input_ids, logits=True).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        result = ours.train_step.run(cut(batch, 6), 1e-2, unseeded).read()
        assert result.loss_sum / result.tokens == pytest.approx(loss.item(), abs=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for (name, mine), theirs in zip(ours.model.named_parameters(), plain.parameters(), strict=True):
        # On the whole: AdamW turns the rounding noise of a gradient near zero into a step of any size.
        assert (mine - theirs).abs().mean() < 1e-6, name


@pytest.mark.parametrize("use_moe", [False, True])
def test_the_split_into_micro_batches_does_not_matter(use_moe: bool) -> None:
    shape = ModelConfig(
        **{**vars(SHAPE), "use_moe": use_moe, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.05}
    )
    whole, halves, singles = (train_state(shape) for _ in range(3))
    data = [rows(8, seed) for seed in range(4)]
    # A small rate: AdamW turns the rounding noise of a gradient near zero into a whole step of the rate.
    expected = run(whole, [cut(batch, 8) for batch in data], rate=1e-5)
    for student, size in ((halves, 4), (singles, 1)):
        for mine, theirs in zip(run(student, [cut(batch, size) for batch in data], rate=1e-5), expected, strict=True):
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            assert mine.loss_sum / mine.tokens == pytest.approx(theirs.loss_sum / theirs.tokens, abs=1e-5)
            assert mine.aux_sum / mine.tokens == pytest.approx(theirs.aux_sum / theirs.tokens, abs=1e-5)
        for mine_p, theirs_p in zip(student.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.allclose(mine_p, theirs_p, atol=1e-5)


def test_clipping_limits_and_zero_only_measures() -> None:
    batch = rows(4, seed=3)
    free, clipped = train_state(grad_clip=0.0), train_state(grad_clip=1e-3)
    norms = [student.train_step.run(cut(batch, 4), 0.0, unseeded).read().grad_norm for student in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3
    unclipped = free.optimizer.state[free.model.lm_head.weight]["exp_avg"]
    small = clipped.optimizer.state[clipped.model.lm_head.weight]["exp_avg"]
    assert torch.allclose(small * (norms[0] / 1e-3), unclipped, rtol=1e-3, atol=1e-8)


def poisoned(batch: Rows, model: Decoder) -> Callable[[], None]:
    weight = model.model.norm.weight

    def undo() -> None:
        with torch.no_grad():
            weight[0] = 1.0

    with torch.no_grad():
        weight[0] = float("nan")
    return undo


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    batch, student = rows(4, seed=5), train_state()
    student.train_step.run(cut(batch, 4), 1e-2, unseeded)
    undo = poisoned(batch, student.model)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    moments = student.optimizer.state[student.model.lm_head.weight]["exp_avg"].clone()
    micros = [MicroBatch(batch[i : i + 2], 0.1, rows=(10 * i, 10 * i + 1), tokens=3) for i in (0, 2)]
    result = student.train_step.run(micros, 1e-2, unseeded).read()
    assert not result.finite
    assert not result.applied
    assert math.isnan(result.grad_norm)
    assert result.nonfinite_rows == (0, 1, 20, 21)
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, before[name]) or value.isnan().any(), name
    assert torch.equal(student.optimizer.state[student.model.lm_head.weight]["exp_avg"], moments)
    undo()
    student.train_step.guard.reset(NonFiniteCounters())
    assert student.train_step.run(cut(batch, 4), 1e-2, unseeded).read().applied


def test_fp16_skips_overflows_by_itself_and_learns_a_scale() -> None:
    batch, student = rows(4, seed=6), train_state(dtype="float16")
    student.scaler.load_state_dict({**student.scaler.state_dict(), "scale": 2.0**40})
    before = student.model.lm_head.weight.clone()
    first = student.train_step.run(cut(batch, 4), 1e-2, unseeded).read()
    assert not first.applied
    assert first.nonfinite_rows == ()
    assert student.loss_scale() == 2.0**39
    assert torch.equal(student.model.lm_head.weight, before)
    student.scaler.load_state_dict({**student.scaler.state_dict(), "scale": 2.0**10})
    losses = [student.train_step.run(cut(batch, 4), 1e-2, unseeded).read() for _ in range(30)]
    assert all(result.applied for result in losses)
    assert losses[-1].loss_sum < 0.5 * losses[0].loss_sum


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_and_moments_stay_float32(dtype: str) -> None:
    student = train_state(dtype=dtype)
    student.train_step.run(cut(rows(2, seed=7), 2), 1e-3, unseeded)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert {m["exp_avg"].dtype for m in student.optimizer.state.values()} == {torch.float32}


def test_a_batch_without_labels_gives_zero_gradients_for_every_parameter() -> None:
    shape = replace(SHAPE, use_moe=True)
    student, batch = train_state(shape), rows(1, seed=8)
    student.train_step.warm_up(
        MicroBatch(Rows(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids), 1.0)
    )
    assert all(p.grad is None for p in student.model.parameters())
    empty = Rows(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids)
    result = student.train_step.run([MicroBatch(empty, 1.0)], 0.0, unseeded).read()
    assert (result.grad_norm, result.loss_sum, result.tokens) == (0.0, 0.0, 0)
    assert len(student.optimizer.state) == len(list(student.model.parameters()))


def test_dropout_depends_on_seed_step_rank_and_micro_batch_alone() -> None:
    def draw(*place: int) -> list[float]:
        seed_dropout(*place)
        drawn: list[float] = torch.rand(4).tolist()
        return drawn

    places = [(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 4, 4), (1, 3, 3, 4), (2, 2, 3, 4), (1, 2, 4, 3)]
    drawn = [draw(*place) for place in places]
    assert drawn == [draw(*place) for place in places]
    assert len({tuple(values) for values in drawn}) == len(places)


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = initial_model(SHAPE, 7, CPU)
    torch.manual_seed(2)
    same, other = initial_model(SHAPE, 7, CPU), initial_model(SHAPE, 8, CPU)
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_each_group_has_its_learning_rate() -> None:
    """With AdamW every weight of the first step moves by the rate, so its change shows the multiplier."""
    shape = replace(SHAPE, tie_word_embeddings=False)
    names = ("embedding", "head", "matrix", "norm")
    multipliers = {f"{name}_lr_multiplier": factor for name, factor in zip(names, (2.0, 4.0, 0.5, 8.0), strict=True)}
    for optimizer in ("adamw", "muon"):
        student = train_state(shape, optimizer=optimizer, weight_decay=0.0, grad_clip=0.0, **multipliers)
        plain = train_state(shape, optimizer=optimizer, weight_decay=0.0, grad_clip=0.0)
        before = {name: tensor.clone() for name, tensor in student.model.named_parameters()}
        for each in (student, plain):
            run(each, [cut(rows(6, seed=1), 6)], rate=1e-4)
        for (name, own), other in zip(student.model.named_parameters(), plain.model.parameters(), strict=True):
            kind = (
                "embedding" if "embed" in name else "head" if "head" in name else "norm" if own.ndim < 2 else "matrix"
            )
            expected = multipliers[f"{kind}_lr_multiplier"] * (other - before[name])
            torch.testing.assert_close(own - before[name], expected, rtol=1e-3, atol=2e-7, msg=f"{optimizer} {name}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_weight_decay_follows_the_rate(optimizer: str) -> None:
    def decays(rate: float, schedule: str) -> list[float]:
        student = train_state(
            optimizer=optimizer,
            learning_rate=1e-2,
            weight_decay=0.5,
            weight_decay_on="matrices",
            weight_decay_schedule=schedule,
        )
        run(student, [cut(rows(6, seed=1), 6)] * 2, rate=rate)
        return sorted({group["weight_decay"] for group in student.optimizer.param_groups})

    assert decays(1e-2, "learning_rate") == decays(5e-3, "constant") == [0.0, 0.5]
    assert decays(5e-3, "learning_rate") == [0.0, 0.25]
    assert decays(0.0, "learning_rate") == [0.0]


@pytest.mark.parametrize("use_moe", [False, True])
def test_zero_init_projections_changes_no_other_weight(use_moe: bool) -> None:
    shape = replace(SHAPE, use_moe=use_moe)
    drawn = initial_model(shape, 7, CPU)
    zeroed = initial_model(shape, 7, CPU, zero_init_projections=True)
    for (name, tensor), other in zip(zeroed.named_parameters(), drawn.parameters(), strict=True):
        is_output = "o_proj" in name or "down_proj" in name
        assert torch.equal(tensor, torch.zeros_like(other) if is_output else other), name
    batch = rows(4, seed=1)
    # The layers add nothing: the logits are those of the embedding alone.
    normed = zeroed.model.norm(zeroed.model.embed_tokens(batch.input_ids), torch.float32)
    assert torch.equal(zeroed(batch.input_ids).logits, zeroed.lm_head(normed))
    first = run(train_state(shape, zero_init_projections=True), [cut(batch, 4)] * 3)
    assert first[0].finite
    assert first[-1].loss < first[0].loss


def test_with_cuda_graphs_gradients_have_their_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph reuses the memory of its outputs at the next micro-batch, also that of a gradient in ``.grad``."""
    batches = [cut(rows(6, seed=step), 2) for step in range(2)]
    plain, graphs = train_state(), train_state()
    graphs = replace(graphs, train_step=replace(graphs.train_step, replays_graphs=True))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    weight: Any = graphs.model.lm_head.weight
    memory: list[int | None] = []
    weight.register_hook(lambda _: memory.append(weight.grad.data_ptr() if weight.grad is not None else None))
    expected = run(plain, batches)
    graphs.train_step.warm_up(batches[0][0])
    assert run(graphs, batches) == expected
    assert len(memory) == 7, "each micro-batch"
    assert len(set(memory)) == 1, "a backward pass found no gradient, or another one"
    assert None not in memory
    assert torch.equal(weight, plain.model.lm_head.weight)
