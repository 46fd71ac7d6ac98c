"""`trainyard completion SHELL`, and what its script asks at each Tab. Standard library only: Tab must not wait."""

import argparse
import http.client
import json
import os
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from client.arguments import OWN_SUBMIT_FLAGS, PLAN, SUBMIT, build_parser
from client.console import Console

SERVICE_SECONDS = 0.1
NEWEST = 50
TYPABLE = re.compile(r"[\w.:@+-]+")
"""Names that a shell takes as they stand."""

SCRIPTS = {
    "bash": """_trainyard() {
    local IFS=$'\\n'
    COMPREPLY=($(trainyard __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _trainyard trainyard
""",
    "zsh": """#compdef trainyard
_trainyard() {
    local -a found
    found=("${(@f)$(trainyard __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then compadd -- "${found[@]}"; else _files; fi
}
compdef _trainyard trainyard
""",
    "fish": """complete -c trainyard -a '(trainyard __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}


def completion(args: argparse.Namespace, console: Console) -> int:
    """Print what the shell is to read once: ``source <(trainyard completion bash)``."""
    console.data(SCRIPTS[args.shell].rstrip("\n"))
    return 0


def answer(words: Sequence[str], console: Console) -> int:
    """``trainyard __complete WORD ...``: what the last word may become, one a line; nothing where files may."""
    *before, current = words or [""]
    console.lines(sorted({each for each in candidates(before, current) if each.startswith(current)}))
    return 0


def candidates(before: Sequence[str], current: str) -> Iterator[str]:
    """What may stand behind ``before``."""
    if before[:1] in ([SUBMIT], [PLAN]):
        # The flags of the spec take pydantic to know; files are what is mostly wanted here.
        yield from OWN_SUBMIT_FLAGS if current.startswith("-") else ()
        return
    parser, given = _reached(before)
    previous = _option(parser, before[-1]) if before else None
    if previous is not None and previous.nargs != 0:
        yield from map(str, previous.choices or ())
    elif current.startswith("-"):
        yield from parser._option_string_actions  # noqa: SLF001 - argparse has no other list of them
    else:
        yield from _positionals(parser, given)


def _reached(before: Sequence[str]) -> tuple[argparse.ArgumentParser, int]:
    """The subcommand's parser, and how many of its positionals were given."""
    parser, given, skip = build_parser(), 0, False
    for word in before:
        option, inner = _option(parser, word), _subcommands(parser)
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = option is not None and option.nargs != 0
        elif inner is not None and word in inner:
            parser, given = inner[word], 0
        else:
            given += 1
    return parser, given


def _option(parser: argparse.ArgumentParser, word: str) -> argparse.Action | None:
    return parser._option_string_actions.get(word)  # noqa: SLF001


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser] | None:
    found = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]  # noqa: SLF001
    return dict(found[0].choices) if found else None


def _positionals(parser: argparse.ArgumentParser, given: int) -> Iterator[str]:
    inner = _subcommands(parser)
    if inner is not None:
        yield from inner
        return
    wanted = [each for each in parser._actions if not each.option_strings]  # noqa: SLF001
    if given < len(wanted):
        yield from map(str, wanted[given].choices or ())
        if wanted[given].dest == "job":
            yield from jobs()


def jobs() -> Iterator[str]:
    """Ids and names of the newest jobs, as far as a service answers at once; a Tab is no place for an error."""
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
        if TYPABLE.fullmatch(str(job["name"])):
            yield str(job["name"])
