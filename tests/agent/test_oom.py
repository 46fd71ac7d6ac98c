"""Out-of-memory kills: from forged /proc and cgroup files of both versions, and from a real cgroup."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainyard.worker.agent.oom import (
    OOM_WINDOW_SECONDS,
    Cgroup,
    OomMonitor,
    OomReport,
    own_cgroup,
    resident_bytes_of_descendants,
)

MOUNT = "36 35 0:29 / {point} rw,relatime shared:9 - {kind} {kind} rw,{options}\n"


class Host:
    """A forged host: /proc/self/cgroup, /proc/self/mountinfo and the cgroup's own files."""

    def __init__(self, tmp_path: Path) -> None:
        self.proc, self.cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (self.proc / "self").mkdir(parents=True)

    def write(self, membership: str, kind: str, options: str, folder: str) -> Path:
        (self.proc / "self/cgroup").write_text(membership)
        mount = MOUNT.format(point=self.cgroups, kind=kind, options=options)
        others = b"20 1 8:1 / / rw - ext4 /dev/sda rw\n21 20 8:2 / /mnt/B\xfccher rw - ext4 /dev/sdb rw\n"
        # The kernel escapes blanks, tabs and line ends, and no other separators of lines and words.
        others += "22 20 8:3 / /mnt/a\u2028b\fc\u3000d rw - ext4 /dev/sdc rw\n".encode()
        (self.proc / "self/mountinfo").write_bytes(others + mount.encode())
        made = self.cgroups / folder
        made.mkdir(parents=True)
        return made


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_version_2(host: Host) -> None:
    made = host.write("0::/jobs/a\n", "cgroup2", "nsdelegate", "jobs/a")
    (made / "memory.events").write_text("low 0\nhigh 2\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n")
    (made / "memory.max").write_text("4000000000\n")
    found = own_cgroup(host.proc)
    assert found is not None
    assert (found.kills(), found.limit_bytes()) == (2, 4_000_000_000)
    (made / "memory.max").write_text("max\n")
    assert found.limit_bytes() is None


def test_version_1(host: Host) -> None:
    made = host.write("9:cpu,cpuacct:/x\n4:memory:/jobs/a\n", "cgroup", "memory", "jobs/a")
    (made / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    (made / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    found = own_cgroup(host.proc)
    assert found is not None
    assert (found.kills(), found.limit_bytes()) == (5, None)


def test_a_container_that_sees_its_own_folder_as_the_root(host: Host) -> None:
    """Without a cgroup namespace the path is the host's, and is not there."""
    made = host.write("0::/docker/0123\n", "cgroup2", "nsdelegate", "")
    (made / "memory.events").write_text("oom_kill 1\n")
    found = own_cgroup(host.proc)
    assert found is not None
    assert found.kills() == 1


@pytest.mark.parametrize("events", ["", "oom_kill many\n", "low 0\n", "one two three\n"])
def test_what_nobody_counts_is_not_guessed_at(host: Host, events: str) -> None:
    made = host.write("0::/\n", "cgroup2", "nsdelegate", "")
    (made / "memory.events").write_text(events)
    assert own_cgroup(host.proc) is None
    assert OomMonitor(None, lambda: 0).report(5.0) == OomReport()


def test_a_host_without_cgroups(tmp_path: Path) -> None:
    assert own_cgroup(tmp_path) is None


@pytest.fixture
def counted(tmp_path: Path) -> tuple[Path, Cgroup]:
    (tmp_path / "memory.max").write_text("max\n")
    events = tmp_path / "memory.events"
    events.write_text("oom_kill 3\n")
    return events, Cgroup(events, tmp_path / "memory.max")


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
    cgroup = Cgroup(folder / own.events.name, folder / own.limit.name)
    try:
        folder.mkdir()
        cgroup.limit.write_text(str(64 * 2**20))
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
