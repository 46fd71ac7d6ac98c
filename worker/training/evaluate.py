"""The loss on the evaluation split, summed over all ranks, and text samples of what the model generates."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainyard.contract.events import SampleEvent
from trainyard.contract.failpoints import hit
from trainyard.model.decoder import Decoder
from trainyard.worker.data.loader import rank_slice, split_microbatches, to_device
from trainyard.worker.data.packing import Batch, PackedDataset
from trainyard.worker.data.tokenizers import Tokenizer
from trainyard.worker.distributed import DistributedContext
from trainyard.worker.errors import StopRequested
from trainyard.worker.training.state import TrainState
from trainyard.worker.training.step import Precision

MAX_NEW_TOKENS = 64
MIN_NEW_TOKENS = 16


@dataclass(frozen=True)
class Evaluator:
    """The evaluation split, the number of rows in a batch, and whether this rank has seen a stop request."""

    dataset: PackedDataset
    ranks: DistributedContext
    batch_size: int
    stop_requested: Callable[[], bool] = lambda: False

    def loss(self, state: TrainState) -> float | None:
        """Return the mean cross-entropy over all tokens of the split, without dropout, or None if it is not finite.

        All ranks call it together and get the same number. A stop request that any rank sees before a batch raises
        StopRequested on all of them.
        """
        loss_sum, tokens = state.loss_sum(self._batches(all_ranks_run=state.gathers_weights))
        loss_sum, tokens_of_all = (
            sum(column) for column in zip(*self.ranks.gather([loss_sum, float(tokens)]), strict=True)
        )
        loss = loss_sum / max(1.0, tokens_of_all)
        return loss if math.isfinite(loss) else None

    def _batches(self, *, all_ranks_run: bool) -> Iterator[Batch]:
        share = rank_slice(np.arange(len(self.dataset)), self.ranks.rank, self.ranks.world)
        parts = list(split_microbatches(share, self.batch_size))
        # A rank may have one batch less than another, but all must take part in the same number of all-reduces.
        largest_share = -(-len(self.dataset) // self.ranks.world)
        for index in range(max(1, -(-largest_share // self.batch_size))):
            hit("evaluation.batch", index)
            if any(requested for (requested,) in self.ranks.gather([float(self.stop_requested())])):
                raise StopRequested
            # A rank without a batch takes padding if all must run the model together.
            if index < len(parts) or all_ranks_run:
                part = parts[index] if index < len(parts) else parts[0][:0]
                yield to_device(self.dataset.batch(part), self.ranks.device)


def generate_samples(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    step: int,
    precision: Precision,
    limit: int,
    *,
    in_step: bool = False,
) -> Iterator[SampleEvent]:
    """Yield the greedy continuation of each prompt, at most MAX_NEW_TOKENS long and within ``limit`` positions.

    ``in_step``: all ranks generate together, so every one runs the model equally often, also after the last token.
    """
    for prompt in prompts:
        hit("samples.prompt", prompt)
        all_ids = [tokenizer.bos_id, *map(int, tokenizer.encode_batch([prompt])[0])]
        ids, new_tokens, note = fit_prompt(all_ids, limit)
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        with precision.autocast():
            eos_id = tokenizer.eos_id if not in_step else None
            output = model.generate(inputs, max_new_tokens=new_tokens, eos_token_id=eos_id)
        new_ids = itertools.takewhile(lambda token: token != tokenizer.eos_id, output[0, len(ids) :].tolist())
        text = tokenizer.decode(list(new_ids))
        # A lone surrogate cannot be written as JSON.
        yield SampleEvent(step=step, prompt=prompt, text=text.encode(errors="replace").decode(), note=note)


def fit_prompt(ids: list[int], limit: int) -> tuple[list[int], int, str | None]:
    """Return the ids that fit with their continuation into ``limit`` positions, its length, and a note about the rest.

    A long prompt gets fewer new tokens, but MIN_NEW_TOKENS of them if possible. What then does not fit is left out
    after the first id (BOS): the end of the prompt decides how it continues.
    """
    new_tokens = min(MAX_NEW_TOKENS, max(limit - len(ids), min(MIN_NEW_TOKENS, limit // 2)))
    cut = max(0, len(ids) - (limit - new_tokens))
    notes = [f"the first {cut:,} of {len(ids) - 1:,} tokens of the prompt are left out"] if cut else []
    notes += [f"at most {new_tokens} new tokens"] if new_tokens < MAX_NEW_TOKENS else []
    note = f"{', '.join(notes)}: the model has {limit:,} positions" if notes else None
    return [ids[0], *ids[1 + cut :]], new_tokens, note
