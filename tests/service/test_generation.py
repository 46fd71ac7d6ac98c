"""Text over HTTP, with a program in place of the model: which requests get a process or wait, and what ends them."""

import contextlib
import http.client
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import select

from tests.client.fake_service import console, written
from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_checkpoints import at_rest, saved, write_checkpoint
from trainyard.client.api import Client
from trainyard.client.cli.main import main
from trainyard.client.errors import ApiError
from trainyard.service.db.models import DeviceLeaseRow
from trainyard.service.devices.inventory import Device, cpu_slots
from trainyard.service.generation import pool
from trainyard.service.generation.pool import GenerationPool

PROGRAM = """
import os, shutil, sys, time
from pathlib import Path
from trainyard.worker.sidecar import ServiceLink
checkpoint = Path(sys.argv[1])
link = ServiceLink.from_environment()
state = (checkpoint / "state.json").read_bytes()
if state == b"gone":
    shutil.rmtree(checkpoint)
if state in (b"damaged", b"gone"):
    link.send({"event": "failed", "message": f"{checkpoint.name} is damaged"})
    sys.exit(1)
log = (checkpoint.parent / "log").open("a", buffering=1)
log.write(f"start {checkpoint.name} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
link.send({"event": "ready"})
slow = {}
while True:
    message = link.receive(wait=not slow)
    while message is not None:
        if "cancel" in message:
            slow.pop(message["cancel"], None)
            log.write("cancel\\n")
        else:
            task, [prompt] = message["id"], message["prompts"] or ["chat"]
            if prompt == "exit":
                sys.exit("a bad end")
            if prompt == "long":
                link.send({"id": task, "event": "rejected", "pointer": "/prompt", "message": "is too long"})
            else:
                link.send({"id": task, "event": "accepted", "prompt_tokens": [len(prompt)], "chat_template": False})
                if prompt == "slow":
                    slow[task] = 0
                    log.write("slow\\n")
                elif prompt == "diverged":
                    link.send({"id": task, "event": "error", "message": "not finite"})
                else:
                    for part in ("\\u4e2d", prompt.upper()):
                        link.send({"id": task, "event": "text", "choice": 0, "text": part})
                    link.send({"id": task, "event": "finished", "choice": 0, "reason": "stop", "tokens": 2})
        message = link.receive(wait=False)
    for task in slow:
        link.send({"id": task, "event": "text", "choice": 0, "text": "x" * 100})
    time.sleep(0.01 if slow else 0)
"""


JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PROGRAM", ("-c", PROGRAM))


def generate(rig: ServiceHarness, job_id: str, step: int | str = "latest", **body: Any) -> tuple[int, dict[str, Any]]:
    answer = rig.client.post(f"/jobs/{job_id}/checkpoints/{step}/generate", json={"prompt": "hello", **body})
    return answer.status_code, answer.json()


def generation(rig: ServiceHarness) -> GenerationPool:
    found: GenerationPool = rig.app.state.app_state.generation
    return found


