"""A launcher whose agent is real and whose ranks are fake, and a service that listens to it."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.fake_ingest import TOKEN, FakeIngest
from tests.faults import fake_ranks
from tests.unique_ids import unique_job_id
from trainyard.contract.processes import find_by_marker
from trainyard.contract.rundir import AttemptDir, RunDir, write_json
from trainyard.contract.spec import DataSpec, JobSpec, ResourcesSpec, Timeouts
from trainyard.service.launch.base import AttemptRef, Launch
from trainyard.service.launch.local import LocalLauncher

DRIVER = (sys.executable, str(Path(fake_ranks.__file__).with_name("fake_agent.py")))
JOB = unique_job_id("job_fake")
NAME = AttemptRef(JOB, 1)


def until(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until ``condition`` is true, for as long as a process may take to start on a busy host."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[FakeIngest]:
    fake = FakeIngest()
    write_json(tmp_path / "service.json", {"url": fake.url})
    yield fake
    fake.close()


@pytest.fixture
def launcher(tmp_path: Path, service: FakeIngest) -> Iterator[LocalLauncher]:
    local = LocalLauncher(tmp_path, tmp_path / "cache", agent=DRIVER)
    yield local
    for number in (1, 2, 3):
        local.kill(AttemptRef(JOB, number))
        assert find_by_marker(f"{JOB}/{number}") == []


@pytest.fixture
def attempt(tmp_path: Path) -> AttemptDir:
    return RunDir(tmp_path / "runs" / NAME.job_id).attempt(NAME.number)


def go_on(attempt: AttemptDir) -> None:
    """Let ranks continue that wait at a fault ``file_at_N``."""
    (attempt.path.parent / "go").touch()


def launch(timeouts: Timeouts | None = None, number: int = 1, **labels: str) -> Launch:
    resources = ResourcesSpec(nproc_per_node=2, timeouts=timeouts or Timeouts())
    spec = JobSpec(labels=labels, data=DataSpec(data_path="/nowhere"), resources=resources)
    return Launch(AttemptRef(JOB, number), "att_1", spec, ("cpu:0", "cpu:1"), TOKEN)
