"""Exports: each directory is complete or absent, and the exporter runs in a child process that can be killed."""

import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.faults.service_home import until
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads
from tests.service.test_checkpoints import at_rest, resume_elsewhere, saved, write_checkpoint
from trainyard.contract.locks import FileLock
from trainyard.service import app
from trainyard.service.api import dependencies
from trainyard.service.api.dependencies import MAX_EXPORTS
from trainyard.service.exports import subprocess as child

EXPORTER = """
import os, pathlib, signal, sys, time
source, form, out = sys.argv[1], sys.argv[3], pathlib.Path(sys.argv[5])
what = (pathlib.Path(source) / "state.json").read_text()
if "refuse" in what:
    sys.exit("noise\\ntrainyard export: the model has no class there")
if "crash" in what:
    os.kill(os.getpid(), signal.SIGKILL)
if "slow" in what:
    time.sleep(60)
out.mkdir()
(out / "config.json").write_text(form + " " + " ".join(sys.argv[6:]))
(out / "model.safetensors").write_bytes((pathlib.Path(source) / "model.safetensors").read_bytes())
"""


@pytest.fixture(autouse=True)
def exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "WORKER_EXPORT", (sys.executable, "-S", "-c", EXPORTER))


def export(rig: ServiceHarness, job_id: str, step: int, body: object = None) -> tuple[int, dict[str, Any]]:
    answer = rig.client.post(f"/jobs/{job_id}/checkpoints/{step}/export", json=body)
    return answer.status_code, answer.json()


def test_an_export_is_written_beside_the_run_and_found_again(any_rig: ServiceHarness) -> None:
    job_id, _ = saved(any_rig, 10, 20, checkpoint={"save_weight": "mine"})
    status, made = export(any_rig, job_id, 10, {"format": "hf"})
    path = any_rig.home / "runs" / job_id / "exports" / "step-00000010-hf"
    assert (status, made["path"], made["step"], made["format"]) == (201, str(path), 10, "hf")
    assert (path / "config.json").read_text() == "hf --tokenizer byte --stem mine"
    assert [file["name"] for file in made["files"]] == ["config.json", "model.safetensors"]
    assert made["bytes"] == sum(file["bytes"] for file in made["files"])
    assert export(any_rig, job_id, 10) == (200, made), "hf is the default, and the same export is the same path"
    assert export(any_rig, job_id, 20, {"format": "minimind"})[0] == 201
    listed = any_rig.data(job_id, "exports")
    assert [(one["step"], one["format"]) for one in listed] == [(20, "minimind"), (10, "hf")]
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        ".lock", ".step-00000010-hf.json", ".step-00000020-minimind.json", "step-00000010-hf",
        "step-00000020-minimind"]  # fmt: skip
    told = [event for event in any_rig.data(job_id, "events") if event["kind"] == "exported"]
    assert (told[0]["actor"], told[0]["data"]["path"]) == ("local", str(path))
    assert len(told) == 2


