"""The decoder inside DistributedDataParallel: two ranks, one of which has nothing but padding."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.model.shapes import gradients, random_ids, small_decoder, train_on


def run_rank(rank: int, store: str, changes: dict[str, Any], out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_decoder(**changes)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ids = random_ids(2, 9)
    labels = ids if rank == 0 else torch.full_like(ids, -100)
    for _ in range(2):  # the second forward finds out whether the first one left a parameter waiting
        model.zero_grad()
        found = parallel(ids, labels=labels)
        (2 * (found.loss_sum + 0.01 * found.aux_sum)).backward()
    torch.save(gradients(model), f"{out}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group; nothing is left to be done


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"use_moe": True, "num_experts": 8}], ids=["dense", "moe"])
def test_a_rank_with_padding_alone_takes_part(changes: dict[str, Any], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, str(tmp_path / "store"), changes, str(tmp_path)) for rank in range(2)]
    processes = [context.Process(target=run_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    ids = random_ids(2, 9)
    _, _, expected = train_on(small_decoder(**changes), input_ids=ids, labels=ids)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, grad in expected.items():
            # The mean over two ranks of twice the sum of one of them.
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)
