"""The tools for agents, called by the MCP SDK's own client: over HTTP, and through the client of the command."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent

from tests.service.conftest import MakeHarness
from tests.service.harness import ServiceHarness
from tests.service.live_server import served
from tests.service.test_auth import ADMIN_TOKEN, bearer, created
from tests.service.test_checkpoints import write_checkpoint
from trainyard.client.async_connection import AsyncConnection
from trainyard.client.cli.commands.mcp import ClientApi
from trainyard.client.connection import RetryPolicy
from trainyard.contract.rundir import RunDir
from trainyard.contract.scopes import Scope
from trainyard.mcp_tools.acting import ACTING
from trainyard.mcp_tools.reading import READING
from trainyard.mcp_tools.server import TOOLS, build_server
from trainyard.service import descriptors

HTTP, HANDSHAKE, COMMAND = "http", "http with the older handshake", "the command's server"
ACCEPT = {"accept": "application/json, text/event-stream"}
TIMEOUT = 100.0
"""Of a request, in seconds: more than the longest wait of a tool."""


class Agent:
    """The SDK's client with one token."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def tools(self) -> set[str]:
        return {tool.name for tool in (await self._client.list_tools()).tools}

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The answer of a tool that succeeds."""
        result = await self._client.call_tool(tool, arguments)
        assert not result.is_error, result.content
        return self._answer(result)

    async def refusal(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The error of a tool that fails."""
        result = await self._client.call_tool(tool, arguments)
        assert result.is_error, result.content
        error: dict[str, Any] = self._answer(result)["error"]
        return error

    @staticmethod
    def _answer(result: Any) -> dict[str, Any]:
        [content] = result.content
        assert isinstance(content, TextContent)
        answer: dict[str, Any] = json.loads(content.text)
        assert result.structured_content == answer, "a model reads the text, a program the object"
        assert len(content.text) < 6000, "an answer is short"
        return answer


@contextlib.asynccontextmanager
async def agent(url: str, token: str | None = None, how: str = HTTP) -> AsyncIterator[Agent]:
    if how == COMMAND:
        connection = AsyncConnection(url, token or "", TIMEOUT, RetryPolicy(seconds=0.5))
        async with Client(build_server(ClientApi(connection))) as client:
            yield Agent(client)
        await connection.close()
        return
    async with httpx2.AsyncClient(headers=bearer(token) if token else {}, timeout=TIMEOUT) as http:
        mode = "legacy" if how == HANDSHAKE else "auto"
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
            yield Agent(client)


@pytest.fixture
def url(rig: ServiceHarness) -> Iterator[str]:
    """Address of the service, which listens on a socket."""
    with served(rig) as (host, port):
        yield f"http://{host}:{port}"


def train(rig: ServiceHarness, job_id: str, loss: float) -> None:
    """Run the job to its end, with a checkpoint, at this loss."""
    rig.reconcile()
    attempt = rig.launcher.of(job_id)
    attempt.started(steps=64)
    for step in range(1, 65):
        attempt.metric(step, loss=loss + 1 / step)
    write_checkpoint(rig.checkpoint(job_id, attempt, 64))
    rig.exit(attempt, "completed", step=64)
    rig.reconcile()


