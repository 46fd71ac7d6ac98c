"""`trainyard submit`: a spec file, MiniMind's flags, or both."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.api import Trainyard
from client.arguments import OWN_SUBMIT_FLAGS, submit_parser
from client.console import Console
from client.errors import InvalidSpec
from client.exits import Exit, UsageError
from client.flags import (
    add_leaf_flags,
    differences,
    leaf_flags,
    parse_labels,
    require_known,
    spec_of,
)
from client.shapes import Job
from contract.parsing import ALIASES, GROUP_OF_LEAF, parse_spec


def submit(arguments: Sequence[str], console: Console) -> int:
    """Launch a run."""
    args = _parsed(arguments)
    given = {name: value for name, value in vars(args).items() if name in GROUP_OF_LEAF or name in ALIASES}
    spec = _spec(args, given, console)
    if console.interactive and args.spec != "-" and not args.yes and not _agreed(spec, given, console):
        return Exit.REFUSED
    with Trainyard(args.url, args.token) as trainyard:
        try:
            job = trainyard.submit(spec)
        except InvalidSpec as error:
            console.say(f"trainyard: {error.detail}")
            _list_problems([(problem.pointer, problem.message) for problem in error.errors], given, console)
            return Exit.REFUSED
        return _launched(job, args, console)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = submit_parser()
    add_leaf_flags(parser)
    args = parser.parse_args(require_known(arguments, OWN_SUBMIT_FLAGS | leaf_flags()))
    if args.timeout is not None and not args.watch:
        raise UsageError("--timeout says how long to follow: give --watch as well")
    return args


def _spec(args: argparse.Namespace, given: Mapping[str, Any], console: Console) -> dict[str, Any]:
    base = _read(args.spec, console) if args.spec else {}
    if not base and not given and not args.set:
        raise UsageError("give a SPEC.json, or at least --data_path FILE; `trainyard submit --help` lists all flags")
    spec = spec_of(base, given, args.set, Path.cwd())
    if "name" in args:
        spec["name"] = args.name
    if args.labels:
        before = spec.get("labels")
        spec["labels"] = {**(before if isinstance(before, dict) else {}), **parse_labels(args.labels)}
    return spec


def _read(source: str, console: Console) -> dict[str, Any]:
    try:
        text = console.into.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        spec = json.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise UsageError(f"{source} must hold a JSON object")
    return spec


def _agreed(spec: Mapping[str, Any], given: Mapping[str, Any], console: Console) -> bool:
    """Show what would be submitted and ask. A spec that is wrong is not worth a question."""
    parsed = parse_spec(spec)
    if parsed.problems:
        console.say("trainyard: the spec is wrong; nothing was sent")
        _list_problems([(problem.pointer, problem.message) for problem in parsed.problems], given, console)
        return False
    console.say("this will be submitted; all else is as by default:")
    for place, value in differences(parsed.spec, spec):
        console.say(f"  {place:<32}{value}")
    return console.agrees("Submit?")


def _list_problems(problems: Sequence[tuple[str, str]], given: Mapping[str, Any], console: Console) -> None:
    for pointer, message in problems:
        console.say(f"  {_place(pointer, given)}: {message}")


def _place(pointer: str, given: Mapping[str, Any]) -> str:
    """The flag that set the field, where one did, beside the pointer."""
    leaf = pointer.split("/")[2] if pointer.count("/") >= 2 else pointer[1:]
    names = [leaf, *(alias for alias, (_, ours) in ALIASES.items() if ours == leaf)]
    flag = next((name for name in names if name in given), None)
    return f"--{flag} ({pointer})" if flag else pointer or "the spec"


def _launched(job: Job, args: argparse.Namespace, console: Console) -> int:
    if args.watch:
        # Imported here: a submit that does not watch draws nothing.
        from client.watch import follow_job

        return follow_job(job["id"], args, console, handle=job["id"])
    if args.json:
        console.json(job)
        return Exit.SUCCEEDED
    console.data(job["id"])
    console.say(f"{job['status']}: {job.get('summary') or job.get('message') or job['name']}")
    console.say(f"next:  trainyard watch {shlex.quote(job['id'])}")
    return Exit.SUCCEEDED
