"""The tools that only read."""

import asyncio
import time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainyard.contract.scopes import Scope
from trainyard.contract.status import JobStatus
from trainyard.mcp_tools.answers import (
    as_table,
    brief_checkpoint,
    brief_job,
    brief_plan,
    brief_score,
    comparison_notes,
    differences,
    full_job,
    is_idle,
)
from trainyard.mcp_tools.tool import (
    Answer,
    Cursor,
    JobHandle,
    JsonObject,
    McpTool,
    RestApi,
    ToolError,
    find_id,
    find_job,
    job_path,
)

POLL_SECONDS = 1.0
MAX_WAIT_SECONDS = 50
"""Below the 60 s after which many clients give up a call."""

BUCKET_COLUMNS = ("count", "loss", "loss_mean", "loss_min", "loss_max", "loss_ema", "nonfinite_count")
"""Columns that each row of a curve has. Others are requested by name."""

MAX_LOG_BYTES = 12_000
PAGE_CHARACTERS = 12_000
MAX_COMPARED = 10


class ListJobs(McpTool):
    """List jobs, newest first, or by score. A score is the best held-out bits per byte or loss: less is better."""

    tool_name: ClassVar[str] = "list_jobs"

    status: list[str] = Field([], description=f"Only jobs with one of these statuses: {', '.join(JobStatus)}.")
    group: str | None = Field(None, description="Only jobs of this group.")
    owner: str | None = Field(None, description="Only jobs that the token of this name submitted.")
    search: str | None = Field(None, description="A part of the name, or the beginning of the id.")
    parent: str | None = Field(None, description="Only forks of the job with this id.")
    order: Literal["newest", "oldest", "score", "-score"] = Field("newest", description="score: the best first.")
    discarded: bool = Field(False, description="Only discarded jobs, which are left out otherwise.")
    limit: int = Field(20, ge=1, le=100, description="Number of jobs at most.")
    cursor: Cursor = None

    async def run(self, api: RestApi) -> Answer:
        """Return the jobs and the cursor of the next page."""
        given = self.model_dump(exclude={"cursor", "discarded"})
        params = {**given, "after": self.cursor, "discarded": "true" if self.discarded else None, "fields": "summary"}
        page = await api.call("GET", "/jobs", params=params)
        return with_cursor({"jobs": [brief_job(job) for job in page["data"]]}, page)


class ShowJob(McpTool):
    """Show a job: status, progress, score, what went wrong and what to do, newest checkpoint, and allowed actions."""

    tool_name: ClassVar[str] = "show_job"

    job: JobHandle
    spec: bool = Field(False, description="Also return the complete job spec.")

    async def run(self, api: RestApi) -> Answer:
        """Return the job."""
        job = await find_job(api, self.job)
        return full_job(job) | ({"spec": job["spec"]} if self.spec else {})


class ReadCurve(McpTool):
    """Read the curve of a job as a small table. Each row covers `resolution` steps; `step` is its last one.

    To follow a run, call it again with `after_step` set to the last step of the answer.
    """

    tool_name: ClassVar[str] = "read_curve"

    job: JobHandle
    points: int = Field(20, ge=1, le=200, description="Number of rows at most.")
    columns: list[str] = Field(
        ["loss_mean", "eval_loss"],
        description=f"Any of {', '.join(BUCKET_COLUMNS)}, or a metric such as learning_rate, grad_norm, tokens, "
        "tokens_per_second, bpb, eval_loss, eval_bpb, step_seconds, memory_bytes.",
    )
    after_step: int = Field(0, ge=0, description="Only rows after this step.")
    until_step: int | None = Field(None, ge=0, description="Only rows up to this step.")

    async def run(self, api: RestApi) -> Answer:
        """Return ``columns``, ``rows`` and ``resolution``."""
        # Without names the API returns the columns of the buckets only.
        fields = ",".join(name for name in self.columns if name not in BUCKET_COLUMNS) or None
        steps = {"after_step": self.after_step, "until_step": self.until_step}
        params = {"max_points": self.points, "fields": fields, **steps}
        page = await api.call("GET", job_path(await find_id(api, self.job), "metrics"), params=params)
        return {**as_table(page["data"], ["step", *self.columns]), "resolution": page["resolution"]}


