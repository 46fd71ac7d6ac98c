"""The request body of a fork, and the fork's spec: that of the parent with overrides. All mistakes come at once."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainyard.contract.parsing import ALIASES, GROUPS, Problem, pointer_to
from trainyard.contract.run_identity import CHANGEABLE_FIELDS
from trainyard.contract.spec import JobSpec, replace_length
from trainyard.service.bodies import unknown_field
from trainyard.service.errors import RequestInvalid, SpecInvalid, with_problems
from trainyard.service.jobs.actions import MAX_STEP
from trainyard.service.jobs.submission import HostLimits, validate_spec

FIELDS = ("step", "overrides", "data")
MAX_NAME = 200

KEPT_FIELDS: dict[str, tuple[str, ...]] = {
    "data": ("data_path", "sources", "text_field", "max_seq_len", "packing", "eval_fraction"),
    "training": ("seed", "optimizer"),
}
"""Fields that must not change with ``data: keep``: they determine the samples of a step and the optimizer's state."""

LENGTH_FIELDS = ("epochs", "max_steps", "max_tokens")
ALTERNATIVES = (
    ("training", "decay_steps", "decay_fraction"),
    ("data", "data_path", "sources"),
    ("data", "eval_data_path", "eval_sources"),
)
"""(group, field, field that excludes it)."""
BATCH_FIELDS = ("batch_size", "accumulation_steps")


@dataclass(frozen=True)
class ForkRequest:
    """The body. ``step`` None: the newest checkpoint. ``client_names``: (group, leaf) -> the alias the client used."""

    step: int | None
    data: Literal["keep", "restart"]
    overrides: Mapping[str, Any]
    client_names: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def pointer(self, group: str, leaf: str) -> str:
        """Return the pointer to a field in the body, with the name that the client used."""
        return pointer_to("overrides", group, self.client_names.get((group, leaf), leaf))


@dataclass(frozen=True)
class ForkOrigin:
    """The parent at the checkpoint that the fork starts from.

    ``rows_per_step``: sequences per step, over all ranks. ``base_step``: steps before the parent's own schedule.
    ``tokens``: trained in that schedule until the checkpoint, at least.
    """

    step: int
    spec: Mapping[str, Any]
    rows_per_step: int
    base_step: int
    steps_per_epoch: int | None
    tokens_per_step: float | None = None
    tokens: int = 0


def parse_fork_request(body: object) -> ForkRequest:
    """Parse the body. Raises RequestInvalid or SpecInvalid."""
    if not isinstance(body, dict | None):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    fields = body or {}
    problems = list(_problems(fields))
    if problems:
        raise with_problems(RequestInvalid, problems)
    overrides, client_names = _without_aliases(fields.get("overrides") or {})
    return ForkRequest(fields.get("step"), fields.get("data", "keep"), overrides, client_names)


def _problems(body: Mapping[str, Any]) -> Iterator[Problem]:
    yield from (Problem(pointer_to(name), unknown_field(FIELDS)) for name in body if name not in FIELDS)
    step = body.get("step")
    if step is not None and (type(step) is not int or not 0 <= step <= MAX_STEP):
        yield Problem("/step", "must be a whole number, 0 or more")
    if body.get("data", "keep") not in ("keep", "restart"):
        yield Problem("/data", 'must be "keep" or "restart"')
    if not isinstance(body.get("overrides"), dict | None):
        yield Problem("/overrides", "must be a JSON object")


def _without_aliases(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, str], str]]:
    """Return the overrides under the spec's own field names, and the names that the client used."""
    canonical: dict[str, Any] = {}
    client_names: dict[tuple[str, str], str] = {}
    for group, leaves in overrides.items():
        if group not in GROUPS or not isinstance(leaves, dict):
            canonical[group] = leaves
            continue
        canonical[group] = {}
        for key, value in leaves.items():
            alias = ALIASES.get(key)
            name = alias[1] if alias is not None and alias[0] == group else key
            if name in canonical[group]:
                problem = Problem(pointer_to("overrides", group, key), "is the same setting as another one: give one")
                raise with_problems(SpecInvalid, [problem])
            canonical[group][name], client_names[group, name] = value, key
    return canonical, client_names


def forked_spec(request: ForkRequest, origin: ForkOrigin, host: HostLimits) -> JobSpec:
    """Return the parent's spec with the overrides, validated for this host. Raises SpecInvalid."""
    problems = [*_check_unchangeable(request, origin.spec)]
    try:
        spec = validate_spec(_merge(request, origin), host)
    except SpecInvalid as error:
        raise with_problems(SpecInvalid, [*problems, *_with_client_pointers(error, request, problems)]) from None
    if request.data == "keep":
        problems += [*_check_batch(request, origin, spec), *_check_remaining_steps(request, origin, spec)]
    if problems:
        raise with_problems(SpecInvalid, problems)
    return spec


