"""The tools as a server of the Model Context Protocol, over HTTP and over stdio."""

import json
import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mcp_types as types
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from trainyard.contract.parsing import nearest
from trainyard.contract.scopes import Scope
from trainyard.mcp_tools.acting import ACTING
from trainyard.mcp_tools.reading import READING
from trainyard.mcp_tools.tool import Answer, McpTool, RestApi, ToolError, parse_arguments

TOOLS: dict[str, type[McpTool]] = {tool.tool_name: tool for tool in (*READING, *ACTING)}

INSTRUCTIONS = """\
Trainyard trains language models from scratch: each job is one pretraining run. The loop:
1. plan_job with a job spec (fields: read_documentation, page reference/spec). Fix errors and warnings.
2. launch_job with a limit (limits.max_minutes), a group for the runs that you will compare, and a new idempotency_key.
   If the answer is lost, call it again with the same key.
3. wait_for_job until reached is true. Meanwhile read_curve and read_log. A failed job has an error with a hint.
4. compare_jobs with the group: the best score is first; less is better.
5. describe_job with what was tried and what came out; then discard_job, or fork_job with other settings.
An error has a code and says what to do. Do not act on jobs of other owners unless you are told to."""

FIRST_STEP = {
    "invalid_spec": "Fix the fields that `errors` names; read_documentation with page reference/spec explains them.",
    "invalid_arguments": "Fix the arguments that `errors` names and call again.",
    "idempotency_key_reused": "Use a new idempotency_key for other arguments.",
    "unknown_tool": "Call one of the tools that are listed.",
    "job_not_found": "Call list_jobs; discarded jobs are listed with discarded: true.",
    "checkpoint_not_found": "Call list_checkpoints.",
    "step_unavailable": "Call list_checkpoints.",
    "invalid_state": "Call show_job: `can` lists what is allowed now.",
    "forbidden": "Ask the user: this token may not do it.",
    "unauthorized": "Ask the user for a valid token.",
    "quota_exceeded": "Wait for one of the token's jobs to end, or ask the user.",
    "log_not_found": "Call show_job: the run has not started, or has no such attempt or rank.",
}
"""What to do first about an error, by its code, in the words of the tools."""

log = logging.getLogger("trainyard")


def build_server(api: RestApi) -> Server[Any]:
    """Return a server that offers the tools which the caller's scope covers."""

    async def list_tools(_: ServerRequestContext, __: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        scope = await _scope_or_all(api)
        return types.ListToolsResult(tools=[_described(tool) for tool in TOOLS.values() if scope.covers(tool.needs)])

    async def call_tool(_: ServerRequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
        try:
            return _result(await _run(api, params.name, params.arguments or {}))
        except ToolError as error:
            return _result({"error": _with_first_step(error.problem)}, is_error=True)
        except Exception:
            log.exception("a tool failed", extra={"tool": params.name})
            problem = {"code": "internal", "message": "The tool failed. The service's log has the reason."}
            return _result({"error": problem}, is_error=True)

    return Server(
        "trainyard",
        version=_version(),
        title="Trainyard",
        instructions=INSTRUCTIONS,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
        # Without it, the SDK would list all tools before each call.
        get_tool_input_schema=lambda name: _described(TOOLS[name]).input_schema if name in TOOLS else None,
    )


async def serve_http(api: RestApi, scope: AsgiScope, receive: Receive, send: Send) -> None:
    """Answer one HTTP request.

    No session is kept, so that any server of several may answer the next request. The answer is one JSON object, not a
    stream: no tool takes longer than `reading.MAX_WAIT_SECONDS`.
    """
    manager = StreamableHTTPSessionManager(build_server(api), json_response=True, stateless=True)
    async with manager.run():
        await manager.handle_request(scope, receive, send)


async def serve_stdio(api: RestApi) -> None:
    """Answer the requests on stdin until it ends."""
    server = build_server(api)
    async with stdio_server() as (requests, responses):
        await server.run(requests, responses, server.create_initialization_options())


async def _run(api: RestApi, name: str, arguments: dict[str, Any]) -> Answer:
    tool = TOOLS.get(name)
    if tool is None:
        near = nearest(name, tuple(TOOLS))
        raise ToolError("unknown_tool", f"There is no tool {name!r}." + (f" Did you mean {near}?" if near else ""))
    # The service checks the scope itself, also of a tool that is not listed.
    return await parse_arguments(tool, arguments).run(api)


async def _scope_or_all(api: RestApi) -> Scope:
    try:
        return await api.scope()
    except ToolError:
        # The service does not respond, or is older and does not tell: it decides at each call.
        return Scope.ADMIN


@cache
def _described(tool: type[McpTool]) -> types.Tool:
    hints = types.ToolAnnotations(
        read_only_hint=not tool.acts,
        destructive_hint=tool.ends_run if tool.acts else None,
        open_world_hint=False,
    )
    schema = _shortened(tool.model_json_schema())
    description = " ".join(str(schema.pop("description")).split())
    return types.Tool(name=tool.tool_name, description=description, input_schema=schema, annotations=hints)


def _shortened(schema: Any) -> Any:
    """Return a JSON schema without titles made of names, and without null as another type of an optional argument.

    A model reads each word of it.
    """
    if isinstance(schema, list):
        return [_shortened(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: below for name, below in schema.items() if name != "title" or not isinstance(below, str)}
    branches = kept.get("anyOf", [])
    if len(branches) == 2 and branches[1] == {"type": "null"} and kept.get("default", 0) is None:
        del kept["anyOf"], kept["default"]
        kept = {**branches[0], **kept}
    return {name: _shortened(below) for name, below in kept.items()}


def _result(answer: Answer, *, is_error: bool = False) -> types.CallToolResult:
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    content: list[types.ContentBlock] = [types.TextContent(type="text", text=text)]
    return types.CallToolResult(content=content, structured_content=answer, is_error=is_error)


def _with_first_step(problem: dict[str, Any]) -> dict[str, Any]:
    first = FIRST_STEP.get(problem["code"])
    return problem if first is None else {**problem, "do": first}


def _version() -> str:
    try:
        return version("trainyard")
    except PackageNotFoundError:
        return "unknown"
