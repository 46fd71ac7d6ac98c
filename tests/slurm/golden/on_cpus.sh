#!/bin/bash
#SBATCH --job-name=trainyard-job_abc
#SBATCH --comment=job_abc/3
#SBATCH --dependency=singleton
#SBATCH --no-requeue
#SBATCH --nodes=1-2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=2
#SBATCH --signal=B:USR1@30
#SBATCH --chdir="/shared/my \"own\" home/runs/job_abc/attempt-0003"
#SBATCH --output=logs/cluster.log
#SBATCH --open-mode=append

# The time is nearly over: this file tells the agent, which has the ranks save. As a signal to the step it would end
# an agent that is only just starting.
trap ': > time_limit' USR1
srun --kill-on-bad-exit=1 --wait=0 bash -c '
  export TRAINYARD_NODE=$SLURM_PROCID TRAINYARD_NODES=$SLURM_STEP_NUM_NODES
  export TRAINYARD_FIRST_NODE=$SLURM_LAUNCH_NODE_IPADDR
  exec "$@"' agent /opt/trainyard/bin/python -P -m worker.agent '/shared/my "own" home/runs/job_abc' --attempt=3 &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
exit "$code"
