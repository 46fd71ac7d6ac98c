"""The loss on held-out rows: a sum over all ranks, each of which runs its share."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainyard.contract.events import Sample
from trainyard.contract.failpoints import hit
from trainyard.model.decoder import Decoder
from trainyard.worker.data.loader import rank_slice, split_microbatches, to_device
from trainyard.worker.data.packing import Batch, PackedDataset
from trainyard.worker.data.tokenizers import Tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.training.state import TrainState
from trainyard.worker.training.step import Precision


@dataclass(frozen=True)
class Evaluator:
    """The held-out rows and how many are run at once."""

    dataset: PackedDataset
    ranks: DistributedContext
    batch_size: int

    def loss(self, trainee: TrainState) -> float | None:
        """Mean cross-entropy over every held-out token, without dropout; None where it is not finite.

        All ranks call it together and get the same number.
        """
        loss_sum, tokens = trainee.loss_sum(self._batches())
        sums = [sum(column) for column in zip(*self.ranks.gather([loss_sum, float(tokens)]), strict=True)]
        loss = sums[0] / max(1.0, sums[1])
        return loss if math.isfinite(loss) else None

    def _batches(self) -> Iterator[Batch]:
        """Yield the share of this rank. All ranks split alike, so sums do not depend on which rank runs which rows."""
        share = rank_slice(np.arange(len(self.dataset)), self.ranks.rank, self.ranks.world)
        for index, part in enumerate(split_microbatches(share, self.batch_size)):
            hit("evaluation.batch", index)
            yield to_device(self.dataset.batch(part), self.ranks.device)


MAX_NEW_TOKENS = 64


def generate_samples(
    model: Decoder, codec: Tokenizer, prompts: Sequence[str], step: int, precision: Precision, limit: int
) -> Iterator[Sample]:
    """The likeliest continuation of each prompt, at most NEW_TOKENS long and within ``limit`` positions."""
    for prompt in prompts:
        ids = [codec.bos_id, *map(int, codec.encode_batch([prompt])[0])][: max(1, limit - MAX_NEW_TOKENS)]
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with precision.autocast():
            output = model.generate(inputs, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=codec.eos_id)
        text = codec.decode([token for token in output[0, len(ids) :].tolist() if token != codec.eos_id])
        yield Sample(step=step, prompt=prompt, text=_printable(text))


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
