"""Forks: what they may change, what they share with the parent, and their lineage."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sqlalchemy.orm import Session

from tests.service.harness import ServiceHarness, in_threads
from tests.service.test_checkpoints import saved, write_checkpoint
from trainyard.contract import recipes
from trainyard.contract.failpoints import armed
from trainyard.contract.messages import Fork
from trainyard.contract.rundir import RunDir
from trainyard.service.errors import Conflict, OutcomeUnknown
from trainyard.service.jobs import deletion

LONG: dict[str, Any] = {"training": {"max_steps": 1000}}


def ready(rig: ServiceHarness, *steps: int, **groups: Any) -> str:
    """A running parent with checkpoints."""
    job_id, _ = saved(rig, *(steps or (400, 800)), **LONG, **groups)
    return job_id


def fork(rig: ServiceHarness, job_id: str, body: object = None, status: int = 201, key: str = "") -> dict[str, Any]:
    headers = {"Idempotency-Key": key} if key else {}
    answer = rig.client.post(f"/jobs/{job_id}/fork", json=body or {}, headers=headers)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_fork_is_a_job_with_a_parent_and_its_files(any_rig: ServiceHarness) -> None:
    job_id = ready(any_rig, labels={"team": "nlp"}, name="pre")
    made = fork(any_rig, job_id, {"step": 400, "overrides": {"training": {"learning_rate": 1e-4}}})
    assert made["parent"] == {"job_id": job_id, "step": 400, "data": "keep"}
    assert (made["status"], made["name"], made["labels"]) == ("queued", "pre-fork-400", {"team": "nlp"})
    assert made["spec"]["training"]["learning_rate"] == 1e-4
    assert (made["progress"]["step"], made["plan"]["base_step"], made["plan"]["global_batch"]) == (400, 0, 8)
    run = RunDir(any_rig.home / "runs" / made["id"])
    source = RunDir(any_rig.home / "runs" / job_id).artifacts(None).checkpoint(400)
    for file in source.iterdir():
        assert (run.artifacts(None).origin / file.name).stat().st_ino == file.stat().st_ino
    assert Fork.model_validate_json(run.fork.read_bytes()) == Fork(job_id=job_id, step=400, data="keep")
    told = {event["kind"]: event for event in any_rig.data(job_id, "events")}
    assert told["forked"]["data"] == {"fork": made["id"], "step": 400, "data": "keep"}
    assert told["forked"]["actor"] == "local"
    created = any_rig.data(made["id"], "events")[0]
    assert created["message"] == f"forked from {job_id} at step 400, its data order kept"
    assert [job["id"] for job in any_rig.get("/jobs", parent=job_id)["data"]] == [made["id"]]
    assert list(any_rig.settings.trash.iterdir()) == []
    # The newest one, where none is named.
    assert fork(any_rig, job_id)["parent"]["step"] == 800


def test_fork_is_among_the_actions_once_there_is_a_checkpoint(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running()
    said = {a["action"]: a["why_not"] for a in rig.job(job_id)["allowed_actions"]}
    assert said["fork"] == "there is no checkpoint to fork"
    refused = fork(rig, job_id, status=409)
    assert (refused["code"], refused["detail"]) == ("step_unavailable", "The job has no full checkpoint yet.")
    write_checkpoint(rig.checkpoint(job_id, attempt, 4))
    rig.ship(attempt)
    assert next(a for a in rig.job(job_id)["allowed_actions"] if a["action"] == "fork")["allowed"]
    assert "fork" in rig.post_action(job_id, "resume", status=409)["allowed_actions"]


@pytest.mark.parametrize(
    ("body", "pointer", "said"),
    [
        ({"overrides": {"training": {"learning_rate": -1}}}, "/overrides/training/learning_rate", "greater than 0"),
        ({"overrides": {"training": {"max_grad_norm": -1}}}, "/overrides/training/max_grad_norm", "greater than"),
        ({"overrides": {"training": {"lr": 1}}}, "/overrides/training/lr", "not a field"),
        ({"overrides": {"resources": {"timeouts": {"stop": -1}}}}, "/overrides/resources/timeouts/stop", "greater"),
        ({"overrides": {"model": {"hidden_size": 64}}}, "/overrides/model/hidden_size", "weights were trained with it"),
        ({"overrides": {"data": {"tokenizer_path": "x"}}}, "/overrides/data/tokenizer_path", "weights were trained"),
        ({"overrides": {"training": {"seed": 1}}}, "/overrides/training/seed", "restart"),
        ({"overrides": {"training": {"recipe": "fast"}}}, "/overrides/training/recipe", "keeps its parent's settings"),
        ({"overrides": {"model": {"dropout": 0.1}}}, "/overrides/model/dropout", "restart"),
        ({"overrides": {"data": {"max_seq_len": 64}}}, "/overrides/data/max_seq_len", "restart"),
        ({"overrides": {"training": {"batch_size": 7}}}, "/overrides/training/batch_size", "must stay 8"),
        ({"overrides": {"training": {"max_steps": 800}}}, "/overrides/training/max_steps", "all done"),
        (
            {"overrides": {"training": {"max_steps": None, "num_train_epochs": 2}}},
            "/overrides/training/num_train_epochs",
            "all done",
        ),
        ({"overrides": {"training": {"from_weight": "x"}}}, "/overrides/training/from_weight", "parent's checkpoint"),
        ({"overrides": {"nonsense": {}}}, "/overrides/nonsense", "not a field"),
        ({"overrides": {"training": 3}}, "/overrides/training", ""),
        ({"overrides": 3}, "/overrides", "JSON object"),
        ({"data": "mix"}, "/data", "keep"),
        ({"step": True}, "/step", "whole number"),
        ({"steps": 4}, "/steps", "not a field"),
    ],
)
def test_mistakes_are_named_where_they_stand(rig: ServiceHarness, body: Any, pointer: str, said: str) -> None:
    refused = fork(rig, ready(rig), body, 422)
    assert [found["pointer"] for found in refused["errors"]] == [pointer]
    assert said in refused["errors"][0]["message"]
    assert [path for path in (rig.home / "runs").iterdir() if (path / "origin").exists()] == []


def test_all_mistakes_come_at_once(rig: ServiceHarness) -> None:
    job_id = ready(rig)
    refused = fork(rig, job_id, {"data": "mix", "steps": 4, "step": -1, "overrides": 3}, 422)
    assert sorted(found["pointer"] for found in refused["errors"]) == ["/data", "/overrides", "/step", "/steps"]
    overrides = {"model": {"num_hidden_layers": 3}, "training": {"learning_rate": "x", "seed": 3}, "labels": 1}
    refused = fork(rig, job_id, {"overrides": overrides}, 422)
    pointers = sorted(found["pointer"].removeprefix("/overrides") for found in refused["errors"])
    assert pointers == ["/labels", "/model/num_hidden_layers", "/training/learning_rate", "/training/seed"]
    both = {"training": {"epochs": 3, "num_train_epochs": 3}}
    assert "same setting" in fork(rig, ready(rig), {"overrides": both}, 422)["errors"][0]["message"]


def test_the_plan_of_a_fork_counts_what_is_left(rig: ServiceHarness) -> None:
    job_id = ready(rig)
    training = {"max_steps": 1000, "learning_rate": 1e-4}
    whole = rig.client.post("/jobs/plan", json=rig.spec(training={**training, "batch_size": 1})).json()
    assert whole["start_step"] == 0

    def planned(status: int = 200, **body: Any) -> dict[str, Any]:
        answer = rig.client.post(f"/jobs/{job_id}/fork/plan", json=body)
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    kept = planned(step=400, overrides={"training": training})
    assert (kept["start_step"], kept["base_step"], kept["steps"]) == (400, 0, 1000)
    twice = planned(step=400, overrides={"training": {**training, "max_steps": 1600}})
    assert twice["flops"] == pytest.approx(2 * kept["flops"])
    anew = planned(step=400, data="restart", overrides={"training": {**training, "max_steps": 600}})
    assert (anew["start_step"], anew["base_step"], anew["steps"]) == (400, 400, 1000)
    assert anew["flops"] == pytest.approx(kept["flops"])
    refused = planned(422, overrides={"training": {"seed": 1}})
    assert [found["pointer"] for found in refused["errors"]] == ["/overrides/training/seed"]
    assert planned(409, step=7)["detail"] == "The job has no checkpoint of step 7."
    assert len(rig.get("/jobs")["data"]) == 1
    made = fork(rig, job_id, {"step": 400, "overrides": {"training": training}})
    assert made["progress"]["percent"] == 40.0
    cancelled = rig.post_action(made["id"], "cancel")
    assert cancelled["summary"] == "Cancelled at step 400; resuming continues from step 400 of its parent."


def test_another_form_of_the_corpus_replaces_that_of_the_parent(rig: ServiceHarness) -> None:
    path = str(rig.corpus)
    sources = [{"name": "web", "path": path}]
    job_id = ready(rig, data={"data_path": None, "sources": sources, "eval_sources": sources})
    overrides = {"data": {"data_path": path, "eval_data_path": path}}
    data = fork(rig, job_id, {"data": "restart", "overrides": overrides})["spec"]["data"]
    assert (data["data_path"], data["sources"]) == (path, None)
    assert (data["eval_data_path"], data["eval_sources"]) == (path, None)
    both = {"data": "restart", "overrides": {"data": {"data_path": path, "sources": sources}}}
    assert "cannot be combined" in fork(rig, job_id, both, 422)["errors"][0]["message"]


def test_a_fork_and_a_resume_keep_what_the_recipe_filled_in(rig: ServiceHarness) -> None:
    given = {"recipe": "fast", "max_steps": 1000, "weight_decay": 0.03}
    job_id, _ = saved(rig, 400, training=given)
    training = rig.job(job_id)["spec"]["training"]
    assert (training["optimizer"], training["weight_decay"]) == ("muon", 0.03)
    with mock.patch.dict(recipes.RECIPES, fast=lambda *_: {"learning_rate": 7.0}):
        made = fork(rig, job_id, {"overrides": {"training": {"max_steps": 2000}}})
    assert made["spec"]["training"] == {**training, "max_steps": 2000}


def test_a_restart_may_change_the_data_and_counts_its_own_steps(rig: ServiceHarness) -> None:
    other = rig.home / "other.jsonl"
    other.write_text('{"text": "two"}\n')
    overrides = {
        "data": {"data_path": str(other), "max_seq_len": 64},
        "training": {"max_steps": 50, "batch_size": 3, "seed": 9},
        "model": {"dropout": 0.1},
    }
    job_id = ready(rig)
    made = fork(rig, job_id, {"step": 400, "data": "restart", "overrides": overrides})
    assert made["parent"]["data"] == "restart"
    assert (made["plan"]["base_step"], made["plan"]["steps"], made["plan"]["global_batch"]) == (400, 450, 24)
    rig.reconcile()
    attempt = rig.launcher.of(made["id"])
    attempt.started(start_step=400, steps=450)
    attempt.lines[-1]["base_step"] = 400
    rig.exit(attempt, "completed", step=450)
    # Finished: max_steps counts behind the fork's step, and only more of it goes on.
    assert rig.post_action(made["id"], "resume", {"max_steps": 50}, 422)["errors"][0]["pointer"] == "/max_steps"
    assert rig.post_action(made["id"], "resume", {"max_steps": 51})["spec"]["training"]["max_steps"] == 51
    assert fork(rig, job_id, {"data": "restart", "overrides": {"model": {"num_hidden_layers": 3}}}, 422)


def test_weights_alone_need_a_restart(rig: ServiceHarness) -> None:
    job_id, attempt = saved(rig, 400, 800, **LONG)
    thin = rig.home / "runs" / job_id / "checkpoints" / "step-00000200-weights"
    write_checkpoint(thin)
    line = {"step": 200, "path": str(thin), "bytes": 1, "sha256": "a", "checkpoint_kind": "weights"}
    attempt.say("checkpoint", **line)
    rig.ship(attempt)
    refused = fork(rig, job_id, {"step": 200}, 409)
    assert (refused["code"], "restart" in refused["detail"]) == ("step_unavailable", True)
    assert fork(rig, job_id, {"step": 200, "data": "restart"})["parent"]["step"] == 200
    assert fork(rig, job_id, {"step": 300}, 409)["code"] == "step_unavailable"


def test_a_key_makes_one_fork(any_rig: ServiceHarness) -> None:
    job_id, other = ready(any_rig), ready(any_rig)
    body = {"step": 400}
    first = fork(any_rig, job_id, body, key="k")
    assert fork(any_rig, job_id, body, 200, key="k")["id"] == first["id"]
    assert fork(any_rig, job_id, {"step": 800}, 422, key="k")["code"] == "idempotency_key_reused"
    assert fork(any_rig, other, body, 422, key="k")["code"] == "idempotency_key_reused"

    def once(_: int) -> Any:
        answer = any_rig.client.post(f"/jobs/{job_id}/fork", json=body, headers={"Idempotency-Key": "many"})
        return answer.status_code, answer.json().get("id", answer.text)

    answers = in_threads(6, once)
    assert {status for status, _ in answers} <= {200, 201}
    assert len({made for _, made in answers}) == 1
    runs = {path.name for path in (any_rig.home / "runs").iterdir()}
    assert runs == {job["id"] for job in any_rig.get("/jobs", limit=100)["data"]}
    assert list(any_rig.settings.trash.iterdir()) == []


def test_the_parent_may_go(any_rig: ServiceHarness) -> None:
    job_id, attempt = saved(any_rig, 400, 800, **LONG)
    made = fork(any_rig, job_id, {"step": 400})
    any_rig.exit(attempt, "completed", step=1000)
    assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204
    origin = RunDir(any_rig.home / "runs" / made["id"]).artifacts(None).origin
    assert (origin / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert any_rig.job(made["id"])["parent"]["job_id"] == job_id
    lineage = any_rig.get(f"/jobs/{made['id']}/metrics", lineage=True)["lineage"]
    assert [(entry["job_id"], entry["deleted"]) for entry in lineage] == [(job_id, True), (made["id"], False)]


def test_deleted_or_pruned_meanwhile_there_is_no_fork_and_nothing_left(any_rig: ServiceHarness) -> None:
    job_id, attempt = saved(any_rig, 400, 800, **LONG)
    place = any_rig.home / "runs" / job_id / "checkpoints" / "step-00000400"
    with armed("share.file_linked", lambda: shutil.rmtree(place, ignore_errors=True)):
        assert fork(any_rig, job_id, {"step": 400}, 409)["code"] == "step_unavailable"
    any_rig.exit(attempt, "completed", step=1000)
    from trainyard.service.forks import service

    laid = service.prepare_run_dir

    def deleted(*args: Any) -> None:
        laid(*args)
        assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 204

    with mock.patch.object(service, "prepare_run_dir", deleted):
        assert fork(any_rig, job_id, {"step": 800}, 404)["code"] == "job_not_found"
    assert list((any_rig.home / "runs").iterdir()) == []
    assert list(any_rig.settings.trash.iterdir()) == []


def test_a_full_disk_makes_no_fork_and_leaves_nothing(rig: ServiceHarness) -> None:
    job_id = ready(rig)
    from trainyard.service.forks import service

    with mock.patch.object(service, "write_json", side_effect=OSError(28, "No space left on device")):
        refused = fork(rig, job_id, {"step": 400}, 507)
    assert (refused["code"], "No space left" in refused["detail"]) == ("disk_trouble", True)
    assert [path.name for path in (rig.home / "runs").iterdir()] == [job_id]
    assert list(rig.settings.trash.iterdir()) == []


def test_without_links_the_files_are_copied_and_a_link_in_their_place_is_not_followed(
    rig: ServiceHarness, tmp_path: Path
) -> None:
    job_id = ready(rig)
    with mock.patch.object(os, "link", side_effect=OSError(18, "Invalid cross-device link")):
        made = fork(rig, job_id, {"step": 400})
    origin = RunDir(rig.home / "runs" / made["id"]).artifacts(None).origin
    assert (origin / "model.safetensors").stat().st_nlink == 1
    assert json.loads((origin / "manifest.json").read_text())["files"]
    place = rig.home / "runs" / job_id / "checkpoints" / "step-00000400"
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to("/etc/hostname")
    assert fork(rig, job_id, {"step": 400}, 409)["code"] == "step_unavailable"


# The curve


def drawn(rig: ServiceHarness, job_id: str, **params: Any) -> list[tuple[str, int, int, float]]:
    rows = rig.get(f"/jobs/{job_id}/metrics", lineage=True, **params)["data"]
    return [(row["job_id"], row["attempt"], row["step"], row["loss"]) for row in rows]


def test_the_curve_joins_the_parents_as_it_was_at_the_fork(any_rig: ServiceHarness) -> None:
    job_id, attempt = saved(any_rig, 4)
    for step in range(1, 9):
        attempt.metric(step, loss=float(step))
    any_rig.ship(attempt)
    made = fork(any_rig, job_id, {"step": 4, "overrides": {"training": {"max_steps": 9}}})["id"]
    # The parent goes back behind the fork, and is another curve from then on.
    any_rig.exit(attempt, "failed", step=8)
    any_rig.post_action(job_id, "resume")
    again = any_rig.next_attempt(job_id, 2, start_step=2)
    for step in range(3, 6):
        again.metric(step, loss=100.0 + step)
    any_rig.ship(again)
    any_rig.reconcile()
    own = any_rig.launcher.of(made)
    own.started(start_step=4, steps=9)
    for step in range(5, 10):
        own.metric(step, loss=10.0 * step)
    any_rig.ship(own)
    line = [(job_id, 1, step, float(step)) for step in (1, 2, 3, 4)]
    ours = [(made, 1, step, 10.0 * step) for step in range(5, 10)]
    assert drawn(any_rig, made) == line + ours
    assert drawn(any_rig, made, after_step=3, limit=3) == (line + ours)[3:6]
    assert drawn(any_rig, made, limit=2) == line[:2]
    assert drawn(any_rig, made, until_step=2) == line[:2]
    assert drawn(any_rig, made, after_step=2, until_step=6) == (line + ours)[2:6]
    assert [row["step"] for row in any_rig.data(made, "metrics")] == list(range(5, 10))
    buckets = any_rig.get(f"/jobs/{made}/metrics", lineage=True, max_points=5)
    of_each = any_rig.data(made, "metrics", lineage=True, max_points=5, fields="tokens,learning_rate")
    points = any_rig.data(made, "metrics", lineage=True)
    assert [(row["job_id"], row["step"], row["tokens"]) for row in of_each] == [
        (row["job_id"], row["step"], row["tokens"])
        for row in points
        if row["step"] in {one["step"] for one in buckets["data"]}
    ]
    assert buckets["resolution"] == 2
    assert [(row["first_step"], row["step"], row["loss_max"]) for row in buckets["data"]][:3] == [
        (1, 1, 1.0), (2, 3, 3.0), (4, 5, 50.0)]  # fmt: skip
    assert [entry["until_step"] for entry in buckets["lineage"]] == [4, None]
    # A fork of the fork has both before it.
    write_checkpoint(any_rig.checkpoint(made, own, 8))
    any_rig.ship(own)
    third = fork(any_rig, made, {"step": 8, "overrides": {"training": {"max_steps": 12}}})["id"]
    assert drawn(any_rig, third) == line + ours[:-1]
    text = any_rig.client.get(f"/jobs/{third}/metrics?lineage=true&fields=loss", headers={"Accept": "text/csv"}).text
    assert text.splitlines()[:2] == ["job_id,step,attempt,loss", f"{job_id},1,1,1.0"]
    assert (
        any_rig.get(f"/jobs/{third}/metrics", 422, lineage=True, attempt=1)["errors"][0]["pointer"] == "/query/lineage"
    )


def test_a_long_parent_is_read_from_what_is_summed_up(rig: ServiceHarness) -> None:
    job_id, attempt = rig.running(steps=10_000)
    for step in range(1, 3001):
        attempt.metric(step, loss=None if step == 1500 else step % 97 / 10)
    write_checkpoint(rig.checkpoint(job_id, attempt, 2500))
    rig.ship(attempt)
    made = fork(rig, job_id, {"step": 2500, "overrides": {"training": {"max_steps": 9000}}})["id"]
    rig.reconcile()
    own = rig.launcher.of(made)
    own.started(start_step=2500, steps=9000)
    for step in range(2501, 4200):
        own.metric(step, loss=step % 97 / 10)
    rig.ship(own)
    quick = rig.get(f"/jobs/{made}/metrics", lineage=True, max_points=40)
    slow = rig.get(f"/jobs/{made}/metrics", lineage=True, max_points=40, ema_half_life=51)
    assert quick["resolution"] == 128
    for one, other in zip(quick["data"], slow["data"], strict=True):
        same = [key for key in one if key not in ("loss_ema", "loss_mean")]
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        assert one["loss_mean"] == pytest.approx(other["loss_mean"])
    assert sum(row["count"] for row in quick["data"]) == 4199
    assert sum(row["nonfinite_count"] for row in quick["data"]) == 1
    # A stretch over the fork is finer, and as it is in the whole.
    whole = rig.data(made, "metrics", lineage=True, max_points=10_000)
    part = rig.get(f"/jobs/{made}/metrics", lineage=True, max_points=500, after_step=2399, until_step=2600)
    assert part["resolution"] == 1
    expected = [row for row in whole if 2400 <= row["step"] <= 2600]
    assert [row["job_id"] for row in part["data"]] == [job_id] * 101 + [made] * 100
    for one, other in zip(part["data"], expected, strict=True):
        assert one == {**other, "loss_ema": pytest.approx(other["loss_ema"])}


# Files that are to go


def test_a_service_killed_between_record_and_files_leaves_nothing(any_rig: ServiceHarness) -> None:
    job_id, attempt = saved(any_rig, 400)
    any_rig.exit(attempt, "completed", step=1000)
    with mock.patch.object(deletion.PendingDeletion, "delete_files", side_effect=RuntimeError):
        assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 500
    assert any_rig.get(f"/jobs/{job_id}", 404)
    assert (any_rig.home / "runs" / job_id).is_dir()
    assert deletion.sweep(any_rig.settings, any_rig.database) == 1
    assert not (any_rig.home / "runs" / job_id).exists()
    assert list(any_rig.settings.trash.iterdir()) == []


def test_a_service_killed_before_the_record_went_changes_nothing(any_rig: ServiceHarness) -> None:
    job_id, attempt = saved(any_rig, 400)
    any_rig.exit(attempt, "completed", step=1000)
    from trainyard.service.jobs import actions

    with mock.patch.object(actions, "remove", side_effect=RuntimeError):
        assert any_rig.client.delete(f"/jobs/{job_id}").status_code == 500
    assert len(list(any_rig.settings.trash.iterdir())) == 1
    reborn = any_rig.restart()  # its start sweeps
    try:
        assert list(reborn.settings.trash.iterdir()) == []
        assert reborn.job(job_id)["status"] == "succeeded"
        assert (reborn.home / "runs" / job_id / "checkpoints").is_dir()
    finally:
        any_rig.client.__enter__()
        reborn.close()


def test_a_fork_half_made_by_a_killed_service_is_cleared_away(any_rig: ServiceHarness) -> None:
    job_id = ready(any_rig)
    from trainyard.service.forks import service

    with mock.patch.object(service, "insert", side_effect=RuntimeError):
        fork(any_rig, job_id, {"step": 400}, 500)
    assert len(list((any_rig.home / "runs").iterdir())) == 2
    deletion.sweep(any_rig.settings, any_rig.database)
    assert [path.name for path in (any_rig.home / "runs").iterdir()] == [job_id]


@contextlib.contextmanager
def lost_commit(rig: ServiceHarness, is_stored: bool) -> Iterator[None]:
    """Lose the database during the next commit. ``is_stored``: whether the transaction was stored before."""
    write = rig.database.write

    @contextlib.contextmanager
    def lose() -> Iterator[Session]:
        with contextlib.suppress(ZeroDivisionError), write() as session:
            yield session
            if not is_stored:
                raise ZeroDivisionError
        raise OutcomeUnknown()

    with mock.patch.object(rig.database, "write", lose):
        yield


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_fork_whose_commit_was_lost_keeps_its_files_if_it_exists(any_rig: ServiceHarness, is_stored: bool) -> None:
    job_id = ready(any_rig)
    with lost_commit(any_rig, is_stored):
        assert fork(any_rig, job_id, {"step": 400}, 503, "key")["code"] == "outcome_unknown"
    deletion.sweep(any_rig.settings, any_rig.database)  # the next start does this
    assert list(any_rig.settings.trash.iterdir()) == []
    directories = {path.name for path in (any_rig.home / "runs").iterdir()}
    jobs = {job["id"] for job in any_rig.get("/jobs")["data"]}
    assert (directories == jobs, len(jobs)) == (True, 1 + is_stored)
    again = fork(any_rig, job_id, {"step": 400}, 200 if is_stored else 201, "key")
    run = RunDir(any_rig.home / "runs" / again["id"])
    assert run.fork.exists(), "without it the fork would train from scratch"
    assert run.artifacts(None).origin.is_dir()


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_deletion_whose_commit_was_lost_keeps_the_files_of_a_job_that_exists(
    any_rig: ServiceHarness, is_stored: bool
) -> None:
    job_id, attempt = saved(any_rig, 400)
    any_rig.exit(attempt, "completed", step=1000)
    with lost_commit(any_rig, is_stored):
        assert any_rig.client.delete(f"/jobs/{job_id}").json()["code"] == "outcome_unknown"
    any_rig.get(f"/jobs/{job_id}", 404 if is_stored else 200)
    deletion.sweep(any_rig.settings, any_rig.database)
    assert list(any_rig.settings.trash.iterdir()) == []
    assert (any_rig.home / "runs" / job_id).exists() is not is_stored


def test_a_deletion_that_is_rejected_as_already_running_leaves_no_file_open(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "LOCK_SECONDS", 0.0)
    with deletion.mark_for_deletion(rig.settings, "job_abc", None):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(Conflict), deletion.mark_for_deletion(rig.settings, "job_abc", None):
                pass
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_note_that_somebody_holds_or_that_is_torn_or_foreign_harms_nothing(
    rig: ServiceHarness, tmp_path: Path
) -> None:
    kept = rig.home / "runs" / "job_abc"
    kept.mkdir(parents=True)
    with deletion.mark_for_deletion(rig.settings, "job_abc", None):
        deletion.sweep(rig.settings, rig.database)
        assert kept.is_dir()
    (rig.settings.trash / "job_abc.json").write_text('["/ho')
    (rig.settings.trash / "job_zzz.json").write_text(json.dumps([str(tmp_path), "/etc", str(kept)]))
    (rig.settings.trash / "notes.json").write_text(json.dumps([str(kept)]))
    deletion.sweep(rig.settings, rig.database)
    assert kept.is_dir()
    assert tmp_path.is_dir()
    assert sorted(path.name for path in rig.settings.trash.iterdir()) == ["job_zzz.json", "notes.json"]


def decay_branch(step: int, steps: int) -> dict[str, Any]:
    training = {"lr_scheduler": "wsd", "decay_steps": steps, "max_steps": step + steps}
    return {"step": step, "data": "keep", "overrides": {"training": training}}


@pytest.mark.parametrize(
    "parent", [{"lr_scheduler": "constant"}, {"lr_scheduler": "wsd", "decay_fraction": 0.1}], ids=str
)
def test_a_decay_branch_joins_the_curve_of_a_stable_run(any_rig: ServiceHarness, parent: dict[str, Any]) -> None:
    job_id, _ = saved(any_rig, 400, 800, training={"max_steps": 1000, "learning_rate": 0.01, **parent}, description="a")
    planned = any_rig.client.post(f"/jobs/{job_id}/fork/plan", json=decay_branch(800, 40)).json()
    curve = planned["learning_rate"]
    assert [step for step, _ in curve] == list(range(801, 841))
    expected = [0.01 * (0.1 + 0.9 * (1 - ((step - 800) / 40) ** 0.5)) for step in range(801, 841)]
    assert [rate for _, rate in curve] == pytest.approx(expected, rel=0, abs=1e-12)
    made = fork(any_rig, job_id, decay_branch(800, 40))
    training = made["spec"]["training"]
    assert (training["decay_steps"], training["decay_fraction"], training["decay_shape"]) == (40, None, "sqrt")
    assert (made["plan"]["steps"], made["plan"]["learning_rate_before"]) == (840, 0.01)
    assert made["plan"]["learning_rate_after"] == planned["learning_rate_after"] == curve[0][1]
    assert made["description"] == ""
    fraction = {"overrides": {"training": {"lr_scheduler": "wsd", "decay_fraction": 0.5}}}
    assert fork(any_rig, job_id, fraction)["spec"]["training"]["decay_fraction"] == 0.5


def test_a_decay_branch_of_a_run_with_max_tokens_ends_by_its_steps(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 400, 800, training={"max_tokens": 10**9, "lr_scheduler": "constant"})
    training = fork(rig, job_id, decay_branch(800, 40))["spec"]["training"]
    assert (training["max_tokens"], training["max_steps"]) == (None, 840)
    both = {"overrides": {"training": {"max_tokens": 10, "max_steps": 900}}}
    assert [e["pointer"] for e in fork(rig, job_id, both, status=422)["errors"]] == ["/overrides/training/max_tokens"]


def test_a_fork_needs_more_tokens_than_are_trained(rig: ServiceHarness) -> None:
    job_id, attempt = saved(rig, 5, training={"max_steps": 1000})
    attempt.metric(5)
    attempt.metric(6)
    rig.ship(attempt)
    trained = rig.data(job_id, "metrics")[0]["tokens"]
    few = {"overrides": {"training": {"max_tokens": trained}}}
    errors = fork(rig, job_id, few, status=422)["errors"]
    assert [error["pointer"] for error in errors] == ["/overrides/training/max_tokens"]
    made = fork(rig, job_id, {"overrides": {"training": {"max_tokens": 10_000}}})
    assert (made["spec"]["training"]["max_steps"], made["plan"]["steps"]) == (None, 100)


def test_a_decay_that_begins_in_the_warm_up_is_rejected(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 5, training={"max_steps": 1000, "warmup_steps": 100})
    errors = fork(rig, job_id, decay_branch(5, 200), status=422)["errors"]
    assert [error["pointer"] for error in errors] == ["/overrides/training/decay_steps"]