@pytest.mark.parametrize("how", [HTTP, HANDSHAKE, COMMAND])
def test_an_agent_that_may_only_submit_drives_the_whole_loop(rig: ServiceHarness, url: str, how: str) -> None:
    token = created(rig, "agent-7", scope="submit", max_jobs=3)

    async def loop(me: Agent) -> None:
        specs = [
            rig.spec(name=f"lr-{rate}", group="rates", training={"learning_rate": rate, "max_steps": 64})
            | {"limits": {"max_minutes": 5}}
            for rate in (1e-3, 3e-3)
        ]
        plan = await me.call("plan_job", spec=specs[0])
        assert plan["steps"] == 64
        assert plan["memory_bytes"] > 0
        assert isinstance(plan["warnings"], list), "also if there are none"
        jobs = [await me.call("launch_job", spec=spec, idempotency_key=spec["name"]) for spec in specs]
        again = await me.call("launch_job", spec=json.dumps(specs[0]), idempotency_key=specs[0]["name"])
        assert again["id"] == jobs[0]["id"], "the answer was lost: no second run is started"
        assert [job["owner"] for job in jobs] == ["agent-7", "agent-7"]
        reused = await me.refusal("launch_job", spec=specs[1], idempotency_key=specs[0]["name"])
        assert (reused["code"], reused["do"][:9]) == ("idempotency_key_reused", "Use a new")

        waiting = await me.call("wait_for_job", job=jobs[0]["id"], timeout_seconds=0)
        assert (waiting["reached"], waiting["status"], "pause" in waiting["can"]) == (False, "queued", True)
        for job, loss in zip(jobs, (2.5, 2.0), strict=True):
            await asyncio.to_thread(train, rig, job["id"], loss)
        ended = await me.call("wait_for_job", job="lr-0.001")
        assert (ended["reached"], ended["status"], ended["step"]) == (True, "succeeded", 64)
        assert ended["checkpoint"]["step"] == 64

        curve = await me.call("read_curve", job="lr-0.001", points=8, columns=["loss_mean", "learning_rate", "mfu"])
        assert curve["columns"] == ["step", "loss_mean", "learning_rate"], "nothing was measured of the mfu"
        assert len(curve["rows"]) <= 8
        assert curve["rows"][-1][0] == 64
        assert (await me.call("read_curve", job="lr-0.001", after_step=64))["rows"] == []

        compared = await me.call("compare_jobs", group="rates")
        assert [job["name"] for job in compared["jobs"]] == ["lr-0.003", "lr-0.001"], "the best is first"
        assert compared["differing_settings"] == {
            "training.learning_rate": {jobs[0]["id"]: 1e-3, jobs[1]["id"]: 3e-3},
        }
        assert any("training losses" in note for note in compared["notes"])

        said = await me.call("describe_job", job="lr-0.001", description="1e-3: 0.5 worse than 3e-3")
        assert said["description"] == "1e-3: 0.5 worse than 3e-3"
        assert (await me.call("discard_job", job=jobs[0]["id"]))["discarded"] is True
        assert [job["id"] for job in (await me.call("list_jobs", group="rates"))["jobs"]] == [jobs[1]["id"]]
        assert (await me.call("list_checkpoints", job="lr-0.003"))["checkpoints"][0]["step"] == 64
        overrides = {"name": "longer", "training": {"max_steps": 128}}
        forks = [
            await me.call("fork_job", job="lr-0.003", overrides=overrides, idempotency_key="fork-1") for _ in range(2)
        ]
        assert forks[0]["id"] == forks[1]["id"]
        assert forks[0]["parent"]["job_id"] == jobs[1]["id"]
        assert (await me.call("cancel_job", job="longer"))["status"] == "cancelled"

    async def drive() -> None:
        async with agent(url, token, how) as me:
            assert await me.tools() == set(TOOLS)
            await loop(me)

    asyncio.run(drive())


