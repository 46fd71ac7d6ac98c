"""The checks of a host: each is a pure function of facts, and returns a result with advice. Does not import torch."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from trainyard.contract.units import counted, human_bytes
from trainyard.worker.cuda_errors import cuda_advice, is_missing_gpu
from trainyard.worker.doctor.facts import (
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
from trainyard.worker.doctor.report import CheckResult, fault, ok, warning

PYTHON = (3, 11)
TORCH = "2.13"
"""The release of torch that pyproject.toml asks for and that the attention kernels were written for."""

DRIVER = 580
"""First driver of NVIDIA for CUDA 13, with which this torch is built."""

MIN_MEMORY = 4 << 30
LOW_DISK = 5 << 30
LOW_DISK_SHARE = 0.1
SLOW_DISK = 50e6
MIN_KEPT = 3
"""Checkpoints of a small run that the disk should have room for."""

SMALL_SHM = 1 << 30
MAX_SKEW_SECONDS = 2.0
MIN_FILES = 4096
SMALL_MODEL_BYTES = 300e6
"""Checkpoint of MiniMind's small model (26M parameters)."""

MIN_BFLOAT16_RATIO = 0.95
"""Below this share of float32's speed, bfloat16 is slower on a CPU. Smaller differences are noise."""

DISK_ADVICE = {
    "ENOSPC": "free some space (df -h) or some files (df -i)",
    "EDQUOT": "free some space: your quota on this disk is used up (quota -s)",
    "EROFS": "mount it writable",
    "EFBIG": "see the line about ulimits",
    "ENOTDIR": "part of this path is a file: choose a folder",
}
"""What to do about an error of writing, by its name."""

REINSTALL = f"pip install --force-reinstall --no-deps 'torch=={TORCH}.*'"
INSTALL_WORKER = "pip install 'trainyard[worker]', or `make setup` in the repository"


def check_python(facts: PythonFacts) -> CheckResult:
    text, data = ".".join(map(str, facts.version)), asdict(facts)
    if facts.version[:2] < PYTHON:
        return fault("python", f"Python {text} is too old", "install Python 3.11 or newer", **data)
    missing = [name for name, found in facts.packages.items() if found is None]
    if missing:
        return fault(
            "python", f"Python {text}, without {', '.join(missing)}: nothing can train", INSTALL_WORKER, **data
        )
    return ok("python", f"Python {text} ({facts.executable})", **data)


def check_torch(facts: TorchFacts, address_space: int = -1) -> CheckResult:
    """``address_space``: its limit in bytes, -1 if there is none."""
    data = {"version": facts.version, "cuda_build": facts.cuda_build, "error": facts.error}
    if facts.error is not None:
        advice = INSTALL_WORKER
        if "No module named 'torch'" not in facts.error:
            advice = f"`{sys.executable} -c 'import torch'` shows the error in full; if files are damaged, {REINSTALL}"
            if address_space != -1:
                advice = f"ulimit -v unlimited (now {human_bytes(address_space)}), then try again"
        return fault("torch", f"torch cannot be used: {facts.error}", advice, **data)
    assert facts.version is not None
    build = f"built for CUDA {facts.cuda_build}" if facts.cuda_build else "built for CPUs"
    if not facts.version.startswith(f"{TORCH}."):
        return warning(
            "torch",
            f"torch {facts.version}, {build}, is not the release that this version was tested with",
            f"pip install 'torch=={TORCH}.*'",
            **data,
        )
    if not facts.gloo:
        return fault("torch", f"torch {facts.version} has no gloo", "install torch from its own project", **data)
    return ok("torch", f"torch {facts.version}, {build}", **data)


