"""The loss on held-out rows: a sum over all ranks, each of which runs its share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainyard.contract.failpoints import hit
from trainyard.worker.distributed import Ranks
from trainyard.worker.feed import cut, on_device, own_share
from trainyard.worker.rows import Batch, RowTable
from trainyard.worker.trainee import Trainee


@dataclass(frozen=True)
class Evaluation:
    """The held-out rows and how many are run at once."""

    table: RowTable
    ranks: Ranks
    batch_size: int

    def loss(self, trainee: Trainee) -> float | None:
        """Mean cross-entropy over every held-out token, without dropout; None where it is not finite.

        All ranks call it together and get the same number.
        """
        loss_sum, tokens = trainee.loss_sum(self._batches())
        sums = [sum(column) for column in zip(*self.ranks.gather([loss_sum, float(tokens)]), strict=True)]
        loss = sums[0] / max(1.0, sums[1])
        return loss if math.isfinite(loss) else None

    def _batches(self) -> Iterator[Batch]:
        """Yield the share of this rank. All ranks split alike, so sums do not depend on which rank runs which rows."""
        share = own_share(np.arange(len(self.table)), self.ranks.rank, self.ranks.world)
        for index, part in enumerate(cut(share, self.batch_size)):
            hit("evaluation.batch", index)
            yield on_device(self.table.batch(part), self.ranks.device)
