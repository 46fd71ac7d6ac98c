"""Parsing of a client's JSON into a `JobSpec`: aliases, MiniMind's conventions, and all problems with pointers."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from trainyard.contract.patterns import PATTERN_MESSAGES
from trainyard.contract.recipes import fill_recipe
from trainyard.contract.spec import DataSpec, JobSpec, TrainingSpec

ALIASES: dict[str, tuple[str, str]] = {
    "num_train_epochs": ("training", "epochs"),
    "per_device_train_batch_size": ("training", "batch_size"),
    "gradient_accumulation_steps": ("training", "accumulation_steps"),
    "max_grad_norm": ("training", "grad_clip"),
    "torch_compile": ("training", "use_compile"),
    "save_steps": ("checkpoint", "save_interval"),
    "save_total_limit": ("checkpoint", "keep_last"),
    "logging_steps": ("reporting", "log_interval"),
}
"""Hugging Face's name of a leaf -> (our group, our name)."""

PLACEHOLDER = "/dev/null"
"""Replaces a data_path that is missing or wrong, so that the rest of the spec can be checked."""


@dataclass(frozen=True)
class Problem:
    """One problem: where (an RFC 6901 pointer into the client's JSON) and what to do. Never contains the value."""

    pointer: str
    message: str


@dataclass(frozen=True)
class ParsedSpec:
    """``spec``: the client's spec. If there are ``problems``, its wrong fields have their defaults, for more checks."""

    spec: JobSpec
    problems: tuple[Problem, ...]
    ignored_fields: frozenset[str] = field(default_factory=frozenset)

    def trusts(self, *pointers: str) -> bool:
        """Return whether none of these fields is already known to be wrong, so that checking them makes sense."""
        return not any(pointer in self.ignored_fields for pointer in pointers)


def _group_schemas() -> dict[str, dict[str, Any]]:
    schema = JobSpec.model_json_schema()
    return {
        name: schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["properties"]
        for name, field in schema["properties"].items()
        if "$ref" in field
    }


_SCHEMAS = _group_schemas()
GROUPS = {group: tuple(leaves) for group, leaves in _SCHEMAS.items()}
"""The groups of the spec and their leaves, as in docs/reference/spec.md."""

GROUP_OF_LEAF = {leaf: group for group, leaves in GROUPS.items() for leaf in leaves}
"""Leaf names are unique over all groups, so that MiniMind's flat flags can be assigned to groups."""

FLAGS = frozenset(
    leaf for leaves in _SCHEMAS.values() for leaf, field in leaves.items() if field.get("type") == "boolean"
)
"""Leaves that accept 0 and 1 for false and true, as MiniMind's flags do."""


def parse_spec(raw: object, *, fills_recipe: bool = True) -> ParsedSpec:
    """Parse a client's JSON value. ``fills_recipe``: fill in its recipe; a stored spec has it already.

    Wrong fields are reported and replaced by their defaults, and the rest is parsed again, so that one response lists
    all problems. Checks between fields skip the fields that are already known to be wrong.
    """
    if not isinstance(raw, Mapping):
        return ParsedSpec(_spec_of({}), (Problem("", "must be a JSON object"),), frozenset({""}))
    canonical = _Canonical()
    given = canonical.read({"data": {}, **raw})
    spec = canonical.validate(fill_recipe(given) if fills_recipe else given)
    problems = tuple(canonical.problems)
    wrong = frozenset(problem.pointer for problem in problems)
    parsed = ParsedSpec(spec, problems, wrong)
    conflicts = tuple(problem for problem, involved in _conflicts(spec) if parsed.trusts(*involved))
    return ParsedSpec(spec, problems + conflicts, wrong | {problem.pointer for problem in conflicts})