def check_driver(facts: DriverFacts, torch: TorchFacts) -> CheckResult:
    data = asdict(facts)
    if facts.version is None:
        if facts.installed:
            # Without a device file it may be a host without a GPU that has NVIDIA's libraries.
            make = fault if facts.device_files else warning
            message = f"NVIDIA's libraries are installed, but the driver does not answer: {facts.error}"
            return make("driver", message, _driver_advice(facts.error or ""), **data)
        if facts.device_files:
            return fault(
                "driver",
                f"/dev has {facts.device_files} NVIDIA devices, but the driver does not answer: {facts.error}",
                "run nvidia-smi; reload the driver or restart the host; in a container, start it with --gpus all",
                **data,
            )
        return ok("driver", "no NVIDIA driver and no GPU: runs use the CPU", **data)
    major = facts.version.partition(".")[0]
    # A compatibility library may let torch use an older one.
    if major.isdigit() and int(major) < DRIVER and not torch.cuda_available:
        advice = f"install NVIDIA driver {DRIVER} or newer: CUDA 13 needs it"
        return fault("driver", f"NVIDIA driver {facts.version} is too old", advice, **data)
    failed = [f"{card.name}: {card.error}" for card in facts.cards if card.error is not None]
    if failed:
        return fault(
            "driver",
            f"NVIDIA driver {facts.version}, which does not answer for {len(failed)} of {len(facts.cards)} GPUs: "
            + "; ".join(failed),
            "look for NVRM: Xid in the kernel log (dmesg); reset the GPU (nvidia-smi --gpu-reset -i N) or restart the "
            "host; TRAINYARD_EXCLUDE_DEVICES leaves it out",
            **data,
        )
    names = [
        card.name + (f" ({human_bytes(card.memory_bytes)})" if card.memory_bytes is not None else "")
        for card in facts.cards
    ]
    if len({card.name for card in facts.cards}) > 1 and facts.order != "PCI_BUS_ID":
        return warning(
            "driver",
            f"NVIDIA driver {facts.version}; unlike cards: {', '.join(names)}",
            "set CUDA_DEVICE_ORDER=PCI_BUS_ID for runs that you start by hand, as the service does: CUDA alone numbers "
            "the fastest card first",
            **data,
        )
    return ok("driver", f"NVIDIA driver {facts.version}: {', '.join(names) or 'no card'}", **data)


def _driver_advice(error: str) -> str:
    if "mismatch" in error:
        return "the driver was updated, and its older kernel module is loaded: restart the host, or reload the module"
    if "Not Loaded" in error:
        return "if there is a GPU: modprobe nvidia; after an update of the kernel, install the driver again (DKMS)"
    return "run nvidia-smi; reload the driver or restart the host; in a container, start it with --gpus all"


def check_cuda(torch: TorchFacts, driver: DriverFacts) -> CheckResult:
    data = {"cuda_build": torch.cuda_build, "available": torch.cuda_available, "cards": list(torch.cards)}
    if torch.cuda_available:
        names = ", ".join(str(card["name"]) for card in torch.cards)
        return ok("cuda", f"CUDA {torch.cuda_build} on {names}", **data)
    failure = None if is_missing_gpu(torch.cuda_error or "") else torch.cuda_error
    if not driver.cards and failure is None:
        return ok("cuda", "not used: there is no GPU here", **data)
    if torch.error is not None:
        return warning("cuda", "unknown, because torch cannot be used", "see the line about torch", **data)
    cards = f"the driver has {counted(len(driver.cards), 'GPU')}" if driver.cards else "the driver is installed"
    if torch.cuda_build is None:
        advice = "`make setup TORCH=cuda`, or pip install the CUDA build of torch"
        return fault("cuda", f"{cards}, but torch is built for CPUs", advice, **data)
    if driver.visible is not None and not driver.visible.strip(", "):
        advice = "unset CUDA_VISIBLE_DEVICES in the environment of the service"
        return warning("cuda", f"{cards}, but CUDA_VISIBLE_DEVICES is empty and hides them", advice, **data)
    advice = f"check CUDA_VISIBLE_DEVICES (now {driver.visible!r}), the driver, and whether a MIG profile is set"
    if failure is not None:
        advice = cuda_advice(failure) or advice
    return fault("cuda", f"{cards}, but torch cannot use CUDA: {torch.cuda_error}", advice, **data)


