"""A rank's rows, its micro-batches, and the factor of each."""

import json
from pathlib import Path

import numpy as np
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
        padded = MicroBatchLoader(rows, sampler, ranks, 8, "global_tokens", min_rows=8, fixed_shape=True)
        for step in range(1, sampler.steps_per_epoch + 2):
            for short, full in zip(plain.microbatches(step), padded.microbatches(step), strict=True):
                shapes.add(shapes_of(full.batch))
                assert (full.factor, full.rows, full.tokens) == (short.factor, short.rows, short.tokens)
                count = len(short.rows)
                assert torch.equal(full.batch.labels[:count], short.batch.labels[:count])
                assert (full.batch.labels[count:] == -100).all()
        shapes.add(shapes_of(padded.dummy().batch))
    assert len(shapes) == 1


def test_a_thread_that_is_a_micro_batch_ahead_changes_nothing(tmp_path: Path) -> None:
    text = rank_runner.corpus(tmp_path / "corpus.jsonl", documents=83)
    spec = JobSpec.model_validate_json(json.dumps(rank_runner.spec(text)))
    ranks = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    rows = prepare_data(spec, RunDir(tmp_path), ranks, lambda _: None, lambda: False).train_set
    sampler = StepSampler(len(rows), 8, 42)
    plain = MicroBatchLoader(rows, sampler, ranks, 3, "global_tokens")
    ahead = MicroBatchLoader(rows, sampler, ranks, 3, "global_tokens", prefetches=True)
    for step in (1, 2, 3, 2, 3, 4, 9):  # a rollback, and data that is skipped
        for one, other in zip(plain.microbatches(step), ahead.microbatches(step), strict=True):
            assert (one.factor, one.rows, one.tokens) == (other.factor, other.rows, other.tokens)
            pairs = zip(one.batch, other.batch, strict=True)  # type: ignore[call-overload]
            assert all(torch.equal(a, b) for a, b in pairs if a is not None)


def test_segments_are_rounded_up_and_not_padded_to_the_most_of_any_row(tmp_path: Path) -> None:
    """In 0.1, flash attention's backward pass took memory for five times as many segments as there were."""
    lines = [json.dumps({"text": "x" * length}) for length in [1] * 400 + [60] * 400]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    spec = JobSpec.model_validate_json(
        json.dumps(rank_runner.spec(tmp_path / "corpus.jsonl", data={"max_seq_len": 64}))
    )
    alone = DistributedContext(0, 1, 0, 1, torch.device("cpu"))
    dataset = prepare_data(spec, RunDir(tmp_path), alone, lambda _: None, lambda: False).train_set
    counts = []
    for start in range(0, len(dataset), 64):
        rows = np.arange(start, min(start + 64, len(dataset)))
        short, full = dataset.batch(rows), dataset.batch(rows, fixed_offsets=True)
        assert short.offsets is not None
        assert full.offsets is not None
        assert np.array_equal(np.unique(short.offsets), np.unique(full.offsets))
        assert len(short.offsets) <= len(full.offsets)
        real = len(np.unique(short.offsets)) - 1
        assert len(short.offsets) - 1 < real + 64
        counts.append((len(short.offsets), len(full.offsets)))
    assert sum(short for short, _ in counts) < sum(full for _, full in counts) / 3


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
