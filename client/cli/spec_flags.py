"""The flags of `submit` and `plan`, and the job spec that they make: MiniMind's and Hugging Face's flat names."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from trainyard.client.cli.options import Option
from trainyard.client.exit_codes import UsageError
from trainyard.contract.parsing import ALIASES, FLAGS, GROUP_OF_LEAF, GROUPS
from trainyard.contract.spec import JobSpec

PATHS = (
    ("data", "data_path"),
    ("data", "eval_data_path"),
    ("data", "tokenizer_path"),
    ("training", "from_weight"),
    ("checkpoint", "save_dir"),
)
BUILT_IN_TOKENIZER = "byte"
ABSENT = frozenset({"none", "null", "None"})
SEVERAL = frozenset({"betas", "sample_prompts", "labels", "trackers"})
"""Flags that take one value or more."""

REPEATABLE = frozenset({"data_path", "eval_data_path"})
"""Flags that may be given several times, with one value each."""

OPTION = re.compile(r"--?[A-Za-z]|--$")
FLAG_ALIASES = {
    "accumulation": "accumulation_steps",
    "bs": "batch_size",
    "data": "data_path",
    "dim": "hidden_size",
    "gpus": "nproc_per_node",
    "lr": "learning_rate",
    "max_length": "max_seq_len",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "nproc": "nproc_per_node",
    "out_dir": "save_dir",
    "seq_len": "max_seq_len",
    "tokenizer": "tokenizer_path",
    "warmup_iters": "warmup_steps",
}
"""The names of other trainers -> ours, for error messages."""


@cache
def leaf_schemas() -> dict[str, Mapping[str, Any]]:
    """Return the JSON schema of every leaf, by its own name and by its Hugging Face name."""
    schema = JobSpec.model_json_schema()
    leaves = {name: schema["properties"][name] for name in ("name", "labels", "description", "group", "version")}
    for group in GROUPS:
        leaves |= _resolved(schema["properties"][group], schema)["properties"]
    for described in leaves.values():
        described["anyOf"] = [_resolved(branch, schema) for branch in described.get("anyOf", [described])]
    return leaves | {alias: leaves[leaf] for alias, (_, leaf) in ALIASES.items()}


def _resolved(described: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = described.get("$ref")
    return dict(schema["$defs"][reference.rsplit("/", 1)[1]] if reference else described)


def read_leaf(name: str, text: str) -> Any:
    """Return ``text`` as the type of the leaf. What does not fit stays text: the service rejects it."""
    kinds = {str(branch.get("type", "string")) for branch in leaf_schemas()[name]["anyOf"]}
    if "null" in kinds and text in ABSENT:
        return None
    if "boolean" in kinds:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower(), text)
    if "array" in kinds and text.startswith("["):
        return _json(text)
    if "string" in kinds:
        return text
    if ("object" in kinds and text.startswith("{")) or not kinds & {"integer", "number"}:
        return _json(text)
    return _number(text, whole="number" not in kinds)


def _number(text: str, whole: bool) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        # int() does not read 1e4, which is a whole number of steps.
        value = float(text)
        return int(value) if whole and value.is_integer() else value
    except (ValueError, OverflowError):
        return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@cache
def spec_options() -> tuple[Option, ...]:
    """Return one option for each leaf, in the groups of the spec, so that ``--help`` reads like the spec."""
    schemas = leaf_schemas()
    leaves = GROUP_OF_LEAF.items()
    options = [_option(leaf, group, schemas[leaf].get("description", ""), leaf in FLAGS) for leaf, group in leaves]
    section = "Hugging Face's names of the same"
    return (*options, *(_option(alias, section, f"--{leaf}", leaf in FLAGS) for alias, (_, leaf) in ALIASES.items()))


def _option(name: str, section: str, description: str, flag: bool) -> Option:
    if flag:
        return Option(f"--{name}", section=section, help=description, metavar="[0|1]", is_flag=False, flag_value="true")
    metavar = "X ..." if name in SEVERAL else "X"
    several = name in SEVERAL or name in REPEATABLE
    return Option(f"--{name}", section=section, help=description, metavar=metavar, multiple=several)


def given_leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves and aliases that were given on the command line -> their text, or list of texts."""
    leaves = {name: value for name, value in params.items() if name in GROUP_OF_LEAF or name in ALIASES}
    return {name: _texts(name, value) for name, value in leaves.items() if value not in (None, ())}


def _texts(name: str, value: Any) -> Any:
    if not isinstance(value, tuple):
        return value
    return value[0] if name in REPEATABLE and len(value) == 1 else list(value)


def repeat_flags(words: Iterable[str]) -> list[str]:
    """Return ``--betas 0.9 0.95`` as ``--betas 0.9 --betas 0.95``: a click option takes a fixed number of values."""
    repeated: list[str] = []
    flag = ""
    for word in words:
        if OPTION.match(word):
            flag = word if word[2:].replace("-", "_") in SEVERAL else ""
        elif flag and repeated[-1] != flag:
            repeated.append(flag)
        repeated.append(word)
    return repeated


