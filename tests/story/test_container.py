"""A stop of a container, whose end ends every process: all runs save first, and resume at the next start."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.corpus import write_docstrings
from tests.story.service_process import END_SECONDS, Served, until
from tests.story.test_story import spec
from trainyard.contract.processes import children, descendants
from trainyard.contract.rundir import RunDir

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which("unshare") is None or os.geteuid() != 0, reason="a pid namespace needs unshare and root"
    ),
]

NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")
INIT = 'trap "kill -TERM \\$service" TERM; "$@" & service=$!; wait $service; wait $service'
"""What `init: true` of compose does: pass SIGTERM on, and end with the service."""

STEPS = 100_000
SEEN = 20


class Container(Served):
    """A service below an init in a pid namespace of its own. The end of the init kills every process in it."""

    def __init__(self, home: Path, roots: list[Path]) -> None:
        service = (sys.executable, "-m", "trainyard.service")
        super().__init__(home, roots, command=(*NAMESPACE, "bash", "-c", INIT, "init", *service))

    def stop(self) -> None:
        """Send SIGTERM to the init alone, and wait until nothing of the container is left."""
        assert self.process is not None
        (init,) = children(self.process.pid)
        assert init.send(signal.SIGTERM)
        self.process.wait(400)

    def destroy(self) -> None:
        if self.process is not None and self.process.poll() is None:
            for process in descendants(self.process.pid):
                process.send(signal.SIGKILL)
            self.process.wait(END_SECONDS)


def words(pid: int) -> list[bytes]:
    """Return the command line; empty if the process has just ended, as those do that ask for the devices."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    write_docstrings(tmp_path / "corpus.jsonl", 400)
    container = Container(tmp_path / "home", [tmp_path])
    container.start()
    yield container
    container.destroy()


def test_a_stopped_container_loses_no_step_and_its_runs_resume_at_the_next_start(
    container: Container, tmp_path: Path
) -> None:
    wanted = spec(tmp_path / "corpus.jsonl")
    wanted["training"]["max_steps"] = STEPS
    wanted["checkpoint"]["save_interval"] = STEPS
    job_id = container.submit(wanted)
    waiting = container.submit(wanted)
    until(lambda: container.step(job_id) >= SEEN)

    container.stop()

    log = (container.home / "service.log").read_text()
    assert "asked to save and stop" in log
    assert log.splitlines()[-1].endswith(" stopped")
    (saved,) = (
        int(path.name.removeprefix("step-"))
        for path in RunDir(container.home / "runs" / job_id).path.glob("checkpoints/step-*")
    )
    assert saved >= SEEN

    container.start()
    # Before the other job, which waits for the same devices.
    until(lambda: container.job(job_id)["attempt"] == 2 and container.step(job_id) > saved)
    attempts = container.get(f"/jobs/{job_id}/attempts").json()["data"]
    by_number = {attempt["number"]: attempt for attempt in attempts}
    assert (by_number[1]["end_step"], by_number[1]["reason"]) == (saved, "terminated")
    assert by_number[2]["start_step"] == saved
    assert by_number[2]["trigger"] == "restart"
    assert container.job(waiting)["status"] == "queued"


def test_a_second_signal_does_not_wait(container: Container, tmp_path: Path) -> None:
    """The service ends, and with it the container, although the run would save for a long time."""
    wanted = spec(tmp_path / "corpus.jsonl")
    wanted["training"]["max_steps"] = STEPS
    job_id = container.submit(wanted)
    until(lambda: container.step(job_id) >= 1)
    assert container.process is not None
    for process in descendants(container.process.pid):
        if any(word.startswith(b"trainyard.worker") for word in words(process.pid)):
            process.send(signal.SIGSTOP)
    # A process that it is about to start has its command line for a moment.
    (init,) = children(container.process.pid)
    (service,) = [child for child in children(init.pid) if is_service(child.pid)]
    service.send(signal.SIGTERM)
    until(lambda: container.get("/ready").status_code == 503)
    assert "its runs save first" in container.get("/ready").text
    service.send(signal.SIGTERM)
    container.process.wait(END_SECONDS)


def is_service(pid: int) -> bool:
    found = words(pid)
    return found[:1] == [os.fsencode(sys.executable)] and b"trainyard.service" in found


def test_a_container_is_recognised() -> None:
    program = "from trainyard.contract.processes import in_container; print(in_container())"
    done = subprocess.run([*NAMESPACE, sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(not Path("/run/systemd/system").exists())
