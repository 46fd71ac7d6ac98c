"""The spec in a command line of `submit` or `plan`: from a spec file, MiniMind's flags, or both."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from trainyard.client.cli.console import Console
from trainyard.client.cli.minimind import PastedLine, take_defaults
from trainyard.client.cli.spec_flags import PATHS, given_leaves, parse_labels, spec_of
from trainyard.client.errors import InvalidSpec
from trainyard.client.exit_codes import UsageError
from trainyard.contract.corpus_files import has_known_form
from trainyard.contract.parsing import ALIASES

FOLDERS = ("save_dir", "tokenizer_path")
"""Leaves that name a folder, also if it does not exist yet."""


@dataclass(frozen=True)
class Submission:
    """``spec``: the spec to send. ``given``: the leaves that were given by flags."""

    args: SimpleNamespace
    given: Mapping[str, Any]
    spec: dict[str, Any]

    @classmethod
    def read(cls, command: str, args: SimpleNamespace, console: Console) -> Self:
        """Return the submission that the arguments of ``command`` describe. Raises UsageError."""
        given = given_leaves(vars(args))
        return cls(args, given, _spec(command, args, given, console))

    def print_rejection(self, error: InvalidSpec, console: Console) -> None:
        """Print all problems that the service found, each with the flag that caused it."""
        console.error(f"trainyard: {error.detail}")
        self.print_problems([(problem.pointer, problem.message) for problem in error.errors], console)
        command = self._allowing_command(error)
        if command is not None:
            console.error(f"  to allow it, start the service as:  {command}")

    def _allowing_command(self, error: InvalidSpec) -> str | None:
        """Return the command that starts the service with the folders that the spec needs, or None.

        The service names its folders only to the local user, who may start it with others.
        """
        roots = error.problem.get("roots")
        if not isinstance(roots, dict):
            return None
        needed: dict[str, list[str]] = {setting: list(folders) for setting, folders in roots["settings"].items()}
        for problem in error.errors:
            setting = next((setting for setting in needed if setting in problem.message), None)
            group, _, leaf = problem.pointer[1:].partition("/")
            value = (self.spec.get(group) or {}).get(leaf)
            if setting is not None and isinstance(value, str):
                folder = Path(value).resolve()
                needed[setting].append(str(folder if leaf in FOLDERS or folder.is_dir() else folder.parent))
        assignments = [
            f"{setting}={shlex.quote(':'.join(dict.fromkeys(folders)))}"
            for setting, folders in needed.items()
            if folders and folders != roots["settings"][setting]
        ]
        return " ".join([*assignments, shlex.join(roots["command"])])

    def print_problems(self, problems: Sequence[tuple[str, str]], console: Console) -> None:
        """Print one line for each (pointer, message)."""
        for pointer, message in problems:
            console.error(f"  {_place(pointer, self.given)}: {message}{self._where(pointer)}")

    def _where(self, pointer: str) -> str:
        # A wrong path is printed in full, because the user may have typed a relative one.
        group, _, leaf = pointer[1:].partition("/")
        inside = self.spec.get(group) if (group, leaf) in PATHS else None
        value = inside.get(leaf) if isinstance(inside, dict) else None
        return f" ({value})" if isinstance(value, str) else ""


def _spec(command: str, args: SimpleNamespace, given: Mapping[str, Any], console: Console) -> dict[str, Any]:
    base = _read(args.spec, console) if args.spec else {}
    line: PastedLine = args.pasted
    has_depth = getattr(args, "depth", None) is not None
    if not base and not given and not args.set and line.script is None and not has_depth:
        raise UsageError(
            f"give a SPEC.json, or at least --data_path FILE; `trainyard {command} --help` lists all flags"
        )
    spec = spec_of(base, given, args.set, Path.cwd())
    if line.script is not None or not args.spec:
        for note in take_defaults(spec, line, given, Path.cwd()):
            console.error(f"MiniMind: {note}")
    for leaf in ("name", "description", "group"):
        if getattr(args, leaf) is not None:
            spec[leaf] = getattr(args, leaf)
    if args.labels:
        before = spec.get("labels")
        spec["labels"] = {**(before if isinstance(before, dict) else {}), **parse_labels(args.labels)}
    return spec


def _read(source: str, console: Console) -> dict[str, Any]:
    try:
        # From bytes, json detects a byte order mark and UTF-16, as Windows programs write them.
        content = console.read_stdin().removeprefix("\ufeff") if source == "-" else Path(source).read_bytes()
        spec = json.loads(content)
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        hint = "; if it is the corpus, give it with --data_path" if has_known_form(source) else ""
        raise UsageError(f"{source} is not JSON: {error}{hint}") from error
    if not isinstance(spec, dict):
        raise UsageError(f"{source} must hold a JSON object")
    return spec


def _place(pointer: str, given: Mapping[str, Any]) -> str:
    leaf = pointer.split("/")[2] if pointer.count("/") >= 2 else pointer[1:]
    names = [leaf, *(alias for alias, (_, ours) in ALIASES.items() if ours == leaf)]
    flag = next((name for name in names if name in given), None)
    return f"--{flag} ({pointer})" if flag else pointer or "the spec"
