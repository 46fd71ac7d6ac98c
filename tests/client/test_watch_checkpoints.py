"""What `watch` says of checkpoints: as the service has them, and verified only where the manifest agrees."""

import json
from typing import Any

from tests.client.fake_service import FakeService, problem
from trainyard.client.api import Client
from trainyard.client.cli.watch.checkpoints import POLL_EVERY, CheckpointPoller, agrees

JOB = "job_7f3kq9"
SHA = "a" * 64


def told(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "bytes": 1100, "sha256": SHA, **changes}


def manifest(sha256: str = SHA) -> bytes:
    return json.dumps({"files": {"model.safetensors": {"bytes": 700, "sha256": sha256}, "s": {"bytes": 300}}}).encode()


def test_what_is_kept_is_asked_for_when_it_changes_and_now_and_then(trainyard: Client, service: FakeService) -> None:
    service.rows["checkpoints"] = [told(200), told(100)]
    service.files = {200: {"manifest.json": manifest()}, 300: {"manifest.json": manifest("b" * 64)}}
    saves = CheckpointPoller(trainyard, JOB)
    assert saves.poll(None) is None
    kept = saves.poll(told(200))
    assert kept is not None
    assert (kept.count, kept.bytes, kept.verified) == (2, 2200, True)
    asked = len(service.requests)
    saves.poll(told(200))
    assert len(service.requests) == asked
    service.rows["checkpoints"] = [told(300)]
    kept = saves.poll(told(300))
    assert kept is not None
    assert (kept.count, kept.verified) == (1, False), "another sha256 in the manifest"
    before = len(service.requests)
    for _ in range(POLL_EVERY):
        saves.poll(told(300))
    assert len(service.requests) == before + 2


def test_a_service_without_an_answer_leaves_it_open(trainyard: Client, service: FakeService) -> None:
    service.rows["checkpoints"] = [told(200)]
    assert CheckpointPoller(trainyard, JOB).poll(told(200)) is None, "the checkpoint was removed a moment ago"
    service.faults = [lambda _: problem(404, "not_found", "Nothing there.")]
    assert CheckpointPoller(trainyard, JOB).poll(told(200)) is None


def test_a_manifest_that_does_not_fit() -> None:
    whole = json.loads(manifest())
    assert agrees(whole, told(1))
    assert not agrees(whole, told(1, bytes=900))
    assert not agrees(whole, told(1, sha256="c" * 64))
    assert not agrees({}, told(1))
