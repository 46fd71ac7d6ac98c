"""The memory cgroup of a process, from forged files of both versions."""

from pathlib import Path

import pytest

from trainyard.contract.cgroup import memory_limit, own_cgroup

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
def test_without_a_count_of_kills_there_is_no_cgroup(host: Host, events: str) -> None:
    made = host.write("0::/\n", "cgroup2", "nsdelegate", "")
    (made / "memory.events").write_text(events)
    assert own_cgroup(host.proc) is None


def test_a_host_without_cgroups(tmp_path: Path) -> None:
    assert own_cgroup(tmp_path) is None


def test_the_lowest_limit_of_all_folders_above_counts(host: Host) -> None:
    """MemoryMax= of a systemd slice holds for its units too."""
    made = host.write("0::/system.slice/trainyard.service\n", "cgroup2", "nsdelegate", "system.slice/trainyard.service")
    assert memory_limit(host.proc) is None
    (made / "memory.max").write_text("max\n")
    (made.parent / "memory.max").write_text("4000000000\n")
    (host.cgroups / "memory.max").write_text("8000000000\n")
    # Not a folder of the cgroups.
    (host.cgroups.parent / "memory.max").write_text("1000\n")
    assert memory_limit(host.proc) == 4_000_000_000
    (made / "memory.max").write_text("2000000000\n")
    assert memory_limit(host.proc) == 2_000_000_000


def test_the_limit_of_version_1(host: Host) -> None:
    made = host.write("4:memory:/jobs/a\n0::/\n", "cgroup", "memory", "jobs/a")
    (made / "memory.limit_in_bytes").write_text("3000000000\n")
    assert memory_limit(host.proc) == 3_000_000_000
