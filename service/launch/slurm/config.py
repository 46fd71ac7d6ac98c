"""How this service uses Slurm: read from the environment with the other settings."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from trainyard.contract.spec import SlurmSpec
from trainyard.service.settings_base import (
    EnvironmentSettings,
    InvalidSettings,
    Seconds,
    split_commas,
)

ALLOWED = tuple(
    split_commas("""
    cpus-per-gpu, cpus-per-task, exclude, exclusive, gpu-freq, hint, licenses, mem, mem-per-cpu, mem-per-gpu, nice,
    nodelist, reservation, switches, tmp
    """)
)
"""Options of sbatch that a spec may give if the settings name no others: none of them runs anything."""

OURS = frozenset(
    split_commas("""
    array, batch, begin, chdir, cluster-constraint, clusters, comment, dependency, error, export, export-file,
    get-user-env, gid, help, hold, input, job-name, kill-on-invalid-dep, no-kill, no-requeue, nodes, ntasks,
    ntasks-per-node, open-mode, output, parsable, propagate, quiet, requeue, signal, test-only, uid, usage, version,
    wait, wrap
    """)
)
"""Options that the launcher relies on, or that would make a job another user's: a spec may never give them."""

OF_A_SPEC = {
    "partition": "TRAINYARD_SLURM_PARTITION",
    "account": "TRAINYARD_SLURM_ACCOUNT",
    "qos": "TRAINYARD_SLURM_QOS",
    "gpu_type": "TRAINYARD_SLURM_GPU_TYPE",
    "constraint": "TRAINYARD_SLURM_CONSTRAINT",
    "time_limit": "TRAINYARD_SLURM_TIME_LIMIT",
    "extra": "TRAINYARD_SLURM_EXTRA",
}
"""The variables for what a spec leaves out."""


def _defaults(environment: Mapping[str, str]) -> SlurmSpec:
    given: dict[str, Any] = {leaf: environment[name] for leaf, name in OF_A_SPEC.items() if environment.get(name)}
    given["extra"] = given.get("extra", "").split()
    try:
        return SlurmSpec.model_validate(given, strict=False)
    except ValidationError as error:
        kinds = {OF_A_SPEC[str(found["loc"][0])]: found["type"] for found in error.errors(include_input=False)}
        must = {"float_parsing": "must be a number of seconds"}
        lines = [f"{name} {must.get(kind, 'is not what sbatch takes')}" for name, kind in kinds.items()]
        raise InvalidSettings("\n".join(lines)) from None


class SlurmSetup(EnvironmentSettings):
    """How Slurm is used. ``defaults``: what a spec leaves out. ``device``: what "auto" means on the nodes.

    ``reports``: how agents report, over HTTP to ``url`` (None: where the service listens) or through the run directory.
    ``warning``: seconds before the time limit at which a run saves, to go on in its next attempt.
    """

    defaults: Annotated[SlurmSpec, BeforeValidator(_defaults)] = Field(default_factory=SlurmSpec)
    allowed: Annotated[
        tuple[str, ...], BeforeValidator(lambda text: [n for n in split_commas(text) if n not in OURS])
    ] = Field(ALLOWED, alias="TRAINYARD_SLURM_ALLOW")
    device: Literal["cuda", "cpu"] = Field("cuda", alias="TRAINYARD_SLURM_DEVICE")
    reports: Literal["http", "directory"] = Field("http", alias="TRAINYARD_SLURM_REPORTS")
    url: str | None = Field(None, alias="TRAINYARD_SLURM_URL")
    warning: Seconds = Field(300.0, alias="TRAINYARD_SLURM_WARNING")

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "SlurmSetup | None":
        """None if Slurm is not used. Raises SettingsRefused."""
        switch = environment.get("TRAINYARD_SLURM") or "off"
        if switch not in ("off", "on"):
            raise InvalidSettings("TRAINYARD_SLURM must be off or on")
        return cls.from_environment(environment, defaults=environment) if switch == "on" else None
