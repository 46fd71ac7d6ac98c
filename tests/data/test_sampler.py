"""The order of rows: a permutation for every size, each row once an epoch, shares that partition each step."""

from dataclasses import dataclass
from functools import partial
from typing import cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.work import count_calls
from trainyard.worker.data import sampler
from trainyard.worker.data.loader import MicroBatchLoader, Normalization, rank_slice, split_microbatches
from trainyard.worker.data.packing import PackedDataset
from trainyard.worker.data.sampler import FeistelPermutation, StepSampler
from trainyard.worker.distributed import DistributedContext


def order(rows: int, global_batch: int, seed: int = 42) -> StepSampler:
    return StepSampler(rows, global_batch, seed)


@dataclass(frozen=True)
class Table:
    """Rows of which only the number of their targets matters."""

    targets: npt.NDArray[np.int32]

    def targets_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return self.targets[rows]

    def batch(
        self, part: npt.NDArray[np.int64], min_rows: int, *, fixed_offsets: bool = False
    ) -> npt.NDArray[np.int64]:
        return part


def feed(
    plan: StepSampler,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 4,
    normalization: Normalization = "global_tokens",
) -> MicroBatchLoader:
    ranks = DistributedContext(rank, world, rank, world, torch.device("cpu"))
    return MicroBatchLoader(
        cast(PackedDataset, Table(np.arange(1, plan.rows + 1, dtype=np.int32))), plan, ranks, batch_size, normalization
    )


def test_permutation_is_bijective_for_every_size() -> None:
    for size in range(1, 5001):
        found = FeistelPermutation(size, seed=size, epoch=size % 7)(np.arange(size))
        assert np.array_equal(np.sort(found), np.arange(size)), size


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 10**6 + 3])
def test_permutation_is_bijective_for_large_sizes(size: int) -> None:
    found = FeistelPermutation(size, 1, 2)(np.arange(size))
    seen = np.zeros(size, dtype=np.bool_)
    seen[found] = True
    assert seen.all()


@settings(deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**32 - 1), st.integers(0, 1000), st.lists(st.integers(0, 2**40)))
def test_permutation_stays_inside_and_apart(size: int, seed: int, epoch: int, positions: list[int]) -> None:
    positions = sorted({position % size for position in positions})
    found = FeistelPermutation(size, seed, epoch)(np.array(positions, dtype=np.int64))
    assert len(set(found.tolist())) == len(positions)
    assert all(0 <= value < size for value in found.tolist())


def test_permutation_looks_random() -> None:
    """Position and value are uncorrelated, neighbours are far apart, and each value is equally likely at each place."""
    size = 20_000
    found = FeistelPermutation(size, 3, 0)(np.arange(size))
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.03
    assert np.abs(np.diff(found)).mean() == pytest.approx(size / 3, rel=0.03)
    first = np.array([FeistelPermutation(10, seed, 0)(np.array([0]))[0] for seed in range(5000)])
    assert np.bincount(first, minlength=10) == pytest.approx(np.full(10, 500), abs=110)


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {
        tuple(FeistelPermutation(50, seed, epoch)(np.arange(50)).tolist()) for seed in range(20) for epoch in range(20)
    }
    assert len(orders) == 400


FIRST = [12, 16, 7, 10, 18, 4, 11, 17, 8, 0, 15, 5, 19, 1, 14, 2, 9, 13, 6, 3]
SECOND = [9, 4, 18, 13, 14, 19, 16, 1, 15, 10, 17, 2, 8, 11, 5, 0, 7, 6, 12, 3]