class _Canonical:
    """Translates the client's names and values to those of the spec, and pointers back to the client's names."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.original: dict[tuple[str, str], str] = {}

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        canonical: dict[str, Any] = {}
        for group, value in raw.items():
            if isinstance(value, Mapping) and _is_text(group):
                canonical[group] = self._group(group, value)
            elif self._is_readable(value, group):
                canonical[group] = value
        _release_device(canonical.get("resources"))
        return canonical

    def _group(self, group: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        canonical: dict[str, Any] = {}
        for key, value in leaves.items():
            if not self._is_readable(value, group, key):
                continue
            name = _own_name(group, key)
            if name in canonical:
                other = self.original.get((group, name), name)
                self.problems.append(Problem(pointer_to(group, key), f"is the same setting as {other}: give one"))
                continue
            if name != key:
                self.original[group, name] = key
            canonical[name] = _convert(name, value)
        return canonical

    def _is_readable(self, value: Any, *path: str) -> bool:
        problem = _unreadable([*path, value])
        if problem is not None:
            self.problems.append(Problem(pointer_to(*(printable(part) for part in path)), problem))
        return problem is None

    def validate(self, canonical: dict[str, Any]) -> JobSpec:
        """Return the spec without its wrong fields. Each round removes all fields that pydantic reports."""
        try:
            return JobSpec.model_validate_json(_to_json(canonical))
        except ValidationError as error:
            self.problems += [self.problem(e["loc"], e["type"], e["msg"]) for e in _first_per_field(error)]
            for found in error.errors(include_input=False, include_url=False, include_context=False):
                _remove(canonical, found["loc"])
            return self.validate(canonical)

    def problem(self, loc: tuple[int | str, ...], kind: str, message: str) -> Problem:
        if len(loc) >= 2:
            loc = (loc[0], self.original.get((str(loc[0]), str(loc[1])), loc[1]), *loc[2:])
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            message = _unknown_field(loc)
        return Problem(pointer_to(*(part for part in loc if not _is_branch(part))), plain(message))


def _is_branch(part: int | str) -> bool:
    # pydantic's marks for the key of a mapping, and for the branches of a union such as `contract.spec.DataPath`.
    return part in ("[key]", "[path]", "[paths]")


def _own_name(group: str, key: str) -> str:
    alias = ALIASES.get(key)
    return alias[1] if alias is not None and alias[0] == group else key


def _convert(name: str, value: Any) -> Any:
    """Return a value in MiniMind's convention as the type that the spec has."""
    if name in FLAGS and type(value) is int and value in (0, 1):
        return bool(value)
    if name == "from_weight" and value == "none":
        return None
    return value


def _release_device(resources: Any) -> None:
    # MiniMind's default, given explicitly. In MiniMind, too, each of several ranks uses its own device.
    if not isinstance(resources, dict) or resources.get("device") != "cuda:0":
        return
    if type(ranks := resources.get("nproc_per_node")) is int and ranks > 1:
        resources["device"] = "cuda"


def _unreadable(value: Any, depth: int = 0) -> str | None:
    """Return why ``value`` cannot be part of any spec, or None."""
    if isinstance(value, str):
        return None if _is_text(value) else "holds a lone surrogate, which is no text"
    if isinstance(value, int):
        return None if abs(value) < 2**64 else "is too large a number"
    if depth > 6 and isinstance(value, list | Mapping):
        return "is nested too deeply"
    inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    if isinstance(inside, list):
        return next((problem for item in inside if (problem := _unreadable(item, depth + 1))), None)
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value: str) -> str:
    """Return a name that can be shown: without lone surrogates, at most 100 characters."""
    return value.encode(errors="replace").decode()[:100]


def _first_per_field(error: ValidationError) -> Iterator[dict[str, Any]]:
    # One error per field: a union reports an error for each of its branches. An entry of a list has fields of its own.
    seen: set[tuple[int | str, ...]] = set()
    for found in error.errors(include_input=False, include_url=False, include_context=False):
        loc = found["loc"]
        field = loc[: 4 if len(loc) > 3 and isinstance(loc[2], int) else 3]
        if field not in seen:
            seen.add(field)
            yield dict(found)


