"""From what a client sent to a `JobSpec`: aliases, MiniMind's habits, and every mistake at once with its pointer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from trainyard.contract.spec import JobSpec

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
"""Stands in for a data_path that was not given, while the rest of the spec is looked at."""


@dataclass(frozen=True)
class Problem:
    """One mistake: where (an RFC 6901 pointer into what the client sent) and what to do. Never the value itself."""

    pointer: str
    message: str


@dataclass(frozen=True)
class ParsedSpec:
    """``spec`` is the whole spec where ``problems`` is empty; else what could be saved of it, for further checks."""

    spec: JobSpec
    problems: tuple[Problem, ...]
    ignored_fields: frozenset[str] = field(default_factory=frozenset)

    def trusts(self, *pointers: str) -> bool:
        """Whether no field among ``pointers`` was already found wrong, so that a check of them says something new."""
        return not any(pointer in self.ignored_fields for pointer in pointers)


def groups() -> dict[str, tuple[str, ...]]:
    """The groups of the spec and their leaves, as in docs/reference/spec.md."""
    schema = JobSpec.model_json_schema()
    found: dict[str, tuple[str, ...]] = {}
    for name, described in schema["properties"].items():
        reference = described.get("$ref", "")
        if reference:
            found[name] = tuple(schema["$defs"][reference.rsplit("/", 1)[1]]["properties"])
    return found


GROUPS = groups()
GROUP_OF_LEAF: dict[str, str] = {leaf: group for group, leaves in GROUPS.items() for leaf in leaves}
"""Leaf names are unique over all groups, so MiniMind's flat flags can be put where they belong."""

FLAGS = frozenset(
    {
        "qk_norm",
        "tie_word_embeddings",
        "use_moe",
        "norm_topk_prob",
        "deterministic",
        "use_compile",
        "from_resume",
        "tensorboard",
        "use_wandb",
        "preemptible",
    }
)
"""Leaves for which 0 and 1 are taken as false and true, as in MiniMind's flags."""


def parse_spec(raw: object) -> ParsedSpec:
    """Read what a client sent.

    Fields that are wrong are reported, set aside and replaced by their defaults, and the rest is read again, so that
    one answer names every mistake. Checks between fields leave out the fields that are wrong already.
    """
    if not isinstance(raw, Mapping):
        return ParsedSpec(_spec_of({}), (Problem("", "must be a JSON object"),), frozenset({""}))
    tidy = _Canonical()
    canonical = tidy.read({"data": {}, **raw})
    spec = tidy.validated(canonical)
    problems = tidy.problems
    suspects = {problem.pointer for problem in problems}
    parsed = ParsedSpec(spec, tuple(problems), frozenset(suspects))
    found_between = tuple(problem for problem, involved in _between_fields(spec) if parsed.trusts(*involved))
    pointers = frozenset(suspects | {problem.pointer for problem in found_between})
    return ParsedSpec(spec, tuple(problems) + found_between, pointers)


class _Canonical:
    """Canonical names and types, and the way back from our pointer to the one the client used."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.original: dict[tuple[str, str], str] = {}

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        canonical: dict[str, Any] = {}
        for group, value in raw.items():
            if isinstance(value, Mapping) and _is_text(group):
                canonical[group] = self._group(group, value)
            elif self._carries(value, group):
                canonical[group] = value
        return canonical

    def _group(self, group: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
        canonical: dict[str, Any] = {}
        for key, value in leaves.items():
            if not self._carries(value, group, key):
                continue
            name = _own_name(group, key)
            if name in canonical:
                other = self.original.get((group, name), name)
                self.problems.append(Problem(pointer_to(group, key), f"is the same setting as {other}: give one"))
                continue
            if name != key:
                self.original[group, name] = key
            canonical[name] = _habit(name, value)
        return canonical

    def _carries(self, value: Any, *place: str) -> bool:
        """Whether ``value`` can go through JSON at all; else it is reported and left out."""
        trouble = _unreadable([*place, value])
        if trouble is not None:
            self.problems.append(Problem(pointer_to(*(printable(part) for part in place)), trouble))
        return trouble is None

    def validated(self, canonical: dict[str, Any]) -> JobSpec:
        """The spec, after setting aside whatever is wrong: each round takes out every field that pydantic names."""
        try:
            return JobSpec.model_validate_json(_to_json(canonical))
        except ValidationError as error:
            self.problems += [self.problem(e["loc"], e["type"], e["msg"]) for e in _first_per_field(error)]
            for found in error.errors(include_input=False, include_url=False, include_context=False):
                _set_aside(canonical, found["loc"])
            return self.validated(canonical)

    def problem(self, loc: tuple[int | str, ...], kind: str, message: str) -> Problem:
        if len(loc) >= 2:
            loc = (loc[0], self.original.get((str(loc[0]), str(loc[1])), loc[1]), *loc[2:])
        if kind in ("extra_forbidden", "unexpected_keyword_argument"):
            message = _unknown(loc)
        return Problem(pointer_to(*(part for part in loc if part != "[key]")), plain(message))


def _own_name(group: str, key: str) -> str:
    alias = ALIASES.get(key)
    return alias[1] if alias is not None and alias[0] == group else key


def _habit(name: str, value: Any) -> Any:
    """What MiniMind's users write and mean, as the type the spec has."""
    if name in FLAGS and type(value) is int and value in (0, 1):
        return bool(value)
    if name == "from_weight" and value == "none":
        return None
    return value


