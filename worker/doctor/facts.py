"""Facts about this host, which `worker.doctor.checks` judges. Does not import torch."""

import ctypes
import errno
import http.client
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pynvml

from trainyard.contract.allowed_paths import parse_roots
from trainyard.contract.cgroup import PROC, memory_limit
from trainyard.contract.locks import FileLock, LockBusy
from trainyard.worker.cuda_errors import error_line
from trainyard.worker.openmp import limit_spinning

TORCH_SECONDS = 120.0
DRIVER_SECONDS = 60.0
COMMAND_SECONDS = 20.0
WORKER_PACKAGES = ("numpy", "safetensors", "tokenizers")
PROBE_BYTES = 128 << 20
PROBE_SECONDS = 2.0
CHUNK = 8 << 20
ANSWER_SECONDS = 2.0
INDEX_BEGINS = b"# Trainyard"
"""First bytes of the service's GET /llms.txt."""

COMPILED = """
#include <Python.h>
#include <omp.h>
int trainyard_doctor(void) { return omp_get_max_threads(); }
"""


@dataclass(frozen=True)
class PythonFacts:
    """``packages``: version of each other package that the worker needs, None if it is missing."""

    version: tuple[int, ...]
    executable: str
    packages: Mapping[str, str | None]


@dataclass(frozen=True)
class CardFacts:
    """A GPU as the driver lists it.

    ``memory_bytes``: None for a GPU that shares the memory of the host. ``error``: why the driver does not answer for
    it, or None.
    """

    name: str
    memory_bytes: int | None
    error: str | None = None


@dataclass(frozen=True)
class DriverFacts:
    """``device_files``: GPUs of which /dev has a file. ``error``: why the driver does not answer, or None.

    ``installed``: whether the driver's library NVML is there.
    """

    version: str | None
    error: str | None
    device_files: int
    cards: Sequence[CardFacts] = ()
    visible: str | None = None
    order: str | None = None
    installed: bool = False


@dataclass(frozen=True)
class ProductSpeeds:
    """FLOP/s of matrix products on a kind of device."""

    float32: float
    bfloat16: float


@dataclass(frozen=True)
class TorchFacts:
    """What `worker.doctor.torch_facts` printed. ``error``: why torch cannot be loaded, or None."""

    error: str | None = None
    version: str | None = None
    cuda_build: str | None = None
    cuda_available: bool = False
    cuda_error: str | None = None
    cpu_capability: str | None = None
    gloo: bool = False
    nccl: str | None = None
    triton: str | None = None
    cards: Sequence[Mapping[str, Any]] = ()
    products: Mapping[str, ProductSpeeds] = field(default_factory=dict)


