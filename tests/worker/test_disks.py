"""Disks that are really full, read-only, closed or limited: a failed save is reported, nothing before it is lost."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from tests.unprivileged import NOBODY, public_tmp_dir
from tests.worker import rank_runner
from tests.worker.test_resume_start import Yard, publish
from tests.worker.test_saver import Bench, train_on
from trainyard.contract.events import CheckpointSaved, WarningEvent
from trainyard.contract.rundir import ArtifactDir
from trainyard.worker.checkpoint import files, saver
from trainyard.worker.checkpoint.resume import saved_corpora

CLONE_NEWNS = 0x20000


def mounts() -> bool:
    """Whether a process of ours may mount something that no other process sees."""
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not mounts(), reason="may not mount here")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")


def of_its_own(work: Callable[[Path], None], path: Path) -> None:
    """Run ``work`` in a process of its own, whose mounts, limits and user end with it."""
    log = path / "printed"
    process = rank_runner.SERVER.Process(target=in_child, args=(work, path, log))
    process.start()
    process.join(rank_runner.DEADLINE)
    assert process.exitcode == 0, log.read_text()


def in_child(work: Callable[[Path], None], path: Path, log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with mock.patch.object(saver, "RETRY_SECONDS", 0.0):
        work(path)


def mount(path: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(path)], check=True)


def own_disk(path: Path) -> Path:
    """A file system that this process alone sees."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    disk = path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=16m", "none")
    return disk


def begun(path: Path) -> Bench:
    """Step 1 is saved and training goes on."""
    bench = Bench(path, keep_last=5)
    train_on(bench.train_state)
    bench.save(1)
    return bench


def require_told_and_kept(bench: Bench, step: int, why: str) -> None:
    """The save of ``step`` failed: one warning, the first save is whole, nothing torn is left, training continues."""
    bench.save(step)
    (warning,) = bench.of(WarningEvent)
    assert (warning.code, warning.step) == ("save_failed", step)
    assert why in warning.message
    assert warning.message.endswith("; training continues")
    assert [event.step for event in bench.of(CheckpointSaved)] == [1]
    assert files.verify(bench.artifacts.checkpoint(1)) is None
    assert [path.name for path in bench.artifacts.checkpoints.iterdir()] == ["step-00000001"]
    train_on(bench.train_state)


def require_the_next_works(bench: Bench, step: int) -> None:
    bench.save(step, required=True)
    assert [event.step for event in bench.of(CheckpointSaved)] == [1, step]
    assert len(bench.of(WarningEvent)) == 1
    for saved in (1, step):
        assert files.verify(bench.artifacts.checkpoint(saved)) is None


def full(path: Path) -> None:
    disk = own_disk(path)
    bench = begun(disk)
    held = os.statvfs(disk)
    used = (held.f_blocks - held.f_bfree) * held.f_frsize
    # Room for a model more, and for half of an optimizer's state.
    mount(disk, "-o", f"remount,size={used + used // 2}")
    require_told_and_kept(bench, 2, "No space left on device")
    mount(disk, "-o", "remount,size=16m")
    require_the_next_works(bench, 3)


def read_only(path: Path) -> None:
    disk = own_disk(path)
    bench = begun(disk)
    mount(disk, "-o", "remount,ro")
    require_told_and_kept(bench, 2, "Read-only file system")
    mount(disk, "-o", "remount,rw")
    require_the_next_works(bench, 3)


def limited(path: Path) -> None:
    bench = begun(path / "disk")
    size = (bench.artifacts.checkpoint(1) / "optimizer.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, resource.RLIM_INFINITY))
    require_told_and_kept(bench, 2, "File too large")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    require_the_next_works(bench, 3)


def closed(path: Path) -> None:
    bench = begun(path / "disk")
    os.seteuid(NOBODY)
    require_told_and_kept(bench, 2, "Permission denied")
    os.seteuid(0)
    require_the_next_works(bench, 3)


def gone(path: Path) -> None:
    """The folder was moved or deleted: it is not made again at its old place, and the warning says so."""
    bench = begun(path / "disk")
    shutil.rmtree(path / "disk")
    bench.save(2)
    assert [event.step for event in bench.of(CheckpointSaved)] == [1]
    assert not (path / "disk").exists()
    assert [event.code for event in bench.of(WarningEvent)][-1] == "save_failed"


def skip_private_directory(path: Path) -> None:
    """A directory in save_dir that only root may enter, such as lost+found at the root of a disk."""
    yard = Yard(path, save_dir=True)
    (path / "lost+found").mkdir(mode=0o700)
    earlier = publish(ArtifactDir(path / "earlier"), 5)
    yard.artifacts.path.mkdir(parents=True, exist_ok=True)
    for folder in (yard.artifacts.path, earlier.parent):
        os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    assert list(saved_corpora(yard.spec, yard.run, yard.artifacts)) == ["c"]
    assert yard.begin() == earlier
    os.seteuid(0)


@needs_mounts
def test_a_full_disk(tmp_path: Path) -> None:
    of_its_own(full, tmp_path)


@needs_mounts
def test_a_disk_that_became_read_only(tmp_path: Path) -> None:
    of_its_own(read_only, tmp_path)


def test_a_limit_on_files(tmp_path: Path) -> None:
    of_its_own(limited, tmp_path)


@needs_root
def test_a_directory_that_was_closed() -> None:
    with public_tmp_dir() as folder:
        of_its_own(closed, folder)


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    of_its_own(gone, tmp_path)


@needs_root
def test_from_resume_skips_a_directory_of_another_user() -> None:
    with public_tmp_dir() as folder:
        of_its_own(skip_private_directory, folder)
