"""A client generated from the OpenAPI document by openapi-python-client works against the service."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.service.harness import ServiceHarness
from tests.service.live_server import served

GENERATOR = Path(sys.executable).with_name("openapi-python-client")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not GENERATOR.exists(), reason="openapi-python-client is not installed"),
]
NAME = "client_from_the_document"


@pytest.fixture
def generated(rig: ServiceHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the package; it is written without a warning that something had to be left out."""
    (tmp_path / "openapi.json").write_text(json.dumps(rig.app.openapi()))
    done = subprocess.run(
        [
            GENERATOR,
            "generate",
            "--path",
            tmp_path / "openapi.json",
            "--output-path",
            tmp_path / NAME,
            "--meta",
            "none",
        ],
        env={**os.environ, "PATH": f"{GENERATOR.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("schema", "Unable", "unsupported", "removal"):
        assert word not in done.stdout + done.stderr, done.stdout
    monkeypatch.syspath_prepend(tmp_path)
    return NAME


def test_a_generated_client_runs_a_job(generated: str, rig: ServiceHarness) -> None:
    def part(name: str) -> ModuleType:
        return importlib.import_module(f"{generated}.{name}")

    def call(name: str, *arguments: Any, **named: Any) -> Any:
        return part(f"api.{name}").sync(*arguments, client=client, **named)

    models = part("models")
    with served(rig) as (host, port):
        client = part("client").Client(base_url=f"http://{host}:{port}", raise_on_unexpected_status=True)
        with client:
            spec = models.JobSpec(data=models.DataSpec(data_path=str(rig.corpus)), name="generated")
            job = call("jobs.submit_job", body=spec, idempotency_key="one")
            assert (job.status.value, job.name, job.spec.data.data_path) == ("queued", "generated", str(rig.corpus))
            assert call("jobs.submit_job", body=spec, idempotency_key="one").id == job.id
            assert call("jobs.plan_job", body=spec).parameters > 0
            rig.reconcile()
            attempt = rig.launcher.of(job.id)
            attempt.started(steps=10)
            for step in range(1, 5):
                attempt.metric(step, loss=3.0)
            rig.ship(attempt)
            assert [found.id for found in call("jobs.list_jobs").data] == [job.id]
            points = call("metrics.list_metrics", job.id)
            assert [point.step for point in points.data] == [1, 2, 3, 4]
            assert call("metrics.list_metrics", job.id, max_points=2).resolution == 4
            changed = call("jobs.update_job", job.id, body=models.PatchJobBody.from_dict({"labels": {"a": "b"}}))
            assert changed.labels.to_dict() == {"a": "b"}
            assert call("jobs.pause_job", job.id).desired.value == "pause"
            events = call("events.list_events", job.id).data
            assert "local" in {event.actor for event in events}
            problem = call("jobs.get_job", "job_nobody")
            assert (type(problem).__name__, problem.code, problem.status) == ("ProblemDetails", "job_not_found", 404)
            bad = call("jobs.resume_job", job.id, body=models.ResumeBody.from_dict({"max_steps": -1}))
            assert bad.code in ("invalid_spec", "invalid_state")
            assert call("service.get_version").name == "trainyard"
            assert len(call("devices.list_devices").data) == 2
    shutil.rmtree(Path(part("client").__file__ or "").parent)
    for name in [name for name in sys.modules if name.startswith(generated)]:
        del sys.modules[name]
