"""The script that Slurm is given to run: a pure function of what is asked for."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from contract.rundir import AttemptDir
from contract.spec import ResourcesSpec, SlurmSpec
from service.launch.base import AttemptName

STEP = """\
# The time is nearly over: this file tells the agent, which has the ranks save. As a signal to the step it would end
# an agent that is only just starting.
trap ': > {time_limit}' USR1
srun --kill-on-bad-exit=1 --wait=0 bash -c '
  export TRAINYARD_NODE=$SLURM_PROCID TRAINYARD_NODES=$SLURM_STEP_NUM_NODES
  export TRAINYARD_FIRST_NODE=$SLURM_LAUNCH_NODE_IPADDR
  exec "$@"' agent {agent} &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
exit "$code"
"""


@dataclass(frozen=True)
class Batch:
    """What the script is made of. ``asked``: the spec's wishes over the service's.

    ``warning``: seconds before the time limit at which the run is to save. ``gpus``: whether its ranks get GPUs.
    """

    name: AttemptName
    attempt: AttemptDir
    resources: ResourcesSpec
    asked: SlurmSpec
    gpus: bool
    warning: float
    agent: Sequence[str]


def job_name(job_id: str) -> str:
    """What a job's attempts are called in Slurm: each has the same name, so that only one of them runs at a time."""
    return f"trainyard-{job_id}"


def render(batch: Batch) -> str:
    """The whole script."""
    options = "".join(f"#SBATCH {option}\n" for option in _options(batch))
    command = [*batch.agent, str(batch.attempt.path.parent), f"--attempt={batch.name.number}"]
    step = STEP.format(time_limit=batch.attempt.time_limit.name, agent=shlex.join(command))
    return f"#!/bin/bash\n{options}\n{step}"


def asked_of(spec: SlurmSpec, service: SlurmSpec) -> SlurmSpec:
    """What the job wishes over what the service is set up with; further options of both."""
    wished = {name: value for name, value in spec if value is not None and name != "extra"}
    return service.model_copy(update={**wished, "extra": [*service.extra, *spec.extra]})


def _options(batch: Batch) -> Iterator[str]:
    resources, asked = batch.resources, batch.asked
    yield f"--job-name={job_name(batch.name.job_id)}"
    yield f"--comment={batch.name}"
    # However often it is submitted, Slurm runs one at a time; and a new attempt is the service's to make, not Slurm's.
    yield "--dependency=singleton"
    yield "--no-requeue"
    yield f"--nodes={_nodes(resources)}"
    yield "--ntasks-per-node=1"
    ranks = resources.nproc_per_node
    if batch.gpus:
        yield f"--gres={':'.join(filter(None, ('gpu', asked.gpu_type, str(ranks))))}"
    else:
        yield f"--cpus-per-task={ranks}"
    for option in ("partition", "account", "qos", "constraint"):
        value = getattr(asked, option)
        if value is not None:
            yield f"--{option}={_quoted(value)}"
    yield from _time(batch)
    yield f"--chdir={_quoted(str(batch.attempt.path))}"
    yield f"--output={batch.attempt.cluster_log.relative_to(batch.attempt.path)}"
    yield "--open-mode=append"
    yield from asked.extra


def _nodes(resources: ResourcesSpec) -> str:
    least, most = resources.least_nodes, resources.most_nodes
    return str(most) if least == most else f"{least}-{most}"


def _time(batch: Batch) -> Iterator[str]:
    """Slurm counts whole minutes; it warns up to a minute early, and a short limit must leave time to train."""
    limit, warning = batch.asked.time_limit, batch.warning
    if limit is not None:
        minutes = math.ceil(limit / 60)
        yield f"--time={minutes}"
        warning = min(warning, minutes * 60 / 4)
    yield f"--signal=B:USR1@{math.ceil(warning)}"


def _quoted(text: str) -> str:
    """As sbatch reads it in the script: within quotes only the backslash and the quote mean something."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"' if plain != text or set(text) & set(" \t'&|*()[]#;") else text
