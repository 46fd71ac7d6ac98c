"""The batch script of an attempt: a pure function of the spec and the settings."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import ResourcesSpec, SlurmSpec
from trainyard.service.launch.base import AttemptRef, LaunchRefused

BODY = """\
# The time limit is near: this file makes the agent have the ranks save. A signal to the step instead would end an
# agent that is still starting. Slurm warns up to a minute early, and at once if the whole limit is shorter than the
# warning, as a partition's own may be: then a quarter of the time is kept for saving.
warned() {{
  left=$(( $(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) - $(date +%s) ))
  margin=$(( (left + SECONDS) / 4 ))
  [ "$margin" -lt {warning} ] || margin={warning}
  [ "$left" -le "$margin" ] || sleep $(( left - margin ))
  : > {time_limit}
}}
trap 'warned &' USR1
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 --mpi=none --cpu-bind=none \\
  bash -c '
  export TRAINYARD_NODE=$SLURM_PROCID TRAINYARD_NODES=$SLURM_STEP_NUM_NODES
  export TRAINYARD_FIRST_NODE=$SLURM_LAUNCH_NODE_IPADDR
  exec "$@"' agent {agent} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
exit "$code"
"""


@dataclass(frozen=True)
class SbatchScript:
    """Input of `render`.

    ``options``: the spec's over the service's. ``warning``: seconds before the time limit at which the run saves.
    ``gpus``: whether its ranks get GPUs.
    """

    name: AttemptRef
    attempt: AttemptDir
    resources: ResourcesSpec
    options: SlurmSpec
    gpus: bool
    warning: float
    agent: Sequence[str]


def job_name(job_id: str) -> str:
    """Return the name that all attempts of a job share in Slurm, so that only one of them runs at a time."""
    return f"trainyard-{job_id}"


def render(batch: SbatchScript) -> str:
    """Return the script. Raises LaunchRefused if an option contains a line break or another control character."""
    options = list(_options(batch))
    for option in options:
        if not option.isprintable():
            raise LaunchRefused(f"sbatch cannot be given {option!r}")
    command = [*batch.agent, str(batch.attempt.path.parent), f"--attempt={batch.name.number}"]
    time_limit, warning = batch.attempt.time_limit.name, math.ceil(_warning(batch))
    step = BODY.format(time_limit=time_limit, warning=warning, agent=shlex.join(command))
    return "".join(["#!/bin/bash\n", *(f"#SBATCH {option}\n" for option in options), f"\n{step}"])


def merge_options(spec: SlurmSpec, service: SlurmSpec) -> SlurmSpec:
    """Return the job's options over the service's; ``extra`` has those of both."""
    given = {name: value for name, value in spec if value is not None and name != "extra"}
    return service.model_copy(update={**given, "extra": [*service.extra, *spec.extra]})


GPU_OPTIONS = ("cpus-per-gpu", "exclusive", "gpu", "mem-per-gpu", "ntasks-per-gpu", "tres-per")
"""Beginnings of options that a job without GPUs must not have."""


def preparation_options(options: SlurmSpec) -> SlurmSpec:
    """Return the options of the job that prepares the corpus of a run with ``options``: without GPUs.

    In another partition than the run's, its constraint and named nodes mean nothing.
    """
    elsewhere = options.prepare_partition is not None
    left_out = (*GPU_OPTIONS, *(("nodelist", "exclude", "reservation", "switches") if elsewhere else ()))
    extra = [line for line in options.extra if not line.removeprefix("--").startswith(left_out)]
    return options.model_copy(
        update={
            "partition": options.prepare_partition or options.partition,
            "constraint": None if elsewhere else options.constraint,
            "gpu_type": None,
            "extra": extra,
        }
    )


def _options(batch: SbatchScript) -> Iterator[str]:
    resources, slurm = batch.resources, batch.options
    yield f"--job-name={job_name(batch.name.job_id)}"
    yield f"--comment={batch.name}"
    # singleton: one attempt runs at a time, however often it is submitted. Only the service creates attempts.
    yield "--dependency=singleton"
    yield "--no-requeue"
    # No --ntasks here: with it, Slurm would always give the smallest number of a range of nodes. srun sets it.
    yield f"--nodes={_nodes(resources)}"
    ranks = resources.nproc_per_node
    if batch.gpus:
        yield f"--gres={':'.join(filter(None, ('gpu', slurm.gpu_type, str(ranks))))}"
    else:
        yield f"--cpus-per-task={ranks}"
    for option in ("partition", "account", "qos", "constraint"):
        value = getattr(slurm, option)
        if value is not None:
            yield f"--{option}={_quote(value)}"
    yield from _time_options(batch)
    yield f"--chdir={_quote(str(batch.attempt.path))}"
    yield f"--output={batch.attempt.cluster_log.relative_to(batch.attempt.path)}"
    yield "--open-mode=append"
    yield "--propagate=NONE"  # a login node's limits must not apply to the run
    yield from slurm.extra


def _nodes(resources: ResourcesSpec) -> str:
    min_nodes, max_nodes = resources.min_nodes, resources.max_nodes
    return str(max_nodes) if min_nodes == max_nodes else f"{min_nodes}-{max_nodes}"


def _time_options(batch: SbatchScript) -> Iterator[str]:
    limit = batch.options.time_limit
    if limit is not None:
        yield f"--time={math.ceil(limit / 60)}"
    yield f"--signal=B:USR1@{math.ceil(_warning(batch))}"


def _warning(batch: SbatchScript) -> float:
    # Slurm counts whole minutes. With a short limit, three quarters of it are left for training.
    limit = batch.options.time_limit
    return batch.warning if limit is None else min(batch.warning, math.ceil(limit / 60) * 60 / 4)


def _quote(text: str) -> str:
    # sbatch reads the script's options: within double quotes only the backslash and the quote are special.
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"' if plain != text or set(text) & set(" \t'&|*()[]#;") else text
