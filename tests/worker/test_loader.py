"""A rank's rows, its micro-batches, and the factor of each."""

import json
from pathlib import Path

import pytest
import torch

from tests.worker import rank_runner
from trainyard.contract.rundir import RunDir
from trainyard.contract.spec import JobSpec
from trainyard.worker.data.loader import LossScale, MicroBatchLoader, rank_slice, split_microbatches
from trainyard.worker.data.microbatch import ModelInputs
from trainyard.worker.data.prepare import prepare_data
from trainyard.worker.data.sampler import StepSampler
from trainyard.worker.distributed import DistributedContext


def shapes_of(batch: ModelInputs) -> tuple[tuple[int, ...] | None, ...]:
    tensors = (batch.input_ids, batch.position_ids, batch.segment_ids, batch.offsets, batch.labels)
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors)


@pytest.mark.parametrize("packing", ["none", "document"])
@pytest.mark.parametrize("world", [1, 3])
def test_padded_micro_batches_have_one_shape_and_the_same_targets(packing: str, world: int, tmp_path: Path) -> None:
    """83 rows in steps of 8: the last step of an epoch has 3, and a rank may have none."""
    text = rank_runner.corpus(tmp_path / "corpus.jsonl", documents=83)
    spec = JobSpec.model_validate_json(json.dumps(rank_runner.spec(text, data={"packing": packing})))
    alone = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    rows = prepare_data(spec, RunDir(tmp_path), alone, lambda _: None, lambda: False).train_set
    sampler = StepSampler(len(rows), 8 * world, 42)
    shapes = set()
    for rank in range(world):
        ranks = DistributedContext(rank, world, rank, world, torch.device("cpu"))
        plain = MicroBatchLoader(rows, sampler, ranks, 8, "global_tokens")
        padded = MicroBatchLoader(rows, sampler, ranks, 8, "global_tokens", min_rows=8)
        for step in range(1, sampler.steps_per_epoch + 2):
            for short, full in zip(plain.microbatches(step), padded.microbatches(step), strict=True):
                shapes.add(shapes_of(full.batch))
                assert (full.factor, full.rows, full.tokens) == (short.factor, short.rows, short.tokens)
                count = len(short.rows)
                assert torch.equal(full.batch.labels[:count], short.batch.labels[:count])
                assert (full.batch.labels[count:] == -100).all()
        shapes.add(shapes_of(padded.dummy().batch))
    assert len(shapes) == 1


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