def _merge(request: ForkRequest, origin: ForkOrigin) -> dict[str, Any]:
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in origin.spec.items()}
    merged["name"] = f"{merged['name']}-fork-{origin.step}"[:MAX_NAME]
    merged["description"] = ""  # it says why the parent was tried
    merged["training"]["from_weight"] = None
    merged["checkpoint"]["from_resume"] = False
    given = request.overrides.get("training")
    if isinstance(given, dict):
        merged["training"] = replace_length(merged["training"], given)
    for name, value in request.overrides.items():
        old = merged.get(name)
        merged[name] = (
            {**old, **value} if name in GROUPS and isinstance(value, dict) and isinstance(old, dict) else value
        )
    training, old_training = merged["training"], origin.spec["training"]
    # A setting of the request replaces the parent's other form of the same setting.
    for group, first, second in ALTERNATIVES:
        given = request.overrides.get(group)
        for leaf, other in ((first, second), (second, first)):
            if isinstance(given, dict) and given.get(leaf) is not None and other not in given:
                merged[group][other] = None
    if isinstance(training, dict) and (
        request.data == "restart" or any(training.get(leaf) != old_training.get(leaf) for leaf in LENGTH_FIELDS)
    ):
        training["continued_at"] = []  # the schedule is that of the new length
    return merged


def _check_unchangeable(request: ForkRequest, parent: Mapping[str, Any]) -> Iterator[Problem]:
    for group, leaves in request.overrides.items():
        for leaf, value in leaves.items() if group in GROUPS and isinstance(leaves, dict) else ():
            reason = _unchangeable_reason(group, leaf, request.data)
            if reason is not None and leaf in GROUPS[group] and value != parent[group].get(leaf):
                yield Problem(request.pointer(group, leaf), reason)


def _unchangeable_reason(group: str, leaf: str, data: str) -> str | None:
    if (group, leaf) in (("training", "from_weight"), ("checkpoint", "from_resume")):
        return "cannot be given: a fork begins at its parent's checkpoint"
    if (group, leaf) == ("data", "tokenizer_path") or (group == "model" and leaf not in CHANGEABLE_FIELDS):
        return "cannot be changed: the parent's weights were trained with it"
    if (group, leaf) == ("training", "recipe"):
        return "cannot be changed: a fork keeps its parent's settings, and each of them can be given"
    if data == "keep" and (group == "model" or leaf in KEPT_FIELDS.get(group, ())):
        return 'cannot be changed with data "keep": data "restart" allows it'
    return None


def _with_client_pointers(error: SpecInvalid, request: ForkRequest, reported: list[Problem]) -> Iterator[Problem]:
    """Yield the problems of the spec with pointers into the body, without fields that are reported already."""
    reported_pointers = {problem.pointer for problem in reported}
    for problem in error.extra["errors"]:
        parts = problem["pointer"].split("/")[1:]
        pointer = f"/overrides{problem['pointer']}"
        if len(parts) > 1 and (parts[0], parts[1]) in request.client_names:
            pointer = request.pointer(parts[0], parts[1]) + "".join(f"/{part}" for part in parts[2:])
        if pointer not in reported_pointers:
            yield Problem(pointer, problem["message"])


def _check_batch(request: ForkRequest, origin: ForkOrigin, spec: JobSpec) -> Iterator[Problem]:
    leaves = request.overrides.get("training", {})
    changed = next((leaf for leaf in BATCH_FIELDS if leaf in leaves), None)
    if changed is not None and spec.rows_per_step != origin.rows_per_step:
        message = (
            f"batch_size x accumulation_steps x ranks must stay {origin.rows_per_step}, so that each step has the "
            'samples it has in the parent; data "restart" allows another batch'
        )
        yield Problem(request.pointer("training", changed), message)


def _check_remaining_steps(request: ForkRequest, origin: ForkOrigin, spec: JobSpec) -> Iterator[Problem]:
    training, done = spec.training, origin.step - origin.base_step
    leaf, steps = "max_steps", training.max_steps
    if training.max_tokens is not None:
        if training.max_tokens <= origin.tokens:
            message = f"must be more: {origin.tokens:,} tokens are trained at the checkpoint of step {origin.step:,}"
            yield Problem(request.pointer("training", "max_tokens"), message)
        return
    if steps is None and origin.steps_per_epoch:
        leaf, steps = "epochs", training.epochs * origin.steps_per_epoch
    if steps is not None and steps <= done:
        message = f"must be more: {steps:,} steps are all done at the checkpoint of step {origin.step:,}"
        yield Problem(request.pointer("training", leaf), message)
