"""`trainyard plan`: size, cost and warnings of a run. Nothing is stored and no device is reserved."""

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import UNKNOWN, compact_number, count, duration, fixed, one_line, size, table
from trainyard.client.cli.parser import PLAN
from trainyard.client.cli.spec_flags import differences
from trainyard.client.cli.submission import Submission
from trainyard.client.errors import ApiError, InvalidSpec, NotFound
from trainyard.client.exit_codes import Exit
from trainyard.contract.parsing import parse_spec
from trainyard.contract.units import counted

NOT_ALLOWED = 405
MAX_SETS = 5
"""Held-out sets that are listed."""

MAX_PATHS = 80
"""Characters of the paths of a source."""

NUMBERS = frozenset(range(1, 6))


def plan(args: SimpleNamespace, console: Console) -> int:
    submission = Submission.read(PLAN, args, console)
    with Client(args.url, args.token) as trainyard:
        try:
            if args.depth is not None:
                return _print_proposal(trainyard.propose(args.depth, submission.spec), args, console)
            plan = trainyard.plan(submission.spec)
        except InvalidSpec as error:
            submission.print_rejection(error, console)
            return Exit.REJECTED
    if args.json:
        console.json(plan)
    else:
        console.lines([*changed_settings(submission.spec), *plan_page(plan)])
    return Exit.SUCCEEDED


def _print_proposal(proposal: Mapping[str, Any], args: SimpleNamespace, console: Console) -> int:
    """Print the proposed spec on stdout, and the reasons on stderr, so that the spec can go into a file."""
    if args.json:
        console.json(proposal)
        return Exit.SUCCEEDED
    console.lines(json.dumps(proposal["spec"], indent=2).splitlines())
    for setting in proposal["settings"]:
        source = f" [{setting['source']}]" if setting["source"] else ""
        place = setting["pointer"][1:].replace("/", ".")
        console.error(f"{place:<29} {setting['value']}: {setting['reason']}{source}")
    console.error("next:  trainyard plan --depth ... > spec.json, edit it, then trainyard plan spec.json")
    return Exit.SUCCEEDED


