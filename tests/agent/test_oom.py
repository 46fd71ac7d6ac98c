"""Out-of-memory kills: from the files of a forged cgroup, and from a real one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainyard.contract.cgroup import Cgroup, own_cgroup
from trainyard.worker.agent.oom import OOM_WINDOW_SECONDS, OomMonitor, OomReport, resident_bytes_of_descendants


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Path, Cgroup]:
    (tmp_path / "memory.max").write_text("max\n")
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 3\n")
    return events, Cgroup(events, (tmp_path / "memory.max",))


def test_without_a_cgroup_no_kill_is_assumed() -> None:
    assert OomMonitor(None, lambda: 0).report(5.0) == OomReport()


def test_kills_of_before_and_of_long_ago_are_others(counted: tuple[Path, Cgroup]) -> None:
    events, cgroup = counted
    watch = OomMonitor(cgroup, lambda: 0)
    watch.poll(0.0)
    assert watch.report(1.0).kills == 0, "three before the attempt began"
    events.write_text("oom_kill 4\n")
    watch.poll(100.0)
    assert watch.report(100.0 + OOM_WINDOW_SECONDS).kills == 1
    assert watch.report(101.0 + OOM_WINDOW_SECONDS).kills == 0, "a neighbour's: this attempt went on"
    events.write_text("oom_kill 6\n")
    assert watch.report(500.0).kills == 2, "seen at the end only, and so just before it"


def test_the_peak_is_the_largest_of_all_looks(counted: tuple[Path, Cgroup]) -> None:
    sizes = iter([10, 70, 999, 30])
    watch = OomMonitor(counted[1], lambda: next(sizes))
    for now in (0.0, 1.0, 1.5, 2.5, 3.6):
        watch.poll(now)
        if now == 1.0:
            assert watch.report(now).peak == 70
    assert watch.report(4.0).peak == 999


def test_the_memory_of_children_is_seen() -> None:
    hungry = "import sys, time; held = b'x' * 60_000_000; sys.stdout.write('.'); sys.stdout.flush(); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", hungry], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.read(1)
        assert 60_000_000 < resident_bytes_of_descendants(os.getpid()) < 2**40
    finally:
        child.kill()
        child.communicate()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Cgroup]:
    """A cgroup below this process's own, with 64 MB; where none can be made here, the test is skipped."""
    own = own_cgroup()
    if own is None:
        pytest.skip("no memory cgroup that counts kills")
    folder = own.events.parent / f"trainyard-test-{os.getpid()}"
    limit = folder / own.limits[0].name
    cgroup = Cgroup(folder / own.events.name, (limit,))
    try:
        folder.mkdir()
        limit.write_text(str(64 * 2**20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no cgroup can be made here: {error}")
    yield cgroup
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def test_a_real_kill_of_the_kernel(real: Cgroup) -> None:
    if real.kills() is None:
        pytest.skip("this cgroup does not count kills")
    watch = OomMonitor(real, lambda: 0)
    hungry = (
        f"open({str(real.events.parent / 'cgroup.procs')!r}, 'w').write('0')\n"
        "held = []\nfor _ in range(40):\n    held.append(bytearray(b'x' * 2**22))\n"
    )
    child = subprocess.run([sys.executable, "-S", "-c", hungry], capture_output=True, text=True, timeout=60)
    if child.returncode != -signal.SIGKILL:
        pytest.skip(f"the limit is not enforced here: exit code {child.returncode} {child.stderr[-200:]}")
    shortage = watch.report(1.0)
    assert shortage.kills == 1
    assert shortage.limit == 64 * 2**20
