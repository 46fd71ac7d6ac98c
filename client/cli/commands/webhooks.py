"""`trainyard webhook create|list|show|deliveries|test|redeliver|rotate|enable|disable|delete`."""

import json
import time
from collections.abc import Iterable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from trainyard.client.api import Client
from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import UNKNOWN, ago, count, one_line, table
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import Delivery, Webhook

POLL_SECONDS = 0.2
RULES = {"no_progress": ("minutes", float), "plateau": ("steps", int), "eval_loss_below": ("value", float)}


def parse_rule(text: str) -> dict[str, Any]:
    """Return ``nonfinite``, ``no_progress=30``, ``plateau=2000`` or ``eval_loss_below=2.5`` as an object of the API."""
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
    fields: dict[str, Any] = {"rules": [parse_rule(text) for text in args.rule], "labels": _labels(args.label)}
    if args.event:
        fields["events"] = list(args.event)
    if args.description:
        fields["description"] = args.description
    # From stdin, a URL with a key is in no shell history and no list of processes.
    url = console.read_stdin().strip() if args.to == "-" else args.to
    with connect(args) as trainyard:
        if args.job:
            fields["job_id"] = trainyard.find(args.job)["id"]
        webhook = trainyard.webhooks.create(url, **fields)
    return _print_secret(webhook, args, console)


def _labels(given: Iterable[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    if not all(key and equals for key, equals, _ in pairs):
        raise UsageError("--label takes KEY=VALUE")
    return {key: value for key, _, value in pairs}


def list_webhooks(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        webhooks = list(trainyard.webhooks.list())
    if args.json:
        console.json_list(webhooks)
    elif not webhooks:
        console.error("no webhooks; create one:  trainyard webhook create https://example.com/hook")
    else:
        rows = [(hook["id"], one_line(hook["url"], 60), _jobs(hook), status(hook)) for hook in webhooks]
        console.lines(table(("ID", "URL", "JOBS", "STATUS"), rows))
    return Exit.SUCCEEDED


def show(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        webhook = trainyard.webhooks.get(args.webhook)
    if args.json:
        console.json(webhook)
        return Exit.SUCCEEDED
    now = trainyard.server_time
    lines = {
        "webhook": f"{webhook['id']}  {status(webhook)}",
        "url": webhook["url"],
        "description": webhook["description"],
        "jobs": _jobs(webhook),
        "events": ", ".join(webhook["events"]),
        "rules": ", ".join(json.dumps(rule) for rule in webhook["rules"]),
        "delivered": ago(webhook["succeeded_at"], now) if webhook["succeeded_at"] else "never",
    }
    console.lines(f"{name:<12} {one_line(text, 400)}" for name, text in lines.items() if text)
    return Exit.SUCCEEDED


def status(webhook: Webhook) -> str:
    """Return whether the webhook is disabled, failing or ok."""
    if not webhook["enabled"]:
        reason = webhook["disabled_reason"]
        return f"disabled: {reason}" if reason else "disabled"
    if webhook["failing_since"]:
        return f"failing since {webhook['failing_since']}, {count(webhook['failures'])} tries"
    return "ok"


def _jobs(webhook: Webhook) -> str:
    labels = [f"{key}={value}" for key, value in webhook["labels"].items()]
    return " ".join([webhook["job_id"] or "all jobs", *labels])


def deliveries(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        rows = list(trainyard.webhooks.deliveries(args.webhook, state=args.state, limit=args.limit))
    if args.json:
        console.json_list(rows)
    else:
        header = ("ID", "TYPE", "JOB", "STATE", "TRIES", "LAST", "CREATED")
        now = trainyard.server_time
        console.lines(table(header, [_row(one, now) for one in rows], right=frozenset({4})))
    return Exit.SUCCEEDED


def _row(delivery: Delivery, now: datetime) -> tuple[str, ...]:
    tries = count(delivery["attempts"])
    last = (last_try(delivery), ago(delivery["created_at"], now))
    return (delivery["id"], delivery["type"], delivery["job_id"] or UNKNOWN, delivery["state"], tries, *last)


def last_try(delivery: Delivery) -> str:
    """Return the result of the last try, e.g. "204 in 31 ms"."""
    if not delivery["tries"]:
        return UNKNOWN
    last = delivery["tries"][-1]
    result = " ".join(str(part) for part in (last["status"], last["error"]) if part is not None)
    return one_line(f"{result} in {1000 * last['seconds']:,.0f} ms", 100)


def test(args: SimpleNamespace, console: Console) -> int:
    """Send a test event and wait for its result. The exit code is 1 if it was not delivered."""
    with connect(args) as trainyard:
        delivery = _wait(trainyard, trainyard.webhooks.test(args.webhook), args.timeout)
    if args.json:
        console.json(delivery)
    elif delivery["state"] == "pending":
        console.error("not sent yet: is a service with a scheduler running?")
    else:
        console.data(f"{delivery['state']}: {last_try(delivery)}")
    return Exit.SUCCEEDED if delivery["state"] == "delivered" else Exit.REJECTED


def _wait(trainyard: Client, delivery: Delivery, seconds: float) -> Delivery:
    deadline = time.monotonic() + seconds
    while delivery["state"] == "pending" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        delivery = trainyard.webhooks.delivery(delivery["webhook_id"], delivery["id"])
    return delivery


def redeliver(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        delivery = trainyard.webhooks.redeliver(args.webhook, args.delivery)
    if args.json:
        console.json(delivery)
    else:
        console.error(f"{delivery['event_id']} will be sent again as delivery {delivery['id']}")
    return Exit.SUCCEEDED


def rotate(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        webhook = trainyard.webhooks.rotate(args.webhook)
    return _print_secret(webhook, args, console)


def enable(args: SimpleNamespace, console: Console) -> int:
    return _switch(args, console, enabled=True)


def disable(args: SimpleNamespace, console: Console) -> int:
    return _switch(args, console, enabled=False)


def _switch(args: SimpleNamespace, console: Console, *, enabled: bool) -> int:
    with connect(args) as trainyard:
        webhook = trainyard.webhooks.change(args.webhook, enabled=enabled)
    if args.json:
        console.json(webhook)
    else:
        console.error(f"{webhook['id']} is {status(webhook)}")
    return Exit.SUCCEEDED


def delete(args: SimpleNamespace, console: Console) -> int:
    if not console.require_consent(f"Delete {args.webhook} with its log?", args.yes):
        console.error("nothing was deleted")
        return Exit.REJECTED
    with connect(args) as trainyard:
        trainyard.webhooks.delete(args.webhook)
    if args.json:
        console.json({"id": args.webhook, "deleted": True})
    else:
        console.error(f"deleted {args.webhook}")
    return Exit.SUCCEEDED


def _print_secret(webhook: Webhook, args: SimpleNamespace, console: Console) -> int:
    if args.json:
        console.json(webhook)
        return Exit.SUCCEEDED
    secret = webhook.get("secret")
    if secret is None:
        console.data(webhook["id"])
        console.error(f"{webhook['id']} sends a short text to {webhook['url']}. The URL is not shown again")
        console.error(f"try it:  trainyard webhook test {webhook['id']}")
        return Exit.SUCCEEDED
    # The secret alone goes to stdout, so that it can be piped into a file.
    console.data(secret)
    console.error(f"{webhook['id']} signs with this secret. Store it now: it is not shown again")
    if webhook["old_secret_until"]:
        console.error(f"the previous secret signs as well until {webhook['old_secret_until']}")
    console.error(f"try it:  trainyard webhook test {webhook['id']}")
    return Exit.SUCCEEDED
