"""What a fork is asked to be: its body read strictly, its spec made of the parent's, and what cannot be changed. Pure.

All mistakes come at once, with pointers into the body.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainyard.contract.parsing import (
    ALIASES,
    GROUPS,
    Problem,
    pointer_to,
)
from trainyard.contract.run_identity import CHANGEABLE_FIELDS
from trainyard.contract.spec import JobSpec
from trainyard.service.bodies import unknown_field
from trainyard.service.errors import RequestInvalid, SpecInvalid, with_problems
from trainyard.service.jobs.actions import MAX_STEP
from trainyard.service.jobs.submission import HostLimits, validate_spec

FIELDS = ("step", "overrides", "data")
MAX_NAME = 200

ORDER: dict[str, tuple[str, ...]] = {
    "data": ("data_path", "text_field", "max_seq_len", "packing", "eval_fraction"),
    "training": ("seed", "optimizer"),
}
"""What decides which samples a step has, and what the moments of the optimizer are."""

BATCH = ("batch_size", "accumulation_steps")


@dataclass(frozen=True)
class ForkRequest:
    """The body. ``step`` None: the newest checkpoint. ``given``: (group, leaf) -> the name the client used for it."""

    step: int | None
    data: Literal["keep", "restart"]
    overrides: Mapping[str, Any]
    client_names: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def pointer(self, group: str, leaf: str) -> str:
        """Where in the body the client has said this, or would have."""
        return pointer_to("overrides", group, self.client_names.get((group, leaf), leaf))


@dataclass(frozen=True)
class ForkOrigin:
    """What the parent is, where the fork begins.

    ``rows``: rows of a step. ``base``: steps before its own schedule.
    """

    step: int
    spec: Mapping[str, Any]
    rows_per_step: int
    base_step: int
    steps_per_epoch: int | None


def parse_fork_request(body: object) -> ForkRequest:
    """The body. Raises RequestInvalid or SpecInvalid."""
    if not isinstance(body, dict | None):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    found = body or {}
    problems = list(_mistakes(found))
    if problems:
        raise with_problems(RequestInvalid, problems)
    canonical, given = _canonical(found.get("overrides") or {})
    return ForkRequest(found.get("step"), found.get("data", "keep"), canonical, given)


def _mistakes(body: Mapping[str, Any]) -> Iterator[Problem]:
    yield from (Problem(pointer_to(name), unknown_field(FIELDS)) for name in body if name not in FIELDS)
    step = body.get("step")
    if step is not None and (type(step) is not int or not 0 <= step <= MAX_STEP):
        yield Problem("/step", "must be a whole number, 0 or more")
    if body.get("data", "keep") not in ("keep", "restart"):
        yield Problem("/data", 'must be "keep" or "restart"')
    if not isinstance(body.get("overrides"), dict | None):
        yield Problem("/overrides", "must be a JSON object")


def _canonical(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, str], str]]:
    """Our own names for all leaves, and back."""
    canonical: dict[str, Any] = {}
    given: dict[tuple[str, str], str] = {}
    for group, leaves in overrides.items():
        if group not in GROUPS or not isinstance(leaves, dict):
            canonical[group] = leaves
            continue
        canonical[group] = {}
        for key, value in leaves.items():
            known = ALIASES.get(key)
            name = known[1] if known is not None and known[0] == group else key
            if name in canonical[group]:
                problem = Problem(pointer_to("overrides", group, key), "is the same setting as another one: give one")
                raise with_problems(SpecInvalid, [problem])
            canonical[group][name], given[group, name] = value, key
    return canonical, given


def forked_spec(asked: ForkRequest, origin: ForkOrigin, host: HostLimits) -> JobSpec:
    """The fork's spec: the parent's with the overrides, held against the host again. Raises SpecInvalid."""
    problems = [*_fixed(asked, origin.spec)]
    merged = _merged(asked, origin)
    try:
        spec = validate_spec(merged, host)
    except SpecInvalid as error:
        raise with_problems(SpecInvalid, [*problems, *_repointed(error, asked, problems)]) from None
    if asked.data == "keep":
        problems += [*_other_batch(asked, origin, spec), *_nothing_left(asked, origin, spec)]
    if problems:
        raise with_problems(SpecInvalid, problems)
    return spec


def _merged(asked: ForkRequest, origin: ForkOrigin) -> dict[str, Any]:
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in origin.spec.items()}
    merged["name"] = f"{merged['name']}-fork-{origin.step}"[:MAX_NAME]
    merged["training"]["from_weight"] = None
    merged["checkpoint"]["from_resume"] = False
    for name, value in asked.overrides.items():
        old = merged.get(name)
        merged[name] = (
            {**old, **value} if name in GROUPS and isinstance(value, dict) and isinstance(old, dict) else value
        )
    return merged


def _fixed(asked: ForkRequest, parent: Mapping[str, Any]) -> Iterator[Problem]:
    """What was asked to be another one and cannot."""
    for group, leaves in asked.overrides.items():
        for leaf, value in leaves.items() if group in GROUPS and isinstance(leaves, dict) else ():
            why = _why_fixed(group, leaf, asked.data)
            if why is not None and leaf in GROUPS[group] and value != parent[group].get(leaf):
                yield Problem(asked.pointer(group, leaf), why)


def _why_fixed(group: str, leaf: str, data: str) -> str | None:
    if (group, leaf) in (("training", "from_weight"), ("checkpoint", "from_resume")):
        return "cannot be given: a fork begins at its parent's checkpoint"
    if (group, leaf) == ("data", "tokenizer_path") or (group == "model" and leaf not in CHANGEABLE_FIELDS):
        return "cannot be changed: the parent's weights were trained with it"
    if data == "keep" and (group == "model" or leaf in ORDER.get(group, ())):
        return 'cannot be changed where the parent\'s run is kept: data "restart" allows it'
    return None


def _repointed(error: SpecInvalid, asked: ForkRequest, known: list[Problem]) -> Iterator[Problem]:
    """The host's problems, but for those of fields that are refused anyway."""
    refused = {problem.pointer for problem in known}
    for found in error.extra["errors"]:
        parts = found["pointer"].split("/")[1:]
        pointer = f"/overrides{found['pointer']}"
        if len(parts) > 1 and (parts[0], parts[1]) in asked.client_names:
            pointer = asked.pointer(parts[0], parts[1]) + "".join(f"/{part}" for part in parts[2:])
        if pointer not in refused:
            yield Problem(pointer, found["message"])


def _other_batch(asked: ForkRequest, origin: ForkOrigin, spec: JobSpec) -> Iterator[Problem]:
    """Each step keeps the rows it has in the parent, so what makes up a batch must come to the same."""
    leaves = asked.overrides.get("training", {})
    named = next((leaf for leaf in BATCH if leaf in leaves), None)
    if named is not None and spec.rows_per_step != origin.rows_per_step:
        message = (
            f"batch_size x accumulation_steps x ranks must stay {origin.rows_per_step}, so that each step has the samples it "
            'has in the parent; data "restart" allows another batch'
        )
        yield Problem(asked.pointer("training", named), message)


def _nothing_left(asked: ForkRequest, origin: ForkOrigin, spec: JobSpec) -> Iterator[Problem]:
    training, done = spec.training, origin.step - origin.base_step
    leaf, steps = "max_steps", training.max_steps
    if steps is None and origin.steps_per_epoch:
        leaf, steps = "epochs", training.epochs * origin.steps_per_epoch
    if steps is not None and steps <= done:
        message = f"must be more: {steps:,} steps are all done at the checkpoint of step {origin.step:,}"
        yield Problem(asked.pointer("training", leaf), message)
