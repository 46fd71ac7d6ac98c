"""A function on several ranks, each a forked process in a gloo group: for tests that need no whole run."""

import os
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.worker.rank_runner import DEADLINE, SERVER
from trainyard.worker.distributed import DistributedContext


def on_ranks(world: int, place: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``work(ranks, *arguments)`` on ``world`` ranks, and return what each returns. ``place``: an empty folder."""
    place.mkdir(parents=True)
    processes = [
        SERVER.Process(target=_rank, args=(r, world, place, work, arguments), daemon=True) for r in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(DEADLINE)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [pickle.loads((place / f"{rank}.pickle").read_bytes()) for rank in range(world)]


def _rank(rank: int, world: int, place: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    timeout = timedelta(seconds=DEADLINE)
    dist.init_process_group("gloo", f"file://{place / 'store'}", rank=rank, world_size=world, timeout=timeout)
    control = dist.new_group(backend="gloo")
    ranks = DistributedContext(rank, world, rank, world, torch.device("cpu"), control, timeout)
    (place / f"{rank}.pickle").write_bytes(pickle.dumps(work(ranks, *arguments)))
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group; nothing is left to be done
