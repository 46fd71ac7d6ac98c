"""How this service uses Slurm: read from the environment with the other settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import ValidationError

from contract.spec import SlurmSpec

Reports = Literal["http", "directory"]
Kind = Literal["cuda", "cpu"]

ALLOWED = (
    "cpus-per-gpu",
    "cpus-per-task",
    "exclude",
    "exclusive",
    "gpu-freq",
    "hint",
    "licenses",
    "mem",
    "mem-per-cpu",
    "mem-per-gpu",
    "nice",
    "nodelist",
    "reservation",
    "switches",
    "tmp",
)
"""Options of sbatch that a spec may give where the service does not say otherwise: none of them runs anything."""

OURS = frozenset(
    {
        "array",
        "batch",
        "begin",
        "chdir",
        "cluster-constraint",
        "clusters",
        "comment",
        "dependency",
        "error",
        "export",
        "export-file",
        "get-user-env",
        "gid",
        "help",
        "hold",
        "input",
        "job-name",
        "kill-on-invalid-dep",
        "no-kill",
        "no-requeue",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "parsable",
        "propagate",
        "quiet",
        "requeue",
        "signal",
        "test-only",
        "uid",
        "usage",
        "version",
        "wait",
        "wrap",
    }
)
"""Options that the launcher relies on, or by which a job would be another user's: never anybody else's to give."""


@dataclass(frozen=True)
class SlurmSetup:
    """``defaults``: what is asked for where a spec is silent. ``device``: what "auto" means on the nodes.

    ``reports``: how agents report, over HTTP to ``url`` (None: where the service listens) or through the run directory.
    ``warning``: seconds before the time limit at which a run saves and goes on in its next attempt.
    """

    defaults: SlurmSpec = field(default_factory=SlurmSpec)
    allowed: tuple[str, ...] = ALLOWED
    device: Kind = "cuda"
    reports: Reports = "http"
    url: str | None = None
    warning: float = 300.0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "SlurmSetup | None":
        """None where Slurm is not used. Raises ValueError, which says what is wrong."""
        if _one_of(environment, "TRAINYARD_SLURM", ("off", "on")) == "off":
            return None
        allowed = environment.get("TRAINYARD_SLURM_ALLOW")
        names = tuple(filter(None, (name.strip() for name in allowed.split(",")))) if allowed else ALLOWED
        return cls(
            defaults=_defaults(environment),
            allowed=tuple(name for name in names if name not in OURS),
            device="cpu" if _one_of(environment, "TRAINYARD_SLURM_DEVICE", get_args(Kind)) == "cpu" else "cuda",
            reports=_reports(environment),
            url=environment.get("TRAINYARD_SLURM_URL") or None,
            warning=_seconds(environment, "TRAINYARD_SLURM_WARNING", 300.0),
        )


def _defaults(environment: Mapping[str, str]) -> SlurmSpec:
    names = {
        "partition": "TRAINYARD_SLURM_PARTITION",
        "account": "TRAINYARD_SLURM_ACCOUNT",
        "qos": "TRAINYARD_SLURM_QOS",
        "gpu_type": "TRAINYARD_SLURM_GPU_TYPE",
        "constraint": "TRAINYARD_SLURM_CONSTRAINT",
    }
    given: dict[str, object] = {leaf: environment[name] for leaf, name in names.items() if environment.get(name)}
    if environment.get("TRAINYARD_SLURM_TIME_LIMIT"):
        given["time_limit"] = _seconds(environment, "TRAINYARD_SLURM_TIME_LIMIT", 0.0)
    given["extra"] = (environment.get("TRAINYARD_SLURM_EXTRA") or "").split()
    try:
        return SlurmSpec.model_validate(given)
    except ValidationError as error:
        leaf = str(error.errors(include_input=False)[0]["loc"][0])
        name = names.get(leaf, f"TRAINYARD_SLURM_{leaf.upper()}")
        raise ValueError(f"{name} is not what sbatch takes") from None


def _reports(environment: Mapping[str, str]) -> Reports:
    directory = _one_of(environment, "TRAINYARD_SLURM_REPORTS", get_args(Reports)) == "directory"
    return "directory" if directory else "http"


def _one_of(environment: Mapping[str, str], name: str, words: tuple[str, ...]) -> str:
    """The first of ``words`` where nothing is given."""
    text = environment.get(name) or words[0]
    if text not in words:
        raise ValueError(f"{name} must be {' or '.join(words)}")
    return text


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    try:
        seconds = float(environment.get(name) or default)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be a number of seconds")
    return seconds
