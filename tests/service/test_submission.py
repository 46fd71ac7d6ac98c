"""POST /jobs: every mistake at once, each job launched once, no value echoed."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from sqlalchemy import text

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness, in_threads
from tests.service.test_plan import gpus
from trainyard.service.db.engine import alembic_config

JOB = """object id name labels status desired phase reason message error spec plan progress attempt resumable
    resume_blocker checkpoint queue parent allowed_actions summary alerts created_at queued_at started_at finished_at"""
PLAN = """parameters active_parameters tokens samples bad_lines steps tokens_per_step world_size memory_bytes
    checkpoint_bytes disk_free_bytes flops eta_seconds expected_first_loss warnings"""
PROGRESS = """step steps epoch tokens loss learning_rate grad_norm tokens_per_second mfu eta_seconds percent
    updated_at"""

SECRET = "canary-7f3a"


def mistakes(rig: ServiceHarness, body: Any) -> dict[str, str]:
    answer = rig.client.post("/jobs", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "invalid_spec"
    return {e["pointer"]: e["message"] for e in answer.json()["errors"]}


def test_five_mistakes_are_five_answers(rig: ServiceHarness) -> None:
    found = mistakes(
        rig,
        {
            "data": {"data_path": str(rig.home / "missing.jsonl")},
            "training": {"learning_rate": -1},
            "model": {"hiden_size": 64, "num_key_value_heads": 3},
            "resources": {"nproc_per_node": 3},
        },
    )
    assert found == {
        "/data/data_path": "does not exist or cannot be reached",
        "/training/learning_rate": "should be greater than 0",
        "/model/hiden_size": "is not a field of the job spec; did you mean hidden_size?",
        "/model/num_key_value_heads": "must divide num_attention_heads (8), which 3 does not",
        "/resources/nproc_per_node": "must be at most 2: this host has 2 CPU slots",
    }


def test_the_answer_is_the_stored_job(any_rig: ServiceHarness) -> None:
    answer = any_rig.client.post("/jobs", json=any_rig.spec(name="pre-01", labels={"team": "nlp"}))
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert any_rig.get(answer.headers["location"]) == job
    assert (job["object"], job["status"], job["desired"], job["attempt"]) == ("job", "queued", "run", None)
    assert job["labels"] == {"team": "nlp"}
    assert job["spec"]["model"]["vocab_size"] == 259
    assert job["spec"]["model"]["intermediate_size"] == 1664
    assert job["spec"]["training"]["batch_size"] == 32
    assert job["plan"]["expected_first_loss"] == pytest.approx(5.5568, abs=1e-4)
    assert job["plan"]["global_batch"] == 256
    assert any_rig.launcher.starts == [], "a launch never happens in a request"


def test_every_field_of_the_shapes_is_there(rig: ServiceHarness) -> None:
    job = rig.job(rig.submit())
    assert set(JOB.split()) <= set(job)
    assert set(PLAN.split()) <= set(job["plan"])
    assert set(job["plan"]["memory_bytes"]) == {"weights", "gradients", "optimizer", "activations"}
    assert set(PROGRESS.split()) <= set(job["progress"])
    assert {a["action"] for a in job["allowed_actions"]} == {
        "pause",
        "resume",
        "save",
        "fork",
        "cancel",
        "kill",
        "delete",
    }


def test_minimind_habits_and_hugging_face_names(rig: ServiceHarness) -> None:
    job = rig.job(
        rig.submit(
            training={"num_train_epochs": 2, "use_compile": 0, "from_weight": "none"},
            model={"use_moe": 1},
            checkpoint={"save_steps": 50},
        )
    )
    assert job["spec"]["training"]["epochs"] == 2
    assert job["spec"]["training"]["use_compile"] is False
    assert job["spec"]["model"]["use_moe"] is True
    assert job["spec"]["checkpoint"]["save_interval"] == 50


def test_an_unasked_cpu_is_a_warning_and_an_asked_one_is_not(rig: ServiceHarness) -> None:
    assert [a["code"] for a in rig.job(rig.submit())["alerts"]] == ["cpu_fallback"]
    assert rig.job(rig.submit(resources={"device": "cpu"}))["alerts"] == []


def test_devices_that_are_not_there(rig: ServiceHarness, make_rig: MakeHarness, sqlite_url: str) -> None:
    for device in ("cuda", "cuda:0"):
        assert list(mistakes(rig, rig.spec(resources={"device": device}))) == ["/resources/device"]
    two = make_rig(sqlite_url, devices=gpus(2))
    assert list(mistakes(two, two.spec(resources={"nproc_per_node": 3}))) == ["/resources/nproc_per_node"]
    assert list(mistakes(two, two.spec(resources={"device": "cuda:2"}))) == ["/resources/device"]
    named = two.spec(resources={"device": "cuda:1", "nproc_per_node": 2})
    assert list(mistakes(two, named)) == ["/resources/nproc_per_node"]
    # MiniMind's default, written out: with several ranks each one has its own device.
    every = two.job(two.submit(resources={"device": "cuda:0", "nproc_per_node": 2}))
    assert every["spec"]["resources"]["device"] == "cuda"
    two.close()


def test_the_local_user_gets_the_folders_and_the_command_of_the_service(
    rig: ServiceHarness, make_rig: MakeHarness, sqlite_url: str
) -> None:
    spec = rig.spec(checkpoint={"save_dir": "/elsewhere/out"})
    roots = rig.client.post("/jobs", json=spec).json()["roots"]
    assert roots["settings"]["TRAINYARD_SAVE_ROOTS"] == [str(root) for root in rig.settings.save_roots]
    assert roots["command"][:3] == ["trainyard", "serve", "--home"]
    wrong = rig.client.post("/jobs", json=rig.spec(training={"epochs": 0})).json()
    assert "roots" not in wrong


def test_more_memory_than_there_is(rig: ServiceHarness, make_rig: MakeHarness, sqlite_url: str) -> None:
    """Refused where no batch would help; a run that merely may not fit is for the plan to warn of."""
    huge = {"hidden_size": 65536, "num_hidden_layers": 200, "num_attention_heads": 64, "num_key_value_heads": 8}
    found = mistakes(rig, rig.spec(model=huge, training={"learning_rate": -1}))
    assert list(found) == ["/training/learning_rate", "/model"], "all at once"
    assert re.fullmatch(
        r"needs 1\d\d,\d{3}\.\d GB for weights, gradients and the optimizer alone, and this host has [\d,.]+ GB: "
        r"take a smaller model",
        found["/model"],
    )
    device = replace(gpus(1)[0], memory_bytes=10**9)
    small = make_rig(sqlite_url, devices=(device,))
    assert small.client.post("/jobs", json=small.spec()).status_code == 201
    large = small.spec(model={"hidden_size": 1024, "num_hidden_layers": 16})
    assert "and the device has 1.0 GB" in mistakes(small, large)["/model"]
    # Muon remembers half as much: what AdamW has no room for may fit.
    between = small.spec(model={"hidden_size": 768, "num_hidden_layers": 9})
    assert list(mistakes(small, between)) == ["/model"]
    between["training"] = {"optimizer": "muon"}
    assert small.client.post("/jobs", json=between).status_code == 201
    small.close()


def test_a_model_that_only_several_gpus_can_hold_names_the_parallelism(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, devices=[replace(device, memory_bytes=10**9) for device in gpus(4)])
    found = []
    for layers in (7, 16, 100):
        spec = rig.spec(model={"hidden_size": 1024, "num_hidden_layers": layers}, resources={"nproc_per_node": 4})
        found.append(mistakes(rig, spec)["/model"].partition("1.0 GB: ")[2])
        for parallelism in ("zero1", "fsdp"):
            if parallelism in found[-1]:
                spec["resources"]["parallelism"] = parallelism
                assert rig.client.post("/jobs", json=spec).status_code == 201
    advice = "set resources.parallelism to {}"
    assert found == [advice.format("zero1"), advice.format("fsdp"), "take a smaller model"]
    rig.close()


def test_corpora_that_are_none(rig: ServiceHarness) -> None:
    fifo, empty, link = rig.home / "fifo", rig.home / "empty", rig.home / "link"
    os.mkfifo(fifo)
    empty.touch()
    link.symlink_to("/etc/passwd")
    (rig.home / "folder").mkdir()
    (rig.home / "leads-out").mkdir()
    (rig.home / "leads-out" / "a\nb.jsonl").symlink_to("/etc/passwd")
    leads = "'/leads-out/a\\nb.jsonl', which leads outside the directories that TRAINYARD_DATA_ROOTS allows"
    roots = " or ".join(map(str, dict.fromkeys([*rig.settings.data_roots, rig.home])))
    outside = f"lies outside the directories that TRAINYARD_DATA_ROOTS allows: {roots}"
    for path, message in {
        str(fifo): "must be a regular file",
        str(
            rig.home / "folder"
        ): "is a directory without a corpus file: it needs files that end in .jsonl, .ndjson, .txt "
        "or .parquet, or one of the first three with .gz or .zst",
        f"{rig.home}/folder/*.x": "matches no file. Links to directories are not followed",
        str(rig.home / "leads-out"): f"holds {leads}".replace("'/", f"'{rig.home}/"),
        str(empty): "is empty",
        str(link): outside,
        "/etc/passwd": outside,
        "/dev/zero": outside,
        f"{rig.home}/../../../../../../etc/passwd": outside,
        f"{rig.home}/{'x' * 300}": "does not exist or cannot be reached",
    }.items():
        assert mistakes(rig, {"data": {"data_path": path}}) == {"/data/data_path": message}, path
        assert mistakes(rig, rig.spec() | {"data": {"data_path": str(rig.corpus), "eval_data_path": path}}) == {
            "/data/eval_data_path": message
        }


RELATIVE_PATHS = {
    "/data/data_path": "corpus.jsonl",
    "/data/eval_data_path": "./corpus.jsonl",
    "/data/tokenizer_path": "../model",
    "/training/from_weight": "out/pretrain_512.pth",
    "/checkpoint/save_dir": "~/out",
}


def with_relative(rig: ServiceHarness, pointer: str) -> dict[str, Any]:
    _, group, leaf = pointer.split("/")
    spec = rig.spec()
    spec.setdefault(group, {})[leaf] = RELATIVE_PATHS[pointer]
    return spec


@pytest.mark.parametrize("pointer", RELATIVE_PATHS)
def test_a_relative_path_is_refused_although_it_exists_in_the_working_directory(
    rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch, pointer: str
) -> None:
    monkeypatch.chdir(rig.home)
    setting = "TRAINYARD_SAVE_ROOTS" if pointer.endswith("save_dir") else "TRAINYARD_DATA_ROOTS"
    [(where, message)] = mistakes(rig, with_relative(rig, pointer)).items()
    assert where == pointer
    assert message.startswith("must be absolute, below ")
    assert str(rig.home) in message
    assert message.endswith(f"({setting})")
    assert rig.get("/jobs")["data"] == []


def test_a_token_that_is_no_admin_does_not_learn_the_allowed_directories(
    make_rig: MakeHarness, sqlite_url: str
) -> None:
    rig = make_rig(sqlite_url, token="sesame")
    rig.client.headers["Authorization"] = "Bearer sesame"
    token = rig.client.post("/tokens", json={"name": "ci", "scope": "submit"}).json()["token"]
    parent = rig.submit()
    rig.client.headers["Authorization"] = f"Bearer {token}"
    assert mistakes(rig, with_relative(rig, "/data/data_path")) == {"/data/data_path": "must be absolute"}
    for path in ("/jobs", "/jobs/plan"):
        answer = rig.client.post(path, json={"data": {"data_path": "/etc/passwd"}})
        assert "lies outside the directories that TRAINYARD_DATA_ROOTS allows; by default the folder" in answer.text
        assert str(rig.home) not in answer.text
    answer = rig.client.post(f"/jobs/{parent}/fork/plan", json={"overrides": {"data": {"eval_data_path": "x"}}})
    assert str(rig.home) not in answer.text
    rig.close()


def test_paths_are_stored_resolved(rig: ServiceHarness) -> None:
    link = rig.home / "link.jsonl"
    link.symlink_to(rig.corpus)
    (rig.home / "out").mkdir()
    job = rig.job(
        rig.submit(data={"data_path": f"{rig.home}/out/../link.jsonl"}, checkpoint={"save_dir": f"{rig.home}/out/."})
    )
    assert job["spec"]["data"]["data_path"] == str(rig.corpus)
    assert job["spec"]["checkpoint"]["save_dir"] == str(rig.home / "out")


def test_where_may_be_written(rig: ServiceHarness) -> None:
    assert list(mistakes(rig, rig.spec(checkpoint={"save_dir": "/usr/share/x"}))) == ["/checkpoint/save_dir"]
    assert mistakes(rig, rig.spec(checkpoint={"save_dir": str(rig.corpus)})) == {
        "/checkpoint/save_dir": "must be a directory"
    }
    assert rig.submit(checkpoint={"save_dir": str(rig.home / "new" / "one")})


def test_weights_to_start_from(rig: ServiceHarness) -> None:
    weights = rig.home / "w.pth"
    assert list(mistakes(rig, rig.spec(training={"from_weight": str(weights)}))) == ["/training/from_weight"]
    assert list(mistakes(rig, rig.spec(training={"from_weight": "/etc/shadow"}))) == ["/training/from_weight"]
    weights.touch()
    directory = weights.parent / "exported"
    directory.mkdir()
    assert list(mistakes(rig, rig.spec(training={"from_weight": str(directory)}))) == ["/training/from_weight"]
    (directory / "model.safetensors").write_bytes(b"w")
    rig.job(rig.submit(training={"from_weight": str(directory)}))
    job = rig.job(rig.submit(training={"from_weight": str(weights)}))
    assert job["spec"]["training"]["from_weight"] == str(weights)


def test_a_name_of_weights_is_checked_at_submit(rig: ServiceHarness) -> None:
    save_dir = rig.home / "saves"
    named: dict[str, Any] = {"training": {"from_weight": "pretrain"}, "checkpoint": {"save_dir": str(save_dir)}}
    assert "/training/from_weight" in mistakes(rig, rig.spec(**named))
    assert "/training/from_weight" in mistakes(rig, rig.spec(training={"from_weight": "pretrain"}))
    # What an earlier job wrote is found, for the model's own size alone.
    (save_dir / "job_1" / "out").mkdir(parents=True)
    (save_dir / "job_1" / "out" / "pretrain_512.pth").touch()
    job_id = rig.submit(**named)
    assert rig.job(job_id)["spec"]["training"]["from_weight"] == "pretrain"
    assert (
        "_640_moe.pth"
        in mistakes(rig, rig.spec(**named, model={"hidden_size": 640, "use_moe": True}))["/training/from_weight"]
    )
    # A job that was submitted can still be changed when the weights are gone.
    (save_dir / "job_1" / "out" / "pretrain_512.pth").unlink()
    assert rig.client.patch(f"/jobs/{job_id}", json={"priority": 3}).status_code == 200


def tokenizer(directory: Path, text: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(text)
    return str(directory)


def test_the_vocabulary_comes_from_the_tokenizer(rig: ServiceHarness) -> None:
    path = tokenizer(rig.home / "tok", '{"model": {"vocab": {"a": 0, "b": 6399}}, "added_tokens": []}')
    data = {"data_path": str(rig.corpus), "tokenizer_path": path}
    assert rig.job(rig.submit(data=data))["spec"]["model"]["vocab_size"] == 6400
    assert rig.job(rig.submit(data=data, model={"vocab_size": 8000}))["spec"]["model"]["vocab_size"] == 8000
    assert mistakes(rig, {"data": data, "model": {"vocab_size": 100}}) == {
        "/model/vocab_size": "must be at least the tokenizer's size, 6400, or left out"
    }


TOKENIZERS = [
    "",
    "[]",
    "{",
    '{"model": {"vocab": {}}}',
    '{"model": {"vocab": {"a": 1e400}}}',
    '{"model": {"vocab": {"a": 99999999999}}}',
    "[" * 9999,
]


@pytest.mark.parametrize("text", TOKENIZERS)
def test_tokenizers_that_are_none(rig: ServiceHarness, text: str) -> None:
    path = tokenizer(rig.home / "tok", text)
    assert list(mistakes(rig, {"data": {"data_path": str(rig.corpus), "tokenizer_path": path}})) == [
        "/data/tokenizer_path"
    ]


def test_nothing_is_echoed(rig: ServiceHarness) -> None:
    body = {
        "name": {"a": SECRET},
        "data": {"data_path": f"/{SECRET}", "tokenizer_path": f"/tmp/{SECRET}", "text_field": ["x", SECRET]},
        "training": {"learning_rate": SECRET, "dtype": SECRET, "from_weight": f"/tmp/{SECRET}"},
        "checkpoint": {"save_dir": f"/{SECRET}", "save_weight": f"../{SECRET}"},
        "resources": {"device": SECRET},
    }
    answer = rig.client.post("/jobs", json=body)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 10
    assert SECRET not in answer.text


@pytest.mark.parametrize("body", [None, [], 5, "x", True])
def test_a_body_that_is_no_object(rig: ServiceHarness, body: Any) -> None:
    assert mistakes(rig, body) == {"": "must be a JSON object"}


def test_a_key_makes_a_submission_safe_to_repeat(any_rig: ServiceHarness) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers)
    again = any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["location"] == first.headers["location"]
    other = any_rig.client.post("/jobs", json=any_rig.spec(name="other"), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(any_rig.get("/jobs")["data"]) == 1
    any_rig.corpus.unlink()
    assert any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers).status_code == 200


def test_one_key_from_many_threads_is_one_job(any_rig: ServiceHarness) -> None:
    def submit(_: int) -> tuple[int, str]:
        answer = any_rig.client.post("/jobs", json=any_rig.spec(), headers={"Idempotency-Key": "same"})
        return answer.status_code, answer.json()["id"]

    answers = in_threads(12, submit)
    assert sorted(code for code, _ in answers) == [200] * 11 + [201]
    assert len({job_id for _, job_id in answers}) == 1
    assert len(any_rig.get("/jobs")["data"]) == 1


@pytest.fixture
def shared(make_rig: MakeHarness, any_url: str) -> ServiceHarness:
    """A service that wants a token; its client has the operator's."""
    rig = make_rig(any_url, token="sesame")
    rig.client.headers["Authorization"] = "Bearer sesame"
    return rig