def _unreadable(value: Any, depth: int = 0) -> str | None:
    """Why ``value`` cannot be part of any spec, or None."""
    if isinstance(value, str):
        return None if _is_text(value) else "holds a lone surrogate, which is no text"
    if isinstance(value, int):
        return None if abs(value) < 2**64 else "is too large a number"
    if depth > 6 and isinstance(value, list | Mapping):
        return "is nested too deeply"
    inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    if isinstance(inside, list):
        return next((trouble for item in inside if (trouble := _unreadable(item, depth + 1))), None)
    return None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value: str) -> str:
    """A name as it can be shown: lone surrogates replaced, and not longer than a line."""
    return value.encode(errors="replace").decode()[:100]


def _first_per_field(error: ValidationError) -> Iterator[dict[str, Any]]:
    """One error a field: a union reports each of its branches, and the user made one mistake."""
    seen: set[tuple[int | str, ...]] = set()
    for found in error.errors(include_input=False, include_url=False, include_context=False):
        if found["loc"][:3] not in seen:
            seen.add(found["loc"][:3])
            yield dict(found)


def _unknown(loc: tuple[int | str, ...]) -> str:
    name = str(loc[-1])
    group = GROUP_OF_LEAF.get(name) or ALIASES.get(name, (None,))[0]
    if group is not None and group != loc[0]:
        return f'is not a field here: it belongs in "{group}"'
    near = _nearest(name, GROUPS.get(str(loc[0]), ()) if len(loc) > 1 else tuple(JobSpec.model_fields))
    return "is not a field of the job spec" + (f"; did you mean {near}?" if near else "")


def _nearest(name: str, candidates: tuple[str, ...]) -> str | None:
    # Imported here: only a wrong spec pays for it.
    from difflib import get_close_matches

    return next(iter(get_close_matches(name[:100], candidates, n=1, cutoff=0.6)), None)


def _set_aside(canonical: dict[str, Any], loc: tuple[int | str, ...]) -> None:
    """Take the field at fault out, so that its default stands in for it."""
    group, leaf = str(loc[0]), str(loc[1]) if len(loc) > 1 else None
    container = canonical.get(group)
    if leaf is None or not isinstance(container, dict) or group == "labels":
        canonical.pop(group, None)
    else:
        container.pop(leaf, None)
    if group == "data" and leaf in (None, "data_path"):
        data = canonical.setdefault("data", {})
        data["data_path"] = PLACEHOLDER


def _spec_of(canonical: dict[str, Any]) -> JobSpec:
    return JobSpec.model_validate({"data": {"data_path": PLACEHOLDER}, **canonical})


def _to_json(canonical: dict[str, Any]) -> str:
    # NaN passes here as a bare word and is refused by the field that gets it, with its pointer.
    return json.dumps(canonical)


def _between_fields(spec: JobSpec) -> Iterator[tuple[Problem, tuple[str, ...]]]:
    """What no field alone can know, each with the pointers of all fields that take part."""
    for leaf, message, involved in spec.model.problems():
        yield Problem(f"/model/{leaf}", message), tuple(f"/model/{name}" for name in involved)
    limit = spec.model.max_position_embeddings
    if spec.data.max_seq_len > limit:
        message = f"must be at most model.max_position_embeddings ({limit})"
        yield Problem("/data/max_seq_len", message), ("/data/max_seq_len", "/model/max_position_embeddings")
    if spec.data.eval_data_path is not None and spec.data.eval_fraction > 0:
        message = "cannot be given with eval_data_path: one of them says what is held out"
        yield Problem("/data/eval_fraction", message), ("/data/eval_fraction", "/data/eval_data_path")
    steps = spec.training.max_steps
    if steps is not None and spec.training.warmup_steps >= steps:
        message = f"must be less than max_steps ({steps})"
        yield Problem("/training/warmup_steps", message), ("/training/warmup_steps", "/training/max_steps")
    resources = spec.resources
    if resources.min_nodes > resources.max_nodes:
        yield Problem("/resources/nnodes", "must have min at most as large as max"), ("/resources/nnodes",)
    if resources.max_nodes > 1 and resources.launcher == "local":
        message = "must be 1: the local launcher runs on one node"
        yield Problem("/resources/nnodes", message), ("/resources/nnodes", "/resources/launcher")


def pointer_to(*parts: int | str) -> str:
    """RFC 6901: ``/training/learning_rate``."""
    return "".join("/" + printable(str(part)).replace("~", "~0").replace("/", "~1") for part in parts)


def plain(message: str) -> str:
    """pydantic's message as the second half of a sentence that begins with the pointer."""
    message = message.removeprefix("Value error, ").removeprefix("Input ").removeprefix("String ")
    return "is required" if message == "Field required" else message
