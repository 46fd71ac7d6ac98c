"""The process group: this rank's place in it, its device and threads, and the collectives other than the gradient's.

There are three groups. The default one carries gradients (NCCL on CUDA, else gloo) and times out after
``timeouts.collective``. The control group is always gloo and has a long timeout, because all ranks wait while one
prepares data or saves. The background group is like it, for background threads.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainyard.contract.spec import JobSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.worker.cuda_errors import cuda_advice, short_cuda_error
from trainyard.worker.errors import StopRequested, TrainingError

T = TypeVar("T")

FloatRow = list[float]


@dataclass(frozen=True)
class DistributedContext:
    """Rank, world size, device and groups. A single rank has no group, and its collectives return at once.

    ``background``: a group for background threads, whose collectives must not mix with those of the training thread.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    preparing_timeout: timedelta | None = None
    """How long a rank waits for another one that prepares data or saves; None: torch's default."""
    background: dist.ProcessGroup | None = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def gather(self, row: FloatRow) -> list[FloatRow]:
        """Return the ``row`` of every rank, in rank order. All must have one length. Float64 throughout."""
        if self.control is None:
            return [row]
        own = torch.tensor(row, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(rows, own, group=self.control)
        return [each.tolist() for each in rows]

    def gather_objects(self, own: T) -> list[T]:
        """Return the picklable object of every rank, in rank order."""
        if self.control is None:
            return [own]
        objects: list[Any] = [None] * self.world
        dist.all_gather_object(objects, own, group=self.control)
        return objects

    def gather_in_background(self, numbers: list[int]) -> list[list[int]]:
        """Return the 64-bit ``numbers`` of every rank on rank 0, [] on the others. One background thread a rank.

        Raises RuntimeError if a rank has died.
        """
        if self.background is None:
            return [numbers]
        own = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(own) for _ in range(self.world)] if self.is_main_process else None
        dist.gather(own, rows, dst=0, group=self.background)
        return [row.tolist() for row in rows or []]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def broadcast_from_rank0(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0. Return its result, or raise its TrainingError or StopRequested, on every rank.

        Any other exception ends rank 0 alone; the other ranks fail on the broken connection.
        """
        message: list[Any] = [None, None]
        if self.is_main_process:
            try:
                message = [work(), None]
            except (TrainingError, StopRequested) as error:
                message = [None, error]
        if self.control is not None:
            dist.broadcast_object_list(message, src=0, group=self.control)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result


def init_distributed(timeouts: Timeouts, device: str, environment: dict[str, str] | None = None) -> DistributedContext:
    """Join the process group that torchrun's environment describes. Without torchrun this is the only rank.

    ``device``: resources.device of the spec. Raises TrainingError if the environment makes no sense, or if the other
    ranks do not come.
    """
    env = dict(os.environ) if environment is None else environment
    rank, world, local_rank, local_world = _read_ranks(env)
    torch.set_num_threads(threads_per_rank(env, local_world, len(os.sched_getaffinity(0))))
    own = select_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if world == 1:
        return DistributedContext(rank, world, local_rank, local_world, own)
    if "TORCHELASTIC_RUN_ID" not in env:
        where = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
        message = f"rank {rank} of {world} waits for the other ranks at {where}, for at most {timeouts.collective:g} s"
        print(f"{message}; {BY_HAND}", file=sys.stderr, flush=True)
    # If one rank of this host has no GPU, all use gloo, and `require_device` raises its error. With two backends the
    # ranks would wait for each other until the timeout, and the message would not name the missing GPU.
    uses_nccl = select_device(device, local_world - 1).type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if uses_nccl else "gloo",
            timeout=timedelta(seconds=timeouts.collective),
            device_id=own if uses_nccl else None,
        )
    except (ValueError, dist.DistError) as error:
        message = f"rank {rank} of {world} did not meet the other ranks: {str(error).splitlines()[0]}"
        raise TrainingError(Reason.LAUNCH_FAILED, message, BY_HAND, rank) from error
    preparing = timedelta(seconds=timeouts.preparing)
    control, background = (dist.new_group(backend="gloo", timeout=preparing) for _ in range(2))
    return DistributedContext(rank, world, local_rank, local_world, own, control, preparing, background)


BY_HAND = (
    "the environment has RANK and WORLD_SIZE. Start all ranks with torchrun, or unset both to train with one process."
)


def _read_ranks(env: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Return rank, world, local rank and local world. Raises TrainingError if they make no sense."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = ", ".join(f"{name}={env[name]}" for name in names if name in env)
    try:
        rank, world, local_rank, local_world = (int(env.get(name, default)) for name, default in names.items())
    except ValueError as error:
        raise TrainingError(Reason.LAUNCH_FAILED, f"not valid rank numbers: {given}", BY_HAND) from error
    if not (0 <= rank < world and 0 <= local_rank < local_world):
        raise TrainingError(Reason.LAUNCH_FAILED, f"a rank must be less than the number of ranks: {given}", BY_HAND)
    return rank, world, local_rank, local_world


def select_device(requested: str, local_rank: int) -> torch.device:
    """Return the device of one rank: its GPU if CUDA is requested ("auto", "cuda", "cuda:N") and exists, else the CPU.

    Never fails, so that the process group can be set up; `require_device` raises the error.
    """
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(requested.partition(":")[2] or 0) + local_rank
    return torch.device("cuda", index) if index < torch.cuda.device_count() else torch.device("cpu")


def require_device(ranks: DistributedContext, spec: JobSpec) -> None:
    """Raise TrainingError if this rank has no GPU, but was given one, requests one, or other ranks have one."""
    requested = spec.resources.device
    if ranks.device.type == "cuda" or requested == "cpu":
        return
    problem = cuda_problem()
    if problem is not None and has_assigned_gpu():
        # It does not use the CPU instead, even for "auto": that would take days, with a GPU that is leased and idle.
        message = f"rank {ranks.rank} of {ranks.world} cannot use its GPU: {problem}"
        raise TrainingError(Reason.WORKER_CRASHED, message, cuda_advice(problem) or DOCTOR, ranks.rank)
    if problem is not None and requested == "auto":
        return
    seen = problem or f"{torch.cuda.device_count()} can be seen"
    message = f"resources.device is {requested} and rank {ranks.rank} of {ranks.world} has no GPU: {seen}"
    hint = 'Resume with fewer resources.nproc_per_node, or with resources.device "cpu".'
    raise TrainingError(Reason.SPEC_INVALID, message, hint, ranks.rank)


DOCTOR = "`trainyard doctor` on its host checks the driver and torch."


def has_assigned_gpu() -> bool:
    """Return whether this process was given a GPU: by the service's lease, by Slurm, or by hand."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").strip(" ,") not in ("", "-1", "NoDevFiles")


def cuda_problem() -> str | None:
    """Return in one line why torch can use no GPU here, or None if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below has its text
        available = torch.cuda.is_available()
    if not available and torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError) as error:
        return short_cuda_error(str(error))
    return None


class GpuUnusable(Exception):
    """The GPU that this process was given cannot be used. The message says why, and what to do."""


def assigned_device() -> torch.device:
    """Return the GPU that this process was given, else the CPU. Raises GpuUnusable."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not has_assigned_gpu():
        return torch.device("cpu")
    problem = cuda_problem()
    assert problem is not None
    raise GpuUnusable(f"the GPU cannot be used: {problem}. {cuda_advice(problem) or DOCTOR}")


def threads_per_rank(environment: dict[str, str], local_world: int, cores: int) -> int:
    """Return the CPU threads of one rank: from the environment, else an even share of the cores.

    The last bits of sums depend on it.
    """
    requested = environment.get("TRAINYARD_THREADS")
    if requested:
        return max(1, int(requested))
    omp_threads = environment.get("OMP_NUM_THREADS")
    # torchrun itself sets OMP_NUM_THREADS=1 for more than one rank: that is no choice of the user.
    set_by_torchrun = "TORCHELASTIC_RUN_ID" in environment and local_world > 1 and omp_threads == "1"
    if omp_threads and omp_threads.isdigit() and not set_by_torchrun:
        return max(1, int(omp_threads))
    return max(1, cores // local_world)


def shutdown_distributed(ranks: DistributedContext) -> None:
    """Destroy the process group after a successful run."""
    if ranks.control is not None:
        dist.barrier(group=ranks.control)
        dist.destroy_process_group()
