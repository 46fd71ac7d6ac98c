"""`trainyard completion SHELL`, and the answer to its script at each Tab. It must be quick: no pydantic, no httpx."""

import http.client
import json
import os
import re
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from urllib.parse import urlsplit

from click.shell_completion import ShellComplete, get_completion_class, shell_complete

from trainyard.client.cli.console import Console
from trainyard.client.cli.main import COMPLETE_VARIABLE
from trainyard.client.cli.parser import trainyard

SERVICE_SECONDS = 0.1
NEWEST = 50
SAFE_WORD = re.compile(r"[\w.:@+-]+")
"""Names that need no quotes in a shell."""


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
    """Answer click's script; it puts the words into the environment."""
    return shell_complete(trainyard, {}, "trainyard", COMPLETE_VARIABLE, os.environ[COMPLETE_VARIABLE])


def answer(words: Sequence[str], console: Console) -> int:
    """Answer ``trainyard __complete WORD ...``, the call in scripts that version 0.1 printed and a user saved."""
    *before, current = words or [""]
    console.lines(sorted(set(candidates(before, current))))
    return 0


def candidates(before: Sequence[str], current: str) -> list[str]:
    """Return what ``current`` may become after the words ``before``; [] if a file may follow."""
    found = ShellComplete(trainyard, {}, "trainyard", COMPLETE_VARIABLE).get_completions(list(before), current)
    return [str(item.value) for item in found if item.type == "plain"]


def jobs() -> Iterator[str]:
    """Return ids and names of the newest jobs, or nothing if the service does not answer at once."""
    parts = urlsplit(os.environ.get("TRAINYARD_URL") or "http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    token = os.environ.get("TRAINYARD_TOKEN")
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=SERVICE_SECONDS)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", f"{parts.path.rstrip('/')}/jobs?limit={NEWEST}", headers=headers)
        found = json.loads(connection.getresponse().read())["data"]
        connection.close()
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return
    for job in found:
        yield str(job["id"])
        if SAFE_WORD.fullmatch(str(job["name"])):
            yield str(job["name"])
