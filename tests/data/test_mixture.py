"""The order of a weighted mixture: shares at every prefix, passes, and the same rows as a slow reference."""

import random
from fractions import Fraction

import numpy as np
import pytest

from tests.work import count_calls
from trainyard.worker.data.mixture import (
    PERIOD,
    MixturePattern,
    MixtureSampler,
    row_parts,
    source_pattern,
    source_seed,
)
from trainyard.worker.data.sampler import FeistelPermutation

SEEDS = range(6)


def random_parts(seed: int, period: int) -> list[int]:
    rng = random.Random(seed)
    weights = [10 ** rng.uniform(-6, 0) for _ in range(rng.randint(1, 5))]
    print("seed", seed, "weights", weights)
    return row_parts(weights, [rng.uniform(1, 500) for _ in weights], period)


def sampler(parts: list[int], sizes: tuple[int, ...], batch: int, seed: int = 42) -> MixtureSampler:
    return MixtureSampler(sum(sizes), batch, seed, sizes, MixturePattern(source_pattern(parts), len(parts)))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_prefix_has_the_share_of_each_source_within_one_row(seed: int) -> None:
    parts = random_parts(seed, 1 << 13)
    pattern = source_pattern(parts)
    taken = np.cumsum([pattern == source for source in range(len(parts))], axis=1)
    exact = np.outer(parts, np.arange(1, len(pattern) + 1))
    # In integers: |taken - n * part / period| < 1
    assert (np.abs(taken * len(pattern) - exact) < len(pattern)).all()
    assert taken[:, -1].tolist() == parts


def test_equal_sources_are_spread_evenly() -> None:
    pattern = source_pattern([2, 2, 2, 2]).tolist()
    assert sorted(pattern[:4]) == sorted(pattern[4:]) == [0, 1, 2, 3]


def test_the_full_period_keeps_the_smallest_weight() -> None:
    parts = row_parts([1e-6, 1.0], [1.0, 1.0])
    assert parts == [1, PERIOD - 1]
    pattern = source_pattern(parts)
    assert int((pattern == 0).sum()) == 1


def test_weights_are_shares_of_tokens_not_of_rows() -> None:
    parts = row_parts([0.5, 0.5], [100.0, 300.0])
    assert sum(parts) == PERIOD
    assert Fraction(parts[0] * 100, parts[1] * 300) == pytest.approx(1.0, abs=1e-5)


def reference_rows(parts: list[int], sizes: tuple[int, ...], seed: int, count: int) -> list[int]:
    """The first ``count`` rows by the definition, one at a time: earliest deadline first, then the row of its pass."""
    sources, total = len(parts), sum(parts)
    bound = Fraction(1, max(2, 2 * sources - 2))
    taken, rows = [0] * sources, []
    for position in range(1, count + 1):
        shares = [Fraction(part, total) for part in parts]
        ready = [s for s in range(sources) if shares[s] * position - taken[s] >= bound]
        deadlines = {s: -(-(taken[s] + 1 - bound) // shares[s]) for s in ready}
        source = min(ready, key=lambda s: (deadlines[s], s))
        number, index = divmod(taken[source], sizes[source])
        permutation = FeistelPermutation(sizes[source], source_seed(seed, source), number)
        rows.append(sum(sizes[:source]) + int(permutation([index])[0]))
        taken[source] += 1
    return rows


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_equal_those_of_a_slow_reference(seed: int) -> None:
    rng = random.Random(seed)
    parts = random_parts(seed, 500)
    sizes = tuple(rng.choice((1, 2, 7, 40)) for _ in parts)
    batch = rng.randint(1, 9)
    steps = -(-1200 // batch)  # more than two periods
    mine = [row for step in range(1, steps + 1) for row in sampler(parts, sizes, batch, seed).rows_of(step).tolist()]
    assert mine == reference_rows(parts, sizes, seed, steps * batch)


def test_each_pass_of_a_small_source_is_another_permutation() -> None:
    order = sampler([1, 3], (20, 1000), 8)
    rows = np.concatenate([order.rows_of(step) for step in range(1, 31)])
    small = rows[rows < 20].tolist()
    passes = [small[start : start + 20] for start in (0, 20, 40)]
    assert [sorted(one) for one in passes] == [list(range(20))] * 3
    assert len({tuple(one) for one in passes}) == 3
    assert order.passes(30) == [60 / 20, 180 / 1000]


def test_a_late_step_costs_no_replay() -> None:
    order = sampler(row_parts([0.7, 0.2, 0.1], [1.0, 1.0, 1.0], 1 << 12), (10**7, 10**6, 10), 256)
    rows = order.rows_of(10**9)
    assert len(rows) == 256
    assert int((rows < 10**7).sum()) in (179, 180)


@pytest.mark.parametrize("seed", range(8))
def test_steps_until_some_tokens_are_those_that_counting_gives(seed: int) -> None:
    chooser = random.Random(seed)
    print(f"seed {seed}")
    sizes = tuple(chooser.randint(1, 40) for _ in range(chooser.randint(1, 4)))
    parts = [chooser.randint(1, 30) for _ in sizes]
    order = sampler(parts, sizes, chooser.randint(1, 9), seed)
    targets = np.array([chooser.randint(1, 50) for _ in range(sum(sizes))])
    for _ in range(5):
        data_step, tokens = chooser.randint(0, 50), chooser.randint(0, 12_000)
        steps, predicted = 0, 0
        while predicted < tokens:
            steps += 1
            predicted += int(targets[order.rows_of(data_step + steps)].sum())
        assert order.steps_until(tokens, data_step, targets.__getitem__) == steps


def test_steps_until_many_tokens_are_not_counted_one_by_one() -> None:
    plan = sampler([3, 1], (30, 20), 8)
    assert plan.steps_until(2**53, 5, np.ones_like) == 2**53 // 8
    assert count_calls(lambda: plan.steps_until(2**53, 5, np.ones_like)) < 50_000
