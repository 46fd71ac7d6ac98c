"""The parts of `squeue --json` that the launcher needs. Its format differs between Slurm's releases."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainyard.service.launch.base import AttemptPlacement

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

NO_REASON = "its next scheduling cycle"  # Slurm has not considered the job yet
BOOTING = "its nodes, which are booting"


@dataclass(frozen=True)
class SlurmJob:
    """One submission. ``gpus``: the indices of the GPUs on each node of ``nodes``, in the same order."""

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
        """Whether nothing of it has started yet."""
        return self.state in PENDING and not self.completing

    @property
    def ended(self) -> bool:
        """Whether nothing of it is alive, according to Slurm."""
        return self.state in ENDED and not self.completing

    def placement(self, ranks: int, tailed: bool = False) -> AttemptPlacement:
        """Return the placement as the API shows it, for ``ranks`` on each node."""
        no_reason = BOOTING if self.state == CONFIGURING else NO_REASON
        waiting = f"Slurm: {self.reason or no_reason}" if self.pending else None
        return AttemptPlacement(self.id, self.state.lower(), waiting, self.nodes, tuple(self._devices(ranks)), tailed)

    def _devices(self, ranks: int) -> Iterator[str]:
        for index, node in enumerate(self.nodes):
            gpus = self.gpus[index] if index < len(self.gpus) else ()
            yield from (f"{node}/cuda:{index}" for index in gpus)
            if not gpus:
                yield from (f"{node}/cpu:{index}" for index in range(ranks))


def parse_squeue(text: str, prefix: str) -> list[SlurmJob]:
    """Return the jobs whose names start with ``prefix``. Raises ValueError if ``text`` is not squeue's JSON.

    The service's own jobs must be understood completely. The names of other jobs may contain any characters.
    """
    try:
        found = json.loads(text, strict=False)["jobs"]
        return [_job(each) for each in found if str(each.get("name")).startswith(prefix)]
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"the output of squeue is not understood: {type(error).__name__}: {error}") from error


def _job(fields: dict[str, Any]) -> SlurmJob:
    states = _states(fields["job_state"])
    comment = fields.get("comment") or ""
    reason = fields.get("state_description") or fields.get("state_reason")
    return SlurmJob(
        id=_job_number(fields["job_id"]),
        name=str(fields["name"]),
        comment=str(comment),
        state=CONFIGURING if CONFIGURING in states else next((w for w in states if w != COMPLETING), COMPLETING),
        completing=COMPLETING in states,
        reason=str(reason) if reason and reason != "None" else None,
        nodes=tuple(expand_hostlist(fields.get("nodes") or "")),
        gpus=tuple(_gpu_indices(detail) for detail in fields.get("gres_detail") or ()),
    )


def _states(state: str | Sequence[str]) -> list[str]:
    # One word in older releases, a list of the state and its flags in newer ones.
    return [state] if isinstance(state, str) else [str(word) for word in state]


def _job_number(value: object) -> str:
    # A plain number, or in newer releases {"set": ..., "infinite": ..., "number": ...}.
    if isinstance(value, dict):
        value = value["number"] if value["set"] and not value["infinite"] else None
    return str(int(str(value)))


def expand_hostlist(text: str) -> Iterator[str]:
    """Expand a Slurm host list: ``a[1-2,07],b`` gives a1, a2, a07, b."""
    for part in re.split(r",(?![^\[]*\])", text):
        if part:
            yield from _expand(part)


def _expand(part: str) -> Iterator[str]:
    head, bracket, rest = part.partition("[")
    if not bracket:
        yield part
        return
    inside, _, tail = rest.partition("]")
    for part_range in inside.split(","):
        first, _, last = part_range.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{head}{number:0{len(first)}d}{tail}")


def _gpu_indices(detail: str) -> tuple[int, ...]:
    """``gpu:a100:2(IDX:0-1),gpu:h100:1(IDX:3)`` gives 0, 1, 3; resources that are no GPUs give ()."""
    found = re.findall(r"\bgpu\b[^(,]*\(IDX:([0-9,-]+)\)", detail)
    return tuple(int(each) for each in expand_hostlist(f"[{','.join(found)}]")) if found else ()
