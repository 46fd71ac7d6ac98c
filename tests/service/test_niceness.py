"""The threads that serve requests let the ranks have the cores first, and no run inherits their niceness."""

import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from tests.service.test_service_process import DEADLINE, Process, start, wait_for
from trainyard.contract.processes import find_by_marker
from trainyard.service.niceness import MAX_NICENESS, raise_niceness
from trainyard.service.settings import InvalidSettings, Settings

__all__ = ["start"]


def own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of(pid: int) -> int | None:
    """None if the process has ended: torchrun starts some that live for a moment."""
    try:
        return os.getpriority(os.PRIO_PROCESS, pid)
    except ProcessLookupError:
        return None


def niceness_of_child() -> int:
    return int(subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout)


def test_only_the_thread_and_what_it_starts_later_are_nicer() -> None:
    base = own_niceness()
    with ThreadPoolExecutor(1) as scheduler, ThreadPoolExecutor(1) as server:
        assert scheduler.submit(own_niceness).result() == base
        server.submit(raise_niceness, 5).result()
        expected = min(MAX_NICENESS, base + 5)
        assert server.submit(own_niceness).result() == expected
        assert server.submit(niceness_of_child).result() == expected
        with ThreadPoolExecutor(1) as requests:
            assert server.submit(lambda: requests.submit(own_niceness).result()).result() == expected
        assert scheduler.submit(niceness_of_child).result() == base
    assert own_niceness() == base


def test_zero_changes_nothing_and_the_limit_is_that_of_the_kernel() -> None:
    base = own_niceness()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(raise_niceness, 0).result()
        assert thread.submit(own_niceness).result() == base
        thread.submit(raise_niceness, 40).result()
        assert thread.submit(own_niceness).result() == MAX_NICENESS


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("19", 19)])
def test_the_setting(text: str, value: int, tmp_path: Path) -> None:
    assert Settings.read({"TRAINYARD_NICENESS": text}, home=tmp_path).niceness == value
    assert Settings.read({}, home=tmp_path).niceness == 0
    for wrong in ("20", "-1", "low"):
        with pytest.raises(InvalidSettings, match="TRAINYARD_NICENESS must be a whole number from 0 to 19"):
            Settings.read({"TRAINYARD_NICENESS": wrong}, home=tmp_path)


@pytest.mark.long
def test_agent_and_ranks_keep_the_niceness_of_the_service(start: Callable[..., Process], tmp_path: Path) -> None:
    base = own_niceness()
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one two three"}\n' * 50)
    service = start(TRAINYARD_DATA_ROOTS=str(tmp_path), TRAINYARD_CPU_SLOTS="2", TRAINYARD_NICENESS="5")
    url = service.url()
    served_by = os.getpriority(os.PRIO_PROCESS, service.process.pid)
    assert served_by == min(MAX_NICENESS, base + 5)
    spec = {
        "data": {"data_path": str(corpus)},
        "training": {"max_steps": 100_000},
        "resources": {"device": "cpu", "nproc_per_node": 2},
    }
    job_id = httpx2.post(f"{url}/jobs", json=spec, timeout=DEADLINE).json()["id"]
    try:
        # The agent, torchrun, and two ranks.
        processes = wait_for(lambda: found if len(found := find_by_marker(f"{job_id}/1")) >= 4 else None)
        found = {niceness for process in processes if (niceness := niceness_of(process.pid)) is not None}
        assert found == {base}
    finally:
        httpx2.post(f"{url}/jobs/{job_id}/kill", timeout=DEADLINE)
        wait_for(lambda: not find_by_marker(f"{job_id}/1"))