def unknown_flag(name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a flag that does not exist. It names the one that was meant."""
    if name[2:] in FLAG_ALIASES:
        return UsageError(f"there is no flag {name}; did you mean --{FLAG_ALIASES[name[2:]]}?")
    near = get_close_matches("--" + name[2:].replace("-", "_"), sorted(known), n=2, cutoff=0.7)
    meant = f"; did you mean {' or '.join(near)}?" if near else "; `trainyard submit --help` lists them all"
    return UsageError(f"there is no flag {name}{meant}")


def spec_of(base: Mapping[str, Any], given: Mapping[str, Any], sets: Sequence[str], directory: Path) -> dict[str, Any]:
    """Return the spec to send.

    Args:
        base: the content of a SPEC file, or {}.
        given: leaf or alias -> the text(s) of its flag; these override ``base``.
        sets: ``group.field=value`` with a JSON value; these override both.
        directory: where relative paths start; the service may run in another folder.

    Raises:
        UsageError: a setting was given under two names.
    """
    for alias, (_, leaf) in ALIASES.items():
        if alias in given and leaf in given:
            raise UsageError(f"--{alias} and --{leaf} are the same setting: give one")
    spec: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in given.items():
        override(spec, _place(name), _typed(name, value))
    for assignment in sets:
        place, value = parse_assignment(assignment)
        override(spec, place, value)
    return with_absolute_paths(spec, directory)


def _place(name: str) -> tuple[str, ...]:
    if name in ALIASES:
        return ALIASES[name]
    return (GROUP_OF_LEAF[name], name) if name in GROUP_OF_LEAF and name not in JobSpec.model_fields else (name,)


def _typed(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return read_leaf(name, value) if isinstance(value, str) else value
    if len(value) == 1 and isinstance(_json(value[0]), list):
        return _json(value[0])
    return [_number(text, whole=False) for text in value] if name == "betas" else value


def override(spec: dict[str, Any], place: Sequence[str], value: Any) -> None:
    """Set a leaf, and remove what the spec holds under the leaf's other names, which would contradict it."""
    container = spec
    for part in place[:-1]:
        below = container.get(part)
        container[part] = below if isinstance(below, dict) else {}
        container = container[part]
    for alias, (group, leaf) in ALIASES.items():
        if (group, leaf) == tuple(place):
            container.pop(alias, None)
    container[place[-1]] = value


def parse_assignment(assignment: str) -> tuple[tuple[str, ...], Any]:
    """Split ``training.learning_rate=3e-4`` into a place and a value. The value is text if it is not JSON."""
    path, equals, text = assignment.partition("=")
    parts = tuple(path.split("."))
    if not equals or not all(parts):
        raise UsageError(f"--set takes GROUP.FIELD=VALUE, as in training.learning_rate=3e-4, not {assignment!r}")
    if len(parts) == 1:
        return _place(parts[0]), _json(text)
    return ALIASES.get(parts[1], parts) if ALIASES.get(parts[1], ("",))[0] == parts[0] else parts, _json(text)


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Return texts like ``k=v`` as a dict. Raises UsageError."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (key, equals, _) in zip(texts, pairs, strict=True) if not equals or not key]
    if wrong:
        raise UsageError(f"--labels takes KEY=VALUE, as in team=nlp, not {wrong[0]!r}")
    return {key: value for key, _, value in pairs}


def with_absolute_paths(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Make relative paths start at ``directory``. The built-in tokenizer and MiniMind's weight names are no paths."""
    for group, leaf in PATHS:
        container = spec.get(group)
        if isinstance(container, dict) and leaf in container:
            container[leaf] = _absolute(leaf, container[leaf], directory)
    for group, leaf in (("data", "sources"), ("data", "eval_sources"), ("evaluation", "tasks")):
        container = spec.get(group)
        entries = container.get(leaf) if isinstance(container, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict) and "path" in entry:
                entry["path"] = _absolute("data_path", entry["path"], directory)
    return spec


def _absolute(leaf: str, value: Any, directory: Path) -> Any:
    if isinstance(value, list):
        return [_absolute(leaf, item, directory) for item in value]
    if not isinstance(value, str) or not _is_path(leaf, value, directory):
        return value
    return str(directory / Path(value).expanduser())


def _is_path(leaf: str, value: str, directory: Path) -> bool:
    if not value or "\0" in value or (leaf == "tokenizer_path" and value == BUILT_IN_TOKENIZER):
        return False
    if leaf == "from_weight":
        # "pretrain" names a file in save_dir, "weights/a.pth" is one.
        return value not in ABSENT and ("/" in value or (directory / value).is_file())
    return True


DERIVED = ("head_dim", "intermediate_size", "moe_intermediate_size")


def differences(spec: JobSpec, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (``group.field``, value) of each field that differs from its default, in the order of the spec.

    A size that follows from others is included only if ``given``, the spec that will be sent, names it.
    """
    defaults = JobSpec.model_validate({"data": {"data_path": "/"}}).model_dump(mode="json")
    del defaults["data"]["data_path"]
    model = given.get("model")
    quiet = {("model", leaf) for leaf in DERIVED if not (isinstance(model, Mapping) and leaf in model)}
    shown = [(path, value) for path, value in _leaves(spec.model_dump(mode="json")) if path not in quiet]
    return [
        (".".join(path), json.dumps(value, ensure_ascii=False))
        for path, value in shown
        if value != _at(defaults, path) and (path != ("data", "data_path") or value is not None)
    ]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value and path != ("labels",):
        return [leaf for key, below in value.items() for leaf in _leaves(below, (*path, key))]
    return [(path, value)]


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        value = value.get(part, ...) if isinstance(value, dict) else ...
    return value
