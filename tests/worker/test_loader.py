"""A rank's rows, its micro-batches, and the factor of each."""

import torch

from trainyard.worker.data.loader import LossScale, rank_slice, split_microbatches


def test_shares_cover_a_step_and_factors_undo_the_mean_over_ranks() -> None:
    rows = torch.arange(11).numpy()
    shares = [rank_slice(rows, rank, 4).tolist() for rank in range(4)]
    assert [row for share in shares for row in share] == rows.tolist()
    assert {len(share) for share in shares} == {2, 3}
    assert [part.tolist() for part in split_microbatches(rows[:5], 2)] == [[0, 1], [2, 3], [4]]
    assert [part.tolist() for part in split_microbatches(rows[:0], 2)] == [[]]
    assert LossScale(world=2, tokens=100, micro_batches=None).factor(7) == 2 / 100
    assert LossScale(world=2, tokens=None, micro_batches=4).factor(50) == 2 / (4 * 50)
    assert LossScale(world=2, tokens=None, micro_batches=4).factor(0) == 2 / 4
