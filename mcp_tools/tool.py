"""What a tool is: its arguments, the scope that it needs, how it calls the REST API, and how it fails."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Protocol
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainyard.contract.parsing import nearest, plain, pointer_to
from trainyard.contract.scopes import Scope

Answer = dict[str, Any]
"""The result of a tool, as JSON: few fields, without those that are unknown."""


class RestApi(Protocol):
    """The REST API of one service, with the token of one caller."""

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        idempotency_key: str | None = None,
    ) -> Any:
        """Send a request and return the JSON of the response. Parameters that are None are left out.

        Raises ToolError if the service rejects the request or does not respond.
        """

    async def text(self, path: str) -> str:
        """Return the text at ``path``. Raises ToolError."""

    async def scope(self) -> Scope:
        """Return the scope of the caller. Raises ToolError."""


class ToolError(Exception):
    """A tool did not do what it was called for. ``problem``: ``code``, ``message``, and more fields that explain it."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.problem = {"code": code, "message": message, **more}

    @classmethod
    def of_response(cls, status: int, problem: Mapping[str, Any]) -> "ToolError":
        """Return the error for a response of the REST API with status 400 or more."""
        code = str(problem.get("code") or f"http_{status}")
        message = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
        known = ("type", "title", "status", "code", "detail", *(("request_id",) if status < 500 else ()))
        return cls(code, message, **{name: value for name, value in problem.items() if name not in known})


class McpTool(BaseModel):
    """A call of a tool. A subclass has the arguments as fields; its docstring is the description that a model reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool_name: ClassVar[str]
    needs: ClassVar[Scope] = Scope.READ
    """The scope that the REST calls of the tool need."""

    acts: ClassVar[bool] = False
    """Whether the tool changes something."""

    ends_run: ClassVar[bool] = False
    """Whether the change cannot be undone by another tool."""

    async def run(self, api: RestApi) -> Answer:
        """Do it. Raises ToolError."""
        raise NotImplementedError


def parse_arguments(tool: type[McpTool], arguments: Mapping[str, Any]) -> McpTool:
    """Return the call. Raises ToolError, which lists all mistakes."""
    try:
        return tool.model_validate(arguments)
    except ValidationError as error:
        names = tuple(tool.model_fields)
        found = error.errors(include_input=False, include_url=False, include_context=False)
        errors = [{"pointer": pointer_to(*each["loc"]), "message": _message(each, names)} for each in found]
        raise ToolError("invalid_arguments", "The arguments have mistakes; nothing was done.", errors=errors) from None


def _message(error: Mapping[str, Any], names: tuple[str, ...]) -> str:
    if error["type"] != "extra_forbidden":
        return plain(error["msg"])
    near = nearest(str(error["loc"][-1]), names)
    return f"is no argument; did you mean {near}?" if near else f"is no argument; those here are {', '.join(names)}"


def _object_of_text(value: Any) -> Any:
    # Some hosts send an argument that is an object as its JSON text.
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


JobHandle = Annotated[str, Field(min_length=1, max_length=300, description="Id (job_...) or name of the job.")]
JsonObject = Annotated[dict[str, Any], BeforeValidator(_object_of_text)]
IdempotencyKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Any text of your choice without spaces, a new one for each new run. If an answer is lost, repeat "
        "the call with the same key and arguments: it returns the job and starts no second one.",
    ),
]
Cursor = Annotated[str | None, Field(max_length=300, description="`cursor` of the previous answer, for the next page.")]


def job_path(job_id: str, *below: str) -> str:
    """Return the path of a job's route."""
    return "/".join(["/jobs", quote(job_id, safe=""), *(quote(part, safe="") for part in below)])


async def find_job(api: RestApi, handle: str) -> dict[str, Any]:
    """Return the job with this id or name. Raises ToolError if there is none, or if several have the name."""
    if handle.startswith("job_"):
        try:
            return dict(await api.call("GET", job_path(handle)))
        except ToolError as error:
            if error.problem["code"] != "job_not_found":
                raise
    for discarded in (None, "true"):
        page = await api.call("GET", "/jobs", params={"name": handle, "limit": 6, "discarded": discarded})
        found = page["data"]
        if len(found) == 1:
            return dict(found[0])
        if found:
            ids = ", ".join(f"{job['id']} ({job['status']})" for job in found[:5])
            raise ToolError("ambiguous_name", f"Several jobs are named {handle!r}: {ids}. Give the id of one.")
    raise ToolError("job_not_found", f"No job has the id or name {handle!r}.")


async def find_id(api: RestApi, handle: str) -> str:
    """Return the id of the job with this id or name. Raises ToolError."""
    # The call that follows reports an id that does not exist.
    return handle if handle.startswith("job_") else str((await find_job(api, handle))["id"])