def fetch_plan(trainyard: Client, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the plan of a spec, or {} if the service is an older version without plans."""
    try:
        return trainyard.plan(spec)
    except NotFound:
        return {}
    except ApiError as error:
        if error.status != NOT_ALLOWED:
            raise
        return {}


def plan_preview(trainyard: Client, spec: Mapping[str, Any]) -> list[str]:
    """Return the lines that `submit` shows before it asks: changed settings, and the plan if the service has plans."""
    plan = fetch_plan(trainyard, spec)
    return [*changed_settings(spec), *(plan_page(plan) if plan else [])]


def plan_warnings(trainyard: Client, spec: Mapping[str, Any]) -> list[str]:
    """Return the warnings of the plan, one a line."""
    return _warnings(fetch_plan(trainyard, spec))


def changed_settings(spec: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ from their defaults, one a line."""
    parsed = parse_spec(spec).spec
    lists = {f"data.{leaf}": getattr(parsed.data, leaf) for leaf in ("sources", "eval_sources")}
    lines = ["Changed from defaults:"]
    for place, value in differences(parsed, spec):
        if lists.get(place):
            lines += [f"  {place}", *_source_settings([source.model_dump() for source in lists[place]])]
        else:
            lines.append(f"  {place:<32}{value}")
    return lines


def _source_settings(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the sources in a spec, with the columns that one of them has a value for."""
    columns = [name for name in sources[0] if any(source[name] is not None for source in sources)]
    rows = [[_setting(source[name]) for name in columns] for source in sources]
    return [f"    {line}" for line in table(columns, rows)]


def _setting(value: object) -> str:
    texts = value if isinstance(value, list) else [value]
    return one_line(", ".join("" if text is None else str(text) for text in texts), MAX_PATHS)


def plan_page(plan: Mapping[str, Any]) -> list[str]:
    """Return a plan as text, one fact a line."""
    facts = {
        "model": _model(plan),
        "corpus": _corpus(plan),
        "document": _separators(plan),
        "held-out": _held_out(plan.get("eval_sets") or []),
        "run": _run(plan),
        "memory": _memory(plan),
        "options": _memory_options(plan),
        "batch": _suggested_batch(plan.get("suggested_batch_size")),
        "disk": _disk(plan),
        "time": _time(plan),
        "queue": _queue(plan.get("queue") or {}),
    }
    lines = ["Plan:", *(f"  {name:<9}{text}" for name, text in facts.items() if text)]
    return [*lines, *_sources(plan.get("sources") or []), *_warnings(plan), *_advice(plan)]


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of what the run reads of each source, if it has several."""
    if len(sources) < 2:
        return []
    rows = [
        [
            one_line(str(source.get("name")), MAX_PATHS),
            count(source.get("files")),
            count(source.get("documents")),
            compact_number(source.get("tokens")),
            UNKNOWN if source.get("share") is None else f"{100 * source['share']:.3g} %",
            fixed(source.get("passes"), 2),
        ]
        for source in sources
    ]
    header = ("source", "files", "documents", "tokens", "share", "passes")
    return [f"  {'' if number else 'sources':<9}{line}" for number, line in enumerate(table(header, rows, NUMBERS))]


def _warnings(plan: Mapping[str, Any]) -> list[str]:
    return [f"  {'warning':<9}{one_line(str(text), 300)}" for text in plan.get("warnings") or []]


def _advice(plan: Mapping[str, Any]) -> list[str]:
    return [f"  {'advice':<9}{one_line(str(text), 300)}" for text in plan.get("advice") or []]


def _model(plan: Mapping[str, Any]) -> str:
    total, active = plan.get("parameters"), plan.get("active_parameters")
    per_token = f", {compact_number(active)} active per token" if active != total else ""
    first = fixed(plan.get("expected_first_loss"))
    return f"{compact_number(total)} parameters{per_token}; an untrained model has a loss of about {first}"


def _corpus(plan: Mapping[str, Any]) -> str:
    if plan.get("tokens") is None:
        return ""
    about = "about " if plan.get("estimated") else ""
    bad = plan.get("bad_lines")
    unreadable = f", {counted(bad, 'bad line')}" if bad else ""
    marks = plan.get("special_tokens")
    special = f", {count(marks)} special tokens in {count(plan.get('special_texts'))} texts" if marks else ""
    return (
        f"{about}{compact_number(plan['tokens'])} tokens, {count(plan.get('samples'))} sequences{special}{unreadable}"
    )


def _held_out(sets: Sequence[Mapping[str, Any]]) -> str:
    texts = [
        f"{each['name']}: {count(each['files'])} {'file' if each['files'] == 1 else 'files'}{_tokens_of(each)}"
        for each in sets[:MAX_SETS]
    ]
    return "; ".join([*texts, *([f"and {len(sets) - MAX_SETS:,} more"] if len(sets) > MAX_SETS else [])])


def _tokens_of(held_out: Mapping[str, Any]) -> str:
    if held_out.get("tokens") is None:
        return ""
    return f", {count(held_out.get('documents'))} documents, {compact_number(held_out['tokens'])} tokens"


def _separators(plan: Mapping[str, Any]) -> str:
    bos, eos = plan.get("bos_token"), plan.get("eos_token")
    if not bos or not eos:
        return ""
    return f"begins with {bos} and ends with {eos}" if bos != eos else f"begins and ends with {bos}"


def _run(plan: Mapping[str, Any]) -> str:
    steps, per_step = plan.get("steps"), plan.get("tokens_per_step")
    if steps is None or per_step is None:
        return "the number of steps is unknown until the corpus is read" if steps is None else counted(steps, "step")
    ranks = f" on {plan['world_size']} {plan.get('device')} ranks" if (plan.get("world_size") or 1) > 1 else ""
    work = f", {plan['flops']:.2g} FLOPs" if plan.get("flops") else ""
    total = f"{compact_number(steps * per_step)} tokens{work}"
    return f"{counted(steps, 'step')} of {compact_number(per_step)} tokens{ranks}: {total}"


def _memory(plan: Mapping[str, Any]) -> str:
    parts = {name: value for name, value in (plan.get("memory_bytes") or {}).items() if value is not None}
    if not parts:
        return ""
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items())
    return f"{size(sum(parts.values()))} per rank ({listed}){_fits(plan, sum(parts.values()))}"


def _suggested_batch(largest: int | None) -> str:
    return f"batch_size {count(largest)} is the largest that fits into the free memory" if largest is not None else ""


def _memory_options(plan: Mapping[str, Any]) -> str:
    """Return the memory per rank with other settings; those that do not fit are marked."""
    texts: dict[str, list[str]] = {}
    for option in plan.get("memory_options") or []:
        total = size(sum(value or 0 for value in option["memory_bytes"].values()))
        checkpointing = "gradient_checkpointing " if option["gradient_checkpointing"] else ""
        too_much = " (does not fit)" if option["fits"] is False else ""
        texts.setdefault(option["parallelism"], []).append(f"{checkpointing}{total}{too_much}")
    if (plan.get("world_size") or 1) == 1:
        texts = {name: listed for name, listed in texts.items() if name == "ddp"}
    return "; ".join(f"{name} {', with '.join(listed)}" for name, listed in texts.items())


def _fits(plan: Mapping[str, Any], per_rank: int) -> str:
    limit = plan.get("memory_limit_bytes")
    if not limit:
        return ""
    cpu = plan.get("device") == "cpu"
    # Ranks on CPUs share the host's memory with the copy that a checkpoint is written from. A GPU has one rank.
    ranks = plan.get("world_size") or 1
    needed = per_rank * ranks + (plan.get("snapshot_bytes") or 0) if cpu else per_rank
    owner = "this host" if cpu else "the device"
    whole = f"{size(needed)} {f'for {ranks} ranks and' if ranks > 1 else 'with'} the copy of a save: " if cpu else ""
    return f"; {whole}{'fits in' if needed <= limit else 'DOES NOT FIT in'} the {size(limit)} of {owner}"


def _disk(plan: Mapping[str, Any]) -> str:
    one, free = plan.get("checkpoint_bytes"), plan.get("disk_free_bytes")
    room = f", room for {count(free // one)}" if one and free else ""
    return f"{size(one)} per checkpoint, {size(free)} free{room}"


def _time(plan: Mapping[str, Any]) -> str:
    if plan.get("eta_seconds") is None:
        return "unknown: no similar run yet, and no free device was measured"
    return f"about {duration(plan['eta_seconds'])}, by {plan.get('eta_basis')}"


def _queue(queue: Mapping[str, Any]) -> str:
    if not queue.get("position"):
        return ""
    waiting_for = str(queue.get("waiting_for"))
    # The service says "nothing: ..." if the run would not wait.
    state = "would start immediately" if waiting_for.startswith("nothing") else f"waiting for {waiting_for}"
    return f"position {queue['position']}, {state}"
