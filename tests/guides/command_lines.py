"""The ``trainyard`` commands that a page speaks of, and whether the command line would take them."""

import re
import shlex
from pathlib import Path

import click

from tests.meta.public_surface import below
from trainyard.client.cli.parser import trainyard


def commands_in(page: Path) -> list[str]:
    """Each command line that begins with ``trainyard``: in blocks, and between backticks."""
    text = page.read_text()
    inside = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in inside for line in block.replace("\\\n", " ").splitlines()]
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    # A table escapes the bar that stands between choices.
    spoken = re.findall(r"`(trainyard [^`]+)`", outside.replace("\\|", "|"))
    return [line.strip() for line in lines if line.strip().startswith("trainyard ")] + spoken


def misunderstood(command: str) -> str:
    """Why the command line would refuse its options; "" where it would not. Missing operands are fine in a sentence."""
    words = _words(command)
    if not words or words[0] in ("-h", "--help", "--version"):
        return ""
    name, *rest = words
    known = _options(name, rest)
    if known is None:
        return f"there is no command {name}"
    wrong = [word for word in rest if word.startswith("-") and word != "-" and word.split("=")[0] not in known]
    return f"no option {' '.join(wrong)}" if wrong else ""


def _words(command: str) -> list[str]:
    """The words behind ``trainyard``, up to what the shell would do with them."""
    first = re.split(r"\s(?:\||>|&&|&|<|\|\||#)\s?", f"{command} ")[0]
    return shlex.split(first.replace("[", " ").replace("]", " "))[1:]


def _options(name: str, rest: list[str]) -> set[str] | None:
    found = trainyard.commands.get(name)
    if found is None:
        return None
    inner = next((below(found)[word] for word in rest if word in below(found)), found)
    return _names(inner) | _names(found)


def _names(command: click.Command) -> set[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    return {name for param in command.get_params(context) for name in param.opts}