@dataclass(frozen=True)
class CompilerFacts:
    """``error``: last line of the compiler's message if it could not compile a file that uses Python and OpenMP."""

    path: str | None
    error: str | None = None


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes. ``limit``: that of the cgroup, None if there is none."""

    total: int | None
    available: int | None
    limit: int | None


@dataclass(frozen=True)
class DiskFacts:
    """A folder in which runs are stored.

    ``probed``: the existing folder that was tried. ``error_code``: name of the error's number, such as ENOSPC.
    ``skew_seconds``: the clock of the file system minus that of the host. ``locks``: whether a second lock on a file is
    refused while the first one is held.
    """

    path: str
    probed: str
    error: str | None = None
    free_bytes: int = 0
    total_bytes: int = 0
    write_bytes_per_second: float = 0.0
    locks: bool = True
    skew_seconds: float = 0.0
    error_code: str | None = None


@dataclass(frozen=True)
class SharedMemoryFacts:
    """``total_bytes``: size of /dev/shm, None if there is none."""

    total_bytes: int | None
    free_bytes: int | None = None


@dataclass(frozen=True)
class ClockFacts:
    """``now``, ``newest``: seconds since 1970, now and of our files. ``synchronized``: by the kernel; None: unknown."""

    now: float
    newest: float
    synchronized: bool | None


@dataclass(frozen=True)
class PortFacts:
    """Whether the service can listen, and whether this host's name has an address.

    ``port``: -1 if TRAINYARD_PORT is no port. ``error``: why the port cannot be bound; ``error_code``: name of the
    error's number. ``is_trainyard``: a service of Trainyard answers there. ``host_error``: why the host's name has no
    address.
    """

    host: str
    port: int
    error: str | None
    hostname: str
    host_error: str | None
    loopback_error: str | None = None
    error_code: str | None = None
    is_trainyard: bool = False


@dataclass(frozen=True)
class SlurmFacts:
    """``wanted``: TRAINYARD_SLURM is on. ``error``: why `sinfo` failed."""

    wanted: bool
    version: str | None
    partitions: Sequence[str] = ()
    error: str | None = None


def read_python() -> PythonFacts:
    return PythonFacts(
        tuple(sys.version_info[:3]), sys.executable, {name: _installed(name) for name in WORKER_PACKAGES}
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_driver(
    environment: Mapping[str, str], devices: Path = Path("/dev"), seconds: float = DRIVER_SECONDS
) -> DriverFacts:
    """Read driver and GPUs from NVML within ``seconds``, and the device files in ``devices``."""
    files = sum(re.fullmatch(r"nvidia\d+", file.name) is not None for file in devices.glob("nvidia*"))
    visible, order = environment.get("CUDA_VISIBLE_DEVICES"), environment.get("CUDA_DEVICE_ORDER")
    found: list[DriverFacts] = []
    # In a daemon thread, because each call of NVML may hang, and then the thread cannot be ended.
    thread = threading.Thread(target=lambda: found.append(_query_driver(files, visible, order)), daemon=True)
    thread.start()
    thread.join(seconds)
    hangs = DriverFacts(None, f"no answer within {seconds:g} s", files, (), visible, order, True)
    return found[0] if found else hangs


def _query_driver(files: int, visible: str | None, order: str | None) -> DriverFacts:
    try:
        pynvml.nvmlInit()
        found = [_read_card(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = [card for card in found if card is not None]
        return DriverFacts(str(pynvml.nvmlSystemGetDriverVersion()), None, files, cards, visible, order, True)
    except pynvml.NVMLError as error:
        installed = error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return DriverFacts(None, str(error), files, (), visible, order, installed)


def _read_card(index: int) -> CardFacts | None:
    """Return None for a GPU that this container may not use."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = str(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError as error:
        is_other = error.value == pynvml.NVML_ERROR_NO_PERMISSION
        return CardFacts(f"GPU {index}", None, str(error)) if not is_other else None
    try:
        return CardFacts(name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    except pynvml.NVMLError as error:
        has_none = error.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION)
        return CardFacts(name, None, None if has_none else str(error))


def read_torch(seconds: float = TORCH_SECONDS) -> TorchFacts:
    """Run `worker.doctor.torch_facts` in a separate process, which may crash or hang."""
    command = [sys.executable, "-P", "-m", "trainyard.worker.doctor.torch_facts"]
    environment = dict(os.environ)
    limit_spinning(environment)  # as in a run
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return TorchFacts(error=f"torch did not answer within {seconds:g} s")
    if done.returncode != 0:
        return TorchFacts(error=error_line(done.stderr) or f"the process ended with {done.returncode}")
    found = json.loads(done.stdout)
    found.pop("seconds")
    found["products"] = {device: ProductSpeeds(**speeds) for device, speeds in found["products"].items()}
    return TorchFacts(**found)


def read_compiler(environment: Mapping[str, str]) -> CompilerFacts:
    """Compile a small file, as torch does for a model."""
    named = environment.get("CXX")
    path = next((found for name in ([named] if named else ["g++", "clang++"]) if (found := shutil.which(name))), None)
    if path is None:
        return CompilerFacts(None, f"CXX={named} was not found" if named else None)
    include = sysconfig.get_path("include")
    command = [path, "-x", "c++", "-shared", "-fPIC", "-fopenmp", f"-I{include}", "-o", os.devnull, "-"]
    try:
        done = subprocess.run(
            command, input=COMPILED, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CompilerFacts(path, str(error))
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return CompilerFacts(path, None if done.returncode == 0 else (errors or [error_line(done.stderr)])[0])


def read_memory(proc: Path = PROC) -> MemoryFacts:
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(proc / "meminfo"), re.MULTILINE))
    total, available = (int(sizes[name]) * 1024 if name in sizes else None for name in ("MemTotal", "MemAvailable"))
    return MemoryFacts(total, available, memory_limit(proc))


def read_disks(environment: Mapping[str, str]) -> list[DiskFacts]:
    """Try the home and each folder in which jobs may save."""
    home = environment.get("TRAINYARD_HOME") or "trainyard-home"
    roots = parse_roots(environment.get("TRAINYARD_SAVE_ROOTS", ""))
    return [read_disk(path) for path in dict.fromkeys(Path(each).absolute() for each in (home, *roots))]


