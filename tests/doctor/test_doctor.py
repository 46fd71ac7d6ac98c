"""`trainyard doctor` on this host, as a process."""

import errno
import json
import os
import socket
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest import mock

import pynvml
import pytest
import torch

from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.unprivileged import drop_root, public_tmp_dir
from trainyard.worker.doctor import checks, facts
from trainyard.worker.openmp import SPINS

ROOT = Path(__file__).parents[2]
CHECKS = "python torch driver cuda nccl compiler bf16 memory disk clock ulimits ports slurm".split()  # noqa: SIM905


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from trainyard.client.cli.main import main; sys.exit(main())"]
    return subprocess.run(
        [*command, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
        check=False,
    )


def test_this_host_as_json_and_as_files(tmp_path: Path) -> None:
    done = doctor("--json", "--out", str(tmp_path / "report"), "--home", str(tmp_path / "home"))
    document = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    found = [each["check"] for each in document["checks"]]
    assert [name for name in found if name != "shared memory"] == CHECKS
    assert document["object"] == "doctor"
    assert {each["health"] for each in document["checks"]} <= {"ok", "warning", "fault"}
    assert all(each["data"] and bool(each["advice"]) is (each["health"] != "ok") for each in document["checks"])
    assert done.returncode == (1 if document["health"] == "fault" else 0)
    bf16 = next(each["data"] for each in document["checks"] if each["check"] == "bf16")
    assert bf16["ratio"] == pytest.approx(bf16["bfloat16"] / bf16["float32"])
    assert json.loads((tmp_path / "report" / "doctor.json").read_text()) == document
    lines = (tmp_path / "report" / "doctor.txt").read_text().splitlines()
    assert lines[0].startswith(f"trainyard {document['version']} on ")
    # The doctor creates no home, and deletes its temporary files.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a host without CUDA")
def test_gpu_without_a_gpu_is_one_line_and_exit_2() -> None:
    done = doctor("--gpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "there is no usable GPU: " in done.stderr


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    # A file in the path, because root may write in any directory.
    (tmp_path / "file").touch()
    disk = facts.read_disk(tmp_path / "file" / "home")
    assert disk.error is not None
    assert checks.check_disk(disk).health == "fault"


def test_a_home_below_a_folder_of_another_user_is_a_fault() -> None:
    with public_tmp_dir() as folder:
        (folder / "private").mkdir(mode=0)
        with drop_root():
            disk = facts.read_disk(folder / "private" / "home")
        assert (disk.probed, disk.error) == (str(folder / "private"), "Permission denied")
        assert checks.check_disk(disk).health == "fault"


def test_home_and_save_roots_are_tried(tmp_path: Path) -> None:
    environment = {"TRAINYARD_HOME": str(tmp_path / "h"), "TRAINYARD_SAVE_ROOTS": f"{tmp_path}/a:{tmp_path}/h"}
    disks = facts.read_disks(environment)
    assert [disk.path for disk in disks] == [str(tmp_path / "h"), str(tmp_path / "a")]
    assert all(disk.locks and disk.write_bytes_per_second > 0 and disk.free_bytes > 0 for disk in disks)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = facts.read_ports({"TRAINYARD_PORT": str(port)})
    assert found.error == "Address already in use"
    assert facts.read_ports({"TRAINYARD_PORT": "many"}).error == "TRAINYARD_PORT=many is no port"


def test_torch_is_measured_with_threads_that_wait_as_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        environments.append(options["env"])
        return subprocess.CompletedProcess(command, 1, "", "not tested here")

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    facts.read_torch()
    [environment] = environments
    assert (environment["OMP_WAIT_POLICY"], environment["GOMP_SPINCOUNT"]) == ("PASSIVE", SPINS)


def test_the_port_of_a_running_service_is_no_warning(tmp_path: Path) -> None:
    rig = ServiceHarness(tmp_path / "home", f"sqlite:///{tmp_path}/trainyard.db")
    with served(rig) as (host, port):
        found = facts.read_ports({"TRAINYARD_HOST": host, "TRAINYARD_PORT": str(port)})
    rig.close()
    rig.database.close()
    assert (found.error, found.is_trainyard) == ("Address already in use", True)
    assert checks.check_ports(found).health == "ok"


def test_the_port_of_another_program_is_a_warning() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n# Another program")

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.handle_request).start()
        found = facts.read_ports({"TRAINYARD_PORT": str(server.server_port)})
    assert (found.error, found.is_trainyard) == ("Address already in use", False)
    assert "choose another" in checks.check_ports(found).advice


def test_a_full_disk_and_a_disk_of_another_user_get_different_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(facts, "_write_speed", full)
    found = checks.check_disk(facts.read_disk(tmp_path))
    assert (found.health, "free some space" in found.advice) == ("fault", True)


def test_a_report_that_cannot_be_written_is_known_before_the_checks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = doctor("--out", str(tmp_path / "file" / "report"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "the report cannot be written" in done.stderr


def test_a_torch_that_does_not_answer_is_named() -> None:
    assert checks.check_torch(facts.read_torch(seconds=0.001)).health == "fault"


def test_a_driver_that_hangs_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    may_answer = Event()

    def hanging() -> None:
        may_answer.wait()
        raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

    monkeypatch.setattr(pynvml, "nvmlInit", hanging)
    (tmp_path / "nvidia0").touch()
    result = checks.check_driver(facts.read_driver({}, tmp_path, seconds=0.01), facts.TorchFacts())
    may_answer.set()
    assert (result.health, "no answer within 0.01 s" in result.message) == ("fault", True)


def test_a_driver_that_is_not_loaded_differs_from_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors = [pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_LIBRARY_NOT_FOUND]
    for error, installed in zip(errors, (True, False), strict=True):
        monkeypatch.setattr(pynvml, "nvmlInit", mock.Mock(side_effect=pynvml.NVMLError(error)))
        assert facts.read_driver({}, tmp_path).installed is installed


def test_a_compiler_that_cannot_compile_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'error: no room' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert facts.read_compiler({"CXX": str(broken)}).error == "error: no room"
    assert facts.read_compiler({"CXX": str(tmp_path / "gone")}).path is None


def test_the_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, checks.PYTHON))
    assert any(line.startswith(f"torch>={checks.TORCH},") for line in project["optional-dependencies"]["worker"])
    packages = {line.partition(">=")[0] for line in project["optional-dependencies"]["worker"]}
    assert packages == {"torch", *facts.WORKER_PACKAGES}
    assert f"version {checks.DRIVER} or newer" in (ROOT / "Makefile").read_text()
