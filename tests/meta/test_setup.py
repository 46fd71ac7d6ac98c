"""`make setup` installs the build of torch that fits the machine, in pinned versions. Nothing is installed here."""

import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

PYTHON = """#!/bin/sh
# Stands for Python, for venv, and for the Python of the virtual environment: notes what it was asked to do.
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit 0; fi
echo "$*" >> ran.txt
case "$*" in
  *--dry-run*) exit ${NO_CPU_BUILD:-0} ;;
  *"pip"*" -e "*) exit ${PIP_FAILS:-0} ;;
esac
"""
GPU = """#!/bin/sh
case "$1" in -L) echo "GPU 0: NVIDIA H200 (UUID: GPU-1)" ;; *) echo "NVIDIA H200, 535.104.05" ;; esac
"""
NO_GPU = "#!/bin/sh\nexit 9\n"

CUDA = """
cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime
nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13
nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx triton
"""
"""What the CUDA build of torch 2.13.0 requires, and what that requires in turn."""

Make = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run make in a copy of the project's files, with a Python, pip and nvidia-smi that only take notes."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / "programs"
    programs.mkdir()

    def run(*arguments: str, gpu: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        for name, text in {"python3": PYTHON, "nvidia-smi": GPU if gpu else NO_GPU}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        path = f"{programs}:/usr/bin:/bin"
        return subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], str]:
    return lambda: (tmp_path / "ran.txt").read_text() if (tmp_path / "ran.txt").exists() else ""


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_without_a_gpu_the_cpu_build_is_installed(make: Make, ran: Callable[[], str]) -> None:
    done = make("setup")
    assert done.returncode == 0, done.stderr
    assert "for cpu, about 0.2 GB" in done.stdout
    assert re.search(r"install -c constraints.txt torch==[\d.]+\+cpu$", ran(), re.MULTILINE)
    assert "uv" not in ran()


@needs_make
def test_without_a_gpu_and_without_a_configured_cpu_build_uv_fetches_it(make: Make, ran: Callable[[], str]) -> None:
    done = make("setup", NO_CPU_BUILD="1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"-m uv pip install .*--torch-backend cpu torch==[\d.]+$", ran(), re.MULTILINE)
    # Never without a limit of the build: that would be the CUDA build.
    assert ran().index("--torch-backend") < ran().index(" -e ")


@needs_make
def test_with_a_gpu_the_cuda_build_is_installed_and_its_size_and_driver_are_named(
    make: Make, ran: Callable[[], str]
) -> None:
    done = make("setup", gpu=True)
    assert done.returncode == 0, done.stderr
    assert "about 2.7 GB in 29 packages" in done.stdout
    assert "driver of version 580 or newer" in done.stdout
    assert "found: NVIDIA H200, 535.104.05" in done.stdout
    assert re.search(r"install -c constraints.txt torch===[\d.]+$", ran(), re.MULTILINE)


@needs_make
def test_progress_is_shown(make: Make, ran: Callable[[], str]) -> None:
    assert make("setup").returncode == 0
    installs = [line for line in ran().splitlines() if "install" in line and "--dry-run" not in line]
    assert installs
    assert not any("--quiet" in line for line in installs)


@needs_make
def test_a_choice_is_kept_until_another_is_made(make: Make, ran: Callable[[], str]) -> None:
    assert make("setup", "TORCH=cuda").returncode == 0
    before = ran()
    assert make("setup").returncode == 0
    assert ran() == before
    assert make("setup", "TORCH=cpu").returncode == 0
    assert "+cpu" in ran().removeprefix(before)


@needs_make
def test_an_unknown_build_is_refused(make: Make, ran: Callable[[], str]) -> None:
    done = make("setup", "TORCH=rocm")
    assert done.returncode != 0
    assert "give TORCH=cpu or TORCH=cuda" in done.stderr
    assert ran() == ""


@needs_make
def test_a_failed_installation_is_not_taken_for_done(make: Make, ran: Callable[[], str]) -> None:
    assert make("setup", PIP_FAILS="1").returncode != 0
    before = ran()
    assert make("setup").returncode == 0
    assert " -e " in ran().removeprefix(before)


def pins() -> dict[str, str]:
    lines = [line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert all(mark == "==" and version for _, mark, version in lines)
    found = {str(canonicalize_name(name)): version for name, _, version in lines}
    assert len(found) == len(lines)
    return found


def required(package: str, extras: set[str], seen: set[tuple[str, str]]) -> None:
    """Add (package, extra) of everything that ``package`` requires here, if it is installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = canonicalize_name(requirement.name)
        new = {(name, extra) for extra in {"", *requirement.extras}} - seen
        seen |= new
        if new:
            required(name, {"", *requirement.extras}, seen)


def test_each_package_that_is_installed_is_pinned() -> None:
    seen: set[tuple[str, str]] = set()
    required("trainyard", {"", "worker", "corpora", "dev", "bench", "trackers"}, seen)
    assert len(seen) > 50
    assert {name for name, _ in seen} - set(pins()) - {"trainyard", "pip"} == set()


def test_what_the_cuda_build_brings_is_pinned() -> None:
    brought = set(CUDA.split())
    assert brought - set(pins()) == set()
    assert {name for name in pins() if name.startswith(("nvidia-", "cuda-"))} <= {*brought, "nvidia-ml-py"}
