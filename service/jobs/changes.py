"""Bodies of resume and PATCH: read strictly, put into the job's spec, and looked at as a whole again."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from contract.parsing import Problem, pointer_to, printable
from contract.report import RUN_SETTINGS
from contract.spec import JobSpec
from service.errors import RequestInvalid, SpecInvalid, with_problems
from service.jobs.specs import Host, accept

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


Check = Callable[[Mapping[str, Any]], Iterator[Problem]]
"""Looks a body over for mistakes of one kind."""


def read(body: object, fields: Mapping[str, tuple[str, ...]], *checks: Check) -> dict[str, Any]:
    """The body's members, all of them known and passed by ``checks``. Raises RequestInvalid with all mistakes."""
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise with_problems(RequestInvalid, [Problem("", "must be a JSON object")])
    there = f"those here are {', '.join(fields)}" if fields else "there are none here"
    problems = [Problem(pointer_to(printable(name)), f"is not a field; {there}") for name in body if name not in fields]
    problems += [problem for mistakes in checks for problem in mistakes(body)]
    if problems:
        raise with_problems(RequestInvalid, problems)
    return body


def no_step(body: Mapping[str, Any]) -> Iterator[Problem]:
    """A ``step`` that is none."""
    step = body.get("step")
    if step is not None and (type(step) is not int or not 0 <= step <= LARGEST):
        yield Problem("/step", "must be a whole number, 0 or more")


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
