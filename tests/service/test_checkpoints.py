"""Files of checkpoints: only those of the manifest, also in ranges. The last valid checkpoint is never deleted."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads
from tests.service.live_server import DEADLINE, served
from trainyard.contract.rundir import RunDir
from trainyard.contract.status import Reason
from trainyard.service.errors import RangeUnsatisfiable
from trainyard.service.generation.checkpoints import find_checkpoint
from trainyard.service.jobs import repository
from trainyard.service.jobs.resume_compat import resume_candidates
from trainyard.service.storage.checkpoint_files import (
    ByteRange,
    is_valid,
    parse_range,
    read_manifest,
)

MODEL = bytes(range(256)) * 40
OTHERS = {"optimizer.safetensors": b"o" * 100, "state.json": b"{}\n"}


def write_checkpoint(path: Path, model: bytes = MODEL) -> None:
    path.mkdir(parents=True, exist_ok=True)
    files = {"model.safetensors": model, **OTHERS}
    for name, data in files.items():
        (path / name).write_bytes(data)
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    (path / "manifest.json").write_text(json.dumps({"files": listed}))


def saved(rig: ServiceHarness, *steps: int, **groups: Any) -> tuple[str, Any]:
    """A running job with real checkpoints."""
    job_id, attempt = rig.running(steps=1000, **groups)
    for step in steps:
        write_checkpoint(rig.checkpoint(job_id, attempt, step))
    rig.ship(attempt)
    return job_id, attempt


def at_rest(rig: ServiceHarness, *steps: int) -> str:
    job_id, attempt = saved(rig, *steps)
    rig.post_action(job_id, "pause")
    rig.exit(attempt, "stopped", step=max(steps))
    return job_id


def url(job_id: str, step: int, name: str = "model.safetensors") -> str:
    return f"/jobs/{job_id}/checkpoints/{step}/files/{name}"


# Files


def test_a_file_whole_and_in_pieces(any_rig: ServiceHarness) -> None:
    job_id, _ = saved(any_rig, 10, 20)
    whole = any_rig.client.get(url(job_id, 10))
    assert (whole.status_code, whole.content) == (200, MODEL)
    etag = whole.headers["etag"]
    assert etag == f'"{hashlib.sha256(MODEL).hexdigest()}"'
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == 'attachment; filename="model.safetensors"'
    for asked, expected in (("bytes=0-9", MODEL[:10]), ("bytes=10000-", MODEL[10000:]), ("bytes=-5", MODEL[-5:])):
        piece = any_rig.client.get(url(job_id, 10), headers={"Range": asked, "If-Range": etag})
        assert (piece.status_code, piece.content) == (206, expected), asked
        assert piece.headers["content-range"].endswith(f"/{len(MODEL)}")
    other = any_rig.client.get(url(job_id, 10), headers={"Range": "bytes=0-9", "If-Range": '"another"'})
    assert (other.status_code, len(other.content)) == (200, len(MODEL))
    behind = any_rig.client.get(url(job_id, 10), headers={"Range": f"bytes={len(MODEL)}-"})
    assert (behind.status_code, behind.json()["code"]) == (416, "range_not_satisfiable")
    assert behind.headers["content-range"] == f"bytes */{len(MODEL)}"
    manifest = any_rig.client.get(url(job_id, 20, "manifest.json"))
    assert set(manifest.json()["files"]) == {"model.safetensors", *OTHERS}
    assert "etag" not in manifest.headers


def test_head_of_a_file_does_not_read_it(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    path = rig.home / "runs" / job_id / "checkpoints" / "step-00000010" / "model.safetensors"
    os.truncate(path, 1 << 40)  # sparse: reading the whole file would take minutes
    with (
        served(rig) as (host, port),
        contextlib.closing(http.client.HTTPConnection(host, port, timeout=DEADLINE)) as line,
    ):
        for given, status, length in (({}, 200, 1 << 40), ({"Range": "bytes=5-"}, 206, (1 << 40) - 5)):
            line.request("HEAD", url(job_id, 10), headers=given)
            answer = line.getresponse()
            assert (answer.status, answer.headers["content-length"], answer.read()) == (status, str(length), b"")
            assert answer.headers["etag"]
            # The next request on the connection is answered once the response to this one is complete.
            line.request("GET", "/health")
            assert json.loads(line.getresponse().read())["status"] == "ok"


def test_a_file_is_not_read_on_when_the_client_has_left(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    path = rig.home / "runs" / job_id / "checkpoints" / "step-00000010" / "model.safetensors"
    os.truncate(path, 1 << 40)  # sparse: reading the whole file would take minutes

    def is_open() -> bool:
        return any(os.path.realpath(f"/proc/self/fd/{number}") == str(path) for number in os.listdir("/proc/self/fd"))

    with served(rig) as address:
        with socket.create_connection(address, timeout=DEADLINE) as client:
            client.sendall(f"GET {url(job_id, 10)} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            assert is_open()
        deadline = time.monotonic() + DEADLINE
        while is_open():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, (0, 99, False)),
        ("bytes=0-0", (0, 0, True)),
        ("bytes=5-1000", (5, 99, True)),
        ("bytes = 5 - 7", (5, 7, True)),
        ("bytes=-1000", (0, 99, True)),
        ("bytes=9-5", (0, 99, False)),
        ("bytes=0-1,5-6", (0, 99, False)),
        ("lines=0-1", (0, 99, False)),
        ("bytes=-", (0, 99, False)),
        ("bytes=x-y", (0, 99, False)),
    ],
)
def test_ranges(asked: str | None, expected: tuple[int, int, bool]) -> None:
    found = parse_range(asked, 100)
    assert (found.first, found.last, found.partial) == expected
    assert ByteRange(0, 9, 100, partial=True).length == 10


@pytest.mark.parametrize(("asked", "size"), [("bytes=100-", 100), ("bytes=-0", 100), ("bytes=0-", 0)])
def test_ranges_behind_the_end(asked: str, size: int) -> None:
    with pytest.raises(RangeUnsatisfiable):
        parse_range(asked, size)


def test_only_what_the_manifest_names(rig: ServiceHarness, tmp_path: Path) -> None:
    job_id, _ = saved(rig, 10)
    directory = rig.home / "runs" / job_id / "checkpoints" / "step-00000010"
    (directory / "secret").write_text("canary")
    (rig.home / "secret").write_text("canary")
    for name in ("secret", "none", "..", "../secret", "..%2f..%2fsecret", "%2e%2e%2f%2e%2e%2fsecret",
                 "%252e%252e%252fsecret", "/etc/passwd", "%2fetc%2fpasswd", "x" * 300, "a%00b"):  # fmt: skip
        answer = rig.client.get(url(job_id, 10, name))
        assert answer.status_code in (404, 405, 422), name
        assert "canary" not in answer.text
    for step in ("11", "-1", "x", "9" * 30):
        assert rig.client.get(f"/jobs/{job_id}/checkpoints/{step}/files/state.json").status_code in (404, 422)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["../../../secret"] = {"bytes": 6, "sha256": "a"}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert sorted(read_manifest(directory) or {}) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert rig.client.get(url(job_id, 10, "state.json")).content == b"{}\n"


def test_links_are_not_followed(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10, 20)
    checkpoints = rig.home / "runs" / job_id / "checkpoints"
    secret = rig.home / "secret"
    secret.write_text("canary")
    target = checkpoints / "step-00000010" / "state.json"
    target.unlink()
    target.symlink_to(secret)
    assert rig.client.get(url(job_id, 10, "state.json")).json()["code"] == "file_not_found"
    os.rename(checkpoints / "step-00000020", checkpoints / "elsewhere")
    (checkpoints / "step-00000020").symlink_to(checkpoints / "elsewhere")
    assert rig.client.get(url(job_id, 20, "state.json")).json()["code"] == "file_not_found"
    target.unlink()
    os.mkfifo(target)
    assert rig.client.get(url(job_id, 10, "state.json")).json()["code"] == "file_not_found"


def test_a_path_that_an_attempt_made_up_is_not_opened(rig: ServiceHarness, tmp_path: Path) -> None:
    job_id, attempt = rig.running()
    write_checkpoint(tmp_path / "step-00000005")
    attempt.say("checkpoint", step=5, path=str(tmp_path / "step-00000005"), bytes=1, sha256="a")
    rig.ship(attempt)
    assert rig.client.get(url(job_id, 5)).json()["code"] == "checkpoint_not_found"
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/5").json()["code"] == "checkpoint_not_found"
    assert (tmp_path / "step-00000005").exists()


def test_weights_that_were_kept_alone_can_be_had(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    path = rig.home / "runs" / job_id / "checkpoints" / "step-00000005-weights"
    write_checkpoint(path)
    attempt.say("checkpoint", step=5, path=str(path), bytes=1, sha256="a", checkpoint_kind="weights")
    rig.ship(attempt)
    assert rig.client.get(url(job_id, 5)).content == MODEL
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/5").json()["code"] == "checkpoint_not_found"


def test_a_save_dir_of_its_own(make_rig: MakeHarness, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(sqlite_url)
    place = rig.home / "elsewhere"
    place.mkdir()
    job_id, attempt = rig.running(checkpoint={"save_dir": str(place)})
    for step in (1, 2):
        path = place / job_id / "checkpoints" / f"step-{step:08d}"
        write_checkpoint(path)
        attempt.say("checkpoint", step=step, path=str(path), bytes=1, sha256="a")
    rig.ship(attempt)
    assert rig.client.get(url(job_id, 2)).content == MODEL
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/1").status_code == 204
    rig.close()


def resume_elsewhere(rig: ServiceHarness, job_id: str) -> None:
    """Resume with another ``save_dir``: the next attempt will move the files of the run directory to it."""
    attempt = RunDir(rig.home / "runs" / job_id).attempt(1)
    attempt.path.mkdir(parents=True, exist_ok=True)
    attempt.spec.write_text(json.dumps({"checkpoint": {"save_dir": None}}))
    (rig.home / "larger").mkdir()
    rig.post_action(job_id, "resume", {"save_dir": str(rig.home / "larger")})


def test_checkpoints_can_be_used_before_the_next_attempt_moves_them(rig: ServiceHarness) -> None:
    job_id = at_rest(rig, 10, 20, 30)
    resume_elsewhere(rig, job_id)
    assert rig.client.get(url(job_id, 20)).content == MODEL
    forked = rig.client.post(f"/jobs/{job_id}/fork", json={"step": 20, "overrides": {"training": {"epochs": 9}}})
    assert forked.status_code == 201, forked.text
    with rig.database.read() as session:
        job = repository.find(session, job_id)
        assert [each.step for each in resume_candidates(session, rig.settings, job, None)] == [30, 20, 10]
        assert find_checkpoint(session, rig.settings, job, None)[0] == 30
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/10").status_code == 204


# Removal


def test_a_checkpoint_is_removed_with_its_files(any_rig: ServiceHarness) -> None:
    job_id = at_rest(any_rig, 10, 20, 30)
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/20").status_code == 204
    assert [c["step"] for c in any_rig.data(job_id, "checkpoints")] == [30, 10]
    checkpoints = any_rig.home / "runs" / job_id / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["step-00000010", "step-00000030"]
    removed = [e for e in any_rig.data(job_id, "events") if e["kind"] == "checkpoint_removed"]
    assert [(e["actor"], e["data"]["step"]) for e in removed] == [("local", 20)]
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/20").status_code == 404


def test_never_the_last_valid_one(any_rig: ServiceHarness) -> None:
    job_id = at_rest(any_rig, 10, 20)
    checkpoints = any_rig.home / "runs" / job_id / "checkpoints"
    (checkpoints / "step-00000020" / "model.safetensors").write_bytes(b"cut")
    assert not is_valid(checkpoints / "step-00000020")
    answer = any_rig.client.delete(f"/jobs/{job_id}/checkpoints/10")
    assert (answer.status_code, answer.json()["code"]) == (409, "last_checkpoint")
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/20").status_code == 204, "the damaged one may go"
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/10").json()["code"] == "last_checkpoint"
    assert any_rig.job(job_id)["checkpoint"]["step"] == 10


def test_two_removals_at_once_leave_one(any_rig: ServiceHarness) -> None:
    for _ in range(3):
        job_id = at_rest(any_rig, 10, 20)
        urls = [f"/jobs/{job_id}/checkpoints/{step}" for step in (10, 20, 10, 20)]
        answers = in_threads(4, lambda i, urls=urls: any_rig.client.delete(urls[i]).status_code)
        assert sorted(answers)[0] == 204
        assert sorted(answers)[1:] in ([404, 409, 409], [409, 409, 409], [404, 404, 409]), answers
        assert len(any_rig.data(job_id, "checkpoints")) == 1


def test_a_live_run_keeps_what_it_may_need(rig: ServiceHarness) -> None:
    job_id, attempt = saved(rig, 10, 20, 30)
    for step, code in ((30, "checkpoint_in_use"), (10, None)):
        answer = rig.client.delete(f"/jobs/{job_id}/checkpoints/{step}")
        assert (answer.json()["code"] if code else answer.status_code) == (code or 204)
    rig.exit(attempt, "crashed", Reason.HUNG, step=30)
    rig.post_action(job_id, "resume", {"step": 20})
    assert rig.client.delete(f"/jobs/{job_id}/checkpoints/20").json()["code"] == "checkpoint_in_use"
    rig.reconcile()
    beginning = rig.launcher.of(job_id, 2)
    rig.heartbeat(beginning)
    for step in (20, 30):
        assert rig.client.delete(f"/jobs/{job_id}/checkpoints/{step}").json()["code"] == "checkpoint_in_use", "it loads"


def test_what_cannot_be_renamed_stays(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = at_rest(rig, 10, 20)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    answer = rig.client.delete(f"/jobs/{job_id}/checkpoints/10")
    assert (answer.status_code, answer.json()["detail"]) == (409, "It cannot be removed: Permission denied.")
    assert len(rig.data(job_id, "checkpoints")) == 2


def test_a_page_is_not_empty_while_more_follow(any_rig: ServiceHarness) -> None:
    job_id, attempt = any_rig.running()
    paths = {step: any_rig.checkpoint(job_id, attempt, step) for step in range(1, 8)}
    any_rig.ship(attempt)
    for step in (7, 6, 5, 3, 1):  # by hand
        shutil.rmtree(paths[step])
    first = any_rig.get(f"/jobs/{job_id}/checkpoints", limit=1)
    assert ([row["step"] for row in first["data"]], first["has_more"]) == ([4], True)
    second = any_rig.get(f"/jobs/{job_id}/checkpoints", limit=2, after=first["data"][0]["id"])
    assert ([row["step"] for row in second["data"]], second["has_more"]) == ([2], False)
    shutil.rmtree(paths[2])
    assert any_rig.get(f"/jobs/{job_id}/checkpoints", limit=1, after=first["data"][0]["id"])["data"] == []
