#!/bin/bash
#SBATCH --job-name=trainyard-job_abc
#SBATCH --comment=job_abc/3
#SBATCH --dependency=singleton
#SBATCH --no-requeue
#SBATCH --nodes=2
#SBATCH --gres=gpu:a100:8
#SBATCH --partition=train
#SBATCH --account=mine
#SBATCH --qos=long
#SBATCH --constraint="ib&nvme"
#SBATCH --time=1440
#SBATCH --signal=B:USR1@300
#SBATCH --chdir=/shared/home/runs/job_abc/attempt-0003
#SBATCH --output=logs/cluster.log
#SBATCH --open-mode=append
#SBATCH --propagate=NONE
#SBATCH --mem=64G
#SBATCH --exclusive

# The time limit is near: this file makes the agent have the ranks save. A signal to the step instead would end an
# agent that is still starting. Slurm warns up to a minute early, and at once if the whole limit is shorter than the
# warning, as a partition's own may be: then a quarter of the time is kept for saving.
warned() {
  left=$(( $(date -d "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)" +%s) - $(date +%s) ))
  margin=$(( (left + SECONDS) / 4 ))
  [ "$margin" -lt 300 ] || margin=300
  [ "$left" -le "$margin" ] || sleep $(( left - margin ))
  : > time_limit
}
trap 'warned &' USR1
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0 --mpi=none --cpu-bind=none \
  bash -c '
  export TRAINYARD_NODE=$SLURM_PROCID TRAINYARD_NODES=$SLURM_STEP_NUM_NODES
  export TRAINYARD_FIRST_NODE=$SLURM_LAUNCH_NODE_IPADDR
  exec "$@"' agent /opt/trainyard/bin/python -P -m trainyard.worker.agent /shared/home/runs/job_abc --attempt=3 &
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
exit "$code"
