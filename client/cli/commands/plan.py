"""`trainyard plan`: what a run would be, before anything is stored or taken."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import (
    compact_number,
    count,
    duration,
    fixed,
    one_line,
    size,
)
from trainyard.client.cli.parser import PLAN
from trainyard.client.cli.spec_flags import differences
from trainyard.client.cli.submission import Submission
from trainyard.client.errors import ApiError, InvalidSpec, NotFound
from trainyard.client.exit_codes import Exit
from trainyard.contract.parsing import parse_spec

NOT_ALLOWED = 405


def plan(args: SimpleNamespace, console: Console) -> int:
    """Show the plan of a spec file, of MiniMind's flags, or of both."""
    asked = Submission.read(PLAN, args, console)
    with Client(args.url, args.token) as trainyard:
        try:
            found = trainyard.plan(asked.spec)
        except InvalidSpec as error:
            asked.error_text(error, console)
            return Exit.REFUSED
    if args.json:
        console.json(found)
    else:
        console.lines([*settings(asked.spec), *plan_page(found)])
    return Exit.SUCCEEDED


def asked_before(trainyard: Client, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The plan of what is to be submitted; {} from a service without plans."""
    try:
        return trainyard.plan(spec)
    except NotFound:
        return {}
    except ApiError as error:
        if error.status != NOT_ALLOWED:
            raise
        return {}


def shown_before(trainyard: Client, spec: Mapping[str, Any]) -> list[str]:
    """What `submit` shows before it asks. A service without plans gets only the settings shown."""
    found = asked_before(trainyard, spec)
    return [*settings(spec), *(plan_page(found) if found else [])]


def warned_before(trainyard: Client, spec: Mapping[str, Any]) -> list[str]:
    """What the plan warns of, a line each."""
    return _warned(asked_before(trainyard, spec))


def settings(spec: Mapping[str, Any]) -> list[str]:
    """What differs from the defaults."""
    changed = differences(parse_spec(spec).spec, spec)
    return ["not as by default:", *(f"  {place:<32}{value}" for place, value in changed)]


def plan_page(plan: Mapping[str, Any]) -> list[str]:
    """The plan for people, a fact a line. Pure."""
    facts = {
        "model": _model(plan),
        "corpus": _corpus(plan),
        "run": _run(plan),
        "memory": _memory(plan),
        "disk": _disk(plan),
        "time": _time(plan),
        "queue": _queue(plan.get("queue") or {}),
    }
    return ["what it would be:", *(f"  {name:<9}{text}" for name, text in facts.items() if text), *_warned(plan)]


def _warned(plan: Mapping[str, Any]) -> list[str]:
    return [f"  {'warning':<9}{one_line(str(text), 300)}" for text in plan.get("warnings") or []]


def _model(plan: Mapping[str, Any]) -> str:
    all_of_them, active = plan.get("parameters"), plan.get("active_parameters")
    used = f", {compact_number(active)} of them for a token" if active != all_of_them else ""
    first = fixed(plan.get("expected_first_loss"))
    return f"{compact_number(all_of_them)} parameters{used}; an untrained one has a loss of {first}"


def _corpus(plan: Mapping[str, Any]) -> str:
    if plan.get("tokens") is None:
        return ""
    about = "about " if plan.get("estimated") else ""
    bad = plan.get("bad_lines")
    unreadable = f", {count(bad)} bad lines" if bad else ""
    return f"{about}{compact_number(plan['tokens'])} tokens, {count(plan.get('samples'))} rows{unreadable}"


def _run(plan: Mapping[str, Any]) -> str:
    steps, per_step = plan.get("steps"), plan.get("tokens_per_step")
    if steps is None or per_step is None:
        return "steps are not known before the corpus is read" if steps is None else f"{count(steps)} steps"
    ranks = f" on {plan['world_size']} {plan.get('device')} ranks" if (plan.get("world_size") or 1) > 1 else ""
    work = f", {plan['flops']:.2g} FLOPs" if plan.get("flops") else ""
    return f"{count(steps)} steps of {compact_number(per_step)} tokens{ranks}: {compact_number(steps * per_step)} tokens{work}"


def _memory(plan: Mapping[str, Any]) -> str:
    parts = {name: value for name, value in (plan.get("memory_bytes") or {}).items() if value is not None}
    if not parts:
        return ""
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return f"{size(sum(parts.values()))} a rank ({listed}){_fits(plan, sum(parts.values()))}"


def _fits(plan: Mapping[str, Any], of_a_rank: int) -> str:
    """Ranks on CPUs share the host's memory, with the copy that saves are written from; a GPU has one rank."""
    limit = plan.get("memory_limit_bytes")
    if not limit:
        return ""
    cpu = plan.get("device") == "cpu"
    needed = of_a_rank * (plan.get("world_size") or 1) + (plan.get("snapshot_bytes") or 0) if cpu else of_a_rank
    whose = "this host" if cpu else "the device"
    return f"; {'fits in' if needed <= limit else 'DOES NOT FIT in'} the {size(limit)} of {whose}"


def _disk(plan: Mapping[str, Any]) -> str:
    one, free = plan.get("checkpoint_bytes"), plan.get("disk_free_bytes")
    room = f", room for {count(free // one)}" if one and free else ""
    return f"{size(one)} a checkpoint, {size(free)} free{room}"


def _time(plan: Mapping[str, Any]) -> str:
    if plan.get("eta_seconds") is None:
        return "not known: no run of this shape went on this kind of device yet"
    return f"about {duration(plan['eta_seconds'])}, by {plan.get('eta_basis')}"


def _queue(queue: Mapping[str, Any]) -> str:
    return f"position {queue['position']}, waiting for {queue.get('waiting_for')}" if queue.get("position") else ""