def read_disk(path: Path, size: int = PROBE_BYTES) -> DiskFacts:
    """Write a file with fsync in ``path``, or in its nearest existing parent, and delete it."""
    # Path.exists raises PermissionError below another user's directory.
    probed = next(each for each in (path, *path.parents) if os.path.exists(each))
    try:
        usage = shutil.disk_usage(probed)
        with tempfile.TemporaryDirectory(prefix=".trainyard-doctor-", dir=probed) as name:
            folder = Path(name)
            speed = _write_speed(folder / "written", min(size, usage.free // 4))
            skew = (folder / "written").stat().st_mtime - time.time()
            locks = _locks_work(folder / "lock")
    except OSError as error:
        return DiskFacts(str(path), str(probed), _text_of(error), error_code=_code(error))
    return DiskFacts(str(path), str(probed), None, usage.free, usage.total, speed, locks, skew)


def _write_speed(file: Path, size: int) -> float:
    # Random bytes: a file system may compress zeros.
    chunk, written = os.urandom(CHUNK), 0
    began = time.perf_counter()
    with file.open("wb", buffering=0) as out:
        while written < max(size, CHUNK) and time.perf_counter() - began < PROBE_SECONDS:
            written += out.write(chunk)
            os.fsync(out.fileno())
    return written / (time.perf_counter() - began)


def _locks_work(file: Path) -> bool:
    with FileLock(file) as first, FileLock(file) as second:
        first.take()
        try:
            second.take()
        except LockBusy:
            return True
    return False


def read_shared_memory(path: Path = Path("/dev/shm")) -> SharedMemoryFacts:  # noqa: S108 - its size is read
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return SharedMemoryFacts(None)
    return SharedMemoryFacts(usage.total, usage.free)


def read_clock() -> ClockFacts:
    return ClockFacts(time.time(), Path(__file__).stat().st_mtime, _is_synchronized())


def _is_synchronized() -> bool | None:
    # struct timex is smaller than this on every architecture. With modes 0 the call only reads; 5 is TIME_ERROR.
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != 5


def read_limits() -> dict[str, tuple[int, int]]:
    """Return soft and hard limits of this process by name; -1 is no limit."""
    names = ("NOFILE", "NPROC", "MEMLOCK", "FSIZE", "AS", "CPU")
    return {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}


def read_ports(environment: Mapping[str, str]) -> PortFacts:
    host = environment.get("TRAINYARD_HOST") or "127.0.0.1"
    text = environment.get("TRAINYARD_PORT") or "8000"
    port = int(text) if text.isdigit() else -1
    name = socket.gethostname()
    loopback = _bind_error("127.0.0.1", 0)
    facts = PortFacts(host, port, None, name, _resolve_error(name), None if loopback is None else _text_of(loopback))
    if not 0 <= port <= 65535:
        return replace(facts, port=-1, error=f"TRAINYARD_PORT={text} is no port")
    error = _bind_error(host, port)
    if error is None:
        return facts
    code = _code(error)
    is_trainyard = code == "EADDRINUSE" and _trainyard_answers(host, port)
    return replace(facts, error=_text_of(error), error_code=code, is_trainyard=is_trainyard)


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None


def _trainyard_answers(host: str, port: int) -> bool:
    """Ask for the list of the documentation, which needs no token. http.client uses no proxy."""
    # 0.0.0.0 and :: are answered on loopback.
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - no socket is bound to it
    connection = http.client.HTTPConnection(reached, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/llms.txt")
        return connection.getresponse().read(len(INDEX_BEGINS)) == INDEX_BEGINS
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _resolve_error(name: str) -> str | None:
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return _text_of(error)
    return None


def _text_of(error: OSError) -> str:
    return error.strerror or str(error)


def _code(error: OSError) -> str | None:
    # The numbers of getaddrinfo's errors are not those of errno.
    return None if isinstance(error, socket.gaierror) or error.errno is None else errno.errorcode.get(error.errno)


def read_slurm(environment: Mapping[str, str]) -> SlurmFacts:
    wanted = environment.get("TRAINYARD_SLURM") == "on"
    found = _output(["sbatch", "--version"])
    if found[0] is None:
        return SlurmFacts(wanted, None)
    partitions, error = _output(["sinfo", "--noheader", "--format=%R"])
    return SlurmFacts(wanted, found[0].strip(), (partitions or "").split(), error)


def _output(command: Sequence[str]) -> tuple[str | None, str | None]:
    """Return output and None, or None and the error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return (done.stdout, None) if done.returncode == 0 else (None, error_line(done.stderr) or str(done.returncode))


def host_description() -> str:
    return f"{socket.gethostname()} ({platform.system()} {platform.release()}, {len(os.sched_getaffinity(0))} cores)"


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
