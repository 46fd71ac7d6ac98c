"""Slurm settings, read from the environment with the other settings."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from trainyard.contract.spec import SlurmSpec
from trainyard.service.settings_base import EnvironmentSettings, InvalidSettings, Seconds, split_commas

# Options of sbatch that a spec may set by default. None of them runs anything.
ALLOWED = tuple(
    split_commas("""
    cpus-per-gpu, cpus-per-task, exclude, exclusive, gpu-freq, hint, licenses, mem, mem-per-cpu, mem-per-gpu, nice,
    nodelist, reservation, switches, tmp
    """)
)

# Options that the launcher relies on, or that would make the job another user's. A spec may never set them.
RESERVED = frozenset(
    split_commas("""
    array, batch, begin, chdir, cluster-constraint, clusters, comment, dependency, error, export, export-file,
    get-user-env, gid, help, hold, input, job-name, kill-on-invalid-dep, no-kill, no-requeue, nodes, ntasks,
    ntasks-per-node, open-mode, output, parsable, propagate, quiet, requeue, signal, test-only, uid, usage, version,
    wait, wrap
    """)
)

# Variables with the defaults for fields that a spec omits.
SPEC_VARIABLES = {
    "partition": "TRAINYARD_SLURM_PARTITION",
    "prepare_partition": "TRAINYARD_SLURM_PREPARE_PARTITION",
    "account": "TRAINYARD_SLURM_ACCOUNT",
    "qos": "TRAINYARD_SLURM_QOS",
    "gpu_type": "TRAINYARD_SLURM_GPU_TYPE",
    "constraint": "TRAINYARD_SLURM_CONSTRAINT",
    "time_limit": "TRAINYARD_SLURM_TIME_LIMIT",
    "extra": "TRAINYARD_SLURM_EXTRA",
}


def _defaults(environment: Mapping[str, str]) -> SlurmSpec:
    given: dict[str, Any] = {leaf: environment[name] for leaf, name in SPEC_VARIABLES.items() if environment.get(name)}
    given["extra"] = given.get("extra", "").split()
    try:
        return SlurmSpec.model_validate(given, strict=False)
    except ValidationError as error:
        kinds = {SPEC_VARIABLES[str(item["loc"][0])]: item["type"] for item in error.errors(include_input=False)}
        must = {"float_parsing": "must be a number of seconds"}
        lines = [f"{name} {must.get(kind, 'is not what sbatch takes')}" for name, kind in kinds.items()]
        raise InvalidSettings("\n".join(lines)) from None


class SlurmSetup(EnvironmentSettings):
    """Slurm settings.

    ``defaults`` are for fields that a spec omits. ``device`` is what "auto" means on the nodes. ``reports``: agents
    report over HTTP to ``url`` (None: the address that the service listens on), or through the run directory.
    ``warning``: seconds before the time limit at which a run saves, to resume in its next attempt.
    """

    defaults: Annotated[SlurmSpec, BeforeValidator(_defaults)] = Field(default_factory=SlurmSpec)
    allowed: Annotated[
        tuple[str, ...], BeforeValidator(lambda text: [n for n in split_commas(text) if n not in RESERVED])
    ] = Field(ALLOWED, alias="TRAINYARD_SLURM_ALLOW")
    device: Literal["cuda", "cpu"] = Field("cuda", alias="TRAINYARD_SLURM_DEVICE")
    reports: Literal["http", "directory"] = Field("http", alias="TRAINYARD_SLURM_REPORTS")
    url: str | None = Field(None, alias="TRAINYARD_SLURM_URL")
    warning: Seconds = Field(300.0, alias="TRAINYARD_SLURM_WARNING")

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "SlurmSetup | None":
        """Return the settings, or None if Slurm is not used. Raises InvalidSettings."""
        switch = environment.get("TRAINYARD_SLURM") or "off"
        if switch not in ("off", "on"):
            raise InvalidSettings("TRAINYARD_SLURM must be off or on")
        return cls.from_environment(environment, defaults=environment) if switch == "on" else None