def check_nccl(facts: TorchFacts) -> CheckResult:
    data = {"nccl": facts.nccl, "cards": len(facts.cards)}
    if facts.nccl is not None:
        return ok("nccl", f"NCCL {facts.nccl}", **data)
    if len(facts.cards) > 1:
        return fault(
            "nccl", f"{len(facts.cards)} GPUs, but torch has no NCCL", "install the CUDA build of torch", **data
        )
    return ok("nccl", "not needed: there are not several GPUs", **data)


def check_compiler(facts: CompilerFacts, torch: TorchFacts) -> CheckResult:
    data = {**asdict(facts), "triton": torch.triton}
    advice = "install g++ and Python's headers (apt install g++ python3-dev), or do without training.use_compile"
    if facts.path is None and facts.error is not None:
        return warning("compiler", facts.error, "unset CXX, or let it name an installed C++ compiler", **data)
    if facts.path is None:
        return warning("compiler", "no C++ compiler: use_compile will fail", advice, **data)
    if facts.error is not None:
        return warning("compiler", f"{facts.path} cannot compile what torch needs: {facts.error}", advice, **data)
    if torch.cards and torch.triton is None:
        return warning("compiler", "triton is missing: use_compile will fail on a GPU", "pip install triton", **data)
    return ok("compiler", facts.path + (f", triton {torch.triton}" if torch.triton else ""), **data)


def check_bfloat16(facts: TorchFacts) -> Iterator[CheckResult]:
    """Yield one result for the CPU if it would train, and one for each kind of GPU."""
    for device, speeds in facts.products.items():
        if device == "cuda":
            yield _check_gpu_bfloat16(facts.cards, speeds)
        elif not facts.cards:
            yield check_cpu_bfloat16(speeds)


def check_cpu_bfloat16(speeds: ProductSpeeds) -> CheckResult:
    ratio = speeds.bfloat16 / speeds.float32
    data = {**asdict(speeds), "ratio": ratio, "device": "cpu"}
    measured = (
        f"a bfloat16 product reaches {_giga(speeds.bfloat16)} GFLOP/s here, one in float32 "
        f"{_giga(speeds.float32)}: {ratio:.2f} x"
    )
    if ratio < MIN_BFLOAT16_RATIO:
        return warning(
            "bf16", measured, 'set training.dtype "float32": it is faster on this CPU, and more exact', **data
        )
    return ok("bf16", measured, **data)


def _giga(flops: float) -> str:
    # Some CPUs have no bfloat16 instructions and reach less than 1 GFLOP/s.
    return f"{flops / 1e9:,.0f}" if flops >= 10e9 else f"{flops / 1e9:.2g}"


def _check_gpu_bfloat16(cards: Sequence[Mapping[str, object]], speeds: ProductSpeeds) -> CheckResult:
    ratio = speeds.bfloat16 / speeds.float32
    data = {**asdict(speeds), "ratio": ratio, "device": "cuda"}
    name = str(cards[0]["name"])
    measured = f"{name}: bfloat16 {speeds.bfloat16 / 1e12:.0f} TFLOP/s, float32 {speeds.float32 / 1e12:.0f}"
    old = [str(card["name"]) for card in cards if int(str(card["capability"])) < 8]
    if old:
        message = f"{measured}; {', '.join(old)} computes bfloat16 by float32"
        return warning("bf16", message, 'set training.dtype "float16"', **data)
    if ratio < 2:
        advice = "look for another process on the card (nvidia-smi), its power limit and temperature"
        return warning("bf16", f"{measured}: only {ratio:.1f} x", advice, **data)
    return ok("bf16", f"{measured}: {ratio:.1f} x", **data)


