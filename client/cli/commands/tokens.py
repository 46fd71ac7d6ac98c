"""`trainyard token create|list|limit|rotate|revoke`: who may do what."""

import re
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import (
    ago,
    count,
    local_time,
    table,
)
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import NewToken

TIME = re.compile(r"([0-9]{1,9})(s|m|min|h|d)?")
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def seconds_in(text: str) -> int:
    """90 of "90" or "90s", 3600 of "1h". Raises UsageError."""
    match = TIME.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"a time is a number with s, min, h or d, such as 12h, and not {text!r}")
    return int(match.group(1)) * UNITS[match.group(2) or "s"]


def create(args: SimpleNamespace, console: Console) -> int:
    """`trainyard token create`: the secret alone on stdout, so that it can be piped into a file."""
    quotas = {"max_jobs": args.max_jobs, "max_devices": args.max_devices}
    with connect(args) as trainyard:
        made = trainyard.create_token(args.name, args.scope, expires_in=_lifetime(args), **quotas)
    return _print_secret(made, args, console)


def rotate(args: SimpleNamespace, console: Console) -> int:
    """`trainyard token rotate`."""
    with connect(args) as trainyard:
        made = trainyard.rotate_token(args.name, overlap=seconds_in(args.overlap), expires_in=_lifetime(args))
    return _print_secret(made, args, console)


def limit(args: SimpleNamespace, console: Console) -> int:
    """`trainyard token limit`."""
    with connect(args) as trainyard:
        found = trainyard.limit_token(args.name, max_jobs=args.max_jobs, max_devices=args.max_devices)
    if args.json:
        console.json(found)
    else:
        console.data(f"{found['name']} jobs {_of('jobs', found)} devices {_of('devices', found)}")
    return Exit.SUCCEEDED


def revoke(args: SimpleNamespace, console: Console) -> int:
    """`trainyard token revoke`."""
    with connect(args) as trainyard:
        trainyard.revoke_token(args.name)
    if args.json:
        console.json({"name": args.name, "revoked": True})
    else:
        console.error(f"revoked {args.name}; its jobs go on")
    return Exit.SUCCEEDED


def list_tokens(args: SimpleNamespace, console: Console) -> int:
    """`trainyard token list`."""
    with connect(args) as trainyard:
        found = trainyard.tokens()
    if args.json:
        console.json({"object": "list", "data": found, "has_more": False})
        return Exit.SUCCEEDED
    if not found:
        console.error("no named tokens; make one:  trainyard token create NAME --scope submit")
        return Exit.SUCCEEDED
    now = datetime.now(UTC)
    header = ("NAME", "SCOPE", "JOBS", "DEVICES", "CREATED", "LAST USED", "STANDING")
    console.lines(table(header, [_row(token, now) for token in found]))
    return Exit.SUCCEEDED


def _row(token: Any, now: datetime) -> tuple[str, ...]:
    times = (ago(token["created_at"], now), ago(token.get("last_used_at"), now))
    return (token["name"], token["scope"], _of("jobs", token), _of("devices", token), *times, _standing(token, now))


def _of(what: str, token: Any) -> str:
    limit = token.get(f"max_{what}")
    return count(token[what]) + (f" of {count(limit)}" if limit is not None else "")


def _standing(token: Any, now: datetime) -> str:
    if token.get("revoked_at"):
        return "revoked"
    expires = local_time(token.get("expires_at"))
    if expires is None:
        return "good"
    return "expired" if expires <= now else f"good until {token['expires_at']}"


def _lifetime(args: SimpleNamespace) -> int | None:
    return None if args.expires_in is None else seconds_in(args.expires_in)


def _print_secret(made: NewToken, args: SimpleNamespace, console: Console) -> int:
    if args.json:
        console.json(made)
        return Exit.SUCCEEDED
    console.data(made["token"])
    until = made.get("expires_at")
    console.error(f"{made['name']}, scope {made['scope']}, {f'good until {until}' if until else 'it does not expire'}")
    if made.get("previous_until"):
        console.error(f"the one before stays good until {made['previous_until']}")
    console.error("keep it now: it is not shown again. Use it as TRAINYARD_TOKEN or --token")
    return Exit.SUCCEEDED
