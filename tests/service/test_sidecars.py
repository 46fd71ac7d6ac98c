"""Side processes: they end with their service in every way, and give their device back when a job needs it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.fakes.inventory import FixedInventory
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from trainyard.contract.processes import ProcessIdentity
from trainyard.contract.sidecar import encode_message
from trainyard.service.db.models import DeviceLeaseRow
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.launch.environment import IMPORT_ROOT
from trainyard.service.sidecars.sidecars import Sidecar, Sidecars

ECHO = """
from trainyard.worker.sidecar import ServiceLink, lower_priority
import os
lower_priority()
link = ServiceLink.from_environment()
while True:
    message = link.receive(wait=True)
    link.send({**message, "pid": os.getpid(), "cuda": os.environ["CUDA_VISIBLE_DEVICES"], "nice": os.nice(0),
               "order": os.environ.get("CUDA_DEVICE_ORDER")})
"""

GPUS = (Device("cuda:0", "cuda", uuid="GPU-a"), Device("cuda:1", "cuda", uuid="GPU-b"), *cpu_slots(1))


class Started(Sidecars):
    """Side processes whose connections are closed at the end."""

    def __init__(self, rig: ServiceHarness, schedules: bool = True) -> None:
        self.all: list[Sidecar] = []
        super().__init__(rig.database, FixedInventory(tuple(rig.devices)), 1, schedules=lambda: schedules)

    def start(self, name: str, command: Sequence[str], use_gpu: bool = False) -> Sidecar:
        self.all.append(super().start(name, command, use_gpu))
        return self.all[-1]

    def close(self) -> None:
        super().close()
        for sidecar in self.all:
            sidecar.close()


@pytest.fixture
def sidecars(rig: ServiceHarness) -> Iterator[Started]:
    made = Started(rig)
    yield made
    made.close()


def ask(sidecar: Sidecar, **message: object) -> dict[str, object]:
    sidecar.connection.settimeout(60)
    sidecar.connection.sendall(encode_message(message))
    with sidecar.connection.makefile("rb") as lines:
        answer: dict[str, object] = json.loads(lines.readline())
    return answer


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leased(rig: ServiceHarness) -> list[str]:
    with rig.database.read() as session:
        return list(session.scalars(select(DeviceLeaseRow.device).order_by(DeviceLeaseRow.device)))


def test_one_answers_without_a_gpu_and_with_low_priority(sidecars: Started) -> None:
    sidecar = sidecars.start("echo", ["-c", ECHO], use_gpu=True)
    answer = ask(sidecar, text="中")
    assert (answer["text"], answer["cuda"], answer["pid"]) == ("中", "", sidecar.pid)
    assert (sidecar.device, answer["nice"]) == ("cpu", min(19, os.nice(0) + 10))
    sidecar.kill()
    assert sidecar.ended.wait(60)


def test_it_exits_when_its_connection_ends(sidecars: Started) -> None:
    sidecar = sidecars.start("echo", ["-c", ECHO])
    ask(sidecar)
    sidecar.connection.close()
    assert sidecar.ended.wait(60)


def test_all_end_with_the_service_and_no_more_start(sidecars: Started) -> None:
    started = [sidecars.start("echo", ["-c", ECHO]) for _ in range(2)]
    sidecars.close()
    assert all(sidecar.ended.is_set() for sidecar in started)
    with pytest.raises(OSError, match="stopping"):
        sidecars.start("echo", ["-c", ECHO])


OWNER = """
import sys
from pathlib import Path
from trainyard.service.db.engine import Database
from trainyard.service.devices.inventory import Device
from trainyard.service.sidecars.sidecars import Sidecars
class Gpu:
    def devices(self):
        return (Device("cuda:0", "cuda"),)
