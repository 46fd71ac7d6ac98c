"""Fetching and removing checkpoints, against a fake that keeps files and can cut them off."""

import hashlib
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, job, lost, problem
from trainyard.client.api import Client
from trainyard.client.errors import ChecksumMismatch, NotFound, ServiceUnreachable

JOB = "job_7f3kq9"
MODEL = bytes(range(256)) * 30
FILES = {"model.safetensors": MODEL, "state.json": b"{}\n"}


@pytest.fixture
def stored(service: FakeService) -> FakeService:
    """A service with one checkpoint, of step 12000."""
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()}
    service.files = {12000: {**FILES, "manifest.json": json.dumps({"files": listed}).encode()}}
    return service


def test_every_file_is_fetched_and_checked(trainyard: Client, stored: FakeService, tmp_path: Path) -> None:
    names = trainyard.download(JOB, 12000, tmp_path / "new")
    assert names == ["model.safetensors", "state.json", "manifest.json"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == stored.files[12000]
    asked = len(stored.requests)
    assert trainyard.download(JOB, 12000, tmp_path / "new") == names
    assert len(stored.requests) == asked + 1, "what is there already is not fetched again"


def test_an_interrupted_download_is_resumed(trainyard: Client, stored: FakeService, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(MODEL[:1000])
    trainyard.download(JOB, 12000, tmp_path)
    asked = next(request for request in stored.requests if request.url.path.endswith("model.safetensors"))
    assert asked.headers["Range"] == "bytes=1000-"
    assert asked.headers["If-Range"] == f'"{hashlib.sha256(MODEL).hexdigest()}"'
    assert (tmp_path / "model.safetensors").read_bytes() == MODEL
    assert not list(tmp_path.glob("*.part"))


def test_what_is_damaged_is_never_kept(trainyard: Client, stored: FakeService, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.part").write_bytes(b"x" * 1000)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors"):
        trainyard.download(JOB, 12000, tmp_path)
    assert list(tmp_path.iterdir()) == []
    trainyard.download(JOB, 12000, tmp_path)


def test_a_download_that_was_interrupted_in_its_checksum_is_resumed(
    trainyard: Client, stored: FakeService, tmp_path: Path
) -> None:
    """The user has pressed Ctrl-C while the checksum of a large file was computed."""
    (tmp_path / "model.safetensors.part").write_bytes(MODEL)
    (tmp_path / "state.json.part").write_bytes(b"more than the file has")
    trainyard.download(JOB, 12000, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == stored.files[12000]
    assert [request.headers.get("Range") for request in stored.requests] == [None, None], "nothing is fetched twice"
    other = bytes(reversed(MODEL))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.part").write_bytes(other)
    trainyard.download(JOB, 12000, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == MODEL


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Let a file grow to at most ``free`` bytes. Python ignores the signal, so a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_error_of_a_full_disk_names_the_file(run: Run, stored: FakeService, tmp_path: Path) -> None:
    command = ("checkpoints", "pre-12", "--download", "12000", "--out", str(tmp_path))
    with full_disk(1000):
        code, _, err = run(*command)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{tmp_path}/model.safetensors.part cannot be read or written: File too large" in err
    assert run(*command)[0] == 0
    (tmp_path / "manifest.json").unlink()
    with full_disk(10):
        code, _, err = run(*command)
    assert code == 1
    assert f"{tmp_path}/manifest.json.part cannot be read or written" in err
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", ".hidden", ""])
def test_a_manifest_cannot_write_elsewhere(trainyard: Client, stored: FakeService, tmp_path: Path, name: str) -> None:
    stored.files[12000]["manifest.json"] = json.dumps({"files": {name: {"bytes": 1, "sha256": "a"}}}).encode()
    with pytest.raises(ChecksumMismatch):
        trainyard.download(JOB, 12000, tmp_path / "in")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


def test_rejections_and_lost_responses(trainyard: Client, stored: FakeService, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        trainyard.download(JOB, 7, tmp_path)
    stored.faults = [lost]
    with pytest.raises(ServiceUnreachable):
        trainyard.download(JOB, 12000, tmp_path)


def test_the_command_downloads(run: Run, stored: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("checkpoints", "pre-12", "--download", "12000")
    assert (code, out) == (0, f"{JOB}-step-12000\n")
    assert "3 files" in err
    code, out, _ = run("checkpoints", "pre-12", "--download", "12000", "--out", "x", "--json")
    assert json.loads(out)["files"] == ["model.safetensors", "state.json", "manifest.json"]
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == MODEL


@pytest.mark.parametrize(("typed", "code", "deleted"), [("y\n", 0, True), ("n\n", 1, False)])
def test_the_command_asks_before_it_deletes(
    run: Run, stored: FakeService, typed: str, code: int, deleted: bool
) -> None:
    assert run("checkpoints", "pre-12", "--delete", "12000", typed=typed, terminal=True)[0] == code
    assert (stored.files == {}) is deleted


def test_the_command_deletes_unasked_off_a_terminal(run: Run, stored: FakeService) -> None:
    code, out, _ = run("checkpoints", "pre-12", "--delete", "12000", "--json", "-y")
    assert (code, json.loads(out)) == (0, {"job_id": JOB, "step": 12000, "deleted": True})
    stored.faults = [lambda _: None, lambda _: problem(409, "last_checkpoint", "It is the last valid checkpoint.")]
    code, _, err = run("checkpoints", "pre-12", "--delete", "11000", "-y")
    assert code == 1
    assert "last valid" in err
    assert run("checkpoints", "pre-12", "--delete", "1", "--download", "2")[0] == 2


def test_the_list_is_as_it_was(run: Run, service: FakeService) -> None:
    service.rows["checkpoints"] = [{**job()["checkpoint"], "kind": "full", "loss": 2.5, "sha256": "ab", "id": "1"}]
    code, out, _ = run("checkpoints", "pre-12")
    assert code == 0
    assert "12,000  full  2.5000" in out
