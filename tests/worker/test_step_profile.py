"""The profile of a training step: each operator, of the backward pass too, belongs to a part of the model."""

from dataclasses import replace

import torch

from benchmarks.step_profile import ATTENTION, OPTIMIZER, REST, PartTime, profile_steps, table
from tests.worker.test_step import rows, train_state
from trainyard.worker.data.microbatch import MicroBatch


def test_each_product_of_a_step_belongs_to_a_part_of_the_model() -> None:
    batch = rows(2, seed=1)
    batch = replace(batch, offsets=torch.tensor([0, 5, 12, 24], dtype=torch.int32))
    micro = MicroBatch(batch, 1 / batch.tokens, tokens=batch.tokens)
    state = train_state(dtype="bfloat16")
    found = profile_steps(state, lambda _: [micro], range(2), compiled=False)
    parts = {part.part: part for part in found}
    assert [part.total for part in found] == sorted((part.total for part in found), reverse=True)
    with_products = {
        "attention: projections",
        "feed-forward: projections",
        "head and loss",
    }
    assert {name for name, part in parts.items() if part.by_kind[0] > 0} == with_products
    others = {
        "norms",
        "rotary positions",
        "embedding",
        ATTENTION,
        "gradient norm and clipping",
        "data",
        OPTIMIZER,
        REST,
    }
    assert others <= set(parts)
    assert found[0].total > 0
    # The marks are gone: without them only the step's own parts are known.
    unmarked = {part.part for part in profile_steps(state, lambda _: [micro], range(1), compiled=True)}
    assert "norms" not in unmarked
    assert {ATTENTION, "gradient norm and clipping", OPTIMIZER} <= unmarked


def test_the_table_has_shares_and_a_sum() -> None:
    lines = table([PartTime("norms", (0.0, 1.0, 2.0, 0.0)), PartTime("loss", (1.0, 0.0, 0.0, 0.0))]).splitlines()
    assert lines[2:] == [
        "| norms | 75.0 % | 3 | 0 | 1 | 2 | 0 |",
        "| loss | 25.0 % | 1 | 1 | 0 | 0 | 0 |",
        "| all | 100.0 % | 4 | 1 | 1 | 2 | 0 |",
    ]
