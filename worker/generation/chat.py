"""Conversations as prompts: by the chat template of the tokenizer, as transformers does it, or as plain text."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainyard.contract.allowed_paths import open_regular_inside
from trainyard.contract.generation import ChatMessage
from trainyard.contract.tokenizer_info import BYTE, read_bounded, tokenizer_file

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1 << 20


class TemplateFailed(ValueError):
    """The chat template rejects the conversation, or is invalid."""


def read_template(tokenizer_path: str, roots: Sequence[Path] = ()) -> str | None:
    """Return the chat template of a tokenizer, or None if it has none. ``roots``: one must contain it, if any."""
    if tokenizer_path == BYTE:
        return None
    file = tokenizer_file(tokenizer_path)
    with suppress(FileNotFoundError), open_regular_inside(file.with_name(TEMPLATE_FILE), roots) as opened:
        return (opened.read(MAX_TEMPLATE_BYTES) or b"").decode()
    with suppress(FileNotFoundError):
        _, config = read_bounded(file.with_name(CONFIG_FILE), roots)
        template = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(template, list):  # several, by their names
            template = next((one["template"] for one in template if one.get("name") == "default"), None)
        return template if isinstance(template, str) else None
    return None


def render(template: str | None, messages: Sequence[ChatMessage], bos: str, eos: str) -> str:
    """Return the prompt for the next turn. Without a template it is the conversation so far, one turn per line.

    Raises TemplateFailed.
    """
    turns = [message.model_dump() for message in messages]
    if template is None:
        return "\n".join(turn["content"] for turn in turns)
    # torch requires jinja2, so every worker has it.
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # A template is a program: it must not reach Python's objects. The options are those of transformers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template).render(
            messages=turns, add_generation_prompt=True, bos_token=bos, eos_token=eos, tools=None
        )
    except (jinja2.TemplateError, TemplateFailed, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise TemplateFailed(f"{type(error).__name__}: {str(error)[:200]}") from error


def _raise(message: Any) -> None:
    raise TemplateFailed(str(message))