def check_memory(facts: MemoryFacts) -> CheckResult:
    data = asdict(facts)
    if facts.total is None or facts.available is None:
        return warning("memory", "the kernel does not report it", "mount /proc in the container", **data)
    usable = min(facts.available, facts.limit) if facts.limit is not None else facts.available
    limited = f", limit of its cgroup {human_bytes(facts.limit)}" if facts.limit is not None else ""
    message = f"{human_bytes(facts.available)} of {human_bytes(facts.total)} available{limited}"
    if usable < MIN_MEMORY:
        advice = (
            "`trainyard plan` shows what a run needs; end other programs, or raise the limit of the container or the "
            "unit (MemoryMax=)"
        )
        return warning("memory", message, advice, **data)
    return ok("memory", message, **data)


def check_disk(facts: DiskFacts) -> CheckResult:
    data = asdict(facts)
    if facts.error is not None:
        first = DISK_ADVICE.get(facts.error_code or "", "let the service's user write there")
        advice = f"{first}, or choose another folder: --home, TRAINYARD_SAVE_ROOTS"
        return fault("disk", f"{facts.path}: nothing can be written in {facts.probed}: {facts.error}", advice, **data)
    if not facts.locks:
        advice = "put the home on a file system with flock: a local disk, or NFS mounted without nolock"
        return fault("disk", f"{facts.path}: file locks do not work, so a run could start twice", advice, **data)
    speed = facts.write_bytes_per_second
    message = (
        f"{facts.path}: {human_bytes(facts.free_bytes)} of {human_bytes(facts.total_bytes)} free, "
        f"{human_bytes(speed)}/s written with fsync"
    )
    if facts.free_bytes < min(LOW_DISK, LOW_DISK_SHARE * facts.total_bytes):
        advice = "free some space: unless TRAINYARD_DISK_LOW_BYTES or _PERCENT is set, the service warns here too"
        return warning("disk", message, advice, **data)
    if facts.free_bytes < MIN_KEPT * SMALL_MODEL_BYTES:
        small = f"{message}; a checkpoint of a 26M model has {human_bytes(SMALL_MODEL_BYTES)}"
        return warning("disk", small, "use a larger disk, or free some space: a run keeps several checkpoints", **data)
    if speed < SLOW_DISK:
        slow = f"{message}: a checkpoint of a 26M model takes {SMALL_MODEL_BYTES / speed:.0f} s"
        return warning("disk", slow, "use a faster disk for the home, or save less often", **data)
    if abs(facts.skew_seconds) > MAX_SKEW_SECONDS:
        skewed = f"{message}; its clock is {facts.skew_seconds:+.0f} s off this host's"
        return warning("disk", skewed, "synchronize the clock of the file server (NTP)", **data)
    return ok("disk", message, **data)


def check_shared_memory(facts: SharedMemoryFacts, cards: int) -> CheckResult:
    data = asdict(facts)
    if facts.total_bytes is None:
        return warning("shared memory", "there is no /dev/shm", "mount a tmpfs there", **data)
    message = f"{human_bytes(facts.total_bytes)} in /dev/shm"
    if facts.total_bytes < SMALL_SHM and cards > 1:
        return warning("shared memory", f"{message}: NCCL needs more", "start the container with --shm-size=8g", **data)
    return ok("shared memory", message, **data)


def check_clock(facts: ClockFacts) -> CheckResult:
    data = asdict(facts)
    if facts.now < facts.newest - 86400:
        advice = "set the clock: TLS, tokens that expire and schedules fail with a wrong one"
        return fault("clock", "the clock is before the installation of this program", advice, **data)
    if facts.synchronized is False:
        advice = "run an NTP service (chrony, systemd-timesyncd); with one host it matters only for times in the log"
        return warning("clock", "the kernel reports that no NTP service keeps the clock", advice, **data)
    return ok("clock", "kept by NTP" if facts.synchronized else "plausible; NTP state unknown", **data)


