"""Threads, a process without torchrun, and missing devices."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from tests.worker import rank_runner
from trainyard.contract.spec import JobSpec, Timeouts
from trainyard.contract.status import Reason
from trainyard.worker.distributed import (
    DistributedContext,
    GpuUnusable,
    assigned_device,
    cuda_problem,
    init_distributed,
    require_device,
    select_device,
    threads_per_rank,
)
from trainyard.worker.errors import StopRequested, TrainingError
from trainyard.worker.training.control import ControlFlags, ControlSync

FABRIC = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 802: system not yet initialized"
)
"""torch 2.13.0+cu130 with a driver whose cuInit returns 802."""

ALONE = DistributedContext(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Joining the ranks sets the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spec(**groups: Any) -> JobSpec:
    import json

    return JobSpec.model_validate_json(json.dumps({"data": {"data_path": "/x"}, **groups}))


@pytest.mark.parametrize(
    ("environment", "local_world", "threads"),
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 100, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 1),
        ({"TRAINYARD_THREADS": "5", "OMP_NUM_THREADS": "1"}, 2, 5),
    ],
)
def test_threads_are_the_users_or_an_even_share(environment: dict[str, str], local_world: int, threads: int) -> None:
    assert threads_per_rank(environment, local_world, cores=8) == threads


def test_a_process_without_torchrun_is_the_only_rank() -> None:
    ranks = init_distributed(spec().resources.timeouts, "cpu", {"TRAINYARD_THREADS": "1"})
    assert ranks == ALONE
    assert ranks.is_main_process
    assert ranks.gather([1.0, 2.0]) == [[1.0, 2.0]]
    assert ranks.broadcast_from_rank0(lambda: "found") == "found"
    with pytest.raises(StopRequested):
        ranks.broadcast_from_rank0(raise_stop)
    agreement = ControlSync(ranks)
    assert agreement.exchange(ControlFlags(stop=True)) == ControlFlags(stop=True)
    assert agreement.finish() == ControlFlags()


def raise_stop() -> None:
    raise StopRequested


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a host without CUDA")
def test_missing_cuda_is_an_error_but_not_with_auto() -> None:
    assert select_device("cuda:1", 0).type == "cpu"
    require_device(ALONE, spec())
    with pytest.raises(TrainingError, match="rank 0 of 1 has no GPU"):
        require_device(ALONE, spec(resources={"device": "cuda"}))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_run_with_a_gpu_that_torch_cannot_use_does_not_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", mock.Mock(side_effect=RuntimeError(FABRIC)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    with pytest.raises(TrainingError) as failed:
        require_device(ALONE, spec(resources={"device": device}))
    assert failed.value.message == "rank 0 of 1 cannot use its GPU: Error 802: system not yet initialized"
    assert "nvidia-fabricmanager" in (failed.value.hint or "")
    assert failed.value.reason is Reason.WORKER_CRASHED
    with pytest.raises(GpuUnusable, match=r"Error 802.*nvidia-fabricmanager"):
        assigned_device()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        require_device(ALONE, spec())
        assert assigned_device().type == "cpu"


def test_a_gpu_that_is_listed_and_does_not_start_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "init", mock.Mock(side_effect=RuntimeError("CUDA error: busy or unavailable\nmore"))
    )
    assert cuda_problem() == "CUDA error: busy or unavailable"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RANK": "1"}, "must be less than the number of ranks: RANK=1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "must be less than the number of ranks: RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "not valid rank numbers: WORLD_SIZE=two"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "must be less than"),
        ({"LOCAL_RANK": "1"}, "must be less than"),
    ],
)
def test_invalid_ranks_are_rejected(environment: dict[str, str], problem: str) -> None:
    with pytest.raises(TrainingError, match=problem) as refused:
        init_distributed(Timeouts(), "cpu", environment)
    assert "unset both to train with one process" in str(refused.value)


def test_the_wait_for_missing_ranks_is_logged(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """RANK and WORLD_SIZE were left in the environment, and there is no torchrun."""
    held, number = rank_runner.hold_port()
    request.addfinalizer(partial(os.close, held))
    port = str(number)
    left_over = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(TrainingError, match="rank 0 of 2 did not meet the other ranks"):
        init_distributed(Timeouts(collective=1.0), "cpu")
    assert f"rank 0 of 2 waits for the other ranks at 127.0.0.1:{port}, for at most 1 s" in capfd.readouterr().err
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        init_distributed(Timeouts(collective=1.0), "cpu")


@pytest.mark.parametrize(("gpus", "backend"), [(1, "gloo"), (2, "nccl")])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_of_a_host_use_one_backend(
    rank: int, gpus: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of two has a GPU and rank 1 has none: both join, so that rank 1 can report it."""
    joined = mock.Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    monkeypatch.setattr(torch.distributed, "new_group", mock.Mock())
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    ranks = init_distributed(Timeouts(), "auto", environment)
    assert joined.call_args.args == (backend,)
    assert joined.call_args.kwargs["device_id"] == (ranks.device if backend == "nccl" else None)
    if ranks.device.type == "cpu":
        with pytest.raises(TrainingError, match="rank 1 of 2 has no GPU"):
            require_device(ranks, spec(resources={"device": "cuda"}))
