"""Who this rank is, the few collectives outside the gradient's, and the wish to stop that all ranks agree on.

There are two groups: the default one carries gradients (NCCL on CUDA, else gloo) and gives up after
``timeouts.collective``; the control group is always gloo, and patient, because one rank may prepare data or save for a
long time while the others wait.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainyard.contract.spec import JobSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.worker.errors import StopRequested, TrainingError

T = TypeVar("T")

FloatRow = list[float]


@dataclass(frozen=True)
class DistributedContext:
    """Who this rank is among all. A rank alone has no process group, and every collective is a plain return."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def gather(self, row: FloatRow) -> list[FloatRow]:
        """Every rank's ``row``, in the order of ranks, as float64: sums of it are the same everywhere."""
        if self.control is None:
            return [row]
        mine = torch.tensor(row, dtype=torch.float64)
        all_rows = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_rows, mine, group=self.control)
        return [gathered.tolist() for gathered in all_rows]

    def barrier(self) -> None:
        """Return once every rank has come here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """What rank 0 got by ``work()``, on every rank. Its Failure or StopAsked is raised on every rank as well.

        Any other exception ends rank 0 alone: the others learn of it by the broken connection.
        """
        said: list[Any] = [None, None]
        if self.is_main_process:
            try:
                said = [work(), None]
            except (TrainingError, StopRequested) as end:
                said = [None, end]
        if self.control is not None:
            dist.broadcast_object_list(said, src=0, group=self.control)
        if said[1] is not None:
            raise said[1]
        result: T = said[0]
        return result


def init_distributed(timeouts: Timeouts, device: str, environment: dict[str, str] | None = None) -> DistributedContext:
    """Take the place that torchrun gave this process; without torchrun it is the only rank."""
    place = dict(os.environ) if environment is None else environment
    rank, world = int(place.get("RANK", "0")), int(place.get("WORLD_SIZE", "1"))
    local_rank, local_world = int(place.get("LOCAL_RANK", "0")), int(place.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads_per_rank(place, local_world, len(os.sched_getaffinity(0))))
    own = select_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if world == 1:
        return DistributedContext(rank, world, local_rank, local_world, own)
    backend = "nccl" if own.type == "cuda" else "gloo"
    bound = own if own.type == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=timeouts.collective), device_id=bound)
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeouts.preparing))
    return DistributedContext(rank, world, local_rank, local_world, own, control)


def select_device(wanted: str, local_rank: int) -> torch.device:
    """The device of one rank. "auto" is CUDA where there is some; what cannot be had stays a CPU, see `require`."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    first = int(wanted.partition(":")[2] or 0)
    index = first + local_rank
    return torch.device("cuda", index) if index < torch.cuda.device_count() else torch.device("cpu")


def require_device(ranks: DistributedContext, spec: JobSpec) -> None:
    """Raise Failure where CUDA was asked for, or half of the ranks have it, and this rank has none."""
    wanted = spec.resources.device
    if ranks.device.type == "cuda" or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return
    message = (
        f"resources.device is {wanted} and rank {ranks.rank} of {ranks.world} has no GPU: "
        f"{torch.cuda.device_count()} can be seen"
    )
    hint = 'Lower resources.nproc_per_node, or set resources.device to "cpu".'
    raise TrainingError(Reason.SPEC_INVALID, message, hint, ranks.rank)


def threads_per_rank(environment: dict[str, str], local_world: int, cores: int) -> int:
    """CPU threads of one rank: as told, else an even share of the cores. Sums differ in their last bits with it."""
    told = environment.get("TRAINYARD_THREADS")
    if told:
        return max(1, int(told))
    by_user = environment.get("OMP_NUM_THREADS")
    # torchrun sets OMP_NUM_THREADS=1 by itself for more than one rank: that is nobody's wish.
    torchrun_did = "TORCHELASTIC_RUN_ID" in environment and local_world > 1 and by_user == "1"
    if by_user and by_user.isdigit() and not torchrun_did:
        return max(1, int(by_user))
    return max(1, cores // local_world)


def shutdown_distributed(ranks: DistributedContext) -> None:
    """Part in peace, at the end of a run that went well."""
    if ranks.control is not None:
        dist.barrier(group=ranks.control)
        dist.destroy_process_group()
