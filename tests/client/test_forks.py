"""`trainyard fork` and `trainyard export`, and the methods that they call."""

import json
from pathlib import Path

import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, body_of, lost
from trainyard.client.api import Client


def test_fork_sends_what_is_to_be_different(run: Run, service: FakeService) -> None:
    sets = [
        "--set",
        "training.learning_rate=1e-4",
        "--set",
        "training.max_grad_norm=2",
        "--set",
        "data.data_path=a.jsonl",
    ]
    code, out, err = run("fork", "pre-12", "--step", "400", "--name", "low", "--restart-data", *sets)
    assert code == 0
    assert body_of(service.requests[-1]) == {
        "step": 400,
        "data": "restart",
        "overrides": {
            "name": "low",
            "training": {"learning_rate": 1e-4, "grad_clip": 2},
            "data": {"data_path": str(Path.cwd() / "a.jsonl")},
        },
    }
    assert "at step 400" in err
    assert "job_fork" in out + err


def test_fork_as_json_and_wrong_usage(run: Run, service: FakeService) -> None:
    code, out, _ = run("fork", "pre-12", "--json")
    assert (code, json.loads(out)["parent"]["data"]) == (0, "keep")
    assert body_of(service.requests[-1]) == {"step": None, "data": "keep", "overrides": {}}
    assert run("fork", "pre-12", "--set", "a.b.c=1")[0] == 2
    assert run("fork", "pre-12", "--set", "nothing")[0] == 2


def test_a_lost_answer_makes_no_second_fork(trainyard: Client, service: FakeService) -> None:
    job_id = next(iter(service.jobs))
    service.faults = [lost]
    trainyard.fork(job_id, 400)
    keys = {request.headers["Idempotency-Key"] for request in service.requests if request.url.path.endswith("/fork")}
    assert len(keys) == 1


@pytest.mark.parametrize("form", ["hf", "minimind"])
def test_export_prints_the_path(run: Run, form: str) -> None:
    code, out, err = run("export", "pre-12", "--step", "400", "--format", form)
    assert code == 0
    assert out.strip().endswith(f"/exports/step-00000400-{form}")
    assert "1 files, 300 B" in err
    code, out, _ = run("export", "pre-12", "--step", "400", "--format", form, "--json")
    assert json.loads(out)["format"] == form
