"""The checkpoints that `watch` shows, verified only if the manifest matches the record."""

import json
from typing import Any

from tests.client.fake_service import FakeService, problem
from trainyard.client.api import Client
from trainyard.client.cli.watch.checkpoints import POLL_EVERY, CheckpointPoller, manifest_matches

JOB = "job_7f3kq9"
SHA = "a" * 64


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "bytes": 1100, "sha256": SHA, **changes}


def manifest(sha256: str = SHA) -> bytes:
    return json.dumps({"files": {"model.safetensors": {"bytes": 700, "sha256": sha256}, "s": {"bytes": 300}}}).encode()


def test_checkpoints_are_fetched_after_a_change_and_periodically(trainyard: Client, service: FakeService) -> None:
    service.rows["checkpoints"] = [record(200), record(100)]
    service.files = {200: {"manifest.json": manifest()}, 300: {"manifest.json": manifest("b" * 64)}}
    saves = CheckpointPoller(trainyard, JOB)
    assert saves.poll(None) is None
    kept = saves.poll(record(200))
    assert kept is not None
    assert (kept.count, kept.bytes, kept.verified) == (2, 2200, True)
    asked = len(service.requests)
    saves.poll(record(200))
    assert len(service.requests) == asked
    service.rows["checkpoints"] = [record(300)]
    kept = saves.poll(record(300))
    assert kept is not None
    assert (kept.count, kept.verified) == (1, False), "another sha256 in the manifest"
    before = len(service.requests)
    for _ in range(POLL_EVERY):
        saves.poll(record(300))
    assert len(service.requests) == before + 2


def test_checkpoints_are_unknown_if_the_service_has_no_response(trainyard: Client, service: FakeService) -> None:
    service.rows["checkpoints"] = [record(200)]
    assert CheckpointPoller(trainyard, JOB).poll(record(200)) is None, "the checkpoint was removed a moment ago"
    service.faults = [lambda _: problem(404, "not_found", "Nothing there.")]
    assert CheckpointPoller(trainyard, JOB).poll(record(200)) is None


def test_a_manifest_that_does_not_match() -> None:
    whole = json.loads(manifest())
    assert manifest_matches(whole, record(1))
    assert not manifest_matches(whole, record(1, bytes=900))
    assert not manifest_matches(whole, record(1, sha256="c" * 64))
    assert not manifest_matches({}, record(1))
