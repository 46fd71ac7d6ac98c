"""The route that generates text with a checkpoint."""

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import Field

from trainyard.contract.generation import ChatMessage, NewTokens, Seed, Temperature, Text, TopK, TopP
from trainyard.contract.parsing import Problem
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.generating import Options, StopTexts, load, respond, stream
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.auth.permissions import SUBMIT
from trainyard.service.bodies import StrictBody
from trainyard.service.errors import RequestInvalid, ServiceError, problem_body, with_problems
from trainyard.service.generation.checkpoints import find_checkpoint, parse_step
from trainyard.service.generation.pool import Generation, LoadedCheckpoint
from trainyard.service.jobs import repository
from trainyard.service.schemas import GeneratedText
from trainyard.service.streams.sse import event

StepOrLatest = Annotated[str, InPath(max_length=20)]
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The text; with `stream`, events: `start`, `text` for each part, then `end` or `error`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

router = APIRouter(tags=["generation"], route_class=ServiceRoute)


class GenerateBody(StrictBody):
    """A prompt or a conversation, and how to continue it."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)] | None = None
    max_new_tokens: NewTokens = 128
    temperature: Temperature = 0.85
    top_p: TopP = 0.95
    top_k: TopK = 0
    seed: Seed | None = None
    stop: StopTexts = Field([])
    stream: bool = False

    def options(self) -> Options:
        """Return the request as a task."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "messages")
        prompts = [self.prompt] if self.prompt is not None else []
        return {"prompts": prompts, **{name: getattr(self, name) for name in names}}


@router.post(
    "/jobs/{job_id}/checkpoints/{step}/generate",
    dependencies=[SUBMIT],
    response_model=GeneratedText,
    responses=RESPONSES,
)
async def generate_text(
    request: Request, state: StateDep, job_id: str, step: StepOrLatest, body: GenerateBody
) -> Response:
    """Continue a prompt, or a conversation, with the checkpoint of a step or the `latest` one.

    A side process loads the checkpoint and keeps it loaded for a while. It computes the text on the CPU, or on a GPU
    that no job needs. If too many requests wait, the response is 429 or 503 with `Retry-After`.
    """
    problems = []
    if (body.prompt is None) == (body.messages is None):
        problems.append(Problem("/prompt", "give either prompt or messages"))
    number = None
    try:
        number = parse_step(step)
    except ValueError:
        problems.append(Problem("/path/step", "must be a step, or latest"))
    if problems:
        raise with_problems(RequestInvalid, problems)
    found_step, checkpoint = await asyncio.to_thread(_find, state, job_id, number)
    about = {"job_id": job_id, "step": found_step}
    if body.stream:
        return await stream(state, checkpoint, body.options(), partial(_frames, about=about))
    return await respond(request, state, checkpoint, body.options(), partial(_collect, about=about))


def _find(state: AppState, job_id: str, step: int | None) -> tuple[int, LoadedCheckpoint]:
    with state.database.read() as session:
        job = repository.find(session, job_id)
        found_step, path = find_checkpoint(session, state.settings, job, step)
    return found_step, load(state, job, path)


async def _collect(generation: Generation, about: dict[str, Any]) -> Response:
    parts: list[str] = []
    async for line in generation.events():
        parts.append(line.get("text", ""))
        if line["event"] == "finished":
            return json_response(_result(generation, about, "".join(parts), line))
    raise AssertionError("a task ends with a line of its end")


async def _frames(generation: Generation, about: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    start = {"prompt_tokens": generation.prompt_tokens, "chat_template": generation.chat_template}
    yield event("start", {**about, **start, "device": generation.device})
    parts: list[str] = []
    try:
        async for line in generation.events():
            match line["event"]:
                case "text":
                    parts.append(line["text"])
                    yield event("text", {"text": line["text"]})
                case "finished":
                    yield event("end", _result(generation, about, "".join(parts), line).model_dump())
                case _:
                    yield b""
    except ServiceError as error:
        yield event("error", problem_body(error, None))


def _result(generation: Generation, about: dict[str, Any], text: str, finished: dict[str, Any]) -> GeneratedText:
    return GeneratedText(
        **about,
        text=text,
        tokens=finished["tokens"],
        prompt_tokens=generation.prompt_tokens,
        finish_reason=finished["reason"],
        chat_template=generation.chat_template,
        device=generation.device,
    )