sidecars = Sidecars(Database(sys.argv[1]), Gpu(), 1, schedules=lambda: True)
print(sidecars.start("sleep", ["-c", sys.argv[2]], use_gpu=True).pid, flush=True)
sys.stdin.read()
"""
READS = ECHO.replace("while True:", "link.receive(wait=True)\nwhile True:")


def owner(rig: ServiceHarness, program: str) -> tuple["subprocess.Popen[str]", ProcessIdentity]:
    command = [sys.executable, "-c", OWNER, rig.url, program]
    environment = {**os.environ, "PYTHONPATH": IMPORT_ROOT}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    identity = ProcessIdentity.of(int(process.stdout.readline()))
    assert identity is not None
    return process, identity


def kill(process: "subprocess.Popen[str]") -> None:
    with process:
        process.kill()


def test_none_is_left_if_the_service_is_killed(rig: ServiceHarness) -> None:
    process, sidecar = owner(rig, READS)
    kill(process)
    until(lambda: not sidecar.alive())


def test_a_stopped_one_is_ended_by_the_next_service_which_frees_its_device(rig: ServiceHarness) -> None:
    process, sidecar = owner(rig, READS)
    try:
        sidecar.send(signal.SIGSTOP)
        other = Started(rig)
        other.end_orphans()
        assert sidecar.alive(), "its service is alive"
        assert leased(rig) == ["cuda:0"]
        kill(process)
        other.end_orphans()
        assert not sidecar.alive()
        assert leased(rig) == []
    finally:
        process.kill()
        sidecar.send(signal.SIGKILL)


@pytest.fixture
def gpus(make_rig: MakeHarness, any_url: str) -> Iterator[ServiceHarness]:
    made = make_rig(any_url, devices=GPUS)
    yield made
    made.close()


def test_it_leases_a_free_gpu_and_gives_it_back_for_a_job(gpus: ServiceHarness) -> None:
    sidecars = Started(gpus)
    gpus.scheduler.reclaim_devices_by(sidecars.reclaim)
    first = sidecars.start("echo", ["-c", ECHO], use_gpu=True)
    answer = ask(first)
    # Without PCI_BUS_ID, CUDA's device 0 is the fastest GPU, which may belong to a job.
    assert (first.device, answer["cuda"], answer["order"]) == ("cuda:0", "GPU-a", "PCI_BUS_ID")
    assert leased(gpus) == ["cuda:0"]
    cpu = sidecars.start("echo", ["-c", ECHO])
    job_id = gpus.submit(resources={"device": "cuda"})
    gpus.reconcile()
    launch = gpus.launcher.of(job_id).launch
    assert (launch.devices, launch.cuda_visible) == (("cuda:1",), "GPU-b"), "the free one is enough"
    assert not first.ended.is_set()
    assert sidecars.start("echo", ["-c", ECHO], use_gpu=True).device == "cpu", "none is free"
    other = gpus.submit(resources={"device": "cuda"})
    gpus.reconcile()
    assert gpus.launcher.of(other).launch.devices == ("cuda:0",)
    assert (first.reclaimed, first.ended.is_set(), cpu.ended.is_set()) == (True, True, False)
    sidecars.close()
    assert leased(gpus) == ["cuda:0", "cuda:1"], "those of the jobs"


def test_it_takes_no_gpu_that_a_queued_job_waits_for(gpus: ServiceHarness) -> None:
    gpus.submit(resources={"device": "cuda", "nproc_per_node": 2})
    sidecars = Started(gpus)
    assert sidecars.start("echo", ["-c", ECHO], use_gpu=True).device == "cpu"
    sidecars.close()


def test_a_gpu_is_not_taken_by_a_service_that_does_not_schedule(gpus: ServiceHarness) -> None:
    sidecars = Started(gpus, schedules=False)
    assert sidecars.start("echo", ["-c", ECHO], use_gpu=True).device == "cpu"
    sidecars.close()


class ReclaimedAtStart(Started):
    """A job needs the device when it is leased, but the side process is not started yet."""

    def _spawn(self, name: str, command: Sequence[str], device: str) -> Sidecar:
        if device != "cpu":
            self.reclaim(device)
        return super()._spawn(name, command, device)


def test_reclaiming_a_device_while_its_process_starts_ends_no_other_process(gpus: ServiceHarness) -> None:
    sidecars = ReclaimedAtStart(gpus)
    other = sidecars.start("echo", ["-c", ECHO])
    starting = sidecars.start("echo", ["-c", ECHO], use_gpu=True)
    assert leased(gpus) == ["cuda:0"], "the device is not free, because the process has started"
    assert ask(other)["nice"] == ask(starting)["nice"], "both processes are alive"
    sidecars.reclaim("cuda:0")  # the next round
    assert (starting.reclaimed, other.ended.is_set(), leased(gpus)) == (True, False, [])
    sidecars.close()


def test_a_process_that_ends_late_keeps_the_lease_of_another_service(gpus: ServiceHarness) -> None:
    sidecars = Started(gpus)
    first = sidecars.start("echo", ["-c", ECHO], use_gpu=True)
    with gpus.database.write() as session:
        row = session.get(DeviceLeaseRow, "cuda:0")
        assert row is not None
        row.sidecar = "another service's identity"  # the new leader has reclaimed and leased the device
    first.kill()
    assert first.ended.wait(60)
    assert leased(gpus) == ["cuda:0"]
    sidecars.close()


def test_the_device_of_one_that_ended_is_free_again(gpus: ServiceHarness, tmp_path: Path) -> None:
    sidecars = Started(gpus)
    sidecar = sidecars.start("fails", ["-c", "import sys; sys.exit('out of luck')"], use_gpu=True)
    assert sidecar.device == "cuda:0"
    assert sidecar.ended.wait(60)
    assert leased(gpus) == []
    assert gpus.get("/devices")["data"][0]["job_id"] is None
    sidecars.close()
