#!/bin/bash
# One task for each GPU: `sbatch examples/slurm.sh`. zeroxide reads SLURM's variables; there is nothing to launch.
#SBATCH --job-name=zeroxide
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
set -eu
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
# Ranks meet at the first node of the job; another port keeps two jobs on one node apart.
export MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000))
srun --kill-on-bad-exit=1 python examples/torchrun_train.py --offload "nvme:${SLURM_TMPDIR:-/tmp}" "$@"
