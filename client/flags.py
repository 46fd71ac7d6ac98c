"""From a command line to a job spec: MiniMind's and Hugging Face's flat flags, typed by the spec's own schema."""

import argparse
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from client.exits import UsageError
from contract.parsing import ALIASES, FLAGS, GROUP_OF_LEAF, GROUPS
from contract.spec import JobSpec

PATHS = (
    ("data", "data_path"),
    ("data", "eval_data_path"),
    ("data", "tokenizer_path"),
    ("training", "from_weight"),
    ("checkpoint", "save_dir"),
)
BUILT_IN_TOKENIZER = "byte"
ABSENT = frozenset({"none", "null", "None"})
SEVERAL = frozenset({"betas", "sample_prompts"})
OTHER_WORDS = {
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
"""What other trainers call a leaf, to be told its name here."""

PROGRAMS = frozenset({"torchrun", "python", "python3"})


class LeafType:
    """What a leaf of the spec may hold, read from the JSON schema."""

    def __init__(self, schema: Mapping[str, Any], described: Mapping[str, Any]) -> None:
        branches = [_resolved(schema, branch) for branch in described.get("anyOf", [described])]
        self.kinds = frozenset(str(branch.get("type", "string")) for branch in branches)

    def read(self, text: str) -> Any:
        """``text`` as the type the leaf has. What does not fit stays text: the service refuses it with its place."""
        if "null" in self.kinds and text in ABSENT:
            return None
        if "boolean" in self.kinds:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(
                text.lower(), text
            )
        if "string" in self.kinds:
            return text
        if ("object" in self.kinds and text.startswith("{")) or not self.kinds & {"integer", "number"}:
            return _json(text)
        return _number(text, whole="number" not in self.kinds)


def leaf_types() -> dict[str, LeafType]:
    """The type of every leaf, by its own name and by its Hugging Face name."""
    schema = JobSpec.model_json_schema()
    found = {name: LeafType(schema, schema["properties"][name]) for name in ("name", "labels", "version")}
    for group, leaves in GROUPS.items():
        described = _resolved(schema, schema["properties"][group])["properties"]
        found.update({leaf: LeafType(schema, described[leaf]) for leaf in leaves})
    return found | {alias: found[leaf] for alias, (_, leaf) in ALIASES.items()}


def _resolved(schema: Mapping[str, Any], described: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = described.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[1]] if reference else described


def _number(text: str, whole: bool) -> Any:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        # 1e4 steps is a whole number to everybody but int().
        value = float(text)
        return int(value) if whole and value.is_integer() else value
    except (ValueError, OverflowError):
        return text


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def add_leaf_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each leaf, in the groups of the spec, so that ``--help`` reads like the spec."""
    schema = JobSpec.model_json_schema()
    for group, leaves in GROUPS.items():
        described = _resolved(schema, schema["properties"][group])["properties"]
        section = parser.add_argument_group(group)
        for leaf in leaves:
            _add_leaf(section, leaf, str(described[leaf].get("description", "")))
    aliases = parser.add_argument_group("Hugging Face's names of the same")
    for alias, (_, leaf) in ALIASES.items():
        _add_leaf(aliases, alias, f"--{leaf}", flag=leaf in FLAGS)


def _add_leaf(section: Any, leaf: str, description: str, flag: bool | None = None) -> None:
    options: dict[str, Any] = {"metavar": "X", "help": description.replace("%", "%%"), "default": argparse.SUPPRESS}
    if leaf in SEVERAL:
        options["nargs"] = "+"
    elif leaf in FLAGS if flag is None else flag:
        options |= {"nargs": "?", "const": "true", "metavar": "0|1"}
    section.add_argument(f"--{leaf}", **options)


def leaf_flags() -> frozenset[str]:
    """``--batch_size`` and all the others, Hugging Face's names included."""
    return frozenset(f"--{name}" for name in (*GROUP_OF_LEAF, *ALIASES))


def require_known(arguments: Sequence[str], known: frozenset[str]) -> list[str]:
    """``arguments`` with ``--batch-size`` written as ``--batch_size``.

    argparse would take the value behind a flag it does not know for the SPEC, and then complain of something else.

    Raises:
        UsageError: a flag does not exist; the message names the one that was meant.
    """
    return [_known(argument, known) if _is_long_flag(argument) else argument for argument in arguments]


def without_program(arguments: Sequence[str]) -> list[str]:
    """A whole command line of MiniMind's, as it is pasted, without ``torchrun`` and the name of its script."""
    pasted = arguments[0] in PROGRAMS if arguments else False
    return [word for word in arguments[pasted:] if not word.endswith("train_pretrain.py")]


def _is_long_flag(argument: str) -> bool:
    return argument.startswith("--") and len(argument) > 2


def _known(argument: str, known: frozenset[str]) -> str:
    name, equals, value = argument.partition("=")
    with_underscores = "--" + name[2:].replace("-", "_")
    for candidate in (name, with_underscores):
        if candidate in known:
            return candidate + equals + value
    if name[2:] in OTHER_WORDS:
        raise UsageError(f"there is no flag {name}; did you mean --{OTHER_WORDS[name[2:]]}?")
    near = get_close_matches(with_underscores, sorted(known), n=2, cutoff=0.7)
    meant = f"; did you mean {' or '.join(near)}?" if near else "; `trainyard submit --help` lists them all"
    raise UsageError(f"there is no flag {name}{meant}")


def spec_of(base: Mapping[str, Any], given: Mapping[str, Any], sets: Sequence[str], directory: Path) -> dict[str, Any]:
    """The spec to send.

    Args:
        base: what a SPEC file holds, or {}.
        given: leaf or alias -> the text(s) behind its flag; these override ``base``.
        sets: ``group.field=value`` with a JSON value; these override both.
        directory: where relative paths are looked for: the service may run elsewhere.

    Raises:
        UsageError: a setting was given under two names.
    """
    for alias, (_, leaf) in ALIASES.items():
        if alias in given and leaf in given:
            raise UsageError(f"--{alias} and --{leaf} are the same setting: give one")
    types = leaf_types()
    spec: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in base.items()}
    for name, value in given.items():
        override(spec, _place(name), _typed(name, value, types[name]))
    for assignment in sets:
        place, value = parse_assignment(assignment)
        override(spec, place, value)
    return with_absolute_paths(spec, directory)