def check_limits(limits: Mapping[str, tuple[int, int]], cards: int) -> CheckResult:
    """-1 is no limit. The service raises soft limits to the hard ones, so only hard ones of files count."""
    data = {name: list(pair) for name, pair in limits.items()}
    for name, what in (("FSIZE", "files may not be larger than {}"), ("CPU", "a process is killed after {} s of CPU")):
        soft = limits[name][0]
        if soft != -1:
            shown = human_bytes(soft) if name == "FSIZE" else f"{soft:,}"
            flag = {"FSIZE": "-f", "CPU": "-t"}[name]
            return fault(
                "ulimits", what.format(shown), f"ulimit {flag} unlimited, where the service is started", **data
            )
    if limits["AS"][0] != -1:
        library = "CUDA" if cards else "torch"
        message = (
            f"the address space is limited to {human_bytes(limits['AS'][0])}: {library} reserves more than it uses"
        )
        advice = "ulimit -v unlimited, where the service is started; runs can end as out of memory with a limit"
        return warning("ulimits", message, advice, **data)
    files = limits["NOFILE"][1]
    if files != -1 and files < MIN_FILES:
        advice = f"raise the hard limit, as root: ulimit -Hn {MIN_FILES}, or LimitNOFILE={MIN_FILES} under systemd"
        return warning("ulimits", f"at most {files:,} open files", advice, **data)
    if cards > 1 and -1 < limits["MEMLOCK"][0] < 1 << 30:
        message = f"locked memory is limited to {human_bytes(limits['MEMLOCK'][0])}"
        return warning("ulimits", message, "ulimit -l unlimited, if NCCL uses InfiniBand", **data)
    return ok("ulimits", "open files " + ("unlimited" if files == -1 else f"{files:,}"), **data)


PORT_ADVICE = {
    "EADDRINUSE": "if no service of yours runs there, choose another: `trainyard serve --port 8001`",
    "EADDRNOTAVAIL": "TRAINYARD_HOST must be an address of this host: 127.0.0.1, or 0.0.0.0 for all",
    "EACCES": "only root may listen below port 1024: choose another, `trainyard serve --port 8001`",
}


def check_ports(facts: PortFacts) -> CheckResult:
    data = asdict(facts)
    if facts.loopback_error is not None:
        message = f"no port of 127.0.0.1 can be bound: {facts.loopback_error}"
        return fault("ports", message, "bring up the loopback device: ip link set lo up", **data)
    where = f"{facts.host}:{facts.port}"
    if facts.port < 0:
        return warning("ports", f"{facts.error}", "set it to a number from 0 to 65535, or unset it: 8000", **data)
    if facts.error is not None and not facts.is_trainyard:
        advice = PORT_ADVICE.get(facts.error_code or "", "choose another: `trainyard serve --port 8001`")
        return warning("ports", f"{where} cannot be bound: {facts.error}", advice, **data)
    state = "is in use by a service of Trainyard, which answers" if facts.is_trainyard else "is free"
    if facts.host_error is not None:
        message = f"{where} {state}; the host's name {facts.hostname} has no address: {facts.host_error}"
        advice = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME: several ranks look it up"
        return warning("ports", message, advice, **data)
    return ok("ports", f"{where} {state}", **data)


def check_slurm(facts: SlurmFacts) -> CheckResult:
    data = asdict(facts)
    if facts.version is None:
        if facts.wanted:
            advice = "install Slurm's commands in the PATH of the service, or unset TRAINYARD_SLURM"
            return fault("slurm", "TRAINYARD_SLURM is on, but there is no sbatch", advice, **data)
        return ok("slurm", "not installed: jobs run on this host", **data)
    if facts.error is not None:
        make = fault if facts.wanted else warning
        message = f"{facts.version}, but sinfo fails: {facts.error}"
        return make("slurm", message, "check slurmctld and munge: `scontrol ping`", **data)
    used = "used" if facts.wanted else "not used; TRAINYARD_SLURM=on uses it"
    return ok("slurm", f"{facts.version}, partitions {', '.join(facts.partitions) or 'none'} ({used})", **data)
