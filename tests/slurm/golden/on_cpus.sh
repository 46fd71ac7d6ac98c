#!/bin/bash
#SBATCH --job-name=trainyard-job_abc
#SBATCH --comment=job_abc/3
#SBATCH --dependency=singleton
#SBATCH --no-requeue
#SBATCH --nodes=1-2
#SBATCH --cpus-per-task=2
#SBATCH --time=2
#SBATCH --signal=B:USR1@30
#SBATCH --chdir="/shared/my \"own\" home/runs/job_abc/attempt-0003"
#SBATCH --output=logs/cluster.log
#SBATCH --open-mode=append
#SBATCH --propagate=NONE

# The time limit is near: this file makes the agent have the ranks save. A signal to the step instead would end an
# agent that is still starting. Slurm warns up to a minute early, and at once if the whole limit is shorter than the
# warning, as a partition's own may be: then a quarter of the time is kept for saving.
warned() {
  left=$(( $(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) - $(date +%s) ))
  margin=$(( (left + SECONDS) / 4 ))
  [ "$margin" -lt 30 ] || margin=30
  [ "$left" -le "$margin" ] || sleep $(( left - margin ))
  : > time_limit
}
trap 'warned &' USR1
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 --mpi=none --cpu-bind=none \
  bash -c '
  export TRAINYARD_NODE=$SLURM_PROCID TRAINYARD_NODES=$SLURM_STEP_NUM_NODES
  export TRAINYARD_FIRST_NODE=$SLURM_LAUNCH_NODE_IPADDR
  exec "$@"' agent /opt/trainyard/bin/python -P -m trainyard.worker.agent '/shared/my "own" home/runs/job_abc' --attempt=3 &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
exit "$code"