def _place(name: str) -> tuple[str, ...]:
    if name in ALIASES:
        return ALIASES[name]
    return (GROUP_OF_LEAF[name], name) if name in GROUP_OF_LEAF and name not in JobSpec.model_fields else (name,)


def _typed(name: str, value: Any, kind: LeafType) -> Any:
    if not isinstance(value, list):
        return kind.read(value) if isinstance(value, str) else value
    if len(value) == 1 and isinstance(_json(value[0]), list):
        return _json(value[0])
    return [_number(text, whole=False) for text in value] if name == "betas" else value


def override(spec: dict[str, Any], place: Sequence[str], value: Any) -> None:
    """Set a leaf, and take out what the spec held under the leaf's other names, which would contradict it."""
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
    """``training.learning_rate=3e-4`` as a place and a value: JSON where it is JSON, else text."""
    path, equals, text = assignment.partition("=")
    parts = tuple(path.split("."))
    if not equals or not all(parts):
        raise UsageError(f"--set takes GROUP.FIELD=VALUE, as in training.learning_rate=3e-4, not {assignment!r}")
    if len(parts) == 1:
        return _place(parts[0]), _json(text)
    return ALIASES.get(parts[1], parts) if ALIASES.get(parts[1], ("",))[0] == parts[0] else parts, _json(text)


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """``k=v`` as a dict."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (key, equals, _) in zip(texts, pairs, strict=True) if not equals or not key]
    if wrong:
        raise UsageError(f"--labels takes KEY=VALUE, as in team=nlp, not {wrong[0]!r}")
    return {key: value for key, _, value in pairs}


def with_absolute_paths(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Relative paths seen from ``directory``; the built-in tokenizer and MiniMind's weight names stay as they are."""
    for group, leaf in PATHS:
        container = spec.get(group)
        value = container.get(leaf) if isinstance(container, dict) else None
        if isinstance(container, dict) and isinstance(value, str) and _is_path(leaf, value, directory):
            container[leaf] = str(directory / Path(value).expanduser())
    return spec


def _is_path(leaf: str, value: str, directory: Path) -> bool:
    if not value or "\0" in value or (leaf == "tokenizer_path" and value == BUILT_IN_TOKENIZER):
        return False
    if leaf == "from_weight":
        # "pretrain" names a file in save_dir, "weights/a.pth" is one.
        return value not in ABSENT and ("/" in value or (directory / value).is_file())
    return True


DERIVED = ("head_dim", "intermediate_size", "moe_intermediate_size")


def differences(spec: JobSpec, given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(``group.field``, value) for all that is not as it would be unasked, in the order of the spec.

    Sizes that follow from others are shown only where ``given``, which is what will be sent, names them.
    """
    unasked = JobSpec.model_validate({"data": {"data_path": spec.data.data_path}}).model_dump(mode="json")
    del unasked["data"]["data_path"]
    model = given.get("model")
    quiet = {("model", leaf) for leaf in DERIVED if not (isinstance(model, Mapping) and leaf in model)}
    shown = [(path, value) for path, value in _leaves(spec.model_dump(mode="json")) if path not in quiet]
    return [
        (".".join(path), json.dumps(value, ensure_ascii=False)) for path, value in shown if value != _at(unasked, path)
    ]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value and path != ("labels",):
        return [leaf for key, below in value.items() for leaf in _leaves(below, (*path, key))]
    return [(path, value)]


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        value = value.get(part, ...) if isinstance(value, dict) else ...
    return value
