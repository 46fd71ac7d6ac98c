"""Checkpoints as models of OpenAI's API: `GET /v1/models` and `POST /v1/completions`. Errors have its format too."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from pydantic import Field

from trainyard.contract.generation import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PROMPTS,
    NewTokens,
    Temperature,
    TopK,
    TopP,
    is_text,
)
from trainyard.contract.parsing import Problem
from trainyard.service.api.dependencies import AppState, StateDep
from trainyard.service.api.generating import Options, StopTexts, load, respond, stream
from trainyard.service.api.responses import ServiceRoute, json_response
from trainyard.service.auth.permissions import READ, SUBMIT
from trainyard.service.bodies import StrictBody
from trainyard.service.errors import ModelNotFound, RequestInvalid, ServiceError, openai_body, with_problems
from trainyard.service.generation.checkpoints import find_model, list_models
from trainyard.service.generation.pool import Generation, LoadedCheckpoint
from trainyard.service.ids import new_id
from trainyard.service.schemas import (
    OpenAIChoice,
    OpenAICompletion,
    OpenAILogprobs,
    OpenAIModel,
    OpenAIModels,
    OpenAIUsage,
)

SEEDS = 1 << 63
HELLO = b": trainyard\n\n"
"""A comment. OpenAI's client takes every other field for an event with data."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion; with `stream`, an event with a part of it for each token, then `[DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}

router = APIRouter(prefix="/v1", tags=["generation"], route_class=ServiceRoute)


class StreamOptions(StrictBody):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CompletionBody(StrictBody):
    """A request in OpenAI's format. `top_k` is an addition."""

    model: str
    prompt: Any = ""
    max_tokens: NewTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    stop: StopTexts | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    user: str | None = None
    best_of: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None

    def options(self) -> Options:
        """Return the request as a task, with OpenAI's defaults. Raises RequestInvalid."""
        problems = list(self._problems())
        if problems:
            raise with_problems(RequestInvalid, problems)
        return {
            "prompts": _prompts(self.prompt),
            "max_new_tokens": 16 if self.max_tokens is None else self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": self.top_k or 0,
            "seed": None if self.seed is None else self.seed % SEEDS,
            "stop": self.stop or [],
            "n": self.n or 1,
            "logprobs": self.logprobs,
            "echo": bool(self.echo),
        }

    def _problems(self) -> Iterator[Problem]:
        for name in ("frequency_penalty", "presence_penalty", "logit_bias", "suffix"):
            if getattr(self, name):
                yield Problem(f"/{name}", "is not supported")
        if self.best_of not in (None, self.n or 1):
            yield Problem("/best_of", "is not supported: it must be n, or left out")
        prompts = _prompts(self.prompt)
        if not 1 <= len(prompts) <= MAX_PROMPTS or not all(map(_is_prompt, prompts)):
            yield Problem("/prompt", f"must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either")


def _prompts(given: Any) -> list[Any]:
    is_list = isinstance(given, list)
    # Token ids are a list too, but of numbers.
    return given if is_list and given and not all(map(_is_id, given)) else [given]


def _is_prompt(value: Any) -> bool:
    return (isinstance(value, str) and is_text(value)) or (
        isinstance(value, list) and bool(value) and all(map(_is_id, value))
    )


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


@router.get("/models", dependencies=[READ])
def list_openai_models(state: StateDep) -> OpenAIModels:
    """List the newest checkpoints of all jobs, in OpenAI's format."""
    with state.database.read() as session:
        return OpenAIModels(data=list(list_models(session)))


@router.get("/models/{model:path}", dependencies=[READ])
def get_openai_model(state: StateDep, model: Annotated[str, InPath(max_length=300)]) -> OpenAIModel:
    """Return one model, `<job id or name>@<step or latest>`, in OpenAI's format."""
    with state.database.read() as session:
        job, step, _ = find_model(session, state.settings, model)
        found = next((one for one in list_models(session, job.id) if one.step == step), None)
    if found is None:
        raise ModelNotFound()
    return found.model_copy(update={"id": model})


@router.post("/completions", dependencies=[SUBMIT], response_model=OpenAICompletion, responses=RESPONSES)
async def create_completion(request: Request, state: StateDep, body: CompletionBody) -> Response:
    """Continue prompts with a checkpoint, in OpenAI's format. The model is `<job id or name>@<step or latest>`.

    Unlike in OpenAI's API, the BOS token of the training documents is put before a text prompt.
    """
    options = body.options()
    checkpoint = await asyncio.to_thread(_find, state, body.model)
    completion = {"id": new_id("cmpl", 24), "created": int(time.time()), "model": body.model}
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        frames = partial(_frames, completion=completion, include_usage=usage)
        return await stream(state, checkpoint, options, frames, HELLO)
    return await respond(request, state, checkpoint, options, partial(_collect, completion=completion))


def _find(state: AppState, model: str) -> LoadedCheckpoint:
    with state.database.read() as session:
        job, _, path = find_model(session, state.settings, model)
    return load(state, job, path)


async def _collect(generation: Generation, completion: dict[str, Any]) -> Response:
    texts: dict[int, list[str]] = {}
    logprobs: dict[int, list[dict[str, Any]]] = {}
    ends: dict[int, dict[str, Any]] = {}
    async for line in generation.events():
        match line["event"]:
            case "text":
                texts.setdefault(line["choice"], []).append(line["text"])
                logprobs.setdefault(line["choice"], []).extend(line.get("logprobs", ()))
            case "finished":
                ends[line["choice"]] = line
    choices = [
        OpenAIChoice(
            text="".join(texts.get(index, ())),
            index=index,
            logprobs=_logprobs(logprobs.get(index, [])) if generation.task.logprobs is not None else None,
            finish_reason=ends[index]["reason"],
        )
        for index in sorted(ends)
    ]
    usage = _usage(generation, sum(end["tokens"] for end in ends.values()))
    return json_response(OpenAICompletion(**completion, choices=choices, usage=usage))


async def _frames(
    generation: Generation, completion: dict[str, Any], include_usage: bool
) -> AsyncGenerator[bytes, None]:
    tokens = 0
    try:
        async for line in generation.events():
            match line["event"]:
                case "text":
                    entries = _logprobs(line["logprobs"]) if "logprobs" in line else None
                    yield _chunk(completion, line["choice"], text=line["text"], logprobs=entries, finish_reason=None)
                case "finished":
                    tokens += line["tokens"]
                    yield _chunk(completion, line["choice"], text="", logprobs=None, finish_reason=line["reason"])
                case _:
                    yield b""
        if include_usage:
            yield _data(OpenAICompletion(**completion, choices=[], usage=_usage(generation, tokens)).model_dump())
        yield b"data: [DONE]\n\n"
    except ServiceError as error:
        yield _data(openai_body(error, None))


def _chunk(completion: dict[str, Any], index: int, **choice: Any) -> bytes:
    part = OpenAICompletion(**completion, choices=[OpenAIChoice(index=index, **choice)])
    return _data(part.model_dump(exclude={"usage"}))


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, allow_nan=False)}\n\n".encode()


def _logprobs(entries: list[dict[str, Any]]) -> OpenAILogprobs:
    return OpenAILogprobs(
        tokens=[entry["token"] for entry in entries],
        token_logprobs=[entry["logprob"] for entry in entries],
        top_logprobs=[entry["top"] for entry in entries],
        text_offset=[entry["offset"] for entry in entries],
    )


def _usage(generation: Generation, tokens: int) -> OpenAIUsage:
    prompt = generation.prompt_tokens
    return OpenAIUsage(prompt_tokens=prompt, completion_tokens=tokens, total_tokens=prompt + tokens)