def log(rig: ServiceHarness, job_id: str) -> list[str]:
    file = rig.home / "runs" / job_id / "checkpoints" / "log"
    return file.read_text().splitlines() if file.exists() else []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_text_by_step_and_by_the_newest(any_rig: ServiceHarness) -> None:
    job_id, _ = saved(any_rig, 10, 20)
    status, text = generate(any_rig, job_id)
    assert status == 200, text
    assert (text["text"], text["tokens"], text["finish_reason"], text["step"]) == ("\u4e2dHELLO", 2, "stop", 20)
    assert (text["prompt_tokens"], text["device"], text["job_id"]) == (5, "cpu", job_id)
    assert generate(any_rig, job_id, 10)[1]["step"] == 10
    assert generate(any_rig, job_id)[0] == 200
    assert [line.split()[1] for line in log(any_rig, job_id)] == ["step-00000020", "step-00000010"], "kept warm"


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line)
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_a_stream_of_parts(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    body = {"prompt": "hello", "stream": True}
    answer = rig.client.post(f"/jobs/{job_id}/checkpoints/10/generate", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    (start, started), first, second, (end, ended) = events(answer.text)
    assert (start, started["step"], end) == ("start", 10, "end")
    assert [first, second] == [("text", {"text": "\u4e2d"}), ("text", {"text": "HELLO"})]
    assert (ended["text"], ended["tokens"], ended["finish_reason"], ended["step"]) == ("\u4e2dHELLO", 2, "stop", 10)


def test_all_mistakes_of_a_request_are_named(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    body: dict[str, Any] = {
        "prompt": 1, "max_new_tokens": -1, "temperature": "hot", "top_p": 0, "top_k": 1.5, "seed": -1,
        "stop": ["", "a"], "stream": "yes", "streams": True, "messages": [{"role": "robot", "content": "x"}],
    }  # fmt: skip
    status, problem = generate(rig, job_id, **body)
    pointers = {error["pointer"] for error in problem["errors"]}
    assert status == 422
    assert pointers == {f"/{name}" for name in body} - {"/stop", "/messages"} | {"/stop/0", "/messages/0/role"}
    both = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    status, problem = generate(rig, job_id, "newest", **both)
    assert {error["pointer"] for error in problem["errors"]} == {"/prompt", "/path/step"}
    assert generate(rig, job_id, prompt="long")[1]["errors"] == [{"pointer": "/prompt", "message": "is too long"}]
    assert generate(rig, job_id, stream=True, prompt="long")[0] == 422, "before the stream begins"
    assert rig.client.post(f"/jobs/{job_id}/checkpoints/10/generate", json={}).status_code == 422
    for field in ("prompt", "messages/0/content", "stop/1"):
        lone = {"prompt": '"\\ud800"', "stop/1": '"x", "stop": ["a", "\\udc00"]'}.get(field, "null")
        messages = ', "messages": [{"role": "user", "content": "\\ud800"}]' * field.startswith("messages")
        answer = rig.client.post(
            f"/jobs/{job_id}/checkpoints/10/generate", content=f'{{"prompt": {lone}{messages}}}', headers=JSON
        )
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/{field}"), answer.text
    assert (
        rig.client.post("/v1/completions", content=b'{"model": "m", "prompt": "\\ud800"}', headers=JSON).status_code
        == 400
    )
    for text in ("nan", "Infinity"):
        content = f'{{"prompt": "x", "temperature": {text}}}'
        answer = rig.client.post(f"/jobs/{job_id}/checkpoints/10/generate", content=content, headers=JSON)
        assert answer.status_code == 422


def test_a_stop_text_may_be_given_without_a_list(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    assert generate(rig, job_id, stop="end")[0] == 200
    assert generate(rig, job_id, stop=["end", "."])[0] == 200


def test_what_is_not_there_is_404_with_the_reason(any_rig: ServiceHarness) -> None:
    job_id = at_rest(any_rig, 10, 20)
    assert generate(any_rig, job_id, 10)[0] == 200
    assert any_rig.client.delete(f"/jobs/{job_id}/checkpoints/10").status_code == 204
    status, problem = generate(any_rig, job_id, 10)
    assert (status, problem["code"]) == (404, "checkpoint_not_found")
    assert "step 10 was removed by local" in problem["detail"]
    assert "Those it has: 20" in problem["detail"]
    assert generate(any_rig, job_id, 15)[1]["detail"] == "The job has no checkpoint of step 15. Those it has: 20."
    assert generate(any_rig, "job_none")[1]["code"] == "job_not_found"
    assert generate(any_rig, any_rig.submit())[1]["detail"] == "The job has no checkpoint yet."
    until(lambda: generation(any_rig).processes == 0)  # its checkpoint is gone, so it ends without waiting


def test_a_checkpoint_that_cannot_be_used_has_its_reason(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    directory = rig.home / "runs" / job_id / "checkpoints" / "step-00000010"
    (directory / "state.json").write_bytes(b"damaged")
    status, problem = generate(rig, job_id)
    assert (status, problem["code"], problem["detail"]) == (409, "generation_failed", "Step-00000010 is damaged.")
    write_checkpoint(directory, b"other weights")
    assert generate(rig, job_id)[0] == 200, "the next request tries again"
    write_checkpoint(directory, b"and others")
    (directory / "state.json").write_bytes(b"gone")
    status, problem = generate(rig, job_id)
    assert (status, problem["detail"]) == (404, "The checkpoint was deleted while it was loaded.")
    assert generate(rig, job_id)[1]["detail"] == "The job has no checkpoint yet."


def test_a_process_that_ends_is_an_error_and_the_next_request_has_another(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    status, problem = generate(rig, job_id, prompt="exit")
    assert (status, problem["code"]) == (503, "generation_ended")
    assert generate(rig, job_id)[0] == 200
    status, problem = generate(rig, job_id, prompt="diverged")
    assert (status, problem["detail"]) == (409, "Not finite.")
    stream = rig.client.post(f"/jobs/{job_id}/checkpoints/10/generate", json={"prompt": "diverged", "stream": True})
    assert events(stream.text)[-1][1]["code"] == "generation_failed"
    assert generation(rig).requests == 0


def limited(make_rig: MakeHarness, url: str, **settings: str) -> ServiceHarness:
    return make_rig(url, **{f"TRAINYARD_GENERATION_{name}": value for name, value in settings.items()})


def test_one_that_is_idle_makes_room_for_another_checkpoint(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = limited(make_rig, sqlite_url, PROCESSES="1")
    job_id, _ = saved(rig, 10, 20)
    for step in (10, 20, 10):
        assert generate(rig, job_id, step)[0] == 200
    assert [line.split()[1][-2:] for line in log(rig, job_id)] == ["10", "20", "10"]
    until(lambda: generation(rig).processes == 1)
    rig.close()


def test_an_idle_one_ends_after_a_while(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = limited(make_rig, sqlite_url, IDLE_SECONDS="0")
    job_id, _ = saved(rig, 10)
    assert generate(rig, job_id)[0] == 200
    until(lambda: generation(rig).processes == 0)
    rig.close()


def test_limits_of_memory_and_the_switch(make_rig: MakeHarness, sqlite_url: str) -> None:
    for settings, status, code in (
        ({"BYTES": "1000"}, 409, "model_too_large"),
        ({"PROCESSES": "0"}, 501, "generation_unavailable"),
    ):
        rig = limited(make_rig, sqlite_url, **settings)
        job_id, _ = saved(rig, 10)
        found, problem = generate(rig, job_id)
        assert (found, problem["code"]) == (status, code), problem
        rig.close()


def test_a_token_that_only_reads_generates_nothing(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token="operator")
    rig.client.headers["Authorization"] = "Bearer operator"
    job_id, _ = saved(rig, 10)
    reader = rig.client.post("/tokens", json={"name": "reader", "scope": "read"}).json()["token"]
    rig.client.headers["Authorization"] = f"Bearer {reader}"
    assert rig.client.get("/v1/models").status_code == 200
    assert generate(rig, job_id)[0] == 403
    answer = rig.client.post("/v1/completions", json={"model": job_id, "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (403, "permission_error")
    rig.client.headers["Authorization"] = "Bearer nonsense"
    answer = rig.client.post("/v1/completions", json={"model": job_id, "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


# OpenAI's format


def test_models_are_the_checkpoints_of_jobs_that_are_not_discarded(any_rig: ServiceHarness) -> None:
    job_id, _ = saved(any_rig, 10, 20, name="mine")
    hidden, _ = saved(any_rig, 10)
    any_rig.client.patch(f"/jobs/{hidden}", json={"discarded": True})
    models = any_rig.get("/v1/models")["data"]
    assert [model["id"] for model in models] == [f"{job_id}@latest", f"{job_id}@20", f"{job_id}@10"]
    assert {(model["object"], model["owned_by"], model["name"]) for model in models} == {("model", "local", "mine")}
    assert any_rig.get("/v1/models/mine@10")["step"] == 10
    assert any_rig.get("/v1/models/mine@11", expect=404)["error"]["code"] == "model_not_found"


def complete(rig: ServiceHarness, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = rig.client.post("/v1/completions", json={"prompt": "hi", **body})
    return answer.status_code, answer.json()


def test_a_completion_by_name_id_step_and_the_newest(any_rig: ServiceHarness) -> None:
    older, _ = saved(any_rig, 10, name="mine")
    job_id, _ = saved(any_rig, 10, name="mine")
    for model in (job_id, f"{job_id}@10", f"{job_id}@latest", "mine", "mine@10"):
        status, completion = complete(any_rig, model=model)
        assert status == 200, completion
        assert completion["choices"] == [{"text": "\u4e2dHI", "index": 0, "logprobs": None, "finish_reason": "stop"}]
        assert completion["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        assert (completion["model"], completion["object"]) == (model, "text_completion")
    assert log(any_rig, older) == [], "of several jobs with the name, the newest"
    for model in ("none", "none@10", "mine@11", "mine@-1", "", "@", "\u0000@1", "mine\u0000"):
        status, problem = complete(any_rig, model=model)
        assert (status, problem["error"]["code"]) == (404, "model_not_found"), model


def test_a_name_may_have_an_at_sign_and_a_slash(rig: ServiceHarness) -> None:
    name = "a/b@12"
    saved(rig, 10, name=name)
    for model in (name, f"{name}@10", f"{name}@latest"):
        assert complete(rig, model=model)[0] == 200, model
        found = rig.client.get(f"/v1/models/{quote(model, safe='')}").json()
        assert (found["id"], found["step"]) == (model, 10)
    assert rig.client.get("/v1/models/a/b").json()["error"]["code"] == "model_not_found"


def test_a_completion_in_parts_ends_as_openai_s_does(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    body = {"model": job_id, "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in rig.client.post("/v1/completions", json=body).text.split("\n") if line]
    assert not any(line.startswith(("retry", "event")) for line in lines), "their client takes these for data"
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    parts = [json.loads(part) for part in data[:-1]]
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == "\u4e2dHI"
    assert parts[-2]["choices"][0]["finish_reason"] == "stop"
    assert (parts[-1]["choices"], parts[-1]["usage"]["total_tokens"]) == ([], 4)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1.5]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 2}}, "logit_bias"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_mistake_is_400_with_its_parameter(rig: ServiceHarness, body: dict[str, Any], param: str) -> None:
    job_id, _ = saved(rig, 10)
    status, problem = complete(rig, model=job_id, **body)
    assert (status, problem["error"]["param"], problem["error"]["type"]) == (400, param, "invalid_request_error")
    assert problem["error"]["message"]


# On a real socket: clients at once, clients that leave


@contextlib.contextmanager
def live(rig: ServiceHarness) -> Iterator[tuple[str, int]]:
    with served(rig) as address:
        try:
            yield address
        finally:
            generation(rig).stop()
            until(lambda: generation(rig).processes == 0)


def post(address: tuple[str, int], job_id: str, **body: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(*address, timeout=60)
    path = f"/jobs/{job_id}/checkpoints/10/generate"
    connection.request("POST", path, json.dumps({"prompt": "hello", **body}), {"Content-Type": "application/json"})
    return connection


def test_twenty_clients_at_once_share_one_process(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    with live(rig) as address:
        connections = [post(address, job_id, prompt=f"client {n}", stream=n % 2 == 0) for n in range(20)]
        for n, connection in enumerate(connections):
            text = connection.getresponse().read().decode()
            assert f"CLIENT {n}" in text
            connection.close()
        assert len([line for line in log(rig, job_id) if line.startswith("start")]) == 1
        until(lambda: generation(rig).requests == 0)


def test_the_command_prints_the_text_and_says_who_wrote_it(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10, 20, name="mine")
    with live(rig) as (host, port):

        def run(*arguments: str, given: str = "") -> tuple[int, str, str]:
            to = replace(console(), stdin=io.StringIO(given))
            return (int(main([*arguments, "--url", f"http://{host}:{port}"], to)), *written(to))

        summary = "2 tokens by step 10 on cpu: it ended by itself\n"
        assert run("generate", "mine@10", "hi") == (0, "\u4e2dHI\n", summary)
        assert run("generate", job_id, "-", given="from stdin")[1] == "\u4e2dFROM STDIN\n"
        code, out, _ = run("generate", "mine@latest", "hi", "--json", "--stop", "a", "--stop", "b", "--top_k", "3")
        assert (code, json.loads(out)["text"], json.loads(out)["step"]) == (0, "\u4e2dHI", 20)
        code, out, err = run("chat", "mine", "--system", "be brief", given="one\ntwo\n\nnot read\n")
        assert (code, out) == (0, "\u4e2dCHAT\n" * 2)
        assert err.count("no chat template") == 1
        code, _, err = run("generate", "mine@11", "hi")
        assert (code, "Those it has: 20, 10." in err) == (1, True)
        code, _, err = run("generate", "mine", "hi", "--temperature", "-1")
        assert (code, "/temperature" in err) == (1, True)
        assert run("generate", "mine", "hi", "--seed", "-1")[0] == 2
        code, _, err = run("generate", "mine", "diverged")
        assert (code, "Not finite. [generation_failed]" in err) == (1, True)


def test_the_python_client_cancels_a_text_if_its_iterator_is_closed(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    with live(rig) as (host, port), Client(f"http://{host}:{port}") as client:
        assert client.generate(job_id, "hi", step=10)["text"] == "\u4e2dHI"
        stream = client.generate_stream(job_id, "slow")
        assert next(stream).kind == "start"
        assert next(stream).data["text"].startswith("xxx")
        stream.close()  # type: ignore[attr-defined] # it is a generator
        until(lambda: generation(rig).requests == 0)
        with pytest.raises(ApiError, match="Not finite"):
            list(client.generate_stream(job_id, "diverged"))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_disconnects_frees_its_place(rig: ServiceHarness, stream: bool) -> None:
    job_id, _ = saved(rig, 10)
    with live(rig) as address:
        leaving = post(address, job_id, prompt="slow", stream=stream)
        until(lambda: generation(rig).requests == 1 and "slow" in log(rig, job_id))
        with contextlib.ExitStack() as open_response:
            if stream:
                assert b"retry" in open_response.enter_context(leaving.getresponse()).readline()
        leaving.close()
        until(lambda: generation(rig).requests == 0)
        until(lambda: "cancel" in log(rig, job_id))
        staying = post(address, job_id)
        assert staying.getresponse().status == 200
        staying.close()


def test_too_many_clients_get_retry_after(rig: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MAX_REQUESTS", 3)
    job_id, _ = saved(rig, 10)
    with live(rig) as address:
        waiting = [post(address, job_id, prompt="slow") for _ in range(3)]
        until(lambda: generation(rig).requests == 3)
        refused = post(address, job_id)
        response = refused.getresponse()
        assert (response.status, response.headers["Retry-After"]) == (429, "2")
        assert json.loads(response.read())["code"] == "too_many_generations"
        for connection in (*waiting, refused):
            connection.close()
        until(lambda: generation(rig).requests == 0)


def test_if_all_processes_are_in_use_another_checkpoint_waits(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = limited(make_rig, sqlite_url, PROCESSES="1")
    job_id, _ = saved(rig, 10)
    other, _ = saved(rig, 10)
    with live(rig) as address:
        busy = post(address, job_id, prompt="slow")
        until(lambda: bool(log(rig, job_id)))
        refused = post(address, other)
        response = refused.getresponse()
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert json.loads(response.read())["code"] == "generation_busy"
        for connection in (busy, refused):
            connection.close()
    rig.close()


def test_a_stream_ends_with_the_service(rig: ServiceHarness) -> None:
    job_id, _ = saved(rig, 10)
    with live(rig) as address:
        connection = post(address, job_id, prompt="slow", stream=True)
        response = connection.getresponse()
        response.readline()
        generation(rig).stop()
        rest = response.read().decode()
        assert events(rest)[-1][0] == "error"
        assert events(rest)[-1][1]["code"] == "service_stopping"
        connection.close()


def test_a_job_gets_the_gpu_back_and_the_text_starts_again_elsewhere(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, devices=(Device("cuda:0", "cuda"), *cpu_slots(2)))
    job_id, _ = saved(rig, 10, resources={"device": "cpu"})

    def leases() -> list[tuple[str, bool]]:
        with rig.database.read() as session:
            rows = session.scalars(select(DeviceLeaseRow).where(DeviceLeaseRow.device == "cuda:0"))
            return [(row.device, row.sidecar is not None) for row in rows]

    with live(rig) as address:
        whole, stream = post(address, job_id, prompt="slow"), post(address, job_id, prompt="slow", stream=True)
        streamed = stream.getresponse()
        streamed.readline()
        until(lambda: generation(rig).requests == 2)
        assert leases() == [("cuda:0", True)]
        trained = rig.submit(resources={"device": "cuda"})
        rig.reconcile()
        assert rig.launcher.of(trained).launch.devices == ("cuda:0",)
        assert leases() == [("cuda:0", False)]
        assert events(streamed.read().decode())[-1][1]["code"] == "device_reclaimed"
        until(lambda: len([line for line in log(rig, job_id) if line.startswith("start")]) == 2)
        assert [line.rpartition(" ")[2] for line in log(rig, job_id) if line.startswith("start")] == ["0", ""]
        until(lambda: generation(rig).requests == 1)
        for connection in (whole, stream):
            connection.close()
    rig.close()