@pytest.mark.parametrize("how", [HTTP, COMMAND])
def test_an_agent_is_refused_what_its_token_may_not_do(
    make_rig: MakeHarness, sqlite_url: str, how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rig = make_rig(sqlite_url, token=ADMIN_TOKEN)
    rig.client.headers.update(bearer(ADMIN_TOKEN))
    outside = tmp_path_factory.mktemp("outside") / "corpus.jsonl"
    outside.write_text('{"text": "one"}\n')
    theirs = rig.submit(name="theirs")
    tokens = {scope: created(rig, f"of-{scope}", scope=scope, max_jobs=1) for scope in (Scope.READ, Scope.SUBMIT)}

    async def drive(url: str) -> None:
        async with agent(url, tokens[Scope.SUBMIT], how) as submitter:
            for tool in ("cancel_job", "pause_job", "discard_job", "resume_job"):
                error = await submitter.refusal(tool, job="theirs")
                assert error["code"] == "forbidden"
                assert "belongs to admin" in error["message"]
                assert error["do"] == "Ask the user: this token may not do it."
            told = {
                who: (await me.refusal("plan_job", spec={"data": {"data_path": str(outside)}}))["errors"][0]["message"]
                async for who, me in of_both(url, submitter)
            }
            assert str(rig.home) in told["admin"]
            assert str(rig.home) not in told["submitter"], "which folders may be read is for admins"
            await submitter.call("launch_job", spec=rig.spec(), idempotency_key="1")
            error = await submitter.refusal("launch_job", spec=rig.spec(), idempotency_key="2")
            assert error["code"] == "quota_exceeded"
        async with agent(url, tokens[Scope.READ], how) as reader:
            shown = await reader.tools()
            assert shown == {tool.tool_name for tool in READING} - {"plan_job"}
            assert not shown & {tool.tool_name for tool in ACTING}
            error = await reader.refusal("launch_job", spec=rig.spec(), idempotency_key="1")
            assert error["message"] == "This needs the scope submit; the token of-read has read."
            assert (await reader.call("show_job", job=theirs))["owner"] == "admin", "everybody may read"

    async def of_both(url: str, submitter: Agent) -> AsyncIterator[tuple[str, Agent]]:
        yield "submitter", submitter
        async with agent(url, ADMIN_TOKEN, how) as admin:
            yield "admin", admin

    with served(rig) as (host, port):
        asyncio.run(drive(f"http://{host}:{port}"))
    assert rig.status(theirs) == "queued"
    rig.close()


def message(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return message("tools/call", name=name, arguments=arguments)


def test_the_route_has_the_checks_of_all_others(make_rig: MakeHarness, sqlite_url: str) -> None:
    rig = make_rig(sqlite_url, token=ADMIN_TOKEN)
    listing = message("tools/list")
    nobody = rig.client.post("/mcp", json=listing, headers=ACCEPT)
    assert (nobody.status_code, nobody.json()["code"]) == (401, "unauthorized")
    for header in ({"origin": "https://elsewhere.example"}, {"sec-fetch-site": "cross-site"}):
        foreign = rig.client.post("/mcp", json=listing, headers={**ACCEPT, **bearer(ADMIN_TOKEN), **header})
        assert (foreign.status_code, foreign.json()["code"]) == (403, "foreign_origin")
    for method in ("GET", "DELETE"):
        refused = rig.client.request(method, "/mcp", headers={**ACCEPT, **bearer(ADMIN_TOKEN)})
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST"), "there is no stream and no session"
    large = rig.client.post("/mcp", json=message("x", y="z" * (1 << 20)), headers={**ACCEPT, **bearer(ADMIN_TOKEN)})
    assert large.status_code == 413
    for body in (b"{", b"[]", b"null", b'{"jsonrpc": "2.0"}'):
        headers = {**ACCEPT, **bearer(ADMIN_TOKEN), "content-type": "application/json"}
        malformed = rig.client.post("/mcp", content=body, headers=headers)
        assert (malformed.status_code, "error" in malformed.json()) == (400, True), body
    rig.close()


def test_mistakes_are_named_all_at_once(rig: ServiceHarness, url: str) -> None:
    async def drive() -> None:
        async with agent(url) as me:
            error = await me.refusal("list_jobs", lmit=3, order="best")
            assert error["code"] == "invalid_arguments"
            assert {found["pointer"]: found["message"] for found in error["errors"]} == {
                "/lmit": "is no argument; did you mean limit?",
                "/order": "should be 'newest', 'oldest', 'score' or '-score'",
            }
            error = await me.refusal("launch_job", spec={"data": {}, "training": {"lr": 1}}, idempotency_key="a")
            assert error["code"] == "invalid_spec"
            assert "/data/data_path" in {found["pointer"] for found in error["errors"]}
            error = await me.refusal("launch_job", spec=rig.spec())
            assert error["errors"] == [{"pointer": "/idempotency_key", "message": "is required"}]
            error = await me.refusal("launch_jobs")
            assert error["message"] == "There is no tool 'launch_jobs'. Did you mean launch_job?"
            error = await me.refusal("list_jobs", status=["runing"])
            assert error["code"] == "invalid_request"
            for tool in ("show_job", "read_log", "pause_job"):
                error = await me.refusal(tool, job="job_aaaaaaaaaa")
                assert error["code"] == "job_not_found"
                assert error["do"].startswith("Call list_jobs")
            for _ in range(2):
                rig.submit(name="twin")
            assert (await me.refusal("pause_job", job="twin"))["code"] == "ambiguous_name"
            assert (await me.refusal("compare_jobs"))["code"] == "invalid_arguments"

    asyncio.run(drive())


def test_lists_and_logs_go_on_at_the_cursor(rig: ServiceHarness, url: str) -> None:
    ids = [rig.submit(name=f"job-{number}") for number in range(5)]
    rig.reconcile()
    attempt = rig.launcher.of(ids[0])
    attempt.started()
    rig.ship(attempt)
    log = RunDir(rig.settings.runs / ids[0]).attempt(1)

    async def drive() -> None:
        async with agent(url) as me:
            seen: list[str] = []
            cursor = None
            while True:
                page = await me.call("list_jobs", limit=2, cursor=cursor, order="oldest")
                seen += [job["id"] for job in page["jobs"]]
                cursor = page.get("cursor")
                if cursor is None:
                    break
            assert seen == ids
            log.rank_log(0).parent.mkdir(parents=True, exist_ok=True)
            log.rank_log(0).write_text("one\ntwo\nthree\n")
            first = await me.call("read_log", job=ids[0], lines=2)
            assert first["text"] == "two\nthree\n"
            with log.rank_log(0).open("a") as file:
                file.write("four\n")
            assert (await me.call("read_log", job=ids[0], cursor=first["cursor"]))["text"] == "four\n"

    asyncio.run(drive())


def test_agents_that_wait_block_nobody(rig: ServiceHarness, url: str) -> None:
    """More of them than threads: each one only sleeps between short requests."""
    job_id, attempt = rig.running()

    async def drive() -> None:
        async with httpx2.AsyncClient(base_url=url, headers=ACCEPT, timeout=TIMEOUT) as http:
            wait = call("wait_for_job", job=job_id, timeout_seconds=50)
            waits = [asyncio.create_task(http.post("/mcp", json=wait)) for _ in range(40)]
            while not all_started(rig):
                assert (await http.get("/jobs")).status_code == 200
            assert (await http.get("/jobs")).status_code == 200
            assert not any(task.done() for task in waits), "another request was answered meanwhile"
            await asyncio.to_thread(rig.exit, attempt, "completed", step=10)
            answers = [json.loads(task.json()["result"]["content"][0]["text"]) for task in await asyncio.gather(*waits)]
        assert {(answer["reached"], answer["status"]) for answer in answers} == {(True, "succeeded")}

    def all_started(rig: ServiceHarness) -> bool:
        return counted_requests(rig, "/jobs/{job_id}") >= 40

    asyncio.run(drive())


def test_agents_that_wait_leave_room_for_others(rig: ServiceHarness, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "max_requests", lambda: 8)
    job_id, attempt = rig.running()

    async def drive() -> None:
        async with httpx2.AsyncClient(base_url=url, headers=ACCEPT, timeout=TIMEOUT) as http:
            wait = call("wait_for_job", job=job_id, timeout_seconds=50)
            asked = [asyncio.create_task(http.post("/mcp", json=wait)) for _ in range(5)]
            # Of five, four may wait: whichever comes last is answered first.
            answered, waits = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            [refused] = [task.result() for task in answered]
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
            assert (await http.get("/jobs")).status_code == 200
            await asyncio.to_thread(rig.exit, attempt, "completed", step=10)
            assert {answer.status_code for answer in await asyncio.gather(*waits)} == {200}

    asyncio.run(drive())


def counted_requests(rig: ServiceHarness, route: str) -> float:
    """Requests of a route that are done, by the service's own count."""
    samples = [sample for metric in rig.app.state.app_state.metrics.requests.collect() for sample in metric.samples]
    found = [s.value for s in samples if s.name.endswith("_count") and s.labels["route"] == route]
    return float(sum(found))


def test_an_agent_that_waits_does_not_delay_the_end_of_the_service(rig: ServiceHarness, url: str) -> None:
    job_id, _ = rig.running()

    async def drive() -> None:
        async with agent(url) as me:
            waiting = asyncio.create_task(me.refusal("wait_for_job", job=job_id, timeout_seconds=50))
            while not counted_requests(rig, "/jobs/{job_id}"):
                await asyncio.sleep(0.01)
            rig.pulse.stop()
            assert (await waiting)["code"] == "service_stopping", "else it had waited to its end, without an error"

    asyncio.run(drive())


def test_a_service_that_is_not_there_is_named() -> None:
    async def drive() -> None:
        async with agent("http://127.0.0.1:9", how=COMMAND) as me:
            assert await me.tools() == set(TOOLS), "which tools the token may call is not known yet"
            error = await me.refusal("list_jobs")
            assert error["code"] == "service_unreachable"
            assert "trainyard serve" in error["message"]

    asyncio.run(drive())


def test_version_tells_who_asks(rig: ServiceHarness) -> None:
    token = created(rig, "ci", scope="submit")
    answers = [rig.client.get("/version", headers=headers).json() for headers in ({}, bearer(token))]
    assert [(answer["caller"], answer["scope"]) for answer in answers] == [("local", "admin"), ("ci", "submit")]
