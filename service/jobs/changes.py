"""Bodies of resume and PATCH: put into the job's spec, which is then checked as a whole again."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SkipValidation

from trainyard.contract.parsing import Problem, pointer_to
from trainyard.contract.reference import NOTES
from trainyard.contract.report import RUN_SETTINGS
from trainyard.contract.spec import CheckpointSpec, JobSpec, ReportingSpec, ResourcesSpec, TrainingSpec
from trainyard.contract.units import UNITS
from trainyard.service.bodies import OptionalBody, without_defaults
from trainyard.service.errors import SpecInvalid, with_problems
from trainyard.service.jobs.specs import Host, accept

LARGEST = 2**53 - 1

RESUME_FIELDS: dict[str, tuple[str, ...]] = {
    "epochs": ("training", "epochs"),
    "max_steps": ("training", "max_steps"),
    "resources": ("resources",),
    "step": (),
}
PATCH_FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "labels": ("labels",),
    "priority": ("resources", "priority"),
    **RUN_SETTINGS,
}
"""Name in the body -> place in the spec."""


def _as_in(group: type[BaseModel], leaf: str) -> Any:
    """Return a field that takes any value, described as in the job spec."""
    schema = group.model_json_schema()["properties"][leaf]

    def describe(found: dict[str, Any]) -> None:
        found.clear()
        found.update(schema)
        found.setdefault("description", NOTES.get(leaf, ""))
        found |= {"x-unit": UNITS[leaf]} if leaf in UNITS else {}

    return Field(default=None, json_schema_extra=describe)


class PatchJobBody(OptionalBody):
    """What is to change of a job. `changed_spec` checks the values, as part of the whole spec."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    name: Any = _as_in(JobSpec, "name")
    labels: Any = _as_in(JobSpec, "labels")
    priority: Any = _as_in(ResourcesSpec, "priority")
    log_interval: Any = _as_in(ReportingSpec, "log_interval")
    save_interval: Any = _as_in(CheckpointSpec, "save_interval")
    keep_last: Any = _as_in(CheckpointSpec, "keep_last")


class ResumeBody(OptionalBody):
    """What is to change as the run continues; ``step``: at which checkpoint, the newest if None."""

    model_config = ConfigDict(json_schema_extra=without_defaults)

    epochs: Any = _as_in(TrainingSpec, "epochs")
    max_steps: Any = _as_in(TrainingSpec, "max_steps")
    resources: SkipValidation[ResourcesSpec] = Field(default_factory=ResourcesSpec)
    step: Annotated[int, Field(ge=0, le=LARGEST)] | None = None


def resumed_spec(spec: dict[str, Any], steps: int | None, changes: Mapping[str, Any], host: Host) -> JobSpec:
    """The spec with the changes of a resume; epochs and max_steps may only grow. ``steps``: the run's, where known."""
    before = {"epochs": spec["training"]["epochs"], "max_steps": spec["training"]["max_steps"] or steps}
    problems = [
        Problem(f"/{name}", f"may only be raised: it is {old:,}" if old is not None else "may only be raised")
        for name, old in before.items()
        if name in changes and _lowered(old, changes[name])
    ]
    try:
        resumed = changed_spec(spec, changes, RESUME_FIELDS, host)
    except SpecInvalid as error:
        known = {problem.pointer for problem in problems}
        others = [Problem(e["pointer"], e["message"]) for e in error.extra["errors"] if e["pointer"] not in known]
        raise with_problems(SpecInvalid, [*problems, *others]) from None
    if problems:
        raise with_problems(SpecInvalid, problems)
    return resumed


def _lowered(old: int | None, new: object) -> bool:
    return new is None or (old is not None and type(new) is int and new < old)


def changed_spec(
    spec: dict[str, Any], changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]], host: Host
) -> JobSpec:
    """``spec`` with ``changes`` in their places, held against the host again. Pointers are those of the body."""
    merged = {group: dict(value) if isinstance(value, dict) else value for group, value in spec.items()}
    for name, value in changes.items():
        place = fields[name]
        if len(place) == 1:
            old = merged[place[0]]
            keep = place[0] == "resources" and isinstance(value, dict)
            merged[place[0]] = {**old, **value} if keep else value
        elif place:
            merged[place[0]][place[1]] = value
    try:
        return accept(merged, host)
    except SpecInvalid as error:
        raise _repointed(error, changes, fields) from None


def _repointed(error: SpecInvalid, changes: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]]) -> Exception:
    ours = {pointer_to(*fields[name]): pointer_to(name) for name in changes if fields[name]}
    problems = []
    for found in error.extra["errors"]:
        pointer = found["pointer"]
        place = next((place for place in ours if pointer == place or pointer.startswith(place + "/")), None)
        if place is not None:
            pointer = ours[place] + pointer[len(place) :]
        problems.append(Problem(pointer, found["message"]))
    return with_problems(SpecInvalid, problems)
