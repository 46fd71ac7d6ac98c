"""Each check of a host on recorded facts: ok, warning or fault, and what to do."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from tests.fakes.nvml import bridged_pairs
from trainyard.worker.doctor import checks, facts
from trainyard.worker.doctor.facts import (
    CardFacts,
    ClockFacts,
    CompilerFacts,
    DiskFacts,
    DriverFacts,
    MemoryFacts,
    PortFacts,
    ProductSpeeds,
    PythonFacts,
    SharedMemoryFacts,
    SlurmFacts,
    TorchFacts,
)
from trainyard.worker.doctor.report import CheckResult, DoctorReport, HealthLevel, fault, ok, warning

OK, WARNING, FAULT = HealthLevel
GB = 10**9
H200 = {"name": "NVIDIA H200", "capability": 9, "memory_bytes": 150 * GB}
V100 = {"name": "Tesla V100", "capability": 7, "memory_bytes": 16 * GB}

PYTHON = PythonFacts((3, 11, 7), "/usr/bin/python", {"numpy": "2.0", "safetensors": "0.5"})
CPU = TorchFacts(version="2.13.0+cpu", gloo=True, products={"cpu": ProductSpeeds(0.3e12, 0.16e12)})
GPU = TorchFacts(
    version="2.13.0",
    cuda_build="13.0",
    cuda_available=True,
    gloo=True,
    nccl="2.28.1",
    triton="3.5.0",
    cards=[H200],
    products={"cpu": ProductSpeeds(1e12, 0.5e12), "cuda": ProductSpeeds(50e12, 700e12)},
)


def without_cuda(error: str) -> TorchFacts:
    return replace(GPU, cuda_available=False, cuda_error=error, cards=())


NO_DRIVER = DriverFacts(None, "NVML Shared Library Not Found", 0)
DRIVER = DriverFacts("580.65.06", None, 1, [CardFacts("NVIDIA H200", 150 * GB)])
COMPILER = CompilerFacts("/usr/bin/g++")
DISK = DiskFacts("/home", "/home", None, 500 * GB, 1000 * GB, 900e6)
LIMITS = {"NOFILE": (1024, 524288), "NPROC": (-1, -1), "MEMLOCK": (8 << 20, 8 << 20)}
LIMITS |= dict.fromkeys(("FSIZE", "AS", "CPU"), (-1, -1))
PORTS = PortFacts("127.0.0.1", 8000, None, "node1", None)
SLURM = SlurmFacts(True, "slurm 24.05", ["gpu"])


@pytest.mark.parametrize(
    ("result", "health", "text"),
    [
        (checks.check_python(PYTHON), OK, "3.11.7"),
        (checks.check_python(replace(PYTHON, version=(3, 10, 1))), FAULT, "3.11 or newer"),
        (checks.check_python(replace(PYTHON, packages={"numpy": None})), FAULT, "without numpy"),
        (checks.check_torch(CPU), OK, "built for CPUs"),
        (checks.check_torch(GPU), OK, "built for CUDA 13.0"),
        (checks.check_torch(replace(CPU, version="2.12.1")), WARNING, "torch==2.13.*"),
        (checks.check_torch(replace(CPU, gloo=False)), FAULT, "no gloo"),
        (checks.check_torch(TorchFacts(error="No module named 'torch'")), FAULT, "trainyard[worker]"),
        (checks.check_torch(TorchFacts(error="libtorch.so: cannot open")), FAULT, "import torch"),
        (checks.check_torch(TorchFacts(error="failed to map segment"), 300 << 20), FAULT, "ulimit -v unlimited"),
        (checks.check_driver(NO_DRIVER, CPU), OK, "use the CPU"),
        (checks.check_driver(DRIVER, CPU), OK, "NVIDIA H200 (150.0 GB)"),
        (checks.check_driver(replace(NO_DRIVER, device_files=8), CPU), FAULT, "nvidia-smi"),
        (
            checks.check_driver(replace(DRIVER, cards=[CardFacts("NVIDIA GB10", None)]), CPU),
            OK,
            "580.65.06: NVIDIA GB10",
        ),
        (
            checks.check_driver(replace(DRIVER, cards=[*DRIVER.cards, CardFacts("GPU 1", None, "GPU is lost")]), CPU),
            FAULT,
            "does not answer for 1 of 2 GPUs: GPU 1: GPU is lost",
        ),
        (checks.check_driver(replace(DRIVER, version="535.104.05"), CPU), FAULT, "580 or newer"),
        (checks.check_driver(replace(DRIVER, cards=[*DRIVER.cards, CardFacts("L4", GB)]), CPU), WARNING, "PCI_BUS_ID"),
        (
            checks.check_driver(replace(DRIVER, cards=[*DRIVER.cards, CardFacts("L4", GB)], order="PCI_BUS_ID"), CPU),
            OK,
            "L4",
        ),
        (checks.check_driver(replace(DRIVER, version="570.86"), GPU), OK, "570.86"),
        (checks.check_driver(replace(NO_DRIVER, error="Driver Not Loaded", installed=True), CPU), WARNING, "modprobe"),
        (
            checks.check_driver(DriverFacts(None, "NVML/RM version mismatch.", 8, installed=True), CPU),
            FAULT,
            "restart the host",
        ),
        (checks.check_cuda(CPU, NO_DRIVER), OK, "no GPU"),
        (checks.check_cuda(without_cuda("Found no NVIDIA driver on your system"), NO_DRIVER), OK, "no GPU"),
        (checks.check_cuda(without_cuda("No CUDA GPUs are available"), NO_DRIVER), OK, "no GPU"),
        (checks.check_cuda(without_cuda("Error 803: system has unsupported display driver"), NO_DRIVER), FAULT, "803"),
        (checks.check_cuda(without_cuda("Error 802: system not yet initialized"), DRIVER), FAULT, "fabricmanager"),
        (checks.check_cuda(without_cuda("CUDA error: no kernel image is available"), DRIVER), FAULT, "build of torch"),
        (checks.check_cuda(GPU, DRIVER), OK, "CUDA 13.0 on NVIDIA H200"),
        (checks.check_cuda(CPU, DRIVER), FAULT, "TORCH=cuda"),
        (checks.check_cuda(replace(GPU, cuda_available=False, cuda_error="E"), DRIVER), FAULT, "cannot use CUDA: E"),
        (checks.check_cuda(replace(GPU, cuda_available=False), replace(DRIVER, visible="")), WARNING, "unset"),
        (checks.check_cuda(TorchFacts(error="gone"), DRIVER), WARNING, "line about torch"),
        (checks.check_nccl(CPU), OK, "not needed"),
        (checks.check_nccl(GPU), OK, "NCCL 2.28.1"),
        (checks.check_nccl(replace(GPU, nccl=None, cards=[H200, H200])), FAULT, "no NCCL"),
        (checks.check_compiler(COMPILER, CPU), OK, "/usr/bin/g++"),
        (checks.check_compiler(CompilerFacts(None), CPU), WARNING, "install g++"),
        (checks.check_compiler(CompilerFacts(None, "CXX=gcc-99 was not found"), CPU), WARNING, "unset CXX"),
        (checks.check_compiler(replace(COMPILER, error="Python.h: No such file"), CPU), WARNING, "Python.h"),
        (checks.check_compiler(COMPILER, replace(GPU, triton=None)), WARNING, "triton"),
        (checks.check_cpu_bfloat16(ProductSpeeds(0.30e12, 0.16e12)), WARNING, 'training.dtype "float32"'),
        (checks.check_cpu_bfloat16(ProductSpeeds(0.30e12, 0.29e12)), OK, "0.97 x"),
        (
            checks.check_cpu_bfloat16(ProductSpeeds(45e9, 0.42e9)),
            WARNING,
            "reaches 0.42 GFLOP/s here, one in float32 45:",
        ),
        (checks.check_cpu_bfloat16(ProductSpeeds(0.30e12, 0.90e12)), OK, "3.00 x"),
        (checks.check_memory(MemoryFacts(64 * GB, 60 * GB, None)), OK, "60.0 GB of 64.0 GB"),
        (checks.check_memory(MemoryFacts(64 * GB, GB, None)), WARNING, "trainyard plan"),
        (checks.check_memory(MemoryFacts(64 * GB, 60 * GB, 2 * GB)), WARNING, "limit of its cgroup 2.0 GB"),
        (checks.check_memory(MemoryFacts(None, None, None)), WARNING, "/proc"),
        (checks.check_disk(DISK), OK, "900.0 MB/s"),
        (checks.check_disk(replace(DISK, error="Permission denied")), FAULT, "Permission denied"),
        (checks.check_disk(replace(DISK, locks=False)), FAULT, "flock"),
        (checks.check_disk(replace(DISK, error="No space left", error_code="ENOSPC")), FAULT, "free some space"),
        (checks.check_disk(replace(DISK, error="Read-only file system", error_code="EROFS")), FAULT, "mount it"),
        (checks.check_disk(replace(DISK, error="File too large", error_code="EFBIG")), FAULT, "line about ulimits"),
        (checks.check_disk(replace(DISK, free_bytes=50 * GB)), OK, "50.0 GB of 1.0 TB"),
        (checks.check_disk(replace(DISK, free_bytes=4 * GB)), WARNING, "free some space"),
        (checks.check_disk(replace(DISK, free_bytes=8 << 20, total_bytes=8 << 20)), WARNING, "300.0 MB"),
        (checks.check_disk(replace(DISK, write_bytes_per_second=10e6)), WARNING, "takes 30 s"),
        (checks.check_disk(replace(DISK, skew_seconds=-9.0)), WARNING, "-9 s off"),
        (checks.check_shared_memory(SharedMemoryFacts(8 * GB, 8 * GB), 8), OK, "8.0 GB"),
        (checks.check_shared_memory(SharedMemoryFacts(64 << 20, 64 << 20), 1), OK, "67.1 MB"),
        (checks.check_shared_memory(SharedMemoryFacts(64 << 20, 64 << 20), 2), WARNING, "--shm-size"),
        (checks.check_shared_memory(SharedMemoryFacts(None), 0), WARNING, "tmpfs"),
        (checks.check_clock(ClockFacts(2e9, 1.9e9, True)), OK, "NTP"),
        (checks.check_clock(ClockFacts(2e9, 1.9e9, None)), OK, "unknown"),
        (checks.check_clock(ClockFacts(2e9, 1.9e9, False)), WARNING, "chrony"),
        (checks.check_clock(ClockFacts(100.0, 1.9e9, True)), FAULT, "set the clock"),
        (checks.check_limits(LIMITS, 1), OK, "524,288"),
        (checks.check_limits({**LIMITS, "NOFILE": (256, 256)}, 1), WARNING, "LimitNOFILE"),
        (checks.check_limits({**LIMITS, "FSIZE": (GB, GB)}, 1), FAULT, "ulimit -f unlimited"),
        (checks.check_limits({**LIMITS, "CPU": (60, 60)}, 1), FAULT, "killed after 60 s"),
        (checks.check_limits({**LIMITS, "AS": (GB, GB)}, 1), WARNING, "CUDA reserves"),
        (checks.check_limits({**LIMITS, "AS": (GB, GB)}, 0), WARNING, "torch reserves"),
        (checks.check_limits(LIMITS, 8), WARNING, "ulimit -l"),
        (checks.check_ports(PORTS), OK, "127.0.0.1:8000 is free"),
        (checks.check_ports(replace(PORTS, error="Address already in use")), WARNING, "--port 8001"),
        (
            checks.check_ports(replace(PORTS, error="Address already in use", is_trainyard=True)),
            OK,
            "a service of Trainyard",
        ),
        (checks.check_ports(replace(PORTS, port=-1, error="TRAINYARD_PORT=x is no port")), WARNING, "0 to 65535"),
        (
            checks.check_ports(replace(PORTS, error="Cannot assign", error_code="EADDRNOTAVAIL")),
            WARNING,
            "TRAINYARD_HOST",
        ),
        (checks.check_ports(replace(PORTS, port=80, error="Permission", error_code="EACCES")), WARNING, "1024"),
        (checks.check_ports(replace(PORTS, host_error="Name not known")), WARNING, "GLOO_SOCKET_IFNAME"),
        (checks.check_ports(replace(PORTS, loopback_error="No device")), FAULT, "loopback"),
        (checks.check_slurm(SLURM), OK, "partitions gpu (used)"),
        (checks.check_slurm(SlurmFacts(False, None)), OK, "not installed"),
        (checks.check_slurm(SlurmFacts(True, None)), FAULT, "no sbatch"),
        (checks.check_slurm(replace(SLURM, error="munge")), FAULT, "scontrol ping"),
        (checks.check_slurm(replace(SLURM, wanted=False, error="munge")), WARNING, "scontrol ping"),
    ],
)
def test_a_check_judges_facts(result: CheckResult, health: HealthLevel, text: str) -> None:
    assert result.health is health
    assert text in result.line()
    assert result.data
    # Every warning and fault has advice, and nothing else has.
    assert bool(result.advice) is (health is not OK)


def test_a_gpu_that_fails_or_reports_no_memory_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    host = bridged_pairs()
    host.pci = [*host.pci, "00000000:DA:00.0"]
    lost = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    def handle_of(index: int) -> int:
        if index >= 3:
            raise lost if index == 3 else pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return index

    def memory_of(handle: int) -> object:
        if handle:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED) if handle == 1 else lost
        return SimpleNamespace(total=80 * GB)

    monkeypatch.setattr(host, "nvmlDeviceGetHandleByIndex", handle_of)
    monkeypatch.setattr(host, "nvmlDeviceGetMemoryInfo", memory_of)
    monkeypatch.setattr(facts, "pynvml", host)
    found = facts.read_driver({})
    assert (found.version, found.error) == ("580.65.06", None)
    assert [(card.memory_bytes, card.error) for card in found.cards] == [
        (80 * GB, None),
        (None, None),  # it shares the memory of the host, as a GB10 does
        (None, "GPU is lost"),
        (None, "GPU is lost"),
        # The fifth belongs to another container.
    ]


@pytest.mark.parametrize(
    ("torch", "devices", "health"),
    [
        (CPU, ["cpu"], WARNING),
        (GPU, ["cuda"], OK),  # its CPU does not train
        (replace(GPU, cards=[V100]), ["cuda"], WARNING),
        (replace(GPU, products={"cuda": ProductSpeeds(50e12, 60e12)}), ["cuda"], WARNING),
        (TorchFacts(error="gone"), [], None),
    ],
)
def test_bfloat16_is_judged_on_the_device_that_trains(
    torch: TorchFacts, devices: list[str], health: HealthLevel | None
) -> None:
    results = list(checks.check_bfloat16(torch))
    assert [result.data["device"] for result in results] == devices
    assert [result.health for result in results] == [health] * len(results)


def test_numbers_that_json_lacks_are_null() -> None:
    report = DoctorReport("0.2.0", "node1", results=[fault("a", "m", "do", paths=[{"loss": float("nan"), "n": 1}])])
    assert json.loads(report.json())["checks"][0]["data"] == {"paths": [{"loss": None, "n": 1}]}


@pytest.mark.parametrize(
    ("results", "health", "summary"),
    [
        ([ok("a", "m", n=1)], "ok", "1 ok, 0 warnings, 0 faults"),
        ([ok("a", "m"), warning("b", "m", "do")], "warning", "1 ok, 1 warning, 0 faults"),
        ([fault("a", "m", "do"), warning("b", "m", "do")], "fault", "0 ok, 1 warning, 1 fault"),
    ],
)
def test_the_report_is_as_bad_as_its_worst_line(
    results: list[CheckResult], health: str, summary: str, tmp_path: Any
) -> None:
    report = DoctorReport("0.2.0", "node1", results=results)
    text, document = report.write(tmp_path / "new")
    assert text.read_text().splitlines()[-1] == report.summary() == summary
    assert f'"health": "{health}"' in document.read_text()
    assert report.document()["checks"][0]["health"] == results[0].health
