"""The script that Slurm is given to run: a pure function of what is asked for."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainyard.contract.rundir import AttemptDir
from trainyard.contract.spec import ResourcesSpec, SlurmSpec
from trainyard.service.launch.base import AttemptRef, LaunchRefused

STEP = """\
# The time is nearly over: this file tells the agent, which has the ranks save. As a signal to the step it would end
# an agent that is only just starting. Slurm warns up to a minute early, and at once where the whole limit is shorter
# than the warning, as a partition's own may be: what is left for training is left to it.
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
    """What the script is made of. ``asked``: the spec's wishes over the service's.

    ``warning``: seconds before the time limit at which the run is to save. ``gpus``: whether its ranks get GPUs.
    """

    name: AttemptRef
    attempt: AttemptDir
    resources: ResourcesSpec
    options: SlurmSpec
    gpus: bool
    warning: float
    agent: Sequence[str]


def job_name(job_id: str) -> str:
    """What a job's attempts are called in Slurm: each has the same name, so that only one of them runs at a time."""
    return f"trainyard-{job_id}"


def render(batch: SbatchScript) -> str:
    """The whole script. Raises LaunchRefused where an option would be more than one line."""
    options = list(_options(batch))
    for option in options:
        if not option.isprintable():
            raise LaunchRefused(f"sbatch cannot be given {option!r}")
    command = [*batch.agent, str(batch.attempt.path.parent), f"--attempt={batch.name.number}"]
    time_limit, warning = batch.attempt.time_limit.name, math.ceil(_warning(batch))
    step = STEP.format(time_limit=time_limit, warning=warning, agent=shlex.join(command))
    return "".join(["#!/bin/bash\n", *(f"#SBATCH {option}\n" for option in options), f"\n{step}"])


def merge_options(spec: SlurmSpec, service: SlurmSpec) -> SlurmSpec:
    """What the job wishes over what the service is set up with; further options of both."""
    wished = {name: value for name, value in spec if value is not None and name != "extra"}
    return service.model_copy(update={**wished, "extra": [*service.extra, *spec.extra]})


def _options(batch: SbatchScript) -> Iterator[str]:
    resources, asked = batch.resources, batch.options
    yield f"--job-name={job_name(batch.name.job_id)}"
    yield f"--comment={batch.name}"
    # However often it is submitted, Slurm runs one at a time; and a new attempt is the service's to make, not Slurm's.
    yield "--dependency=singleton"
    yield "--no-requeue"
    # How many tasks there are is srun's to say: with a number of them a range of nodes never is more than its least.
    yield f"--nodes={_nodes(resources)}"
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
    yield "--propagate=NONE"  # a login node's limits are none of the run's
    yield from asked.extra


def _nodes(resources: ResourcesSpec) -> str:
    least, most = resources.min_nodes, resources.max_nodes
    return str(most) if least == most else f"{least}-{most}"


def _time(batch: SbatchScript) -> Iterator[str]:
    limit = batch.options.time_limit
    if limit is not None:
        yield f"--time={math.ceil(limit / 60)}"
    yield f"--signal=B:USR1@{math.ceil(_warning(batch))}"


def _warning(batch: SbatchScript) -> float:
    """Seconds before its end that a run saves. Slurm counts whole minutes; a short limit must leave time to train."""
    limit = batch.options.time_limit
    return batch.warning if limit is None else min(batch.warning, math.ceil(limit / 60) * 60 / 4)


def _quoted(text: str) -> str:
    """As sbatch reads it in the script: within quotes only the backslash and the quote mean something."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{plain}"' if plain != text or set(text) & set(" \t'&|*()[]#;") else text
