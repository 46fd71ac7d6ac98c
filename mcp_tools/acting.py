"""The tools that change something. The service checks scope, owner and quotas of each call."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from trainyard.contract.scopes import Scope
from trainyard.contract.task_files import TaskKind
from trainyard.mcp_tools.answers import brief_score, compact, full_job
from trainyard.mcp_tools.tool import (
    Answer,
    IdempotencyKey,
    JobHandle,
    JsonObject,
    McpTool,
    RestApi,
    ToolError,
    find_id,
    job_path,
)


class ActingTool(McpTool):
    """A tool that changes something."""

    needs: ClassVar[Scope] = Scope.SUBMIT
    acts: ClassVar[bool] = True


class LaunchJob(ActingTool):
    """Launch a run. Give it a limit (limits.max_minutes, or training.max_steps), a name and a group.

    It waits in the queue until devices are free. Call plan_job first, and wait_for_job afterwards.
    """

    tool_name: ClassVar[str] = "launch_job"

    spec: JsonObject = Field(description="Job spec, as for plan_job.")
    idempotency_key: IdempotencyKey

    async def run(self, api: RestApi) -> Answer:
        """Return the job, which may be one that an earlier call with this key has launched."""
        return full_job(await api.call("POST", "/jobs", body=self.spec, idempotency_key=self.idempotency_key))


class ForkJob(ActingTool):
    """Launch a run that starts from a checkpoint of another job, with some settings changed."""

    tool_name: ClassVar[str] = "fork_job"

    job: JobHandle
    idempotency_key: IdempotencyKey
    step: int | None = Field(None, ge=0, description="Step of the checkpoint; the newest one by default.")
    overrides: JsonObject = Field(
        {}, description='A part of a job spec that replaces the parent\'s, e.g. {"name": "b", "training": {...}}.'
    )
    data: Literal["keep", "restart"] = Field(
        "keep", description="keep: samples and schedule go on. restart: both start again."
    )

    async def run(self, api: RestApi) -> Answer:
        """Return the new job."""
        body = {"step": self.step, "overrides": self.overrides, "data": self.data}
        path = job_path(await find_id(api, self.job), "fork")
        return full_job(await api.call("POST", path, body=body, idempotency_key=self.idempotency_key))


class PauseJob(ActingTool):
    """Save a checkpoint and stop a run. resume_job continues it exactly. The same call again does no harm."""

    tool_name: ClassVar[str] = "pause_job"

    job: JobHandle

    async def run(self, api: RestApi) -> Answer:
        """Return the job."""
        return full_job(await api.call("POST", job_path(await find_id(api, self.job), "pause")))


class ResumeJob(ActingTool):
    """Continue a job that is paused, interrupted or at its end, from its newest checkpoint, or from that of `step`."""

    tool_name: ClassVar[str] = "resume_job"

    job: JobHandle
    step: int | None = Field(None, ge=0, description="Step of the checkpoint. Newer ones are set aside.")
    changes: JsonObject = Field(
        {},
        description="Fields that may change: epochs, max_steps, max_tokens, max_minutes, target_loss, resources, "
        "gradient_checkpointing, save_dir, and schedule (extend or continue) if the run gets longer.",
    )

    async def run(self, api: RestApi) -> Answer:
        """Return the job, with the learning rate before and after."""
        body = {**self.changes, **({} if self.step is None else {"step": self.step})}
        job = await api.call("POST", job_path(await find_id(api, self.job), "resume"), body=body)
        rates = {name: job.get(name) for name in ("learning_rate_before", "learning_rate_after")}
        return full_job(job) | compact(rates)


class CancelJob(ActingTool):
    """Save a checkpoint and end a run, or take a job out of the queue."""

    tool_name: ClassVar[str] = "cancel_job"
    ends_run: ClassVar[bool] = True

    job: JobHandle

    async def run(self, api: RestApi) -> Answer:
        """Return the job."""
        return full_job(await api.call("POST", job_path(await find_id(api, self.job), "cancel")))


class DescribeJob(ActingTool):
    """Write down what was tried and what came out of it, or change the name or group. The run is not touched."""

    tool_name: ClassVar[str] = "describe_job"

    job: JobHandle
    description: str | None = Field(None, max_length=10_000, description="Replaces the description.")
    group: str | None = Field(None, description='Puts the job into a group; "" takes it out.')
    new_name: str | None = Field(None, description="New name.")
    labels: dict[str, str] | None = Field(None, description="Replaces the labels.")

    async def run(self, api: RestApi) -> Answer:
        """Return the job."""
        given = self.model_dump(exclude={"job"}, exclude_none=True)
        changes = {{"new_name": "name"}.get(name, name): value for name, value in given.items()}
        if not changes:
            raise ToolError("invalid_arguments", "Give a description, group, new_name or labels; nothing was done.")
        if changes.get("group") == "":
            changes["group"] = None
        return full_job(await api.call("PATCH", job_path(await find_id(api, self.job)), body=changes))


class DiscardJob(ActingTool):
    """Mark a job as discarded, so that lists leave it out. Its record and files stay; `undo` shows it again."""

    tool_name: ClassVar[str] = "discard_job"

    job: JobHandle
    undo: bool = Field(False, description="Show the job again.")

    async def run(self, api: RestApi) -> Answer:
        """Return the job."""
        path = job_path(await find_id(api, self.job))
        return full_job(await api.call("PATCH", path, body={"discarded": not self.undo}))


class EvaluationTask(BaseModel):
    """A task to score a checkpoint on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    path: str = Field(description="Absolute path of a JSONL file on the host of the service.")
    kind: TaskKind


class EvaluateCheckpoint(ActingTool):
    """Score a checkpoint on tasks, beside the runs. list_scores has the scores when they are measured."""

    tool_name: ClassVar[str] = "evaluate_checkpoint"

    job: JobHandle
    step: int | None = Field(None, ge=0, description="Step of the checkpoint; the newest one by default.")
    tasks: list[EvaluationTask] | None = Field(None, description="The tasks; by default those of the job's spec.")

    async def run(self, api: RestApi) -> Answer:
        """Return the evaluation, which is pending or running."""
        step = "latest" if self.step is None else str(self.step)
        path = job_path(await find_id(api, self.job), "checkpoints", step, "evaluate")
        body = None if self.tasks is None else {"tasks": [task.model_dump(mode="json") for task in self.tasks]}
        found = await api.call("POST", path, body=body)
        shown = {name: found.get(name) for name in ("id", "job_id", "step", "state", "error")}
        return compact({**shown, "scores": [brief_score(score) for score in found["results"]]})


ACTING: tuple[type[McpTool], ...] = (
    LaunchJob,
    ForkJob,
    PauseJob,
    ResumeJob,
    CancelJob,
    DescribeJob,
    DiscardJob,
    EvaluateCheckpoint,
)
