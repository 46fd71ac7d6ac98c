"""`trainyard fork` and `trainyard export`, and the methods that they call."""

import json
from pathlib import Path

import httpx2
import pytest

from tests.client.conftest import Run
from tests.client.fake_service import FakeService, body_of, job, lost
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
    assert out.startswith("job_fork ")
    assert err.endswith("next:  trainyard watch job_fork\n"), "of the fork, not of its parent"


def test_a_decay_branch_ends_its_steps_after_the_checkpoint(run: Run, trainyard: Client, service: FakeService) -> None:
    job_id = next(iter(service.jobs))
    assert run("fork", job_id, "--step", "400", "--decay", "50", "--name", "low")[0] == 0
    training = {"lr_scheduler": "wsd", "decay_steps": 50, "decay_shape": "sqrt", "max_steps": 450}
    assert body_of(service.requests[-1]) == {
        "step": 400,
        "data": "keep",
        "overrides": {"name": "low", "training": training},
    }
    newest = 600
    service.rows["checkpoints"] = [{"step": 700, "kind": "weights"}, {"step": newest, "kind": "full"}]
    service.jobs[job_id]["plan"] = {"base_step": 100}
    trainyard.decay(job_id, 50, shape="linear")
    training |= {"decay_shape": "linear", "max_steps": newest - 100 + 50}
    assert body_of(service.requests[-1]) == {"step": newest, "data": "keep", "overrides": {"training": training}}
    assert run("fork", job_id, "--decay", "50", "--restart-data")[0] == 2
    assert run("fork", job_id, "--decay", "50", "--set", "training.seed=1")[0] == 2


@pytest.mark.parametrize(("before", "hinted"), [(5e-4, False), (5e-5, True)])
def test_a_decay_branch_prints_the_rates(run: Run, service: FakeService, before: float, hinted: bool) -> None:
    service.jobs["job_7f3kq9"]["plan"] = {"learning_rate_before": before, "learning_rate_after": 3.99e-4}
    _, _, err = run("fork", "pre-12", "--step", "400", "--decay", "50")
    assert f"learning rate: {before:.3g} at the checkpoint, 0.000399 at the next step" in err
    assert ("the rate had already decayed" in err) == hinted


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


def test_export_downloads_with_out(run: Run, service: FakeService, tmp_path: Path) -> None:
    code, out, _ = run("export", "pre-12@400", "--out", str(tmp_path / "d"))
    assert (code, out) == (0, f"{tmp_path / 'd'}\n")
    assert [(path.name, path.stat().st_size) for path in (tmp_path / "d").iterdir()] == [("config.json", 300)]
    assert service.requests[-1].url.path == "/jobs/job_7f3kq9/exports/400/hf/files/config.json"
    assert json.loads(run("export", "pre-12@400", "--out", str(tmp_path / "e"), "--json")[1])["out"] == str(
        tmp_path / "e"
    )


def test_a_cut_or_strange_file_of_an_export_is_no_download(
    run: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("config.json", 301), ("../x", 300), (".x", 300), ("", 300)):
        made = {"object": "export", "job_id": "job_7f3kq9", "step": 4, "format": "hf", "path": "/p", "bytes": 1}
        made["files"] = [{"name": name, "bytes": size}]
        answer = httpx2.Response(201, json=made)
        service.faults = [lambda _: None, lambda _, answer=answer: answer]  # type: ignore[misc]
        code, _, err = run("export", "pre-12", "--step", "4", "--out", str(tmp_path / "d"))
        assert code == 1, err
        assert list(tmp_path.rglob("*")) == [tmp_path / "d"]


def test_job_at_step(run: Run, service: FakeService) -> None:
    service.rows["checkpoints"] = [{"id": "1", "step": 900}]
    for words, step in (
        (["pre-12@400"], 400),
        (["pre-12@latest"], 900),
        (["pre-12"], 900),
        (["pre-12", "--step", "4"], 4),
    ):
        assert run("export", *words)[0] == 0
        assert service.requests[-1].url.path == f"/jobs/job_7f3kq9/checkpoints/{step}/export"
    assert run("export", "pre-12@400", "--step", "4")[0] == 2
    service.jobs = {"job_b": job(id="job_b", name="a@b")}
    assert run("export", "a@b")[0] == 0, "a name may have an @"