def submit_as(rig: ServiceHarness, token: str, path: str = "/jobs", **body: Any) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": "nightly"}
    answer = rig.client.post(path, json=body or rig.spec(), headers=headers)
    return answer.status_code, answer.json().get("id") or answer.json()["code"]


def two_tokens(rig: ServiceHarness) -> tuple[str, str]:
    made = [rig.client.post("/tokens", json={"name": name, "scope": "submit"}) for name in ("alice", "bob")]
    return made[0].json()["token"], made[1].json()["token"]


def test_a_key_belongs_to_a_token(shared: ServiceHarness) -> None:
    """In 0.1 bob got alice's job, and his own was never launched."""
    alice, bob = two_tokens(shared)
    first = submit_as(shared, alice)
    second = submit_as(shared, bob)
    assert (first[0], second[0]) == (201, 201)
    assert first[1] != second[1]
    assert submit_as(shared, alice) == (200, first[1])
    assert submit_as(shared, bob) == (200, second[1])
    assert submit_as(shared, bob, name="other", data={"data_path": str(shared.corpus)}) == (
        422,
        "idempotency_key_reused",
    )
    assert [job["submitted_by"] for job in shared.get("/jobs", order="oldest")["data"]] == ["alice", "bob"]
    attempt = finished(shared, first[1])
    forks = [submit_as(shared, token, f"/jobs/{first[1]}/fork", step=attempt)[0] for token in (alice, bob)]
    assert forks == [422, 422], "the key of a submission is not that of a fork"