class ReadLog(McpTool):
    """Read the log of a run: its last lines, or what came after `cursor`."""

    tool_name: ClassVar[str] = "read_log"

    job: JobHandle
    lines: int = Field(40, ge=1, le=500, description="Number of lines from the end, without a cursor.")
    rank: str = Field("0", description="Number of the rank, or agent for the process that started the ranks.")
    attempt: int | None = Field(None, ge=1, description="Number of the attempt; the newest one by default.")
    cursor: Annotated[int | None, Field(ge=0, description="`cursor` of the previous answer: only what came after.")] = (
        None
    )

    async def run(self, api: RestApi) -> Answer:
        """Return ``text`` and the ``cursor`` of what comes after it."""
        place: dict[str, Any] = {"tail": self.lines} if self.cursor is None else {"offset": self.cursor}
        params = {**place, "rank": self.rank, "attempt": self.attempt, "limit": MAX_LOG_BYTES}
        chunk = await api.call("GET", job_path(await find_id(api, self.job), "logs"), params=params)
        return {"text": chunk["data"], "cursor": chunk["next_offset"]}


class ListCheckpoints(McpTool):
    """List the checkpoints of a job, newest first: steps from which it can be resumed, forked or evaluated."""

    tool_name: ClassVar[str] = "list_checkpoints"

    job: JobHandle
    limit: int = Field(10, ge=1, le=100, description="Number of checkpoints at most.")
    cursor: Cursor = None

    async def run(self, api: RestApi) -> Answer:
        """Return the checkpoints and the cursor of the next page."""
        path = job_path(await find_id(api, self.job), "checkpoints")
        page = await api.call("GET", path, params={"limit": self.limit, "after": self.cursor})
        return with_cursor({"checkpoints": [brief_checkpoint(each) for each in page["data"]]}, page)


class ListScores(McpTool):
    """List the scores of a job on tasks, by step and task: those of the training and those of evaluations."""

    tool_name: ClassVar[str] = "list_scores"

    job: JobHandle
    step: int | None = Field(None, ge=0, description="Only scores of this step.")
    task: str | None = Field(None, description="Only scores on this task.")
    limit: int = Field(20, ge=1, le=200, description="Number of scores at most.")
    cursor: Cursor = None

    async def run(self, api: RestApi) -> Answer:
        """Return the scores and the cursor of the next page."""
        params = {"step": self.step, "task": self.task, "limit": self.limit, "after": self.cursor}
        page = await api.call("GET", job_path(await find_id(api, self.job), "evaluations"), params=params)
        return with_cursor({"scores": [brief_score(each) for each in page["data"]]}, page)


class CompareJobs(McpTool):
    """Compare jobs: best score first, the settings in which they differ, and what makes the scores hard to compare."""

    tool_name: ClassVar[str] = "compare_jobs"

    jobs: list[JobHandle] = Field([], max_length=MAX_COMPARED, description="Ids or names. Give these, or a group.")
    group: str | None = Field(None, description=f"Compare the {MAX_COMPARED} best jobs of this group.")

    async def run(self, api: RestApi) -> Answer:
        """Return the jobs by score, and their differences."""
        if bool(self.jobs) == (self.group is not None):
            raise ToolError("invalid_arguments", "Give either jobs or group; nothing was done.")
        if self.group is not None:
            params = {"group": self.group, "order": "score", "limit": MAX_COMPARED}
            found = (await api.call("GET", "/jobs", params=params))["data"]
        else:
            found = [await find_job(api, handle) for handle in dict.fromkeys(self.jobs)]
        if len(found) < 2:
            raise ToolError("too_few_jobs", f"There is nothing to compare: {len(found)} job found. Call list_jobs.")
        # A job without a score is last.
        ranked = sorted(found, key=lambda job: (job["score"] is None, (job["score"] or {}).get("value") or 0.0))
        return {
            "jobs": [brief_job(job) for job in ranked],
            "differing_settings": differences({job["id"]: job["spec"] for job in ranked}),
            "notes": comparison_notes(ranked),
        }


