"""The loss on held-out rows: a sum over all ranks, each of which runs its share."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from contract.failpoints import hit
from worker.distributed import Ranks
from worker.feed import cut, on_device, own_share
from worker.rows import Batch, RowTable
from worker.step import forward
from worker.trainee import Trainee


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
        was_training = trainee.model.training
        trainee.model.eval()
        try:
            own = self._own_sum(trainee)
        finally:
            trainee.model.train(was_training)
        sums = [sum(column) for column in zip(*self.ranks.gather(own), strict=True)]
        loss = sums[0] / max(1.0, sums[1])
        return loss if math.isfinite(loss) else None

    @torch.no_grad()
    def _own_sum(self, trainee: Trainee) -> list[float]:
        """[summed loss, tokens] of this rank's share. Every rank cuts alike, so sums do not depend on who runs what."""
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        tokens = 0
        for batch in self._batches():
            with trainee.precision.autocast():
                total += forward(trainee.model, batch).loss_sum
            tokens += int((batch.labels != -100).sum())
        return [float(total), float(tokens)]

    def _batches(self) -> Iterator[Batch]:
        share = own_share(np.arange(len(self.table)), self.ranks.rank, self.ranks.world)
        for index, part in enumerate(cut(share, self.batch_size)):
            hit("evaluation.batch", index)
            yield on_device(self.table.batch(part), self.ranks.device)