def finished(rig: ServiceHarness, job_id: str) -> int:
    """Let the job end with a checkpoint, and return its step."""
    rig.reconcile()
    attempt = rig.launcher.of(job_id)
    attempt.started(steps=4)
    rig.checkpoint(job_id, attempt, 4)
    rig.exit(attempt, "completed", step=4)
    return 4


def test_keys_of_0_1_stay_valid_for_their_caller(shared: ServiceHarness) -> None:
    alice, bob = two_tokens(shared)
    first = submit_as(shared, alice)
    with shared.database.engine.execution_options(writes=True).begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0009")
    shared.database.upgrade()
    assert submit_as(shared, alice) == (200, first[1])
    assert submit_as(shared, bob)[0] == 201
    with shared.database.engine.execution_options(writes=True).begin() as connection:
        alembic.command.downgrade(alembic_config(connection), "0009")
        kept = connection.execute(text("SELECT key, job_id FROM idempotency_keys")).all()
    shared.database.upgrade()
    assert kept == [("nightly", first[1])], "0.1 has one key for all: the first to use it keeps it"


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "\x7f"])
def test_keys_that_are_none(rig: ServiceHarness, key: str) -> None:
    answer = rig.client.post("/jobs", json=rig.spec(), headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/header/Idempotency-Key"


def test_a_key_is_free_again_once_its_job_is_deleted(any_rig: ServiceHarness) -> None:
    headers = {"Idempotency-Key": "k"}
    first = any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers).json()["id"]
    any_rig.post_action(first, "cancel")
    any_rig.client.delete(f"/jobs/{first}")
    second = any_rig.client.post("/jobs", json=any_rig.spec(), headers=headers)
    assert (second.status_code, second.json()["id"] != first) == (201, True)