class PlanJob(McpTool):
    """Preview a run: size, memory, time, warnings and queue. Nothing is stored. Call it before launch_job.

    All mistakes of the spec are listed at once. `settings_that_fit` are changes with which a run fits the memory.
    """

    tool_name: ClassVar[str] = "plan_job"
    needs: ClassVar[Scope] = Scope.SUBMIT

    spec: JsonObject = Field(
        description="Job spec. Only data.data_path is required, an absolute path on the host of the service, e.g. "
        '{"data": {"data_path": "/data/corpus.jsonl"}, "limits": {"max_minutes": 30}}. All fields: read_documentation '
        "with page reference/spec."
    )

    async def run(self, api: RestApi) -> Answer:
        """Return the main numbers of the plan."""
        plan = await api.call("POST", "/jobs/plan", body=self.spec)
        return {**brief_plan(plan), "warnings": plan["warnings"], "advice": plan.get("advice", [])}


class WaitForJob(McpTool):
    """Wait until a job comes to an end, pauses or fails, or until it reaches `until_step`; then return it.

    The wait is short. If `reached` is false, the run continues: call it again.
    """

    tool_name: ClassVar[str] = "wait_for_job"

    job: JobHandle
    until_step: int | None = Field(None, ge=1, description="Also return when the run has reached this step.")
    timeout_seconds: float = Field(30, ge=0, le=MAX_WAIT_SECONDS, description="Wait at most this long.")

    async def run(self, api: RestApi) -> Answer:
        """Return the job and whether what was waited for has happened."""
        deadline = time.monotonic() + self.timeout_seconds
        job_id = await find_id(api, self.job)
        while True:
            job = await api.call("GET", job_path(job_id))
            step = (job.get("progress") or {}).get("step") or 0
            reached = is_idle(job) or (self.until_step is not None and step >= self.until_step)
            left = deadline - time.monotonic()
            if reached or left <= 0:
                return {"reached": reached, **full_job(job)}
            await asyncio.sleep(min(POLL_SECONDS, left))


class ReadDocumentation(McpTool):
    """Read a page of the documentation as Markdown. Without a page, list the pages."""

    tool_name: ClassVar[str] = "read_documentation"

    page: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9/_-]{1,100}$",
        description="For example guides/quickstart, guides/agents, or reference/spec: all fields of a job spec.",
    )
    cursor: Annotated[int, Field(ge=0, description="`cursor` of the previous answer, for the rest of a long page.")] = 0

    async def run(self, api: RestApi) -> Answer:
        """Return a part of the page, and the cursor of the next part."""
        text = await api.text("/llms.txt" if self.page is None else f"/docs/{self.page}.md")
        end = self.cursor + PAGE_CHARACTERS
        return {"text": text[self.cursor : end]} | ({"cursor": end} if end < len(text) else {})


def with_cursor(answer: Answer, page: dict[str, Any]) -> Answer:
    """Return the answer, with the cursor of the next page if there is one."""
    return answer | ({"cursor": page["data"][-1]["id"]} if page["has_more"] and page["data"] else {})


READING: tuple[type[McpTool], ...] = (
    ListJobs,
    ShowJob,
    ReadCurve,
    ReadLog,
    CompareJobs,
    ListCheckpoints,
    ListScores,
    WaitForJob,
    ReadDocumentation,
    PlanJob,
)