def test_other_weights_of_the_same_step_are_exported_anew(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    _, made = export(rig, job_id, 10)
    write_checkpoint(rig.home / "runs" / job_id / "checkpoints" / "step-00000010", b"other weights")
    status, again = export(rig, job_id, 10)
    assert (status, again["path"]) == (201, made["path"])
    assert (Path(again["path"]) / "model.safetensors").read_bytes() == b"other weights"


def test_files_are_fetched_whole_and_in_pieces_and_no_others(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    _, made = export(rig, job_id, 10)
    url = f"/jobs/{job_id}/exports/10/hf/files"
    assert rig.client.get(f"{url}/config.json").text == "hf --tokenizer byte --stem pretrain"
    piece = rig.client.get(f"{url}/config.json", headers={"Range": "bytes=0-1"})
    assert (piece.status_code, piece.text) == (206, "hf")
    (Path(made["path"]) / "link").symlink_to("/etc/hostname")
    for name in ("link", "none", "..%2f.lock", "..", ".hidden", "%2fetc%2fpasswd"):
        assert rig.client.get(f"{url}/{name}").status_code == 404, name
    assert rig.client.get(f"/jobs/{job_id}/exports/11/hf/files/config.json").json()["code"] == "export_not_found"
    assert rig.client.get(f"/jobs/{job_id}/exports/10/gguf/files/config.json").status_code == 422


@pytest.mark.parametrize(
    ("state", "said"),
    [("refuse", "The model has no class there."), ("crash", "The exporter was ended by signal 9: no output")],
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(any_rig: ServiceHarness, state: str, said: str) -> None:
    job_id, _ = saved(any_rig, 10)
    directory = any_rig.home / "runs" / job_id
    broken(directory / "checkpoints" / "step-00000010", state)
    status, problem = export(any_rig, job_id, 10)
    assert (status, problem["code"], problem["detail"]) == (409, "export_failed", said)
    assert [entry.name for entry in (directory / "exports").iterdir()] == [".lock"]
    assert any_rig.data(job_id, "exports") == []


WAITS_FOR_DELETION = """
import os, sys, time
while os.path.exists(sys.argv[1]):
    time.sleep(0.01)
open(sys.argv[1] + "/model.safetensors")
"""


def test_an_export_whose_job_is_deleted_meanwhile_shows_no_path(
    any_rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "WORKER_EXPORT", (sys.executable, "-S", "-c", WAITS_FOR_DELETION))
    job_id, attempt = saved(any_rig, 10)
    any_rig.exit(attempt, "completed", step=10)
    source = any_rig.home / "runs" / job_id / "exports" / ".source-step-00000010-hf"

    def act(index: int) -> tuple[int, str]:
        if index == 0:
            status, problem = export(any_rig, job_id, 10)
            return status, f"{problem['code']}: {problem['detail']}"
        deadline = time.monotonic() + 60
        while not source.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return any_rig.client.delete(f"/jobs/{job_id}").status_code, ""

    exported, deleted = in_threads(2, act)
    assert deleted == (204, "")
    assert exported == (404, "job_not_found: No job has this id. GET /jobs?name=NAME finds jobs by their name.")


def broken(directory: Path, state: str) -> None:
    with mock.patch.dict("tests.service.test_checkpoints.OTHERS", {"state.json": state.encode()}):
        write_checkpoint(directory)


def test_one_that_takes_too_long_is_ended(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "TIMEOUT_SECONDS", 0.3)
    job_id, _ = saved(rig, 10)
    broken(rig.home / "runs" / job_id / "checkpoints" / "step-00000010", "slow")
    assert export(rig, job_id, 10)[1]["code"] == "export_timeout"
    FileLock(rig.home / "runs" / job_id / "exports" / ".lock").take().release()


def test_a_service_that_stops_ends_its_exports(rig: ServiceHarness) -> None:
    """Python waits for the threads of a pool before it exits, so the service would run until the export has ended."""
    job_id, _ = saved(rig, 10)
    exports = rig.home / "runs" / job_id / "exports"
    broken(rig.home / "runs" / job_id / "checkpoints" / "step-00000010", "slow")
    stopping = rig.app.state.app_state.exports_stopping

    def act(index: int) -> tuple[int, str]:
        if index == 0:
            status, problem = export(rig, job_id, 10)
            return status, problem["code"]
        until(lambda: any(exports.glob(".source-*")))
        stopping.set()
        return 0, ""

    assert in_threads(2, act)[0] == (503, "service_stopping")
    assert [path.name for path in exports.iterdir()] == [".lock"]
    FileLock.acquire(exports / ".lock").release()
    stopping.clear()
    rig.client.__exit__(None, None, None)
    assert stopping.is_set()


def test_what_a_killed_service_left_is_removed_by_the_next_export_of_any_step(rig: ServiceHarness) -> None:
    """The links of `.source-` keep the weights of a checkpoint that was deleted."""
    job_id, _ = saved(rig, 10, 20)
    exports = rig.home / "runs" / job_id / "exports"
    for name in (".source-step-00000010-hf", ".building-step-00000010-hf", "..building-step-00000010-hf.exporting"):
        (exports / name).mkdir(parents=True)
    assert export(rig, job_id, 20)[0] == 201
    names = {path.name for path in exports.iterdir()}
    assert names == {".lock", "step-00000020-hf", ".step-00000020-hf.json"}


def test_one_at_a_time_also_where_a_child_outlived_its_service(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10, 20)
    broken(rig.home / "runs" / job_id / "checkpoints" / "step-00000010", "slow")
    children: list[Any] = []
    real = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        children.append(real(*args, **kwargs))
        return children[-1]

    with mock.patch.object(subprocess, "Popen", popen):
        first = threading.Thread(target=export, args=(rig, job_id, 10))
        first.start()
        deadline = time.monotonic() + 60
        while not children and time.monotonic() < deadline:
            time.sleep(0.01)
        status, problem = export(rig, job_id, 20)
        assert (status, problem["code"]) == (409, "export_under_way")
        children[0].kill()
        first.join(60)
    assert export(rig, job_id, 20)[0] == 201


WAIT_FOR_FILE = """
import pathlib, sys, time
home = pathlib.Path(sys.argv[1]).parents[3]
open(home / "begun", "a").write("x")
while not (home / "go").exists():
    time.sleep(0.01)
pathlib.Path(sys.argv[5]).mkdir()
"""


def test_exports_leave_threads_for_other_requests(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 32 exports at once, all threads were in use. No page and no agent got a response for minutes."""
    monkeypatch.setattr(app, "REQUEST_THREADS", 3)
    monkeypatch.setattr(child, "WORKER_EXPORT", (sys.executable, "-S", "-c", WAIT_FOR_FILE))
    rig = make_rig(sqlite_url)
    jobs = []
    for _ in range(6):
        job_id, attempt = saved(rig, 10)
        rig.exit(attempt, "completed", step=10)
        jobs.append(job_id)
    begun = rig.home / "begun"

    def act(index: int) -> int:
        if index < len(jobs):
            return export(rig, jobs[index], 10)[0]
        try:
            until(lambda: begun.exists() and len(begun.read_text()) == MAX_EXPORTS)
            status: int = rig.client.get("/jobs").status_code
            return status
        finally:
            (rig.home / "go").touch()

    *exported, listed = in_threads(len(jobs) + 1, act)
    assert listed == 200
    assert exported == [201] * len(jobs)


def test_a_request_that_waited_for_an_equal_one_finds_its_export(
    make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that gave up after its timeout and asked again: the same is not exported and recorded twice."""
    monkeypatch.setattr(dependencies, "MAX_EXPORTS", 1)
    monkeypatch.setattr(child, "WORKER_EXPORT", (sys.executable, "-S", "-c", WAIT_FOR_FILE))
    rig = make_rig(sqlite_url)
    first, asked_twice = (saved(rig, 10)[0] for _ in range(2))
    waiting: Any = vars(rig.app.state.app_state.exports)["_work_queue"]

    def act(index: int) -> int:
        if index == 0:
            return export(rig, first, 10)[0]
        try:
            until((rig.home / "begun").exists)
            if index < 3:
                return export(rig, asked_twice, 10)[0]
            until(lambda: waiting.qsize() == 2)
            return 0
        finally:
            if index == 3:
                (rig.home / "go").touch()

    statuses = in_threads(4, act)
    assert (statuses[0], sorted(statuses[1:3])) == (201, [200, 201])
    assert [event["kind"] for event in rig.data(asked_twice, "events")].count("exported") == 1


def test_exports_are_found_before_the_next_attempt_moves_them(rig: ServiceHarness) -> None:
    job_id = at_rest(rig, 10, 20)
    assert export(rig, job_id, 10)[0] == 201
    resume_elsewhere(rig, job_id)
    assert export(rig, job_id, 20)[0] == 201
    larger = str(rig.home / "larger")
    listed = [(each["step"], each["path"].startswith(larger)) for each in rig.data(job_id, "exports")]
    assert listed == [(20, True), (10, False)]
    for step in (10, 20):
        assert rig.client.get(f"/jobs/{job_id}/exports/{step}/hf/files/config.json").status_code == 200


def test_without_torch_it_says_so_at_once(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id, _ = saved(rig, 10)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    status, problem = export(rig, job_id, 10)
    assert (status, problem["code"]) == (501, "export_unavailable")


def test_a_disk_that_takes_nothing_is_said(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    (rig.home / "runs" / job_id / "exports").write_text("in the way")
    status, problem = export(rig, job_id, 10)
    assert (status, problem["code"]) == (507, "disk_trouble")
    assert "Not a directory" in problem["detail"]


def test_what_is_not_there_or_not_understood(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    assert export(rig, job_id, 11)[1]["code"] == "checkpoint_not_found"
    assert export(rig, "job_none", 10)[1]["code"] == "job_not_found"
    assert export(rig, job_id, 10, {"format": "gguf"})[1]["errors"][0]["pointer"] == "/format"
    assert export(rig, job_id, 10, {"form": "hf"})[1]["errors"][0]["pointer"] == "/form"


def test_the_weights_of_a_job_are_named_once_they_are_written(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    assert rig.job(job_id)["weights_path"] is None
    file = rig.home / "runs" / job_id / "out" / "pretrain_512.pth"
    file.parent.mkdir()
    file.write_bytes(b"")
    until(lambda: rig.job(job_id)["weights_path"] == str(file))
