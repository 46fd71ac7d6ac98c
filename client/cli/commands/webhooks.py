"""`trainyard webhook create|list|show|deliveries|test|redeliver|rotate|enable|disable|delete`: who is told of jobs."""

import json
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import (
    UNKNOWN,
    ago,
    count,
    one_line,
    table,
)
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import Delivery, Webhook

LOOK_SECONDS = 0.2
RULES = {"no_progress": ("minutes", float), "plateau": ("steps", int), "eval_loss_below": ("value", float)}


def rule_in(text: str) -> dict[str, Any]:
    """``nonfinite``, ``no_progress=30``, ``plateau=2000``, ``eval_loss_below=2.5`` as the API has it."""
    kind, equals, value = text.partition("=")
    if kind == "nonfinite" and not equals:
        return {"kind": kind}
    try:
        field, number = RULES[kind]
        return {"kind": kind, field: number(value)}
    except (KeyError, ValueError):
        known = ", ".join(["nonfinite", *(f"{name}={field.upper()}" for name, (field, _) in RULES.items())])
        raise UsageError(f"--rule takes {known}, not {text!r}") from None


def create(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook create`: the secret alone on stdout, so that it can be piped into a file."""
    fields: dict[str, Any] = {"rules": [rule_in(text) for text in args.rule], "labels": _labels(args.label)}
    if args.event:
        fields["events"] = list(args.event)
    if args.description:
        fields["description"] = args.description
    with connect(args) as trainyard:
        if args.job:
            fields["job_id"] = trainyard.find(args.job)["id"]
        made = trainyard.webhooks.create(args.to, **fields)
    return _print_secret(made, args, console)


def _labels(given: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if not all(key and equals for key, equals, _ in pairs):
        raise UsageError("--label takes KEY=VALUE")
    return {key: value for key, _, value in pairs}


def list_webhooks(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook list`."""
    with connect(args) as trainyard:
        found = list(trainyard.webhooks.list())
    if args.json:
        console.json({"object": "list", "data": found, "has_more": False})
    elif not found:
        console.error("no webhooks; make one:  trainyard webhook create https://example.com/hook")
    else:
        rows = [(one["id"], one_line(one["url"], 60), _about(one), standing(one)) for one in found]
        console.lines(table(("ID", "URL", "ABOUT", "STANDING"), rows))
    return Exit.SUCCEEDED


def show(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook show`."""
    with connect(args) as trainyard:
        found = trainyard.webhooks.get(args.webhook)
    if args.json:
        console.json(found)
        return Exit.SUCCEEDED
    now = datetime.now(UTC)
    lines = {
        "webhook": f"{found['id']}  {standing(found)}",
        "url": found["url"],
        "description": found["description"],
        "about": _about(found),
        "events": ", ".join(found["events"]),
        "rules": ", ".join(json.dumps(rule) for rule in found["rules"]),
        "taken": ago(found["succeeded_at"], now) if found["succeeded_at"] else "never yet",
    }
    console.lines(f"{name:<12} {one_line(text, 400)}" for name, text in lines.items() if text)
    return Exit.SUCCEEDED


def standing(webhook: Webhook) -> str:
    """How it is, in a few words."""
    if not webhook["enabled"]:
        why = webhook["disabled_reason"]
        return f"off: {why}" if why else "off"
    if webhook["failing_since"]:
        return f"failing since {webhook['failing_since']}, {count(webhook['failures'])} tries"
    return "good"


def _about(webhook: Webhook) -> str:
    labels = [f"{key}={value}" for key, value in webhook["labels"].items()]
    return " ".join([webhook["job_id"] or "all jobs", *labels])


def deliveries(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook deliveries`."""
    with connect(args) as trainyard:
        found = list(trainyard.webhooks.deliveries(args.webhook, state=args.state, limit=args.limit))
    if args.json:
        console.json({"object": "list", "data": found, "has_more": False})
    else:
        header = ("ID", "TYPE", "JOB", "STATE", "TRIES", "LAST", "CREATED")
        now = datetime.now(UTC)
        console.lines(table(header, [_row(one, now) for one in found], right=frozenset({4})))
    return Exit.SUCCEEDED


def _row(found: Delivery, now: datetime) -> tuple[str, ...]:
    tries = count(found["attempts"])
    times = (outcome(found), ago(found["created_at"], now))
    return (found["id"], found["type"], found["job_id"] or UNKNOWN, found["state"], tries, *times)


def outcome(delivery: Delivery) -> str:
    """What came of the last try: "204 in 31 ms"."""
    if not delivery["tries"]:
        return UNKNOWN
    last = delivery["tries"][-1]
    said = " ".join(str(part) for part in (last["status"], last["error"]) if part is not None)
    return one_line(f"{said} in {1000 * last['seconds']:,.0f} ms", 100)


def test(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook test`: waits for what comes of it; 1 where the receiver did not take it."""
    with connect(args) as trainyard:
        found = _settled(trainyard, trainyard.webhooks.test(args.webhook), args.timeout)
    if args.json:
        console.json(found)
    elif found["state"] == "pending":
        console.error("nothing was sent yet: is a server with a scheduler running?")
    else:
        console.data(f"{found['state']}: {outcome(found)}")
    return Exit.SUCCEEDED if found["state"] == "delivered" else Exit.REFUSED


def _settled(trainyard: Client, delivery: Delivery, seconds: float) -> Delivery:
    deadline = time.monotonic() + seconds
    while delivery["state"] == "pending" and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        delivery = trainyard.webhooks.delivery(delivery["webhook_id"], delivery["id"])
    return delivery


def redeliver(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook redeliver`."""
    with connect(args) as trainyard:
        found = trainyard.webhooks.redeliver(args.webhook, args.delivery)
    if args.json:
        console.json(found)
    else:
        console.error(f"{found['event_id']} is sent again as delivery {found['id']}")
    return Exit.SUCCEEDED


def rotate(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook rotate`."""
    with connect(args) as trainyard:
        made = trainyard.webhooks.rotate(args.webhook)
    return _print_secret(made, args, console)


def enable(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook enable`."""
    return _switch(args, console, enabled=True)


def disable(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook disable`."""
    return _switch(args, console, enabled=False)


def _switch(args: SimpleNamespace, console: Console, *, enabled: bool) -> int:
    with connect(args) as trainyard:
        found = trainyard.webhooks.change(args.webhook, enabled=enabled)
    if args.json:
        console.json(found)
    else:
        console.error(f"{found['id']} is {standing(found)}")
    return Exit.SUCCEEDED


def delete(args: SimpleNamespace, console: Console) -> int:
    """`trainyard webhook delete`."""
    if not args.yes and console.interactive and not console.confirm(f"delete {args.webhook}, with its log?"):
        return Exit.REFUSED
    with connect(args) as trainyard:
        trainyard.webhooks.delete(args.webhook)
    if args.json:
        console.json({"id": args.webhook, "deleted": True})
    else:
        console.error(f"deleted {args.webhook}")
    return Exit.SUCCEEDED


def _print_secret(made: Webhook, args: SimpleNamespace, console: Console) -> int:
    if args.json:
        console.json(made)
        return Exit.SUCCEEDED
    console.data(made["secret"])
    console.error(f"{made['id']} signs with it. Keep it now: it is not shown again")
    if made["old_secret_until"]:
        console.error(f"the one before signs as well until {made['old_secret_until']}")
    console.error(f"try it:  trainyard webhook test {made['id']}")
    return Exit.SUCCEEDED
