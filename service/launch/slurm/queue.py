"""What `squeue --json` says of this service's jobs, as far as we need it; the form changes with Slurm's releases."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.service.launch.base import Placement

PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
ENDED = frozenset(
    {
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
        "OUT_OF_MEMORY",
        "REVOKED",
    }
)
COMPLETING = "COMPLETING"
CONFIGURING = "CONFIGURING"

NEXT_QUERY = "its next look"
"""What a job waits for that Slurm's scheduler has not thought about yet."""
BOOTING = "its nodes, which boot"


@dataclass(frozen=True)
class SlurmJob:
    """One submission. ``gpus``: for each node of ``nodes``, in order, the indices of the GPUs it has there."""

    id: str
    name: str
    comment: str
    state: str
    completing: bool
    reason: str | None
    nodes: tuple[str, ...]
    gpus: tuple[tuple[int, ...], ...]

    @property
    def pending(self) -> bool:
        """Nothing of it was started yet."""
        return self.state in PENDING and not self.completing

    @property
    def ended(self) -> bool:
        """Slurm knows of nothing that lives of it."""
        return self.state in ENDED and not self.completing

    def placement(self, ranks: int, tailed: bool = False) -> Placement:
        """As the API shows it. ``ranks``: on each node."""
        nothing_said = BOOTING if self.state == CONFIGURING else NEXT_QUERY
        waiting = f"Slurm: {self.reason or nothing_said}" if self.pending else None
        return Placement(self.id, self.state.lower(), waiting, self.nodes, tuple(self._devices(ranks)), tailed)

    def _devices(self, ranks: int) -> Iterator[str]:
        for place, node in enumerate(self.nodes):
            gpus = self.gpus[place] if place < len(self.gpus) else ()
            yield from (f"{node}/cuda:{index}" for index in gpus)
            if not gpus:
                yield from (f"{node}/cpu:{index}" for index in range(ranks))


def parse_squeue(text: str, prefix: str) -> list[SlurmJob]:
    """The jobs whose names begin with ``prefix``. Raises ValueError where it is not squeue's JSON.

    What is ours must be understood to the last. What others call their jobs, in whatever characters, does not matter.
    """
    try:
        found = json.loads(text, strict=False)["jobs"]
        return [_job(each) for each in found if str(each.get("name")).startswith(prefix)]
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"squeue said something unknown: {type(error).__name__}: {error}") from error


def _job(said: dict[str, Any]) -> SlurmJob:
    states = _words(said["job_state"])
    comment = said.get("comment") or ""
    reason = said.get("state_description") or said.get("state_reason")
    return SlurmJob(
        id=_number(said["job_id"]),
        name=str(said["name"]),
        comment=str(comment),
        state=CONFIGURING if CONFIGURING in states else next((w for w in states if w != COMPLETING), COMPLETING),
        completing=COMPLETING in states,
        reason=str(reason) if reason and reason != "None" else None,
        nodes=tuple(expand_hostlist(said.get("nodes") or "")),
        gpus=tuple(_indices(detail) for detail in said.get("gres_detail") or ()),
    )


def _words(state: str | Sequence[str]) -> list[str]:
    """One word in older releases, a list of a state and its flags in newer ones."""
    return [state] if isinstance(state, str) else [str(word) for word in state]


def _number(said: object) -> str:
    """A number of a job: plain, or as newer releases write most numbers, with a word on whether it is one."""
    if isinstance(said, dict):
        said = said["number"] if said["set"] and not said["infinite"] else None
    return str(int(str(said)))


def expand_hostlist(text: str) -> Iterator[str]:
    """Slurm's host list spelt out: ``a[1-2,07],b`` is a1, a2, a07, b."""
    for part in re.split(r",(?![^\[]*\])", text):
        if part:
            yield from _spelt_out(part)


def _spelt_out(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, tail = rest.partition("]")
    for piece in inside.split(","):
        first, _, last = piece.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _spelt_out(f"{head}{number:0{len(first)}d}{tail}")


def _indices(detail: str) -> tuple[int, ...]:
    """``gpu:a100:2(IDX:0-1),gpu:h100:1(IDX:3)`` is 0, 1, 3; () for what is no GPU."""
    found = re.findall(r"\bgpu\b[^(,]*\(IDX:([0-9,-]+)\)", detail)
    return tuple(int(each) for each in expand_hostlist(f"[{','.join(found)}]")) if found else ()
