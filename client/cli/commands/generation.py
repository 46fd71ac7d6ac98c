"""`trainyard generate` and `trainyard chat`: text from a checkpoint, printed while it is generated."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.find import find_job, split_step
from trainyard.client.cli.formatting import count
from trainyard.client.errors import ServiceUnreachable
from trainyard.client.exit_codes import Exit

NO_TEMPLATE = "the tokenizer has no chat template: the model continues the text of the conversation"


def generate(args: SimpleNamespace, console: Console) -> int:
    """Continue a text, and print the continuation while it is generated."""
    prompt = console.read_stdin() if args.prompt == "-" else args.prompt
    with connect(args) as trainyard:
        job_id, step = _checkpoint(trainyard, args, console)
        if args.json:
            console.json(trainyard.generate(job_id, prompt, step=step, **_options(args)))
            return Exit.SUCCEEDED
        end = _print(trainyard, console, job_id, step, prompt=prompt, **_options(args))
    console.error(_summary(end))
    return Exit.SUCCEEDED


def chat(args: SimpleNamespace, console: Console) -> int:
    """Read turns from stdin, and answer each one. The end of the input, or an empty line, ends the conversation."""
    messages = [{"role": "system", "content": args.system}] if args.system else []
    with connect(args) as trainyard:
        job_id, step = _checkpoint(trainyard, args, console)
        if console.interactive:
            console.error("an empty line ends the conversation")
        while turn := _read_turn(console):
            messages.append({"role": "user", "content": turn})
            end = _answer(trainyard, args, console, job_id, step, messages)
            if not end["chat_template"] and len(messages) <= 2:
                console.error(NO_TEMPLATE)
            messages.append({"role": "assistant", "content": end["text"]})
    return Exit.SUCCEEDED


def _answer(
    trainyard: Client,
    args: SimpleNamespace,
    console: Console,
    job_id: str,
    step: str,
    messages: Sequence[Mapping[str, str]],
) -> Mapping[str, Any]:
    if args.json:
        answer = trainyard.generate(job_id, messages=messages, step=step, **_options(args))
        console.json(answer)
        return answer
    return _print(trainyard, console, job_id, step, messages=messages, **_options(args))


def _print(trainyard: Client, console: Console, job_id: str, step: str, **request: Any) -> Mapping[str, Any]:
    """Print the text as it comes. Return the data of the end."""
    for event in trainyard.generate_stream(job_id, step=step, **request):
        if event.kind == "text":
            console.raw(event.data["text"])
        elif event.kind == "end":
            console.raw("\n")
            end: Mapping[str, Any] = event.data
            return end
    raise ServiceUnreachable(trainyard.url, "the connection ended before the text did")


def _read_turn(console: Console) -> str:
    if console.interactive:
        print("> ", end="", file=console.err, flush=True)
    return console.read_line().strip()


def _checkpoint(trainyard: Client, args: SimpleNamespace, console: Console) -> tuple[str, str]:
    name, step = split_step(args.job)
    return find_job(trainyard, name, console)["id"], step or "latest"


def _options(args: SimpleNamespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {**given, **({"stop": list(args.stop)} if args.stop else {})}


def _summary(end: Mapping[str, Any]) -> str:
    why = "it ended by itself" if end["finish_reason"] == "stop" else "--max-new-tokens is reached"
    return f"{count(end['tokens'])} tokens by step {count(end['step'])} on {end['device']}: {why}"
