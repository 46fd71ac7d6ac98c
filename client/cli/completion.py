"""`trainyard completion SHELL`, and what its script calls at each Tab. Must be quick: no pydantic, no httpx2."""

import os
from collections.abc import Sequence
from types import SimpleNamespace

from click.shell_completion import ShellComplete, get_completion_class, shell_complete

from trainyard.client.cli.console import Console
from trainyard.client.cli.parser import COMPLETE_VARIABLE, trainyard


def completion(args: SimpleNamespace, console: Console) -> int:
    """Print the script that the shell reads once: ``source <(trainyard completion bash)``."""
    console.data(script(args.shell))
    return 0


def script(shell: str) -> str:
    """Return click's completion script for ``shell``."""
    complete = get_completion_class(shell)
    assert complete is not None
    return complete(trainyard, {}, "trainyard", COMPLETE_VARIABLE).source().rstrip("\n")


def answer_shell() -> int:
    """Respond to click's script, which puts the words into the environment."""
    return shell_complete(trainyard, {}, "trainyard", COMPLETE_VARIABLE, os.environ[COMPLETE_VARIABLE])


def answer(words: Sequence[str], console: Console) -> int:
    """Respond to ``trainyard __complete WORD ...``, the call in scripts that version 0.1 printed and a user saved."""
    *before, current = words or [""]
    console.lines(sorted(set(candidates(before, current))))
    return 0


def candidates(before: Sequence[str], current: str) -> list[str]:
    """Return what ``current`` may become after the words ``before``; [] if a file may follow."""
    completions = ShellComplete(trainyard, {}, "trainyard", COMPLETE_VARIABLE).get_completions(list(before), current)
    return [str(item.value) for item in completions if item.type == "plain"]