def _unknown_field(loc: tuple[int | str, ...]) -> str:
    name = str(loc[-1])
    group = GROUP_OF_LEAF.get(name) or ALIASES.get(name, (None,))[0]
    if group is not None and group != loc[0]:
        return f'is not a field here: it belongs in "{group}"'
    near = nearest(name, GROUPS.get(str(loc[0]), ()) if len(loc) > 1 else tuple(JobSpec.model_fields))
    return "is not a field of the job spec" + (f"; did you mean {near}?" if near else "")


def nearest(name: str, candidates: tuple[str, ...]) -> str | None:
    """Return the candidate that is most like ``name``, or None if none is."""
    # Imported here, because only a mistake needs it.
    from difflib import get_close_matches

    return next(iter(get_close_matches(name[:100], candidates, n=1, cutoff=0.6)), None)


def _remove(canonical: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    group, leaf = str(loc[0]), str(loc[1]) if len(loc) > 1 else None
    container = canonical.get(group)
    if leaf is None or not isinstance(container, dict) or group == "labels":
        canonical.pop(group, None)
    else:
        container.pop(leaf, None)
    if group == "data" and leaf in (None, "data_path", "sources"):
        canonical.setdefault("data", {}).setdefault("data_path", PLACEHOLDER)


def _spec_of(canonical: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate({"data": {"data_path": PLACEHOLDER}, **canonical})


def _to_json(canonical: dict[str, Any]) -> str:
    # NaN is written as a bare word here, so that the field that gets it rejects it with its pointer.
    return json.dumps(canonical)


def _conflicts(spec: JobSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """Yield the problems between fields, each with the pointers of all fields involved."""
    for leaf, message, involved in spec.model.problems():
        yield Problem(f"/model/{leaf}", message), tuple(f"/model/{name}" for name in involved)
    limit = spec.model.max_position_embeddings
    if spec.data.max_seq_len > limit:
        message = f"must be at most model.max_position_embeddings ({limit})"
        yield Problem("/data/max_seq_len", message), ("/data/max_seq_len", "/model/max_position_embeddings")
    yield from _source_conflicts(spec)
    yield from _held_out_conflicts(spec.data)
    yield from duplicate_names((task.name for task in spec.evaluation.tasks), "/evaluation/tasks", "task")
    steps = spec.training.max_steps
    if steps is not None and spec.training.warmup_steps >= steps:
        message = f"must be less than max_steps ({steps})"
        yield Problem("/training/warmup_steps", message), ("/training/warmup_steps", "/training/max_steps")
    if steps is not None and spec.training.max_tokens is not None:
        message = "cannot be combined with max_steps: give one of them"
        yield Problem("/training/max_tokens", message), ("/training/max_tokens", "/training/max_steps")
    yield from _decay_conflicts(spec.training)
    yield from _optimizer_conflicts(spec)
    starts = [start for start, _ in spec.training.continued_at]
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        yield Problem("/training/continued_at", "must have the steps in increasing order"), ("/training/continued_at",)
    resources = spec.resources
    if resources.min_nodes > resources.max_nodes:
        yield Problem("/resources/nnodes", "must have min at most as large as max"), ("/resources/nnodes",)
    if resources.max_nodes > 1 and resources.launcher == "local":
        message = "must be 1: the local launcher runs on one node"
        yield Problem("/resources/nnodes", message), ("/resources/nnodes", "/resources/launcher")


def _decay_conflicts(training: TrainingSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    if training.decay_steps is None:
        return
    if training.decay_fraction is not None:
        message = "cannot be combined with decay_fraction: give one of them"
        yield Problem("/training/decay_steps", message), ("/training/decay_steps", "/training/decay_fraction")
    if training.max_steps is None or training.lr_scheduler != "wsd":
        return
    after_warmup = training.max_steps - training.warmup_steps
    if training.decay_steps > after_warmup > 0:
        involved = tuple(f"/training/{leaf}" for leaf in ("decay_steps", "max_steps", "warmup_steps"))
        message = f"must be at most max_steps - warmup_steps ({after_warmup})"
        yield Problem("/training/decay_steps", message), involved


def _optimizer_conflicts(spec: JobSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    training = spec.training
    if training.cautious_weight_decay and training.optimizer != "muon":
        message = 'needs optimizer "muon": AdamW decays every weight'
        yield (
            Problem("/training/cautious_weight_decay", message),
            ("/training/cautious_weight_decay", "/training/optimizer"),
        )
    if training.head_lr_multiplier != 1 and spec.model.tie_word_embeddings:
        message = "must be 1 with model.tie_word_embeddings: embedding_lr_multiplier is that of the shared matrix"
        yield (
            Problem("/training/head_lr_multiplier", message),
            ("/training/head_lr_multiplier", "/model/tie_word_embeddings"),
        )


def _source_conflicts(spec: JobSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    data, both = spec.data, ("/data/data_path", "/data/sources")
    if data.data_path is None and data.sources is None:
        yield Problem("/data/data_path", "is required unless sources is given"), both
        return
    if data.sources is None:
        return
    if data.data_path is not None:
        yield Problem("/data/sources", "cannot be combined with data_path: give one of them"), both
    yield from duplicate_names((source.name for source in data.sources), "/data/sources", "source")
    unweighted = [index for index, source in enumerate(data.sources) if source.weight is None]
    if 0 < len(unweighted) < len(data.sources):
        message = "is required, because other sources have a weight"
        yield from ((Problem(f"/data/sources/{index}/weight", message), ("/data/sources",)) for index in unweighted)
    if data.is_mixture and spec.training.max_steps is None and spec.training.max_tokens is None:
        message = "is required, or max_tokens: a weighted mixture has no epochs"
        lengths = ("/training/max_steps", "/training/max_tokens")
        yield Problem("/training/max_steps", message), (*lengths, "/data/sources")


def _held_out_conflicts(data: DataSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    path, sources, fraction = (f"/data/eval_{name}" for name in ("data_path", "sources", "fraction"))
    conflict = "cannot be combined with {}: give one of them"
    if data.eval_sources is not None and data.eval_data_path is not None:
        yield Problem(sources, conflict.format("eval_data_path")), (sources, path)
    if data.eval_fraction > 0 and data.eval_data_path is not None:
        yield Problem(fraction, conflict.format("eval_data_path")), (fraction, path)
    if data.eval_fraction > 0 and data.eval_sources is not None:
        yield Problem(fraction, conflict.format("eval_sources")), (fraction, sources)
    seen: set[str] = set()
    for index, source in enumerate(data.eval_sources or ()):
        if source.name in seen:
            yield Problem(f"{sources}/{index}/name", "is the name of an earlier held-out set"), (sources,)
        seen.add(source.name)


def duplicate_names(names: Iterable[str], pointer: str, what: str) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """Yield a problem for each entry of the list at ``pointer`` whose name an earlier entry has."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Problem(f"{pointer}/{index}/name", f"is the name of an earlier {what}"), (pointer,)
        seen.add(name)


def pointer_to(*parts: int | str) -> str:
    """Return the RFC 6901 pointer, e.g. ``/training/learning_rate``."""
    return "".join("/" + printable(str(part)).replace("~", "~0").replace("/", "~1") for part in parts)


def plain(message: str) -> str:
    """Return pydantic's message as the second half of a sentence that begins with the pointer."""
    if pattern := re.match(r"String should match pattern '(.*)'$", message):
        return PATTERN_MESSAGES.get(pattern[1], message.removeprefix("String "))
    message = re.sub(r", unable to parse string as an? \w+$", "", message)
    message = message.removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    message = re.sub(r"^(?:List|Value) (should have .*) after validation(, not .*)$", r"\1\2", message)
    message = message.replace("a valid dictionary or object to extract fields from", "a JSON object")
    return "is required" if message == "Field required" else message