def test_epochs_beside_max_steps_is_in_plan_job_and_event(rig: ServiceHarness) -> None:
    for training in ({"epochs": 3, "max_steps": 94}, {"epochs": 1, "max_steps": 94}):
        spec = rig.spec(training=training, resources={"device": "cpu"})
        warnings = rig.client.post("/jobs/plan", json=spec).json()["warnings"]
        job_id = rig.submit(training=training, resources={"device": "cpu"})
        (alert,) = rig.job(job_id)["alerts"]
        expected = f"epochs {training['epochs']} is ignored, because max_steps is set: the run ends after 94 steps"
        assert alert["message"] == expected
        assert expected in warnings
        events = rig.client.get(f"/jobs/{job_id}/events").json()["data"]
        assert [event["message"] for event in events if event["kind"] == "warning"] == [expected]
    for alone in ({"epochs": 3}, {"max_steps": 94}):
        assert rig.job(rig.submit(training=alone, resources={"device": "cpu"}))["alerts"] == []


def test_the_tokens_around_documents_are_in_the_plan(rig: ServiceHarness) -> None:
    spec = rig.spec()
    assert rig.client.post("/jobs/plan", json=spec).json()["bos_token"] == "<|im_start|>"
    folder = rig.home / "gpt2"
    folder.mkdir()
    vocabulary = {
        "model": {"vocab": {"a": 0}},
        "added_tokens": [{"id": 1, "content": "<|endoftext|>", "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    plan = rig.client.post("/jobs/plan", json=rig.spec(data={**spec["data"], "tokenizer_path": str(folder)})).json()
    assert (plan["bos_token"], plan["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")


def test_a_spec_and_a_tokenizer_with_a_byte_order_mark(rig: ServiceHarness) -> None:
    folder = rig.home / "marked"
    folder.mkdir()
    described = {"model": {"vocab": {"a": 0, "<s>": 1}}, "added_tokens": [{"id": 1, "content": "<s>"}]}
    for name, content in (("tokenizer.json", described), ("tokenizer_config.json", {"bos_token": "<s>"})):
        (folder / name).write_text(json.dumps(content), encoding="utf-8-sig")
    spec = rig.spec()
    spec["data"]["tokenizer_path"] = str(folder)
    body = json.dumps(spec).encode("utf-8-sig")
    answer = rig.client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["model"]["vocab_size"] == 2


def test_a_mistake_in_the_sources_is_no_mistake_in_data_path(rig: ServiceHarness) -> None:
    path = rig.spec()["data"]["data_path"]
    many = [{"name": f"s{number}", "path": path} for number in range(300)]
    assert mistakes(rig, {"data": {"sources": many}}).keys() == {"/data/sources"}
    wrong = [{"name": "a", "path": path, "weight": -1}]
    assert mistakes(rig, {"data": {"sources": wrong}}).keys() == {"/data/sources/0/weight"}


def test_the_paths_of_held_out_sets_are_checked_and_resolved(rig: ServiceHarness) -> None:
    path = rig.spec()["data"]["data_path"]
    wrong = [
        {"name": "a", "path": "/etc/passwd"},
        {"name": "b", "path": [path, "b.jsonl"]},
        {"name": "c", "path": path},
    ]
    found = mistakes(rig, {"data": {"data_path": path, "eval_sources": wrong}})
    assert found.keys() == {"/data/eval_sources/0/path", "/data/eval_sources/1/path/1"}
    link = rig.home / "link.jsonl"
    link.symlink_to(path)
    sets = [{"name": "a", "path": str(link), "max_tokens": 100}]
    answer = rig.client.post("/jobs", json={"data": {"data_path": path, "eval_sources": sets}})
    assert answer.status_code == 201, answer.text
    assert answer.json()["spec"]["data"]["eval_sources"] == [
        {"name": "a", "path": str(Path(path).resolve()), "text_field": None, "max_tokens": 100}
    ]


def test_a_file_of_a_directory_that_cannot_be_used_is_named(rig: ServiceHarness) -> None:
    folder = rig.home / "folder"
    folder.mkdir()
    (folder / "good.jsonl").write_text('{"text": "a"}\n')
    with open(os.path.join(os.fsencode(folder), b"\xff.jsonl"), "w") as file:
        file.write("x")
    (message,) = mistakes(rig, {"data": {"data_path": str(folder)}}).values()
    assert message.endswith("/folder/\\udcff.jsonl', which has a name that is not UTF-8: rename it")
    (message,) = mistakes(rig, {"data": {"data_path": f"{folder}/*/../../*"}}).values()
    assert message == 'has ".." after a mark of a glob: name the directory'
