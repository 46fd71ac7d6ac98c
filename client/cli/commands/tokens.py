"""`trainyard token create|list|limit|rotate|revoke`: the named tokens of the service."""

import re
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from trainyard.client.cli.commands.show import connect
from trainyard.client.cli.console import Console
from trainyard.client.cli.formatting import ago, count, local_time, table
from trainyard.client.exit_codes import Exit, UsageError
from trainyard.client.types import NewToken

TIME = re.compile(r"([0-9]{1,9})(s|m|min|h|d)?")
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, option: str) -> int:
    """Return 90 for "90" or "90s", and 3600 for "1h". Raises UsageError, with the name of the option."""
    match = TIME.fullmatch(text.strip().lower())
    if match is None:
        raise UsageError(f"{option} takes a number with s, min, h or d, such as 12h, not {text!r}")
    return int(match.group(1)) * UNITS[match.group(2) or "s"]


def create(args: SimpleNamespace, console: Console) -> int:
    quotas = {"max_jobs": args.max_jobs, "max_devices": args.max_devices}
    with connect(args) as trainyard:
        token = trainyard.create_token(args.name, args.scope, expires_in=_lifetime(args), **quotas)
    return _print_secret(token, args, console)


def rotate(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        token = trainyard.rotate_token(
            args.name, overlap=parse_duration(args.overlap, "--overlap"), expires_in=_lifetime(args)
        )
    return _print_secret(token, args, console)


def limit(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        token = trainyard.limit_token(args.name, max_jobs=args.max_jobs, max_devices=args.max_devices)
    if args.json:
        console.json(token)
    else:
        console.data(f"{token['name']} jobs {_usage('jobs', token)} devices {_usage('devices', token)}")
    return Exit.SUCCEEDED


def revoke(args: SimpleNamespace, console: Console) -> int:
    if not console.require_consent(f"Revoke the token {args.name} for good?", args.yes):
        console.error("nothing was revoked")
        return Exit.REJECTED
    with connect(args) as trainyard:
        trainyard.revoke_token(args.name)
    if args.json:
        console.json({"name": args.name, "revoked": True})
    else:
        console.error(f"revoked {args.name}; its jobs continue")
    return Exit.SUCCEEDED


def list_tokens(args: SimpleNamespace, console: Console) -> int:
    with connect(args) as trainyard:
        tokens = trainyard.tokens()
    if args.json:
        console.json_list(tokens)
        return Exit.SUCCEEDED
    if not tokens:
        console.error("no named tokens; create one:  trainyard token create NAME --scope submit")
        return Exit.SUCCEEDED
    now = trainyard.server_time
    header = ("NAME", "SCOPE", "JOBS", "DEVICES", "CREATED", "LAST USED", "STATUS")
    console.lines(table(header, [_row(token, now) for token in tokens]))
    return Exit.SUCCEEDED


def _row(token: Any, now: datetime) -> tuple[str, ...]:
    times = (ago(token["created_at"], now), ago(token.get("last_used_at"), now))
    usage = (_usage("jobs", token), _usage("devices", token))
    return (token["name"], token["scope"], *usage, *times, _status(token, now))


def _usage(resource: str, token: Any) -> str:
    limit = token.get(f"max_{resource}")
    return count(token[resource]) + (f" of {count(limit)}" if limit is not None else "")


def _status(token: Any, now: datetime) -> str:
    if token.get("revoked_at"):
        return "revoked"
    expires = local_time(token.get("expires_at"))
    if expires is None:
        return "valid"
    return "expired" if expires <= now else f"valid until {token['expires_at']}"


def _lifetime(args: SimpleNamespace) -> int | None:
    return None if args.expires_in is None else parse_duration(args.expires_in, "--expires-in")


def _print_secret(token: NewToken, args: SimpleNamespace, console: Console) -> int:
    if args.json:
        console.json(token)
        return Exit.SUCCEEDED
    # The secret alone goes to stdout, so that it can be piped into a file.
    console.data(token["token"])
    until = token.get("expires_at")
    validity = f"valid until {until}" if until else "without expiry"
    console.error(f"{token['name']}, scope {token['scope']}, {validity}")
    if token.get("previous_until"):
        console.error(f"the previous secret stays valid until {token['previous_until']}")
    console.error("store it now: it is not shown again. Use it as TRAINYARD_TOKEN or --token")
    return Exit.SUCCEEDED
