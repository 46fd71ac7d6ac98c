"""The text of a notice: what a chat or a mailbox gets in place of the signed JSON. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trainyard.contract.status import JobStatus

Level = Literal["info", "success", "warning", "failure"]

MAX_SENTENCE = 600
LEVELS: Mapping[str, Level] = {
    f"job.{JobStatus.SUCCEEDED}": "success",
    f"job.{JobStatus.FAILED}": "failure",
    f"job.{JobStatus.INTERRUPTED}": "warning",
    "job.warning": "warning",
}
TITLES = {
    "job.created": "{name} was submitted",
    "job.checkpoint": "{name} saved a checkpoint",
    "job.warning": "{name}: warning",
    f"job.{JobStatus.SUCCEEDED}": "{name} succeeded",
    f"job.{JobStatus.FAILED}": "{name} failed",
}
MENTION = re.compile(r"([@<])")


@dataclass(frozen=True)
class Notice:
    """A short plain text about one event. ``level`` selects a colour or an icon, if the service has any."""

    title: str
    body: str
    level: Level


def notice(payload: Mapping[str, Any], public_url: str | None) -> Notice:
    """Return the text of a delivery's ``payload``: the job's sentence, the reason, and a link below ``public_url``."""
    kind, job, event = payload["type"], payload["data"]["job"], payload["data"]["event"]
    if job is None or event is None:
        link = [public_url] if public_url is not None else []
        return Notice("Trainyard: test", "\n".join(["Notices from Trainyard arrive here.", *link]), "info")
    card = job["error"] or {}
    lines = [
        _sentence(event["message"] or job["message"] or kind, card.get("hint")),
        _progress(job["progress"]),
        f"Reason: {job['reason']}." if job["reason"] else "",
        f"{public_url}/jobs/{job['id']}" if public_url is not None else f"Job: {job['id']}",
    ]
    return Notice(_title(kind, job), "\n".join(filter(None, lines)), _level(kind))


def _title(kind: str, job: Mapping[str, Any]) -> str:
    name = _plain(job["name"] or job["id"])
    if kind.startswith("rule."):
        return f"{name}: alert {kind.removeprefix('rule.')}"
    return TITLES.get(kind, "{name} is " + kind.removeprefix("job.")).format_map({"name": name})


def _level(kind: str) -> Level:
    return "warning" if kind.startswith("rule.") else LEVELS.get(kind, "info")


def _sentence(message: str, hint: str | None) -> str:
    sentence = _plain(message).rstrip(".")
    return f"{sentence[:1].upper()}{sentence[1:]}." + (f" {_plain(hint)}" if hint else "")


def _progress(progress: Mapping[str, Any]) -> str:
    if not progress["step"]:
        return ""
    steps = f" of {progress['steps']:,}" if progress["steps"] else ""
    loss = f", loss {progress['loss']:.3f}" if progress["loss"] is not None else ""
    return f"Step {progress['step']:,}{steps}{loss}."


def _plain(text: str) -> str:
    # One line, and no mention: a job's name such as "@everyone" or "<!channel>" would otherwise notify a whole team. A
    # zero-width space after the sign is not seen, and no chat takes it for a mention.
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return MENTION.sub("\\1\u200b", line if len(line) <= MAX_SENTENCE else line[: MAX_SENTENCE - 1] + "…")