def test_order_is_the_same_for_ever() -> None:
    """A resume of an old run depends on these numbers: a change of them is a change of format."""
    assert FeistelPermutation(20, 42, 0)(np.arange(20)).tolist() == FIRST
    assert FeistelPermutation(20, 42, 1)(np.arange(20)).tolist() == SECOND


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_every_row_stands_exactly_once_in_an_epoch(rows: int, global_batch: int, epoch: int) -> None:
    plan = order(rows, global_batch)
    first = epoch * plan.steps_per_epoch + 1
    steps = range(first, first + plan.steps_per_epoch)
    assert {plan.epoch_of(step) for step in steps} == {epoch}
    taken = np.concatenate([plan.rows_of(step) for step in steps])
    assert sorted(taken.tolist()) == list(range(rows))
    assert all(len(plan.rows_of(step)) == global_batch for step in steps[:-1])
    assert plan.steps_per_epoch == -(-rows // global_batch)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 9), st.integers(1, 10), st.integers(1, 30))
def test_shares_partition_the_step(rows: int, global_batch: int, world: int, batch_size: int, step: int) -> None:
    plan = order(rows, global_batch)
    shares = [rank_slice(plan.rows_of(step), rank, world) for rank in range(world)]
    assert np.concatenate(shares).tolist() == plan.rows_of(step).tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for share in shares:
        micro = list(split_microbatches(share, batch_size))
        assert np.concatenate(micro).tolist() == share.tolist()
        assert len(micro) == max(1, -(-len(share) // batch_size))
        assert all(len(part) == batch_size for part in micro[:-1])


def test_a_step_takes_the_same_rows_on_any_number_of_ranks() -> None:
    plan = order(1000, 48)
    for step in (1, 7, 21, 22, 500):
        rows = plan.rows_of(step)
        taken = [sorted(np.concatenate([rank_slice(rows, r, w) for r in range(w)]).tolist()) for w in range(1, 9)]
        assert all(of_world == sorted(rows.tolist()) for of_world in taken)


def test_tokens_of_a_step_are_those_of_its_rows() -> None:
    plan = order(100, 16)
    fed = feed(plan)
    for step in (1, 7, 8):
        assert fed.tokens(step) == sum(row + 1 for row in plan.rows_of(step).tolist())
    assert sum(fed.tokens(step) for step in range(1, 8)) == 100 * 101 // 2


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 100), st.integers(1, 40), st.integers(1, 8), st.integers(1, 10), st.integers(1, 30))
def test_all_ranks_together_train_each_token_of_a_step_once(
    rows: int, global_batch: int, world: int, batch_size: int, step: int
) -> None:
    """The sum over ranks of factor x tokens, divided by the world as DDP does, is 1: a mean over the step's tokens.

    MiniMind's way it is the share of micro-batches that predict anything, each of which counts the same.
    """
    plan = order(rows, global_batch)
    for normalization in ("global_tokens", "micro_batch_mean"):
        feeds = [feed(plan, rank, world, batch_size, normalization) for rank in range(world)]
        micros = [list(fed.microbatches(step)) for fed in feeds]
        assert all(micros), "each rank takes part in each step"
        together = [micro for of_rank in micros for micro in of_rank]
        assert [row for micro in together for row in micro.rows] == plan.rows_of(step).tolist()
        assert sum(micro.tokens for micro in together) == feeds[0].tokens(step)
        weight = sum(micro.factor * micro.tokens for micro in together) / world
        assert weight == pytest.approx(1.0)
        if normalization == "micro_batch_mean":
            assert len({round(micro.factor * micro.tokens, 9) for micro in together if micro.rows}) == 1


def test_epochs_done() -> None:
    plan = order(100, 16)
    assert plan.steps_per_epoch == 7
    assert [plan.epochs_done(step) for step in (0, 1, 6, 7, 8, 14)] == pytest.approx([0, 0.16, 0.96, 1, 1.16, 2])


def test_a_late_step_costs_what_an_early_one_does() -> None:
    plan = StepSampler(10**7, 512, 1)
    for step in (1, 10**3, 10**6, 10**9):
        assert len(plan.rows_of(step)) in (512, 10**7 % 512)
        assert count_calls(partial(plan.rows_of, step)) < 500


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 60),
    global_batch=st.integers(1, 20),
    data_step=st.integers(0, 12),
    tokens=st.integers(-3, 900),
    chunk=st.sampled_from([1, 7, 1 << 18]),
)
def test_steps_until_some_tokens_are_those_that_counting_gives(
    rows: int, global_batch: int, data_step: int, tokens: int, chunk: int
) -> None:
    plan = order(rows, global_batch)
    fed, steps, predicted = feed(plan), 0, 0
    while predicted < tokens:
        steps += 1
        predicted += fed.tokens(data_step + steps)
    with mock.patch.object(sampler, "MAX_ROWS_COUNTED", chunk):
        assert plan.steps_until(tokens, data_step, fed.dataset.targets_of) == steps


def test_steps_until_counts_whole_epochs_at_once() -> None:
    plan = StepSampler(100, 16, 1)
    # 4 steps of 52 rows to the end of the epoch, then whole epochs, then 3 steps for the last 40.
    assert plan.steps_until(2**53, 3, np.ones_like) == 4 + 7 * ((2**53 - 52) // 100) + 3
    assert count_calls(lambda: plan.steps_until(2**53, 3, np.ones_like)) < 2_000
